"""Eight host devices for the whole suite, so that any test may use tensor parallelism."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
