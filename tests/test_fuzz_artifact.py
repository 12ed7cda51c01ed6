"""Damaged saved models: what was saved, or an ArtifactError, within 5 seconds and 1.5 GB."""

import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from mutations import damaged_bytes, damaged_json, limits

from jx_neuron import NeuronAutoModelForCausalLM
from jx_neuron.artifact.manifest import MOST_BYTES, UNSEALED, read_manifest
from jx_neuron.errors import ArtifactError
from jx_neuron.runtime.saved import SavedModel

FEW, MANY = 200, 1500  # mutations of each kind
IDS = tiny.prompts(1, 9)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
COUNTS = [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tiny.saved("opt", tmp_path_factory.mktemp("opt"), tiny.tokenizer())
    model = NeuronAutoModelForCausalLM.from_pretrained(source, tp_degree=2, n_positions=24, context_length_estimate=24)
    return model.save(tmp_path_factory.mktemp("saved") / "opt", sharded_weights=True)


@pytest.fixture(scope="module")
def expected(saved: Path) -> dict[str, Any]:
    return contents(saved)


def contents(folder: Path) -> dict[str, Any]:
    """All that running the model takes."""
    model = SavedModel.open(folder)
    programs = model.deployment.programs
    return {
        "programs": {shape.name: hashlib.sha256(model.artifact.hlo(shape.name)).hexdigest() for shape in programs},
        "weights": {name: [part.tobytes() for part in parts] for name, parts in model.artifact.parameters().items()},
        "ids": model.tokenizer()("ab c")["input_ids"],
    }


def read(folder: Path) -> dict[str, Any] | None:
    """What is in the folder; None where an ArtifactError that names it refuses it."""
    try:
        with limits():
            return contents(folder)
    except ArtifactError as error:
        if str(folder) not in str(error):
            raise AssertionError(f"{error} does not name {folder}") from error
        return None


def refused_or(expected: dict[str, Any], folder: Path) -> bool:
    """Whether what is in the folder is refused; if not, it is as expected."""
    present = read(folder)
    assert present in (None, expected)
    return present is None


def seal(content: bytes) -> bytes:
    """The text of a manifest without its hash, with one."""
    text = b'{\n "sha256": "' + UNSEALED.encode() + b'",' + content.lstrip().removeprefix(b"{")
    return text.replace(UNSEALED.encode(), hashlib.sha256(text).hexdigest().encode(), 1)


@pytest.mark.parametrize("count", COUNTS)
def test_manifests_of_a_right_hash(count: int, saved: Path, expected: dict[str, Any], tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "copy")
    content = json.loads((saved / "manifest.json").read_bytes())
    content.pop("sha256")
    (folder / "manifest.json").write_bytes(seal(json.dumps(content).encode()))
    assert not refused_or(expected, folder)
    rng, refused = random.Random(17), 0
    for number in range(count):
        changed = dict(content)
        if number % 2:  # half of the places are shapes of tensors
            changed = {key: value for key, value in content.items() if key not in ("programs", "files")}
            part: Any = damaged_json(changed, rng)
            rest = {key: value for key, value in content.items() if key not in changed}
            data = part.rstrip().removesuffix(b"}") + b"," + json.dumps(rest).encode()[1:]
        else:
            data = damaged_json(content, rng)
        (folder / "manifest.json").write_bytes(seal(data))
        refused += refused_or(expected, folder)
    assert refused > count // 2


@pytest.mark.parametrize("count", COUNTS)
def test_damaged_bytes_of_any_file(count: int, saved: Path, expected: dict[str, Any], tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "copy")
    names = sorted(path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file())
    rng = random.Random(18)
    for number in range(count):
        name = names[number % len(names)]
        whole = (saved / name).read_bytes()
        damaged = damaged_bytes(whole, rng)
        (folder / name).write_bytes(damaged)
        same_size = len(damaged) == len(whole)
        assert refused_or(expected, folder) == (damaged != whole and not (name == "config.json" and same_size))
        (folder / name).write_bytes(whole)


@pytest.mark.few(2)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "hlo/decode-b1-s24-k64.pb", "weights"])
def test_damaged_files_of_a_right_hash(
    name: str, count: int, saved: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    folder = shutil.copytree(saved, tmp_path / "copy")
    content = json.loads((saved / "manifest.json").read_bytes())
    content.pop("sha256")
    name = "weights/rank-01.safetensors" if name == "weights" else name
    whole, rng, passed = (saved / name).read_bytes(), random.Random(19), 0
    for _ in range(count // 3):
        is_json = name.endswith(".json") and rng.random() < 0.5
        data = damaged_json(json.loads(whole), rng) if is_json else damaged_bytes(whole, rng)
        (folder / name).write_bytes(data)
        content["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (folder / "manifest.json").write_bytes(seal(json.dumps(content).encode()))
        passed += read(folder) is not None
    assert passed < count // 3


LARGE = MOST_BYTES - 2**20
HOSTILE = {
    "config": b'{"x": [' + b"[]," * (LARGE // 3) + b"[]]}",
    "programs": b"[" + b"0," * (LARGE // 2) + b"0]",
    "files": b"{" + b",".join(b'"%x": 0' % i for i in range(LARGE // 13)) + b"}",
    "unknown": b"0," + b",".join(b'"%x": 0' % i for i in range(LARGE // 13)),
}


@pytest.mark.slow
@pytest.mark.parametrize("field", HOSTILE)
def test_the_largest_manifest_that_is_read_is_refused_in_time(field: str, tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(seal(b'{"%s": %s}' % (field.encode(), HOSTILE[field])))
    assert path.stat().st_size < MOST_BYTES
    with limits(), pytest.raises(ArtifactError, match=r"manifest\.json is not sound"):
        read_manifest(tmp_path)


def test_a_larger_manifest_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "manifest.json", "wb") as file:
        file.truncate(2**40)
    with limits(seconds=1), pytest.raises(ArtifactError, match="has 1,099,511,627,776 bytes; it may have 25,165,824"):
        read_manifest(tmp_path)


@pytest.mark.slow
def test_settings_that_are_believed_give_the_saved_models_answers(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "copy")
    answer = NeuronAutoModelForCausalLM.from_pretrained(saved).sample(IDS, 24, top_k=1, eos_token_override=-1)
    content = json.loads((saved / "manifest.json").read_bytes())
    content.pop("sha256")
    rng, right = random.Random(20), 0
    for _ in range(300):
        settings = damaged_json(content["settings"], rng)
        rest = {key: value for key, value in content.items() if key != "settings"}
        (folder / "manifest.json").write_bytes(
            seal(json.dumps(rest).encode()[:-1] + b', "settings": ' + settings + b"}")
        )
        try:
            model = NeuronAutoModelForCausalLM.from_pretrained(folder)
        except ArtifactError:
            continue
        np.testing.assert_array_equal(model.sample(IDS, 24, top_k=1, eos_token_override=-1), answer)
        right += 1
    assert right > 5
