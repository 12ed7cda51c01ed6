"""Tokenizers: of Hugging Face's transformers, loaded without running a checkpoint's own code, and without transformers.

https://huggingface.co/docs/transformers/custom_models
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from platformdirs import user_cache_path

from jx_neuron.errors import CheckpointError, JxNeuronError
from jx_neuron.util.durable import write_file
from jx_neuron.util.temporary import temporary_folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PROCESSOR_TEMPLATE = "chat_template.json"  # of a multimodal model's processor, which may be all that has one
AUTO_MAP = "auto_map"  # the field that names a checkpoint's own classes


@dataclass(frozen=True)
class PlainTokenizer:
    """The part of HF's tokenizer that prompts and answers need: the `tokenizers` library, without transformers.

    HF's own takes half a second to import, and 39 MiB (docs/notes/start.md).
    """

    backend: "Tokenizer"

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """The tokens of a text, as HF's `input_ids`."""
        return {"input_ids": self.backend.encode(text, add_special_tokens=add_special_tokens).ids}

    def decode(
        self, tokens: Sequence[int], skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False
    ) -> str:
        """The text of tokens; spaces are left as they are."""
        if clean_up_tokenization_spaces:
            raise ValueError("clean_up_tokenization_spaces=True takes HF's tokenizer")
        text: str = self.backend.decode(tokens, skip_special_tokens=skip_special_tokens)
        return text


def load_plain_tokenizer(
    home: Path,
    config: Mapping[str, Any],
    save_files: Callable[[Path], object],
    error: type[JxNeuronError] = CheckpointError,
) -> Any:
    """The PlainTokenizer of `load_tokenizer`'s, or that itself where it does more than call `tokenizers`.

    HF's classes change what tokenizer.json says, so HF's tokenizer is loaded once; its backend is kept in the user's
    cache folder, named by a hash of the files and the versions of both libraries.
    """
    from tokenizers import Tokenizer

    with temporary_folder() as folder:
        save_files(folder)
        kept = user_cache_path("jx-neuron", appauthor=False) / "tokenizers" / f"{_hash(folder, config)}.json"
    with suppress(Exception):  # absent or damaged
        return PlainTokenizer(Tokenizer.from_file(str(kept)))
    tokenizer = load_tokenizer(home, config, save_files, error)
    if not _is_plain(tokenizer):
        return tokenizer
    backend = tokenizer.backend_tokenizer
    with suppress(OSError):  # the next process then loads HF's again
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_file(kept, backend.to_str().encode())
    return PlainTokenizer(backend)


def _hash(folder: Path, config: Mapping[str, Any]) -> str:
    """Names what HF's tokenizer follows from."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for library in ("transformers", "tokenizers"):
        digest.update(f"{library} {version(library)}".encode())
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            digest.update(f"{path.relative_to(folder)} {len(content)} ".encode() + content)
    return digest.hexdigest()


def _is_plain(tokenizer: Any) -> bool:
    """Whether HF's tokenizer encodes and decodes by its backend alone."""
    from transformers import PreTrainedTokenizerFast as Usual

    if not isinstance(tokenizer, Usual) or tokenizer.split_special_tokens:
        return False
    methods = ("__call__", "_encode_plus", "set_truncation_and_padding", "decode", "_decode")
    return all(getattr(type(tokenizer), name) is getattr(Usual, name) for name in methods)


def load_tokenizer(
    home: Path,
    config: Mapping[str, Any],
    save_files: Callable[[Path], object],
    error: type[JxNeuronError] = CheckpointError,
) -> Any:
    """The transformers tokenizer of exactly the files that `save_files` writes into a folder.

    home:   where the files come from, for errors and as the tokenizer's name_or_path.
    config: the parsed config.json; its model_type chooses the class where tokenizer_config.json names none.

    Raises `error` that names `home` where transformers cannot load one, or only with the checkpoint's own code.
    """
    from transformers import AutoTokenizer

    with temporary_folder() as folder, refuse_custom_code(home, error):
        try:
            save_files(folder)
            plain = {name: value for name, value in config.items() if name != AUTO_MAP}
            (folder / "config.json").write_text(json.dumps(plain), encoding="utf-8")
            for path in folder.glob("*config.json"):
                _check_class(json.loads(path.read_text(encoding="utf-8")).get("tokenizer_class"))
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            tokenizer.decode(tokenizer("a")["input_ids"])  # values of a wrong type fail only in use
            processor = folder / PROCESSOR_TEMPLATE
            if not tokenizer.chat_template and processor.is_file():
                template = json.loads(processor.read_text(encoding="utf-8")).get("chat_template")
                tokenizer.chat_template = template if isinstance(template, str) else None
        except (JxNeuronError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as raised:  # a panic of the tokenizers library is no Exception
            if _is_refusal(raised):
                raise
            raise error(
                f"{home}: transformers cannot make a tokenizer of its files: "
                f"{str(raised).replace(str(folder), str(home))} Use token ids, or copy a tokenizer.json there."
            ) from raised
    tokenizer.name_or_path = str(home)
    return tokenizer


@contextmanager
def refuse_custom_code(home: Path | str, error: type[JxNeuronError] = CheckpointError) -> Iterator[None]:
    """Converts transformers' refusal to run a checkpoint's own code (trust_remote_code=False) into an `error`."""
    try:
        yield
    except ValueError as raised:
        if not _is_refusal(raised):
            raise
        raise error(
            f"{home}: {AUTO_MAP} in its tokenizer_config.json or config.json names Python code of the checkpoint's "
            "own, which is never run here. Use token ids, or read that code, run it yourself, and copy there what its "
            "`save_pretrained` writes: a tokenizer.json, and a tokenizer_config.json without that field."
        ) from raised


def _check_class(name: str | None) -> None:
    """Raises ValueError for a tokenizer_class that is no tokenizer: AutoTokenizer accepts any name in transformers.

    AutoProcessor, named there, would ask on the terminal whether to run the checkpoint's code.
    """
    from transformers import PreTrainedTokenizerBase
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    named = tokenizer_class_from_name(name) if name else None
    if named is None or getattr(named, "is_dummy", False):  # a dummy says which library its class needs
        return
    if not (isinstance(named, type) and issubclass(named, PreTrainedTokenizerBase)):
        raise ValueError(f"its tokenizer_class, {name!r}, is no tokenizer.")


def _is_refusal(raised: BaseException) -> bool:
    return isinstance(raised, ValueError) and "trust_remote_code=True" in str(raised)
