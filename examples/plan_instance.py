"""Which instance for a model? A row for each type: whether the model fits, how tightly, and about how fast it is.

    python examples/plan_instance.py facebook/opt-13b --amp f16
    python examples/plan_instance.py ./my-llama --batch-size 8 --n-positions 4096

It reads a config and no weights. Times are estimates; docs/planning.md says how far off they were on published figures.
`jx-neuron plan` tells more of one instance.
"""

import argparse
import re

from jx_neuron import InputError
from jx_neuron.models.known import config_of
from jx_neuron.planning import INSTANCES, plan

GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="facebook/opt-13b", help="a config.json, folder, .gguf or hub id")
    parser.add_argument("--amp", default="bf16", help="dtype of weights and cache (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=1, help="prompts answered at once (%(default)s)")
    parser.add_argument("--n-positions", type=int, help="longest prompt and answer (2048, or the model's)")
    asked = parser.parse_args()

    config = config_of(asked.model)
    how = dict(amp=asked.amp, batch_size=asked.batch_size, n_positions=asked.n_positions)
    print(f"{'instance':15} {'tp':>3} {'GiB a core':>12} {'ms a token':>11} {'largest batch':>14}")
    for instance in INSTANCES:
        try:
            found = plan(config, instance.name, **how)  # the fastest degree of the ones that fit
        except InputError as refusal:
            # It says what each core would need item by item, and the nearest request that works; here, the sum.
            why = re.sub(r" \(.*?\)", "", str(refusal)).partition(". Nearest")[0]
            print(f"{instance.name:15} {why.rpartition(': ')[2]}")
            continue
        memory = f"{found.memory.total / GIB:.1f} of {found.memory_per_core / GIB:.0f}"
        speed = f"{found.seconds_per_token * 1e3:.1f}"
        tight = "  tight" if found.tight else ""
        print(f"{instance.name:15} {found.tp_degree:3} {memory:>12} {speed:>11} {found.largest_batch:>14}{tight}")

    # Without an instance, the first that holds the request is taken.
    chosen = plan(config, **how)
    print(f"\nThe smallest that holds it: {chosen.instance}, at tp {chosen.tp_degree}. A core holds:")
    for item, size in chosen.memory.items().items():
        print(f"  {item:12} {size / GIB:6.2f} GiB")
    for note in chosen.notes:
        print(f"  Note: {note}")


if __name__ == "__main__":
    main()
