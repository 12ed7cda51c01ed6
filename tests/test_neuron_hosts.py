"""An artifact on the NeuronCores of several hosts: ranks, addresses, and the tokens of one process, by a stand-in."""

import json
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import several_hosts
import tiny
from doubles import neuronx_cc
from doubles.neuron_link import Link, LinkError
from test_several_hosts import free_port, processes, same, wait_for

from jx_neuron import NeuronAutoModelForCausalLM
from jx_neuron.artifact.folder import read
from jx_neuron.errors import ArtifactError
from jx_neuron.runtime import neuron
from jx_neuron.runtime.saved import SavedModel

SCRIPT = Path(__file__).with_name("neuron_hosts.py")
TP = 4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """An artifact for two hosts of two ranks, and the answers of one process on backend "host"."""
    with pytest.MonkeyPatch.context() as patch:
        compiler = neuronx_cc.install(tmp_path_factory.mktemp("neuronx-cc")).parent
        patch.setenv("PATH", str(compiler), prepend=":")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("NEURON_CC_FLAGS", raising=False)
        patch.setattr(neuron, "PRODUCT", tmp_path_factory.getbasetemp() / "no product")
        model = NeuronAutoModelForCausalLM.from_pretrained(
            tiny.saved("llama", tmp_path_factory.mktemp("llama")),
            backend="host", tp_degree=TP, batch_size=4, n_positions=96, context_length_estimate=32,
        )  # fmt: skip
        folder = tmp_path_factory.mktemp("made") / "artifact"
        model.cpu_compile().save(folder, sharded_weights=True, ranks_per_host=TP // 2)
        return folder, plain(several_hosts.answers(model))


def plain(answers: dict) -> dict:
    """Answers as they are read from a file."""
    return json.loads(json.dumps(answers))


def commands(folder: Path, out: Path, count: int, what: str = "answers") -> list[list[object]]:
    """Of each host, with a copy of the artifact in which the weights of other hosts' ranks are zeros."""
    out.mkdir()
    port = free_port()
    for host in range(count):
        copy = shutil.copytree(folder, out / f"host-{host}")
        for rank, name in enumerate(read(folder).manifest.weights):
            if rank // (TP // count) != host:
                (copy / name).write_bytes(bytes((copy / name).stat().st_size))
    return [[SCRIPT, host, count, port, out / f"host-{host}", out, what] for host in range(count)]


@pytest.mark.slow
def test_two_hosts_give_the_tokens_of_one_process(made: tuple[Path, dict], tmp_path: Path) -> None:
    folder, expected = made
    out = tmp_path / "out"
    with processes(commands(folder, out, 2)) as started:
        for process in started:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
    same(dict(expected), json.loads((out / "answers.json").read_text()))
    first, second = (json.loads((out / f"loaded-{host}.json").read_text()) for host in range(2))
    assert first["root"] == second["root"]
    assert first["root"].startswith("127.0.0.1:")
    assert first["cores"] == second["cores"] == "0,1"  # of its own host
    assert first["ranks"] == [[0, 0, TP], [1, 1, TP]]
    assert second["ranks"] == [[0, 2, TP], [1, 3, TP]]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_host_that_dies_ends_the_other(victim: int, made: tuple[Path, dict], tmp_path: Path) -> None:
    with processes(commands(made[0], tmp_path / "out", 2, "wait")) as started:
        wait_for(tmp_path / "out" / "ready", started)
        began = time.monotonic()
        started[victim].send_signal(signal.SIGKILL)
        _, errors = started[1 - victim].communicate(timeout=30)
        assert time.monotonic() - began < 30
        assert started[1 - victim].returncode == 1
        assert f"process {victim} of 2 is gone" in errors


@pytest.mark.slow
def test_an_artifact_runs_on_the_hosts_that_it_is_for(
    made: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, expected = made
    saved = SavedModel.open(folder)
    assert saved.artifact.manifest.ranks_per_host == 2
    for own, here in ((None, 4), (range(1), 1)):
        with pytest.raises(ArtifactError, match=rf"for 2 hosts of 2 ranks, and this process has {here} of 4"):
            saved.runtime("neuron", lambda: saved.deployment, None, own)
    assert {len(parts) for parts in map(saved.parameters(range(2, 4)).get, saved.parameters())} == {2}
    host = NeuronAutoModelForCausalLM.from_pretrained(folder, backend="host")  # one process has the devices of all
    assert plain(several_hosts.answers(host)) == expected
    with pytest.raises(ArtifactError, match="hosts of 3 ranks cannot share 4"):
        host.save(tmp_path / "other", ranks_per_host=3)


@pytest.mark.slow
def test_the_stand_in_refuses_ranks_that_are_not_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("NEURON_RT_ROOT_COMM_ID", address)
    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(Link, 0, 2, 4, 5.0)
        with pytest.raises((LinkError, OSError)):
            Link(1, 2, 6, 5.0).run(b"", [[]], None)  # six ranks, not four
        with pytest.raises(LinkError, match="does not belong to the 4 ranks"):
            other.result()
        monkeypatch.delenv("NEURON_RT_ROOT_COMM_ID")
        with pytest.raises(LinkError, match="cannot meet at ''"):
            Link(1, 2, 4, 5.0)
