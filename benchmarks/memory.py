"""The most memory that a process takes until its first token, in fresh processes, over the parameters in float32.

    python benchmarks/memory.py
    python benchmarks/memory.py ./checkpoint --quant int8 int4 --amp bf16 --json

Without MODEL it is the demo model. Memory counts from what a process has once everything is imported:

weights:    of all arrays of parameters
load_peak:  the most until weights are loaded
loaded:     what is left then
peak:       the most until the first token

Each form is read in a first process whose cache of programs is empty (`cold`), and then in `--rounds` that find them
there, of which the greatest is taken (`warm`).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile

from jx_neuron.checkpoint.demo import demo_model

CHILD = """
import json, math, sys
import jax, jx_neuron.llm, jx_neuron.runtime.xla
from jx_neuron import NeuronAutoModelForCausalLM, NeuronConfig, QuantizationConfig, SamplingParams
model, amp, quant = sys.argv[1:]
def memory(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) * 1024
before = memory("VmRSS")
config = NeuronConfig(quant=None if quant == "none" else QuantizationConfig.named(quant))
model = NeuronAutoModelForCausalLM.from_pretrained(model, amp=amp, neuron_config=config).to_neuron()
load_peak, loaded = memory("VmHWM") - before, memory("VmRSS") - before
next(model.generate("The capital of France is", SamplingParams(max_tokens=8), stream=True))
peak = memory("VmHWM") - before
decoder = model.runtime.decoder
arrays = decoder.abstract_params(model.settings.dtype).values()
weights = sum(array.size * array.dtype.itemsize for array in arrays)
parameters = 4 * sum(map(math.prod, decoder.shapes.values()))
sizes = dict(weights=weights, load_peak=load_peak, loaded=loaded, peak=peak)
print(json.dumps({name: size / parameters for name, size in sizes.items()} | {"float32_bytes": parameters}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a checkpoint with a tokenizer")
    parser.add_argument("--quant", nargs="+", choices=["none", "int8", "fp8", "int4"], default=["none", "int8", "int4"])
    parser.add_argument("--amp", choices=["f32", "f16", "bf16"], default="f32")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="JSON in place of a table")
    options = parser.parse_args()
    model = options.model or str(demo_model())
    ratios = {quant: measure(model, options.amp, quant, options.rounds) for quant in options.quant}
    if options.json:
        print(json.dumps({"model": options.model or "demo", "amp": options.amp, "over_float32": ratios}, indent=1))
        return
    columns = ["weights", "load_peak", "loaded", "peak"]
    print(f"{'quant':6}{'programs':10}" + "".join(f"{column:>11}" for column in columns))
    for quant, runs in ratios.items():
        for programs, sizes in runs.items():
            print(f"{quant:6}{programs:10}" + "".join(f"{sizes[column]:11.3f}" for column in columns))


def measure(model: str, amp: str, quant: str, rounds: int) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory() as programs:
        cold, *warm = (run(model, amp, quant, programs) for _ in range(1 + rounds))
    return {"cold": cold} | ({"warm": {name: max(sizes[name] for sizes in warm) for name in cold}} if warm else {})


def run(model: str, amp: str, quant: str, programs: str) -> dict[str, float]:
    kept = {"JAX_COMPILATION_CACHE_DIR": programs, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
    command = [sys.executable, "-c", CHILD, model, amp, quant]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **kept}).stdout
    sizes: dict[str, float] = json.loads(out.splitlines()[-1])
    return sizes


if __name__ == "__main__":
    main()
