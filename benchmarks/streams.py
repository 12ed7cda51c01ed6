"""Two alternating streams, compared with one batch of the two, as JSON.

    python benchmarks/streams.py
    python benchmarks/streams.py ./checkpoint --backend host --positions 2048

Without MODEL it is the demo model. Each round times both ways, and both give as many tokens. `in_turn_over_batch` is
the median of each round's ratio: 1 where a turn serves both streams, and nearly 2 where each took steps of its own.
"""

import argparse
import json
import time
from collections.abc import Iterator

import numpy as np

from jx_neuron import Event, NeuronAutoModelForCausalLM, SamplingParams
from jx_neuron.checkpoint.demo import demo_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a checkpoint")
    parser.add_argument("--backend", choices=["xla", "host"], default="xla")
    parser.add_argument("--positions", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens made of each")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    model = NeuronAutoModelForCausalLM.from_pretrained(
        options.model or demo_model(), batch_size=2, n_positions=options.positions, backend=options.backend, amp="f32"
    ).to_neuron()
    prompts = np.random.default_rng(0).integers(model.settings.vocab_size, size=(2, options.prompt)).tolist()
    sampling = SamplingParams(max_tokens=options.new, eos_token_id=-1)

    def stream(*prompts: list[int]) -> Iterator[Event]:
        return model.generate(prompts, sampling, stream=True)

    def seconds(*streams: Iterator[Event]) -> float:
        began, tokens, under_way = time.perf_counter(), 0, list(streams)
        while under_way:
            for one in tuple(under_way):
                if next(one, None) is None:
                    under_way.remove(one)
                else:
                    tokens += 1
        assert tokens == 2 * options.new
        return time.perf_counter() - began

    def ratio() -> float:
        batch = seconds(stream(*prompts))
        return seconds(*map(stream, prompts)) / batch

    ratio()  # compiles
    ratios = [ratio() for _ in range(options.rounds)]
    print(json.dumps({**vars(options), "in_turn_over_batch": float(np.median(ratios)), "ratios": ratios}, indent=1))


if __name__ == "__main__":
    main()
