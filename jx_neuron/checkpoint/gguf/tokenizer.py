"""The tokenizer that a GGUF file's metadata describe, built without torch.

Pre-tokenizers and defaults: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, FailFast, Field
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from jx_neuron.checkpoint.gguf.format import NO_TOKEN, Metadata
from jx_neuron.errors import CheckpointError
from jx_neuron.util.parsing import typed

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3"), LLAMA3_SPLIT) | {"tekken": TEKKEN_SPLIT}
DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
GPT2 = ("gpt-2", "mpt", "olmo", "jais")
INSTEAD = "Use token ids, or the tokenizer of the model's Hugging Face checkpoint."
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
TokenId = Annotated[int, Field(ge=0)] | None


class _Keys(BaseModel):
    """The `tokenizer.ggml.` keys."""

    model_config = ConfigDict(strict=True)
    model: str | None = None
    pre: str | None = None
    tokens: Annotated[list[str], FailFast()] = []
    token_type: Annotated[list[int], FailFast()] = []
    merges: Annotated[list[str], FailFast()] = []
    scores: Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], FailFast()] = []
    bos_token_id: TokenId = None
    eos_token_id: TokenId = None
    unknown_token_id: TokenId = None
    padding_token_id: TokenId = None
    add_bos_token: bool | None = None
    add_eos_token: bool = False
    add_space_prefix: bool = True
    remove_extra_whitespaces: bool = False

    def of_type(self, token_type: int) -> list[str]:
        """The tokens of one type."""
        types = self.token_type or [NORMAL] * len(self.tokens)
        return [token for token, kind in zip(self.tokens, types, strict=True) if kind == token_type]


class _General(BaseModel):
    """Other keys that a tokenizer takes."""

    model_config = ConfigDict(strict=True)
    chat_template: str | None = Field(None, alias="tokenizer.chat_template")
    context_length: int | None = Field(None, alias="llama.context_length")


def build_tokenizer(metadata: Metadata, path: Path) -> Any:
    """A `transformers.PreTrainedTokenizerFast` with special tokens and chat template.

    Raises CheckpointError, which names `path`, for a file without a tokenizer or with one of an unknown kind.
    """
    from transformers import PreTrainedTokenizerFast

    prefix = "tokenizer.ggml."
    fields = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    keys, general = typed(_Keys, fields, str(path), prefix=prefix), typed(_General, metadata, str(path))
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if keys.model not in builders or not keys.tokens:
        raise CheckpointError(
            f"{path}: tokenizer.ggml.model is {keys.model!r}, of {len(keys.tokens)} tokens; legal are "
            f"{' and '.join(builders)}. {INSTEAD}"
        )
    tokenizer = builders[keys.model](keys, path)
    ids = {name: getattr(keys, f"{key}_token_id") for name, key in SPECIAL.items()}
    special = {name: keys.tokens[i] for name, i in ids.items() if i not in (None, NO_TOKEN)}
    for token_type, add in ((CONTROL, tokenizer.add_special_tokens), (USER_DEFINED, tokenizer.add_tokens)):
        add([AddedToken(token, normalized=False, special=token_type == CONTROL) for token in keys.of_type(token_type)])
    _frame(tokenizer, keys, special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=general.chat_template,
        model_max_length=general.context_length,
        clean_up_tokenization_spaces=False,
        **special,
    )


def _byte_level(keys: _Keys, path: Path) -> Tokenizer:
    """Byte-level BPE, as of GPT-2."""
    pre, byte_level = keys.pre, pre_tokenizers.ByteLevel
    splitter: pre_tokenizers.PreTokenizer
    if pre in SPLITS:
        first = pre_tokenizers.Split(Regex(SPLITS[pre]), behavior="isolated")
        splitter = pre_tokenizers.Sequence([first, byte_level(add_prefix_space=False, use_regex=False)])
    elif pre in DIGITS:
        splitter = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level(add_prefix_space=False)])
    elif pre in GPT2:
        splitter = byte_level(add_prefix_space=False)
    else:
        legal = ", ".join((*GPT2, *DIGITS, *SPLITS))
        raise CheckpointError(f"{path}: tokenizer.ggml.pre is {pre!r}; legal are {legal}. {INSTEAD}")
    vocabulary = {token: i for i, token in enumerate(keys.tokens)}
    merges = []
    for merge in keys.merges:
        cut = merge.index(" ", 1)
        left, right = merge[:cut], merge[cut + 1 :]
        for token in (left, right, left + right):
            if token not in vocabulary:
                raise CheckpointError(
                    f"{path}: the merge {merge!r} takes a token {token!r}, which is not there. {INSTEAD}"
                )
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in SPLITS))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(keys: _Keys, path: Path) -> Tokenizer:
    """SentencePiece BPE with byte fallback, as of Llama 2: the pair that gives the piece with the best score merges."""
    if keys.remove_extra_whitespaces:
        raise CheckpointError(f"{path}: tokenizer.ggml.remove_extra_whitespaces is true; legal is false. {INSTEAD}")
    vocabulary = {token: i for i, token in enumerate(keys.tokens)}
    pieces = dict.fromkeys(keys.of_type(NORMAL))
    ranked = sorted(pieces, key=lambda piece: -keys.scores[vocabulary[piece]])
    merges = [
        (piece[:cut], piece[cut:])
        for piece in ranked
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    unknown = keys.tokens[keys.unknown_token_id or 0]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend("▁")] if keys.add_space_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    undo = [decoders.Strip(" ", 1, 0)] if keys.add_space_prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *undo])
    return tokenizer


def _frame(tokenizer: Tokenizer, keys: _Keys, special: dict[str, str]) -> None:
    """Makes `tokenizer` add bos and eos as the file says, or else as llama.cpp does."""
    by_default = keys.model == "llama" or keys.pre in SPLITS
    begins = by_default if keys.add_bos_token is None else keys.add_bos_token
    first = [special["bos_token"]] if begins and "bos_token" in special else []
    last = [special["eos_token"]] if keys.add_eos_token and "eos_token" in special else []
    if first or last:
        ids = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(first + last)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*first, "$A", *last],
            pair=[*first, "$A", *last, *(f"{token}:1" for token in first), "$B:1", *(f"{t}:1" for t in last)],
            special_tokens=ids,
        )
