"""Each rule of the verifier against a program that breaks it and one that just does not."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from hlo_programs import (
    attention,
    callback,
    channel,
    collective,
    conditional,
    convolution,
    custom_call,
    donated,
    draw,
    edited,
    f32,
    gather,
    groups,
    mask,
    neuron_top_k,
    one,
    pool,
    read_after_write,
    rng,
    s32,
    scatter,
    scatter_rows,
    sort,
    text,
    traced,
    transposed_top_k,
    turns,
    typed,
    with_id,
    wrong_add,
)
from jax import lax

from jx_neuron.errors import LoweringError
from jx_neuron.lowering.hlo import proto
from jx_neuron.lowering.hlo.fold import trip_count
from jx_neuron.lowering.hlo.graph import parse
from jx_neuron.lowering.verify.checking import RULES, Violation, verify


class Case(NamedTuple):
    """A rule; a program that breaks it, where, and how; one that just does not."""

    rule: str
    code: str | None
    breaks: Callable[[], bytes]
    instruction: str | tuple[str, ...] | None
    passes: Callable[[], bytes]
    target: str = "trn1"
    lnc: tuple[int | None, int | None] = (None, None)
    passes_on: str | None = None


CASES = [
    Case("dynamic-shape", "EMOD025", lambda: text("p = f32[<=4] parameter(0)\nROOT it = f32[<=4] negate(p)"),
         ("p", "it"), lambda: text("p = f32[4] parameter(0)\nROOT it = f32[4] negate(p)")),
    Case("invalid-shape", "EVRF064", lambda: wrong_add("4,5"), "it", lambda: wrong_add("4,4")),
    Case("complex", "EVRF004", lambda: traced(lambda a, b: jnp.abs(lax.complex(a, b)), f32(4), f32(4)), "complex",
         lambda: traced(lambda a, b: jnp.sqrt(a * a + b * b), f32(4), f32(4))),
    Case("fnuz", "EVRF005", lambda: typed("f8e5m2fnuz"), "it", lambda: typed("f8e5m2")),
    Case("fnuz", "EVRF005", lambda: typed("f8e4m3b11fnuz"), "it", lambda: typed("f8e4m3"), "trn3"),
    Case("f8e4m3fn", "EVRF051", lambda: typed("f8e4m3fn"), "it", lambda: typed("f8e4m3fn"), "trn2",
         passes_on="trn3"),
    Case("fp8", "ESPP047", lambda: typed("f8e3m4"), "it", lambda: typed("f8e4m3"), "trn2"),
    Case("unsupported-type", "ESPP004", lambda: typed("f64"), "it", lambda: typed("bf16")),
    Case("unsupported-type", "ESPP004", lambda: typed("f4e2m1fn"), "it", lambda: typed("s8")),
    Case("u64-constant", "ESFH002", lambda: text("ROOT it = u64[2] constant({1, 4294967296})"), "it",
         lambda: text("ROOT it = u64[2] constant({1, 4294967295})")),
    Case("infinite-mask", None, lambda: mask(-jnp.inf), "select_n",
         lambda: mask(float(jnp.finfo(jnp.bfloat16).min))),
    Case("operator", "EVRF001", lambda: text(
         "p = c64[8] parameter(0)\nROOT it = c64[8] fft(p), fft_type=FFT, fft_length={8}"), "it",
         lambda: one("multiply", "f32")),
    Case("operator", "EVRF001", lambda: traced(lambda x: lax.top_k(x, 4)[0], f32(2, 8)), "top_k",
         lambda: neuron_top_k(4)),
    Case("conditional", None, lambda: traced(conditional, f32(4)), "cond",
         lambda: traced(lambda x: jnp.where(x[0] > 0, jnp.sin(x), jnp.cos(x)), f32(4))),
    Case("dynamic-while", None, lambda: traced(lambda n, x: lax.fori_loop(0, n, lambda i, c: c + x, x), s32(), f32(4)),
         "while", lambda: traced(lambda x: lax.fori_loop(0, 5, lambda i, c: c + x, x), f32(4))),
    Case("host-callback", None, lambda: traced(callback, f32(4)), "debug_callback",
         lambda: traced(lambda x: x + 1, f32(4))),
    Case("host-callback", None, lambda: text(
         "t = token[] after-all()\nit = (f32[4], token[]) infeed(t)\nROOT r = f32[4] get-tuple-element(it), index=0"),
         "it", lambda: text("ROOT r = f32[4] parameter(0)")),
    Case("reduce-precision", None, lambda: traced(lambda x: lax.reduce_precision(x, 5, 10), f32(4)), "reduce_precision",
         lambda: traced(lambda x: x.astype(jnp.float16).astype(jnp.float32), f32(4))),
    Case("variadic-reduce", None, lambda: traced(lambda x: jnp.argmax(x, -1), f32(2, 8)), "reduce",
         lambda: traced(lambda x: jnp.min(jnp.where(x == jnp.max(x, -1, keepdims=True), lax.broadcasted_iota(
             jnp.int32, (2, 8), 1), 8), -1), f32(2, 8))),
    Case("sort-comparator", None, lambda: sort("NE"), "it", lambda: sort("GE")),
    Case("sort-comparator", None, lambda: traced(lambda a, b: lax.sort((a, b), num_keys=2), f32(8), f32(8)), "sort",
         lambda: traced(lambda a, b: lax.sort((a, b), num_keys=1), f32(8), f32(8))),
    Case("sort", "EVRF029", lambda: sort("LT"), "it", lambda: sort("LT"), "trn2", passes_on="trn1"),
    Case("top-k-integer", "EVRF013", lambda: neuron_top_k(8, "s32"), "it", lambda: neuron_top_k(8, "bf16")),
    Case("top-k-size", "EVRF014", lambda: neuron_top_k(16385), "it", lambda: neuron_top_k(16384)),
    Case("top-k-axis", None, lambda: transposed_top_k("2,8"), "it", lambda: transposed_top_k("4,2")),
    Case("custom-call", "EVRF015", lambda: custom_call("Sharding"), "it", lambda: custom_call("AwsNeuronGelu")),
    Case("rng-algorithm", "EVRF006", lambda: rng("rng_three_fry"), "it", lambda: rng("rng_default")),
    Case("integer-dot", "EVRF035", lambda: one("dot", "s32", ", lhs_contracting_dims={1}, rhs_contracting_dims={0}"),
         "it", lambda: one("dot", "s8", ", lhs_contracting_dims={1}, rhs_contracting_dims={0}"), "trn2"),
    Case("integer-dot", "EVRF035", lambda: one("dot", "s64", ", lhs_contracting_dims={1}, rhs_contracting_dims={0}"),
         "it", lambda: one("dot", "f32", ", lhs_contracting_dims={1}, rhs_contracting_dims={0}")),
    Case("integer-dot-lossy", "EVRF035",
         lambda: one("dot", "u32", ", lhs_contracting_dims={1}, rhs_contracting_dims={0}"), "it",
         lambda: one("dot", "bf16", ", lhs_contracting_dims={1}, rhs_contracting_dims={0}")),
    Case("integer-scatter", "EVRF060", lambda: scatter("s32", "add"), "it", lambda: scatter("s32", None)),
    Case("integer-scatter", "EVRF060", lambda: scatter("s64", "maximum"), "it", lambda: scatter("f32", "maximum")),
    Case("narrow-scatter", "EVRF016", lambda: scatter("pred", "or"), "it", lambda: scatter("pred", None)),
    Case("integer-all-reduce", "EVRF061", lambda: collective("all-reduce", "s32"), "it",
         lambda: collective("all-reduce", "f32")),
    Case("integer-reduce-scatter", "EVRF063",
         lambda: collective("reduce-scatter", "u32", "2", ", replica_groups={{0,1}}, dimensions={0}"), "it",
         lambda: collective("reduce-scatter", "bf16", "2", ", replica_groups={{0,1}}, dimensions={0}")),
    Case("integer-power", "EVRF062", lambda: one("power", "s64"), "it", lambda: one("power", "s32")),
    Case("arithmetic-shift", "EVRF022", lambda: one("shift-right-arithmetic", "s16"), "it",
         lambda: one("shift-right-arithmetic", "s32")),
    Case("convolution-dilation", "EVRF010", lambda: convolution(lhs_dilation=(2, 1), rhs_dilation=(1, 2)), "conv",
         lambda: convolution(rhs_dilation=(2, 2), strides=(2, 2))),
    Case("convolution-stride", "EVRF011", lambda: convolution(lhs_dilation=(2, 2), strides=(1, 2)), "conv",
         lambda: convolution(lhs_dilation=(2, 2))),
    Case("reduce-window-base-dilation", "EVRF017", lambda: pool(base_dilation=(1, 2)), "reduce_window", pool),
    Case("reduce-window-dilation", "EVRF018", lambda: pool(window_dilation=(2, 1)), "reduce_window", pool),
    Case("reduce-window-operands", "EVRF019", lambda: traced(lambda x, y: lax.reduce_window(
             (x, y), (0.0, 0.0), lambda a, b: (a[0] + b[0], a[1] * b[1]), (2,), (1,), "VALID"), f32(8), f32(8)),
         "reduce_window", pool),
    Case("gather-bounds", "EVRF056", lambda: gather(4), "gather", lambda: gather(3)),
    Case("scatter-bounds", "EVRF031", lambda: scatter_rows(4), "scatter", lambda: scatter_rows(3)),
    Case("logical-cores", "EARG001", lambda: one("add", "f32"), None, lambda: one("add", "f32"), "trn1", (2, 1)),
    Case("logical-cores", "EARG001", lambda: one("add", "f32"), None, lambda: one("add", "f32"), "trn2", (4, 2)),
    Case("partition-id", None, lambda: text("ROOT it = u32[] partition-id()"), "it",
         lambda: text("ROOT it = u32[] parameter(0)")),
    Case("channel-id", None, lambda: channel(1), "it", lambda: channel(0)),
    Case("replica-groups", None, lambda: groups([0, 1], [2, 4]), "it", lambda: groups([0, 2], [1, 3])),
    Case("replica-groups", None, lambda: groups([0, 1], [2]), "it", lambda: groups([0], [1], [2])),
    Case("replica-groups", None, groups, "it", lambda: groups([0])),
    Case("replica-groups", None, lambda: groups([0, 1], listed=True), "it", lambda: groups([0, 1])),
    Case("instruction-ids", None, lambda: with_id(2**31), "it", lambda: with_id(2**31 - 1)),
    Case("threefry", None, lambda: traced(draw("threefry2x32"), jax.ShapeDtypeStruct((2,), jnp.uint32)), "xor",
         lambda: rng("rng_default")),
    Case("donated-not-aliased", None, lambda: donated(f32(4, 4)), "cache", lambda: donated(f32(8, 4))),
    Case("read-after-write", None, lambda: read_after_write(True), "dot_general", lambda: read_after_write(False)),
    # the inputs and the output take 60 MB; 65000 x 65000 float32 values 15.7 GiB
    Case("device-memory", "EOOM001", lambda: attention(66000), None, lambda: attention(65000)),
    Case("device-memory", "EOOM001", lambda: attention(65000), None, lambda: attention(65000), "trn2", (1, 2)),
    Case("instruction-count", "EVRF007", lambda: turns(2_500_001), None, lambda: turns(2_500_000)),
]  # fmt: skip


def names(case: Case) -> str:
    return f"{case.rule}-{case.target}"


@pytest.mark.parametrize("case", CASES, ids=names)
def test_rule_fires_on_the_program_that_breaks_it(case: Case) -> None:
    found = [v for v in verify(case.breaks(), case.target, lnc=case.lnc[0]) if v.rule == case.rule]
    assert found, f"{case.rule} did not fire"
    assert {v.code for v in found} == {case.code}
    if case.instruction is None:
        assert {v.instruction for v in found} == {None}
    else:
        assert all(v.instruction and v.instruction.startswith(case.instruction) for v in found), found


@pytest.mark.parametrize("case", CASES, ids=names)
def test_near_miss_breaks_nothing(case: Case) -> None:
    assert verify(case.passes(), case.passes_on or case.target, lnc=case.lnc[1]) == []


def test_every_rule_has_a_case_and_documentation() -> None:
    assert {case.rule for case in CASES} == set(RULES)
    for rule in RULES.values():
        assert rule.doc
        assert rule.title
        assert rule.advice
        assert rule.name == rule.name.lower()


def layer(x: jax.Array, cache: tuple[jax.Array, jax.Array], w: dict[str, jax.Array], start: jax.Array) -> Any:
    """One attention and MLP block on one token a row, its cache written in place at each row's own position."""
    (b, d), (_, s, n, h) = x.shape, cache[0].shape
    q, k, v = (jnp.dot(x, w[name]).reshape(b, n, h) for name in "qkv")
    angle = start[:, None, None] * 10000.0 ** (-lax.iota(jnp.float32, h // 2) / (h // 2))
    turn = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1).astype(x.dtype)
    rows = jnp.arange(b)
    keys = cache[0].at[rows, start].set(k * turn, mode="promise_in_bounds")
    values = cache[1].at[rows, start].set(v, mode="promise_in_bounds")
    scores = jnp.einsum("bnh,bsnh->bns", q * turn, keys)
    seen = lax.broadcasted_iota(jnp.int32, (b, 1, s), 2) <= start[:, None, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(scores.dtype).min), -1)
    x = x + jnp.dot(jnp.einsum("bns,bsnh->bnh", weights, values).reshape(b, d), w["o"])
    return x + jnp.dot(jax.nn.gelu(jnp.dot(x, w["up"])), w["down"]), (keys, values)


