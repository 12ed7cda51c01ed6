"""Rows of weight tables: parts of a fused axis, computed parameters, and the rows that are shared."""

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from checkpoints import Tensors
from flax import nnx
from jax.sharding import PartitionSpec as P
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor
from weight_rows import SIZES, checkpoint, made

from jx_neuron.checkpoint import layout
from jx_neuron.checkpoint.hf_config import HFConfig
from jx_neuron.checkpoint.weights import W, from_params
from jx_neuron.errors import CheckpointError, ConfigError
from jx_neuron.integrations.parity import parity
from jx_neuron.models import Decoder, llama
from jx_neuron.models.rows import alibi_slopes, attention, embedding, gated_mlp, grouped_qkv, mlp, rms_norm
from jx_neuron.planning.outline import Outline

pytestmark = pytest.mark.usefixtures("kept_registry")


# parts of a fused axis


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("([n h] + k h + k h) d -> d n h", lambda x: x.reshape(14, 5)[:6].T.reshape(5, 3, 2)),
        ("(n h + [k h] + k h) d -> d k h", lambda x: x.reshape(14, 5)[6:10].T.reshape(5, 2, 2)),
        ("(n h + k h + [k h]) d -> d k h", lambda x: x.reshape(14, 5)[10:].T.reshape(5, 2, 2)),
        ("(n ([h] + p)) d -> d n h", lambda x: x.reshape(3, 6, 5)[:, :2].transpose(2, 0, 1)),
        ("(n (h + [p])) d -> n d p", lambda x: x.reshape(3, 6, 5)[:, 2:].transpose(0, 2, 1)),
        ("d (n (1 + [1])) -> d n", lambda x: x.reshape(5, 6)[:, 1::2]),
        ("d (n ([1] + 1 + h)) -> d n", lambda x: x.reshape(5, 12)[:, ::4]),
        ("(n h + [k h]) 1 d -> d k h", lambda x: x.reshape(10, 5)[6:].T.reshape(5, 2, 2)),
    ],
)
def test_a_part_of_a_fused_axis_is_its_slice(text: str, expected) -> None:
    sizes = dict(n=3, k=2, h=2, p=4, d=5)
    row = W("x", "y", text)
    row.check(sizes)
    tensor = np.arange(np.prod(row.source_shape(sizes))).reshape(row.source_shape(sizes))
    actual = layout.parse(text).apply(tensor, sizes)
    np.testing.assert_array_equal(actual, expected(tensor))


def test_a_target_is_hf_s_name_without_the_prefix_of_the_base_model() -> None:
    assert rms_norm("model.norm").target == "norm.scale"
    assert rms_norm("transformer.h.{i}.ln_1").target == "layers.{i}.ln_1.scale"
    assert rms_norm("transformer.ln_f", "norm").target == "norm.scale"
    assert embedding("lm_head").target == "lm_head.embedding"
    up, down = mlp("model.decoder.layers.{i}.mlp", up="fc1", down="fc2", bias=False)
    assert (up.source, up.target) == ("model.decoder.layers.{i}.mlp.fc1.weight", "layers.{i}.mlp.up_proj.kernel")
    assert (down.source, down.target) == ("model.decoder.layers.{i}.mlp.fc2.weight", "layers.{i}.mlp.down_proj.kernel")


@pytest.mark.parametrize("k", [1, 2, 6])
def test_projections_that_are_fused_group_by_group(k: int) -> None:
    sizes = dict(n=6, k=k, h=2, d=5)
    tensor = np.random.default_rng(0).normal(size=(2 * (6 + 2 * k), 5))
    groups = tensor.reshape(k, 6 // k + 2, 2, 5)
    expected = groups[:, :-2].reshape(6, 2, 5), groups[:, -2], groups[:, -1]
    rows = grouped_qkv("x", "qkv", bias=False)
    for row, heads in zip(rows, expected, strict=True):
        row.check(sizes)
        assert row.source_shape(sizes) == tensor.shape
        actual = layout.parse(row.layout).apply(tensor, sizes)
        np.testing.assert_array_equal(actual, heads.transpose(2, 0, 1))


def test_heads_in_groups_may_lie_within_other_axes() -> None:
    sizes = dict(n=8, m=4, c=3, h=2)
    tensor = np.arange(48)
    actual = layout.parse("(m c n/m h) -> c n h").apply(tensor, sizes)
    expected = tensor.reshape(4, 3, 2, 2).transpose(1, 0, 2, 3).reshape(3, 8, 2)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(k n/k h) d -> d n h", r"n=6 is not divisible by k=4, and the layout has n/k"),
        ("n h -> n/k k h", "a quotient is legal only before the arrow"),
        ("(n/k h) d -> d n h", "the same letters before and after the arrow"),
        ("(q n/q h) d -> d n h", "no letter 'q'"),
    ],
)
def test_quotients_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        W("x", "y", text).check(dict(n=6, k=4, h=2, d=5))


