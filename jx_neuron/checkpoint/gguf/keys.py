"""The keys of a GGUF file's architecture, and what they say of rotary position embeddings.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#llm
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from jx_neuron.checkpoint.gguf.format import GGUF, load
from jx_neuron.errors import CheckpointError
from jx_neuron.util.arguments import shown
from jx_neuron.util.parsing import MOST_INT, typed

INSTEAD = "Use the model's Hugging Face checkpoint."
DIVISORS = "rope_freqs.weight"  # of the frequencies
SHORT, LONG = "rope_factors_short.weight", "rope_factors_long.weight"
ROPE_TENSORS = {DIVISORS, SHORT, LONG}

Size = Annotated[int, Field(ge=1, le=MOST_INT)]
Real = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Factor = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Keys(BaseModel):
    """The keys that many architectures have; their names go without the architecture's, which is before them."""

    model_config = ConfigDict(strict=True, extra="allow")
    block_count: Size
    context_length: Size
    embedding_length: Size
    feed_forward_length: Size | None = None
    vocab_size: Size | None = None
    heads: Size = Field(alias="attention.head_count")
    kv_heads: Size | None = Field(None, alias="attention.head_count_kv")
    key_length: Size | None = Field(None, alias="attention.key_length")
    value_length: Size | None = Field(None, alias="attention.value_length")
    rms_epsilon: Real | None = Field(None, alias="attention.layer_norm_rms_epsilon")
    epsilon: Real | None = Field(None, alias="attention.layer_norm_epsilon")
    rotated: Size | None = Field(None, alias="rope.dimension_count")
    rope_theta: Real = Field(10000.0, alias="rope.freq_base")
    scale_linear: Factor = Field(1.0, alias="rope.scale_linear")
    scaling: str = Field("linear", alias="rope.scaling.type")
    factor: Factor | None = Field(None, alias="rope.scaling.factor")
    original_length: Size | None = Field(None, alias="rope.scaling.original_context_length")
    attention_factor: Real | None = Field(None, alias="rope.scaling.attn_factor")
    yarn_attention_factor: Real | None = Field(None, alias="rope.scaling.yarn_attn_factor")
    beta_fast: Real | None = Field(None, alias="rope.scaling.yarn_beta_fast")
    beta_slow: Real | None = Field(None, alias="rope.scaling.yarn_beta_slow")
    log_multiplier: float | None = Field(None, alias="rope.scaling.yarn_log_multiplier")


class Windows(BaseModel):
    """The keys of sliding windows."""

    model_config = ConfigDict(strict=True)
    size: Annotated[int, Field(ge=0, le=MOST_INT)] = Field(0, alias="attention.sliding_window")
    pattern: list[Any] | Size | None = Field(None, alias="attention.sliding_window_pattern")
    rope_theta: Real | None = Field(None, alias="rope.freq_base_swa")


