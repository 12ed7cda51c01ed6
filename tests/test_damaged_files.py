"""Checkpoint files that claim what they do not hold: refused by name, at once, in little memory."""

import json
import struct
import zipfile

import numpy as np
import pytest
import safetensors.numpy
import tiny
from checkpoints import (
    TENSORS,
    add_bpe,
    assert_holds,
    bpe,
    llama_state,
    refused,
    write,
    write_bin,
    write_gguf,
    write_shards,
)
from gguf import GGUFValueType as V
from mutations import limits

from jx_neuron import NeuronAutoModelForCausalLM
from jx_neuron.checkpoint.folder import load_config, open_checkpoint
from jx_neuron.errors import CheckpointError
from jx_neuron.util.parsing import boundary

torch = pytest.importorskip("torch")


class Panic(BaseException):
    """As pyo3's PanicException, which is no Exception either."""


@pytest.mark.parametrize("raised", [Panic("at the disco"), RecursionError(), OverflowError("big"), MemoryError()])
def test_whatever_a_parser_raises_names_the_file(raised):
    with pytest.raises(CheckpointError, match=rf"^x\.bin is damaged.*{type(raised).__name__}"), boundary("x.bin"):
        raise raised


def test_what_passes_a_boundary():
    for raised in (KeyboardInterrupt(), SystemExit(3), CheckpointError("as it is")):
        with pytest.raises(type(raised)) as caught, boundary("x.bin"):
            raise raised
        assert caught.value is raised
    with pytest.raises(CheckpointError, match=r"^x\.bin cannot be read: .*No space left"), boundary("x.bin"):
        raise OSError(28, "No space left on device")


# safetensors and indexes


def test_safetensors_header_of_90_megabytes(tmp_path):
    entry = '"t%08d":{"dtype":"U8","shape":[1],"data_offsets":[%d,%d]},'
    count = 90_000_000 // len(entry % (0, 10**6, 10**6))
    header = ("{" + "".join(entry % (i, i, i + 1) for i in range(count))[:-1] + "}").encode()
    file = write(tmp_path) / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(count))
    del header
    with limits():
        refused(tmp_path, str(file), "claims a header of", "16,777,216")


def test_safetensors_of_more_tensors_than_any_model(tmp_path):
    entry = '"t%06d":{"dtype":"U8","shape":[1],"data_offsets":[%d,%d]},'
    header = ("{" + "".join(entry % (i, i, i + 1) for i in range(100_001))[:-1] + "}").encode()
    file = write(tmp_path) / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(100_001))
    with limits():
        refused(tmp_path, str(file), "100,001 tensors", "100,000")


@pytest.mark.parametrize("offsets", [([0, 4], [2, 6]), ([0, 4], [6, 10]), ([0, 4], [4, 12])], ids=str)
def test_safetensors_that_overlap_or_leave_holes(tmp_path, offsets):
    entries = {name: {"dtype": "U8", "shape": [4], "data_offsets": at} for name, at in zip("ab", offsets, strict=True)}
    header = json.dumps(entries).encode()
    file = write(tmp_path) / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(12))
    refused(tmp_path, str(file), "not a whole safetensors file")


def test_index_too_large(tmp_path):
    index = write_shards(tmp_path, safetensors.numpy.save_file, "model", "safetensors")
    index.write_bytes(b"[" + b"[]," * (20 * 2**20) + b"[]]")
    with limits():
        refused(tmp_path, str(index), "62,914,564 bytes")


def test_index_of_numbers_and_brackets_without_end(tmp_path):
    index = write_shards(tmp_path, safetensors.numpy.save_file, "model", "safetensors")
    index.write_text('{"weight_map": ' + "[" * 100_000)
    refused(tmp_path, str(index), "nested too deeply")
    index.write_text('{"metadata": {"total_size": ' + "9" * 5000 + "}}")
    refused(tmp_path, str(index), "a number of 5000 digits")


