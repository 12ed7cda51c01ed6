"""The text models within multimodal ones: their config, and the names of their tensors."""

import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jx_neuron.checkpoint.row import Tensors, affine, part, slices
from jx_neuron.errors import ConfigError
from jx_neuron.util.arguments import shown

__all__ = ["TextTensors", "text_config", "text_name", "warn"]

# https://github.com/huggingface/transformers/blob/main/src/transformers/conversion_mapping.py
_PREFIXES = (
    (re.compile(r"(model\.language_model|language_model\.model)\."), "model."),
    (re.compile(r"(language_model\.)?lm_head\."), "lm_head."),
)
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_HEAD = "lm_head.weight"


def text_config(raw: Mapping[str, Any], legal: Collection[str], names: Collection[str] | None = None) -> dict[str, Any]:
    """The config of the text model in a multimodal one's.

    legal: the model types that it may be of, the usual first.
    names: the text model's tensors, of which there is a head or not; None where they are not known.

    Raises ConfigError for a text_config that is no object, or of another model_type.
    """
    text = raw.get("text_config")
    kind = raw["model_type"]
    if not isinstance(text, Mapping) or text.get("model_type", next(iter(legal))) not in legal:
        raise ConfigError(
            f"{kind}: text_config={shown(text)} is not supported; legal is an object of model_type {' or '.join(legal)}"
        )
    config = {"model_type": next(iter(legal)), **text}
    config |= {name: raw[name] for name in _IDS if config.get(name) is None and raw.get(name) is not None}
    if names is not None:
        return config | {"tie_word_embeddings": _HEAD not in names}
    return config | {name: raw[name] for name in ("tie_word_embeddings",) if raw.get(name) is not None}


@dataclass(frozen=True)
class TextTensors:
    """The tensors of a multimodal model's text model, by the names that they have there.

    tensors: the multimodal model's.
    theirs:  the names of the text model's among them.
    others:  the modules of the rest.
    """

    tensors: Tensors
    theirs: Mapping[str, str]
    others: Sequence[str]

    @classmethod
    def of(cls, tensors: Tensors) -> "TextTensors":
        theirs: dict[str, str] = {}
        others: dict[str, None] = {}
        for name in tensors.names():
            if (own := text_name(name)) is not None:
                theirs[own] = name
            else:
                others[name.removeprefix("model.").split(".")[0]] = None
        return cls(tensors, theirs, sorted(others))

    def names(self) -> Collection[str]:
        """The names of the tensors."""
        return self.theirs.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self.tensors.shape(self.theirs[name])

    def read(self, name: str) -> np.ndarray:
        """A tensor."""
        return self.tensors.read(self.theirs[name])

    def affine(self, name: str, grouped: bool = True) -> tuple[np.ndarray, np.ndarray] | None:
        """The scale and the offset of each number of a tensor, as Checkpoint.affine gives them."""
        return affine(self.tensors, self.theirs[name], grouped)

    def slices(self, name: str) -> Iterator[np.ndarray]:
        """The same in parts along its first axis, where it can be read so."""
        return slices(self.tensors, self.theirs[name])

    def part(self, name: str, axis: int, index_n: np.ndarray) -> np.ndarray:
        """Some entries of an axis of a tensor, as Checkpoint.part gives them."""
        return part(self.tensors, self.theirs[name], axis, index_n)


def text_name(name: str) -> str | None:
    """The name that a tensor of a multimodal model has in its text model; None where it has none there."""
    return next((to + name[m.end() :] for prefix, to in _PREFIXES if (m := prefix.match(name))), None)


def warn(raw: Mapping[str, Any], text: Mapping[str, Any], others: Iterable[str]) -> None:
    """Warns that of a multimodal model the text model alone is loaded, without `others`."""
    left_out = ", ".join(others)
    warnings.warn(
        f"{raw['model_type']} is loaded as its text model, {text['model_type']}, which takes text alone"
        + (f"; left out: {left_out}" if left_out else ""),
        UserWarning,
        stacklevel=4,
    )
