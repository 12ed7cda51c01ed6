"""Experts: the router's choices, both ways of computing them, what a decode step reads, and forms of checkpoints."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from families import OPTIONS
from flax import nnx
from safetensors.numpy import load_file, save_file
from test_families import Original, random_model
from test_one_cpu import computations, made, runtime

from jx_neuron.checkpoint import open_checkpoint
from jx_neuron.checkpoint.quantized import mxfp4
from jx_neuron.errors import CheckpointError, ConfigError
from jx_neuron.lowering.model import lower_model
from jx_neuron.models import Decoder, family
from jx_neuron.nn import blocks
from jx_neuron.nn.experts import Experts, Router
from jx_neuron.nn.ops import using
from jx_neuron.runtime.cpu.kernel import FEW, Formulation, PackedExperts, pack_experts
from jx_neuron.runtime.cpu.ops import CpuOps
from jx_neuron.step.program_key import ProgramKey

SIZES = dict(d=24, e=16, m=10)
FORMULATION = Formulation((), FEW, "eigen")
TWO_FORMS = """granitemoe granitemoehybrid lfm2_moe minimax_m2 mixtral olmoe qwen2_moe
qwen3_5_moe_text qwen3_moe qwen3_next""".split()


def experts(**options: Any) -> Experts:
    layer = Experts(SIZES, "silu", rngs=nnx.Rngs(0), **options)
    for part in (layer.gate_proj, layer.up_proj, layer.down_proj):
        if part.bias is not None:
            part.bias.set_value(jax.random.normal(jax.random.key(1), part.bias.shape))
    return layer


def choice(tokens: int, chosen: int, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens, and weights and numbers of different experts for each."""
    rng = np.random.default_rng(seed)
    x_btd = rng.standard_normal((2, tokens, SIZES["d"]), np.float32)
    index_btc = np.stack([rng.permutation(SIZES["e"])[:chosen] for _ in range(2 * tokens)]).reshape(2, tokens, chosen)
    weight_btc = rng.random((2, tokens, chosen), np.float32)
    return jnp.asarray(x_btd), jnp.asarray(weight_btc), jnp.asarray(index_btc, jnp.int32)


