"""How a layer of experts computes a prompt on the chip: by every expert, or in blocks; counted, nothing is run.

    python benchmarks/experts.py
    python benchmarks/experts.py Qwen/Qwen3-30B-A3B --tp 8 --tokens 512 2048

Both are lowered without weights, and `jx_neuron.lowering.cost` counts them on one core. Time is the longer of FLOPs at
a rate and of bytes at the published bandwidth: those read, and twice what products give, which is written and read
again. The rates are the published peak, and the fraction that published prefills reach (jx_neuron.planning.speed).
"""

import argparse
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jx_neuron.errors import ConfigError, JxNeuronError
from jx_neuron.lowering import Cost, lower
from jx_neuron.models.known import config_of
from jx_neuron.nn import blocks
from jx_neuron.nn.experts import Experts
from jx_neuron.nn.sharding import padded
from jx_neuron.planning.instances import Instance, find
from jx_neuron.planning.outline import Outline
from jx_neuron.planning.speed import FITTED

MODELS = {
    "mistralai/Mixtral-8x7B-v0.1": 8, "Qwen/Qwen3-30B-A3B": 8, "Qwen/Qwen3-235B-A22B": 32, "openai/gpt-oss-120b": 32,
    "deepseek-ai/DeepSeek-V3": 64,
}  # fmt: skip


def costs(sizes: dict[str, int], chosen: int, tokens: int, tp: int) -> tuple[Cost, Cost]:
    """Of one layer: by every expert, and in blocks."""
    graph, params = nnx.split(nnx.eval_shape(lambda: Experts(sizes, "silu", rngs=nnx.Rngs(0))))
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), params)
    by_path = jax.tree_util.tree_map_with_path(
        lambda path, _: P(None, "tp") if "down_proj" in jax.tree_util.keystr(path) else P(None, None, "tp"), params
    )
    shape = (1, tokens, chosen)
    args = (
        jax.ShapeDtypeStruct((1, tokens, sizes["d"]), jnp.bfloat16),
        jax.ShapeDtypeStruct(shape, jnp.bfloat16),
        jax.ShapeDtypeStruct(shape, jnp.int32),
    )

    def cost(*cores: int) -> Cost:
        def layer(params, x_btd, weight_btc, index_btc):
            merged = nnx.merge(graph, params)
            way = merged.in_blocks if cores else merged.dense
            return way(x_btd, weight_btc, index_btc, *cores)

        return lower(layer, params, *args, tp_degree=tp, in_specs=(by_path, None, None, None)).cost()

    return cost(), cost(tp)


def milliseconds(cost: Cost, instance: Instance) -> Iterator[float]:
    """At the peak rate, and at that of published prefills."""
    moved = cost.bytes_read + 2 * cost.bytes_between + cost.bytes_written
    for rate in (1, FITTED.efficiency):
        yield 1e3 * max(moved / instance.bandwidth_per_core, cost.flops / rate / instance.flops_per_core)


def table(models: Sequence[str], tp_degree: int | None, lengths: Sequence[int], instance: Instance) -> None:
    """Prints both as Markdown. Raises JxNeuronError where a model is not known, or has no experts."""
    print("| model | tp | tokens | GFLOP | MB moved | ms at the peak | ms as published | taken |")
    print("|---|---|---|---|---|---|---|---|")
    for model in models:
        config, tp = Outline.of(config_of(model)).config, tp_degree or MODELS.get(model, 8)
        if not config.chosen:
            raise ConfigError(f"{model} has no experts; name a model that has, such as {next(iter(MODELS))}")
        sizes = config.sizes | dict(m=padded(config.sizes["m"], tp))
        for tokens in lengths:
            pair = costs(sizes, config.chosen, tokens, tp)
            times = zip(*(milliseconds(cost, instance) for cost in pair), strict=True)
            cells = [
                " / ".join(f"{cost.flops / 1e9:,.0f}" for cost in pair),
                " / ".join(f"{(cost.bytes_read + 2 * cost.bytes_between) / 1e6:,.0f}" for cost in pair),
                *(" / ".join(f"{time:.2f}" for time in both) for both in times),
                "blocks" if blocks.pay(tokens, config.chosen, sizes["e"], sizes["m"] // tp) else "every expert",
            ]
            print(f"| {model.split('/')[-1]} | {tp} | {tokens} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", default=[*MODELS], help="names or config.json files")
    parser.add_argument("--tp", type=int, help="tensor-parallel degree")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--instance", default="trn1.32xlarge")
    options = parser.parse_args()
    if min(*options.tokens, options.tp or 1) < 1:
        parser.error("--tp and --tokens are at least 1")
    try:
        table(options.models, options.tp, options.tokens, find(options.instance))
    except JxNeuronError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
