"""The text of answers as it grows, with tokenizers whose tokens are bytes: prompts that end, and answers, anywhere."""

from collections.abc import Sequence

import pytest
import tiny
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jx_neuron import NeuronAutoModelForCausalLM
from jx_neuron.engine.stopping import Detokenizer, StopStrings

TEXTS = [
    "Hello, world",
    "a 😀😀 b👩‍👩‍👧‍👦 ",
    "你好，世界。再见",
    "naïve café — “quoted”\n\n",
    "x\ufffdy\ufffd\ufffd\ufffd\ufffd\ufffd 好\ufffd",
    "🇫🇷é́日本",
]


def made(tokenizer: Tokenizer) -> transformers.PreTrainedTokenizerFast:
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_level() -> transformers.PreTrainedTokenizerFast:
    """GPT-2's kind. Some tokens begin in one character and end in the next."""
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for text, first in (("lo", 0), (" 😀", 0), ("你好", 2), ("好，", 1), ("世界", 2), ("é ", 1), ("日", 0)):
        letters = bytes_of.pre_tokenize_str(text)[0][0]
        left, right = letters[first], letters[first + 1]
        vocab[left + right] = len(vocab)
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = bytes_of, decoders.ByteLevel()
    return made(tokenizer)


def byte_fallback() -> transformers.PreTrainedTokenizerFast:
    """Llama's kind: what is no token goes by bytes, and the space of a first word is not written."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abHelo,wrd好é", "▁a", "▁H"]
    vocab = {token: i for i, token in enumerate(tokens)}
    model = models.BPE(
        vocab=vocab, merges=[("▁", "a"), ("▁", "H")], byte_fallback=True, unk_token="<unk>", fuse_unk=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made(tokenizer)


LEVEL, FALLBACK = byte_level(), byte_fallback()
BYTES = len(pre_tokenizers.ByteLevel.alphabet()) + 7


def decode(tokenizer: transformers.PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def streamed(
    tokenizer: transformers.PreTrainedTokenizerFast, prompt: Sequence[int], answer: Sequence[int]
) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt, skip_special_tokens=True)
    return [detokenizer.add(token, last=i == len(answer)) for i, token in enumerate(answer, start=1)]


def added(tokenizer: transformers.PreTrainedTokenizerFast, prompt: Sequence[int], answer: Sequence[int]) -> str:
    """What decoding prompt and answer together adds, as Detokenizer's docstring has it."""
    before, whole = decode(tokenizer, prompt), decode(tokenizer, [*prompt, *answer])
    cuts = (decode(tokenizer, prompt[: max(0, len(prompt) - cut)]) for cut in range(4))
    finished = next((text for text in cuts if not text.endswith("\ufffd")), "")
    alike = next(
        (i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), min(len(before), len(whole))
    )
    return whole[max(len(finished), alike) :]


def unfinished(tokenizer: transformers.PreTrainedTokenizerFast, text: str, prompt: Sequence[int]) -> str:
    """The text without the characters of which the prompt, its first tokens, has every byte."""
    tokens = tokenizer.convert_ids_to_tokens(prompt)
    if tokenizer is FALLBACK:
        tokens = ["." if token.startswith("<0x") else token.replace("▁", " ") for token in tokens]
        text = f" {text}"
    size = sum(len(token) if tokenizer is LEVEL else len(token.encode()) for token in tokens)
    return text[len(text.encode()[:size].decode(errors="ignore")) :]


@pytest.mark.parametrize("tokenizer", [LEVEL, FALLBACK], ids=["byte level", "byte fallback"])
@pytest.mark.parametrize("text", [*TEXTS, " ".join(TEXTS)])
def test_a_prompt_may_end_inside_a_character(tokenizer, text) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert decode(tokenizer, ids) == text
    for split in range(1, len(ids)):
        prompt, answer = ids[:split], ids[split:]
        joined, expected = "".join(streamed(tokenizer, prompt, answer)), unfinished(tokenizer, text, prompt)
        if expected.startswith("\ufffd"):  # and the prompt's text may end in one that stands for it
            assert joined in (expected, expected[1:])
        else:
            assert joined == expected
        if tokenizer is LEVEL or "\ufffd" not in text:
            assert joined == added(tokenizer, prompt, answer)


def test_a_split_character_comes_whole_and_with_its_last_token() -> None:
    for tokenizer in (LEVEL, FALLBACK):
        begun = tokenizer.encode("a", add_special_tokens=False)
        tokens = [t for t in tokenizer.encode("a👩🏽b", add_special_tokens=False) if t not in begun]
        assert len(tokens) == 9
        for split in range(1, 4):
            texts = streamed(tokenizer, [*begun, *tokens[:split]], tokens[split:])
            assert texts == [*[""] * (3 - split), "👩", "", "", "", "🏽", "b"]


