"""A model on one CPU: stacked weights and state, read in place, and a loop over the layers."""

import json
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from steps import step_input, table

from jx_neuron.checkpoint.weights import from_params
from jx_neuron.models import Decoder, llama
from jx_neuron.nn import sharding
from jx_neuron.nn.layers import Layers
from jx_neuron.nn.state import PLAIN, positions_of
from jx_neuron.runtime import xla_options as compiled
from jx_neuron.runtime.cpu import layout
from jx_neuron.runtime.cpu.formulation import by_instruction_sets
from jx_neuron.runtime.cpu.layout import CPU
from jx_neuron.runtime.xla import XlaRuntime
from jx_neuron.step.program_key import ProgramKey

GPT2 = dict(model_type="gpt2", n_embd=768, n_layer=3, n_head=12, vocab_size=1000, n_positions=64)
LLAMA = dict(
    model_type="llama",
    hidden_size=768,
    intermediate_size=1024,
    num_hidden_layers=3,
    num_attention_heads=12,
    num_key_value_heads=4,
    vocab_size=1000,
)


TAKES_BFLOAT16 = by_instruction_sets("bfloat16", compiled.instruction_sets()).dot == "ynnpack"


def runtime(decoder: Decoder, dtype: str = "float32") -> XlaRuntime:
    rng = np.random.default_rng(0)
    values = {
        path: (0.05 * rng.standard_normal(leaf.shape, np.float32))
        for path, leaf in sorted(decoder.abstract_params(dtype).items())
    }
    source = from_params(values, decoder.rows, decoder.padding, jnp.dtype(dtype))
    return XlaRuntime(decoder, source, sharding.mesh(1), dtype)


