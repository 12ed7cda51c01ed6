"""How XLA compiles on this machine: its options on a CPU, and a cache of what it compiled."""

import hashlib
import platform
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.errors import JaxRuntimeError
from jax.experimental.compilation_cache import compilation_cache
from platformdirs import user_cache_path

# Sums may be reassociated, without which reductions are not vectorized; infinities and NaNs are honoured. Barriers hold
# until code is emitted.
_ALWAYS = {"xla_cpu_enable_fast_math": True, "xla_disable_hlo_passes": "cse_barrier_expander"}
_LIBRARY = "xla_cpu_experimental_ynn_fusion_type"


@cache
def cpu_options(many: bool) -> dict[str, Any]:
    """Compiler options for programs on a CPU, whose products have `many` rows or not.

    jaxlib's YNNPACK takes transposed matrices as they lie, and sums all of k in one chain; Eigen sums in blocks, for half
    the error, and transposes them first. Where jaxlib has no YNNPACK, Eigen does all.
    """
    with_library = _ALWAYS | {_LIBRARY: "LIBRARY_FUSION_TYPE_DOT" if many else ""}
    try:
        zero = jax.device_put(np.float32(0), jax.local_devices(backend="cpu")[0])
        jax.jit(jnp.negative, compiler_options=with_library).lower(zero).compile()
    except JaxRuntimeError:
        return _ALWAYS
    return with_library


@cache
def keep_between_processes() -> None:
    """Has JAX keep compiled programs in the user's cache folder, where JAX was given no folder or told not to.

    JAX_COMPILATION_CACHE_DIR names another folder, and JAX_ENABLE_COMPILATION_CACHE=false keeps none. The folder is of
    this kind of CPU, since programs use its instructions.
    """
    if jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_dir is None:
        folder = user_cache_path("jx-neuron", appauthor=False) / "xla" / _cpu()
        compilation_cache.set_cache_dir(str(folder))
        compilation_cache.reset_cache()


def _cpu() -> str:
    """A name for this kind of CPU: a hash of its instruction sets where the system tells, else its family."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    told = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"
