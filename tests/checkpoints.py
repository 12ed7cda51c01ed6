"""Checkpoints in every format, written for tests."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import gguf
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from gguf import GGMLQuantizationType as Q
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from jx_neuron.checkpoint import tensor_files
from jx_neuron.checkpoint.folder import open_checkpoint
from jx_neuron.checkpoint.gguf.tokenizer import LLAMA3_SPLIT, TEKKEN_SPLIT
from jx_neuron.errors import CheckpointError

RNG = np.random.default_rng(0)
CONFIG = {"model_type": "gpt2", "n_embd": 4}
TENSORS = {
    "h.0.weight": RNG.normal(size=(4, 6)).astype(np.float32),
    "h.0.bias": RNG.normal(size=(6,)).astype(np.float16),
    "h.1.weight": RNG.normal(size=(3, 2, 5)).astype(ml_dtypes.bfloat16),
    "h.1.index": np.arange(7, dtype=np.int64),
    "h.1.scale": np.array(2.5, np.float32),
}


class Tensors(dict):
    """A checkpoint in memory."""

    names = dict.keys
    read = dict.__getitem__

    def shape(self, name: str) -> tuple[int, ...]:
        return self[name].shape


def write(folder, tensors=TENSORS, config=CONFIG):
    """A folder as save_pretrained leaves it, of one safetensors file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def write_shards(folder, save, stem, suffix):
    """The same in two files and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    names = sorted(TENSORS)
    places = {}
    for i, part in enumerate((names[:2], names[2:]), start=1):
        file = f"{stem}-{i:05}-of-00002.{suffix}"
        save({name: TENSORS[name] for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


def to_torch(array):
    torch = pytest.importorskip("torch")
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def save_torch(tensors, path, **options):
    pytest.importorskip("torch").save({name: to_torch(array) for name, array in tensors.items()}, path, **options)


def write_bin(folder, tensors=TENSORS, **options):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_torch(tensors, folder / "pytorch_model.bin", **options)
    return folder


def assert_holds(checkpoint, tensors):
    assert checkpoint.names() == frozenset(tensors)
    assert checkpoint.size == sum(array.nbytes for array in tensors.values())
    for name, expected in tensors.items():
        assert checkpoint.shape(name) == expected.shape
        assert checkpoint.dtype(name) == expected.dtype.name
        for _ in range(2):
            found = checkpoint.read(name)
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found, expected)
        with patch.object(tensor_files, "SLICE", 64):
            slices = list(checkpoint.slices(name))
        np.testing.assert_array_equal(np.concatenate(slices) if expected.ndim else slices[0], expected, strict=True)


def refused(model, *words):
    """The error's message, which must hold each of `words`."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(model)
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


def run(code, *arguments, **environment):
    """What a fresh interpreter prints."""
    root = str(Path(tensor_files.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": root, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


PEAK = """
import re, sys
if sys.argv[2] == "bin":
    import torch
from jx_neuron.checkpoint import folder as checkpoint
import jx_neuron.checkpoint.gguf.model  # what opening imports is no part of the checkpoint
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
opened = checkpoint.open_checkpoint(sys.argv[1])
for name in opened.names():
    opened.read(name)
print(peak() - before, opened.size)
"""


def peak_while_reading(path, kind):
    """Bytes of peak memory, while each tensor is read and dropped, above those before opening; and bytes read."""
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak is read from Linux's /proc")
    above, size = map(int, run(PEAK, path, kind).split())
    return above, size


FIELDS = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = (
    "The year 2024 had 366 days; the year 2023 had 365 days.\n\nIt's the cat's  house, "
    "they'll say: été, naïve, 漢字. A quick brown fox jumps over the lazy dog, and another one does so too.\n"
)


def llama_state(*, tied=True, bias=False):
    """A random Llama's state in HF's names and layout: 64 wide, 4 heads, 2 kv heads, 2 layers."""

    def normal(*shape):
        return RNG.normal(size=shape).astype(np.float32)

    state = {"model.embed_tokens.weight": normal(320, 64), "model.norm.weight": normal(64)}
    if not tied:
        state["lm_head.weight"] = normal(320, 64)
    for i in range(2):
        layer = f"model.layers.{i}."
        for name, rows, columns in (
            ("self_attn.q_proj", 64, 64),
            ("self_attn.k_proj", 32, 64),
            ("self_attn.v_proj", 32, 64),
            ("self_attn.o_proj", 64, 64),
            ("mlp.gate_proj", 96, 64),
            ("mlp.up_proj", 96, 64),
            ("mlp.down_proj", 64, 96),
        ):
            state[f"{layer}{name}.weight"] = normal(rows, columns)
            if bias:
                state[f"{layer}{name}.bias"] = normal(rows)
        state[f"{layer}input_layernorm.weight"] = normal(64)
        state[f"{layer}post_attention_layernorm.weight"] = normal(64)
    return state


def permute(array, heads):
    """convert_hf_to_gguf.py's LlamaModel.permute: rows of each head from halves to interleaved pairs."""
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def bpe(pre="smollm", size=320):
    """A byte-level BPE trained on TEXT, as llama.cpp's pre-tokenizer of that name splits it."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = {"llama-bpe": LLAMA3_SPLIT, "tekken": TEKKEN_SPLIT}.get(pre)
    tokenizer = Tokenizer(models.BPE(ignore_merges=split is not None))
    if split:
        parts = [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    elif pre == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), level])
    else:
        tokenizer.pre_tokenizer = level
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    assert tokenizer.get_vocab_size() == size
    return tokenizer


def add_bpe(writer, tokenizer, pre="smollm"):
    content = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i < 3 else 1 for i in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in content["merges"]])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}")


def write_gguf(path, state=None, *, types=None, pre="smollm", architecture="llama", skip=(), edit=None):
    """A GGUF file as llama.cpp's converter writes it; `edit` may add keys and tensors before it is written."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, add, value in (
        ("block_count", writer.add_block_count, 2),
        ("context_length", writer.add_context_length, 128),
        ("embedding_length", writer.add_embedding_length, 64),
        ("feed_forward_length", writer.add_feed_forward_length, 96),
        ("head_count", writer.add_head_count, 4),
        ("head_count_kv", writer.add_head_count_kv, 2),
        ("freq_base", writer.add_rope_freq_base, 50000.0),
        ("epsilon", writer.add_layer_norm_rms_eps, 1e-5),
        ("vocab_size", writer.add_vocab_size, 320),
        ("dimension_count", writer.add_rope_dimension_count, 16),
    ):
        if key not in skip:
            add(value)
    if "tokenizer" not in skip:
        add_bpe(writer, bpe(pre), pre)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, array in (llama_state() if state is None else state).items():
        stem, suffix = name.rsplit(".", 1)
        heads = 4 if "q_proj" in name else 2 if "k_proj" in name else None
        array = permute(array, heads) if heads else array  # noqa: PLW2901
        kind = (types or {}).get(name, Q.F32)
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", gguf.quantize(array, kind), raw_dtype=kind)
    if edit:
        edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def transformers_reading(path):
    """The config and state that transformers itself makes of a GGUF file."""
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.for_model(**load_gguf_checkpoint(path)["config"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    return config, {name: tensor.numpy() for name, tensor in tensors.items()}
