"""Latent attention: both ways of computing it, what a step reads and keeps of it, and the configs that it takes."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families_mla import MLA, OPTIONS
from flax import nnx
from safetensors.numpy import load_file, save_file
from steps import FORMULATION, filled
from test_families import random_model
from transformers import AutoConfig

from jx_neuron.checkpoint import open_checkpoint
from jx_neuron.errors import ConfigError
from jx_neuron.lowering.model import lower_model
from jx_neuron.models import Decoder, family
from jx_neuron.models.known import config_of
from jx_neuron.nn.experts import Router
from jx_neuron.nn.latent_attention import LATENT, LatentAttention, absorbs
from jx_neuron.nn.layout import PLAIN, Kept, Layout
from jx_neuron.nn.ops import using
from jx_neuron.nn.rope import RopeScaling, rope_interleaved
from jx_neuron.nn.state import positions_of
from jx_neuron.planning.outline import Outline
from jx_neuron.runtime.cpu.layout import CPU
from jx_neuron.runtime.cpu.ops import CpuOps
from jx_neuron.step.program_key import ProgramKey

SIZES = dict(d=24, n=4, h=14, c=8, u=6, o=10, q=12, r=16)
SLOTS, S = 4, 16


@pytest.mark.few(1)
@pytest.mark.parametrize(("start_b", "tokens"), [([9, 0, 15], 1), ([3, 0, 11], 5), ([0, 0, 0], S)])
@pytest.mark.parametrize("layout", [PLAIN, CPU], ids=["plain", "cpu"])
def test_both_ways_give_the_same(
    layout: Layout, start_b: list[int], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = dict(low_rank=True, bias=True, scale=0.3, rope=rope_interleaved)
    layer = LatentAttention(SIZES, **options, rngs=nnx.Rngs(0))
    sizes = (0, SIZES["r"]), (0, SIZES["u"])
    table = filled(layout, [Kept(LATENT, sizes)] * 2, SLOTS, 2 * S, fill=0.5)
    at = positions_of(jnp.asarray(start_b), jnp.full(3, tokens), jnp.asarray([2, 0, 3]), tokens, S)
    x_btd = jax.random.normal(jax.random.key(1), (3, tokens, SIZES["d"]))

    def given(absorbed: bool) -> Any:
        monkeypatch.setattr("jx_neuron.nn.latent_attention.absorbs", lambda *_: absorbed)
        y_btd, written = layer(x_btd, table.of_layer(1), at, RopeScaling({}, SIZES["u"], S)(at))
        return y_btd, written.state.arrays

    with using(CpuOps(FORMULATION)):
        (absorbed, ours), (expanded, theirs) = given(True), given(False)
    np.testing.assert_allclose(absorbed, expanded, rtol=0, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_decode_step_reads_latents_and_makes_no_keys_of_heads() -> None:
    sizes = dict(kv_lora_rank=64, qk_nope_head_dim=32, v_head_dim=32, first_k_dense_replace=2, num_attention_heads=16)
    raw = AutoConfig.for_model("deepseek_v3", **OPTIONS["deepseek_v3"][0] | sizes).to_dict()
    (decode,) = lower_model(Decoder.from_config(raw, 4), [ProgramKey("decode", 2, 1, 512)], 2, 512, jnp.bfloat16)
    sizes_of = {kind: [s for s in decode.inputs if s.kind == kind] for kind in ("param", "state")}
    read = sum(2 * math.prod(s.shape) for s in sizes_of["param"])
    # of scores and of outputs
    read += sum(2 * math.prod(s.shape) * (2 if s.name.endswith("latent") else 1) for s in sizes_of["state"])
    assert decode.cost().bytes_read <= 1.05 * read
    keys_and_values = 2 * 2 * 2 * 512 * 16 // 4 * (32 + 32)  # bytes, layers, rows, positions, heads of a core
    assert decode.cost().bytes_between < keys_and_values / 4


def test_long_prompts_make_keys_of_heads() -> None:
    c, o, r = (family("deepseek_v3").Config().sizes[letter] for letter in "cor")
    assert [absorbs(c + o, r, tokens, 1024) for tokens in (1, 128, 256, 1024)] == [True, True, False, False]


def test_every_core_has_the_whole_state_and_a_part_of_the_heads() -> None:
    outline = Outline.of(config_of("deepseek-ai/DeepSeek-V3"))
    assert outline.at_degree(32).slot(10)["60.latent"] == (10, 512)
    assert outline.cache_bytes(32, 3, 10, 2) == outline.cache_bytes(1, 3, 10, 2) == 61 * 3 * 10 * (512 + 64) * 2
    assert outline.parameter_count == 671_026_419_200  # of the card's 685 b, without what predicts several tokens
    assert round(outline.active_parameter_count / 1e8) == 376
    of_keys = next(p for p in outline.parameters(32) if p.row is not None and p.row.target.endswith("k_b_proj"))
    assert (of_keys.shape, of_keys.cores) == ((128, 128, 512), 32)


def test_experts_are_of_the_groups_with_the_best_one() -> None:
    router = Router(dict(d=4, e=6), 2, groups=(3, 1), best=1, rngs=nnx.Rngs(0))
    score_e = jnp.asarray([0.5, 0.5, 0.0, 0.6, 0.4, 0.1])
    router.logits.kernel.set_value(jnp.zeros((4, 6)).at[0].set(score_e))
    _, index_btc = router(jnp.ones((1, 1, 4)))
    np.testing.assert_array_equal(index_btc, [[[3, 2]]])


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("deepseek_v3", {"num_key_value_heads": 64}, "num_key_value_heads=64 should be num_attention_heads=128"),
        ("deepseek_v3", {"head_dim": 192}, "head_dim=192 should be qk_rope_head_dim=64"),
        ("deepseek_v3", {"n_group": None}, "n_group=None is of the wrong type; it should be int"),
        ("deepseek_v3", {"topk_group": 9}, "topk_group=9 of n_group=8 groups of 32 experts is not legal"),
        ("deepseek_v3", {"n_group": 256, "topk_group": 8}, "a group has 2 experts or more"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func='softmax' is not supported, only 'sigmoid'"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq=2 is not supported"),
        ("deepseek_v2", {}, "num_experts_per_tok is null; it should be a number"),
        (
            "deepseek_v2",
            {"topk_method": "noaux_tc"},
            "topk_method='noaux_tc' is not supported; it may be one of",
        ),
        (
            "deepseek_v2",
            {"num_experts_per_tok": 6, "topk_method": "group_limited_greedy", "topk_group": 3},
            "n_group is null",
        ),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob=True is not supported"),
    ],
)
def test_refusals(model_type: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        family(model_type).Config.from_hf(fields)


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_public_config_is_read_without_a_word() -> None:
    raw = config_of("deepseek-ai/DeepSeek-V3") | {
        "attention_bias": False,
        "aux_loss_alpha": 0.001,
        "ep_size": 1,
        "hidden_act": "silu",
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 1,
        "pretraining_tp": 1,
        "scoring_func": "sigmoid",
        "seq_aux": True,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
    }
    cfg = family("deepseek_v3").Config.from_hf(raw)
    assert cfg.scale == pytest.approx((0.1 * math.log(40) + 1) ** 2 / math.sqrt(192))


def test_what_predicts_several_tokens_is_left_out(tmp_path: Path) -> None:
    random_model("deepseek_v3", OPTIONS["deepseek_v3"][0]).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    more = {"model.layers.61.eh_proj.weight": np.zeros((48, 96), np.float32)}
    save_file(load_file(file) | more, file)
    checkpoint = open_checkpoint(tmp_path)
    decoder = Decoder.from_config(checkpoint.config)
    source = decoder.source(checkpoint, np.float32)
    assert set(source.paths) == set(decoder.shapes)
    assert source.read("layers.0.self_attn.k_b_proj").shape == (4, MLA["qk_nope_head_dim"], MLA["kv_lora_rank"])
