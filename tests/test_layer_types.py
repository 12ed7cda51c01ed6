"""Layers of a decoder that differ in kind: in what they keep, in sizes, and in whose state they read."""

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from checkpoints import Tensors
from flax import nnx
from jax.sharding import PartitionSpec as P
from steps import filled, step_input
from test_state import DECODE, LAYOUTS, PLACES, POSITIONS, SEQUENCES, SLOTS, Layer, at, check, every, prefilled

from jx_neuron import NeuronAutoModelForCausalLM, models
from jx_neuron.checkpoint.hf_config import FULL, HFConfig
from jx_neuron.checkpoint.weights import W
from jx_neuron.errors import ArtifactError, ConfigError, InputError
from jx_neuron.lowering.model import lower_model
from jx_neuron.models import Decoder
from jx_neuron.models.rows import embedding
from jx_neuron.nn import sharding
from jx_neuron.nn.attention import attend
from jx_neuron.nn.layers import Embedding, Layers, Linear, Linears
from jx_neuron.nn.layout import KV, Kept, S
from jx_neuron.runtime.cpu.layout import CPU
from jx_neuron.runtime.saved import SavedModel
from jx_neuron.runtime.xla import XlaRuntime

WIDE, RECURRENT, NOTHING = "wide_attention", "recurrent", "mlp"


# the state table


A = Kept((S("k", "k s h"), S("v", "k s h")), ((2, 0, 4), (2, 0, 4)))
B = Kept((S("k", "m s j"),), ((1, 0, 6),), window=5)
C = Kept((S("h", "d"),), ((3,),))
TABLE = (A, B, C, Kept((), ()), A, replace(A, own=False), replace(B, own=False))


@pytest.mark.few(1)
@LAYOUTS
def test_layers_keep_rows_of_their_own(layout) -> None:
    state = filled(layout, TABLE, 3, 8, fill=7.0)
    numbers = 3 * (2 * 2 * 2 * 8 * 4 + 5 * 6 + 3)
    assert sum(array.size for array in jax.tree.leaves(state.arrays)) == numbers
    specs = jax.tree.leaves(state.partition().arrays, is_leaf=lambda leaf: isinstance(leaf, P))
    assert len(specs) == len(jax.tree.leaves(state.arrays))
    rng = np.random.default_rng(0)
    k, v, wide = (jnp.asarray(rng.normal(size=shape), "f4") for shape in ((2, 4, 2, 4), (2, 4, 2, 4), (2, 4, 1, 6)))
    now = at([0, 2], [4, 3], [2, 0], 4, 8)
    state = state.of_layer(4).write(now, k=k, v=v).state
    state = state.of_layer(1).write(now, k=wide).state
    state = state.of_layer(2).write(now, h=jnp.ones((2, 3))).state
    for changed, slots in (
        (state, [0, 1, 2]),
        (state.copy(jnp.asarray([2]), jnp.asarray([1])).clear(jnp.asarray([2])), [0, 2, None]),
        (state.resize(4, 11), [0, 1, 2, None]),
    ):
        expected, of_wide = np.full((3, 2, 8, 4), 7.0), np.full((3, 1, 5, 6), 7.0)
        for array, new in ((expected, k), (of_wide, wide)):
            array[2, :, :4], array[0, :, 2:5] = new[0].swapaxes(0, 1), new[1, :3].swapaxes(0, 1)
        hidden = np.full((3, 3), 7.0)
        hidden[[0, 2]] = 1
        whole = every(len(slots), 8)
        for layer, name, array in ((4, "k", expected), (5, "k", expected), (6, "k", of_wide), (2, "h", hidden)):
            found = np.asarray(changed.of_layer(layer).read(name, whole))
            for place, source in enumerate(slots):
                np.testing.assert_array_equal(found[place], 0 if source is None else array[source])
        found = np.asarray(changed.of_layer(0).read("k", whole))
        assert {*found.flat} <= {0.0, 7.0}  # layer 4 has arrays of its own


@LAYOUTS
def test_a_layer_without_a_state_of_its_own_writes_none(layout) -> None:
    state = filled(layout, TABLE, 3, 8)
    with pytest.raises(ConfigError, match=r"Config\.own_state says that this layer has no state"):
        state.of_layer(6).write(at([0], [1], [0], 1, 8), k=jnp.ones((1, 1, 1, 6)))
    with pytest.raises(ConfigError, match=r"Model applies its blocks in a loop of its own.* jx_neuron\.nn\.Layers"):
        list(state)
    assert len(list(filled(layout, TABLE[:5], 3, 8))) == 5