def decode(layers: int) -> bytes:
    """A decode step as lowering makes them: clipped ids, donated caches, Neuron's top-k, the rank an input."""
    b, s, n, h, f, v = 2, 16, 2, 8, 32, 64
    d, bf16 = n * h, jnp.bfloat16
    shapes = {"q": (d, d), "k": (d, d), "v": (d, d), "o": (d, d), "up": (d, f), "down": (f, d)}
    blocks = [{k: jax.ShapeDtypeStruct(x, bf16) for k, x in shapes.items()}] * layers
    cache = [(jax.ShapeDtypeStruct((b, s, n, h), bf16),) * 2] * layers

    def step(
        cache: Any, embedding: jax.Array, blocks: Any, tokens: jax.Array, start: jax.Array, rank: jax.Array
    ) -> Any:
        local = jnp.clip(tokens - rank.astype(jnp.int32) * v, 0, v - 1)
        x, written = embedding.at[local].get(mode="promise_in_bounds"), []
        for kv, w in zip(cache, blocks, strict=True):
            x, new = layer(x, kv, w, start)
            written.append(new)
        logits = jnp.dot(x, embedding.T).astype(jnp.float32)
        shape = [jax.ShapeDtypeStruct((b, 8), jnp.float32), jax.ShapeDtypeStruct((b, 8), jnp.uint32)]
        top, ids = jax.ffi.ffi_call("AwsNeuronTopK", shape)(logits)
        return ids[:, :1].astype(jnp.int32) + jnp.sum(top > 0), written

    embedding, rank = jax.ShapeDtypeStruct((v, d), bf16), jax.ShapeDtypeStruct((), jnp.uint32)
    return traced(step, cache, embedding, blocks, s32(b), s32(b), rank, donate_argnums=0)


