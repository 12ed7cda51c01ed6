"""What a checkpoint answers at several tensor-parallel degrees. As a script: FOLDER OUT.npz DEVICES DEGREE..."""

import sys
from pathlib import Path

import numpy as np

LENGTH = 40


def prompts(vocab: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab, (2, 9))


def answers(folder: Path, tp_degree: int, vocab: int) -> dict[str, np.ndarray]:
    """Logits after the prompts, and tokens: greedy in the first row, drawn with a seed in the second."""
    from jx_neuron import NeuronAutoModelForCausalLM

    model = NeuronAutoModelForCausalLM.from_pretrained(
        folder, batch_size=2, n_positions=LENGTH, context_length_estimate=16, tp_degree=tp_degree, backend="xla"
    )
    ids = prompts(vocab)
    return {
        "logits": model(ids),
        "tokens": model.sample(ids, LENGTH, top_k=[1, 20], top_p=0.95, temperature=1.2, seed=3),
    }


if __name__ == "__main__":
    import jax

    folder, out, devices, vocab, *degrees = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", int(devices))
    mine, doubled = jax.numpy.arange(4), jax.jit(lambda x: 2 * x)
    np.testing.assert_array_equal(doubled(mine), [0, 2, 4, 6])  # from here on JAX has these devices and no others
    found = {}
    for degree in degrees:
        for name, array in answers(Path(folder), int(degree), int(vocab)).items():
            found[f"{degree}.{name}"] = array
    np.testing.assert_array_equal(doubled(mine) + mine, [0, 3, 6, 9])
    assert len(jax.devices()) == int(devices)
    np.savez(out, **found)
