"""The tokenizer that a GGUF file's metadata describe, built without torch.

Pre-tokenizers and defaults: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from jx_neuron.errors import CheckpointError
from jx_neuron.gguf_format import Metadata

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


def build_tokenizer(metadata: Metadata, path: Path) -> Any:
    """A `transformers.PreTrainedTokenizerFast` with special tokens and chat template.

    Raises CheckpointError, which names `path`, for a file without a tokenizer and a kind that is not known.
    """
    from transformers import PreTrainedTokenizerFast

    keys = {k.removeprefix("tokenizer.ggml."): v for k, v in metadata.items() if k.startswith("tokenizer.")}
    kind, tokens = keys.get("model"), keys.get("tokens")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders or not tokens:
        raise CheckpointError(
            f"{path}: tokenizer.ggml.model is {kind!r}, of {len(tokens or ())} tokens; legal are "
            f"{' and '.join(builders)}. {INSTEAD}"
        )
    try:
        tokenizer: Tokenizer = builders[kind](keys, path)
        names = {name: keys.get(f"{key}_token_id") for name, key in SPECIAL.items()}
        special = {name: tokens[i] for name, i in names.items() if i is not None}
        types = keys.get("token_type") or [NORMAL] * len(tokens)
        for wanted in (CONTROL, USER_DEFINED):
            added = [AddedToken(t, normalized=False, special=wanted == CONTROL) for t in _of(tokens, types, wanted)]
            (tokenizer.add_special_tokens if wanted == CONTROL else tokenizer.add_tokens)(added)
        _frame(tokenizer, keys, special)
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(
            f"{path}: no tokenizer can be built from the GGUF metadata ({error!r}). {INSTEAD}"
        ) from error
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=keys.get("tokenizer.chat_template"),
        model_max_length=metadata.get(f"{metadata.get('general.architecture')}.context_length"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _of(tokens: list[str], types: list[int], wanted: int) -> list[str]:
    return [token for token, kind in zip(tokens, types, strict=True) if kind == wanted]


def _byte_level(keys: dict[str, Any], path: Path) -> Tokenizer:
    """Byte-level BPE, as of GPT-2."""
    pre, byte_level = keys.get("pre"), pre_tokenizers.ByteLevel
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
    merges = []
    for merge in keys["merges"]:
        cut = merge.index(" ", 1)
        merges.append((merge[:cut], merge[cut + 1 :]))
    vocabulary = {token: i for i, token in enumerate(keys["tokens"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in SPLITS))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(keys: dict[str, Any], path: Path) -> Tokenizer:
    """SentencePiece BPE with byte fallback, as of Llama 2: the pair that makes the best piece merges."""
    if keys.get("remove_extra_whitespaces"):
        raise CheckpointError(f"{path}: tokenizer.ggml.remove_extra_whitespaces is true; legal is false. {INSTEAD}")
    tokens, scores = keys["tokens"], keys["scores"]
    types = keys.get("token_type") or [NORMAL] * len(tokens)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pieces = set(_of(tokens, types, NORMAL))
    ranked = sorted(pieces, key=lambda piece: -scores[vocabulary[piece]])
    merges = [
        (piece[:cut], piece[cut:])
        for piece in ranked
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    unknown = tokens[keys.get("unknown_token_id", 0)]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = keys.get("add_space_prefix", True)
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    undo = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *undo])
    return tokenizer


def _frame(tokenizer: Tokenizer, keys: dict[str, Any], special: dict[str, str]) -> None:
    """Has `tokenizer` begin with bos and end with eos as the file says, or else as llama.cpp does."""
    begins = keys.get("add_bos_token", keys["model"] == "llama" or keys.get("pre") in SPLITS)
    ends = keys.get("add_eos_token", False)
    first = [special["bos_token"]] if begins and "bos_token" in special else []
    last = [special["eos_token"]] if ends and "eos_token" in special else []
    if first or last:
        ids = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(first + last)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*first, "$A", *last],
            pair=[*first, "$A", *last, *(f"{token}:1" for token in first), "$B:1", *(f"{t}:1" for t in last)],
            special_tokens=ids,
        )