# torch files


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({5: torch.zeros(2)}, "the key 5 is a int; legal are names"),
        ({None: torch.zeros(2)}, "the key None is a NoneType"),
        ({"h": torch.zeros(2, device="meta")}, "'h' is on the meta device"),
        ({"h": torch.zeros(1).expand(1 << 40)}, "'h' of shape (1099511627776,) takes 4,398,046,511,104 bytes"),
        ({"h": torch.zeros(2, dtype=torch.complex64).conj()}, "'h' is complex64"),
    ],
    ids=["int", "none", "meta", "expanded", "conj"],
)
def test_bin_of_odd_tensors(tmp_path, state, words, zipped):
    write_bin(tmp_path)
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with limits():
        refused(tmp_path, "pytorch_model.bin", words)


@pytest.mark.parametrize("zipped", [True, False])
def test_bin_of_a_negative_view(tmp_path, zipped):
    negative = torch._neg_view(torch.arange(6.0).reshape(2, 3))
    write_bin(tmp_path)
    torch.save({"h": negative}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert_holds(open_checkpoint(tmp_path), {"h": -np.arange(6, dtype=np.float32).reshape(2, 3)})


def test_bin_whose_parts_outgrow_it(tmp_path):
    file = write_bin(tmp_path) / "pytorch_model.bin"
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, bytes(2**28) if name.endswith("data.pkl") else content)
    with limits():
        refused(tmp_path, str(file), "data.pkl is not as torch writes it")


# GGUF


def patched(path, at, number, size=8):
    content = bytearray(path.read_bytes())
    content[at : at + size] = number.to_bytes(size, "little")
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("number", [2**40, 2**62, 2**64 - 1])
@pytest.mark.parametrize("at", [8, 16, 24], ids=["tensors", "keys", "string"])
def test_gguf_claims_more_than_the_file_has(tmp_path, at, number):
    path = patched(write_gguf(tmp_path / "m.gguf"), at, number)
    with limits(seconds=1, memory=2**26):
        refused(path, str(path), {8: "tensors; legal", 16: "keys; legal", 24: "cut short"}[at])


@pytest.mark.parametrize("kind", [V.UINT8, V.FLOAT32, V.STRING])
def test_gguf_array_as_long_as_a_header_may_be(tmp_path, kind):
    path = write_gguf(tmp_path / "m.gguf", edit=lambda writer: writer.add_array("odd.array", [1, 2]))
    content = path.read_bytes()
    at = content.index(b"odd.array") + len(b"odd.array") + 4
    head = content[:at] + struct.pack("<IQ", kind, 2**25)
    path.write_bytes(head + bytes(2**28))
    with limits():
        refused(path, str(path), "cut short")


@pytest.mark.parametrize(
    ("key", "value", "kind", "words"),
    [
        ("general.alignment", 0, V.UINT32, "general.alignment is 0; legal is greater than or equal to 1"),
        ("general.alignment", 48, V.UINT32, "general.alignment is 48; legal are powers of two"),
        ("general.alignment", 2**31, V.UINT32, "at byte"),
        ("general.alignment", "32", V.STRING, "general.alignment is '32'; legal is a valid integer"),
        ("general.alignment", 32.0, V.FLOAT32, "general.alignment is 32.0; legal is a valid integer"),
        ("split.count", [2, 3], V.ARRAY, "split.count is [2, 3]; legal is a valid integer"),
        ("llama.context_length", "128", V.STRING, "llama.context_length is '128'; legal is a valid integer"),
        ("llama.context_length", -1, V.INT32, "llama.context_length is -1; legal is greater than"),
        ("llama.context_length", 2**40, V.UINT64, "legal is less than or equal to 2147483647"),
        ("llama.block_count", 10**9, V.UINT32, "llama.block_count is 1000000000; legal is how many layers"),
        ("llama.embedding_length", 2**20, V.UINT32, "llama.embedding_length is 1048576; legal is the width of"),
        ("llama.vocab_size", 10**8, V.UINT32, "llama.vocab_size is 100000000; legal is the rows of"),
        ("llama.rope.freq_base", float("nan"), V.FLOAT32, "llama.rope.freq_base is nan; legal is"),
        ("llama.rope.freq_base", float("inf"), V.FLOAT32, "legal is a finite number"),
        ("llama.attention.layer_norm_rms_epsilon", 0.0, V.FLOAT32, "legal is greater than 0"),
        ("llama.attention.head_count", True, V.BOOL, "llama.attention.head_count is True; legal is a valid integer"),
        ("llama.rope.scaling.type", 3, V.UINT32, "llama.rope.scaling.type is 3; legal is a valid string"),
        ("tokenizer.ggml.eos_token_id", "2", V.STRING, "eos_token_id is '2'; legal is a valid integer"),
        ("general.architecture", ["llama"], V.ARRAY, "architecture ['llama']; legal are"),
    ],
)
def test_gguf_metadata_of_another_type(tmp_path, key, value, kind, words):
    def edit(writer):
        writer.kv_data[0].pop(key, None)
        writer.add_key_value(key, value, kind)

    path = write_gguf(tmp_path / "m.gguf", edit=edit)
    refused(path, str(path), words)


