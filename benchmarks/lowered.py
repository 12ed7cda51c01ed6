"""What a decode step would move on the chip, read off the lowered programs; nothing is compiled or run.

    python benchmarks/lowered.py
    python benchmarks/lowered.py facebook/opt-13b ./my-llama --tp 8 --batch 1 --json

Bytes are of one core and one step, at bfloat16, as `jx_neuron.lowering.cost` counts them. The least possible:

- its parameters once each, split and padded as the core holds them: what padding and replication add to an even split
  of the model and its cache has a column of its own, since another degree would avoid it, and no program can
- of tables that are looked up, the rows looked up alone; a head is read whole, and so is a table that is also the head
- its part of the cache, as far as the bucket goes, and each row's entry before it is written: that of a row without a
  token stays
- written: each row's entry of the state, its logits in float32, and its token, to the caller and to its slot
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax.numpy as jnp

from jx_neuron.errors import JxNeuronError
from jx_neuron.lowering.model import lower_model
from jx_neuron.models import Decoder
from jx_neuron.models.known import config_of
from jx_neuron.planning.outline import Outline
from jx_neuron.planning.published import CONFIGS
from jx_neuron.step.program_key import ProgramKey

MODELS = (
    "gpt2-xl", "facebook/opt-13b", "facebook/opt-30b", "EleutherAI/gpt-j-6B",
    "Llama-2-13b", "Llama-3-8B", "Llama-2-70b",
)  # fmt: skip
DTYPE = jnp.dtype(jnp.bfloat16)


@dataclass(frozen=True)
class Step:
    """One decode step; bytes are of one core.

    padding:          what padding and replication add to the least bytes read, as a fraction of an even split.
    collective_bytes: of what collectives give.
    moved:            results of copies, concatenations, pads and transposes.
    """

    model: str
    tp_degree: int
    batch: int
    bucket: int
    capacity: int
    read: int
    least_read: int
    written: int
    least_written: int
    padding: float
    collectives: dict[str, int]
    collective_bytes: int
    instructions: int
    moved: int

    @property
    def ratio(self) -> float:
        """Bytes read and written, over the least possible."""
        return (self.read + self.written) / (self.least_read + self.least_written)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ratio": self.ratio}


def steps(
    model: str, raw: Mapping[str, Any], tp: int, batches: Sequence[int], bucket: int, capacity: int | None = None
) -> Iterator[Step]:
    """The decode step of a config at each batch; the bucket and the cache's capacity are at most the model's positions.

    Raises JxNeuronError where the model cannot be lowered so.
    """
    outline, decoder = Outline.of(raw), Decoder.from_config(raw, tp)
    most = decoder.config.max_positions
    bucket, capacity = (min(size, most or size) for size in (bucket, max(bucket, capacity or bucket)))
    for batch in batches:
        key = ProgramKey("decode", batch, 1, bucket)
        (program,) = lower_model(decoder, [key], batch, capacity, DTYPE)
        cost, collectives = program.cost(), program.collectives()
        read, written = least(outline, tp, key)
        yield Step(
            model=model,
            tp_degree=tp,
            batch=key.rows,
            bucket=bucket,
            capacity=capacity,
            read=cost.bytes_read,
            least_read=read,
            written=cost.bytes_written,
            least_written=written,
            padding=tp * read / least(outline, 1, key)[0] - 1,
            collectives=dict(Counter(c.opcode for c in collectives)),
            collective_bytes=sum(c.bytes for c in collectives),
            instructions=cost.instructions,
            moved=cost.bytes_moved,
        )


def least(outline: Outline, tp: int, key: ProgramKey) -> tuple[int, int]:
    """The fewest bytes that a core can read, and write, in a decode step."""
    found = outline.parameters(tp)
    embeddings = [next(p for p in found if p.is_vocabulary_table), *(p for p in found if p.is_looked_up)]
    looked_up = sum(key.rows * table.shape[-1] for table in embeddings)
    weights = (outline.read_elements(tp) + looked_up) * DTYPE.itemsize
    bucket, entries = (outline.cache_bytes(tp, key.rows, s, DTYPE.itemsize) for s in (key.positions, 1))
    logits = 4 * key.rows * outline.padding(tp).size("v") // tp
    return weights + bucket + entries, entries + logits + 2 * 4 * key.rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        default=MODELS,
        help=f"a config.json, a folder or .gguf file with one, or a name; by default {', '.join(MODELS)}",
    )
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 8, 32], help="tensor-parallel degrees")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="rows")
    parser.add_argument("--bucket", type=int, default=2048, help="positions that a step reads, as far as the model has")
    parser.add_argument("--capacity", type=int, help="positions of the cache; by default those of the bucket")
    parser.add_argument("--json", action="store_true", help="a list of JSON objects in place of the table")
    options = parser.parse_args()
    if min(*options.tp, *options.batch, options.bucket, options.capacity or 1) < 1:
        parser.error("--tp, --batch, --bucket and --capacity are at least 1")
    found = []
    try:
        for model in options.models:
            raw = CONFIGS[model] if model in CONFIGS else config_of(model)
            for tp in options.tp:
                found += steps(model, raw, tp, options.batch, options.bucket, options.capacity)
    except JxNeuronError as error:
        parser.error(str(error))
    print(json.dumps([step.as_dict() for step in found], indent=1) if options.json else table(found))


def table(found: Sequence[Step]) -> str:
    """Markdown, in MB and kB of 1000."""
    heads = (
        "model", "tp", "batch", "bucket", "MB read", "MB written", "over the least", "padding", "collectives",
        "their kB", "kB moved", "instructions",
    )  # fmt: skip
    rows = [
        (
            step.model.split("/")[-1],
            step.tp_degree,
            step.batch,
            step.bucket,
            f"{step.read / 1e6:,.1f}",
            f"{step.written / 1e6:.2f}",
            f"{step.ratio - 1:.2%}",
            f"{step.padding:.1%}",
            sum(step.collectives.values()),
            f"{step.collective_bytes / 1e3:,.0f}",
            f"{step.moved / 1e3:,.0f}",
            f"{step.instructions:,}",
        )
        for step in found
    ]
    lines = (heads, ["---"] * len(heads), *rows)
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


if __name__ == "__main__":
    main()
