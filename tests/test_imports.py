"""Imports run one way, and importing the package is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "jx_neuron"
# each room may import from its own level and those before it
LEVELS = [
    {"errors", "util"},
    {"config", "continuous_batching", "nn", "checkpoint"},
    {"models"},
    {"step"},
    {"lowering"},
    {"compiler", "artifact"},
    {"distributed", "runtime"},
    {"engine", "planning"},
    {"llm"},
    {"integrations", "serve"},
    {"cli"},
    {"__main__"},
]
SHARED = {
    "causal_lm",
    "delta_net",
    "experts_beside",
    "gpt_like",
    "latent",
    "llama_like",
    "mixture",
    "per_layer",
    "recurrent",
    "rows",
    "short_conv",
}  # what a model may import of jx_neuron.models
OF_ALL = {"__init__.py", "decoder.py", "registering.py", "registry.py"}  # in jx_neuron/models, and no model
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            modules = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module or ""]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        for module in modules:
            package, _, rest = module.partition(".")
            room = rest.partition(".")[0]
            if package == "jx_neuron" and room in LEVEL:
                assert LEVEL[room] <= LEVEL[room_of(path)], f"line {node.lineno} imports {module}"
                if room_of(path) == "models" and room == "models":
                    shared = module.removeprefix("jx_neuron.models.").partition(".")[0] in SHARED
                    assert shared or path.name in OF_ALL, f"line {node.lineno}: a model imports another"


def test_every_room_has_a_level() -> None:
    assert {room_of(p) for p in FILES} <= set(LEVEL)


def test_importing_everything_needs_no_torch_and_takes_no_device() -> None:
    code = """
import sys
sys.modules["torch"] = None
import jx_neuron
for name in jx_neuron.__all__:
    getattr(jx_neuron, name)
import jx_neuron.cli
import jax
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "a backend was started"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
