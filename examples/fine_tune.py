"""Fine-tune a model on a text file with optax, and save it for Hugging Face transformers.

    python examples/fine_tune.py demo my-text.txt my-model --steps 50

It needs the extra `train`, and 8 GB of memory for SmolLM2-135M in float32.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jx_neuron import AutoModelForCausalLM
from jx_neuron.checkpoint.demo import demo_model


def sequences(model, text: str, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a text in rows [n, length + 1], and a mask that is 0 on the padding of the last row."""
    ids = np.array(model.tokenizer(text)["input_ids"], np.int32)
    rows = -(-len(ids) // (length + 1))
    padding = rows * (length + 1) - len(ids)
    mask = np.pad(np.ones_like(ids), (0, padding))
    return np.pad(ids, (0, padding)).reshape(rows, -1), mask.reshape(rows, -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help='a checkpoint folder, .gguf file or hub id, or "demo"')
    parser.add_argument("text", type=Path, help="a text file")
    parser.add_argument("output", type=Path, help="a new folder, for the checkpoint")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=2, help="sequences of a step")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--train", default="", help="train only parameters with this text in their path")
    options = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(demo_model() if options.model == "demo" else options.model)
    ids, mask = sequences(model, options.text.read_text(), options.length)
    params = model.params
    trained = {path: array for path, array in params.items() if options.train in path}
    if not trained:
        parser.error(f"no parameter has {options.train!r} in its path; paths are {', '.join(list(params)[:8])} …")
    frozen = {path: array for path, array in params.items() if path not in trained}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(options.learning_rate, weight_decay=0.0))

    def loss(trained, frozen, ids_bt, mask_bt):
        logits_btv = model.apply({**trained, **frozen}, ids_bt[:, :-1])
        losses_bt = optax.softmax_cross_entropy_with_integer_labels(logits_btv, ids_bt[:, 1:])
        return jnp.sum(losses_bt * mask_bt[:, 1:]) / jnp.sum(mask_bt[:, 1:])

    @jax.jit
    def train_step(trained, frozen, moments, ids_bt, mask_bt):
        value, gradients = jax.value_and_grad(loss)(trained, frozen, ids_bt, mask_bt)
        updates, moments = optimizer.update(gradients, moments, trained)
        return optax.apply_updates(trained, updates), moments, value

    first = ids[: options.batch], mask[: options.batch]
    measured, moments = jax.jit(loss), optimizer.init(trained)
    before, began, random = measured(trained, frozen, *first), time.perf_counter(), np.random.default_rng(0)
    for step in range(1, options.steps + 1):
        rows = random.integers(0, len(ids), options.batch)
        trained, moments, value = train_step(trained, frozen, moments, ids[rows], mask[rows])
        if step == 1 or step % 10 == 0 or step == options.steps:
            print(f"step {step}: loss {value:.3f}, {time.perf_counter() - began:.0f} s", flush=True)
    after = measured(trained, frozen, *first)
    print(f"loss on the first {len(first[0])} sequences: {before:.3f} before, {after:.3f} after")

    model.params = {**trained, **frozen}
    print(f"saved in {model.save_pretrained(options.output)}")


if __name__ == "__main__":
    main()
