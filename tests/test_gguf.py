"""GGUF files: the tensors and the config that they hold, and which are refused."""

import gguf
import ml_dtypes
import numpy as np
import pytest
from checkpoints import (
    FIELDS,
    assert_holds,
    bpe,
    llama_state,
    peak_while_reading,
    refused,
    run,
    transformers_reading,
    write,
    write_gguf,
)
from gguf import GGMLQuantizationType as Q

from jx_neuron.checkpoint.demo import demo_model
from jx_neuron.checkpoint.folder import load_config, open_checkpoint
from jx_neuron.checkpoint.gguf.format import PLAIN
from jx_neuron.errors import CheckpointError


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_gguf_tensors_are_the_hf_ones(tmp_path, tied, bias):
    state = llama_state(tied=tied, bias=bias)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", state))
    assert_holds(checkpoint, state)
    assert checkpoint.config["tie_word_embeddings"] == tied
    assert checkpoint.config["attention_bias"] == checkpoint.config["mlp_bias"] == bias
    assert checkpoint.folder == tmp_path


def test_gguf_config(tmp_path):
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf").parent)
    assert checkpoint.config == FIELDS | {
        "model_type": "llama",
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
        "vocab_size": 320,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    assert checkpoint.generation_config == {"bos_token_id": 1, "eos_token_id": [2], "pad_token_id": None}
    assert load_config(tmp_path) == load_config(tmp_path / "m.gguf") == checkpoint.config


def test_gguf_defaults(tmp_path):
    skip = ("vocab_size", "head_count_kv", "freq_base", "dimension_count", "tokenizer")
    state = llama_state()
    state = {name: array for name, array in state.items() if "k_proj" not in name and "v_proj" not in name}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", state, skip=skip))
    expected = {"vocab_size": 320, "num_key_value_heads": 4, "head_dim": 16}
    assert expected.items() <= checkpoint.config.items()
    assert checkpoint.config["rope_parameters"]["rope_theta"] == 10000.0
    assert checkpoint.generation_config is None
    with pytest.raises(CheckpointError, match=r"m\.gguf: tokenizer\.ggml\.model is None"):
        checkpoint.tokenizer()


def test_gguf_end_of_turn_ends_generation(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", edit=lambda writer: writer.add_eot_token_id(7))
    assert open_checkpoint(path).generation_config["eos_token_id"] == [2, 7]


def test_gguf_end_of_turn_of_the_chat_template_ends_generation(tmp_path):
    tokens = ["<unk>", "<s>", "</s>", "<|im_end|>", "<|eot_id|>"]

    def edit(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)
        writer.add_eos_token_id(2)
        writer.add_chat_template("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")

    path = write_gguf(tmp_path / "m.gguf", skip=("tokenizer",), edit=edit)
    assert open_checkpoint(path).generation_config["eos_token_id"] == [2, 3]


@pytest.mark.parametrize("kind", [Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1], ids=lambda kind: kind.name)
def test_gguf_types(tmp_path, kind):
    state = llama_state()
    types = {name: kind for name, array in state.items() if array.ndim == 2}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", state, types=types))
    plain = {Q.F16: np.float16, Q.BF16: ml_dtypes.bfloat16}
    # rounding is by row, and the permutation moves rows whole, so that the two commute
    rounded = {
        name: gguf.dequantize(gguf.quantize(array, kind), kind) for name, array in state.items() if name in types
    }
    expected = {name: array.astype(plain.get(kind, np.float32)) for name, array in (state | rounded).items()}
    expected |= {name: array for name, array in state.items() if name not in types}
    assert_holds(checkpoint, expected)


PACKED = [kind for kind in Q if kind not in PLAIN]


@pytest.mark.parametrize("kind", PACKED, ids=lambda kind: kind.name)
def test_gguf_packed_types_are_read_as_the_gguf_package_reads_them(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("jx_neuron.checkpoint.gguf.format.BLOCKS", 3)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 256, (5, 2 * size), np.uint8)

    def edit(writer):
        writer.add_tensor("packed.weight", raw, raw_shape=raw.shape, raw_dtype=kind)

    path = write_gguf(tmp_path / "m.gguf", edit=edit)
    try:
        expected = gguf.dequantize(raw, kind)
    except NotImplementedError:
        refused(path, f"'packed.weight' is {kind.name}", "use a Q8_0 file")
        return
    found = open_checkpoint(path).read("packed.weight")
    assert found.dtype == np.float32
    assert found.shape == (5, 2 * block)
    np.testing.assert_array_equal(found, expected)


def test_gguf_tensor_of_many_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("jx_neuron.checkpoint.gguf.format.BLOCKS", 7)
    state = llama_state()
    name = "model.embed_tokens.weight"
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", state, types={name: Q.Q8_0}))
    expected = gguf.dequantize(gguf.quantize(state[name], Q.Q8_0), Q.Q8_0)
    np.testing.assert_array_equal(checkpoint.read(name), expected)


@pytest.mark.parametrize("kind", [Q.F32, Q.Q8_0], ids=lambda kind: kind.name)
def test_gguf_equals_transformers(tmp_path, kind):
    state = llama_state(tied=False)
    types = {name: kind for name, array in state.items() if array.ndim == 2}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", state, types=types))
    config, theirs = transformers_reading(tmp_path / "m.gguf")
    assert_holds(checkpoint, theirs)
    ours = dict(checkpoint.config)
    for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ours.pop(field)  # transformers leaves these at its defaults
    for field, value in ours.items():
        assert getattr(config, field) == pytest.approx(value), field


@pytest.mark.slow
def test_demo_model_equals_transformers():
    path = demo_model()
    checkpoint = open_checkpoint(path)
    _, theirs = transformers_reading(path)
    assert set(theirs) == checkpoint.names()
    for name, expected in theirs.items():
        np.testing.assert_allclose(checkpoint.read(name), expected, rtol=0, atol=1e-6, err_msg=name)
    tokenizer = checkpoint.tokenizer()
    assert tokenizer("The capital of France is").input_ids == [504, 3575, 282, 4649, 314]
    assert tokenizer.convert_ids_to_tokens(tokenizer("in 2024").input_ids) == ["in", "Ġ", "2", "0", "2", "4"]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"type": "none", "factor": 4.0}, {"rope_type": "default"}),
        ({"factor": 1.0}, {"rope_type": "default"}),
        ({"factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {
                "type": "yarn",
                "factor": 4.0,
                "original_context_length": 32,
                "yarn_beta_fast": 16.0,
                "finetuned": True,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0},
        ),
    ],
)
def test_gguf_rope_scaling(tmp_path, keys, expected):
    def edit(writer):
        for key, value in keys.items():
            add = {
                str: writer.add_string,
                float: writer.add_float32,
                int: writer.add_uint32,
                bool: writer.add_bool,
            }
            add[type(value)](f"llama.rope.scaling.{key}", value)

    config = open_checkpoint(write_gguf(tmp_path / "m.gguf", edit=edit)).config
    assert config["rope_parameters"] == {"rope_theta": 50000.0} | expected