@pytest.mark.parametrize("target", ["inf2", "trn1", "trn1n", "trn2", "trn3"])
def test_a_decoder_passes_everywhere(target: str) -> None:
    module = decode(layers=2)
    assert {"gather", "scatter", "custom-call", "dot", "iota"} <= {i.opcode for i in parse(module).instructions}
    assert len(parse(module).aliases) == 4
    assert verify(module, target) == []


@pytest.mark.parametrize(
    ("fn", "low", "high"),
    [
        (lambda x: x.at[jnp.arange(5)].get(mode="promise_in_bounds"), 0, 4),
        (lambda x: x.at[jnp.arange(5)].get(mode="clip"), 0, 4),
        (lambda x: x.at[jnp.arange(5) + 2].get(mode="promise_in_bounds"), 2, 6),
        (lambda x: x.at[jnp.array([0, -4])].get(mode="promise_in_bounds"), -1, 0),
        (lambda x: x.at[2 * jnp.arange(4)[::-1].reshape(2, 2).T].get(mode="promise_in_bounds"), 0, 6),
        (lambda x: x.at[jnp.where(jnp.arange(4) > 2, 9, 0)].get(mode="promise_in_bounds"), 0, 9),
    ],
)
def test_index_arithmetic_is_followed(fn: Callable[[jax.Array], jax.Array], low: int, high: int) -> None:
    (found,) = verify(traced(fn, f32(3, 4)), "trn1")
    assert (found.code, found.rule) == ("EVRF056", "gather-bounds")
    assert f"indices from {low} to {high} along dimension 0, which allows 0 to 2" in found.message


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, n: x.at[jnp.arange(3)].get(mode="promise_in_bounds"),
        lambda x, n: x.at[-1 - jnp.arange(3)].get(mode="promise_in_bounds"),
        lambda x, n: x.at[jnp.clip(jnp.arange(9), 0, 2)].get(mode="promise_in_bounds"),
        lambda x, n: x.at[jnp.arange(5) + n].get(mode="promise_in_bounds"),  # of inputs nothing is known
    ],
)
def test_indices_that_stay_inside_or_are_not_known_pass(fn: Callable[..., jax.Array]) -> None:
    assert verify(traced(fn, f32(3, 4), s32()), "trn1") == []


