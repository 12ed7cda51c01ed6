"""Modules are imported by the names that they had before they moved, too."""

import subprocess
import sys

import pytest

FORMER = [
    ("jx_neuron.cache", "Cache LayerKV"),
    ("jx_neuron.demo", "demo_model"),
    ("jx_neuron.generation.hf", "HuggingFaceGenerationModelAdapter"),
    ("jx_neuron.generation.options", "Options"),
    ("jx_neuron.hf_config", "HFConfig divisible one_of"),
    ("jx_neuron.lowering.buckets", "Buckets"),
    ("jx_neuron.modeling", "NeuronAutoModelForCausalLM"),
    ("jx_neuron.nn", "ACT Embedding LayerNorm Linear Linears RMSNorm Span attend through"),
    ("jx_neuron.rope", "RopeScaling Rotation rope_half"),
    ("jx_neuron.sharding", "Padding request_devices"),
    ("jx_neuron.testing", "parity"),
    ("jx_neuron.weights", "Copy W from_params"),
]


@pytest.mark.few(3)
@pytest.mark.parametrize(("module", "names"), FORMER)
def test_a_former_path_is_the_same_module(module: str, names: str) -> None:
    """In a process of its own, so that nothing has imported the present one before."""
    code = f"from {module} import {', '.join(names.split())}; import {module} as m; import sys; print(m.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("jx_neuron.")


def test_a_name_of_two_paths_is_one_object() -> None:
    import jx_neuron.rope
    import jx_neuron.weights

    import jx_neuron.checkpoint.weights
    import jx_neuron.nn

    assert jx_neuron.weights.W is jx_neuron.checkpoint.weights.W
    assert jx_neuron.rope.RopeScaling is jx_neuron.nn.RopeScaling


def test_a_module_that_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"jx_neuron\.mamba"):
        import jx_neuron.mamba  # noqa: F401
