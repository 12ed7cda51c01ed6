"""How XLA compiles on this machine: its options on a CPU, and a cache of what it compiled."""

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

# jaxlib 0.10 gives dots and reductions to YNNPACK by default. It sums all of k in one chain, for twice the error of
# Eigen, which sums in blocks. 0.8.0 knows neither it nor the option.
_WITHOUT_YNNPACK = {"xla_cpu_experimental_ynn_fusion_type": ""} if version("jaxlib") != "0.8.0" else {}

# 16-bit results are rounded where a program says so, as they are on other backends.
_ALWAYS = {"xla_allow_excess_precision": False}

_PRODUCTS = {
    # Sums may be reassociated, without which reductions are not vectorized; infinities and NaNs are honoured.
    "xla_cpu_enable_fast_math": True,
    # Barriers hold until code is emitted, transposes stay out of dots, and reductions are fused with what they reduce.
    "xla_disable_hlo_passes": "cse_barrier_expander,transpose-folding,tree_reduction_rewriter",
}

# LLVM's choice is 256 bits, also where there are 512.
_WIDE_VECTORS = {"xla_cpu_prefer_vector_width": 512}


def options(platform: str, alone: bool, several: bool = False) -> dict[str, Any]:
    """XLA's options for a platform.

    `alone`, for programs of one device, with the products of jx_neuron/runtime/cpu; `several`, where `are_several` is
    true of their rows.
    """
    if platform == "cpu":
        wide = alone and several and "avx512f" in _instruction_sets().split()
        return _ALWAYS | _WITHOUT_YNNPACK | (_PRODUCTS if alone else {}) | (_WIDE_VECTORS if wide else {})
    return _ALWAYS if platform == "gpu" else {}


def precision(platform: str, dtype: Any) -> AbstractContextManager[None]:
    """In this context float32 is multiplied as such, where a GPU would round it to TF32."""
    rounds = platform == "gpu" and dtype == np.float32
    return jax.default_matmul_precision("highest") if rounds else nullcontext()


_LEAST = "jax_persistent_cache_min_compile_time_secs"


@cache
def keep_between_processes() -> None:
    """Has JAX keep compiled programs in the user's cache folder, where JAX was given no folder or told not to.

    JAX_COMPILATION_CACHE_DIR names another folder, and JAX_ENABLE_COMPILATION_CACHE=false keeps none. The folder is of
    this kind of CPU, since programs use its instructions. What took a tenth of a second is worth keeping, where JAX
    would ask for a second of it; JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS says otherwise.
    """
    if jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_dir is None:
        folder = user_cache_path("jx-neuron", appauthor=False) / "xla" / _cpu()
        compilation_cache.set_cache_dir(str(folder))
        if jax.config.jax_persistent_cache_min_compile_time_secs == 1 and _LEAST.upper() not in os.environ:
            jax.config.update(_LEAST, 0.1)
        compilation_cache.reset_cache()


def _cpu() -> str:
    """A name for this kind of CPU: a hash of its instruction sets where the system tells, else its family."""
    instruction_sets = _instruction_sets() or platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(instruction_sets.encode()).hexdigest()[:12]}"


@cache
def _instruction_sets() -> str:
    """Their names, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
