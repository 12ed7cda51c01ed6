"""Hugging Face checkpoints in a folder, a GGUF file or on the Hub; their tensors are read one at a time."""

import difflib
import fnmatch
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from jx_neuron.checkpoint import quantized
from jx_neuron.checkpoint.hub import local_path
from jx_neuron.checkpoint.tensor_files import Array, Tensor, check_count, check_file, safetensors_file, torch_file
from jx_neuron.errors import CheckpointError
from jx_neuron.util.pages import gc_paused
from jx_neuron.util.parsing import AGAIN, MOST_INT, boundary, read_json_file, typed

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
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
NAMED_TEMPLATES = "additional_chat_templates"  # a folder, of chat templates besides the default one
READERS: Mapping[str, Callable[[Path], dict[str, Tensor]]] = {".safetensors": safetensors_file, ".bin": torch_file}
INDEX = ".index.json"
LAYOUTS: Mapping[str, str] = {  # in order of preference: a file of weights or index, and the pattern of its shards
    "model.safetensors": "",
    "model.safetensors.index.json": "model-*.safetensors",
    "pytorch_model.bin": "",
    "pytorch_model.bin.index.json": "pytorch_model-*.bin",
}
LEGAL = "legal are " + ", ".join(LAYOUTS) + ", or one .gguf file"
TokenId = Annotated[int, Field(le=MOST_INT)]


class _TokenIds(BaseModel):
    """The token fields of a config.json or generation_config.json, with transformers' types."""

    model_config = ConfigDict(strict=True)
    bos_token_id: TokenId | list[TokenId] | None = None
    eos_token_id: TokenId | list[TokenId] | None = None
    pad_token_id: TokenId | None = None


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint: its configuration is read, its tensors are not.

    `path` is a folder or a GGUF file. `config` and `generation_config` have HF's fields. `tensors` have HF's names.
    `tokenizer_files` are the tokenizer's files (none for GGUF, for which see save_tokenizer). `load_tokenizer`
    gives HF's tokenizer or, where its argument is true, a PlainTokenizer if it can. `integer_bits` are those of weights
    whose codes config.json says are integers.
    """

    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any] | None
    tensors: Mapping[str, Tensor]
    tokenizer_files: tuple[Path, ...]
    load_tokenizer: Callable[[bool], Any]
    integer_bits: int | None = None

    @property
    def folder(self) -> Path:
        """The folder that holds the checkpoint's files."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def size(self) -> int:
        """Bytes of all tensors as `read` returns them: quantized ones count widened."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def names(self) -> frozenset[str]:
        """The names of the tensors."""
        return frozenset(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name` in HF's layout."""
        return self._tensor(name).shape

    def dtype(self, name: str) -> str:
        """The dtype in which `read` returns tensor `name`, such as "bfloat16"."""
        return self._tensor(name).dtype.name

    def read(self, name: str) -> Array:
        """Reads tensor `name`: as stored, or widened where it is quantized. Several threads may read at once.

        Raises CheckpointError for an unknown name and for a file that cannot be read.
        """
        with boundary(self.path):
            return self._tensor(name).load()

    def affine(self, name: str, grouped: bool = True) -> tuple[Array, Array] | None:
        """The scale and the offset that each number of tensor `name` is stored with.

        None where it is not so stored, or where `grouped` is false and a row has several scales.
        """
        tensor = self._tensor(name)
        if tensor.affine is None or (tensor.grouped and not grouped):
            return None
        with boundary(self.path):
            return tensor.affine()

    def slices(self, name: str) -> Iterator[Array]:
        """The same in parts along its first axis, where the file can be read so."""
        with boundary(self.path):
            yield from self._tensor(name).slices()

    def part(self, name: str, axis: int, index_n: np.ndarray) -> Array:
        """The entries `index_n`, ascending, of an axis of tensor `name`; no more is held where it can be read so."""
        with boundary(self.path):
            return self._tensor(name).part(axis, index_n)

    def tokenizer(self, *, plain: bool = False) -> Any:
        """The checkpoint's `transformers` tokenizer, chat template included; needs no torch.

        plain: whether a `jx_neuron.checkpoint.tokenizer.PlainTokenizer` will do, where there can be one.

        Raises CheckpointError where there is none, or where it needs a package that is not installed.
        """
        with gc_paused(), boundary(self.path):
            tokenizer = self.load_tokenizer(plain)
            tokenizer.decode(tokenizer("It is 2024.\n")["input_ids"])  # some damage fails only at the first text
            return tokenizer

    def save_tokenizer(self, folder: Path) -> list[Path]:
        """Writes the tokenizer's files into `folder` and returns their paths; an empty list where there are none."""
        if self.path.is_dir():
            return _copy_tokenizer(self.path, folder)
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
    """Opens a checkpoint: a folder, a file of weights or, where no such path exists, the id of a Hub repository.

    A folder's safetensors are preferred to its `.bin` files, a single file to an index, and all to a `.gguf` file,
    which needs no config.json. A file of weights is read with the config and tokenizer of its folder, a shard with the
    other shards of its index. `revision`, `token`, `local_files_only` and `cache_dir` are huggingface-hub's, as are
    HF_HUB_OFFLINE and HF_TOKEN.

    Raises CheckpointError for what is missing, cut short, malformed or not supported.
    """
    path = local_path(
        model,
        _files_to_download,
        revision=revision,
        token=token,
        local_files_only=local_files_only,
        cache_dir=cache_dir,
    )
    with boundary(path):
        weights = _weights_file(path)
        if weights is None:
            present = sorted(file.name for file in path.iterdir() if file.suffix != ".json")
            raise CheckpointError(
                f"{path} holds no weights that can be read: {LEGAL}; there is {_listed(present) or 'none of them'}. "
                "Download the checkpoint again, or save it with `save_pretrained`."
            )
        if weights.suffix == ".gguf":
            return _open_gguf(weights)
        folder = weights.parent
        generation = folder / GENERATION_CONFIG
        tensors = _indexed(weights) if weights.name.endswith(INDEX) else READERS[weights.suffix](weights)
        return Checkpoint(
            path=folder,
            config=_read_config(folder / CONFIG),
            generation_config=_read_config(generation) if generation.is_file() else None,
            tensors=quantized.widened(tensors, read_json_file(folder / CONFIG), str(weights)),
            tokenizer_files=tuple(file for name in TOKENIZER_FILES if (file := folder / name).is_file()),
            load_tokenizer=lambda plain: _auto_tokenizer(folder, plain),
            integer_bits=quantized.integer_bits(read_json_file(folder / CONFIG)),
        )


