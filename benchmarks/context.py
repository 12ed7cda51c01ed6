"""How the time of a decode step grows with context, compared with its bytes of weights and state.

    python benchmarks/context.py smollm2 --positions 128 512 2048

Weights are random. `over_bytes` is the ratio of a step's time to that over the first number of positions, divided by
the ratio of their bytes: 1 where time grows as the state does, above 1 where it grows faster. `long_cache` is the time
of a step over the first number of positions in a table of the last number, divided by that in a table of the first.
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

from jx_neuron.checkpoint.weights import from_params
from jx_neuron.models import Decoder
from jx_neuron.nn import sharding
from jx_neuron.runtime.xla import XlaRuntime
from jx_neuron.step.program_key import ProgramKey
from jx_neuron.step.step_input import StepInput

SMOLLM2 = dict(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=8192,
)  # fmt: skip
CONFIGS = {
    "opt": dict(model_type="opt"),
    "gptj": dict(model_type="gptj", n_embd=1024, n_layer=12, n_head=16),
    "smollm2": dict(model_type="llama", **SMOLLM2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=CONFIGS)
    parser.add_argument("--positions", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--amp", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--kv", choices=["int8", "float8_e4m3", "float16", "bfloat16"], help="dtype of the state")
    parser.add_argument("--rounds", type=int, default=31, help="steps timed of each, alternating")
    options = parser.parse_args()

    decoder, dtype, rng = Decoder.from_config(CONFIGS[options.model]), jnp.dtype(options.amp), np.random.default_rng(0)
    if options.kv:
        decoder = decoder.with_cache(options.kv)
    params = {
        path: (0.02 * rng.standard_normal(leaf.shape, np.float32)).astype(dtype)
        for path, leaf in decoder.abstract_params(dtype).items()
    }
    weights = sum(array.nbytes for array in params.values())
    runtime = XlaRuntime(decoder, from_params(params, decoder.rows, decoder.padding, dtype), sharding.mesh(1), dtype)
    del params
    first, last = options.positions[0], options.positions[-1]
    pairs = [(positions, positions) for positions in options.positions] + [(first, last)]
    seconds: dict[tuple[int, int], list[float]] = {pair: [] for pair in pairs}
    for turn in range(options.rounds + 1):
        for pair in pairs:
            runtime.reset(options.batch, pair[1])
            took = step(runtime, ProgramKey("decode", options.batch, 1, pair[0]))
            if turn:  # the first compiles
                seconds[pair].append(took)
    median = {pair: float(np.median(took)) for pair, took in seconds.items()}
    read = {pair: weights + decoder.state_bytes(options.batch, pair[1], dtype.itemsize) for pair in pairs}
    rows = [
        {
            "positions": positions,
            "milliseconds": 1e3 * median[positions, positions],
            "gigabytes_per_second": read[positions, positions] / median[positions, positions] / 1e9,
            "over_bytes": median[positions, positions]
            / median[first, first]
            * read[first, first]
            / read[positions, positions],
        }
        for positions in options.positions
    ]
    print(
        json.dumps(vars(options) | {"rows": rows, "long_cache": median[first, last] / median[first, first]}, indent=1)
    )


def step(runtime: XlaRuntime, key: ProgramKey) -> float:
    """Seconds of the step at the end of `key`'s positions, the second of two, whose state table has been touched."""
    start_b = np.full(key.rows, key.positions - 1, np.int32)
    arrays = {"tokens_bt": np.zeros((key.rows, 1), np.int32), "start_b": start_b, "length_b": np.ones_like(start_b)}
    jax.block_until_ready(runtime.run(StepInput(key, arrays)).token_b1)
    began = time.perf_counter()
    jax.block_until_ready(runtime.run(StepInput(key, arrays)).token_b1)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
