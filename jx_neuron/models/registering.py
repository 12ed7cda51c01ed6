"""Decoders that a user registers."""

import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any, cast

from jx_neuron.checkpoint.hf_config import HFConfig
from jx_neuron.errors import ConfigError
from jx_neuron.models import checks
from jx_neuron.models.decoder import Decoder, outline, shapes_of
from jx_neuron.models.registry import add


def register(model_type: str, family: Any) -> None:
    """Registers a decoder: a module, or any object, with `Config`, `Model`, `WEIGHTS` and `IGNORE`.

    The weight table is checked against the model of Config's defaults, of which nothing is allocated, and later against
    that of each checkpoint's config. Rows that fill no parameter, whichever switch of Config is flipped, are named in a
    warning.

    Raises ConfigError that names the part that is absent or of the wrong kind, or the row that does not fit.
    """
    checks.parts(model_type, family)
    try:
        config = family.Config()
    except (TypeError, ConfigError):  # not every field has a default: the first checkpoint's config is the first check
        pass
    else:
        unused = checks.unused(family.WEIGHTS, Decoder.made(model_type, family, config, 1).shapes)
        for other in _switched(config) if unused else ():
            unused = checks.unused(unused, shapes_of(outline(family, other)))
        if unused:
            warnings.warn(
                f"the decoder registered as {model_type!r} has rows that fill no parameter of Model with Config's "
                f"defaults, nor with one of its switches the other way: {'; '.join(map(str, unused))}. Remove them, "
                "unless a checkpoint's config makes such parameters",
                UserWarning,
                stacklevel=2,
            )
    add(model_type, family)


def _switched(config: HFConfig) -> Iterator[HFConfig]:
    """`config` with each of its true-or-false fields the other way, where that is legal."""
    for switch in fields(cast(Any, config)):
        if isinstance(value := getattr(config, switch.name), bool):
            with suppress(ConfigError):
                yield replace(cast(Any, config), **{switch.name: not value})