@pytest.mark.parametrize(
    ("layers", "period", "periods", "repeats"),
    [
        ([A, B] * 3, 2, 3, True),
        ([A, B] * 3, 1, 6, False),
        ([A] * 4, 2, 2, True),
        ([A, A, B, A, A, B], 3, 2, True),
        ([A, A, B, A, B, A], 3, 2, False),
        ([A, B, A, replace(B, own=False)], 2, 2, False),
        ([A, B, *[replace(A, own=False), replace(B, own=False)] * 2], 2, 2, False),
        ([A, replace(A, own=False)] * 3, 2, 3, True),
    ],
)
def test_periods_of_layers(layers, period, periods, repeats) -> None:
    state = filled(CPU, layers, 1, 8)
    assert state.repeats(period, periods) == repeats
    if repeats:
        for layer in range(period * periods):
            part = state.of_period(layer // period, layer % period, period)
            assert (part.index, part.number) == (state.place(layer)[1], layer)


# a decoder


@dataclass(frozen=True)
class Config(HFConfig):
    vocab_size: int = tiny.VOCAB
    hidden_size: int = 8
    num_hidden_layers: int = 8

    MODEL_TYPE = "hybrid"

    @property
    def types(self) -> list[str]:
        return [RECURRENT, FULL, NOTHING, WIDE] * (self.num_hidden_layers // 4)

    @property
    def windows(self) -> list[int | None]:
        return [6 if kind == FULL else None for kind in self.types]

    @property
    def own_state(self) -> list[bool]:
        return [layer < 4 for layer in range(4)] + [kind == RECURRENT for kind in self.types[4:]]

    @property
    def sizes(self) -> dict[str, int]:
        return dict(d=self.hidden_size, n=6, k=3, h=2, f=5, v=self.vocab_size)

    def sizes_of(self, layer: int) -> dict[str, int]:
        return self.sizes | (dict(k=2, h=4, f=9) if self.types[layer] == WIDE else {})


class Block(nnx.Module):
    """x + attention(x), x + mlp(x), or a recurrent layer, by the layer's type; and + the layer's number / 8."""

    def __init__(self, cfg: Config, layer: int, rngs: nnx.Rngs):
        (d, n, k, h, f), kind = (cfg.sizes_of(layer)[c] for c in "dnkhf"), cfg.types[layer]
        self.window = cfg.windows[layer]
        self.recurrent = Layer(d) if kind == RECURRENT else None
        keys = dict(k_proj=(k, h), v_proj=(k, h)) if cfg.own_state[layer] else {}
        attends = kind in (FULL, WIDE)
        self.qkv = Linears((d,), dict(q_proj=(n, h)) | keys, bias=False, rngs=rngs) if attends else None
        self.o_proj = Linear((n, h), (d,), bias=False, rngs=rngs) if attends else None
        self.up = None if kind == RECURRENT else Linear((d,), (f,), bias=False, rngs=rngs)
        self.down = None if kind == RECURRENT else Linear((f,), (d,), bias=False, rngs=rngs)

    def __call__(self, x_btd, state, at):
        number = state.number
        if self.recurrent:
            x_btd, state = self.recurrent(x_btd, state, at)
        if self.qkv and self.o_proj:
            q_btnh, *kv = self.qkv(x_btd)
            k_btkh, v_btkh = kv or (None, None)
            a_btnh, state = attend(q_btnh, k_btkh, v_btkh, state, at, window=self.window)
            x_btd = x_btd + self.o_proj(a_btnh)
        if self.up and self.down:
            x_btd = x_btd + self.down(jnp.tanh(self.up(x_btd)))
        return x_btd + jnp.asarray(number, x_btd.dtype) / 8, state


class Model(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        self.embed = Embedding(cfg.vocab_size, cfg.hidden_size, rngs=rngs)
        self.layers = Layers(Block(cfg, layer, rngs) for layer in range(cfg.layers))

    def __call__(self, tokens_bt, state, at):
        return self.layers(self.embed(tokens_bt), state, at)

    def logits(self, x_btd):
        return self.embed.attend(x_btd)


class Hybrid:
    Config, Model, IGNORE = Config, Model, ()
    STATE = (S("h", "d", of=RECURRENT), *(replace(row, of=kind) for kind in (FULL, WIDE) for row in KV))
    WEIGHTS = (
        embedding("embed", "embed"),
        W("{i}.scale", "layers.{i}.recurrent.scale", "d -> d"),
        W("{i}.q", "layers.{i}.qkv.q_proj.kernel", "(n h) d -> d n h", P(None, "tp")),
        W("{i}.k", "layers.{i}.qkv.k_proj.kernel", "(k h) d -> d k h", P(None, "tp")),
        W("{i}.v", "layers.{i}.qkv.v_proj.kernel", "(k h) d -> d k h", P(None, "tp")),
        W("{i}.o", "layers.{i}.o_proj.kernel", "d (n h) -> n h d", P("tp")),
        W("{i}.up", "layers.{i}.up.kernel", "f d -> d f", P(None, "tp")),
        W("{i}.down", "layers.{i}.down.kernel", "d f -> f d", P("tp")),
    )


@pytest.fixture
def hybrid(kept_registry: None) -> None:
    models.register("hybrid", Hybrid)


def checkpoint(decoder: Decoder) -> Tensors:
    rng = np.random.default_rng(0)
    shapes = {row.name: row.source_shape(row.sizes(decoder.config)) for row in decoder.rows}
    return Tensors({name: rng.normal(size=shape) / np.sqrt(shape[-1]) for name, shape in shapes.items()})


def expected(config: Config, tensors: Tensors, tokens: list[int]) -> np.ndarray:
    """Logits of the last token, in float64."""
    x, seen = tensors["embed.weight"][tokens], {}
    for i, (kind, window) in enumerate(zip(config.types, config.windows, strict=True)):
        n, k, h = (config.sizes_of(i)[c] for c in "nkh")
        if kind == RECURRENT:
            hidden, rows = np.zeros(x.shape[1]), []
            for row in x:
                hidden = hidden / 2 + tensors[f"{i}.scale"] * row
                rows.append(hidden)
            x = np.stack(rows)
        if kind in (FULL, WIDE):
            q = (x @ tensors[f"{i}.q"].T).reshape(-1, n, h)
            if f"{i}.k" in tensors:
                seen[kind] = [(x @ tensors[f"{i}.{name}"].T).reshape(-1, k, h) for name in "kv"]
            keys, values = (np.repeat(y, n // k, 1) for y in seen[kind])
            w = np.einsum("tnh,snh->nts", q, keys) / np.sqrt(h)
            distance = np.arange(len(x))[:, None] - np.arange(len(x))
            w = np.where((distance >= 0) & (distance < (window or len(x))), w, -np.inf)
            p = np.exp(w - w.max(-1, keepdims=True))
            a = np.einsum("nts,snh->tnh", p / p.sum(-1, keepdims=True), values)
            x = x + a.reshape(len(x), -1) @ tensors[f"{i}.o"].T
        if kind != RECURRENT:
            x = x + np.tanh(x @ tensors[f"{i}.up"].T) @ tensors[f"{i}.down"].T
        x = x + i / 8
    return x[-1] @ tensors["embed.weight"].T


@pytest.mark.few(1)
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_a_decoder_of_several_kinds_of_layers(tp: int, hybrid: None) -> None:
    decoder = Decoder.from_config({"model_type": "hybrid"}, tp)
    tensors = checkpoint(decoder)
    of = XlaRuntime(decoder, decoder.source(tensors, "float32"), sharding.mesh(tp), "float32")
    of.reset(SLOTS, POSITIONS)
    last = prefilled(of, SEQUENCES)
    output = of.run(step_input(DECODE, [[5], [], [6], [7]], [3, 0, 11, 7]))
    for n, (place, token) in enumerate(zip(PLACES, [6, 5, 7], strict=True)):
        check(last[n], expected(decoder.config, tensors, SEQUENCES[n]))
        check(np.asarray(output.logits)[place], expected(decoder.config, tensors, [*SEQUENCES[n], token]))


def test_what_the_decoder_of_several_kinds_says_of_itself(hybrid: None) -> None:
    decoder = Decoder.from_config({"model_type": "hybrid"}, 2)
    heads = ("6 query heads to 8", "3 key/value heads to 4")  # those of wide layers divide
    widths = ("an MLP width of 5 to 6", "a vocabulary of 101 to 102", "an MLP width of 9 to 10")
    assert decoder.padding.changes == (*heads, *widths)
    with pytest.raises(InputError, match="tp_degree=2 does not divide the 6 query and 3 key/value heads"):
        decoder.padding.require_exact()
    assert decoder.window == 0
    per_core = 2 * 8 + 2 * 6 * 2 * 2 + 2 * POSITIONS * 1 * 4  # recurrent layers, then keys and values of one of each
    assert decoder.state_bytes(3, POSITIONS, 4) == 4 * 3 * per_core
    (program,) = lower_model(decoder, [DECODE], SLOTS, POSITIONS, np.dtype("f4"))
    names = [tensor.name for tensor in program.inputs if tensor.kind == "state"]
    assert names == [
        "state.0.h", "state.1.k", "state.1.v", "state.3.k", "state.3.v", "state.4.h", "state.token"
    ]  # fmt: skip


def test_a_saved_model_states_its_table(hybrid: None, tmp_path: Path) -> None:
    options = dict(tp_degree=2, n_positions=16, context_length_estimate=8)
    NeuronAutoModelForCausalLM.from_config({"model_type": "hybrid"}, **options).save(tmp_path / "saved")
    saved = SavedModel.open(tmp_path / "saved")
    assert saved.settings.state == {
        "0.h": (8,), "1.k": (2, 6, 2), "1.v": (2, 6, 2), "3.k": (1, 16, 4), "3.v": (1, 16, 4), "4.h": (8,)
    }  # fmt: skip
    assert saved.deployment.settings == saved.settings
    other = replace(saved.settings, state=saved.settings.state | {"1.k": (2, 7, 2)})
    manifest = saved.artifact.manifest.model_copy(update={"settings": other})
    with pytest.raises(
        ArtifactError, match=r"its state has state\.1\.k float32\[1, 2, 6, 2\], not 1 slots of 16 positions"
    ):
        _ = SavedModel(replace(saved.artifact, manifest=manifest)).deployment


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"STATE": (S("h", "d x"),)}, r"of STATE has the letter 'x'; legal are s, for positions, and those of .* d, f"),
        ({"STATE": (*KV, S("k", "d", of=FULL))}, "STATE has several rows 'k' for layers of type 'full_attention'"),
        ({"own_state": [False] * 8}, r"layer 0 has no state of its own, by Config\.own_state, and no layer before it"),
        ({"types": [FULL]}, r"Config\.types has 1 entries for 8 layers"),
        (
            {"sizes_of": lambda self, layer: self.sizes | {"z": 1}},
            r"Config\.sizes_of\(0\) has other letters than Config\.sizes",
        ),
    ],
)
def test_kinds_that_do_not_fit(changed: dict, message: str) -> None:
    parts = {name: getattr(Hybrid, name) for name in ("Config", "Model", "WEIGHTS", "STATE", "IGNORE")}
    own = {name: value for name, value in changed.items() if name != "STATE"}
    parts |= {"STATE": changed.get("STATE", Hybrid.STATE), "Config": type("Config", (Config,), own)}
    with pytest.raises(ConfigError, match=message):
        models.register("hybrid", type("Hybrid", (), parts))


# a family of the package


GEMMA4 = {"model_type": "gemma4_text", "num_hidden_layers": 7, "layer_types": ["sliding_attention"] * 6 + [FULL]}


def test_sizes_by_layer_of_a_config() -> None:
    hub = {"global_head_dim": 64, "num_global_key_value_heads": 2, "attention_k_eq_v": True}
    saved = {"attention_k_eq_v": True, "per_layer_config": {"06": {"head_dim": 64, "num_key_value_heads": 2}}}
    for fields in (hub, saved):
        config = models.family("gemma4_text").Config.from_hf(GEMMA4 | fields)
        assert [config.sizes_of(layer)["h"] for layer in (0, 5, 6)] == [256, 256, 64]
        assert [config.sizes_of(layer)["k"] for layer in (0, 5, 6)] == [4, 4, 2]
        assert (config.ropes[FULL].h, config.ropes["sliding_attention"].h) == (64, 256)
    config = models.family("gemma4_text").Config.from_hf(GEMMA4 | {"per_layer_config": {}})
    assert config.sizes_of(6) == config.sizes


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"per_layer_config": {"0": {"head_dim": 8}}},
            "legal are numbers of layers, each with a head_dim and a num_key",
        ),
        ({"per_layer_config": {"7": {"head_dim": 8}}}, "legal are numbers of layers"),
        ({"per_layer_config": {"6": {"hidden_size": 8}}}, "legal are numbers of layers"),
        ({"per_layer_config": {"6": {"head_dim": "8"}}}, "legal are numbers of layers"),
        ({"per_layer_config": {"6": 8}}, "legal are numbers of layers"),
        ({"per_layer_config": {"6": {"num_key_value_heads": 3}}}, "num_attention_heads=8 is not divisible by .*=3"),
        ({"num_kv_shared_layers": 1}, "num_kv_shared_layers=1 leaves no full_attention layer with keys and values"),
        ({"num_kv_shared_layers": 8}, "num_kv_shared_layers=8 leaves no full_attention layer"),
        ({"enable_moe_block": True}, "num_experts=None, top_k_experts=None and moe_intermediate_size=None should be"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention='all' is not supported"),
        ({"global_head_dim": 63}, "the head size 63 is odd"),
    ],
)
def test_refusals_of_configs_by_layer(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        models.family("gemma4_text").Config.from_hf(GEMMA4 | fields)
