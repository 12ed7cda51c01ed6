"""How this CPU multiplies matrices fastest: by its instruction sets, and by measuring it once.

CPUs differ: with AMX, bfloat16 is multiplied five times as fast as float32, and with AVX2 no faster. Vectors of 512
bits read memory faster on some, and slower on others (docs/notes/cpu-decode.md and cpu-prefill.md).
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import BaseModel, ConfigDict

from jx_neuron.errors import ConfigError
from jx_neuron.runtime import xla_options
from jx_neuron.runtime.cpu.kernel import CLASSES, FEW, Formulation, matmul_packed, to_bits
from jx_neuron.util.arguments import shown
from jx_neuron.util.durable import write_file
from jx_neuron.util.parsing import parse_json, read_json_file, typed
from jx_neuron.util.progress import track

VARIABLE = "JX_NEURON_CPU_FORMULATION"
"""`measure` (the default), `instruction-sets`, or a JSON object that pins the formulation of each dtype."""

SECONDS = 1.0
"""How long a dtype is measured at most; what is not measured by then stays as the instruction sets have it."""

GAIN = 0.9
"""Another formulation is taken where it needs less than this part of the time."""

BYTES, WIDTH = 64 * 2**20, 1024
"""Of the matrix that is multiplied, more than a cache holds, and its inputs."""

ROUNDS = 5

MANY = 128
"""Rows by which the dots of prefill are compared."""


class Chosen(NamedTuple):
    """A formulation, and why: "pinned", "measured" or "instruction sets"."""

    formulation: Formulation
    reason: str


class _Kept(BaseModel):
    """Formulations by dtype or form, as a file or the variable has them."""

    model_config = ConfigDict(extra="forbid")

    float32: Formulation | None = None
    bfloat16: Formulation | None = None
    float16: Formulation | None = None
    int8: Formulation | None = None
    fp8: Formulation | None = None
    int4: Formulation | None = None


def choose(dtype: Any) -> Chosen:
    """The formulation for matrices of `dtype` on this CPU.

    It is measured once for a kind of CPU and a jaxlib, in at most a second, and kept with the compiled programs. The
    environment variable JX_NEURON_CPU_FORMULATION pins it, or has it follow from the instruction sets alone.

    Raises ConfigError where the variable is none of what it may be.
    """
    return _choose(jnp.dtype(dtype).name, os.environ.get(VARIABLE, "measure"))


def of_codes(kind: str) -> Formulation:
    """The formulation for int8, fp8 or int4, which follows from the instruction sets unless it is pinned."""
    setting = os.environ.get(VARIABLE, "measure")
    pinned = None if setting in ("measure", "instruction-sets") else getattr(_pinned(setting), kind)
    names = xla_options.instruction_sets()
    tiles = "amx_int8" in names
    multiplies = xla_options.HAS_YNNPACK and not names.isdisjoint(("amx_int8", "avx512_vnni", "avx_vnni"))
    dots = kind == "int8" and multiplies
    wide = CLASSES if tiles or (kind == "int4" and "avx512f" in names) else ()
    return pinned or Formulation(wide, FEW // 2 if dots and tiles else FEW, "ynnpack" if dots else "eigen")


@cache
def _choose(dtype: str, setting: str) -> Chosen:
    usual = by_instruction_sets(dtype, xla_options.instruction_sets())
    if setting == "instruction-sets":
        return Chosen(usual, "instruction sets")
    if setting != "measure":
        pinned = getattr(_pinned(setting), dtype)
        return Chosen(pinned or usual, "pinned" if pinned else "instruction sets")
    path = _path()
    if path is not None and (kept := getattr(_read(path), dtype)):
        return Chosen(kept, "measured")
    measured = measure(dtype, usual)
    if path is not None:
        with suppress(OSError):  # the next process then measures again
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = _read(path).model_copy(update={dtype: measured})
            write_file(path, kept.model_dump_json(indent=1, exclude_none=True).encode())
    return Chosen(measured, "measured")


def by_instruction_sets(dtype: str, names: frozenset[str]) -> Formulation:
    """The fastest forms on CPUs with these instruction sets, by the names of /proc/cpuinfo."""
    wide: tuple[int, ...] = () if "avx512f" not in names else (1, 8) if "amx_tile" in names else (8,)
    if dtype == "float32":
        return Formulation(wide, FEW, "eigen")
    multiplies = dtype == "bfloat16" and xla_options.HAS_YNNPACK and not names.isdisjoint(("amx_bf16", "avx512_bf16"))
    return Formulation(wide, FEW if "amx_tile" in names else 4 * FEW, "ynnpack" if multiplies else "eigen")


def measure(dtype: str, usual: Formulation, seconds: float = SECONDS) -> Formulation:
    """The fastest formulation, as far as `seconds` suffice; beyond, it is `usual`."""
    ends, result = time.perf_counter() + seconds, usual
    size = BYTES // jnp.dtype(dtype).itemsize // WIDTH
    values = np.random.default_rng(0).standard_normal((size, WIDTH), np.float32)
    w_nk = jnp.asarray(to_bits(values.astype(dtype)))
    comparisons = list(_comparisons(dtype))
    for rows, entries, change in track(comparisons, "measuring this CPU", len(comparisons)):
        if time.perf_counter() < ends:
            result = _faster(w_nk[:entries], dtype, rows, result, change(result))
    return result


def _comparisons(dtype: str) -> Iterator[tuple[int, int | None, Callable[[Formulation], Formulation]]]:
    """Rows, how much of the matrix they meet (None for all), and the change that is tried; what matters most first."""
    narrow = jnp.dtype(dtype).itemsize == 2
    if narrow and xla_options.HAS_YNNPACK:  # not for float32: YNNPACK sums with twice Eigen's error
        yield MANY, 4 * WIDTH, _other_dot
    if "avx512f" in xla_options.instruction_sets():
        yield from ((rows, None, partial(_other_width, rows=rows)) for rows in CLASSES)
    if narrow:
        yield from ((rows, None, partial(_other_passes, rows=rows)) for rows in (2 * FEW, 4 * FEW))


def _other_dot(form: Formulation) -> Formulation:
    return replace(form, dot="eigen" if form.dot == "ynnpack" else "ynnpack")


def _other_width(form: Formulation, rows: int) -> Formulation:
    return replace(form, wide=tuple(sorted({*form.wide} ^ {rows})))


def _other_passes(form: Formulation, rows: int) -> Formulation:
    return replace(form, passes=rows // 2 if form.in_passes(rows) else rows)


def _faster(w_nk: jax.Array, dtype: str, rows: int, usual: Formulation, other: Formulation) -> Formulation:
    """`other` where it needs less than GAIN of the time that `usual` does."""
    x_mk = jnp.ones((rows, w_nk.shape[1]), dtype)
    programs = [
        jax.jit(
            partial(matmul_packed, dtype=dtype, formulation=form),
            compiler_options=xla_options.options("cpu", form, rows),
        )
        .lower(x_mk, w_nk)
        .compile()
        for form in (usual, other)
    ]
    times: list[list[float]] = [[], []]
    for _ in range(ROUNDS):
        for program, seconds in zip(programs, times, strict=True):
            began = time.perf_counter()
            jax.block_until_ready(program(x_mk, w_nk))
            seconds.append(time.perf_counter() - began)
    before, after = map(min, times)
    return other if after < GAIN * before else usual


def _path() -> Path | None:
    """The file of what was measured; None where JAX keeps no programs in a folder of this machine."""
    folder = jax.config.jax_compilation_cache_dir
    if not jax.config.jax_enable_compilation_cache or not folder or "://" in folder:
        return None
    return Path(folder) / f"matmul-{xla_options.cpu()}-jaxlib-{version('jaxlib')}.json"


def _read(path: Path) -> _Kept:
    """The contents of the file; empty if it does not exist or is damaged."""
    with suppress(ConfigError):
        return typed(_Kept, read_json_file(path, ConfigError), str(path), ConfigError)
    return _Kept()


def _pinned(setting: str) -> _Kept:
    try:
        return typed(_Kept, parse_json(setting.encode(), VARIABLE, ConfigError), VARIABLE, ConfigError)
    except ConfigError as raised:
        example = json.dumps({"float32": asdict(by_instruction_sets("float32", frozenset()))})
        raise ConfigError(
            f"{VARIABLE}={shown(setting)}: {raised} Legal are measure, instruction-sets, and formulations by dtype, "
            f"such as {example}"
        ) from None
