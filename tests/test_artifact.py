"""Artifacts: what is written is what is read, and a save is whole or not at all."""

import dataclasses
import hashlib
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import artifacts
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from artifacts import EVERYTHING, OPT, PROGRAMS, RNG, SETTINGS, TP, WEIGHTS, files_of, program, read_all
from jax.sharding import PartitionSpec as P

from jx_neuron import artifact
from jx_neuron.checkpoint.weights import Source
from jx_neuron.errors import ArtifactError, CheckpointError
from jx_neuron.lowering import Program, ProgramSpec, TensorSpec, lower
from jx_neuron.util import durable
from jx_neuron.util.ondemand import OnDemand

saved = artifacts.saved


def test_what_is_written_is_read(saved: Path) -> None:
    found = artifact.read(saved)
    manifest = found.manifest
    assert (manifest.settings, manifest.mesh, manifest.format_version) == (SETTINGS, {"tp": TP}, 2)
    assert manifest.config == EVERYTHING["config"]
    assert set(manifest.tools) == {"jx-neuron", "jax", "jaxlib", "neuronx-cc"}
    assert manifest.tools["jax"] == jax.__version__
    for wanted in PROGRAMS:
        assert found.program(wanted.name) == ProgramSpec(wanted.name, {"tp": TP}, wanted.inputs, wanted.outputs)
        assert found.hlo(wanted.name) == wanted.hlo_module
    assert found.neff("decode-b1") == b"the decode step's NEFF"
    assert found.neff("context64-b1") is None
    assert found.file("tokenizer.json").decode() == '{"é": 1}'
    for rank, wanted_weights in enumerate(WEIGHTS):
        tensors = found.weights(rank)
        assert set(tensors) == set(wanted_weights)
        assert len(tensors) == len(wanted_weights)
        for name, array in wanted_weights.items():
            assert tensors[name].dtype == array.dtype
            np.testing.assert_array_equal(tensors[name], array, strict=True)


def test_every_file_is_listed_and_nothing_else_is_left(saved: Path) -> None:
    files = files_of(saved)
    listed = artifact.read(saved).manifest.files
    assert set(files) == {*listed, "manifest.json"}
    for name, record in listed.items():
        assert (record.size, record.sha256) == (len(files[name]), hashlib.sha256(files[name]).hexdigest())
    assert list(saved.parent.iterdir()) == [saved]


def test_same_parts_same_bytes(saved: Path, tmp_path: Path) -> None:
    again = artifact.write(tmp_path / "again", **EVERYTHING)
    assert files_of(again) == files_of(saved)


def test_without_weights(tmp_path: Path) -> None:
    directory = artifact.write(tmp_path / "model", **{**EVERYTHING, "parameters": None})
    assert read_all(directory)["weights"] == []
    with pytest.raises(ArtifactError, match=r"without weights.*sharded_weights=True"):
        artifact.read(directory).weights(0)


def test_a_lowered_program_comes_back_whole(tmp_path: Path) -> None:
    def head(params: dict[str, jax.Array], x_bd: jax.Array) -> jax.Array:
        return x_bd @ params["head"]

    step = lower(
        head,
        {"head": jax.ShapeDtypeStruct((6, 4), jnp.float32)},
        jax.ShapeDtypeStruct((2, 6), jnp.float32),
        tp_degree=TP,
        in_specs=(P(None, "tp"), P()),
        input_kinds=["param", "input"],
    )
    head_dv = RNG.standard_normal((6, 4)).astype(np.float32)
    directory = artifact.write(
        tmp_path / "model",
        settings=SETTINGS,
        config={},
        programs=[step],
        hlo=lambda name: step.hlo_module,
        parameters={"head": np.split(head_dv, TP, axis=1)},
    )
    found = artifact.read(directory)
    spec = found.program("head")
    assert Program(spec.name, spec.mesh, spec.inputs, spec.outputs, found.hlo("head")) == step
    kept = np.concatenate([found.weights(rank)["head"] for rank in range(TP)], axis=1)
    np.testing.assert_array_equal(kept, head_dv)