FUSED = (
    *(row for row in llama.WEIGHTS if "self_attn" not in row.name and "mlp" not in row.name),
    *attention("model.layers.{i}.self_attn", fused="qkv_proj", bias=False),
    *gated_mlp("model.layers.{i}.mlp", fused="gate_up_proj", bias=False),
)


@dataclass(frozen=True)
class Phi3(llama.Config):
    MODEL_TYPE: ClassVar[str] = "phi3"


@pytest.mark.few(1)
@pytest.mark.parametrize("tp_degree", [1, 2, 4])
def test_phi_3_s_fused_projections_are_hf_s(tp_degree: int) -> None:
    made("phi3", Phi3, llama.Model, FUSED)
    torch.manual_seed(0)
    hf = transformers.Phi3ForCausalLM(transformers.Phi3Config(**SIZES, pad_token_id=None)).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.normal_(0, 0.3)
    result = parity(hf, tp_degree=tp_degree)
    assert result.worst < 1e-4, result.first_difference


QKV = "model.layers.{i}.self_attn.qkv_proj.weight"


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("target", "changes", "message"),
    [
        ("v_proj", dict(layout="(n h + [k h] + k h) d -> d k h"), r"part 2 \(k h\) 2 times, part 3 \(k h\) 0 times"),
        ("v_proj", dict(source=QKV.replace("qkv", "v"), layout="(k h) d -> d k h"), r"part 3 \(k h\) 0 times"),
        ("v_proj", dict(layout="(k h + n h + [k h]) d -> d k h"), "lay the axes of .* out differently"),
        ("v_proj", dict(layout="(k h) d -> d k h"), "lay the axes of .* out differently"),
        ("v_proj", dict(layout="(n h + [k h] + [k h]) d -> d k h"), "brackets should say which one part"),
        ("v_proj", dict(layout="(n h + k h + k h) d -> d k h"), "brackets should say which one part"),
        ("v_proj", dict(layout="(n h + k h + [k q]) d -> d k q"), "no letter 'q'"),
        ("v_proj", dict(layout="(n h + q + [k h]) d -> d k h"), "no letter 'q'"),
        ("v_proj", dict(layout="(n h + k h + [k h]) d -> d k"), "the same letters before and after the arrow"),
    ],
)
def test_parts_that_do_not_cover_the_tensor_once_are_refused(target: str, changes: dict, message: str) -> None:
    rows = tuple(replace(row, **changes) if target in row.target else row for row in FUSED)
    with pytest.raises(ConfigError, match=message):
        made("phi3", Phi3, llama.Model, rows)


def test_a_fused_tensor_has_the_shape_of_all_its_parts() -> None:
    raw = made("phi3", Phi3, llama.Model, FUSED)
    tensors = checkpoint(Decoder.from_config(raw))
    Decoder.from_config(raw, 1, Tensors(tensors)).source(Tensors(tensors), np.float32)
    wrong = tensors | {QKV.format(i=1): np.zeros((47, 24), np.float32)}
    with pytest.raises(CheckpointError, match=r"1\S+qkv_proj.weight has shape \[47, 24\] .* calls for \[48, 24\]"):
        Decoder.from_config(raw, 1, Tensors(wrong))
    with pytest.raises(CheckpointError, match=r"lacks tensor model\.layers\.0\.self_attn\.qkv_proj\.weight, which"):
        Decoder.from_config(raw).source(Tensors({n: a for n, a in tensors.items() if "0.self_attn.q" not in n}), "f4")


# computed parameters


class Sloped(llama.Model):
    def __init__(self, cfg: llama.Config, rngs: nnx.Rngs):
        super().__init__(cfg, rngs)
        self.slopes = nnx.Param(jnp.asarray(alibi_slopes(cfg)))


@dataclass(frozen=True)
class Alibi(llama.Config):
    MODEL_TYPE: ClassVar[str] = "alibi"


SLOPES = W(alibi_slopes, "slopes", "n -> n", P("tp"))


