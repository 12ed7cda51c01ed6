"""State tables: sequences of different ages in slots of their own, and what steps leave as it was."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from checkpoints import Tensors
from flax import nnx
from jax.sharding import PartitionSpec as P
from steps import step_input, table
from test_one_cpu import LLAMA, computations, made
from test_one_cpu import runtime as runtime_of

from jx_neuron import models
from jx_neuron.checkpoint.hf_config import HFConfig
from jx_neuron.checkpoint.weights import W
from jx_neuron.integrations.parity import ModelTensors
from jx_neuron.models import Decoder
from jx_neuron.nn import sharding
from jx_neuron.nn.layers import Embedding, Layers
from jx_neuron.nn.state import PLAIN, S, positions_of
from jx_neuron.runtime.cpu.layout import CPU
from jx_neuron.runtime.xla import XlaRuntime
from jx_neuron.step.program_key import ProgramKey

LAYOUTS = pytest.mark.parametrize("layout", [PLAIN, CPU], ids=["plain", "cpu"])
SLOTS, CHUNK, POSITIONS = 4, 4, 16
PREFILL, DECODE = ProgramKey("prefill", 3, CHUNK, POSITIONS), ProgramKey("decode", SLOTS, 1, POSITIONS)
PLACES = [2, 0, 3]
SEQUENCES = [np.random.default_rng(n).integers(0, tiny.VOCAB, length).tolist() for n, length in enumerate((11, 3, 7))]
# of each turn, where each sequence's chunk begins; None for a row without tokens
TURNS = [(0, None, None), (4, 0, None), (8, None, 0), (None, None, 4)]


def runtime(hf, tp: int) -> XlaRuntime:
    decoder = Decoder.from_config(hf.config.to_dict(), tp)
    found = XlaRuntime(decoder, decoder.source(ModelTensors(hf), "float32"), sharding.mesh(tp), "float32")
    found.reset(SLOTS, POSITIONS)
    return found


def slot(of: XlaRuntime, number: int) -> list[np.ndarray]:
    """All that a slot holds, its last token at the end."""
    state = of._state
    arrays = [np.take(np.asarray(leaf), number, axis=state.layout.slot_axis) for leaf in jax.tree.leaves(state.arrays)]
    return [*arrays, np.asarray(state.token_z[number])]


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def prefilled(of: XlaRuntime, sequences: list[list[int]]) -> dict[int, np.ndarray]:
    """Puts the sequences through in chunks, at different times; the logits of each one's last token."""
    last = {}
    for turn, starts in enumerate(TURNS):
        rows = [[] if start is None else tokens[start:] for start, tokens in zip(starts, sequences, strict=True)]
        before = [slot(of, number) for number in range(SLOTS)] if turn else []
        output = of.run(step_input(PREFILL, rows, [start or 0 for start in starts], PLACES))
        for n, row in enumerate(rows):
            if 0 < len(row) <= CHUNK:
                last[n] = np.asarray(output.logits)[n]
        idle = {1, *(place for place, row in zip(PLACES, rows, strict=True) if not row)}
        for number, held in enumerate(before):
            assert same(slot(of, number), held) == (number in idle)
    return last


