"""Every command and Python block of the documents runs, and what they say of the code is so.

A document's blocks run from top to bottom in one folder: Python in one namespace, commands in a shell. A block may say,
after its language, `slow` (minutes: run with -m slow, in a clone), `server` (slow, and goes on until the page ends) or
`notest:` and a reason. A block of `text` after
one that runs is its output: numbers may differ, and an ellipsis is any text.
"""

import ast
import contextlib
import doctest
import io
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import huggingface_hub.constants
import peft
import pytest
import tiny
import torch
import transformers
import typer.main
from markdown_it import MarkdownIt

import jx_neuron
from jx_neuron.cli.app import app

ROOT = Path(__file__).parent.parent

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN = ("python", "sh")
README_LINES = 100  # two screens
# what documents name, and the tiny random model that stands there in its stead; nothing else is found
ON_THE_HUB = {"openai-community/gpt2": "gpt2"}
FOLDERS = {"my-llama": "llama", "my-adapter": "adapter", "persimmon-8b": "persimmon"}
REVISION = "0" * 40
NO_TESTS_IN_TESTS = "--collect-only -qq"  # a test that ran all tests would run itself
LEFT_OUT = shutil.ignore_patterns(".*_cache", ".git", ".hypothesis", ".venv", "__pycache__", "build", "dist", "site")


@dataclass(frozen=True)
class Block:
    """A fenced block: its first line's number, its language, the marker after that, its text, and its output.

    The output is None where the document shows none.
    """

    line: int
    language: str
    marker: str
    text: str
    output: str | None = None

    @property
    def is_run(self) -> bool:
        return not self.marker.startswith("notest")

    def check(self, path: Path, printed: str) -> None:
        """The output is as the document shows it, and is shown where there is any."""
        shown = self.output or ""
        assert is_output(shown, printed), (
            f"{path.name}, line {self.line} prints\n{printed}\nand the document shows\n{shown}"
        )


def parts(path: Path) -> Iterator[tuple[str, str, int]]:
    """What a document is made of: kind, content (of a fence, its first line too), line."""
    for token in MarkdownIt().enable("table").parse(path.read_text()):
        line = (token.map or [0])[0] + 1
        if token.type in ("fence", "code_block", "heading_open"):
            yield token.type, f"{token.info}\n{token.content}", line
        for child in token.children or ():
            target = child.attrs.get("href") or child.attrs.get("src")
            yield (child.type, str(target or child.content), line)


def blocks(path: Path) -> list[Block]:
    found = []
    for kind, content, line in parts(path):
        if kind == "fence":
            info, text = content.split("\n", 1)
            language, _, marker = info.partition(" ")
            if language == "text":
                assert found, f"{path.name}, line {line}: this is no block's output"
                assert found[-1].output is None, f"{path.name}, line {line}: a second output"
                found[-1] = replace(found[-1], output=text)
            else:
                found.append(Block(line, language, marker.strip(), text))
    return found


NUMBER = re.compile(r"\d[\d.,]*(?:e[+-]?\d+)?")


def is_output(shown: str, printed: str) -> bool:
    """Whether `printed` is `shown`, numbers and spaces aside, where an ellipsis is any text."""
    pieces, text = (
        [re.sub(r"[\s─]+", " ", NUMBER.sub("#", part)).strip() for part in parts]
        for parts in (shown.split("…"), [printed])
    )
    return re.fullmatch(" ?.* ?".join(map(re.escape, pieces)), text[0], re.DOTALL) is not None


def test_an_output_is_compared_but_for_numbers() -> None:
    assert is_output("tp 2: 13.8 GiB\n", "tp 4:  1,024 GiB")
    assert is_output("a … z\n", "a b c z\n")
    assert is_output("", "\n")
    assert not is_output("tp 2\n", "tq 2\n")
    assert not is_output("", "a word\n")
    assert not is_output("a … z\n", "a b c\n")


def documents(*markers: str) -> list[Path]:
    return [d for d in DOCUMENTS if any(b.language in RUN and b.marker in markers for b in blocks(d))]


