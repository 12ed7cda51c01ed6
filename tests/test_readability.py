"""Documents, docstrings, messages and comments have no words of a dialect: plain English, subject first."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("jx_neuron", "docs", "examples", "benchmarks")
FILES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(
        path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in (".md", ".py", ".ipynb")
    ),
]
DIALECT = {
    r"\bwhat(?: \w+){1,6} holds?\b": "name the contents",
    r"\b(?:lie|lies|lying)\b": "is, or is stored",
    r"\b(?:stand|stands|stood|standing)\b(?![- ]?(?:for|in|ins|alone)\b)": "is, or is at",
    r"\b(?:is|are|was|were) to be\b": "say who does it",
    r"\bof it\b": "its",
    r"\bby hand\b": "say how",
    r"\bso many\b": "this number of",
    r"\bthose that\b": "name them",
    r"\bcame about\b": "was",
    r"\bheld? against\b": "compared with",
    r"\bin its stead\b": "instead",
    r"\bone's own\b": "your own",
    r"\b(?:take|takes|taken) apart\b": "split",
    r"\bput together\b": "joined",
    r"\bwhoever\b": "anyone who",
    r"\bnothing but\b": "only",
    r"\blikewise\b": "also",
    r"\banew\b": "again",
    r"\bspares?\b(?= (?:a|an|the)\b)": "saves",
    r"\bbut for\b": "except for",
    r"\bways? out\b": "remedy",
    r"(?<![.])(?<!import adapted, )\bbeside\b(?= [a-z`])": "next to, besides, or compared with",
    r"\bin turn(?=[,;:]|\.\s)": "alternating",
    r"\b(?:to|cannot|can|could) be had\b": "is not possible, or is not there",
    r"\b(?:are|is) level\b": "equal",
    r"\bcomes? to hold\b": "contains",
    r"\b(?:prompts?|queries|rows|tokens) (?:that )?go(?:es)? through\b": "is computed",
    r"\b(?:is|are|was|were) told\b": "say who says it, and how",
    r"\bbears? on\b": "affects",
    r"\bin hand\b": "say where it is",
    r"\bas it came\b": "unchanged",
    r"\bare said to\b": "say who says it",
}


def dialect(text: str) -> list[str]:
    """The sentences' words that are on the list, each with what would be plain, and the number of its line."""
    text = re.sub(r"[ \t]*\n[ \t#*>]*(?=\w)", lambda gap: "\n" * gap[0].count("\n"), text)
    return [
        f"line {text.count(chr(10), 0, match.start()) + 1}: {match[0]!r}: {instead}"
        for words, instead in DIALECT.items()
        for match in re.finditer(words.replace(" ", r"\s"), text, re.IGNORECASE)
    ]


def test_plain_english() -> None:
    said = {str(path.relative_to(ROOT)): dialect(path.read_text()) for path in FILES}
    assert len(said) > 300
    assert {path: lines for path, lines in said.items() if lines} == {}


def test_the_list_finds_what_it_lists() -> None:
    said = "What a slot then holds lies where those that stand\n    there were: this is to be made by hand."
    assert sorted(line.split("'")[1] for line in dialect(said)) == [
        "What a slot then holds", "by hand", "is to be", "lies", "stand", "those that",
    ]  # fmt: skip
    assert dialect("a part\n    of\n    # it")[0].startswith("line 2: ")
    assert [line.split("'")[1] for line in dialect("Rows go through\nblocks anew, in turn, beside the rest.")] == [
        "anew", "beside", "in turn", "Rows go through",
    ]  # fmt: skip
    assert not dialect("A stand-in for it stands for a solution. Whatever holds, understand standard lines.")
    assert not dialect("for row in turn.rows:\n    beside = [row, beside + 1]")
