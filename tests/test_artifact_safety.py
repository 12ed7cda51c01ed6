"""Artifacts that were altered, or made to mislead, are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import artifacts
import pytest
from artifacts import EVERYTHING, PROGRAMS, SETTINGS, read_all, reseal

from jx_neuron import artifact
from jx_neuron.errors import ArtifactError

WEIGHT_FILES = ("weights/rank-00.safetensors", "weights/rank-01.safetensors")
saved = artifacts.saved


def relist(told: dict[str, Any], old: str, new: str) -> None:
    """Gives a file of the manifest another path, wherever it is named."""
    told["files"][new] = told["files"].pop(old)
    told["weights"] = [new if path == old else path for path in told["weights"]]


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
