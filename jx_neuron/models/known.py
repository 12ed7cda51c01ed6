"""Configs of checkpoints on the Hugging Face Hub, known by name without a network; known.json has them."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jx_neuron.checkpoint.folder import load_config

__all__ = ["KNOWN", "config_of"]


def _read() -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and config of each checkpoint.

    A group of known.json has the fields that its checkpoints share, and a row for each with the values of `columns`; an
    object at the end of a row adds fields. Braces in a name hold its variants: "gpt2{,-xl}" is "gpt2" and "gpt2-xl".
    """
    for group in json.loads((Path(__file__).parent / "known.json").read_text()):
        columns = group["columns"].split()
        for pattern, row in group["rows"].items():
            values, more = row[: len(columns)], row[len(columns) :]
            config = {"model_type": group["model_type"], **group["shared"], **dict(zip(columns, values, strict=True))}
            for name in _variants(pattern):
                yield name, config | (more[0] if more else {})


def _variants(pattern: str) -> list[str]:
    start, _, rest = pattern.partition("{")
    middles, _, end = rest.partition("}")
    return [start + middle + tail for middle in middles.split(",") for tail in (_variants(end) if end else [""])]


KNOWN = dict(_read())
"""Configs by Hub id.

Fields and values are those of each config.json that affect the model. Token ids come with a checkpoint's tokenizer. Of
a checkpoint with an image encoder it is the config of the text model.
"""

_BY_NAME = {name.lower(): config for name, config in KNOWN.items()}


def config_of(model: str | os.PathLike[str], **options: Any) -> dict[str, Any]:
    """The parsed config of a checkpoint, without its weights: a path (a config.json, a folder, a .gguf file), one of
    `KNOWN` by name, or a Hub id. `options` are those of `jx_neuron.checkpoint.load_config`, and so are the errors.

    >>> config_of("openai-community/gpt2-xl")["n_head"]
    25
    """
    known = _BY_NAME.get(os.fspath(model).lower())
    if known is not None and not Path(model).exists() and not options.get("revision"):
        return dict(known)
    return load_config(model, **options)
