"""Artifacts: what is written is what is read, and nothing else is."""

import dataclasses
import hashlib
import json
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import PartitionSpec as P

from jx_neuron import artifact
from jx_neuron.artifact.settings import Settings
from jx_neuron.checkpoint.weights import Source
from jx_neuron.errors import ArtifactError, CheckpointError
from jx_neuron.lowering import Program, ProgramSpec, TensorSpec, lower
from jx_neuron.step.buckets import Buckets
from jx_neuron.util import durable
from jx_neuron.util.ondemand import OnDemand

TP = 2
WEIGHT_FILES = ("weights/rank-00.safetensors", "weights/rank-01.safetensors")
RNG = np.random.default_rng(0)
WEIGHTS = [
    {
        "h.0.ln.scale": RNG.standard_normal(6).astype(np.float32),
        "h.0.mlp.kernel": RNG.standard_normal((4, 6)).astype(ml_dtypes.bfloat16).T,
        "head": RNG.standard_normal((6, 2)).astype(np.float16),
        "scale": np.array(RNG.standard_normal(), np.float32),
    }
    for _ in range(TP)
]
PARAMS = tuple(
    TensorSpec(name, "param", a.shape, a.dtype.name, (*[None] * (a.ndim - 1), "tp") if a.ndim else ())
    for name, a in sorted(WEIGHTS[0].items())
)
STATE = TensorSpec("k.0", "state", (1, 8, 2, 4), "bfloat16", (None, None, "tp", None))
TOKENS = TensorSpec("tokens_bt", "input", (1, 1), "int32", (None, None))
RANK = TensorSpec("rank", "rank", (1,), "int32", ("tp",))
LOGITS = TensorSpec("output.0", "output", (1, 2), "float32", (None, "tp"))


def program(name: str, hlo: bytes) -> Program:
    kept = TensorSpec(STATE.name, "state", STATE.shape, STATE.dtype, STATE.partition, alias=len(PARAMS))
    return Program(name, {"tp": TP}, (*PARAMS, STATE, TOKENS, RANK), (LOGITS, kept), hlo)


