"""Matrix products as jx_neuron/runtime/cpu/kernel.py writes them, compared with x @ W[in, out] under JAX's defaults.

    python benchmarks/products.py --rows 1 4 8 64 512

Twelve times 768 → 3072 → 768, alternating; medians. The error is the root mean square against float64, over that of the
result; 16-bit ones hold that of rounding the weights.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jx_neuron.runtime.cpu.formulation import choose
from jx_neuron.runtime.cpu.kernel import Formulation, Packed, pack
from jx_neuron.runtime.xla_options import options
from jx_neuron.util.pages import Pages

LAYERS, NARROW, WIDE = 12, 768, 3072


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 64, 512])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    weights = [
        tuple((rng.standard_normal(of, np.float32) / np.sqrt(of[0])) for of in ((NARROW, WIDE), (WIDE, NARROW)))
        for _ in range(LAYERS)
    ]
    found = [
        {"dtype": dtype, "rows": rows} | measure(weights, rng, rows, dtype, options.rounds)
        for dtype in options.dtype
        for rows in options.rows
    ]
    print(json.dumps(found, indent=1))


def measure(weights: list[Any], rng: np.random.Generator, rows: int, dtype: str, rounds: int) -> dict[str, float]:
    x = rng.standard_normal((rows, NARROW), np.float32)
    exact = x.astype(np.float64)
    for pair in weights:
        for w in pair:
            exact = exact @ w.astype(np.float64)
    plain = jax.tree.map(lambda w: jnp.asarray(w, dtype), weights)
    pages = Pages()
    laid_out = jax.tree.map(lambda w: jax.device_put(pages.put(pack([np.asarray(w)], 1))), plain)
    formulation = choose(dtype).formulation
    how = options("cpu", formulation, rows)
    chains = {
        "default": (jax.jit(lambda x, all: chain(jnp.matmul, x, all)), plain),
        "ours": (jax.jit(partial(ours, dtype=dtype, formulation=formulation), compiler_options=how), laid_out),
    }
    seconds: dict[str, list[float]] = {name: [] for name in chains}
    told: dict[str, float] = {}
    for turn in range(rounds + 1):
        for name, (function, held) in chains.items():
            began = time.perf_counter()
            y = function(jnp.asarray(x, dtype), held).block_until_ready()
            if turn:  # the first compiles
                seconds[name].append(time.perf_counter() - began)
            told[f"{name}_error"] = float(
                np.sqrt(np.mean((np.asarray(y, np.float64) - exact) ** 2) / np.mean(exact**2))
            )
    size = sum(w.nbytes for w in jax.tree.leaves(plain))
    for name, took in seconds.items():
        told[f"{name}_milliseconds"] = 1e3 * float(np.median(took))
        told[f"{name}_gigabytes_per_second"] = size / float(np.median(took)) / 1e9
    return told


def chain(product: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, weights: Any) -> jax.Array:
    for pair in weights:
        for w in pair:
            x = product(x, w)
    return x


def ours(x: jax.Array, weights: Any, dtype: str, formulation: Formulation) -> jax.Array:
    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        (y,) = Packed(w, (w.shape[::-1],), 1, jnp.dtype(dtype), formulation).matmul(x)
        return y

    return chain(product, x, weights)


if __name__ == "__main__":
    main()
