"""Products as a CPU computes them: the same numbers as one dot, in programs that copy no weights."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steps import FORMULATION, step_input, table

from jx_neuron.checkpoint.weights import from_params
from jx_neuron.models import Decoder
from jx_neuron.nn import sharding
from jx_neuron.nn.attention import attend
from jx_neuron.nn.kernel import matmul
from jx_neuron.nn.ops import PLAIN as PLAIN_OPS
from jx_neuron.nn.ops import using
from jx_neuron.nn.state import PLAIN, positions_of
from jx_neuron.runtime.cpu.kernel import Formulation, Packed, pack
from jx_neuron.runtime.cpu.ops import BLOCK, CpuOps
from jx_neuron.runtime.cpu.weights import OneCPU
from jx_neuron.runtime.xla import XlaRuntime
from jx_neuron.runtime.xla_options import options
from jx_neuron.step.program_key import ProgramKey

GPT2 = dict(model_type="gpt2", n_embd=768, n_layer=2, n_head=12, vocab_size=1000, n_positions=64)
LLAMA = dict(
    model_type="llama",
    hidden_size=768,
    intermediate_size=1024,
    num_hidden_layers=2,
    num_attention_heads=12,
    num_key_value_heads=4,
    vocab_size=1000,
)


def for_cpu(function, *args, formulation=FORMULATION, rows=0):
    def call(*args):
        with using(CpuOps(formulation)):
            return function(*args)

    how = options("cpu", formulation, rows)
    return np.asarray(jax.jit(call, compiler_options=how)(*args), np.float64)


FORMULATIONS = {
    "a CPU of AVX2": FORMULATION,
    "with AVX-512": Formulation((1, 8), 32, "eigen"),
    "that multiplies 16 bits": Formulation((4,), 8, "ynnpack"),
}


@pytest.mark.few(27)
@pytest.mark.parametrize("rows", [(1, 1), (2, 1), (1, 3), (4, 1), (16, 1), (3, 11)], ids=str)
@pytest.mark.parametrize("inputs", [(768,), (3, 256), (67,), (1,)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", FORMULATIONS)
def test_a_product_is_that_of_float64(rows, inputs, dtype, name) -> None:
    how = dict(formulation=FORMULATIONS[name], rows=math.prod(rows))
    rng = np.random.default_rng(0)
    shapes = (*rows, *inputs), (*inputs, 3, 5), (*inputs, 4), (40, inputs[-1])
    x, *kernels, table = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    wide_x, *wide_kernels, wide_table = (np.asarray(a, np.float64) for a in (x, *kernels, table))
    for found, expected, most in (
        *(
            (
                for_cpu(lambda x, w, i=i: w.matmul(x)[i], x, packed(kernels, len(inputs), FORMULATIONS[name]), **how),
                np.tensordot(wide_x, wide_kernel, len(inputs)),
                4,
            )
            for i, wide_kernel in enumerate(wide_kernels)
        ),
        (for_cpu(CpuOps(FORMULATIONS[name]).matmul_rows, x, table, **how), wide_x @ wide_table.T, 8),
    ):
        assert found.shape == expected.shape
        error = np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))
        assert error < most * float(jnp.finfo(dtype).eps)


def packed(kernels, axes: int, formulation=FORMULATION) -> Packed:
    w_nk = jnp.asarray(pack([np.asarray(kernel) for kernel in kernels], axes))
    return Packed(w_nk, tuple(kernel.shape for kernel in kernels), axes, kernels[0].dtype, formulation)


def test_off_a_cpu_a_product_is_one_dot() -> None:
    x, kernel = jnp.ones((1, 1, 768)), jnp.ones((768, 12, 64))
    for traced in (
        jax.make_jaxpr(lambda x, w: matmul(x, w, 1))(x, kernel),
        jax.make_jaxpr(PLAIN_OPS.matmul_rows)(x, jnp.ones((40, 768))),
    ):
        assert [str(e.primitive) for e in traced.eqns if str(e.primitive) not in ("reshape", "transpose")] == [
            "dot_general"
        ]


@pytest.mark.parametrize(("dtype", "stored"), [("float32", "float32"), ("bfloat16", "uint16")])
def test_packed_kernels_are_outputs_first_and_unpack_as_they_were(dtype, stored) -> None:
    numbers = np.arange(2 * 3 * 5 * 7 + 2 * 3 * 4).astype(jnp.dtype(dtype))
    kernels = [numbers[: 2 * 3 * 5 * 7].reshape(2, 3, 5, 7), numbers[2 * 3 * 5 * 7 :].reshape(2, 3, 4)]
    w_nk = pack(kernels, 2)
    assert isinstance(w_nk, np.ndarray)
    assert (w_nk.shape, w_nk.dtype) == ((5 * 7 + 4, 2 * 3), stored)
    assert w_nk.view(jnp.dtype(dtype))[7 + 2, 3 + 2] == kernels[0][1, 2, 1, 2]
    for unpacked, kernel in zip(packed(kernels, 2).unpack(), kernels, strict=True):
        np.testing.assert_array_equal(unpacked, kernel)
    np.testing.assert_array_equal(packed(kernels[1:], 2)[0, 1:], kernels[1][0, 1:])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (GPT2, {"c_attn.kernel": 1, "c_proj.kernel": 1, "mlp.up_proj.kernel": 1, "mlp.down_proj.kernel": 1}),
        (
            LLAMA,
            {"self_attn.qkv.fused": 3, "self_attn.o_proj.kernel": 1, "mlp.gate_up.fused": 2, "mlp.down_proj.kernel": 1},
        ),
    ],
    ids=["gpt2", "llama"],
)
def test_a_cpu_packs_the_kernels_of_linear_layers_and_those_of_one_input_as_one(config, expected) -> None:
    decoder = Decoder.from_config(config)
    values = {path: np.ones(leaf.shape) for path, leaf in decoder.abstract_params("float32").items()}
    params = OneCPU(decoder, source(decoder, values, "float32"), sharding.mesh(1), np.dtype("float32")).params(
        ProgramKey("prefill", 1, 64, 64)
    )
    assert {path: len(kernel.shapes) for path, kernel in params.items() if isinstance(kernel, Packed)} == {
        f"layers.{i}.{name}": count for i in range(2) for name, count in expected.items()
    }


def source(decoder, values, dtype):
    return from_params(values, decoder.rows, decoder.padding, jnp.dtype(dtype))


@pytest.mark.slow
def test_what_bfloat16_gives_is_near_float32() -> None:
    decoder, mesh = Decoder.from_config(GPT2), sharding.mesh(1)
    rng = np.random.default_rng(0)
    values = {path: 0.05 * rng.normal(size=leaf.shape) for path, leaf in decoder.abstract_params("float32").items()}
    tokens = rng.integers(0, 1000, (2, 8)).astype(np.int32)
    found = []
    for dtype in ("float32", "bfloat16"):
        runtime = XlaRuntime(decoder, source(decoder, values, dtype), mesh, dtype)
        prompt = runtime.run(step_input(ProgramKey("prefill", 2, 8, 16), tokens))
        after = runtime.run(step_input(ProgramKey("decode", 2, 1, 16), tokens[:, :1], [8, 8]))
        found.append([np.asarray(output.logits) for output in (prompt, after)])
    for wide, narrow in zip(*found, strict=True):
        assert np.abs(narrow - wide).max() < 0.05 * wide.std()


def test_attention_in_blocks_is_that_over_all_slots() -> None:
    tokens, rng = 2 * BLOCK + 44, np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, tokens, n, 8)), jnp.float32) for n in (6, 3, 3))
    empty = table(PLAIN, (2, 3, tokens, 8), layers=1)
    length_b = jnp.asarray([tokens, 70], jnp.int32)

    def attention(q, k, v):
        return attend(
            q, k, v, empty.of_layer(0), positions_of(jnp.zeros(2, jnp.int32), length_b, None, tokens, tokens)
        )[0]

    assert [last for _, last, _ in _traced_blocks(tokens, tokens)] == [BLOCK, 2 * BLOCK, tokens]
    assert _traced_blocks(tokens, 2 * tokens)[0] == (0, BLOCK, tokens + BLOCK)
    wide_q, wide_k, wide_v = (np.asarray(x, np.float64) for x in (q, *(jnp.repeat(x, 2, axis=2) for x in (k, v))))
    scores = np.einsum("btnh,bsnh->bnts", wide_q, wide_k) / np.sqrt(8)
    weights = np.exp(np.where(np.tri(tokens, dtype=bool), scores, -np.inf))
    expected = np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), wide_v)
    np.testing.assert_allclose(for_cpu(attention, q, k, v), expected, atol=3e-6)


def _traced_blocks(tokens: int, slots: int) -> list[tuple[int, int, int]]:
    return CpuOps(FORMULATION).query_blocks(tokens, slots)