def test_gguf_llama3_rope_scaling_is_read_from_its_divisors(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, head_dim=16, rope_parameters=scaling | {"rope_theta": 50000.0}
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 50000.0 ** -(np.arange(0, 16, 2) / 16)
    divisors = (plain / scaled.numpy()).astype(np.float32)

    def edit(factors):
        return lambda writer: writer.add_tensor("rope_freqs.weight", factors)

    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", edit=edit(divisors)))
    assert checkpoint.config["rope_parameters"] == scaling | {"rope_theta": 50000.0}
    assert not any("rope" in name for name in checkpoint.names())
    ones = open_checkpoint(write_gguf(tmp_path / "ones.gguf", edit=edit(np.ones(8, np.float32))))
    assert ones.config["rope_parameters"] == {"rope_type": "default", "rope_theta": 50000.0}
    odd = open_checkpoint(write_gguf(tmp_path / "odd.gguf", edit=edit(divisors * np.float32(1.01)))).config
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        head_dim=16,
        max_position_embeddings=128,
        rope_parameters=odd["rope_parameters"],
    )
    scaled, factor = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))
    np.testing.assert_allclose(scaled.numpy(), plain / (divisors * 1.01), rtol=1e-6)
    assert factor == 1.0
    for wrong in (np.ones(7, np.float32), np.array([0, *[1] * 7], np.float32)):
        refused(write_gguf(tmp_path / "wrong.gguf", edit=edit(wrong)), "rope_freqs.weight")


