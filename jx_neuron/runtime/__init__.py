"""Runtimes of steps: through `jax.jit`, as lowered programs on the host, or on NeuronCores."""
