"""From nothing to the first token, in fresh processes: seconds since the start, and memory, as JSON.

    python benchmarks/start.py
    python benchmarks/start.py ./checkpoint --rounds 7

Without MODEL it is the demo model. Files and programs are cached by a first process, which counts as `first`;
the rest are medians. `peak_over_checkpoint` is the most memory that a process took until its first token, above what it
had before loading, over the bytes of the parameters.
"""

import argparse
import json
import subprocess
import sys
from typing import Any

import numpy as np

CHILD = """
import json, math, sys, time
began = time.perf_counter()
seconds = {}
def mark(what):
    seconds[what] = time.perf_counter() - began
def memory(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) * 1024
import jx_neuron
from jx_neuron import NeuronAutoModelForCausalLM, SamplingParams
mark("import")
from jx_neuron.checkpoint.demo import demo_model
import jax, jx_neuron.llm, jx_neuron.runtime.xla
before = memory("VmRSS")
model = NeuronAutoModelForCausalLM.from_pretrained(sys.argv[1] or demo_model(), amp="f32").to_neuron()
mark("load")
next(model.generate("The capital of France is", SamplingParams(max_tokens=8), stream=True))
mark("first_token")
parameters = 4 * sum(map(math.prod, model.runtime.decoder.shapes.values()))
print(json.dumps(seconds | {"peak_over_checkpoint": (memory("VmHWM") - before) / parameters}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    first, *warm = (run(options.model) for _ in range(options.rounds + 1))
    median = {name: float(np.median([seconds[name] for seconds in warm])) for name in first}
    print(json.dumps({"model": options.model or "demo", "first": first, "warm": median}, indent=1))


def run(model: str) -> dict[str, Any]:
    out = subprocess.run([sys.executable, "-c", CHILD, model], check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.splitlines()[-1])


if __name__ == "__main__":
    main()