@pytest.mark.parametrize("n", [1, 2, 3, 6, 8, 12, 16, 71, 112])
def test_the_slopes_of_alibi_are_hfs(n: int) -> None:
    ours = alibi_slopes(SimpleNamespace(sizes={"n": n}))
    bloom = build_alibi_tensor(torch.ones(1, 2), n, torch.float32)[:, 0, 1].numpy()
    mpt = -build_mpt_alibi_tensor(n, 2)[:, 0, 0].numpy()
    np.testing.assert_allclose(ours, bloom, rtol=3e-6)
    np.testing.assert_allclose(ours, mpt, rtol=3e-6)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("n", "k", "tp_degree", "heads"),
    [
        (4, 4, 1, (0, 1, 2, 3)),
        (4, 4, 3, (0, 1, 2, 3, -1, -1)),
        (4, 2, 3, (0, 1, -1, -1, 2, 3)),
        (6, 2, 4, (0, 1, 2, -1, 3, 4, 5, -1)),
        (6, 3, 4, (0, 1, -1, -1, 2, 3, 4, 5)),
    ],
)
def test_computed_slopes_are_padded_and_permuted_with_the_heads(n: int, k: int, tp_degree: int, heads: tuple) -> None:
    raw = made("alibi", Alibi, Sloped, (*llama.WEIGHTS, SLOPES), num_attention_heads=n, num_key_value_heads=k)
    bloom = build_alibi_tensor(torch.ones(1, 2), n, torch.float32)[:, 0, 1].numpy()
    decoder = Decoder.from_config(raw, tp_degree)
    assert decoder.padding.query == heads
    actual = decoder.source(Tensors(checkpoint(decoder)), np.float32).read("slopes")
    np.testing.assert_allclose(actual, [bloom[head] if head >= 0 else 0 for head in heads], rtol=1e-6)
    assert decoder.abstract_params("float32")["slopes"].shape == actual.shape
    in_hand = from_params({"slopes": alibi_slopes(decoder.config)}, decoder.rows, decoder.padding, np.dtype("f4"))
    np.testing.assert_array_equal(in_hand.read("slopes"), actual)
    assert Outline.of(raw).parameter_count == sum(np.prod(shape) for shape in decoder.shapes.values())


def test_a_function_that_gives_another_shape_is_named() -> None:
    def too_few(config: llama.Config) -> np.ndarray:
        return alibi_slopes(config)[1:]

    with pytest.raises(ConfigError, match=r"row W\(too_few, 'slopes', .* shape \[31\], and the layout says \[32\]"):
        made("alibi", Alibi, Sloped, (*llama.WEIGHTS, replace(SLOPES, source=too_few)))


def test_computed_parameters_are_float32_in_any_model() -> None:
    raw = made("alibi", Alibi, Sloped, (*llama.WEIGHTS, SLOPES), num_attention_heads=12, num_key_value_heads=12)
    decoder = Decoder.from_config(raw)
    params = decoder.abstract_params(jnp.bfloat16)
    assert {path for path, array in params.items() if array.dtype == jnp.float32} == {"slopes"}
    source = from_params({"slopes": alibi_slopes(decoder.config)}, decoder.rows, decoder.padding, np.dtype("f2"))
    assert np.array_equal(source.read("slopes"), alibi_slopes(decoder.config))


def test_a_tensor_by_the_name_of_a_computed_parameter_is_refused() -> None:
    raw = made("alibi", Alibi, Sloped, (*llama.WEIGHTS, SLOPES))
    decoder = Decoder.from_config(raw)
    tensors = checkpoint(decoder) | {"slopes": np.zeros(6, np.float32)}
    with pytest.raises(CheckpointError, match="the checkpoint holds tensor slopes, which no parameter takes"):
        decoder.source(Tensors(tensors), np.float32)


# the rows that families share


def test_llama_s_file_is_short() -> None:
    with open(llama.__file__) as file:
        assert len(file.readlines()) <= 100


def test_a_row_reads_as_it_was_written() -> None:
    assert (
        "W('model.layers.{i}.self_attn.qkv_proj.weight', 'layers.{i}.self_attn.qkv.k_proj.kernel', "
        "'(n h + [k h] + k h) d -> d k h', P(None, 'tp', None))"
    ) in map(str, FUSED)
    assert str(SLOPES) == "W(alibi_slopes, 'slopes', 'n -> n', P('tp',))"


# what a plan takes from the decoder


def test_layers_that_are_not_alike_may_not_be_called_so() -> None:
    class Model(llama.Model):
        def __init__(self, cfg: llama.Config, rngs: nnx.Rngs):
            super().__init__(cfg, rngs)
            self.layers[1].extra = nnx.Param(jnp.zeros(cfg.hidden_size))

    rows = (*llama.WEIGHTS, W("model.layers.{i}.extra", "layers.{i}.extra", "d -> d"))
    with pytest.raises(ConfigError, match=r"LAYERS_ALIKE, and 'layers.{i}.extra' is not alike in all layers"):
        made("alibi", Alibi, Model, rows)
    made("alibi", type("Unlike", (Alibi,), {"LAYERS_ALIKE": False}), Model, rows)


def test_layers_that_no_field_counts_may_not_be_called_alike() -> None:
    @dataclass(frozen=True)
    class Deep(HFConfig):
        depth: int = 2

        MODEL_TYPE: ClassVar[str] = "deep"

    with pytest.raises(ConfigError, match="LAYERS_ALIKE, and has none of the fields num_hidden_layers, n_layer"):
        Deep().with_layers(1)
    assert llama.Config().with_layers(3) == llama.Config(num_hidden_layers=3)
