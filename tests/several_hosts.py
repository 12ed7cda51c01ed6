"""One process of several, for tests/test_several_hosts.py: RANK COUNT PORT TP FOLDER OUT [what]."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jx_neuron import NeuronAutoModelForCausalLM, SamplingParams, distributed, request_devices

LENGTH = 24
PROMPTS = [[5, 9, 2, 11], [7] * 9, [1, 2, 3], [40, 41, 42, 43, 44, 45]]


def answers(model: Any) -> dict[str, list[Any]]:
    """Greedy and seeded tokens of four prompts at once, and logits."""
    ids = np.array([prompt[:3] for prompt in PROMPTS])
    seeded = SamplingParams(max_tokens=12, temperature=1.0, top_k=20, seed=3)
    greedy = SamplingParams(max_tokens=12, top_k=1)
    return dict(
        greedy=[answer.answers[0].ids for answer in model.generate(PROMPTS, greedy)],
        seeded=[answer.answers[0].ids for answer in model.generate(PROMPTS, seeded)],
        penalized=[a.answers[0].ids for a in model.generate(PROMPTS, SamplingParams(12, repetition_penalty=1.3))],
        sampled=model.sample(ids, LENGTH, top_k=1).tolist(),
        logits=np.asarray(model(ids))[:, :256].tolist(),
    )


def answer_for_ever(model: Any, out: Path) -> None:
    """Says in `out` that it has begun."""
    (out / "ready").touch()
    while True:
        model.sample(np.array([[1, 2, 3]]), LENGTH, top_k=1)
        time.sleep(0.01)


def memory(name: str, process: int | str = "self") -> int:
    """A line of /proc/self/status, or of another process, in bytes."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def main() -> None:
    rank, count, port, tp = map(int, sys.argv[1:5])
    folder, out, what = sys.argv[5], Path(sys.argv[6]), sys.argv[7]
    if count > 1:
        distributed.join(",".join([f"127.0.0.1:{port}"] + ["127.0.0.1"] * (count - 1)), rank)
    if what == "weights":  # what the interpreter, its libraries and a small program take
        from jx_neuron import models
        from jx_neuron.runtime import xla

        request_devices(tp // count)
        assert all((models, xla, jax.jit(jnp.tanh)(np.ones(8, np.float32)).sum() > 1))
        base = memory("VmHWM")
    model = NeuronAutoModelForCausalLM.from_pretrained(
        folder, tp_degree=tp, batch_size=4, n_positions=96, context_length_estimate=32
    )
    if what == "weights":
        model.to_neuron()
        arrays = sum(s.data.nbytes for a in jax.live_arrays() for s in a.addressable_shards)
        (out / f"taken-{rank}.json").write_text(json.dumps([memory("VmHWM") - base, arrays]))
    distributed.follow(model)
    if what == "weights":
        return
    (out / "answers.json").write_text(json.dumps(answers(model)))
    if what != "answers":
        answer_for_ever(model, out)


if __name__ == "__main__":
    os.environ.setdefault("JX_NEURON_CPU_FORMULATION", "instruction-sets")
    main()