def readme_by_default(paths: list[Path]) -> list[object]:
    """The blocks of README.md run in the default tests, and those of other documents with -m slow."""
    return [path if path.name == "README.md" else pytest.param(path, marks=pytest.mark.slow) for path in paths]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_every_block_is_run_or_says_why_not(path: Path) -> None:
    for block in blocks(path):
        if not block.language.startswith("{"):  # what Sphinx fills in
            assert block.language in RUN, f"line {block.line}: {block.language!r} is not run"
            assert block.marker in ("", "slow", "server") or re.fullmatch(r"notest: .{10,}", block.marker), (
                f"line {block.line}"
            )
            assert block.marker or not re.search(r"pip install|jx-neuron serve", block.text), (
                f"line {block.line} would install into this environment, or serve without end: slow, server or notest"
            )
    for kind, content, line in parts(path):
        if kind == "code_block":
            assert not re.search(r"^\s*(\$|>>>|jx-neuron|pip|pytest|python|import|from)\b", content, re.MULTILINE), line


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer for each of the names of ON_THE_HUB and FOLDERS."""
    folder = tmp_path_factory.mktemp("models")
    for name in {*ON_THE_HUB.values(), *FOLDERS.values()} - {"persimmon", "adapter"}:
        tiny.saved(name, folder / name)
    torch.manual_seed(0)
    persimmon = transformers.PersimmonConfig(
        **tiny.SPECIAL, vocab_size=tiny.VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=128,
    )  # fmt: skip
    transformers.PersimmonForCausalLM(persimmon).save_pretrained(folder / "persimmon")
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(tiny.model("llama"), lora).save_pretrained(folder / "adapter")
    for path in folder.iterdir():
        tiny.tokenizer().save_pretrained(path)
    return folder


@pytest.fixture
def place(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a document's blocks run in: the checkpoints they name, and no network but for pip."""
    hub = tmp_path / "hf" / "hub"
    for name, model in ON_THE_HUB.items():
        repository = hub / f"models--{name.replace('/', '--')}"
        shutil.copytree(models / model, repository / "snapshots" / REVISION)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(REVISION)
    here = tmp_path / "here"
    for name, model in FOLDERS.items():
        shutil.copytree(models / model, here / name)
    shutil.copy(ROOT / "examples" / "persimmon.py", here)
    monkeypatch.setenv("HF_HOME", str(hub.parent))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(here)
    return here


def subprocess_of(block: Block, path: Path) -> None:
    """Runs the block in a process of its own."""
    command = ["bash", "-eo", "pipefail", "-c"] if block.language == "sh" else ["python", "-c"]
    done = subprocess.run(
        [*command, block.text],
        check=False,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=1200,
    )
    said = (done.stdout + done.stderr)[-6000:]
    assert done.returncode == 0, f"{path.name}, line {block.line}:\n{block.text}{said}"
    block.check(path, done.stdout)


@contextlib.contextmanager
def serving(block: Block) -> Iterator[None]:
    """Runs the block's server, and waits until it is ready."""
    with subprocess.Popen(["bash", "-c", f"exec {block.text}"], stdin=subprocess.DEVNULL) as server:
        try:
            health = "curl -sf --retry 300 --retry-delay 1 --retry-all-errors http://127.0.0.1:8000/health"
            subprocess.run(health.split(), check=True, timeout=300)
            yield
        finally:
            server.terminate()


def as_installed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts jx-neuron and python on PATH as installing does, for tests that run without installing."""
    script = place.parent / "bin" / "jx-neuron"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m jx_neuron "$@"\n')
    script.chmod(0o755)
    folders = [str(Path(sys.executable).parent), str(script.parent), os.environ["PATH"]]
    monkeypatch.setenv("PATH", os.pathsep.join(folders))
    monkeypatch.setenv("PYTHONPATH", str(Path(jx_neuron.__file__).parent.parent))


@pytest.mark.parametrize("path", readme_by_default(documents("")), ids=lambda p: p.name)
def test_blocks_run(path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_installed(place, monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place.parent / "cache"))
    monkeypatch.syspath_prepend(str(place))
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(path):
        if block.language == "python" and not block.marker:
            code = "\n" * block.line + block.text
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(code, path.name, "exec"), namespace)
            block.check(path, printed.getvalue())
        elif block.language == "sh" and not block.marker:
            subprocess_of(block, path)


@pytest.mark.slow
@pytest.mark.parametrize("path", documents("slow"), ids=lambda p: p.name)
def test_commands_run_in_a_clone_with_nothing_installed(
    path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ROOT, place, ignore=LEFT_OUT, dirs_exist_ok=True)
    monkeypatch.setenv("PYTEST_ADDOPTS", NO_TESTS_IN_TESTS)
    if any("pip install" in block.text and block.is_run for block in blocks(path)):
        fresh = place.parent / "venv"
        venv.create(fresh, with_pip=True)
        # a document may make, and enter, its own
        environments = [str(folder / "bin") for folder in (place / ".venv", fresh)]
        monkeypatch.setenv("PATH", os.pathsep.join([*environments, os.environ["PATH"]]))
        monkeypatch.delenv("PYTHONPATH", raising=False)
    else:
        as_installed(place, monkeypatch)
    with contextlib.ExitStack() as servers:
        for block in blocks(path):
            if block.marker == "server":
                servers.enter_context(serving(block))
            elif block.marker == "slow" or (block.language == "sh" and block.is_run):
                subprocess_of(block, path)


def test_inline_commands_have_such_options() -> None:
    commands = typer.main.get_command(app).commands
    asked = [content.split() for path in DOCUMENTS for kind, content, _ in parts(path) if kind == "code_inline"]
    asked = [words for words in asked if words[0] == "jx-neuron" and len(words) > 1]
    assert asked
    for _, command, *words in asked:
        known = {option for parameter in commands[command].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, (command, words)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(path: Path) -> None:
    for kind, target, line in parts(path):
        if kind in ("link_open", "image") and "://" not in target:
            file, _, anchor = target.partition("#")
            linked = path.parent / file if file else path
            assert linked.exists(), f"line {line}: {target}"
            assert not anchor or anchor in anchors(linked), f"line {line}: {target}"


def anchors(path: Path) -> set[str]:
    """What a link to a heading of the document says after its #, as GitHub and Sphinx have it."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_is_short_and_states_what_was_not_tested() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= README_LINES
    assert "Status: not yet tested on Trainium or Inferentia hardware." in text


