"""EAGLE-3 heads: opened from a checkpoint, and fitted to the model that they draft for."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from jx_neuron import distributed
from jx_neuron.engine.drafting import FeatureDrafter
from jx_neuron.engine.eagle import EagleDrafter
from jx_neuron.errors import CheckpointError, ConfigError, InputError
from jx_neuron.runtime import deployment as deploy
from jx_neuron.util.arguments import shown

if TYPE_CHECKING:
    from jx_neuron.checkpoint.row import Tensors
    from jx_neuron.llm.calls import Calls
    from jx_neuron.llm.origin import DecoderOrigin
    from jx_neuron.models.eagle3 import Config
    from jx_neuron.models.registry import Family

TARGETS = ("llama", "qwen3")
"""The model types of targets."""


def is_head(model: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint is an EAGLE-3 head, by its config. Raises CheckpointError where it has none."""
    from jx_neuron.models.eagle3 import ARCHITECTURES

    architectures = deploy.config_of(model).get("architectures")
    return isinstance(architectures, list) and any(name in ARCHITECTURES for name in architectures)


def drafter_of(model: str | os.PathLike[str], target: "Calls") -> EagleDrafter:
    """The head in a folder, or of a hub id, as a drafter for `target`, which keeps it.

    Raises InputError for another checkpoint, ConfigError for a head or a target that do not fit each other, and
    CheckpointError for tensors that are missing, of another shape, or of tokens that the target does not have.
    """
    name = os.path.realpath(model) if os.path.exists(model) else os.fspath(model)
    if name not in target._heads:
        target._heads[name] = _opened(model, target)
    return target._heads[name]


def check(drafter: FeatureDrafter | None, target: "Calls") -> None:
    """Raises ConfigError where a target cannot give a drafter the hidden states that it takes."""
    settings = target.settings
    if target.backend != "xla":
        raise ConfigError(
            f"the programs of backend {target.backend!r} give no hidden states, which an EAGLE-3 head drafts from; "
            "make the model with backend='xla', or draft with \"ngram\" or a model"
        )
    if settings.model_type not in TARGETS:
        raise ConfigError(
            f"an EAGLE-3 head drafts for models of model_type {' or '.join(TARGETS)}, and this is a "
            f'{settings.model_type!r}; draft with "ngram" or a model'
        )
    if distributed.group() is not None:
        raise ConfigError('an EAGLE-3 head drafts within one process; with --hosts, draft with "ngram" or a model')
    if isinstance(drafter, EagleDrafter) and drafter not in target._heads.values():
        raise ConfigError("this head was opened for another model; open it with this model's drafter(folder)")


def _opened(model: str | os.PathLike[str], target: "Calls") -> EagleDrafter:
    from jx_neuron.checkpoint.folder import open_checkpoint
    from jx_neuron.models import eagle3
    from jx_neuron.models.decoder import Decoder
    from jx_neuron.runtime import xla

    check(None, target)
    if not is_head(model):
        raise InputError(
            f"draft={shown(os.fspath(model))} is no EAGLE-3 head: its config.json should have architectures "
            f"{' or '.join(eagle3.ARCHITECTURES)}. To draft with a model, load it, and give it as draft"
        )
    settings, origin = target.settings, cast("DecoderOrigin", target._origin)  # a saved model's backend is another
    checkpoint = open_checkpoint(model)
    config = eagle3.Config.from_hf(checkpoint.config)
    _check_sizes(config, origin.decoder.config.sizes)
    taps = config.taps(origin.decoder.config.layers)
    tensors = _Tensors.of(config, checkpoint, lambda: origin.whole().read("embed_tokens.embedding"))
    head = Decoder.made(config.MODEL_TYPE, cast("Family", eagle3), config, settings.tp_degree)
    source = head.source(tensors, settings.dtype)
    _check_tokens(tensors.read("d2t"), config.vocab_size)
    mesh = xla.mesh(settings.tp_degree)
    return EagleDrafter(xla.XlaRuntime(head, source, mesh, settings.dtype), taps)


def _check_sizes(config: "Config", target: Mapping[str, int]) -> None:
    """Raises ConfigError where the head is of a target of other sizes."""
    sizes = dict(hidden_size=config.hidden_size, target_hidden_size=config.target_hidden_size or config.hidden_size)
    for field, size, expected in (
        *((field, size, target["d"]) for field, size in sizes.items()),
        ("vocab_size", config.vocab_size, target["v"]),
    ):
        if size != expected:
            raise ConfigError(
                f"the head has {field}={size}, and the model {expected}: it was made for another model; give the head "
                "of this one"
            )


def _check_tokens(d2t: np.ndarray, vocab_size: int) -> None:
    """Raises CheckpointError where a token of the head is none of the target."""
    if not np.issubdtype(d2t.dtype, np.integer):
        raise CheckpointError(f"the head's d2t is of {d2t.dtype}; it should be integers, offsets of its tokens")
    token_v = np.arange(len(d2t)) + d2t
    if (wrong := np.flatnonzero((token_v < 0) | (token_v >= vocab_size))).size:
        index = int(wrong[0])
        raise CheckpointError(
            f"the head's d2t makes its token {index} token {int(token_v[index])} of the model, which has 0 to "
            f"{vocab_size - 1}; the file is damaged, or of another model"
        )


@dataclass(frozen=True)
class _Tensors:
    """A head's tensors under the names of `eagle3.WEIGHTS`, and those it may lack.

    names_of: the checkpoint's name of each.
    others:   the shapes of those it lacks, and what reads them.
    """

    checkpoint: "Tensors"
    names_of: Mapping[str, str]
    others: Mapping[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]]

    @classmethod
    def of(cls, config: "Config", checkpoint: "Tensors", embedding: Callable[[], np.ndarray]) -> "_Tensors":
        """embedding: reads the target's."""

        def ours(name: str) -> str:
            name = name.removeprefix("model.")
            return f"midlayer.{name.removeprefix('layers.0.')}" if name.startswith("layers.0.") else name

        names_of, sizes = {ours(name): name for name in checkpoint.names()}, config.sizes
        others: dict[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]] = {
            "embed_tokens.weight": ((sizes["u"], sizes["d"]), embedding)
        }
        if sizes["v"] == sizes["u"]:
            others["d2t"] = (sizes["v"],), lambda: np.zeros(sizes["v"], np.int64)
        return cls(checkpoint, names_of, {name: other for name, other in others.items() if name not in names_of})

    def names(self) -> Iterable[str]:
        return (*self.names_of, *self.others)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.others[name][0] if name in self.others else self.checkpoint.shape(self.names_of[name])

    def read(self, name: str) -> np.ndarray:
        return self.others[name][1]() if name in self.others else self.checkpoint.read(self.names_of[name])