@pytest.mark.parametrize(
    ("key", "value", "kind", "words"),
    [
        ("tokenizer.ggml.tokens", [1, 2], V.ARRAY, "tokenizer.ggml.tokens is [1, 2]; legal is a valid string"),
        ("tokenizer.ggml.merges", "a b", V.STRING, "tokenizer.ggml.merges is 'a b'; legal is a valid list"),
        ("tokenizer.ggml.pre", 7, V.UINT32, "tokenizer.ggml.pre is 7; legal is a valid string"),
        ("tokenizer.ggml.add_bos_token", 2, V.UINT32, "tokenizer.ggml.add_bos_token is 2; legal is a valid boolean"),
        ("tokenizer.chat_template", 7, V.UINT32, "tokenizer.chat_template is 7; legal is a valid string"),
        (
            "tokenizer.ggml.scores",
            [0.5, float("nan")],
            V.ARRAY,
            "scores is [0.5, nan]; legal is a finite",
        ),
        ("tokenizer.ggml.bos_token_id", 10**6, V.UINT32, "m.gguf is damaged"),
        ("tokenizer.ggml.token_type", [1, 2], V.ARRAY, "m.gguf is damaged"),
    ],
)
def test_gguf_tokenizer_of_another_type(tmp_path, key, value, kind, words):
    def edit(writer):
        writer.kv_data[0].pop(key, None)
        writer.add_key_value(key, value, kind)

    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", edit=edit))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.tokenizer()
    assert words in str(caught.value)