def test_each_tensor_is_read_once_for_all_ranks_and_the_files_are_safetensors_own(tmp_path: Path) -> None:
    tp, reads = 4, Counter[str]()
    whole = {
        "norm": RNG.standard_normal(8).astype(np.float32),
        "up": RNG.standard_normal((8, 12)).astype(np.float32),
        "down": RNG.standard_normal((12, 8)).astype(np.float32),
    }
    splits = {"norm": P(), "up": P(None, "tp"), "down": P("tp")}

    def read(name: str) -> np.ndarray:
        reads[name] += 1
        return whole[name]

    source = Source(list(whole), read, splits.__getitem__)
    shapes = {"norm": (8,), "up": (8, 3), "down": (3, 8)}
    partitions = {"norm": (None,), "up": (None, "tp"), "down": ("tp", None)}
    inputs = tuple(TensorSpec(name, "param", shapes[name], "float32", partitions[name]) for name in whole)
    directory = artifact.write(
        tmp_path / "model",
        settings=dataclasses.replace(SETTINGS, tp_degree=tp),
        config={},
        programs=[ProgramSpec("step", {"tp": tp}, inputs, ())],
        hlo=lambda name: b"HLO",
        parameters=source.parts(tp),
    )
    assert reads == {"norm": 1, "up": 1, "down": 1}
    for rank in range(tp):
        columns = slice(3 * rank, 3 * rank + 3)
        parts = {"norm": whole["norm"], "up": whole["up"][:, columns], "down": whole["down"][columns]}
        file = directory / f"weights/rank-{rank:02d}.safetensors"
        plain = {name: np.ascontiguousarray(part) for name, part in parts.items()}
        assert file.read_bytes() == safetensors.numpy.save(plain)
        for name, part in safetensors.numpy.load_file(file).items():
            np.testing.assert_array_equal(part, parts[name], strict=True)