def check(found: np.ndarray, expected: np.ndarray) -> None:
    """The same logits, those of padding aside."""
    np.testing.assert_allclose(found[: len(expected)], expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_sequences_of_different_ages_give_their_own_logits(family: str, tp: int) -> None:
    hf = tiny.model(family)
    of = runtime(hf, tp)
    assert of._placed.state(1, 1, verifies=False).layout is (CPU if tp == 1 else PLAIN)
    last, sequences, drawn = prefilled(of, SEQUENCES), [list(tokens) for tokens in SEQUENCES], {}
    for n, tokens in enumerate(sequences):
        expected = tiny.logits(hf, np.asarray([tokens]))[0, -1]
        check(last[n], expected)
        drawn[n] = int(expected.argmax())
    for turn in range(4):
        decoding = [n for n in range(3) if turn != 2 or n != 0]  # the first sequence sits one step out
        rows, starts = [[] for _ in range(SLOTS)], [0] * SLOTS
        for n in decoding:
            assert int(slot(of, PLACES[n])[-1]) == drawn[n]
            rows[PLACES[n]] = [-1 if turn % 2 else drawn[n]]  # the token that the slot drew last, or said
            starts[PLACES[n]] = len(sequences[n])
            sequences[n].append(drawn[n])
        before = [slot(of, number) for number in range(SLOTS)]
        output = of.run(step_input(DECODE, rows, starts))
        for n in decoding:
            expected = tiny.logits(hf, np.asarray([sequences[n]]))[0, -1]
            check(np.asarray(output.logits)[PLACES[n]], expected)
            drawn[n] = int(expected.argmax())
            assert int(np.asarray(output.token_b1)[PLACES[n], 0]) == drawn[n]
        for number in {*range(SLOTS)} - {PLACES[n] for n in decoding}:
            assert same(slot(of, number), before[number])


@pytest.mark.few(1)
@pytest.mark.parametrize("tp", [1, 2])
def test_slots_are_copied_and_cleared_and_the_table_grows(tp: int) -> None:
    hf = tiny.model("llama")
    of = runtime(hf, tp)
    prefilled(of, SEQUENCES)
    before = [slot(of, number) for number in range(SLOTS)]
    of.copy(np.asarray([2, 0], np.int32), np.asarray([0, 2], np.int32))  # at once: they change places
    assert same(slot(of, 0), before[2])
    assert same(slot(of, 2), before[0])
    assert same(slot(of, 3), before[3])
    of.copy(np.asarray([3], np.int32), np.asarray([5], np.int32))  # a slot that is not there yet
    assert of._state.slots == 6
    assert same(slot(of, 5), before[3])
    of.clear(np.asarray([3, 0], np.int32))
    assert not any(array.any() for number in (3, 0) for array in slot(of, number)[:-1])
    assert same(slot(of, 2), before[0])
    assert same(slot(of, 5), before[3])
    key = ProgramKey("decode", 6, 1, 2 * POSITIONS)
    output = of.run(step_input(key, [[], [], [], [], [], [9]], [0] * 5 + [len(SEQUENCES[2])]))
    assert (of._state.slots, of._state.positions) == (6, 2 * POSITIONS)
    check(np.asarray(output.logits)[5], tiny.logits(hf, np.asarray([[*SEQUENCES[2], 9]]))[0, -1])


def at(start, length, slots, tokens: int, positions: int):
    start_b, length_b, slot_b = (jnp.asarray(x, jnp.int32) for x in (start, length, slots))
    return positions_of(start_b, length_b, slot_b, tokens, positions)


def every(slots: int, positions: int):
    """To read all of a table, as sequences that go on do."""
    return at([1] * slots, [1] * slots, range(slots), 1, positions)


@pytest.mark.few(1)
@LAYOUTS
def test_a_window_that_would_end_beyond_the_slot_writes_the_right_positions(layout) -> None:
    state = table(layout, (3, 2, 10, 4), fill=7.0)
    k, v = (jnp.asarray(np.random.default_rng(n).normal(size=(2, 5, 2, 4)), jnp.float32) for n in range(2))
    # of 10 positions: two tokens from 8 on, and four from 6 on, where windows of 5 end at 13 and at 11
    written = state.of_layer(1).write(at([8, 6], [2, 4], [2, 0], 5, 10), k=k, v=v).state
    for name, new in (("k", k), ("v", v)):
        expected = np.full((3, 2, 10, 4), 7.0, np.float32)
        expected[2, :, 8:10] = np.asarray(new)[0, :2].swapaxes(0, 1)
        expected[0, :, 6:10] = np.asarray(new)[1, :4].swapaxes(0, 1)
        np.testing.assert_array_equal(written.of_layer(1).read(name, every(3, 10)), expected)
        np.testing.assert_array_equal(written.of_layer(0).read(name, every(3, 10)), np.full((3, 2, 10, 4), 7.0))


@LAYOUTS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_of_state_may_have_a_dtype_of_its_own(layout, dtype: str) -> None:
    state = table(layout, (2, 3), rows=(S("h", "d"), S("sum", "d", dtype="float32")), dtype=dtype, windows=[None])
    fine = jnp.asarray([[1 + 2**-20] * 3] * 2)
    written = state.of_layer(0).write(every(2, 8), h=fine, sum=fine)
    assert (written.read("h", every(2, 8)).dtype, written.read("sum", every(2, 8)).dtype) == (dtype, "float32")
    np.testing.assert_array_equal(written.read("sum", every(2, 8)), fine)
    np.testing.assert_array_equal(written.read("h", every(2, 8)), fine.astype(dtype))


@LAYOUTS
def test_a_row_of_state_without_positions_has_one_entry_a_slot(layout) -> None:
    state = table(layout, (4, 3), rows=(S("h", "d"),), fill=7.0)
    rows_at = at([4, 3], [2, 0], [3, 1], 4, 8)
    np.testing.assert_array_equal(state.of_layer(1).read("h", rows_at), np.full((2, 3), 7.0))
    written = state.of_layer(1).write(rows_at, h=jnp.arange(6.0).reshape(2, 3)).state
    beginning = at([0, 3], [2, 2], [3, 1], 4, 8)  # where a sequence begins, what its slot held does not count
    np.testing.assert_array_equal(state.of_layer(1).read("h", beginning), [[0.0] * 3, [7.0] * 3])
    expected = np.full((4, 3), 7.0)
    expected[3] = [0, 1, 2]  # slot 1's row has no tokens
    np.testing.assert_array_equal(written.of_layer(1).read("h", every(4, 8)), expected)
    np.testing.assert_array_equal(written.of_layer(0).read("h", every(4, 8)), np.full((4, 3), 7.0))
    changed = written.copy(jnp.asarray([3]), jnp.asarray([0])).clear(jnp.asarray([3])).resize(5, 8)
    expected = np.concatenate([expected[3:], expected[1:3], np.zeros((2, 3))])
    np.testing.assert_array_equal(changed.of_layer(1).read("h", every(5, 8)), expected)


@dataclass(frozen=True)
class Config(HFConfig):
    vocab_size: int = tiny.VOCAB
    hidden_size: int = 8
    num_hidden_layers: int = 2
    max_position_embeddings: int = 64

    MODEL_TYPE = "recurrent"

    @property
    def sizes(self) -> dict[str, int]:
        return dict(d=self.hidden_size, n=1, k=1, h=self.hidden_size, v=self.vocab_size)


class Layer(nnx.Module):
    """h_t = h_(t-1) / 2 + scale · x_t, for each token t."""

    def __init__(self, d: int):
        self.scale = nnx.Param(jnp.ones((d,)))

    def __call__(self, x_btd, state, at):
        h_bd, outputs = state.read("h", at), []
        for t in range(x_btd.shape[1]):
            h_bd = jnp.where(at.real_bt[:, t, None], h_bd / 2 + self.scale[...] * x_btd[:, t], h_bd)
            outputs.append(h_bd)
        return jnp.stack(outputs, axis=1), state.write(at, h=h_bd)


class Model(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.embed = Embedding(config.vocab_size, config.hidden_size, rngs=rngs)
        self.layers = Layers(Layer(config.hidden_size) for _ in range(config.num_hidden_layers))

    def __call__(self, tokens_bt, state, at):
        return self.layers(self.embed(tokens_bt), state, at)

    def logits(self, x_btd):
        return self.embed.attend(x_btd)


class Recurrent:
    Config, Model, IGNORE = Config, Model, ()
    STATE = (S("h", "d"),)
    WEIGHTS = (
        W("embed", "embed.embedding", "v d -> v d", P("tp", None)),
        W("scale.{i}", "layers.{i}.scale", "d -> d"),
    )


@pytest.mark.few(1)
@pytest.mark.parametrize("tp", [1, 2])
def test_a_recurrent_decoder_keeps_one_entry_a_slot(tp: int, kept_registry: None) -> None:
    models.register("recurrent", Recurrent)
    decoder, rng = Decoder.from_config({"model_type": "recurrent"}, tp), np.random.default_rng(0)
    tensors = Tensors({"embed": rng.normal(size=(tiny.VOCAB, 8)), "scale.0": rng.normal(size=8), "scale.1": np.ones(8)})
    of = XlaRuntime(decoder, decoder.source(tensors, "float32"), sharding.mesh(tp), "float32")
    of.reset(SLOTS, POSITIONS)

    def expected(tokens: list[int]) -> np.ndarray:
        x_td = tensors["embed"][tokens]
        for layer in range(2):
            h_d, outputs = np.zeros(8), []
            for x_d in x_td:
                h_d = h_d / 2 + tensors[f"scale.{layer}"] * x_d
                outputs.append(h_d)
            x_td = np.asarray(outputs)
        return x_td[-1] @ tensors["embed"].T

    last = prefilled(of, SEQUENCES)
    output = of.run(step_input(DECODE, [[5], [], [6], [7]], [3, 0, 11, 7]))
    for n, (place, token) in enumerate(zip(PLACES, [6, 5, 7], strict=True)):
        check(last[n], expected(SEQUENCES[n]))
        check(np.asarray(output.logits)[place], expected([*SEQUENCES[n], token]))


@pytest.mark.few(2)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("kind", "tokens"), [("decode", 1), ("prefill", 4)])
def test_a_step_of_some_slots_copies_no_state(kind: str, tokens: int, rows: int, dtype: str) -> None:
    slots, positions = 8, 64
    of = runtime_of(Decoder.from_config(LLAMA), dtype)
    layer = slots * 4 * positions * 64
    parts = computations(of, ProgramKey(kind, rows, tokens, positions), slots, positions)
    large = [line for body in parts.values() for size, line in made(body) if size >= layer]
    assert all("dynamic-update-slice" in line for line in large), large
    assert len(large) in (2 * rows, 3 * 2 * rows)  # entries of keys and of values, in a loop or a layer each