def computations(of: XlaRuntime, key: ProgramKey, slots: int, positions: int) -> dict[str, list[str]]:
    """The instructions of what a program runs, by computation: those within fusions and reductions left out."""
    text = of._program(key, slots, positions).as_text()
    found = dict(re.findall(r"^(?:ENTRY )?%(\S+) \(.*?\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))
    called = set(re.findall(r"(?:calls|to_apply)=%([\w.-]+)", text))
    return {name: body.splitlines() for name, body in found.items() if name not in called}


def made(lines: list[str]) -> list[tuple[int, str]]:
    """How many numbers each instruction writes, and the instruction."""
    found = []
    for line in lines:
        if (shape := re.match(r"\s+(?:ROOT )?%\S+ = \w+\[([\d,]*)\]", line)) and not re.search(
            r"\} (parameter|bitcast|opt-barrier|get-tuple-element)\(", line
        ):
            found.append((int(np.prod([int(n) for n in shape[1].split(",") if n])), line))
    return found


@pytest.mark.few(2)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_decode_is_a_loop_that_copies_and_widens_neither_weights_nor_cache(config, dtype, batch) -> None:
    positions = 64
    key = ProgramKey("decode", batch, 1, positions)
    parts = computations(runtime(Decoder.from_config(config), dtype), key, batch, positions)
    assert sum(" while(" in line for body in parts.values() for line in body) == 1
    written = [of for body in parts.values() for of in made(body)]
    least = min(256 * 768, batch * 4 * positions * 64)
    large = [line for size, line in written if size >= least]
    assert all("dynamic-update-slice" in line for line in large), large
    assert len(large) == 2 * batch  # a row of keys and of values each, in place


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_many_rows_are_written_in_place_by_as_many_instructions_as_a_few(dtype) -> None:
    positions = 64
    for batch in (layout.MOST_UNROLLED + 1, 40):
        key = ProgramKey("decode", batch, 1, positions)
        parts = computations(runtime(Decoder.from_config(LLAMA), dtype), key, batch, positions)
        of_table = 3 * batch * 4 * positions * 64
        written = [line for body in parts.values() for size, line in made(body) if size >= of_table]
        assert all("dynamic-update-slice" in line for line in written), written
        assert len(written) in (2, 6)  # keys and values, of each layer where there is no loop over these


def test_a_loop_is_as_long_for_any_number_of_layers() -> None:
    lengths = []
    for layers in (2, 5):
        decoder = Decoder.from_config(LLAMA | dict(num_hidden_layers=layers))
        parts = computations(runtime(decoder), ProgramKey("decode", 2, 1, 16), 2, 16)
        lengths.append(sum(map(len, parts.values())))
    assert lengths[0] == lengths[1]


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("dtype", "dot"),
    [
        ("float32", "eigen"),
        ("bfloat16", "eigen"),
        pytest.param("bfloat16", "ynnpack", marks=pytest.mark.skipif(not TAKES_BFLOAT16, reason="this CPU widens it")),
    ],
)
def test_a_prompt_s_program_takes_the_same_memory_and_copies_no_weights(dtype, dot, monkeypatch) -> None:
    monkeypatch.setenv("JX_NEURON_CPU_FORMULATION", json.dumps({dtype: {"wide": [], "passes": 8, "dot": dot}}))
    of = runtime(Decoder.from_config(LLAMA), dtype)
    decode, prefill = ProgramKey("decode", 1, 1, 16), ProgramKey("prefill", 1, 64, 64)
    few, many = of._placed.params(decode), of._placed.params(prefill)
    stack = few["layers.0.mlp.down_proj.kernel"].w_nk
    parts = [many[f"layers.{i}.mlp.down_proj.kernel"].w_nk for i in range(3)]
    size = parts[0].nbytes
    assert stack.nbytes == 3 * size
    assert [part.unsafe_buffer_pointer() for part in parts] == [
        stack.unsafe_buffer_pointer() + i * size for i in range(3)
    ]
    if (dtype, dot) != ("bfloat16", "eigen"):
        (lines,) = computations(of, prefill, 1, 64).values()
        assert not [line for size, line in made(lines) if size >= 1024 * 768]


def test_a_loop_and_layers_one_by_one_give_the_same(monkeypatch) -> None:
    prompt = np.random.default_rng(0).integers(0, 1000, (2, 16))
    logits = []
    for stacked in (True, False):
        if not stacked:
            monkeypatch.setattr(Layers, "stack", lambda self: None)
        model = runtime(Decoder.from_config(LLAMA))
        model.run(step_input(ProgramKey("prefill", 2, 16, 16), [prompt[0], prompt[1, :5]]))
        decode = ProgramKey("decode", 2, 1, 32)
        logits.append(np.asarray(model.run(step_input(decode, [[7], [11]], [16, 5])).logits))
        loops = [line for body in computations(model, decode, 2, 32).values() for line in body if " while(" in line]
        assert len(loops) == int(stacked)
    np.testing.assert_allclose(*logits, atol=1e-6)


@pytest.mark.few(1)
@pytest.mark.parametrize("wide", [(8,), (1, 4), ()], ids=str)
def test_vectors_are_as_wide_as_the_formulation_of_the_rows_says(wide, monkeypatch) -> None:
    pinned = {"float32": {"wide": wide, "passes": 8, "dot": "eigen"}}
    monkeypatch.setenv("JX_NEURON_CPU_FORMULATION", json.dumps(pinned))
    asked = []
    options = compiled.options
    monkeypatch.setattr(compiled, "options", lambda *of: asked.append(options(*of)) or asked[-1])
    of, rng = runtime(Decoder.from_config(GPT2)), np.random.default_rng(0)
    tokens_b1 = rng.integers(0, 1000, (8, 1)).astype(np.int32)
    logits = []
    for rows in (8, 3, 1):
        of.reset(0, 0)
        logits.append(np.asarray(of.run(step_input(ProgramKey("decode", rows, 1, 16), tokens_b1[:rows])).logits))
    widths = [options.get("xla_cpu_prefer_vector_width") for options in asked]
    assert widths == [512 if rows in wide else None for rows in (8, 4, 1)]
    for some in logits[1:]:
        np.testing.assert_allclose(some, logits[0][: len(some)], atol=2e-5)


class ByItself(llama.Model):
    """Applies its blocks in a loop of its own."""

    def __call__(self, tokens_bt, state, at):
        x_btd, by, written = self.embed_tokens(tokens_bt), self.rope(at), []
        for block, part in zip(self.layers, state, strict=True):
            x_btd, part = block(x_btd, part, at, by)  # noqa: PLW2901
            written.append(part)
        return self.norm(x_btd), tuple(written)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_loops_over_its_blocks_itself_is_warned_of_the_cost(dtype) -> None:
    config = llama.Config.from_hf(LLAMA)
    own = Decoder.from_module(nnx.eval_shape(lambda: ByItself(config, nnx.Rngs(0))), config, llama.WEIGHTS)
    found = []
    for decoder in (own, Decoder.from_config(LLAMA)):
        of = runtime(decoder, dtype)
        answers = []
        for key, tokens, start in (
            (ProgramKey("prefill", 1, 9, 16), range(9), 0),
            (ProgramKey("decode", 1, 1, 16), [3], 9),
        ):
            inputs = step_input(key, [tokens], [start])
            if decoder is own:
                with pytest.warns(UserWarning, match="a decoder that applies its blocks in a loop of its own"):
                    answers.append(of.run(inputs).logits)
            else:
                with warnings.catch_warnings(action="error"):
                    answers.append(of.run(inputs).logits)
        found.append(np.asarray(answers, np.float32))
    np.testing.assert_allclose(*found, atol=1e-5 if dtype == "float32" else 0.03 * found[0].std())


class Times(nnx.Module):
    """x · number + 10 · (layer's place in a period); `wide`, in float32 whatever x is."""

    def __init__(self, number, place: int = 0, *, wide: bool = False):
        self.number, self.place, self.wide = nnx.Param(jnp.asarray(number, jnp.float32)), place, wide

    def __call__(self, x, part):
        x = x.astype(jnp.float32) if self.wide else x
        return x * self.number[...].astype(x.dtype) + 10 * self.place, part


def stacked(blocks: list[Times]) -> Layers:
    """The blocks as a CPU's program has them."""
    layers = Layers(map(nnx.clone, blocks))
    period = layers.stack()
    if period:
        for i in range(period):
            layers._get_elem(i).number = nnx.Param(jnp.stack([block.number[...] for block in blocks[i::period]]))
    return layers


@pytest.mark.parametrize(("depth", "period"), [(6, 1), (6, 2), (7, 3), (8, 3), (5, 3), (1, 1), (3, 3)])
def test_blocks_that_alternate_are_looped_over_by_their_period(depth, period) -> None:
    blocks = [Times(2 + i % 5, i % period) for i in range(depth)]
    empty, x = table(CPU, (1, 1, 4, 2), layers=depth), jnp.asarray([1.0, -2.0])
    layers = stacked(blocks)
    assert Layers(blocks).period == period
    expected = x
    for block in blocks:
        expected, _ = block(expected, None)
    loops = str(jax.make_jaxpr(lambda x: layers(x, empty)[0])(x)).count("scan")
    assert loops == int(depth >= 2 * period)
    np.testing.assert_array_equal(layers(x, empty)[0], expected)
    assert len(layers) == depth
    assert [float(block.number[...]) for block in layers] == [float(block.number[...]) for block in blocks]
    assert [block.place for block in layers[-2:]] == [block.place for block in blocks[-2:]]


def test_blocks_that_change_a_dtype_are_applied_one_by_one() -> None:
    layers = stacked([Times(number, wide=True) for number in (2, 3, 5)])
    empty = table(CPU, (1, 1, 4, 2), layers=3)
    for dtype, loops in (("float32", 1), ("bfloat16", 0)):
        x = jnp.ones(3, dtype)
        assert str(jax.make_jaxpr(lambda x: layers(x, empty)[0])(x)).count("scan") == loops
        np.testing.assert_array_equal(jax.jit(lambda x: layers(x, empty)[0])(x), np.full(3, 30.0))


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("unrolled", [3, 2], ids=["rows one by one", "rows in a loop"])
def test_a_cpu_s_table_holds_what_a_plain_one_does(dtype, unrolled, monkeypatch) -> None:
    rng = np.random.default_rng(0)
    monkeypatch.setattr(layout, "MOST_UNROLLED", unrolled)
    states = [table(of, (3, 2, 8, 4), dtype=dtype) for of in (CPU, PLAIN)]
    assert states[0].arrays[0][0].shape == (2, 3, 2, 8, 4)
    assert states[0].arrays[0][1].shape == (2, 3, 2, 4, 8)

    def same(at) -> None:
        for layer in range(2):
            for name in "kv":
                mine, plain = (state.of_layer(layer).read(name, at) for state in states)
                assert (
                    (mine.dtype, mine.shape)
                    == (plain.dtype, plain.shape)
                    == (jnp.dtype(dtype), (3, 2, at.positions, 4))
                )
                np.testing.assert_array_equal(mine, plain)

    def whole(positions):
        return positions_of(jnp.zeros(3, jnp.int32), jnp.ones(3, jnp.int32), None, 1, positions)

    for start, slots in (([0, 3, 1], None), ([3, 2, 0], [2, 0, 1])):
        slot_b = None if slots is None else jnp.asarray(slots, jnp.int32)
        at = positions_of(jnp.asarray(start, jnp.int32), jnp.full(3, 5, jnp.int32), slot_b, 5, 8)
        for layer in range(2):
            k, v = (jnp.asarray(rng.normal(size=(3, 5, 2, 4)), "float32") for _ in "kv")
            states = [state.of_layer(layer).write(at, k=k, v=v).state for state in states]
        same(at)
        same(whole(6))
        same(whole(8))
    assert np.asarray(states[1].of_layer(1).read("v", whole(5))[0]).all()  # slot 0 was written from 0 and from 2 on
    states = [state.resize(3, 11) for state in states]
    assert [(state.slots, state.positions) for state in states] == [(3, 11)] * 2
    same(whole(11))
    states = [state.copy(jnp.asarray([2, 0]), jnp.asarray([0, 2])) for state in states]
    same(whole(11))
    states = [state.clear(jnp.asarray([1])) for state in states]
    same(whole(11))
