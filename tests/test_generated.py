"""The generated parts of the documents are what the code and the results say."""

import ast
import json
import re
import sys
from pathlib import Path

import pytest
import transformers

from jx_neuron.models.registry import FAMILIES

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import generated  # noqa: E402


@pytest.mark.parametrize("path", sorted((ROOT / "docs").rglob("*.md")), ids=lambda path: path.name)
def test_generated_parts_are_up_to_date(path: Path) -> None:
    text = path.read_text()
    assert text == generated.up_to_date(text), "run python docs/generated.py"


def test_every_part_is_in_a_document() -> None:
    marks = {
        mark
        for path in (ROOT / "docs").rglob("*.md")
        for mark in re.findall(r"<!-- generated: (\w+) -->", path.read_text())
    }
    assert marks == {*generated.PARTS}
    assert generated.up_to_date("<!-- generated: targets -->\nother\n<!-- /generated -->").count("|") > 10


FUNCTIONS: dict[str, list[ast.AST]] = {}
for file in (ROOT / "tests").rglob("*.py"):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef):
            FUNCTIONS.setdefault(node.name, []).append(node)


def asserts(function: ast.AST, seen: frozenset[str] = frozenset()) -> bool:
    """Whether a test, or a helper of the tests that it calls, asserts something."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", None) or getattr(node.func, "attr", "")
            if name.startswith("assert_") or name == "raises":
                return True
            if name not in seen and any(asserts(helper, seen | {name}) for helper in FUNCTIONS.get(name, ())):
                return True
    return False


def test_the_table_of_features_names_tests_that_assert() -> None:
    features = json.loads((ROOT / "docs" / "features.json").read_text())
    backends = ("xla", "host", "neuron")
    assert all(set(feature) == {"feature", *backends} and any(feature[b] for b in backends) for feature in features)
    assert len({feature["feature"] for feature in features}) == len(features) > 20
    for test, backend in sorted({(feature[b], b) for feature in features for b in backends if feature[b]}):
        file, name = test.split("::")
        text = (ROOT / "tests" / file).read_text()
        (function,) = (node for node in ast.parse(text).body if getattr(node, "name", "") == name)
        assert asserts(function), f"{test} asserts nothing"
        # xla is the default; the other two are named, and lowered programs stand in for neuron
        words = {"xla": "", "host": '"host"|HOST', "neuron": '"neuron"|lower|violations'}[backend]
        assert re.search(words, text), f"{test} does not name backend {backend}"
    assert not asserts(ast.parse("def test(): compute()"))


def test_families_beside_those_of_other_projects() -> None:
    others = json.loads((ROOT / "docs" / "families.json").read_text())
    for project in others.values():
        assert project["source"].startswith("https://")
        assert re.fullmatch(r"[A-Z][a-z]+ 20\d\d", project["date"])
        assert {*project["yes"], *project.get("contrib", ())} <= set(transformers.CONFIG_MAPPING)
        assert not set(project["yes"]) & set(project.get("contrib", ()))
    head, _, *rows = (re.split(r" *\| *", line)[1:-1] for line in generated.families().split("\n\n")[0].splitlines())
    assert head == ["model_type", "jx_neuron", *others]
    ours = {name for name, entry in FAMILIES.items() if isinstance(entry, str)}
    assert {row[0].strip("`") for row in rows if row[1] == "yes"} == ours
    assert rows[-1][1] == str(len(ours))


def test_benchmark_tables_hold_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {"tokens_per_second": 9.6, "prefill_milliseconds": 70.2, "decode_over_hf": 1.5, "prefill_over_hf": 0.5}
    engines = {
        "jx_neuron_f32": ours,
        "jx_neuron_bf16": {"tokens_per_second": 12.0, "decode_over_hf": 2.0},
        "hf": {"tokens_per_second": 6.4, "prefill_milliseconds": 35.0},
    }
    monkeypatch.setattr(generated, "ROOT", tmp_path)
    file = tmp_path / "benchmarks" / "results" / "gpt2.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"model": "gpt2", "rows": [{"batch": 4, "engines": engines}]}))
    assert generated.peers().splitlines() == [
        "| model | phase | batch | hf |",
        "| --- | --- | --- | --- |",
        "| gpt2 | decode | 4 | 1.50 / 2.00 |",
        "| gpt2 | prefill | 4 | 0.50 |",
    ]
    assert generated.rates().splitlines()[2:] == [
        "| gpt2 | decode | 4 | 6 | 12 | 10 |",
        "| gpt2 | prefill | 4 | 35 |  | 70 |",
    ]
