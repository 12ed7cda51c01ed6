"""Eight host devices for the whole suite, so that any test may use tensor parallelism; one thread for torch and BLAS.

Tests run side by side, and threads that wait for work by spinning would take the others' cores.
"""

import os
import random
from collections import defaultdict

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JX_NEURON_CPU_FORMULATION", "instruction-sets")  # what is measured is another each time

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the cases of a test marked few(n), n drawn by its name run by default, and the others are slow."""
    cases = defaultdict(list)
    for item in items:
        if item.get_closest_marker("few") and not item.get_closest_marker("slow"):
            cases[item.nodeid.partition("[")[0]].append(item)
    for name, of_test in cases.items():
        (few,) = of_test[0].get_closest_marker("few").args
        kept = random.Random(name).sample(range(len(of_test)), min(few, len(of_test)))
        for number, item in enumerate(of_test):
            if number not in kept:
                item.add_marker(pytest.mark.slow)


@pytest.fixture
def kept_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoders that a test registers are forgotten after it."""
    from jx_neuron.models import registry

    monkeypatch.setattr(registry, "FAMILIES", dict(registry.FAMILIES))
