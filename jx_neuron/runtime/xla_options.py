"""XLA's compiler options on this machine, and its cache of compiled programs."""

import hashlib
import os
import platform
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from platformdirs import user_cache_path

# jaxlib 0.10 runs dots and reductions by YNNPACK by default. That sums all of k in one chain, with twice the error of
# Eigen, which sums in blocks. 0.8.0 has neither YNNPACK nor the option.
_WITHOUT_YNNPACK = {"xla_cpu_experimental_ynn_fusion_type": ""} if version("jaxlib") != "0.8.0" else {}

# 16-bit results are rounded where a program says so, as on other backends.
_ALWAYS = {"xla_allow_excess_precision": False}

_MATMULS = {
    # Sums may be reassociated, without which reductions are not vectorized; infinities and NaNs are honoured.
    "xla_cpu_enable_fast_math": True,
    # Keeps barriers until code is emitted, transposes out of dots, and reductions fused with their operands.
    "xla_disable_hlo_passes": "cse_barrier_expander,transpose-folding,tree_reduction_rewriter",
}

# LLVM prefers 256 bits, also where the CPU has 512.
_WIDE_VECTORS = {"xla_cpu_prefer_vector_width": 512}


def options(platform: str, single_device: bool, many_rows: bool = False) -> dict[str, Any]:
    """XLA's options for a platform.

    single_device: whether programs run on one device, with the matmuls of jx_neuron/runtime/cpu.
    many_rows:     whether `are_several` is true of their rows.
    """
    if platform == "cpu":
        wide = single_device and many_rows and "avx512f" in _instruction_sets().split()
        return _ALWAYS | _WITHOUT_YNNPACK | (_MATMULS if single_device else {}) | (_WIDE_VECTORS if wide else {})
    return _ALWAYS if platform == "gpu" else {}


def precision(platform: str, dtype: Any) -> AbstractContextManager[None]:
    """In this context a GPU multiplies float32 without rounding it to TF32."""
    rounds = platform == "gpu" and dtype == np.float32
    return jax.default_matmul_precision("highest") if rounds else nullcontext()


_LEAST = "jax_persistent_cache_min_compile_time_secs"


@cache
def keep_between_processes() -> None:
    """Enables JAX's persistent compilation cache in the user's cache folder, unless JAX is configured otherwise.

    JAX_COMPILATION_CACHE_DIR names another folder, and JAX_ENABLE_COMPILATION_CACHE=false disables the cache. Each kind
    of CPU has its own folder, since programs use its instructions. Compilations of 0.1 s or more are cached; JAX's
    default is 1 s. JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS sets another time.
    """
    if jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_dir is None:
        folder = user_cache_path("jx-neuron", appauthor=False) / "xla" / _cpu()
        compilation_cache.set_cache_dir(str(folder))
        if jax.config.jax_persistent_cache_min_compile_time_secs == 1 and _LEAST.upper() not in os.environ:
            jax.config.update(_LEAST, 0.1)
        compilation_cache.reset_cache()


def _cpu() -> str:
    """A name of this kind of CPU: a hash of its instruction sets, or of its family where those are unknown."""
    instruction_sets = _instruction_sets() or platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(instruction_sets.encode()).hexdigest()[:12]}"


@cache
def _instruction_sets() -> str:
    """The CPU's instruction sets by name; empty where the system does not list them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
