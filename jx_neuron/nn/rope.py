"""Rotary position embeddings (Su et al., arXiv:2104.09864), and HF's methods of scaling them.

https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_rope_utils.py
"""

import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from jx_neuron.checkpoint.hf_config import in_range
from jx_neuron.errors import ConfigError
from jx_neuron.nn.ops import ops
from jx_neuron.nn.state import Positions
from jx_neuron.util.arguments import shown

__all__ = [
    "RopeScaling",
    "Rotation",
    "by_layer_type",
    "inverse_frequencies",
    "query_scale",
    "rope_half",
    "rope_interleaved",
    "rotation",
]


class Rotation(NamedTuple):
    """Cosine and sine of each token's angles, float32 [b, t, r/2], r the rotated part of a head."""

    cos_btr: Array
    sin_btr: Array


def inverse_frequencies(r: int, theta: float) -> np.ndarray:
    """theta^(-2i/r) for i < r/2, float32 [r/2]: 1 / theta^(2i/r), rounded after each of its steps as HF's is."""
    exponent_r = (np.arange(0, r, 2, dtype=np.float32) / np.float32(r)).astype(np.float64)
    return np.float32(1) / (theta**exponent_r).astype(np.float32)  # numpy's float32 power is often one float32 off


def rotation(at: Positions, frequencies: Array | np.ndarray, factor: float = 1.0) -> Rotation:
    """Angles position · frequency, for frequencies [r/2], or [b, r/2] where each row has its own."""
    frequencies = jnp.asarray(frequencies)
    angle = at.position_bt[..., None].astype(jnp.float32) * (
        frequencies if frequencies.ndim == 1 else frequencies[:, None]
    )
    return ops().once(Rotation(jnp.cos(angle) * factor, jnp.sin(angle) * factor))


def rope_half(x_btnh: Array, by: Rotation) -> Array:
    """Rotates the pairs (i, i + r/2) of the first r entries of each head and leaves the rest, as Llama does."""
    cos, sin = (jnp.concatenate([angle, angle], axis=-1)[:, :, None] for angle in by)
    r = cos.shape[-1]
    x = x_btnh[..., :r].astype(jnp.float32)
    a, b = jnp.split(x, 2, axis=-1)
    y = (x * cos + jnp.concatenate([-b, a], axis=-1) * sin).astype(x_btnh.dtype)
    return jnp.concatenate([y, x_btnh[..., r:]], axis=-1) if r < x_btnh.shape[-1] else y


def rope_interleaved(x_btnh: Array, by: Rotation) -> Array:
    """Rotates the pairs (2i, 2i + 1) of the first r entries of each head and leaves the rest, as GPT-J does."""
    cos, sin = by.cos_btr[:, :, None], by.sin_btr[:, :, None]
    r = 2 * cos.shape[-1]
    x = x_btnh[..., :r].astype(jnp.float32)
    a, b = x[..., 0::2], x[..., 1::2]
    y = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape).astype(x_btnh.dtype)
    return jnp.concatenate([y, x_btnh[..., r:]], axis=-1)


def query_scale(at: Positions, beta: float, original: int, *, first: int = 0) -> Array:
    """1 + beta · ln(1 + floor(position / original)), float32 [b, t, 1, 1], for positions from `first` on: grows queries
    as Llama 4 and Ministral 3 do.

    https://github.com/huggingface/transformers/blob/main/src/transformers/models/ministral3/modeling_ministral3.py
    """
    stretch_bt = ((at.position_bt + first) // original).astype(jnp.float32)
    return ops().once(1 + beta * jnp.log(1 + stretch_bt))[:, :, None, None]


# which keys of rope_parameters each rope_type needs, and which it may have
_KEYS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, set()),
    "yarn": (
        set(),
        {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    ),
    "longrope": ({"short_factor", "long_factor"}, {"factor", "attention_factor"}),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor"}, set()),
    "proportional": (set(), {"factor"}),
}
_LISTS = {"short_factor", "long_factor"}
_NUMBERS = 1e-9, 1e15  # within these, no product of two overflows float32
_POSITIONS = 1, 2**31 - 1
# what HF writes for any type, and reads where it is needed if at all
_ANY = set("rope_type type rope_theta original_max_position_embeddings partial_rotary_factor finetuned".split())


