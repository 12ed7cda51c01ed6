"""XLA's compiler options on this machine, and its cache of compiled programs."""

import hashlib
import os
import platform
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from platformdirs import user_cache_path

if TYPE_CHECKING:
    from jx_neuron.runtime.cpu.kernel import Formulation

HAS_YNNPACK = version("jaxlib") != "0.8.0"
"""Whether jaxlib has YNNPACK, and the option that says what it computes."""

# By default it runs dots and reductions. It sums all of k in one chain, with twice the error of Eigen, which sums in
# blocks.
_WITHOUT_YNNPACK = {"xla_cpu_experimental_ynn_fusion_type": ""} if HAS_YNNPACK else {}

# Dots alone, each by itself: what would be fused with them is slower.
_YNNPACK_DOTS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}

# 16-bit results are rounded where a program says so, as on other backends.
_ALWAYS = {"xla_allow_excess_precision": False}

_MATMULS = {
    # Sums may be reassociated, without which reductions are not vectorized; infinities and NaNs are honoured.
    "xla_cpu_enable_fast_math": True,
    # Keeps barriers until code is emitted, transposes out of dots, and reductions fused with their operands.
    "xla_disable_hlo_passes": "cse_barrier_expander,transpose-folding,tree_reduction_rewriter",
}

_WIDE_VECTORS = {"xla_cpu_prefer_vector_width": 512}


def options(
    platform: str, formulation: "Formulation | None" = None, rows: int = 0, codes: "Sequence[Formulation]" = ()
) -> dict[str, Any]:
    """XLA's options for a platform.

    formulation: how the matmuls of jx_neuron/runtime/cpu are computed; None where these are not in use.
    rows:        of those matmuls.
    codes:       how those with quantized matrices are.
    """
    if platform != "cpu":
        return _ALWAYS if platform == "gpu" else {}
    if formulation is None:
        return _ALWAYS | _WITHOUT_YNNPACK
    forms = (formulation, *codes)
    by_ynnpack = any(form.dot == "ynnpack" and not form.in_passes(rows) for form in forms)
    dots = _YNNPACK_DOTS if by_ynnpack else _WITHOUT_YNNPACK
    wide = _WIDE_VECTORS if forms[-1].is_wide(rows) else {}
    return _ALWAYS | _MATMULS | dots | wide


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
        folder = user_cache_path("jx-neuron", appauthor=False) / "xla" / cpu()
        compilation_cache.set_cache_dir(str(folder))
        if jax.config.jax_persistent_cache_min_compile_time_secs == 1 and _LEAST.upper() not in os.environ:
            jax.config.update(_LEAST, 0.1)
        compilation_cache.reset_cache()


def cpu() -> str:
    """A name of this kind of CPU: a hash of its instruction sets, or of its family where those are unknown."""
    known = " ".join(sorted(instruction_sets())) or platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(known.encode()).hexdigest()[:12]}"


@cache
def instruction_sets() -> frozenset[str]:
    """The CPU's instruction sets by name; empty where the system does not list them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    _, _, names = next((line for line in lines if line.startswith(("flags", "Features"))), "").partition(":")
    return frozenset(names.split())