def load_config(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """The configuration alone, in HF's fields, of a `config.json` or of anything that open_checkpoint opens.

    No weights are read or downloaded. The other arguments and the errors are those of open_checkpoint.
    """
    path = local_path(
        model,
        _config_file,
        revision=revision,
        token=token,
        local_files_only=local_files_only,
        cache_dir=cache_dir,
    )
    with boundary(path):
        if path.is_file() and path.suffix not in (*READERS, ".gguf"):
            return _read_config(path)
        weights = _weights_file(path)
        if weights is not None and weights.suffix == ".gguf":
            return _open_gguf(weights).config
        return _read_config((weights.parent if weights else path) / CONFIG)


def _weights_file(path: Path) -> Path | None:
    """The file of weights of a path, or the index of its shards; None where there is none."""
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            raise CheckpointError(
                f"{path} holds a PEFT adapter (adapter_config.json); legal is a whole model. Name its base model, and "
                "this folder as its adapter (adapter=, --adapter); if it is merged already, remove "
                "adapter_config.json."
            )
        chosen = _choose([file.name for file in path.iterdir() if file.is_file()], str(path), "give the path of one")
        return path / chosen if chosen else None
    if path.suffix not in (*READERS, ".gguf"):
        raise CheckpointError(
            f"{path} is not a file of weights; legal are a folder, a {', '.join(READERS)} or .gguf file, and a Hub id. "
            "Give its folder."
        )
    indexes = (path.with_name(name) for name in LAYOUTS if name.endswith(path.suffix + INDEX))
    return next((index for index in indexes if index.is_file() and path.name in _places(index).values()), path)


def _choose(files: Collection[str], where: str, advice: str) -> str | None:
    """The file of weights, or the index, among a checkpoint's files; None where there is none.

    Raises CheckpointError, with `advice`, where there are several GGUF files and nothing else.
    """
    ggufs = sorted(file for file in files if file.endswith(".gguf"))
    chosen = next((name for name in LAYOUTS if name in files), None)
    if chosen is None and len(ggufs) > 1:
        raise CheckpointError(f"{where} holds {len(ggufs)} GGUF files; {advice}: {_listed(ggufs)}.")
    return chosen or next(iter(ggufs), None)


def token_ids(fields: Mapping[str, Any], name: str) -> dict[str, int | list[int] | None]:
    """The `bos_token_id`, `eos_token_id` and `pad_token_id` that `fields` hold; negative ones mean none.

    Raises CheckpointError, which names `name`, for anything but integers and lists of them.
    """

    def meant(value: int | list[int] | None) -> int | list[int] | None:
        if isinstance(value, list):
            return [token for token in dict.fromkeys(value) if token >= 0] or None
        return None if value is None or value < 0 else value

    ids = typed(_TokenIds, fields, name).model_dump(exclude_unset=True)
    return {field: meant(value) for field, value in ids.items()}


def _read_config(path: Path) -> dict[str, Any]:
    check_file(path)
    fields = read_json_file(path)
    if quantized.check(fields) is not None:  # its tensors are widened
        del fields[quantized.FIELD]
    return {**fields, **token_ids(fields, str(path))}


def _places(index: Path) -> dict[str, str]:
    """Tensor name → file, from an index."""
    check_file(index)
    places = read_json_file(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{index}: weight_map must give the file of each tensor by name; {AGAIN}.")
    check_count(index, len(places))
    return places


def _indexed(index: Path) -> dict[str, Tensor]:
    """The tensors of all files that an index names. Raises CheckpointError where a file lacks one of its tensors."""
    file_of, read_file = _places(index), READERS[Path(index.name.removesuffix(INDEX)).suffix]
    tensors: dict[str, Tensor] = {}
    file_by_tensor: dict[str, str] = {}
    for file in sorted(set(file_of.values())):
        if file in ("", ".", "..") or re.search(r"[/\\:\0]", file):
            raise CheckpointError(f"{index}: weight_map names {file!r}; legal are names of files in the same folder.")
        if not (index.parent / file).is_file():
            raise CheckpointError(f"{index} names {file!r}, which is not in {index.parent}; {AGAIN}.")
        for name, tensor in read_file(index.parent / file).items():
            if name in tensors:
                raise CheckpointError(
                    f"{index.parent}: tensor {name!r} is in {file_by_tensor[name]} and in {file}; {AGAIN}."
                )
            tensors[name], file_by_tensor[name] = tensor, file
    for name, file in file_of.items():
        if file_by_tensor.get(name) != file:
            raise CheckpointError(
                f"{index.parent / file} lacks tensor {name!r}, which {index.name} says it has; {AGAIN}."
            )
    return tensors


def _listed(names: Collection[str], most: int = 8) -> str:
    return ", ".join(list(names)[:most]) + (", …" if len(names) > most else "")


def _open_gguf(path: Path) -> Checkpoint:
    from jx_neuron.checkpoint.gguf import format as gguf_format
    from jx_neuron.checkpoint.gguf import model as gguf_model

    file = gguf_format.read_gguf(path)
    model = gguf_model.Model.of(file.without_vocabulary())
    config = model.config()
    generation = gguf_model.generation_config(file.metadata)
    return Checkpoint(
        path=path,
        config={**config, **token_ids(config, str(path))},
        generation_config=generation and {**generation, **token_ids(generation, str(path))},
        tensors=model.tensors(),
        tokenizer_files=(),
        load_tokenizer=model.tokenizer,
    )


def _auto_tokenizer(folder: Path, plain: bool) -> Any:
    from jx_neuron.checkpoint.tokenizer import load_plain_tokenizer, load_tokenizer

    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(
            f"{folder} holds no tokenizer: none of {', '.join(TOKENIZER_FILES)}. "
            "Use token ids, or copy the tokenizer's files there."
        )
    config = read_json_file(folder / CONFIG)
    load = load_plain_tokenizer if plain else load_tokenizer
    return load(folder, config, lambda into: _copy_tokenizer(folder, into))


def _copy_tokenizer(folder: Path, into: Path) -> list[Path]:
    """Copies a tokenizer's files, and its named templates in their folder, and returns the copies."""
    copies = []
    for name in (
        *TOKENIZER_FILES,
        *(f"{NAMED_TEMPLATES}/{file.name}" for file in folder.glob(f"{NAMED_TEMPLATES}/*.jinja")),
    ):
        if (folder / name).is_file():
            (into / name).parent.mkdir(exist_ok=True)
            copies.append(Path(shutil.copy(folder / name, into / name)))
    return copies


def _files_to_download(repo: str, files: Collection[str]) -> list[str]:
    """The files of a Hub repository to download."""
    chosen = _chosen_on_the_hub(repo, files)
    small = [CONFIG, GENERATION_CONFIG, "adapter_config.json", *TOKENIZER_FILES, *PROCESSOR_FILES]
    if chosen is None and "adapter_config.json" not in files:
        raise CheckpointError(
            f"{repo} on the Hub holds no weights that can be read: {LEGAL}. Choose another repository."
        )
    if chosen is None:
        return small
    return [*small, chosen, *fnmatch.filter(files, LAYOUTS[chosen])] if chosen in LAYOUTS else [chosen]


def _config_file(repo: str, files: Collection[str]) -> list[str]:
    """The file of a Hub repository that holds the configuration without weights."""
    chosen = _chosen_on_the_hub(repo, files)
    if chosen is not None and chosen not in LAYOUTS:
        raise CheckpointError(
            f"{repo} holds its configuration in {chosen}, with the weights: download it with "
            f"`hf download {repo} {chosen}`, and give the path that it prints."
        )
    return [CONFIG]


def _chosen_on_the_hub(repo: str, files: Collection[str]) -> str | None:
    return _choose(files, repo, f"download one with `hf download {repo} FILE`, and give the path that it prints")
