"""The tokenizer that a GGUF file's metadata describe, built without torch.

Pre-tokenizers and defaults: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, FailFast, Field
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from jx_neuron.checkpoint.gguf.format import NO_TOKEN, Metadata
from jx_neuron.errors import CheckpointError
from jx_neuron.util.parsing import typed

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+{end}"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*{end}"
)
CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = WORDS + r"|\p{N}{1,3}|" + REST
QWEN2_SPLIT = WORDS + r"|\p{N}|" + REST
QWEN35_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN_SPLIT = CASED.replace("{end}", "") + r"|\p{N}|" + CASED_REST
GPT4O_SPLIT = CASED.replace("{end}", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?") + r"|\p{N}{1,3}|" + CASED_REST
SEED_SPLIT = WORDS + r"|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
DEEPSEEK3_SPLITS = (
    r"\p{N}{1,3}",
    r"[一-龥\u3040-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
BLOOM_SPLIT = r" ?[^(\s|.,!?…。，、।۔،)]+"
FALCON_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|`]+"

# the expressions, one after the other, that split a text before its pieces are merged
SPLITS: Mapping[str, tuple[str, ...]] = {
    name: expressions
    for names, expressions in {
        "gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4 gigachat a.x-4.0 mellum": (GPT2_SPLIT,),
        "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": (r"\p{N}", GPT2_SPLIT),
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 dbrx smaug-bpe glm4 chatglm-bpe": (
            LLAMA3_SPLIT,
        ),
        "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan grok-2 solar-open": (QWEN2_SPLIT,),
        "qwen35": (QWEN35_SPLIT,),
        "tekken": (TEKKEN_SPLIT,),
        "gpt-4o llama4 kanana2 talkie minimax-m2": (GPT4O_SPLIT,),
        "seed-coder": (SEED_SPLIT,),
        "deepseek-v3 hunyuan-dense": DEEPSEEK3_SPLITS,
        "falcon": (FALCON_PUNCTUATION, GPT2_SPLIT, "[0-9][0-9][0-9]"),
        "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2_SPLIT, r"\p{N}+", "[0-9][0-9][0-9]"),
        "bloom poro-chat gpt3-finnish": (BLOOM_SPLIT,),
        "viking": (BLOOM_SPLIT, r"\p{N}"),
    }.items()
    for name in names.split()
}
WHOLE_WORDS = frozenset("llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 tekken".split())
"""Names with which a word of the vocabulary is taken whole, whatever the merges, and a bos token begins a text."""
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

    def of_type(self, *token_types: int) -> list[str]:
        """The tokens of some types."""
        types = self.token_type or [NORMAL] * len(self.tokens)
        return [token for token, kind in zip(self.tokens, types, strict=True) if kind in token_types]


class _Templates(BaseModel):
    """The keys of chat templates; named ones are besides the default."""

    model_config = ConfigDict(strict=True, extra="allow")
    default: str | None = Field(None, alias="tokenizer.chat_template")
    names: Annotated[list[str], FailFast()] = Field([], alias="tokenizer.chat_templates")


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer of a GGUF file.

    backend:   makes tokens of texts, and texts of tokens.
    special:   HF's names of special tokens, and the tokens.
    templates: the chat template, or several by name.
    length:    the longest sequence that the model was trained on.
    """

    backend: Tokenizer
    special: Mapping[str, str]
    templates: str | dict[str, str] | None
    length: int

    @classmethod
    def of(cls, metadata: Metadata, path: Path, length: int, *, in_order: bool = False) -> Self:
        """The one that a file's metadata describe.

        in_order: whether pieces of a SentencePiece vocabulary are in the order in which they merge, whatever their
                  scores, as Gemma's are.

        Raises CheckpointError, which names `path`, for a file without a tokenizer or with one of an unknown kind.
        """
        prefix = "tokenizer.ggml."
        fields = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
        keys, templates = typed(_Keys, fields, str(path), prefix=prefix), typed(_Templates, metadata, str(path))
        sentencepiece = partial(_sentencepiece, in_order=in_order)
        builders: Mapping[str, Callable[[_Keys, Path], Tokenizer]] = {
            "gpt2": _byte_level,
            "llama": sentencepiece,
            "gemma4": sentencepiece,
        }
        if keys.model is None or keys.model not in builders or not keys.tokens:
            raise CheckpointError(
                f"{path}: tokenizer.ggml.model is {keys.model!r}, of {len(keys.tokens)} tokens; legal are "
                f"{', '.join(builders)}. {INSTEAD}"
            )
        tokenizer = builders[keys.model](keys, path)
        ids = {name: getattr(keys, f"{key}_token_id") for name, key in SPECIAL.items()}
        special = {name: keys.tokens[i] for name, i in ids.items() if i not in (None, NO_TOKEN)}
        for token_type, add in ((CONTROL, tokenizer.add_special_tokens), (USER_DEFINED, tokenizer.add_tokens)):
            known = (token for token in keys.of_type(token_type) if tokenizer.token_to_id(token) is not None)
            add([AddedToken(token, normalized=False, special=token_type == CONTROL) for token in known])
        added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        tokenizer.add_special_tokens([token for token in dict.fromkeys(special.values()) if token not in added])
        _frame(tokenizer, keys, special)
        return cls(tokenizer, special, _chat_template(templates), length)

    def hf_tokenizer(self) -> Any:
        """A `transformers.PreTrainedTokenizerFast` with special tokens and chat templates."""
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(
            tokenizer_object=self.backend,
            chat_template=self.templates,
            model_max_length=self.length,
            clean_up_tokenization_spaces=False,
            **self.special,
        )


