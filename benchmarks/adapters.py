"""Tokens a second of the demo model without adapters, and with several side by side, as JSON.

    python benchmarks/adapters.py --count 8 --rank 16 --batch 1

Adapters of random numbers change all matrices of attention. Three ways take turns, and each has its median: "without",
a model without adapters; "none", the model with adapters, of which no row has one; and "own", where each row has one.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
from safetensors.numpy import save_file

from jx_neuron import NeuronAutoModelForCausalLM, SamplingParams
from jx_neuron.checkpoint.demo import demo_model
from jx_neuron.checkpoint.folder import open_checkpoint

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=8, help="adapters")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--new", type=int, default=96, help="tokens made of each prompt")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        adapters = {f"a{n}": written(Path(folder) / f"a{n}", options.rank, n) for n in range(options.count)}
        made = dict(amp="f32", batch_size=options.batch, n_positions=256)
        plain = NeuronAutoModelForCausalLM.from_pretrained(demo_model(), **made)
        adapted = NeuronAutoModelForCausalLM.from_pretrained(demo_model(), adapters=adapters, **made)
        own = [f"a{n % options.count}" for n in range(options.batch)]
        ways = {"without": (plain, None), "none": (adapted, None), "own": (adapted, own)}
        rates: dict[str, list[float]] = {way: [] for way in ways}
        prompts = np.random.default_rng(0).integers(plain.settings.vocab_size, size=(options.batch, 32)).tolist()
        sampling = SamplingParams(max_tokens=options.new, eos_token_id=-1)
        for turn in range(options.rounds + 1):
            for way, (model, adapter) in ways.items():
                answers = [one.answers[0] for one in model.generate(prompts, sampling, adapter=adapter)]
                if turn:
                    seconds = max(answer.seconds - answer.seconds_to_first for answer in answers)
                    rates[way].append(options.batch * (options.new - 1) / seconds)
    result = {way: round(median(several), 1) for way, several in rates.items()}
    ratios = {
        f"{way}_over_without": round(median(map(float.__truediv__, rates[way], rates["without"])), 3)
        for way in ("none", "own")
    }
    print(json.dumps({**vars(options), **result, **ratios}))


def written(folder: Path, rank: int, seed: int) -> Path:
    """A folder with an adapter of the demo model, as PEFT writes it."""
    rng, checkpoint = np.random.default_rng(seed), open_checkpoint(demo_model())
    tensors = {}
    for name in checkpoint.names():
        if name.split(".")[-2] in MATRICES:
            outputs, inputs = checkpoint.shape(name)
            for part, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                path = f"base_model.model.{name.removesuffix('weight')}lora_{part}.weight"
                tensors[path] = 0.01 * rng.standard_normal(shape, np.float32)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = dict(peft_type="LORA", r=rank, lora_alpha=rank, target_modules=list(MATRICES))
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


if __name__ == "__main__":
    main()