PROGRAMS = (program("context64-b1", b"the context's HLO"), program("decode-b1", b"the decode step's HLO"))
SETTINGS = Settings("gpt2", TP, "bf16", (1,), Buckets((64,), (64,)), candidates=1, all_logits=False, vocab_size=4)
OPT = dataclasses.replace(SETTINGS, model_type="opt")
EVERYTHING: dict[str, Any] = {
    "settings": SETTINGS,
    "config": {"n_layer": 1, "layer_norm_epsilon": 1e-05, "activation_function": "gelu_new", "n_inner": None},
    "programs": PROGRAMS,
    "hlo": lambda name: next(p.hlo_module for p in PROGRAMS if p.name == name),
    "parameters": {name: [rank[name] for rank in WEIGHTS] for name in WEIGHTS[0]},
    "neffs": {"decode-b1": b"the decode step's NEFF"},
    "extra_files": {"tokenizer.json": '{"é": 1}'.encode(), "special/merges.txt": b"a b"},
    "tools": {"neuronx-cc": "2.21"},
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return artifact.write(tmp_path / "model", **EVERYTHING)


def read_all(directory: Path) -> dict[str, Any]:
    """All that an artifact holds."""
    found = artifact.read(directory)
    names = [p.name for p in found.manifest.programs]
    return {
        "hlo": {name: found.hlo(name) for name in names},
        "neff": {name: found.neff(name) for name in names},
        "files": {name: found.file(name) for name in found.manifest.files},
        "weights": [
            {name: (a.dtype.name, a.shape, a.tobytes()) for name, a in found.weights(rank).items()}
            for rank in range(len(found.manifest.weights))
        ],
    }


def files_of(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def reseal(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest and gives it the hash that it should have."""
    path = directory / "manifest.json"
    told = json.loads(path.read_bytes())
    change(told)
    told["sha256"] = "0" * 64
    text = json.dumps(told, indent=1, ensure_ascii=False) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(text.replace("0" * 64, digest, 1), encoding="utf-8")


def relist(told: dict[str, Any], old: str, new: str) -> None:
    """Gives a file of the manifest another path, wherever it is named."""
    told["files"][new] = told["files"].pop(old)
    told["weights"] = [new if path == old else path for path in told["weights"]]


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


# --- altered


@pytest.mark.parametrize("name", sorted({
    "manifest.json", "hlo/decode-b1.pb", "neff/decode-b1.neff", "weights/rank-00.safetensors",
    "weights/rank-01.safetensors", "tokenizer.json", "special/merges.txt",
}))  # fmt: skip
def test_one_byte_changed_anywhere_is_refused(name: str, saved: Path) -> None:
    path = saved / name
    data = path.read_bytes()
    for at in sorted({*range(0, len(data), 1 + len(data) // 400), len(data) - 1}):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(ArtifactError):
            artifact.read(saved).weights(WEIGHT_FILES.index(name)) if name in WEIGHT_FILES else read_all(saved)
    path.write_bytes(data)
    assert read_all(saved)["files"]


@pytest.mark.parametrize("name", ["manifest.json", "hlo/context64-b1.pb", "weights/rank-01.safetensors",
                                  "neff/decode-b1.neff", "tokenizer.json"])  # fmt: skip
def test_cut_short_anywhere_is_refused_at_once(name: str, saved: Path) -> None:
    path = saved / name
    data = path.read_bytes()
    for size in (0, 1, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
            artifact.read(saved)
    path.write_bytes(data + b"\n")
    with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
        artifact.read(saved)


@pytest.mark.parametrize("name", ["hlo/decode-b1.pb", "weights/rank-01.safetensors", "special/merges.txt"])
def test_a_missing_file_is_named(name: str, saved: Path) -> None:
    (saved / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name} is missing"):
        artifact.read(saved)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    for directory in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ArtifactError, match=r"there is no manifest\.json"):
            artifact.read(directory)


def test_reordered_keys_and_spaces_are_alterations_too(saved: Path) -> None:
    path = saved / "manifest.json"
    told = json.loads(path.read_bytes())
    path.write_text(json.dumps(told))
    with pytest.raises(ArtifactError, match="was altered"):
        artifact.read(saved)


@pytest.mark.parametrize("path", ["../secret", "/etc/hostname", "hlo/../../secret", "", "hlo//x", "a\\b",
                                  "C:/secret", "./secret", "hlo/\0"])  # fmt: skip
def test_a_path_that_leads_outside_is_refused(path: str, saved: Path) -> None:
    (saved.parent / "secret").write_bytes(PROGRAMS[0].hlo_module)
    reseal(saved, lambda told: relist(told, "hlo/context64-b1.pb", path))
    with pytest.raises(ArtifactError, match="is not a path inside the artifact"):
        artifact.read(saved)


def test_a_link_that_leads_outside_is_refused(saved: Path) -> None:
    (saved / "hlo" / "decode-b1.pb").rename(saved.parent / "secret")
    (saved / "hlo" / "decode-b1.pb").symlink_to(saved.parent / "secret")
    with pytest.raises(ArtifactError, match="is a link to elsewhere"):
        artifact.read(saved)
    (saved / "hlo" / "decode-b1.pb").unlink()
    (saved.parent / "secret").rename(saved / "hlo" / "decode-b1.pb")
    (saved / "weights").rename(saved.parent / "elsewhere")
    (saved / "weights").symlink_to(saved.parent / "elsewhere")
    with pytest.raises(ArtifactError, match="is a link to elsewhere"):
        artifact.read(saved)


def test_an_artifact_behind_a_link_is_read(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(saved)
    assert read_all(tmp_path / "link") == read_all(saved)


def test_a_newer_format_says_to_upgrade(saved: Path) -> None:
    reseal(saved, lambda told: told.update(format_version=3, something_new={}))
    with pytest.raises(ArtifactError, match=r"format version 3 is newer.*Upgrade jx_neuron: `git pull` in its clone"):
        artifact.read(saved)


@pytest.mark.parametrize("version", [0, 1])
def test_an_older_format_says_to_save_again_and_can_be_replaced(version: int, saved: Path) -> None:
    def age(manifest: dict[str, Any]) -> None:
        manifest.update(format_version=version, neuron=manifest.pop("settings"))

    reseal(saved, age)
    with pytest.raises(
        ArtifactError, match=rf"saved by an older jx_neuron \(format version {version};.*Save it again with this one"
    ):
        artifact.read(saved)
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"holds notes\.txt"):
        artifact.write(saved, **EVERYTHING)
    (saved / "notes.txt").unlink()
    artifact.write(saved, **EVERYTHING)
    assert artifact.read(saved).manifest.settings == SETTINGS


def test_an_artifact_from_before_state_had_dtypes_is_read(saved: Path) -> None:
    reseal(saved, lambda manifest: manifest["settings"].pop("state_dtypes"))
    assert artifact.read(saved).manifest.settings == SETTINGS


def test_a_second_axis_of_the_mesh_needs_no_other_format(saved: Path) -> None:
    def widen(manifest: dict[str, Any]) -> None:
        for entry in manifest["programs"]:
            entry["mesh"] = {"dp": 1, "tp": 2}
            entry["inputs"][1]["partition"] = ["dp", "tp"]

    reseal(saved, widen)
    manifest = artifact.read(saved).manifest
    assert manifest.mesh == {"dp": 1, "tp": 2}
    assert manifest.parameters["h.0.mlp.kernel"].partition == ("dp", "tp")


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a rank missing": (lambda m: m["weights"].pop(), "weights of 1 ranks are listed, and there are 2"),
    "a program twice": (lambda m: m["programs"].append(m["programs"][0]), "twice among the programs"),
    "no program": (lambda m: m["programs"].clear(), "programs"),
    "a tensor twice": (lambda m: m["programs"][0]["inputs"].append(m["programs"][0]["inputs"][0]), "twice"),
    "a file of two ranks": (lambda m: m.update(weights=m["weights"][:1] * 2), "twice among the files"),
    "a program as weights": (lambda m: m["weights"].__setitem__(0, "hlo/decode-b1.pb"), "twice among the files"),
    "a file without hash": (lambda m: m["files"].pop("hlo/decode-b1.pb"), "not listed with its hash"),
    "the manifest itself": (lambda m: m["files"].update({"manifest.json": {"size": 1, "sha256": "0" * 64}}), "itself"),
    "not a number": (lambda m: m["config"].update(x=float("nan")), "config: .*not JSON compliant"),
    "infinity": (lambda m: m["config"].update(x=float("inf")), "config: .*not JSON compliant"),
    "a degree as text": (lambda m: m["programs"][0].update(mesh={"tp": "2"}), "mesh.tp"),
    "degree 0": (lambda m: m["programs"][0].update(mesh={"tp": 0}), "mesh.tp"),
    "a size as fraction": (lambda m: m["files"]["tokenizer.json"].update(size=1.5), "size"),
    "a negative shape": (lambda m: m["programs"][0]["inputs"][0].update(shape=[-1]), "shape"),
    "no such type": (lambda m: m["programs"][0]["inputs"][0].update(dtype="float17"), "float17"),
    "no such kind": (lambda m: m["programs"][0]["inputs"][0].update(kind="weight"), "kind"),
    "no such axis": (lambda m: m["programs"][0]["inputs"][0].update(partition=["dp"]), "does not name axes of"),
    "an axis twice": (lambda m: m["programs"][0]["inputs"][1].update(partition=["tp", "tp"]), "does not name axes"),
    "another mesh": (lambda m: m["programs"][1].update(mesh={"tp": 4}), "for different meshes"),
    "another degree": (lambda m: [p.update(mesh={"tp": 4}) for p in m["programs"]], "settings are for gpt2 on 2 cores"),
    "two candidates too many": (lambda m: m["settings"].update(candidates=6), "6 candidates of 4 tokens"),
    "too few axes": (lambda m: m["programs"][0]["inputs"][0].update(partition=[]), "axes"),
    "an alias of another shape": (lambda m: m["programs"][0]["outputs"][1].update(alias=0), "cannot be an alias"),
    "an alias of nothing": (lambda m: m["programs"][0]["outputs"][1].update(alias=99), "cannot be an alias"),
    "a field too many": (lambda m: m.update(run="rm"), "run: Extra inputs"),
    "a field too few": (lambda m: m["settings"].pop("model_type"), "settings.model_type: Field required"),
    "a name with a path": (lambda m: m["programs"][0].update(name="../x"), "name"),
    "a hash that is none": (lambda m: m["files"]["tokenizer.json"].update(sha256="0"), "sha256"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_an_unsound_manifest_is_refused_though_its_hash_is_right(change: str, saved: Path) -> None:
    alter, reason = CHANGES[change]
    reseal(saved, alter)
    with pytest.raises(ArtifactError, match=reason):
        artifact.read(saved)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("[]", "legal is a JSON object"), ('{"a": 1, "a": 2}', "was altered"), ('{"a": 1e999}', "was altered"),
     ("[" * 100_000, "nested too deeply"), ("\xff", "as UTF-8 text"), ("1" * 5000, "a number of 5000 digits"),
     ("{", "line 1, column 2: not JSON")],
)  # fmt: skip
def test_a_manifest_that_is_no_manifest(text: str, reason: str, saved: Path) -> None:
    (saved / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtifactError, match=reason):
        artifact.read(saved)


def test_numbers_too_large_for_json_are_refused(saved: Path) -> None:
    path = saved / "manifest.json"
    path.write_text(path.read_text().replace("1e-05", "1e999"))
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        artifact.read(saved)


def test_weights_that_are_not_the_programs(saved: Path) -> None:
    def rename(told: dict[str, Any]) -> None:
        for entry in told["programs"]:
            entry["inputs"][0]["name"] = "another"

    reseal(saved, rename)
    with pytest.raises(ArtifactError, match=r"rank-00\.safetensors: another is missing"):
        artifact.read(saved).weights(0)


def test_what_is_not_there_is_named(saved: Path) -> None:
    found = artifact.read(saved)
    with pytest.raises(ArtifactError, match="no program 'prefill', only context64-b1, decode-b1"):
        found.hlo("prefill")
    with pytest.raises(ArtifactError, match="no rank 2 at tp degree 2"):
        found.weights(2)
    with pytest.raises(ArtifactError, match=r"lists no file \.\./model/tokenizer\.json"):
        found.file("../model/tokenizer.json")
    with pytest.raises(KeyError):
        found.weights(0)["h.9"]


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