def test_known_parts_of_an_index_are_checked_beside_unknown_ones() -> None:
    found = verify(traced(lambda x, n: x.at[jnp.arange(4), n].get(mode="promise_in_bounds"), f32(3, 4), s32(4)), "trn1")
    assert [v.code for v in found] == ["EVRF056"]


@pytest.mark.parametrize(
    ("fn", "count"),
    [
        (lambda x: lax.fori_loop(0, 5, lambda i, c: c + i, x), 5),
        (lambda x: lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] * 2), (3, x))[1], 0),
        (lambda x: lax.scan(lambda c, i: (c + i, c), x, jnp.arange(7.0))[0], 7),
        (lambda x: lax.while_loop(lambda s: s[0] > 1, lambda s: (s[0] - 3, s[1] * 2), (10, x))[1], 3),
        (lambda x: lax.while_loop(lambda s: lax.ge(8, s[0]), lambda s: (2 + s[0], s[1] * 2), (0, x))[1], 5),
        (lambda x: lax.while_loop(lambda s: s[0] != 6, lambda s: (s[0] + 2, s[1] * 2), (0, x))[1], 3),
        (lambda x: lax.while_loop(lambda s: s[0] < s[2], lambda s: (s[0] + 1, s[1] * 2, s[2]), (0, x, 4))[1], 4),
        (lambda x: lax.while_loop(lambda s: s[0] != 5, lambda s: (s[0] + 2, s[1] * 2), (0, x))[1], None),
        (lambda x: lax.while_loop(lambda s: s[0] < 6, lambda s: (s[0] * 2, s[1] * 2), (1, x))[1], None),
        (lambda x: lax.while_loop(lambda y: y < 6, lambda y: y + 1, x), None),
    ],
)
def test_trip_count(fn: Callable[[jax.Array], jax.Array], count: int | None) -> None:
    (loop,) = (i for i in parse(traced(fn, f32())).instructions if i.opcode == "while")
    assert trip_count(loop) == count


