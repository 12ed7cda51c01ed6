"""jx-neuron plan: its table, its JSON, its picture, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jx_neuron import InputError
from jx_neuron.cli.app import app
from jx_neuron.models.known import config_of
from jx_neuron.planning import plan, published

LLAMA_70B = published.CONFIGS["Llama-2-70b"]


def run(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jx_neuron", "plan", *map(str, words)]
    root = str(Path(__file__).parent.parent)
    return subprocess.run(
        command, check=False, capture_output=True, text=True,
        env={"PATH": "", "PYTHONPATH": root, "COLUMNS": "80", "HF_HUB_OFFLINE": "1", **environment},
    )  # fmt: skip


def test_the_command_prints_a_table_and_a_verdict() -> None:
    done = run("facebook/opt-13b", "--amp", "f16")
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "just fits trn1.2xlarge at tp 2: 13.8 GiB of 16 GiB a core" in text
    for word in ("weights 11.98", "cache 0.78", "does not fit", "chosen", "tokens/s", "estimates"):
        assert word in text
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_the_command_refuses_in_one_message_with_status_2(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(LLAMA_70B))
    done = run(config, "--instance", "inf2.xlarge")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("jx-neuron: this request cannot run. ")
    assert "Nearest that works: instance inf2.48xlarge, tp_degree=24" in done.stderr
    assert "Traceback" not in done.stderr


def test_json_holds_the_plan() -> None:
    from typer.testing import CliRunner

    done = CliRunner().invoke(app, ["plan", "gpt2-xl", "--instance", "trn1.32xlarge", "--tp", "8", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    expected = {"model": "gpt2-xl", **plan(config_of("gpt2-xl"), "trn1.32xlarge", 8).as_dict()}
    assert told == json.loads(json.dumps(expected))
    assert told["memory"]["total"] == sum(size for item, size in told["memory"].items() if item != "total")


def test_planning_starts_no_backend() -> None:
    code = """
from jx_neuron.models.known import config_of
from jx_neuron.planning import plan
plan(config_of("gpt2"))
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


# the picture


def test_the_picture_shows_each_item_and_the_latency(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from jx_neuron.planning.picture import draw

    draw(plan(LLAMA_70B, "trn1.32xlarge", batch_size=4), "Llama-2-70b", tmp_path / "plan.svg")
    draw(plan(LLAMA_70B, "trn1.32xlarge", batch_size=4), "Llama-2-70b", tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.png", "plan.svg"]


@pytest.mark.parametrize(
    ("name", "message"), [("plan.gif", "ends in .pdf, .png, .svg"), ("no/plan.png", "does not exist")]
)
def test_a_picture_that_cannot_be_drawn_is_refused(tmp_path: Path, name: str, message: str) -> None:
    from jx_neuron.planning.picture import draw

    with pytest.raises(InputError, match=message):
        draw(plan(config_of("gpt2")), "gpt2", tmp_path / name)


def test_a_picture_without_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jx_neuron.planning.picture import draw

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match="pip install matplotlib"):
        draw(plan(config_of("gpt2")), "gpt2", tmp_path / "plan.png")
