"""Checkpoints on disk: what is read, and what is refused."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from checkpoints import (
    CONFIG,
    TENSORS,
    assert_holds,
    peak_while_reading,
    refused,
    save_torch,
    write,
    write_bin,
    write_shards,
)

from jx_neuron.checkpoint import tensor_files
from jx_neuron.checkpoint.folder import load_config, open_checkpoint, token_ids
from jx_neuron.checkpoint.safetensors_writing import write_safetensors
from jx_neuron.errors import CheckpointError


def test_safetensors(tmp_path):
    checkpoint = open_checkpoint(write(tmp_path))
    assert_holds(checkpoint, TENSORS)
    assert checkpoint.config == CONFIG
    assert checkpoint.generation_config is None
    assert checkpoint.path == checkpoint.folder == tmp_path


def test_safetensors_of_our_own(tmp_path):
    """Every dtype, with one of an odd size before wider ones, a scalar and an empty one."""
    arrays = {f"{kind}.a": np.arange(3).astype(dtype) for kind, dtype in tensor_files.SAFETENSORS_DTYPES.items()}
    arrays |= {"scalar": np.array(2.5, np.float32), "none": np.zeros((0, 3), np.int16), "b": TENSORS["h.1.weight"]}
    layouts = {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
    with open(tmp_path / "m.safetensors", "wb") as file:
        write_safetensors([file], layouts, lambda name: [arrays[name]])
    read = safetensors.numpy.load_file(tmp_path / "m.safetensors")
    ours = tensor_files.safetensors_file(tmp_path / "m.safetensors")
    assert set(read) == set(ours) == set(arrays)
    for name, array in arrays.items():
        for other in (read[name], ours[name].load()):
            assert (other.dtype, other.shape) == (array.dtype, array.shape)
            np.testing.assert_array_equal(other, array)


def test_safetensors_index(tmp_path):
    write_shards(tmp_path, safetensors.numpy.save_file, "model", "safetensors")
    assert_holds(open_checkpoint(str(tmp_path)), TENSORS)


def test_bin(tmp_path):
    assert_holds(open_checkpoint(write_bin(tmp_path)), TENSORS)


def test_bin_index(tmp_path):
    write_shards(tmp_path, save_torch, "pytorch_model", "bin")
    assert_holds(open_checkpoint(tmp_path), TENSORS)


def test_bin_of_old_torch(tmp_path):
    assert_holds(open_checkpoint(write_bin(tmp_path, _use_new_zipfile_serialization=False)), TENSORS)


def test_bin_mapped_anew_while_a_tensor_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "TORCH_PAGES", 40)
    assert_holds(open_checkpoint(write_bin(tmp_path)), TENSORS)


def test_bin_of_views_and_parameters(tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.arange(24.0).reshape(4, 6)
    state = {"whole": torch.nn.Parameter(base), "transposed": base.t(), "rows": base[1:]}
    write_bin(tmp_path)
    torch.save(state, tmp_path / "pytorch_model.bin")
    expected = {name: tensor.detach().numpy() for name, tensor in state.items()}
    assert_holds(open_checkpoint(tmp_path), expected)


def test_safetensors_before_bin(tmp_path):
    write_bin(tmp_path, {"h": np.zeros(3, np.float32)})
    assert_holds(open_checkpoint(write(tmp_path)), TENSORS)


def test_generation_config(tmp_path):
    (write(tmp_path) / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert open_checkpoint(tmp_path).generation_config == {"eos_token_id": [1, 2]}


def test_unknown_tensor_names_near_ones(tmp_path):
    with pytest.raises(CheckpointError, match=r"'h\.0\.wight'; near it are h\.0\.weight"):
        open_checkpoint(write(tmp_path)).read("h.0.wight")


@pytest.mark.parametrize("change", [-1, -40, -400])
def test_truncated_safetensors(tmp_path, change):
    file = write(tmp_path) / "model.safetensors"
    os.truncate(file, file.stat().st_size + change)
    refused(tmp_path, str(file), "cut short", "download it again")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["empty (0 bytes)"]),
        (b"\xff" * 64, ["not a whole safetensors file"]),
        ((10).to_bytes(8, "little") + b"{{{{{{{{{{", ["not a whole safetensors file"]),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ["git lfs pull"]),
    ],
)
def test_damaged_safetensors(tmp_path, content, words):
    file = write(tmp_path) / "model.safetensors"
    file.write_bytes(content)
    refused(tmp_path, str(file), *words)


def test_safetensors_of_a_dtype_that_is_not_supported(tmp_path):
    header = json.dumps({"w": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    file = write(tmp_path) / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"ab")
    refused(tmp_path, str(file), "'w' is F8_E4M3", "BF16")


def test_file_cut_short_after_opening(tmp_path):
    checkpoint = open_checkpoint(write(tmp_path))
    os.truncate(tmp_path / "model.safetensors", 100)
    with pytest.raises(CheckpointError, match=r"model\.safetensors ends before byte"):
        checkpoint.read("h.0.weight")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "c:x", "..\\x", ""])
def test_index_that_leaves_its_folder(tmp_path, name):
    index = write_shards(tmp_path / "in", safetensors.numpy.save_file, "model", "safetensors")
    write(tmp_path)
    index.write_text(json.dumps({"weight_map": {"h.0.weight": name}}))
    refused(tmp_path / "in", str(index), repr(name), "same folder")


def test_index_of_a_missing_shard(tmp_path):
    index = write_shards(tmp_path, safetensors.numpy.save_file, "model", "safetensors")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refused(tmp_path, str(index), "'model-00002-of-00002.safetensors'")


def test_index_of_a_tensor_that_is_elsewhere(tmp_path):
    index = write_shards(tmp_path, safetensors.numpy.save_file, "model", "safetensors")
    places = json.loads(index.read_text())["weight_map"]
    places["h.1.weight"] = places["h.0.weight"]
    index.write_text(json.dumps({"weight_map": places}))
    refused(tmp_path, "model-00001-of-00002.safetensors lacks tensor 'h.1.weight'")


def test_tensor_in_two_shards(tmp_path):
    write_shards(tmp_path, safetensors.numpy.save_file, "model", "safetensors")
    safetensors.numpy.save_file(TENSORS, tmp_path / "model-00002-of-00002.safetensors")
    refused(tmp_path, "is in model-00001-of-00002.safetensors and in model-00002-of-00002.safetensors")


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": []}'])
def test_index_without_a_map(tmp_path, content):
    index = write_shards(tmp_path, safetensors.numpy.save_file, "model", "safetensors")
    index.write_text(content)
    refused(tmp_path, str(index), "weight_map")


def test_malformed_config_gives_its_line(tmp_path):
    config = write(tmp_path) / "config.json"
    config.write_text('{\n "a": 1,\n "b": oops\n}')
    refused(tmp_path, f"{config}, line 3, column 7")


@pytest.mark.parametrize(("content", "word"), [(b"[1]", "holds a list"), (b"", "empty"), (b'{"a": "\xff"}', "UTF-8")])
def test_config_that_is_no_object(tmp_path, content, word):
    config = write(tmp_path) / "config.json"
    config.write_bytes(content)
    refused(tmp_path, str(config), word)


def test_missing_config(tmp_path):
    config = write(tmp_path) / "config.json"
    config.unlink()
    refused(tmp_path, f"{config}: no such file")


def test_folder_without_weights_lists_what_is_there(tmp_path):
    write(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "tf_model.h5")
    refused(tmp_path, str(tmp_path), "pytorch_model.bin.index.json", "there is tf_model.h5")


@pytest.mark.parametrize("whole", [True, False])
def test_adapter(tmp_path, whole):
    write(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    if not whole:
        (tmp_path / "model.safetensors").unlink()
    refused(tmp_path, "PEFT", "base model", "adapter=")


@pytest.mark.parametrize(
    "name", ["./nowhere", "/nowhere/at/all", "a/b/c", "model.gguf", "a/config.json", "~/no/such", ""]
)
def test_no_such_path(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "..")
    if name:
        refused(name, "no such folder or file", repr(name))
    refused(tmp_path / "nowhere", "no such folder or file")


def test_file_that_is_no_checkpoint(tmp_path):
    refused(write(tmp_path) / "config.json", "is not a file of weights", "Give its folder")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("x" * 300, "File name too long"),
        ("x/" * 3000, "File name too long"),
        ("a\0b", "null"),
        ("~nosuchuser/m", "home"),
    ],
)
def test_path_that_cannot_be(name, why):
    message = refused(name, "no such folder or file", why)
    assert len(message) < 700


def test_file_of_weights_goes_with_its_folder(tmp_path):
    others = {"h.0.weight": TENSORS["h.0.weight"] * 2}
    safetensors.numpy.save_file(others, write_bin(write(tmp_path)) / "other.safetensors")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 3}')
    for file in ("model.safetensors", "other.safetensors", "pytorch_model.bin"):
        checkpoint = open_checkpoint(tmp_path / file)
        assert_holds(checkpoint, others if file == "other.safetensors" else TENSORS)
        assert checkpoint.config == CONFIG == load_config(tmp_path / file)
        assert checkpoint.generation_config == {"eos_token_id": 3}


def test_shard_goes_with_the_others_of_its_index(tmp_path):
    write_shards(tmp_path, safetensors.numpy.save_file, "model", "safetensors")
    assert_holds(open_checkpoint(tmp_path / "model-00002-of-00002.safetensors"), TENSORS)


IDS = [  # what a file says, what that means
    (5, 5),
    ([5, 6], [5, 6]),
    ([5], [5]),
    ([5, -1, 5], [5]),
    (-1, None),
    ([-1], None),
    ([], None),
    (None, None),
]


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(("written", "meant"), IDS)
def test_token_ids(tmp_path, file, written, meant):
    write(tmp_path)
    fields = CONFIG | {"eos_token_id": written, "pad_token_id": -100, "bos_token_id": 0}
    (tmp_path / file).write_text(json.dumps(fields))
    checkpoint = open_checkpoint(tmp_path)
    read = checkpoint.config if file == "config.json" else checkpoint.generation_config
    assert read == CONFIG | {"eos_token_id": meant, "pad_token_id": None, "bos_token_id": 0}
    assert token_ids({"eos_token_id": written}, "it") == {"eos_token_id": meant}


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("field", ["bos_token_id", "eos_token_id", "pad_token_id"])
@pytest.mark.parametrize("value", ["2", 2.0, True, [2, "3"], {"id": 2}, 2**31, [[2]]])
def test_token_ids_of_another_type(tmp_path, file, field, value):
    write(tmp_path)
    (tmp_path / file).write_text(json.dumps(CONFIG | {field: value}))
    refused(tmp_path, f"{tmp_path / file}: {field} is {value!r}; legal is")


def test_bin_that_would_run_code(tmp_path):
    torch = pytest.importorskip("torch")
    trace = tmp_path / "trace"

    class Evil:
        def __reduce__(self):
            return Path.touch, (trace,)

    write_bin(tmp_path)
    torch.save({"h": torch.zeros(2), "evil": Evil()}, tmp_path / "pytorch_model.bin")
    message = refused(tmp_path, "pytorch_model.bin", "can run any code", "safetensors")
    assert "\n" not in message
    assert not trace.exists()


def test_bin_without_torch(tmp_path, monkeypatch):
    write_bin(tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(tmp_path, "pip install torch", "safetensors")


def test_bin_with_a_torch_that_is_too_old(tmp_path, monkeypatch):
    write_bin(tmp_path)
    monkeypatch.setattr(sys.modules["torch"], "__version__", "2.5.1+cpu")
    refused(tmp_path, "torch 2.5.1+cpu", "2.6", "CVE-2025-32434")


def test_truncated_bin(tmp_path):
    file = write_bin(tmp_path) / "pytorch_model.bin"
    os.truncate(file, file.stat().st_size - 300)
    refused(tmp_path, str(file), "download it again")


@pytest.mark.parametrize("value", [3, {"nested": 1}, "text"])
def test_bin_of_other_things_than_tensors(tmp_path, value):
    torch = pytest.importorskip("torch")
    write_bin(tmp_path)
    torch.save({"h": torch.zeros(2), "odd": value}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, f"'odd' is {type(value).__name__}", "state_dict()")
    torch.save([torch.zeros(2)], tmp_path / "pytorch_model.bin")
    refused(tmp_path, "holds a list", "state_dict()")


def test_load_config(tmp_path):
    write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert load_config(tmp_path) == load_config(tmp_path / "config.json") == CONFIG
    with pytest.raises(CheckpointError, match="no such folder or file"):
        load_config("no/such/config.json")


@pytest.mark.parametrize(("kind", "writer"), [("safetensors", write), ("bin", write_bin)])
def test_reading_holds_one_tensor(tmp_path, kind, writer):
    tensors = {f"h.{i}.weight": np.full((1024, 1024), i, np.float32) for i in range(64)}
    above, size = peak_while_reading(writer(tmp_path, tensors), kind)
    assert size == 2**28
    assert above < 0.25 * size