class RopeScaling:
    """`rope_parameters` of an HF config, or `rope_scaling` of an older one: gives the rotation of a step's positions.

    `h` is the size of a head, of which the first `r` entries are rotated. `rope_theta`, `partial_rotary_factor` and
    `original_max_position_embeddings` are fields of the config. The first two are used if `parameters` has none. The
    third takes precedence over that of `parameters`, as in HF. A decoder that always rotates whole heads, such as
    Llama, gives no `partial_rotary_factor`.

    `also` names keys of `parameters` that the decoder itself reads, all numbers. `unread` names keys that HF does not
    read for their `rope_type`.

    Raises ConfigError for a `rope_type` that HF does not have, for missing keys, and for values that are not legal.
    """

    def __init__(
        self,
        parameters: Mapping[str, Any],
        h: int,
        max_position_embeddings: int,
        rope_theta: float = 10000.0,
        original_max_position_embeddings: int | None = None,
        *,
        partial_rotary_factor: float | None = None,
        also: Collection[str] = (),
    ):
        p = {key: value for key, value in parameters.items() if value is not None}
        self.kind, self.h, self.max_positions = p.get("rope_type", p.get("type", "default")), h, max_position_embeddings
        self.r, self.part = self._rotated(p, partial_rotary_factor)
        p = self._checked(p, also)
        own_original = p.get("original_max_position_embeddings", max_position_embeddings)
        self.original = original_max_position_embeddings or own_original
        in_range("rope_theta", rope_theta, *_NUMBERS)
        self.theta = p.get("rope_theta", float(rope_theta))
        if self.kind == "yarn" and self.theta == 1:
            raise ConfigError("rope_type 'yarn' needs a rope_theta other than 1")
        if self.kind == "longrope" and self.original <= 1:
            raise ConfigError("rope_type 'longrope' needs original_max_position_embeddings above 1")
        self.factor = p.get("factor", 1.0 if self.kind == "proportional" else self.max_positions / self.original)
        self.truncate = bool(parameters.get("truncate", True))  # in HF null is false
        self.parameters = p

    @property
    def rotations(self) -> tuple[int, bool] | None:
        """The length beyond which a prompt's frequencies change, and whether each longer one has its own."""
        limits = {"dynamic": (self.max_positions, True), "longrope": (self.original, False)}
        return limits.get(self.kind)

    def _rotated(self, p: dict[str, Any], default: float | None) -> tuple[int, float]:
        """How many entries of a head are rotated, and the partial_rotary_factor that says so."""
        part, whole = p.get("partial_rotary_factor", 1.0 if default is None else default), self.kind == "proportional"
        in_range("rope_parameters: partial_rotary_factor", part, _NUMBERS[0], 1)
        if part != 1.0 and default is None and not whole:
            raise ConfigError("rope_parameters: partial_rotary_factor is supported as 1.0 alone, the whole head")
        r = self.h if whole else int(self.h * part)
        if r == self.h and r % 2:
            raise ConfigError(f"the head size {r} is odd, and RoPE rotates pairs; set an even head_dim")
        if r < 2 or r % 2:
            raise ConfigError(
                f"partial_rotary_factor={part:.10g} would rotate {r} entries of heads of size {self.h}; legal is an "
                f"even number from 2 to {self.h}"
            )
        return r, part

    def _checked(self, p: dict[str, Any], also: Collection[str]) -> dict[str, Any]:
        """The keys of `p` that are read, with numbers as floats except for lists; the others' names go to `unread`."""
        kind, r = self.kind, self.r
        if not isinstance(kind, str) or kind not in _KEYS:
            raise ConfigError(f"rope_type {shown(kind)} is not supported; it may be one of {', '.join(_KEYS)}")
        needed, optional = _KEYS[kind]
        if missing := needed - set(p):
            raise ConfigError(f"rope_type {kind!r} needs {', '.join(sorted(missing))} in rope_parameters")
        self.unread = sorted(set(p) - needed - optional - _ANY - set(also))
        if nested := next((key for key in self.unread if isinstance(p[key], dict)), None):
            raise ConfigError(f"rope_parameters: {shown(nested)} is an object; legal is one for all layers, of numbers")
        p = {key: p[key] for key in set(p).difference(self.unread)}
        for key in _LISTS & set(p):
            if not isinstance(p[key], list) or len(p[key]) != r // 2:
                raise ConfigError(f"rope_parameters: {key} should be {r // 2} numbers where {r} of a head are rotated")
        numbers = set(p) - {"rope_type", "type", "finetuned", "truncate"}
        for key in numbers:
            limits = _POSITIONS if key == "original_max_position_embeddings" else _NUMBERS
            for value in p[key] if key in _LISTS else [p[key]]:
                in_range(f"rope_parameters: {key}", value, *limits)
        if not isinstance(p.get("truncate", True), bool):
            raise ConfigError(f"rope_parameters: truncate={shown(p['truncate'])} should be true, false or null")
        if kind == "dynamic" and r < 4:
            raise ConfigError(f"rope_type 'dynamic' needs 4 or more rotated entries of a head, not {r}")
        if kind == "llama3" and p["low_freq_factor"] >= p["high_freq_factor"]:
            raise ConfigError("rope_type 'llama3' needs a high_freq_factor greater than its low_freq_factor")
        return p | {key: float(p[key]) for key in numbers - _LISTS - {"original_max_position_embeddings"}}

    def mscale(self, weight: float = 1.0) -> float:
        """0.1 · weight · ln(factor) + 1, by which YaRN scales attention (arXiv:2309.00071)."""
        return 1.0 if self.factor <= 1 else 0.1 * weight * math.log(self.factor) + 1.0

    def __call__(self, at: Positions) -> Rotation:
        base = inverse_frequencies(self.r, self.theta)
        match self.kind:
            case "linear":
                return rotation(at, base / np.float32(self.factor))
            case "dynamic":
                return rotation(at, self._dynamic(at.extent_b))
            case "yarn":
                return rotation(at, *self._yarn(base))
            case "longrope":
                return self._longrope(at, base)
            case "llama3":
                return rotation(at, self._llama3(base))
            case "proportional":
                return rotation(at, self._proportional())
        return rotation(at, base)

    def _dynamic(self, extent_b: Array) -> Array:
        # theta · (factor · max(extent, M) / M - (factor - 1))^(r / (r - 2)); so written, no great factor cancels
        ratio_b = jnp.maximum(extent_b, self.max_positions).astype(jnp.float32) / self.max_positions
        theta_b = self.theta * (1 + self.factor * (ratio_b - 1)) ** (self.r / (self.r - 2))
        exponent_r = np.arange(0, self.r, 2, dtype=np.float32) / self.r
        return 1.0 / theta_b[:, None] ** exponent_r

    def _yarn(self, base: np.ndarray) -> tuple[np.ndarray, float]:
        # Peng et al., arXiv:2309.00071
        p, factor = self.parameters, self.factor
        attention = p.get("attention_factor")
        if attention is None:
            one, every = p.get("mscale"), p.get("mscale_all_dim")
            attention = self.mscale(one) / self.mscale(every) if one and every else self.mscale()

        def dimension(turns: float) -> float:
            return self.r * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = dimension(p.get("beta_fast") or 32), dimension(p.get("beta_slow") or 1)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.r - 1)
        ramp_r = np.clip((np.arange(self.r // 2, dtype=np.float32) - low) / (high - low or 0.001), 0, 1)
        return (base / factor * ramp_r + base * (1 - ramp_r)).astype(np.float32), attention

    def _longrope(self, at: Positions, base: np.ndarray) -> Rotation:
        # Ding et al., arXiv:2402.13753
        p = self.parameters
        attention = p.get("attention_factor")
        if attention is None:
            attention = 1.0 if self.factor <= 1 else math.sqrt(1 + math.log(self.factor) / math.log(self.original))
        short_r, long_r = (base / np.asarray(p[key], np.float32) for key in ("short_factor", "long_factor"))
        return rotation(at, jnp.where(at.extent_b[:, None] > self.original, long_r, short_r), attention)

    def _llama3(self, base: np.ndarray) -> np.ndarray:
        # https://github.com/meta-llama/llama-models: interpolate the long waves, keep the short, blend between
        low, high = self.parameters["low_freq_factor"], self.parameters["high_freq_factor"]
        smooth = np.clip((self.original * base / (2 * np.pi) - low) / (high - low), 0, 1)
        return ((1 - smooth) * base / self.factor + smooth * base).astype(np.float32)

    def _proportional(self) -> np.ndarray:
        # the first pairs as in a whole head; the others are not rotated
        rotated = int(self.part * self.h // 2)
        frequencies_r = inverse_frequencies(self.h, self.theta) / np.float32(self.factor)
        return np.where(np.arange(self.h // 2) < rotated, frequencies_r, np.float32(0))


def by_layer_type(parameters: Mapping[str, Any], layer_types: Collection[str]) -> dict[str, Mapping[str, Any] | None]:
    """`rope_parameters` of each layer type: the entry that has its name, or where none has, the same for all.

    An entry that is None is one of layers without positions. Raises ConfigError for a layer type without an entry.
    """
    if not (nested := [kind for kind in layer_types if kind in parameters]):
        return dict.fromkeys(layer_types, parameters)
    for kind in layer_types:
        if kind not in nested or not isinstance(parameters[kind], Mapping | None):
            raise ConfigError(
                f"rope_parameters: {kind}={shown(parameters.get(kind))} is not supported; legal is an object for each "
                f"layer type, {', '.join(layer_types)}"
            )
    return {kind: parameters[kind] for kind in layer_types}
