"""Hugging Face checkpoints in a folder, a GGUF file or on the Hub; their tensors are read one at a time."""

import difflib
import fnmatch
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jx_neuron.errors import CheckpointError
from jx_neuron.hub import local_path
from jx_neuron.pages import uncollected
from jx_neuron.tensor_files import AGAIN, Array, Tensor, check_file, safetensors_file, torch_file

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
# in order of preference: the file that is there, the shards that go with it, how a file is read
LAYOUTS: tuple[tuple[str, str, Callable[[Path], dict[str, Tensor]]], ...] = (
    ("model.safetensors", "", safetensors_file),
    ("model.safetensors.index.json", "model-*.safetensors", safetensors_file),
    ("pytorch_model.bin", "", torch_file),
    ("pytorch_model.bin.index.json", "pytorch_model-*.bin", torch_file),
)
LEGAL = "legal are " + ", ".join(name for name, *_ in LAYOUTS) + ", or one .gguf file"


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint: its configuration at hand, its tensors still in their files.

    `path` is a folder or a GGUF file; `config` and `generation_config` have HF's fields; `tensors` are by HF
    name; `tokenizer_files` are those that a tokenizer needs (none for GGUF, for which see save_tokenizer).
    """

    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any] | None
    tensors: Mapping[str, Tensor]
    tokenizer_files: tuple[Path, ...]
    load_tokenizer: Callable[[], Any]

    @property
    def folder(self) -> Path:
        """The folder that holds the checkpoint's files."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def size(self) -> int:
        """Bytes of all tensors as `read` gives them: quantized ones count as float32."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def names(self) -> frozenset[str]:
        """The names of the tensors."""
        return frozenset(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name`, as HF lays it out."""
        return self._tensor(name).shape

    def dtype(self, name: str) -> str:
        """The dtype that `read` gives tensor `name`, such as "bfloat16"."""
        return self._tensor(name).dtype.name

    def read(self, name: str) -> Array:
        """Tensor `name`, read anew: as stored, or float32 where it is quantized.

        Raises CheckpointError for a name that is not there and a file that cannot be read. Several threads
        may read at once.
        """
        return self._tensor(name).load()

    def tokenizer(self) -> Any:
        """The checkpoint's `transformers` tokenizer, chat template included; needs no torch.

        Raises CheckpointError where there is none, or where it needs a package that is not installed.
        """
        with uncollected():
            return self.load_tokenizer()

    def save_tokenizer(self, folder: Path) -> list[Path]:
        """Writes the files of the tokenizer into `folder`, and returns their paths: none where there is none."""
        if self.path.is_dir():
            return [Path(shutil.copy(file, folder)) for file in self.tokenizer_files]
        return [Path(file) for file in self.tokenizer().save_pretrained(folder)]

    def _tensor(self, name: str) -> Tensor:
        if name not in self.tensors:
            near = difflib.get_close_matches(name, self.tensors, n=3)
            raise CheckpointError(
                f"{self.path} holds no tensor {name!r}"
                + (f"; near it are {', '.join(near)}." if near else f"; it holds {len(self.tensors)} others.")
            )
        return self.tensors[name]


def open_checkpoint(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Checkpoint:
    """Opens a checkpoint: a folder, a `.gguf` file, or where no such path exists, the id of a Hub repository.

    A folder's safetensors come before its `.bin` files, and a single file before an index. `revision`,
    `token`, `local_files_only` and `cache_dir` are huggingface-hub's, as are HF_HUB_OFFLINE and HF_TOKEN.

    Raises CheckpointError for what is missing, cut short, malformed or not supported.
    """
    path = local_path(
        model,
        _wanted,
        revision=revision,
        token=token,
        local_files_only=local_files_only,
        cache_dir=cache_dir,
    )
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path} is a file; legal are a folder, a .gguf file, and a Hub id. Give its folder.")
        return _open_gguf(path)
    if (path / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{path} holds a PEFT adapter (adapter_config.json); legal is a whole model. Merge the adapter "
            "into its base model with peft's `merge_and_unload()` and save that; if it is merged already, "
            "remove adapter_config.json."
        )
    layout = next((layout for layout in LAYOUTS if (path / layout[0]).is_file()), None)
    if layout is None:
        return _open_gguf(_only_gguf(path))
    first, _, read = layout
    tensors = _indexed(path / first, read) if first.endswith(".json") else read(path / first)
    generation = path / GENERATION_CONFIG
    return Checkpoint(
        path=path,
        config=read_json(path / CONFIG),
        generation_config=read_json(generation) if generation.is_file() else None,
        tensors=tensors,
        tokenizer_files=tuple(file for name in TOKENIZER_FILES if (file := path / name).is_file()),
        load_tokenizer=lambda: _auto_tokenizer(path),
    )


