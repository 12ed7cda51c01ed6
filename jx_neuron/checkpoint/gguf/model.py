"""The model of a GGUF file as HF has it: config fields, and tensors by HF's names in HF's layouts."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jx_neuron.checkpoint.gguf.architecture import ROWS, Architecture, Edit, Names, transposed, without_one
from jx_neuron.checkpoint.gguf.architectures import ARCHITECTURES
from jx_neuron.checkpoint.gguf.format import (
    AFFINE,
    GGUF,
    NO_TOKEN,
    PLAIN,
    Entry,
    Metadata,
    affine,
    load,
    part,
    read_gguf,
)
from jx_neuron.checkpoint.gguf.keys import INSTEAD, ROPE_TENSORS, Header, Keys
from jx_neuron.checkpoint.tensor_files import Array, Tensor
from jx_neuron.checkpoint.tokenizer import PlainTokenizer
from jx_neuron.errors import CheckpointError
from jx_neuron.util.arguments import shown
from jx_neuron.util.parsing import AGAIN

__all__ = ["Model", "generation_config"]

FIELDS: dict[str, str | None] = {  # of Keys: HF's usual names of fields
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "key_length": "head_dim",
    "rms_epsilon": "rms_norm_eps",
    "epsilon": None,
    "rotated": None,
}
NO_CHANGE: dict[str, tuple[Any, ...]] = {  # keys that change nothing at these values
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "nextn_predict_layers": (0,),
    "rope.scaling.finetuned": (True, False),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "tensor_data_layout": ("Meta AI original pth",),
}
# of those with which llama.cpp ends an answer by their text, the ones that chat templates write after a turn:
# https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp (special_eog_ids)
ENDS_OF_TURN = "<|eot_id|> <|im_end|> <|end|> <end_of_turn> <turn|> <EOT> [EOT] <end_of_utterance>".split()


@dataclass(frozen=True)
class Model:
    """The model of a GGUF file, whose tokenizer is read again each time it is used.

    Raises CheckpointError for an architecture that HF's decoders here do not have, for a key that is missing or does
    not fit the tensors, and for one whose value HF's model cannot express.
    """

    header: Header
    architecture: Architecture

    @classmethod
    def of(cls, file: GGUF) -> "Model":
        name = file.metadata.get("general.architecture")
        if not isinstance(name, str) or name not in ARCHITECTURES:
            raise CheckpointError(
                f"{file.path}: a GGUF file of architecture {shown(name)}; legal are {', '.join(ARCHITECTURES)}. "
                "Use the model's Hugging Face checkpoint (safetensors)."
            )
        if "token_embd.weight" not in file.entries:
            raise CheckpointError(f"{file.path}: there is no tensor 'token_embd.weight'; {AGAIN}.")
        architecture = ARCHITECTURES[name]
        return cls(Header(file, name, architecture.several), architecture)

    def config(self) -> dict[str, Any]:
        """The fields of HF's config.json."""
        header, architecture = self.header, self.architecture
        self._check_sizes()
        self._check_keys()
        fields = FIELDS | architecture.fields
        values = {hf: self._value(attribute) for attribute, hf in fields.items() if hf}
        config = {
            "model_type": architecture.model_type,
            **values,
            **{hf: header.fields[key] for key, hf in architecture.numbers.items() if key in header.fields},
            **{hf: any(map(header.has, names)) for hf, names in architecture.flags.items()},
            "vocab_size": header.file.entries["token_embd.weight"].shape[0],
            "tie_word_embeddings": "output.weight" not in header.file.entries,
        }
        if architecture.rope:
            partial_rotary = {"partial_rotary_factor": header.partial()} if architecture.partial else {}
            config["rope_parameters"] = architecture.rope(header) | partial_rotary
        ids = {f"{kind}_token_id": _token_id(header.file.metadata, kind) for kind in ("bos", "eos", "pad")}
        return config | architecture.more(header) | ids

    def _value(self, attribute: str) -> Any:
        header = self.header
        values = {"kv_heads": header.kv_heads, "key_length": header.head_dim, "rotated": header.rotated}
        value = values.get(attribute, getattr(header.keys, attribute))
        if value is None:
            raise CheckpointError(f"{header.file.path} lacks {header.architecture}.{_key(attribute)}; {AGAIN}.")
        return value

    def _check_sizes(self) -> None:
        """Raises CheckpointError for a key that does not fit the tensors, or other keys."""
        header, architecture = self.header, self.architecture
        keys, fields = header.keys, FIELDS | architecture.fields
        entries, width = header.file.entries, header.keys.embedding_length
        embedding = entries["token_embd.weight"].shape
        layers = {layer[1] for name in entries if (layer := re.match(r"blk\.(\d+)\.", name))}
        expected = [
            ("block_count", len(layers), "how many layers the tensors are of"),
            ("embedding_length", embedding[-1], "the width of token_embd.weight"),
            ("vocab_size", embedding[0], "the rows of token_embd.weight"),
            ("attention.value_length", header.head_dim, "the head size"),
        ]
        if not architecture.partial and fields["rotated"] is None:
            expected.append(("rope.dimension_count", header.head_dim, "the head size"))
        if fields["key_length"] is None:
            expected.append(("attention.key_length", width // keys.heads, "the width over the heads"))
        if fields["kv_heads"] is None and "attention.head_count_kv" not in architecture.legal:
            expected.append(("attention.head_count_kv", keys.heads, "the number of heads"))
        if fields["feed_forward_length"] is None:
            expected.append(("feed_forward_length", 4 * width, "four times the width"))
        for unused, used in (("epsilon", "rms_epsilon"), ("rms_epsilon", "epsilon")):
            if fields[unused] is None and fields[used] is not None:
                expected.append((_key(unused), getattr(keys, used), f"that of {_key(used)}"))
        for key, legal, why in expected:
            if (value := header.fields.get(key, legal)) != legal:
                raise CheckpointError(
                    f"{header.file.path}: {header.architecture}.{key} is {shown(value)}; legal is {why}, {legal}. "
                    f"{INSTEAD}"
                )

    def _check_keys(self) -> None:
        """Raises CheckpointError for a key that nothing reads, unless it has a value that changes nothing."""
        header, architecture = self.header, self.architecture
        read = {*map(_key, Keys.model_fields), *architecture.numbers, *architecture.reads}
        if architecture.rope is None:
            rotated = {_key("rotated")} if "rotated" in architecture.fields else set()
            read -= {key for key in read if key.startswith("rope.")} - rotated
        legal = {**NO_CHANGE, **architecture.legal}
        for key, value in header.fields.items():
            if key in read and key not in architecture.legal:
                continue
            if key not in legal:
                raise header.refusal(key, value, f"HF's {architecture.model_type} has nothing like it")
            if value not in legal[key]:
                raise header.refusal(key, value, f"legal is {' or '.join(map(repr, legal[key]))}")

    def tensors(self) -> dict[str, Tensor]:
        """The tensors under HF's names; one without such a name keeps its own."""
        names = self.architecture.names
        names = names(self.header) if callable(names) else names
        entries = self.header.file.entries.items()
        named = [self._named(name, entry, names) for name, entry in entries if name not in ROPE_TENSORS]
        return {name: tensor for tensors in (*named, self._listed()) for name, tensor in tensors}

    def _named(self, name: str, entry: Entry, names: Names) -> Iterator[tuple[str, Tensor]]:
        """The tensors that HF makes of one, with their names."""
        header = self.header
        stem, _, suffix = name.rpartition(".")
        layer = re.match(r"blk\.(\d+)\.", stem)
        generic = re.sub(r"^blk\.\d+\.", "blk.{i}.", stem)
        if isinstance(exact := names.get(f"{generic}.{suffix}"), str) and layer:
            yield exact.replace("{i}", layer[1]), self._tensor(entry, None)
            return
        hf = names.get(generic)
        if hf is None:
            yield name, self._tensor(entry, None)
            return
        block = generic.removeprefix("blk.{i}.")
        edit = self.architecture.edits.get(block)
        if self.architecture.one_added and block.endswith("norm") and suffix == "weight":
            edit = without_one
        if block in ROWS and (edit or isinstance(hf, tuple)):
            self._check_rows(name, entry, ROWS[block](header.keys.heads, header.kv_heads) * header.head_dim)
        for one, piece in self._parts(entry, hf):
            yield f"{one.replace('{i}', layer[1] if layer else '')}.{suffix}", self._tensor(piece, edit)

    def _check_rows(self, name: str, entry: Entry, rows: int) -> None:
        if entry.shape[0] != rows:
            header = self.header
            raise CheckpointError(
                f"{header.file.path}: tensor {name!r} has {entry.shape[0]} rows; legal are {rows}, of "
                f"{header.keys.heads} query and {header.kv_heads} key heads of size {header.head_dim}. {INSTEAD}"
            )

    def _parts(self, entry: Entry, hf: str | tuple[str, ...]) -> Iterator[tuple[str, Entry]]:
        """HF's names of parts of a tensor, and where the rows of each are."""
        if isinstance(hf, tuple):
            n, k, h = self.header.keys.heads, self.header.kv_heads, self.header.head_dim
            start = 0
            for name, rows in zip(hf, (n * h, k * h, k * h), strict=True):
                yield name, part(entry, start, start + rows)
                start += rows
        elif "{r}" in hf:
            for row in range(entry.shape[0]):
                yield hf.replace("{r}", str(row)), replace(part(entry, row, row + 1), shape=entry.shape[1:])
        else:
            yield hf, entry

    def _tensor(self, entry: Entry, edit: Edit | None) -> Tensor:
        path, n, k = self.header.file.path, self.header.keys.heads, self.header.kv_heads
        dtype = np.dtype(np.float32 if edit is without_one else PLAIN.get(entry.type, np.float32))
        edited = edit or (lambda array, n, k: array)
        shape = entry.shape[::-1] if edit is transposed else entry.shape

        def scales_and_offsets() -> tuple[Array, Array]:
            scales, offsets = affine(path, entry)
            return edited(scales, n, k), edited(offsets, n, k)

        is_affine = entry.type in AFFINE and edit is not without_one
        return Tensor(
            shape,
            dtype,
            lambda: edited(load(path, entry), n, k),
            rows=None if edit or len(shape) < 2 else lambda start, stop: load(path, part(entry, start, stop)),
            affine=scales_and_offsets if is_affine else None,
            grouped=is_affine,
        )

    def tokenizer(self, plain: bool) -> Any:
        """HF's tokenizer, or a PlainTokenizer. Raises CheckpointError for a file without one, or of an unknown kind."""
        from jx_neuron.checkpoint.gguf.tokenizer import Vocabulary

        path, length = self.header.file.path, self.header.keys.context_length
        vocabulary = Vocabulary.of(read_gguf(path).metadata, path, length, in_order=self.architecture.in_order)
        return PlainTokenizer(vocabulary.backend) if plain else vocabulary.hf_tokenizer()

    def _listed(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors of which the metadata has one number for each layer."""
        metadata, layers = self.header.file.metadata, self.header.keys.block_count
        for key, (name, shape) in self.architecture.lists.items():
            numbers = metadata.get(key)
            if (
                not isinstance(numbers, list)
                or len(numbers) != layers
                or not all(isinstance(x, float) for x in numbers)
            ):
                raise CheckpointError(
                    f"{self.header.file.path}: {key} is {shown(numbers)}; legal is a number for each of "
                    f"{layers} layers. {INSTEAD}"
                )
            for i, number in enumerate(numbers):
                array = np.full(shape, number, np.float32)
                yield name.replace("{i}", str(i)), Tensor(shape, array.dtype, array.copy)


def _key(attribute: str) -> str:
    """The key of an attribute of Keys."""
    return Keys.model_fields[attribute].alias or attribute


def generation_config(metadata: Metadata) -> dict[str, Any] | None:
    """HF's generation config: the bos token, and the tokens that end a turn; None where the file names none.

    Many files name only the token that ends a text, and not the one with which their chat template ends a turn.
    """
    named = (_token_id(metadata, kind) for kind in ("eos", "eot"))
    ends = list(dict.fromkeys([*(i for i in named if i is not None), *_ends_in_template(metadata)]))
    begin = _token_id(metadata, "bos")
    if begin is None and not ends:
        return None
    return {"bos_token_id": begin, "eos_token_id": ends or None, "pad_token_id": _token_id(metadata, "pad")}


def _ends_in_template(metadata: Metadata) -> Iterator[int]:
    tokens, template = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.chat_template")
    if isinstance(tokens, list) and isinstance(template, str):
        used = {text for text in ENDS_OF_TURN if text in template}
        yield from (i for i, token in enumerate(tokens) if token in used)


def _token_id(metadata: Metadata, kind: str) -> Any:
    token = metadata.get(f"tokenizer.ggml.{'padding' if kind == 'pad' else kind}_token_id")
    return None if token == NO_TOKEN else token