def added(method, *values):
    return lambda writer: getattr(writer, method)(*values)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"architecture": "rwkv7"}, ["architecture 'rwkv7'", "legal are apertus, arcee", "llama"]),
        ({"skip": ("head_count",)}, ["lacks llama.attention.head_count"]),
        (
            {"skip": ("head_count_kv",), "edit": added("add_head_count_kv", [2, 1])},
            ["llama.attention.head_count_kv is [2, 1]; legal is a valid integer"],
        ),
        (
            {"skip": ("dimension_count",), "edit": added("add_rope_dimension_count", 8)},
            ["dimension_count is 8", "16"],
        ),
        ({"edit": added("add_value_length", 32)}, ["value_length is 32"]),
        ({"edit": added("add_expert_count", 8)}, ["llama.expert_count = 8", "legal is 0"]),
        ({"edit": added("add_sliding_window", 64)}, ["llama.attention.sliding_window = 64"]),
        (
            {"edit": added("add_float32", "llama.rope.scaling.attn_factor", 2.0)},
            ["attn_factor = 2.0", "legal is 1.0"],
        ),
        ({"edit": added("add_string", "llama.rope.scaling.type", "su")}, ["'su'", "'yarn'"]),
        (
            {"edit": added("add_string", "llama.rope.scaling.type", "longrope")},
            ["'rope_factors_short.weight' is missing"],
        ),
        ({"edit": added("add_uint16", "split.count", 3)}, ["3 parts", "llama-gguf-split --merge"]),
        ({"state": {"model.norm.weight": np.ones(64, np.float32)}}, ["'token_embd.weight'"]),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[0],
)
def test_gguf_refused(tmp_path, options, words):
    path = write_gguf(tmp_path / "m.gguf", **options)
    refused(path, str(path), *words)


def test_gguf_of_a_type_that_cannot_be_dequantized(tmp_path):
    def edit(writer):
        writer.add_tensor("odd.weight", np.zeros((2, 292), np.uint8), raw_shape=(2, 292), raw_dtype=Q.Q8_K)

    refused(write_gguf(tmp_path / "m.gguf", edit=edit), "'odd.weight' is Q8_K", "Q8_0")


def test_gguf_tensor_without_an_hf_name_keeps_its_own(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", edit=lambda w: w.add_tensor("blk.0.odd.weight", np.ones(3, np.float32)))
    assert "blk.0.odd.weight" in open_checkpoint(path).names()


def test_gguf_cut_short_anywhere(tmp_path):
    whole = write_gguf(tmp_path / "m.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for size in (*range(4, 200), *range(200, len(whole), 997), len(whole) - 33):
        path.write_bytes(whole[:size])
        refused(path, str(path), "cut short")


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"GGML", ["not a GGUF file"]),
        (b"GGUF\x01\0\0\0", ["version 1", "2 and 3"]),
        (b"GGUF\0\0\0\x03", ["big-endian"]),
        (b"GGUF\x03\0\0\0" + b"\xff" * 16, ["damaged"]),
    ],
)
def test_gguf_header_damaged(tmp_path, head, words):
    path = write_gguf(tmp_path / "m.gguf")
    path.write_bytes(head + path.read_bytes()[len(head) :])
    refused(path, str(path), *words)


def test_several_gguf_files(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        write_gguf(tmp_path / name)
    refused(tmp_path, "2 GGUF files", "a.gguf, b.gguf")


def test_reading_holds_one_tensor(tmp_path):
    tensors = {f"h.{i}.weight": np.full((1024, 1024), i, np.float32) for i in range(64)}

    def edit(writer):
        for name, array in tensors.items():
            writer.add_tensor(name, gguf.quantize(array, Q.Q8_0), raw_dtype=Q.Q8_0)

    above, size = peak_while_reading(write_gguf(tmp_path / "m.gguf", edit=edit), "gguf")
    assert size > 2**28
    assert above < 0.25 * size


WITHOUT_TORCH = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "torch" else find(name, package)
sys.modules["torch"] = None
from jx_neuron.checkpoint.gguf.format import PLAIN
from jx_neuron.checkpoint.gguf.tokenizer import SPLITS, Vocabulary
from jx_neuron.checkpoint.folder import open_checkpoint
for path in sys.argv[1:]:
    checkpoint = open_checkpoint(path)
    for name in checkpoint.names():
        checkpoint.read(name)
    print(checkpoint.tokenizer()("The year 2024").input_ids)
"""


def test_all_but_bin_without_torch(tmp_path):
    path = write_gguf(tmp_path / "m.gguf")
    folder = write(tmp_path / "folder", config={"model_type": "llama"})
    open_checkpoint(path).save_tokenizer(folder)
    expected = f"{bpe().encode('The year 2024').ids}\n"
    assert run(WITHOUT_TORCH, path, folder) == 2 * expected


def test_a_long_value_is_cut_short_in_the_error(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", edit=lambda w: w.add_array("llama.logit_scale", [1.0] * 100_000))
    assert len(refused(path, "llama.logit_scale = [1.0, 1.0", "...", "is not supported")) < 500