def _chat_template(templates: _Templates) -> str | dict[str, str] | None:
    """The default template, or where there are named ones, all by name."""
    extra = templates.model_extra or {}
    named = {name: extra.get(f"tokenizer.chat_template.{name}") for name in templates.names}
    texts = {name: text for name, text in named.items() if isinstance(text, str)}
    if templates.default is None or not texts:
        return templates.default
    return {"default": templates.default, **texts}


def _byte_level(keys: _Keys, path: Path) -> Tokenizer:
    """Byte-level BPE, as of GPT-2."""
    if keys.pre is None or keys.pre not in SPLITS:
        raise CheckpointError(
            f"{path}: tokenizer.ggml.pre is {keys.pre!r}; legal are {', '.join(sorted(SPLITS))}. {INSTEAD}"
        )
    vocabulary = {token: i for i, token in enumerate(keys.tokens)}
    merges = _merges(keys, vocabulary, path)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=keys.pre in WHOLE_WORDS))
    splits = [pre_tokenizers.Split(Regex(expression), behavior="isolated") for expression in SPLITS[keys.pre]]
    bytes_to_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_to_letters])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _merges(keys: _Keys, vocabulary: Mapping[str, int], path: Path) -> list[tuple[str, str]]:
    """The file's merges. Raises CheckpointError where one takes or gives a token that the vocabulary does not have."""
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
    return merges


def _sentencepiece(keys: _Keys, path: Path, *, in_order: bool) -> Tokenizer:
    """SentencePiece BPE with byte fallback, as of Llama 2 and Gemma.

    Where the file has no merges, the pair merges first that gives the piece with the best score, or `in_order`, the
    first piece of the vocabulary.
    """
    if keys.remove_extra_whitespaces:
        raise CheckpointError(f"{path}: tokenizer.ggml.remove_extra_whitespaces is true; legal is false. {INSTEAD}")
    # llama.cpp's converter writes runs of spaces as such
    spelled = [f"{'▁' * len(token)}" if in_order and token.strip(" ") == "" else token for token in keys.tokens]
    vocabulary = {token: i for i, token in enumerate(spelled)}
    if keys.merges:
        merges = _merges(keys, vocabulary, path)
    else:
        usable = {NORMAL, USER_DEFINED} if in_order else {NORMAL}
        types = keys.token_type or [NORMAL] * len(spelled)
        pieces = dict.fromkeys(token for token, kind in zip(spelled, types, strict=True) if kind in usable)
        ranks = vocabulary if in_order else {piece: -keys.scores[vocabulary[piece]] for piece in pieces}
        merges = [
            (piece[:cut], piece[cut:])
            for piece in sorted(pieces, key=ranks.__getitem__)
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
    by_default = keys.model == "llama" or keys.pre in WHOLE_WORDS
    begins = by_default if keys.add_bos_token is None else keys.add_bos_token
    if keys.model == "gemma4":  # HF adds none, since the chat template does
        begins = False
    first = [special["bos_token"]] if begins and "bos_token" in special else []
    last = [special["eos_token"]] if keys.add_eos_token and "eos_token" in special else []
    if first or last:
        ids = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(first + last)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*first, "$A", *last],
            pair=[*first, "$A", *last, *(f"{token}:1" for token in first), "$B:1", *(f"{t}:1" for t in last)],
            special_tokens=ids,
        )
