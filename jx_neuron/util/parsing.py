"""Reading untrusted files: JSON within limits, typed fields, and one conversion of every parser's errors."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from jx_neuron.errors import CheckpointError, JxNeuronError
from jx_neuron.util.arguments import shown
from jx_neuron.util.pages import gc_paused

AGAIN = "copy or download it again"
MOST_DIGITS = 100  # tokenizer_config.json has a model_max_length of 31
MOST_JSON_BYTES = 32 * 2**20  # Python takes 24 times the bytes of the worst text; an index of 723 tensors has 64 kB
MOST_INT = 2**31 - 1

M = TypeVar("M", bound=BaseModel)


@contextmanager
def boundary(path: Path | str, error: type[JxNeuronError] = CheckpointError) -> Iterator[None]:
    """Converts whatever a parser of the file at `path` raises into an `error` that names the file.

    Errors of this package pass unchanged. Rust extensions raise panics that are no Exception (pyo3's PanicException),
    so every BaseException but the interpreter's own three is converted.
    """
    try:
        yield
    except (JxNeuronError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except OSError as raised:
        raise error(f"{path} cannot be read: {raised}.") from raised
    except BaseException as raised:
        what = f"{type(raised).__name__}: {raised}" if str(raised) else type(raised).__name__
        raise error(f"{path} is damaged, or is not what its name says ({what[:300]}); {AGAIN}.") from raised


def read_json_file(path: Path, error: type[JxNeuronError] = CheckpointError) -> dict[str, Any]:
    """The object in a JSON file. Raises `error` that names the file, and for malformed JSON the line."""
    with boundary(path, error):
        if (size := path.stat().st_size) > MOST_JSON_BYTES:
            raise error(f"{path} has {size:,} bytes; a JSON file here may have {MOST_JSON_BYTES:,}; {AGAIN}.")
        return parse_json(path.read_bytes(), str(path), error)


def parse_json(data: bytes, name: str, error: type[JxNeuronError] = CheckpointError) -> dict[str, Any]:
    """The object in `data`, UTF-8 text; errors call it `name`."""
    with boundary(name, error):
        try:
            with gc_paused():
                value = json.loads(data.decode("utf-8"), parse_int=_integer)
        except json.JSONDecodeError as raised:
            raise error(
                f"{name}, line {raised.lineno}, column {raised.colno}: not JSON ({raised.msg}); mend it, or {AGAIN}."
            ) from raised
        except UnicodeDecodeError as raised:
            raise error(f"{name} cannot be read as UTF-8 text ({raised}); {AGAIN}.") from raised
        except RecursionError as raised:
            raise error(f"{name} is nested too deeply for a JSON file; {AGAIN}.") from raised
        if not isinstance(value, dict):
            raise error(f"{name} holds a {type(value).__name__}; legal is a JSON object; {AGAIN}.")
        return value


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def typed(
    model: type[M], fields: Mapping[str, Any], name: str, error: type[JxNeuronError] = CheckpointError, prefix: str = ""
) -> M:
    """The fields of a file as a pydantic `model`; errors call the file `name`.

    Raises `error` that names the first field of the wrong type or range, with `prefix` before it, and what is legal.
    """
    try:
        return model.model_validate(fields)
    except ValidationError as raised:
        first = next((e for e in raised.errors() if e["type"] != "missing"), raised.errors()[0])
        field = f"{prefix}{first['loc'][0]}"
        if first["type"] == "missing":
            raise error(f"{name} lacks {field}; {AGAIN}.") from raised
        expectations = (
            e["msg"].removeprefix("Input should be ") for e in raised.errors() if e["loc"][:1] == first["loc"][:1]
        )
        value, legal = shown(fields[str(first["loc"][0])]), " or ".join(dict.fromkeys(expectations))
        raise error(f"{name}: {field} is {value}; legal is {legal}; mend it, or {AGAIN}.") from raised