def test_no_more_than_one_parameter_and_its_parts_are_in_memory(tmp_path: Path) -> None:
    size, count = 2**20, 12
    names = [f"h.{i}" for i in range(count)]
    source = Source(names, lambda name: np.full((size // 4,), int(name[2:]), np.float32), lambda name: P("tp"))
    inputs = tuple(TensorSpec(name, "param", (size // 4 // TP,), "float32", ("tp",)) for name in names)
    tracemalloc.start()
    directory = artifact.write(
        tmp_path / "model",
        settings=SETTINGS,
        config={},
        programs=[ProgramSpec("step", {"tp": TP}, inputs, ())],
        hlo=lambda name: b"HLO",
        parameters=source.parts(TP),
    )
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < peak < 3.5 * size
    for rank in range(TP):
        weights = artifact.read(directory).weights(rank)
        assert {name: set(weights[name].tolist()) for name in names} == {f"h.{i}": {i} for i in range(count)}


# --- written whole or not at all


def fails() -> dict[str, tuple[dict[str, Any], str]]:
    def weights(**changed: Any) -> dict[str, Any]:
        told = {name: a for name, a in {**WEIGHTS[0], **changed}.items() if a is not None}
        return {"parameters": {name: [a] * TP for name, a in told.items()}}

    def broken(name: str) -> list[np.ndarray]:
        if name == "head":
            raise CheckpointError("the checkpoint ends here")
        return [rank[name] for rank in WEIGHTS]

    return {
        "a parameter missing": (weights(head=None), "head is missing"),
        "a parameter too many": (weights(tail=np.zeros(1)), "tail is no parameter"),
        "another shape": (weights(head=WEIGHTS[0]["head"].T), r"head is float16\[2, 6\], not float16\[6, 2\]"),
        "another type": (weights(head=WEIGHTS[0]["head"].astype(np.float32)), "head is float32"),
        "loading fails": ({"parameters": OnDemand(list(WEIGHTS[0]), broken)}, "the checkpoint ends here"),
        "another degree": ({"settings": dataclasses.replace(SETTINGS, tp_degree=4)}, "tp_degree=4 is not"),
        "a rank too few": (
            {"parameters": {name: [a] for name, a in WEIGHTS[0].items()}},
            "1 parts, and there are 2",
        ),
        "no such dtype": ({"settings": dataclasses.replace(SETTINGS, amp="f64")}, "dtype 'f64' is not supported"),
        "not a number": ({"config": {"eps": float("nan")}}, "kept as JSON"),
        "not JSON": ({"config": {"dtype": object()}}, "kept as JSON"),
        "a NEFF of nothing": ({"neffs": {"prefill": b"x"}}, "no such program"),
        "a path outside": ({"extra_files": {"../x": b"x"}}, "'../x'"),
        "a name twice": ({"extra_files": {"hlo/decode-b1.pb": b"x"}}, "'hlo/decode-b1.pb'"),
        "the manifest's name": ({"extra_files": {"manifest.json": b"{}"}}, "itself"),
        "a program twice": ({"programs": [PROGRAMS[0], PROGRAMS[0]], "neffs": {}}, "hlo/context64-b1.pb"),
        "no program": ({"programs": [], "neffs": {}}, "programs"),
        "a bad name": ({"programs": [program("a b", b"x")], "hlo": lambda name: b"x", "neffs": {}}, "programs.0.name"),
    }


@pytest.mark.parametrize("case", fails())
def test_a_save_that_fails_leaves_what_was_there(case: str, saved: Path) -> None:
    changed, reason = fails()[case]
    before = files_of(saved)
    with pytest.raises((ArtifactError, CheckpointError), match=reason):
        artifact.write(saved, **{**EVERYTHING, **changed})
    assert files_of(saved) == before
    assert list(saved.parent.iterdir()) == [saved]


def test_an_interrupt_between_two_parameters_leaves_what_was_there(saved: Path) -> None:
    def interrupted(name: str) -> list[np.ndarray]:
        if name == "scale":
            raise KeyboardInterrupt
        return [rank[name] for rank in WEIGHTS]

    before = files_of(saved)
    with pytest.raises(KeyboardInterrupt):
        artifact.write(saved, **{**EVERYTHING, "parameters": OnDemand(list(WEIGHTS[0]), interrupted)})
    assert files_of(saved) == before
    assert list(saved.parent.iterdir()) == [saved]


def test_only_an_artifact_is_replaced(saved: Path, tmp_path: Path) -> None:
    artifact.write(saved, **{**EVERYTHING, "settings": OPT, "config": {}})
    assert artifact.read(saved).manifest.settings.model_type == "opt"
    with pytest.raises(ArtifactError, match="is not empty"):
        artifact.write(saved, **EVERYTHING, overwrite=False)
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"holds notes\.txt"):
        artifact.write(saved, **EVERYTHING)
    home = tmp_path / "home"
    home.mkdir()
    artifact.write(home, **EVERYTHING, overwrite=False)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("mine")
    with pytest.raises(ArtifactError, match="holds no artifact to replace"):
        artifact.write(tmp_path / "work", **EVERYTHING)
    with pytest.raises(ArtifactError, match="is a file"):
        artifact.write(tmp_path / "work" / "thesis.tex", **EVERYTHING)
    assert files_of(tmp_path / "work") == {"thesis.tex": b"mine"}
    assert (saved / "notes.txt").read_text() == "mine"


def test_saving_through_a_link_replaces_what_it_leads_to(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(saved)
    artifact.write(tmp_path / "link", **{**EVERYTHING, "settings": OPT, "config": {}})
    assert (tmp_path / "link").is_symlink()
    assert artifact.read(saved).manifest.settings.model_type == "opt"


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    with durable.replacing(tmp_path / "model") as folder:
        (folder / "file").write_text("half")
        durable.recover(tmp_path / "model")
        assert (folder / "file").read_text() == "half"
    assert files_of(tmp_path / "model") == {"file": b"half"}


KILLED = '''
"""Replaces artifact A by B in a child that kills itself at the n-th thing it does to the disk, for every n."""
import os, signal, sys
from pathlib import Path
import numpy as np
from jx_neuron import artifact
from jx_neuron.artifact import Settings
from jx_neuron.errors import ArtifactError
from jx_neuron.lowering import ProgramSpec, TensorSpec
from jx_neuron.step.buckets import Buckets
assert not any(name.startswith(("jx_neuron.models", "flax")) for name in sys.modules)

folder = Path(sys.argv[1])
EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "shutil.rmtree"}

def save(content):
    weight = TensorSpec("w", "param", (64,), "float32", (None,))
    settings = Settings(content, 2, "f32", (1,), Buckets((8,), (8,)), candidates=1, all_logits=False, vocab_size=8)
    artifact.write(
        folder, settings=settings, config={}, programs=[ProgramSpec("step", {"tp": 2}, (weight,), ())],
        hlo=lambda name: content.encode() * 1000,
        parameters={"w": [np.full(64, ord(content) + rank, np.float32) for rank in (0, 1)]},
        neffs={"step": content.encode() * 500}, extra_files={content + ".txt": content.encode()},
    )

def state():
    try:
        assert artifact.is_artifact(folder)
        found = artifact.read(folder)
        content = found.manifest.settings.model_type
        assert found.hlo("step") == content.encode() * 1000
        assert found.neff("step") == content.encode() * 500
        assert found.file(content + ".txt") == content.encode()
        for rank in (0, 1):
            assert (found.weights(rank)["w"] == ord(content) + rank).all()
        return content
    except ArtifactError as error:
        return f"refused: {error}"

def die_at(moment):
    seen = 0
    def hook(event, arguments):
        nonlocal seen
        if event in EVENTS:
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

moment, done = 0, False
while not done:
    moment += 1
    save("A")
    assert state() == "A"
    if (child := os.fork()) == 0:
        die_at(moment)
        save("B")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    done = status == 0
    print(state(), flush=True)
    save("A")
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name], moment
'''


def test_killed_at_any_moment_of_a_save_the_old_artifact_is_there_or_the_new(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "model")],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert found.returncode == 0, found.stderr
    states = found.stdout.split("\n")[:-1]
    assert len(states) > 20
    assert states == ["A"] * states.count("A") + ["B"] * states.count("B")
    assert states.count("A") > 20
    assert states.count("B") > 3