def test_files_that_are_named_exist() -> None:
    named = {
        name
        for path in DOCUMENTS
        for kind, content, _ in parts(path)
        if kind == "code_inline"
        for name in re.findall(r"(?:jx_neuron|benchmarks|tests|docs|examples)/[\w/.]*", content)
    }
    assert {"benchmarks/peers.py", "jx_neuron/nn/", "tests/test_smollm2.py"} <= named
    assert {name for name in named if not (ROOT / name).exists()} == set()


INSTALLED_FROM_AN_INDEX = re.compile(r"""pip3?\s+install(?:\s+[^\s&;|`]+){0,6}?\s+['"]?jx[-_]neuron(?! compile)""")


def test_nothing_of_ours_is_installed_by_a_name_that_is_on_no_index() -> None:
    folders = ("jx_neuron", "docs", "examples", "benchmarks", "tests")
    files = [*ROOT.glob("*.*"), *(file for folder in folders for file in (ROOT / folder).rglob("*.*"))]
    files = [file for file in files if file.suffix in (".md", ".py", ".ipynb", ".toml")]
    assert {"README.md", "pyproject.toml", "neuronx_cc.py", "sampling.ipynb"} <= {file.name for file in files}
    for file in files:
        assert not INSTALLED_FROM_AN_INDEX.search(file.read_text()), file
    for advice in ("-U jx-neuron", "\n'jx-neuron[bench]'", "--extra-index-url https://a.b jx_neuron"):
        assert INSTALLED_FROM_AN_INDEX.search(f"pip install {advice}")
    assert not INSTALLED_FROM_AN_INDEX.search("pip install . && jx-neuron sample")


def strings(node: ast.AST) -> Iterator[str]:
    """Every text of a module, an ellipsis where a value is put in."""
    for found in ast.walk(node):
        if isinstance(found, ast.JoinedStr):
            yield "".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in found.values)
        elif isinstance(found, ast.Constant) and isinstance(found.value, str):
            yield found.value


def test_every_extra_is_described_with_its_packages() -> None:
    """docs/installing.md, by pyproject.toml; `test` has too many packages to name."""
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \|$", (ROOT / "docs/installing.md").read_text(), re.M)
    described = {extra: set(packages.split(", ")) for extra, packages in rows}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {extra: {re.split(r"[^\w-]", requirement)[0] for requirement in extras[extra]} for extra in extras}
    assert {**described, "test": named["test"]} == named


def test_troubleshooting_quotes_messages_that_there_are() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = re.findall(r"^### `(.*)`$", text, re.MULTILINE)
    assert len(quoted) == text.count("\n### ") > 20
    package = Path(jx_neuron.__file__).parent
    messages = [text for file in package.rglob("*.py") for text in strings(ast.parse(file.read_text()))]
    for message in quoted:
        pieces = [re.escape(piece.strip()) for piece in message.split("…")]
        pattern = re.compile(".*".join(pieces), re.DOTALL)
        assert any(pattern.search(found) for found in messages), message


WITH_EXAMPLES = [
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for file in sorted((ROOT / "jx_neuron").rglob("*.py"))
    if re.search(r"^\s*>>> ", file.read_text(), re.MULTILINE)
]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_of_docstrings(name: str) -> None:
    found = doctest.testmod(import_module(name))
    assert found.attempted
    assert not found.failed
