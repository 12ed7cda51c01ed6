"""The dtypes of a model, as users name them."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jx_neuron.errors import ConfigError
from jx_neuron.util.arguments import shown

AMP = {"f32": jnp.float32, "f16": jnp.float16, "bf16": jnp.bfloat16}
_LONG = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "fp32": "f32", "fp16": "f16"}


def dtype_of(amp: str) -> np.dtype[Any]:
    """The dtype of weights and state. Raises ConfigError unless `amp` is f32, f16 or bf16 (or its long name).

    >>> dtype_of("bf16").itemsize
    2
    """
    short = _LONG.get(amp, amp)
    if short not in AMP:
        raise ConfigError(f"dtype {amp!r} is not supported; it may be one of {', '.join([*AMP, *_LONG])}")
    return np.dtype(AMP[short])


def amp_of(dtype: Any) -> str:
    """The `amp` of a dtype of numpy, jax or torch, or of its name. Raises ConfigError for one that no model has.

    >>> amp_of(jnp.bfloat16), amp_of("float32"), amp_of(np.dtype("float16"))
    ('bf16', 'f32', 'f16')
    """
    name = dtype.removeprefix("torch.") if isinstance(dtype, str) else str(dtype).removeprefix("torch.")
    if not isinstance(dtype, str) and name not in _LONG:
        try:
            name = np.dtype(dtype).name
        except TypeError:
            name = ""
    short = _LONG.get(name, name)
    if short not in AMP:
        legal = ", ".join([*AMP, *_LONG])
        raise ConfigError(
            f"dtype={shown(dtype)} is not supported; it may be one of {legal}, or such a dtype of numpy, jax or torch"
        )
    return short
