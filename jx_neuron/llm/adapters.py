"""Adapters of a model that is made from a checkpoint."""

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from jx_neuron.checkpoint.lora import Adapter, open_adapter
from jx_neuron.checkpoint.lora_weights import Base, merged, side_by_side
from jx_neuron.errors import ConfigError
from jx_neuron.llm.options import CheckpointOptions
from jx_neuron.models.wrapper import text_name
from jx_neuron.nn.adapters import LONGEST, MOST
from jx_neuron.util.arguments import shown

if TYPE_CHECKING:
    from jx_neuron.checkpoint.weights import Source, Tensors
    from jx_neuron.models import Decoder


def adapted(decoder: "Decoder", tensors: "Tensors", options: CheckpointOptions) -> "Tensors":
    """A checkpoint's tensors with the adapter of `options` merged into them, where there is one.

    Raises CheckpointError for one that cannot be read, and for that of another model.
    """
    if options["adapter"] is None:
        return tensors
    return merged(_opened(options["adapter"], options), _base(decoder, tensors))


def beside(
    decoder: "Decoder", tensors: "Tensors", options: CheckpointOptions
) -> tuple["Decoder", Callable[["Source", Any], "Source"]]:
    """The decoder with the adapters of `options` side by side, and what adds their weights to its own, in a dtype.

    Raises ConfigError for names that are not legal, and CheckpointError for an adapter that cannot be read, or is of
    another model.
    """
    if not (paths := options["adapters"]):
        return decoder, lambda source, dtype: source
    named = {name: _opened(path, options) for name, path in _named(paths).items()}
    together = side_by_side(named, _base(decoder, tensors), decoder.adaptable)
    decoder = decoder.with_adapters(together.adapters)
    return decoder, lambda source, dtype: together.source(source, decoder.padding, dtype)


def _named(paths: Any) -> Mapping[str, str | os.PathLike[str]]:
    legal = isinstance(paths, Mapping) and all(
        isinstance(name, str) and 0 < len(name) <= LONGEST and isinstance(path, str | os.PathLike)
        for name, path in paths.items()
    )
    if not legal or len(paths) > MOST:
        raise ConfigError(
            f"adapters={shown(paths)} is not legal; it takes a mapping of names to folders of PEFT or hub ids, "
            f"{MOST} at most"
        )
    named: Mapping[str, str | os.PathLike[str]] = paths
    return named


def _opened(path: str | os.PathLike[str], options: CheckpointOptions) -> Adapter:
    return open_adapter(
        path,
        token=options["token"],
        local_files_only=options["local_files_only"],
        cache_dir=options["cache_dir"],
    )


def _base(decoder: "Decoder", tensors: "Tensors") -> Base:
    return Base(tensors, decoder.rows, decoder.match(tensors), decoder.config, text_name)