@dataclass(frozen=True)
class Header:
    """The description of a model in a file: the keys of its architecture, and the shapes of its tensors.

    several: keys that may have a number for each layer; `keys` has the first of them.
    """

    file: GGUF
    architecture: str
    several: Collection[str] = ()

    @cached_property
    def fields(self) -> dict[str, Any]:
        """The keys, without the architecture's name."""
        prefix = f"{self.architecture}."
        return {k.removeprefix(prefix): v for k, v in self.file.metadata.items() if k.startswith(prefix)}

    @cached_property
    def keys(self) -> Keys:
        """The keys that many architectures have. Raises CheckpointError for a wrong type, and where one is missing."""
        several = ((key, self.fields.get(key)) for key in self.several)
        first = {key: values[0] for key, values in several if isinstance(values, list) and values}
        return typed(Keys, self.fields | first, str(self.file.path), prefix=f"{self.architecture}.")

    @cached_property
    def windows(self) -> Windows:
        """Those of sliding windows."""
        return typed(Windows, self.fields, str(self.file.path), prefix=f"{self.architecture}.")

    @property
    def kv_heads(self) -> int:
        return self.keys.kv_heads or self.keys.heads

    @property
    def head_dim(self) -> int:
        return self.keys.key_length or self.keys.embedding_length // self.keys.heads

    @property
    def rotated(self) -> int:
        """How many entries of a head are rotated."""
        return self.keys.rotated or self.head_dim

    def by_layer(self, key: str) -> list[Any]:
        """The values of a key that may have one for all layers or one for each."""
        layers, value = self.keys.block_count, self.fields.get(key)
        values = value if isinstance(value, list) else [value] * layers
        if len(values) != layers:
            raise self.refusal(key, value, f"legal is one number, or one for each of {layers} layers")
        return values

    def has(self, name: str) -> bool:
        """Whether there is such a tensor in the first layer."""
        return f"blk.0.{name}" in self.file.entries

    def refusal(self, key: str, value: Any, why: str) -> CheckpointError:
        return CheckpointError(
            f"{self.file.path}: {self.architecture}.{key} = {shown(value)} is not supported: {why}. {INSTEAD}"
        )

    def sliding(self, period: int) -> list[str] | None:
        """HF's layer_types: those of the file's pattern, or where it has none, all but each `period`-th with a window.

        None where there is no window.
        """
        layers, pattern = self.keys.block_count, self.windows.pattern
        if not self.windows.size:
            return None
        if isinstance(pattern, list):
            if len(pattern) != layers or not all(isinstance(slide, bool) for slide in pattern):
                legal = f"legal is true or false for each of {layers} layers"
                raise self.refusal("attention.sliding_window_pattern", pattern, legal)
            slides = pattern
        else:
            slides = [(layer + 1) % (pattern or period) != 0 for layer in range(layers)]
        return ["sliding_attention" if slide else "full_attention" for slide in slides]

    def partial(self) -> float:
        """HF's partial_rotary_factor: that of which HF makes the number of rotated entries."""
        part = self.rotated / self.head_dim
        return part if int(self.head_dim * part) == self.rotated else math.nextafter(part, 1)

    def rope(self) -> dict[str, Any]:
        """HF's rope_parameters, of all layers."""
        keys = self.keys
        factor = (keys.scale_linear if keys.factor is None else keys.factor) or 1.0
        plain = {"rope_type": "default", "rope_theta": keys.rope_theta}
        if DIVISORS in self.file.entries:
            if factor != 1.0:
                raise self.refusal("rope.scaling.factor", factor, f"legal is 1.0, with {DIVISORS}")
            return plain | self._divided()
        if keys.scaling == "longrope" or {SHORT, LONG} & set(self.file.entries):
            return plain | self._longrope()
        self._only("rope.scaling.attn_factor", keys.attention_factor)
        if keys.scaling != "yarn":
            self._only("rope.scaling.yarn_attn_factor", keys.yarn_attention_factor)
        if keys.scaling == "none" or (keys.scaling == "linear" and factor == 1.0):
            return plain
        if keys.scaling == "linear":
            return plain | {"rope_type": "linear", "factor": factor}
        if keys.scaling == "yarn":
            rest = {
                "attention_factor": keys.yarn_attention_factor,
                "beta_fast": keys.beta_fast,
                "beta_slow": keys.beta_slow,
            }
            if keys.log_multiplier:  # https://github.com/ggml-org/llama.cpp/blob/master/src/llama-context.cpp
                rest |= {"mscale": 1.0, "mscale_all_dim": keys.log_multiplier}
            return plain | {
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": keys.original_length or keys.context_length,
                **{name: value for name, value in rest.items() if value is not None},
            }
        raise self.refusal("rope.scaling.type", keys.scaling, "legal are 'none', 'linear', 'yarn' and 'longrope'")

    def _only(self, key: str, factor: float | None) -> None:
        """Raises CheckpointError unless a factor of cosine and sine is 1, where HF's rotation has none."""
        if factor not in (None, 1.0):
            raise self.refusal(key, factor, "legal is 1.0")

    def factors(self, name: str) -> np.ndarray:
        """The factors that divide frequencies, float64 [rotated / 2]."""
        entry = self.file.entries.get(name)
        if entry is None or entry.shape != (self.rotated // 2,):
            found = "missing" if entry is None else f"of shape {list(entry.shape)}"
            raise CheckpointError(
                f"{self.file.path}: tensor {name!r} is {found}; legal is one factor for each of the "
                f"{self.rotated // 2} frequencies. {INSTEAD}"
            )
        factors = load(self.file.path, entry).astype(np.float64)
        if not (np.isfinite(factors) & (factors > 0)).all():
            raise CheckpointError(f"{self.file.path}: tensor {name!r} has factors that are not positive. {INSTEAD}")
        return factors

    def _longrope(self) -> dict[str, Any]:
        keys = self.keys
        original = keys.original_length or keys.context_length
        scale = keys.context_length / original
        usual = 1.0 if scale <= 1 else math.sqrt(1 + math.log(scale) / math.log(original))
        given = usual if keys.attention_factor is None else keys.attention_factor
        return {
            "rope_type": "longrope",
            "short_factor": self.factors(SHORT).tolist(),
            "long_factor": self.factors(LONG).tolist(),
            "original_max_position_embeddings": original,
            **({} if math.isclose(given, usual, rel_tol=1e-6) else {"attention_factor": given}),
        }

    def _divided(self) -> dict[str, Any]:
        """The rope_parameters that divide frequencies as the file says: Llama 3's where it is those, else LongRoPE's.

        https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_rope_utils.py
        """
        low, high, original = 1.0, 4.0, 8192
        divisors = self.factors(DIVISORS)
        if (divisors == 1).all():
            return {}
        factor = float(divisors.max())
        wavelengths = 2 * np.pi * self.keys.rope_theta ** (np.arange(len(divisors)) * 2 / self.rotated)
        blend = np.clip((original / wavelengths - low) / (high - low), 0, 1)
        if factor >= 1 and np.allclose(divisors, 1 / ((1 - blend) / factor + blend), rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
        return {
            "rope_type": "longrope",
            "short_factor": divisors.tolist(),
            "long_factor": divisors.tolist(),
            "attention_factor": 1.0,
            "original_max_position_embeddings": self.keys.context_length,
        }
