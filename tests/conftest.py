"""Eight host devices for the whole suite, so that any test may use tensor parallelism; one thread for torch and BLAS.

Tests run side by side, and threads that wait for work by spinning would take the others' cores.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JX_NEURON_CPU_FORMULATION", "instruction-sets")  # what is measured is another each time

import hypothesis
import jax

jax.config.update("jax_num_cpu_devices", 8)

hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")