def load_config(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """The configuration alone, in HF's fields: of a `config.json`, a folder, a `.gguf` file or a Hub id.

    No weights are read or downloaded. The other arguments and the errors are those of open_checkpoint.
    """
    path = local_path(
        model,
        lambda repo, files: [CONFIG],
        revision=revision,
        token=token,
        local_files_only=local_files_only,
        cache_dir=cache_dir,
    )
    if path.is_dir() and not (path / CONFIG).is_file() and any(path.glob("*.gguf")):
        path = _only_gguf(path)
    if path.suffix == ".gguf" and path.is_file():
        return _open_gguf(path).config
    return read_json(path / CONFIG if path.is_dir() else path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises CheckpointError for a missing file, and with the line for a malformed one.
    """
    check_file(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg}); mend it, or {AGAIN}."
        ) from error
    except (UnicodeDecodeError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as UTF-8 text ({error}); {AGAIN}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; legal is a JSON object; {AGAIN}.")
    return value


def _indexed(index: Path, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all files that an index names, each where the index says."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{index}: weight_map must give the file of each tensor by name; {AGAIN}.")
    tensors: dict[str, Tensor] = {}
    homes: dict[str, str] = {}
    for file in sorted(set(places.values())):
        if file in ("", ".", "..") or re.search(r"[/\\:\0]", file):
            raise CheckpointError(f"{index}: weight_map names {file!r}; legal are names of files in the same folder.")
        if not (index.parent / file).is_file():
            raise CheckpointError(f"{index} names {file!r}, which is not in {index.parent}; {AGAIN}.")
        for name, tensor in read(index.parent / file).items():
            if name in tensors:
                raise CheckpointError(f"{index.parent}: tensor {name!r} is in {homes[name]} and in {file}; {AGAIN}.")
            tensors[name], homes[name] = tensor, file
    for name, file in places.items():
        if homes.get(name) != file:
            raise CheckpointError(
                f"{index.parent / file} lacks tensor {name!r}, which {index.name} says it has; {AGAIN}."
            )
    return tensors


def _only_gguf(folder: Path) -> Path:
    files = sorted(folder.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    if files:
        raise CheckpointError(f"{folder} holds {len(files)} GGUF files; give the path of one: {_listed(files)}.")
    found = sorted(file for file in folder.iterdir() if file.suffix != ".json")
    raise CheckpointError(
        f"{folder} holds no weights that can be read: {LEGAL}; there is {_listed(found) or 'nothing else'}. "
        "Download the checkpoint again, or save it with `save_pretrained`."
    )


def _listed(files: Iterable[Path], most: int = 8) -> str:
    names = [file.name for file in files]
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def _open_gguf(path: Path) -> Checkpoint:
    from jx_neuron import gguf_format, gguf_llama, gguf_tokenizer

    file = gguf_format.read_gguf(path)
    config = gguf_llama.llama_config(file)
    return Checkpoint(
        path=path,
        config=config,
        generation_config=gguf_llama.generation_config(file.metadata),
        tensors=gguf_llama.llama_tensors(file, config),
        tokenizer_files=(),
        load_tokenizer=lambda: gguf_tokenizer.build_tokenizer(file.metadata, path),
    )


def _auto_tokenizer(folder: Path) -> Any:
    from jx_neuron.hf_tokenizer import load_tokenizer

    files = [file for name in TOKENIZER_FILES if (file := folder / name).is_file()]
    if not files:
        raise CheckpointError(
            f"{folder} holds no tokenizer: none of {', '.join(TOKENIZER_FILES)}. "
            "Use token ids, or copy the tokenizer's files there."
        )
    config = read_json(folder / CONFIG)
    return load_tokenizer(folder, config, lambda into: [shutil.copy(file, into) for file in files])


def _wanted(repo: str, files: list[str]) -> list[str]:
    """Of the files of a Hub repository, those to download."""
    small = [CONFIG, GENERATION_CONFIG, "adapter_config.json", *TOKENIZER_FILES]
    for first, shards, _ in LAYOUTS:
        if first in files:
            return [*small, first, *fnmatch.filter(files, shards)]
    ggufs = [file for file in files if file.endswith(".gguf")]
    if len(ggufs) == 1:
        return ggufs
    if ggufs:
        raise CheckpointError(
            f"{repo} holds {len(ggufs)} GGUF files, {', '.join(ggufs[:8])}: download one with "
            f"`hf download {repo} {ggufs[0]}`, and give the path that it prints."
        )
    if "adapter_config.json" in files:
        return small
    raise CheckpointError(f"{repo} on the Hub holds no weights that can be read: {LEGAL}. Choose another repository.")