def test_each_violation_says_where_what_and_what_instead() -> None:
    module = traced(lambda x: lax.reduce_precision(x, 5, 10), f32(4))
    (found,) = verify(module, "trn1")
    assert found.source is not None
    assert found.source.rpartition(":")[0] == __file__
    assert str(found) == (
        f"error (reduce-precision): %{found.instruction} reduces the precision of float32[4] [{found.source}]."
        " Instead: convert to the narrower type and back."
    )
    assert Violation(**json.loads(json.dumps(found.as_dict()))) == found


def test_a_code_is_printed_as_the_compiler_prints_it() -> None:
    (found,) = verify(neuron_top_k(8, "s32"), "inf2")
    assert str(found).startswith("error NCC_EVRF013 (top-k-integer): %it takes the top k of int32[2,32768].")


def test_sources_are_given_for_a_stripped_module() -> None:
    module = neuron_top_k(8, "s32")
    assert verify(module, "trn1")[0].source is None
    assert verify(module, "trn1", sources={"it": "sampling.py:7"})[0].source == "sampling.py:7"


def test_raw_modules_of_jax_need_legalizing() -> None:
    module = traced(lambda x: x + 1, f32(4), raw=True)
    assert [v.rule for v in verify(module, "trn1")] == ["instruction-ids"]


def test_what_is_no_module_is_refused() -> None:
    module = one("add", "f32")
    with pytest.raises(LoweringError, match="HloModuleProto"):
        verify(b"no module at all", "trn1")
    with pytest.raises(LoweringError, match="HloModuleProto"):
        verify(b"", "trn1")
    with pytest.raises(LoweringError, match="refers to the id 99"):
        verify(edited(module, lambda m: proto.root(proto.entry(m)).operand_ids.append(99)), "trn1")
    with pytest.raises(LoweringError, match="'trn9'; choose one of inf2, trn1, trn1n, trn2, trn3"):
        verify(module, "trn9")