@pytest.mark.parametrize("text", [text for text in TEXTS if "\ufffd" not in text])
def test_a_stop_string_may_begin_with_a_split_character(text) -> None:
    for tokenizer in (LEVEL, FALLBACK):
        ids = tokenizer.encode(text, add_special_tokens=False)
        for split in range(1, len(ids)):
            strings = StopStrings([unfinished(tokenizer, text, ids[:split])], tokenizer, ids[:split])
            ends = [strings.ended_by(token) for token in ids[split:]]
            assert ends == [False] * (len(ends) - 1) + [True]


@settings(max_examples=300, deadline=None)
@given(
    ids=st.lists(st.integers(0, BYTES - 1), max_size=60) | st.lists(st.sampled_from(range(120, 200)), max_size=40),
    split=st.integers(0, 40),
)
@example(ids=LEVEL.encode("\ufffd" * 9 + "😀"), split=8)
def test_bytes_of_any_kind_are_streamed_as_they_decode_together(ids, split) -> None:
    prompt, answer = ids[:split], ids[split:]
    texts = streamed(LEVEL, prompt, answer)
    assert "".join(texts) == added(LEVEL, prompt, answer)
    assert all(len(piece) <= 12 for piece in texts)


@settings(max_examples=200, deadline=None)
@example(text="  ", split=0, ends=set())
@given(
    text=st.text(st.sampled_from("ab ,好你é😀世\n"), max_size=30),
    split=st.integers(0, 30),
    ends=st.sets(st.integers(0, 40)),
)
def test_texts_with_special_tokens_in_between(text, split, ends) -> None:
    for tokenizer in (LEVEL, FALLBACK):
        end = tokenizer.convert_tokens_to_ids("</s>")
        ids = []
        for at, letter in enumerate(text):
            ids += [end] * (at in ends) + tokenizer.encode("a" + letter, add_special_tokens=False)[1:]
        prompt, answer = ids[:split], ids[split:]
        assert "".join(streamed(tokenizer, prompt, answer)) == added(tokenizer, prompt, answer)


def test_a_model_streams_what_decoding_adds(tmp_path) -> None:
    """Random bytes behind a prompt that ends inside a character; and a text of them ends the row."""
    config = transformers.GPT2Config(**tiny.GPT2 | {"vocab_size": len(LEVEL)})
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    LEVEL.save_pretrained(tmp_path)
    model = NeuronAutoModelForCausalLM.from_pretrained(tmp_path, n_positions=64)
    prompt = LEVEL.encode("世界😀")[:-1]
    bias = {prompt[-1] + 1: 4.0}  # some bytes that go on in a character
    options = dict(top_k=0, seed=3, logit_bias=bias)
    steps = list(model.stream([prompt], 60, **options))
    answer = [int(step.tokens[0]) for step in steps]
    joined = "".join(step.text[0] for step in steps)
    assert joined == added(LEVEL, prompt, answer)
    stop = joined[:2]
    ended = list(model.stream([prompt], 60, stop_strings=stop, **options))
    assert "".join(step.text[0] for step in ended).startswith(stop)
    assert len(ended) < len(steps)


def test_an_answer_cut_inside_a_character_ends_in_what_stands_for_one() -> None:
    for tokenizer in (LEVEL, FALLBACK):
        ids = tokenizer.encode("a你😀", add_special_tokens=False)
        texts = streamed(tokenizer, ids[:1], ids[1:-1])
        assert "".join(texts).rstrip("\ufffd") == "你"
        assert texts[-1].startswith("\ufffd")


def test_what_a_token_costs_does_not_grow_with_the_stream() -> None:
    """Not even where nothing of it is text."""
    length = 3000
    stray = LEVEL.encode("\ufffd", add_special_tokens=False)[1]
    end = LEVEL.convert_tokens_to_ids("</s>")
    for tokenizer, tokens, expected in (
        (LEVEL, LEVEL.encode("你好，世界 " * length)[:length], None),
        (LEVEL, [stray] * length, "\ufffd" * length),
        (LEVEL, [end] * length, ""),
        (FALLBACK, FALLBACK.encode("世界" * length)[: length + 1], None),
        (FALLBACK, [200] * length, "\ufffd" * length),
    ):
        detokenizer = Detokenizer(tokenizer, [], skip_special_tokens=True)
        decode_, counts = detokenizer._decode, []
        detokenizer._decode = lambda tokens, decode_=decode_, counts=counts: (
            counts.append(len(tokens)) or decode_(tokens)
        )
        text = "".join([*(detokenizer.add(token) for token in tokens), detokenizer.add(last=True)])
        assert text == (decode(tokenizer, tokens) if expected is None else expected)
        assert sum(counts) < 25 * length
