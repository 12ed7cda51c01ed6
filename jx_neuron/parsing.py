"""Reading files that others wrote: JSON within limits, and one boundary for whatever a parser raises."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jx_neuron.errors import CheckpointError, JxNeuronError

AGAIN = "copy or download it again"
MOST_DIGITS = 100  # tokenizer_config.json has a model_max_length of 31
MOST_JSON_BYTES = 256 * 2**20  # the largest tokenizer.json and index on the Hub have some 40 MB


@contextmanager
def boundary(path: Path | str, error: type[JxNeuronError] = CheckpointError) -> Iterator[None]:
    """Has whatever a parser of the file at `path` raises become an `error` that names the file.

    Errors of this package pass as they are. Rust extensions raise panics that are no Exception (pyo3's PanicException),
    so all but the interpreter's own three are taken.
    """
    try:
        yield
    except (JxNeuronError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
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
    """The object in `data`, UTF-8 text; `name` says in errors what it is."""
    with boundary(name, error):
        try:
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