def test_gguf_without_a_padding_token(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", edit=lambda writer: writer.add_pad_token_id(2**32 - 1))
    checkpoint = open_checkpoint(path)
    assert checkpoint.config["pad_token_id"] is None
    assert checkpoint.generation_config == {"bos_token_id": 1, "eos_token_id": [2], "pad_token_id": None}
    assert checkpoint.tokenizer().pad_token is None


@pytest.mark.parametrize("axes", [0, 5, 2**32 - 1])
def test_gguf_tensor_without_axes_or_with_too_many(tmp_path, axes):
    path = write_gguf(tmp_path / "m.gguf")
    at = path.read_bytes().index(b"output_norm.weight") + len(b"output_norm.weight")
    refused(patched(path, at, axes, 4), "tensor 'output_norm.weight'", f"{axes} axes; legal are 1 to 4")


@pytest.mark.parametrize(("length", "words"), [(0, "has the shape [0]"), (2**40, "at byte"), (2**62, "at byte")])
def test_gguf_tensor_of_another_length(tmp_path, length, words):
    path = write_gguf(tmp_path / "m.gguf")
    at = path.read_bytes().index(b"output_norm.weight") + len(b"output_norm.weight") + 4
    refused(patched(path, at, length), str(path), words)


def test_gguf_tensors_that_overlap(tmp_path):
    path = write_gguf(tmp_path / "m.gguf")
    at = path.read_bytes().index(b"output_norm.weight") + len(b"output_norm.weight") + 4 + 8 + 4
    refused(patched(path, at, 64), "tensor 'output_norm.weight' is at byte")


def test_gguf_key_that_is_there_twice(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", edit=lambda w: w.add_uint32("llama.rope.scale_lineaX", 1))
    path.write_bytes(path.read_bytes().replace(b"llama.rope.scale_lineaX", b"llama.embedding_length\0"[:-1] + b"X"))
    refused(path, "llama.embedding_lengthX = 1 is not supported")
    path = write_gguf(tmp_path / "n.gguf", edit=lambda w: w.add_uint32("llama.embedding_lengtX", 64))
    path.write_bytes(path.read_bytes().replace(b"llama.embedding_lengtX", b"llama.embedding_length"))
    refused(path, str(path), "the key 'llama.embedding_length' is there twice")


def test_gguf_merge_of_a_product_that_is_no_token(tmp_path, capfd):
    def edit(writer):
        add_bpe(writer, bpe())
        merges = writer.kv_data[0]["tokenizer.ggml.merges"].value
        merges.append("<s> </s>")

    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", skip=("tokenizer",), edit=edit))
    with pytest.raises(CheckpointError, match=r"the merge '<s> </s>' takes a token '<s></s>', which is not there"):
        checkpoint.tokenizer()
    assert "panicked" not in capfd.readouterr().err
    model = NeuronAutoModelForCausalLM.from_pretrained(checkpoint.path, n_positions=16)
    streamed = [step.tokens[0] for step in model.stream([[5, 6]], 6, top_k=1)]
    assert len(streamed) == 4
    assert [[5, 6, *streamed]] == model.sample([[5, 6]], 6, top_k=1)


# What a model makes of them


def test_a_negative_padding_token_is_none(tmp_path):
    folder = tiny.saved("llama", tmp_path)
    prompts = tiny.prompts(2, 4).tolist()
    whole = NeuronAutoModelForCausalLM.from_pretrained(folder / "model.safetensors", batch_size=2)
    free = whole.sample(prompts, 9, top_k=1)
    end = free[0][4]
    assert end not in free[1][4:8]
    config = json.loads((folder / "config.json").read_text()) | {"pad_token_id": -1, "eos_token_id": end}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"pad_token_id": -1}))
    model = NeuronAutoModelForCausalLM.from_pretrained(folder, batch_size=2)
    answer = model.sample(prompts, 9, top_k=1)
    assert answer[0] == [*prompts[0], *[end] * 5]
    assert answer[1][:8] == free[1][:8]
    made = NeuronAutoModelForCausalLM.from_config(config)
    assert model.settings.generation == made.settings.generation == {"eos_token_id": end, "pad_token_id": None}
    with pytest.raises(CheckpointError, match=r"eos_token_id is \'7\'; legal is a valid integer"):
        NeuronAutoModelForCausalLM.from_config(config | {"eos_token_id": "7"})


# What a folder is


def test_folder_of_a_gguf_and_a_stub_config(tmp_path):
    state = llama_state()
    write_gguf(tmp_path / "m.gguf", state)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    checkpoint = open_checkpoint(tmp_path)
    assert_holds(checkpoint, state)
    assert load_config(tmp_path) == checkpoint.config
    assert checkpoint.config["hidden_size"] == 64
    write_gguf(tmp_path / "n.gguf", state)
    message = refused(tmp_path, "2 GGUF files; give the path of one: m.gguf, n.gguf")
    with pytest.raises(CheckpointError) as caught:
        load_config(tmp_path)
    assert str(caught.value) == message


def test_folder_of_weights_and_a_gguf(tmp_path):
    write_gguf(write(tmp_path, config={"model_type": "llama"}) / "m.gguf")
    assert_holds(open_checkpoint(tmp_path), TENSORS)
    assert load_config(tmp_path) == {"model_type": "llama"}