@pytest.mark.few(3)
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"weigh_input": True}])
@pytest.mark.parametrize(
    ("tokens", "chosen"), [(1, 1), *(pytest.param(*of, marks=pytest.mark.slow) for of in [(1, 3), (3, 2)]), (40, 16)]
)
def test_every_way_gives_the_same(
    tokens: int, chosen: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, (x_btd, weight_btc, index_btc) = experts(**options), choice(tokens, chosen)
    dense = layer.dense(x_btd, weight_btc, index_btc)
    np.testing.assert_allclose(layer.of_chosen(x_btd, weight_btc, index_btc), dense, rtol=2e-5, atol=2e-5)
    for cores in (1, 5):
        monkeypatch.setattr(blocks, "SIZE", 4)
        in_blocks = layer.in_blocks(x_btd, weight_btc, index_btc, cores)
        np.testing.assert_allclose(in_blocks, dense, rtol=2e-5, atol=2e-5)
    for part in (layer.gate_proj, layer.up_proj, layer.down_proj):
        stored = jnp.asarray(pack_experts([np.asarray(part.kernel[...])]))
        part.kernel = nnx.Param(PackedExperts(stored, jnp.float32, FORMULATION))
    with using(CpuOps(FORMULATION)):
        np.testing.assert_allclose(layer(x_btd, weight_btc, index_btc), dense, rtol=2e-5, atol=2e-5)


@pytest.mark.few(3)
@pytest.mark.parametrize("rows", [1, 7, 512, 4096])
@pytest.mark.parametrize("experts", [1, 2, 64])
def test_each_row_has_a_place_in_a_block_of_its_expert(rows: int, experts: int) -> None:
    rng = np.random.default_rng(0)
    for weights in (np.ones(experts), rng.exponential(size=experts) ** 4, np.eye(experts)[-1]):  # even, uneven, one
        expert_r = rng.choice(experts, rows, p=weights / weights.sum()).astype(np.int32)
        placed = blocks.Placed(*map(np.asarray, blocks.place(jnp.asarray(expert_r), experts)))
        assert placed.row_qz.shape == (blocks.count(rows, experts), blocks.SIZE)
        np.testing.assert_array_equal(placed.row_qz.reshape(-1)[placed.place_r], np.arange(rows))
        np.testing.assert_array_equal(placed.expert_q[placed.place_r // blocks.SIZE], expert_r)
        assert len({*placed.place_r.tolist()}) == rows


def test_equal_scores_choose_the_first_experts() -> None:
    router = Router(SIZES, 3, normalize=True, rngs=nnx.Rngs(0))
    weight_btc, index_btc = router(jnp.zeros((1, 2, SIZES["d"])))
    np.testing.assert_array_equal(index_btc, [[[0, 1, 2]] * 2])
    np.testing.assert_allclose(weight_btc, 1 / 3, rtol=1e-6)


def test_experts_are_of_the_groups_with_the_best_two() -> None:
    router = Router(SIZES, 2, score="sigmoid", corrected=True, groups=(4, 1), rngs=nnx.Rngs(0))
    assert router.correction is not None
    # the best expert is in a group that has no second
    router.correction.set_value(jnp.zeros(16).at[1].set(3.0).at[9].set(2.0).at[10].set(2.5))
    weight_btc, index_btc = router(jnp.zeros((1, 1, SIZES["d"])))
    np.testing.assert_array_equal(index_btc, [[[10, 9]]])
    np.testing.assert_allclose(weight_btc, 0.5)  # the correction chooses, and weighs nothing


@pytest.mark.parametrize("name", ["deepseek_v3", "ernie4_5_moe", "glm4_moe", "lfm2_moe", "minimax_m2"])
def test_a_correction_is_float32_in_a_model_of_16_bits(name: str, tmp_path: Path) -> None:
    """DeepSeek-V3's are near 14, and differ in what bfloat16 has no bits for."""
    model = random_model(name, OPTIONS[name][0])
    biases = [bias for path, bias in model.state_dict().items() if path.endswith(("correction_bias", "expert_bias"))]
    for bias in biases:
        bias.copy_(14 + 0.01 * torch.rand_like(bias))
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    decoder = Decoder.from_config(checkpoint.config)
    source = decoder.source(checkpoint, jnp.bfloat16)
    paths = [path for path in decoder.shapes if path.endswith("gate.correction")]
    assert len(paths) == len(biases) > 0
    for path, bias in zip(paths, biases, strict=True):
        np.testing.assert_array_equal(source.read(path), bias.numpy())
        assert decoder.abstract_params(jnp.bfloat16)[path].dtype == jnp.float32


def many_experts(name: str, **sizes: int) -> dict[str, Any]:
    """A config of the family with 64 experts of a width of 128, 4 of each token where it has a say."""
    config = family(name).Config
    fields = getattr(config, "EXPERTS", ("num_experts", "top_k_experts", "moe_intermediate_size"))
    many = dict(zip(fields, (64, 4, 128), strict=True))
    many |= {alias: many[field] for alias, field in config.ALIASES.items() if field in many}
    options = next(o for o in OPTIONS[name] if name != "gemma4_text" or o.get("enable_moe_block"))
    options = options | many | dict(hidden_size=192, vocab_size=64) | sizes
    return transformers.AutoConfig.for_model(name, **options).to_dict()


MIXTURES = [*(name for name in OPTIONS if hasattr(family(name).Config, "EXPERTS")), "gemma4_text"]


@pytest.mark.few(4)
@pytest.mark.parametrize("name", MIXTURES)
def test_a_lowered_decode_step_reads_the_experts_chosen(name: str) -> None:
    decoder = Decoder.from_config(many_experts(name), 1)
    chosen = decoder.config.chosen
    assert chosen
    (program,) = lower_model(decoder, [ProgramKey("decode", 1, 1, 32)], 1, 32, jnp.bfloat16)
    held = {spec.name: math.prod(spec.shape) * jnp.dtype(spec.dtype).itemsize for spec in program.inputs}
    of_experts = sum(size for name, size in held.items() if ".experts." in name)
    assert of_experts > 0.8 * sum(held.values())
    least = of_experts * chosen / 64 + sum(held.values()) - of_experts
    assert program.cost().bytes_read <= 1.1 * least


def test_a_lowered_prefill_goes_through_experts_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = dict(model_type="mixtral", hidden_size=64, intermediate_size=1024, num_hidden_layers=2, vocab_size=64)
    decoder, key = Decoder.from_config(raw | dict(num_attention_heads=4, num_key_value_heads=4), 4), "prefill"
    keys = [ProgramKey(key, 1, 512, 512), ProgramKey(key, 2, 256, 512), ProgramKey(key, 1, 128, 512)]
    *in_blocks, few = lower_model(decoder, keys, 2, 512, jnp.bfloat16)
    monkeypatch.setattr(blocks, "pay", lambda *_: False)
    jax.clear_caches()  # of blocks that are traced
    *dense, few_dense = lower_model(decoder, keys, 2, 512, jnp.bfloat16)
    assert few.hlo_module == few_dense.hlo_module
    for program, other in zip(in_blocks, dense, strict=True):
        of_experts = 2 * 2 * 3 * 64 * (1024 // 4)  # FLOPs, layers, matrices, sizes
        saved = other.cost().flops - program.cost().flops
        assert saved >= 0.98 * of_experts * (512 * 8 - blocks.count(512 * 2, 8) * blocks.SIZE)
        assert [(c.opcode, c.shape) for c in program.collectives()] == [
            (c.opcode, c.shape) for c in other.collectives()
        ]
        for target in ("inf2", "trn1", "trn2"):
            assert program.verify(target) == []


IN_BLOCKS = [
    (name, number, backend)
    for name, number in {"gpt_oss": 1, "llama4_text": 1, "qwen3_moe": 0}.items()
    for backend in ("xla", "host")
]


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("name", "number", "backend"),
    [pytest.param(*case, marks=[] if case == ("qwen3_moe", 0, "xla") else pytest.mark.slow) for case in IN_BLOCKS],
)
def test_prompts_that_go_through_in_blocks_give_hfs_logits(
    name: str, number: int, backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    placed, place = [], blocks.place
    monkeypatch.setattr(blocks, "SIZE", 2)
    monkeypatch.setattr(blocks, "place", lambda *of: placed.append(of) or place(*of))
    original = Original(name, OPTIONS[name][number], tmp_path)
    original.check_logits(original.load(tp_degree=4, backend=backend))
    assert placed


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_decode_step_on_a_cpu_reads_single_experts_in_place(batch: int, dtype: str) -> None:
    key = ProgramKey("decode", batch, 1, 32)
    parts = computations(
        runtime(Decoder.from_config(many_experts("qwen3_moe", num_hidden_layers=3)), dtype), key, batch, 32
    )
    assert sum(" while(" in line for body in parts.values() for line in body) == 2  # over layers, and over experts
    large = [line for body in parts.values() for size, line in made(body) if size >= 128 * 128]
    assert large == []


@pytest.mark.parametrize("name", TWO_FORMS)
def test_both_forms_of_checkpoints_are_read(name: str, tmp_path: Path) -> None:
    """That of the Hub, which transformers writes, and that which it has in memory."""
    model = random_model(name, OPTIONS[name][0])
    model.save_pretrained(tmp_path / "hub")
    model.save_pretrained(tmp_path / "memory", save_original_format=False)
    hub, memory = (open_checkpoint(tmp_path / form) for form in ("hub", "memory"))
    assert hub.names() != memory.names()
    decoder = Decoder.from_config(hub.config)
    one, other = (decoder.source(form, np.float32) for form in (hub, memory))
    for path in decoder.shapes:
        np.testing.assert_array_equal(one.read(path), other.read(path))


def test_more_chosen_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_experts_per_tok=9 is more than num_local_experts=8; lower it"):
        family("mixtral").Config.from_hf({"num_experts_per_tok": 9})


def coded(rng: np.random.Generator, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    scales = rng.integers(0, 255, shape).astype(np.uint8)  # 255 is no number
    return rng.integers(0, 256, (*shape, 16)).astype(np.uint8), scales


def test_mxfp4_is_widened_to_what_hf_makes_of_it() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    packed, scales = coded(np.random.default_rng(0), 3, 10, 128)
    ours = mxfp4.widen(packed, scales)
    theirs = convert_moe_packed_tensors(torch.tensor(packed), torch.tensor(scales), dtype=torch.bfloat16)
    np.testing.assert_array_equal(ours.view(np.uint16), theirs.view(torch.uint16).numpy())


def test_an_mxfp4_checkpoint_is_read(tmp_path: Path) -> None:
    name, options = "gpt_oss", OPTIONS["gpt_oss"][0] | {"hidden_size": 64, "intermediate_size": 32}
    model = random_model(name, options)
    model.save_pretrained(tmp_path)
    tensors, rng = load_file(tmp_path / "model.safetensors"), np.random.default_rng(1)
    for tensor in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        e, columns, rows = tensors.pop(tensor).shape
        packed, _ = coded(rng, e, rows, columns // 32)
        tensors |= {f"{tensor}_blocks": packed, f"{tensor}_scales": np.full(packed.shape[:-1], 124, np.uint8)}
    save_file(tensors, tmp_path / "model.safetensors")
    config = tmp_path / "config.json"
    text = config.read_text().replace("{", '{"quantization_config": {"quant_method": "mxfp4"},', 1)
    config.write_text(text)
    checkpoint = open_checkpoint(tmp_path)
    source = Decoder.from_config(checkpoint.config).source(checkpoint, np.float32)
    layer = "model.layers.0.mlp.experts.gate_up_proj"
    whole = mxfp4.widen(tensors[f"{layer}_blocks"], tensors[f"{layer}_scales"]).astype(np.float32)
    np.testing.assert_array_equal(source.read("layers.0.mlp.experts.gate_proj.kernel"), whole[..., 0::2])
    np.testing.assert_array_equal(source.read("layers.0.mlp.experts.up_proj.kernel"), whole[..., 1::2])
    blocks, scales = tensors[f"{layer}_blocks"], tensors.pop(f"{layer}_scales")
    for lies, message in (
        ({}, "gate_up_proj_blocks and lacks"),
        ({"scales": scales[:, 1:]}, r"_scales uint8\[.*legal are uint8 \[experts, rows, blocks, 16\]"),
        ({"scales": scales.astype(np.int8)}, "_scales int8"),
        ({"scales": scales, "blocks": blocks[..., :8]}, "legal are uint8"),
        ({"scales": scales, "blocks": blocks[0]}, "legal are uint8"),
    ):
        parts = {f"{layer}_{part}": np.ascontiguousarray(array) for part, array in lies.items()}
        save_file(tensors | parts, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path)
