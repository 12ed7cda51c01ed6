"""The wheel and the sdist: what is in them, and that they install and run where there is nothing else."""

import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata

import jx_neuron

ROOT = Path(__file__).parent.parent
KINDS = {".py", ".md", ".ipynb", ".json", ".svg", ".png", ".toml", ".typed", ".yml", ".cff"}
BARE = {"LICENSE", ".gitignore", "PKG-INFO", ".ci/run"}  # files of no such kind that an sdist may hold
FOLDERS = (".github", "jx_neuron", "tests", "examples", "docs", "benchmarks")

pytestmark = pytest.mark.slow


def python(*arguments: object, executable: object = sys.executable, cwd: Path | None = None) -> str:
    """What it prints, where nothing of this checkout is on its path."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "COLUMNS")}
    command = [str(executable), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an sdist, and of the wheel that was made from it."""
    out = tmp_path_factory.mktemp("dist")
    python("-m", "build", "--outdir", out, ROOT, cwd=out)
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(built: Path) -> Path:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        archive.extractall(built / "unpacked", filter="data")
    (folder,) = (built / "unpacked").iterdir()
    return folder


def on_disk(folder: str) -> set[str]:
    """Its files of the kinds that we write, but for what building the documents leaves."""
    found = [path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.suffix in KINDS]
    return {path.as_posix() for path in found if "_build" not in path.parts}


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    own = {name for name in names if ".dist-info/" not in name}
    assert own == {path.relative_to(ROOT).as_posix() for path in (ROOT / "jx_neuron").rglob("*.py")} | {
        "jx_neuron/models/known.json", "jx_neuron/py.typed",
    }  # fmt: skip
    assert {name.rpartition("dist-info/")[2] for name in names - own} == {
        "METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE",
    }  # fmt: skip


def test_the_sdist_holds_what_building_and_testing_take(unpacked: Path) -> None:
    names = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    for folder in FOLDERS:
        assert on_disk(folder) <= names
    root = {"pyproject.toml", "README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "SECURITY.md"}
    assert root | BARE <= names
    assert {name for name in names if Path(name).suffix not in KINDS} == BARE
    assert os.access(unpacked / ".ci" / "run", os.X_OK)


def test_the_sdist_s_own_tests_run(unpacked: Path) -> None:
    tests = ("tests/test_imports.py", "tests/test_public_api.py", "tests/test_own_decoder.py::test_it_is_short")
    said = python("-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, cwd=unpacked)
    assert " passed" in said
    where = python("-c", "import jx_neuron; print(jx_neuron.__file__)", cwd=unpacked).strip()
    assert Path(where) == unpacked / "jx_neuron" / "__init__.py"


def test_the_metadata_is_valid_and_says_what_it_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        told = Metadata.from_email(archive.read(name), validate=True)
    assert (told.name, str(told.version)) == ("jx-neuron", jx_neuron.__version__)
    assert told.license_expression == "Apache-2.0"
    assert told.description == (ROOT / "README.md").read_text()
    needed = {requirement.name for requirement in told.requires_dist if requirement.marker is None}
    assert {"jax", "flax", "safetensors", "typer"} <= needed
    assert not {"torch", "neuronx-cc", "torch-neuronx", "pytest"} & needed
    assert {"test", "docs", "neuron"} <= set(told.provides_extra)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a fresh environment that has the wheel, and what it asks for."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=True)
    python("-m", "pip", "install", "-q", wheel, executable=folder / "bin" / "python", cwd=folder)
    return folder / "bin"


def test_the_installed_wheel_is_whole_and_brings_no_torch(installed: Path, tmp_path: Path) -> None:
    code = """
import importlib.util, importlib.metadata, pkgutil, jx_neuron
assert importlib.util.find_spec("torch") is None
assert importlib.metadata.version("jx-neuron") == jx_neuron.__version__
for name in jx_neuron.__all__:
    getattr(jx_neuron, name)
for module in pkgutil.walk_packages(jx_neuron.__path__, "jx_neuron."):
    if module.name not in ("jx_neuron.integrations.hf_generate", "jx_neuron.integrations.lm_eval"):
        __import__(module.name)
"""
    python("-c", code, executable=installed / "python", cwd=tmp_path)
    python("-m", "pip", "check", executable=installed / "python", cwd=tmp_path)


def test_a_checker_of_types_sees_its_hints(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text("import jx_neuron\nreveal_type(jx_neuron.model_types())\n")
    how = ("--python-executable", installed / "python", "--follow-imports", "silent", "--cache-dir", tmp_path / "cache")
    said = python("-m", "mypy", *how, "user.py", cwd=tmp_path)
    assert 'Revealed type is "list[str]"' in said.replace("builtins.", "")


def test_the_installed_command_runs(installed: Path, tmp_path: Path) -> None:
    def command(*arguments: str) -> str:
        return python(*arguments, executable=installed / "jx-neuron", cwd=tmp_path)

    assert "Usage: jx-neuron [OPTIONS] COMMAND" in command("--help")
    assert command("--version").strip() == jx_neuron.__version__
    plan = json.loads(command("plan", "facebook/opt-13b", "--amp", "f16", "--json"))
    assert (plan["instance"], plan["tp_degree"]) == ("trn1.2xlarge", 2)
    how = ("--n-positions", "128", "--hlo-only", "--no-weights", "-o", "out")
    command("compile", "facebook/opt-125m", "--tp", "2", *how)
    assert command("check", "out").count("passes on trn1") == 3
    assert command("sample", "--demo", "--max-new-tokens", "6", "The capital of France is").startswith(
        "The capital of France is Paris"
    )
