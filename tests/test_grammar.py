"""Grammars: what a random model writes under a JSON schema is valid by `jsonschema`, and a regex matches in full."""

import builtins
import json
import random
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema
import numpy as np
import pytest
import serving
import tiny
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers

from jx_neuron import InputError, NeuronAutoModelForCausalLM, SamplingParams
from jx_neuron.checkpoint.demo import demo_model
from jx_neuron.checkpoint.folder import open_checkpoint
from jx_neuron.checkpoint.tokenizer import PlainTokenizer
from jx_neuron.engine.grammar import Grammars

PADDED = 64  # logits beyond the tokenizer's vocabulary
PATTERNS = ["^[a-z]{2,5}$", "^(red|green|blue)$", r"^\d{3}-\d{4}$", "^[A-Z][a-z]*$", r"^[a-c]+@[a-c]+\.org$"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return open_checkpoint(demo_model()).tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> NeuronAutoModelForCausalLM:
    """A random llama of 8 rows with the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=len(tokenizer) + PADDED, max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return NeuronAutoModelForCausalLM.from_pretrained(folder, batch_size=8)


@pytest.fixture(scope="module")
def grammars(model: NeuronAutoModelForCausalLM) -> Grammars:
    return Grammars(model.text_tokenizer, model.settings.vocab_size, model.eos_token_ids)


def schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    """A random JSON schema of the common subset."""
    leaves = ["string", "pattern", "integer", "number", "boolean", "null", "enum", "const"]
    kind = rng.choice(leaves if not depth else leaves + 2 * ["object", "array", "anyOf", "types"])
    low = rng.randint(-100, 100)
    few = rng.randint(0, 2)
    match kind:
        case "string":
            return {"type": "string", "minLength": few, "maxLength": few + rng.randint(0, 12)}
        case "pattern":
            return {"type": "string", "pattern": rng.choice(PATTERNS)}
        case "integer" | "number":
            bounds = {"minimum": low, rng.choice(["maximum", "exclusiveMaximum"]): low + rng.randint(1, 1000)}
            return {"type": kind} | (bounds if rng.random() < 0.8 else {})
        case "enum":
            return {"enum": rng.sample(["a", "été", 3, -1.5, None, True, [1, "x"], {"k": 0}], rng.randint(1, 4))}
        case "const":
            return {"const": rng.choice(["a b", 7, False, None, [], {"x": [1]}])}
        case "array":
            return {"type": "array", "items": schema(rng, depth - 1), "minItems": few, "maxItems": few + 2}
        case "anyOf":
            return {"anyOf": [schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
        case "types":
            return {"type": rng.sample(["boolean", "integer", "null"], 2)}
        case "object":
            names = rng.sample(["name", "größe", "x-1", "a b", "n", "list"], rng.randint(0, 4))
            extra = rng.choice([False, False, {"type": "integer"}])
            return {
                "type": "object",
                "properties": {name: schema(rng, depth - 1) for name in names},
                "required": [name for name in names if rng.random() < 0.6],
                "additionalProperties": extra,
            }
    return {"type": kind}


def whole_schema(seed: int) -> dict[str, Any]:
    """A random schema, one in three with definitions that refer to each other."""
    rng = random.Random(seed)
    if seed % 3:
        return schema(rng)
    node = {
        "type": "object",
        "properties": {"value": schema(rng, 1), "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
        "required": ["value"],
        "additionalProperties": False,
    }
    return {"$defs": {"node": node, "leaf": schema(rng, 1)}, "type": "array", "maxItems": 2,
            "items": {"anyOf": [{"$ref": "#/$defs/node"}, {"$ref": "#/$defs/leaf"}]}}  # fmt: skip


def closing(tokenizer: Any) -> dict[int, float]:
    """A bias to tokens that close a string, an object or an array, which a random model rarely takes."""
    return {tokenizer.convert_tokens_to_ids(text): 6.0 for text in ('"', "}", "]", ",", ":")}


@pytest.mark.parametrize("seeds", [range(8), pytest.param(range(8, 1008), marks=pytest.mark.slow)], ids=len)
def test_answers_that_end_are_valid(
    seeds: range, model: NeuronAutoModelForCausalLM, grammars: Grammars, tokenizer: Any
) -> None:
    schemas = [whole_schema(seed) for seed in seeds]
    sampling = [
        SamplingParams(
            max_tokens=300, temperature=1.0, top_k=0, seed=seed, logit_bias=closing(tokenizer),
            grammar=grammars.json_schema(one),
        )
        for seed, one in zip(seeds, schemas, strict=True)
    ]  # fmt: skip
    answers = [found.answers[0] for found in model.generate([[5, 6, 7]] * len(schemas), sampling)]
    require_valid(schemas, [answer.text if answer.finish_reason == "stop" else None for answer in answers])


def require_valid(schemas: list[dict[str, Any]], texts: list[str | None]) -> None:
    """Every text is JSON of its schema, and most are no None, which stands for an answer that was cut short."""
    assert len(texts) - texts.count(None) >= 0.8 * len(schemas)
    for one, text in zip(schemas, texts, strict=True):
        jsonschema.Draft202012Validator.check_schema(one)
        if text is not None:
            jsonschema.validate(json.loads(text), one, jsonschema.Draft202012Validator)


@pytest.mark.slow
def test_answers_of_a_server_that_end_are_valid(model: NeuronAutoModelForCausalLM, tokenizer: Any) -> None:
    schemas = [whole_schema(seed) for seed in range(1000)]
    bias = {str(id): value for id, value in closing(tokenizer).items()}

    def text(seed: int) -> str | None:
        how = dict(type="json_schema", json_schema=dict(name="any", schema=schemas[seed]))
        fields = dict(prompt=[5, 6, 7], max_tokens=300, seed=seed, logit_bias=bias, response_format=how)
        response = client.post("/v1/completions", json=fields)
        assert response.status_code == 200, response.text
        (choice,) = response.json()["choices"]
        return choice["text"] if choice["finish_reason"] == "stop" else None

    with (
        serving.running(model) as url,
        httpx.Client(base_url=url, timeout=600) as client,
        ThreadPoolExecutor(16) as pool,
    ):
        require_valid(schemas, list(pool.map(text, range(len(schemas)))))


def test_the_same_seed_gives_the_same_answer_in_any_batch(
    model: NeuronAutoModelForCausalLM, grammars: Grammars
) -> None:
    sampling = [
        SamplingParams(max_tokens=40, temperature=0.9, top_k=0, seed=seed, grammar=grammars.json_schema(schema))
        for seed, schema in enumerate(map(whole_schema, range(1, 8)))
    ]
    alone = [model.generate([4, 9, seed], one).ids for seed, one in enumerate(sampling)]
    several = [found.ids for found in model.generate([[4, 9, seed] for seed in range(7)], sampling)]
    assert several == alone


def test_each_of_several_answers_has_its_own_state(model: NeuronAutoModelForCausalLM, grammars: Grammars) -> None:
    sampling = SamplingParams(
        n=4, max_tokens=60, temperature=1.0, top_k=0, seed=1, grammar=grammars.regex("[a-z]{6}(, [a-z]{6}){3}")
    )
    found = model.generate([1, 2, 3], sampling)
    texts = [answer.text for answer in found.answers]
    assert len(set(texts)) == 4
    assert all(re.fullmatch("[a-z]{6}(, [a-z]{6}){3}", text) for text in texts)
    assert {answer.finish_reason for answer in found.answers} == {"stop"}


def test_a_grammar_holds_after_other_processors_and_with_logprobs(
    model: NeuronAutoModelForCausalLM, grammars: Grammars, tokenizer: Any
) -> None:
    """Greedy, with a repetition penalty and a bias to a token that the grammar forbids."""
    sampling = SamplingParams(
        max_tokens=9, repetition_penalty=1.3, logit_bias={tokenizer.convert_tokens_to_ids("x"): 100.0}, logprobs=2,
        grammar=grammars.regex("[0-9]{3}/[0-9]"),
    )  # fmt: skip
    (found,) = model.generate([[1, 2, 3]], sampling)
    assert re.fullmatch("[0-9]{3}/[0-9]", found.text)
    assert len(found.answers[0].logprobs) == len(found.ids)


def test_any_json_object(model: NeuronAutoModelForCausalLM, grammars: Grammars, tokenizer: Any) -> None:
    sampling = SamplingParams(
        max_tokens=400, temperature=1.0, top_k=0, seed=3, logit_bias=closing(tokenizer), grammar=grammars.json_object()
    )
    (found,) = model.generate([[1, 2, 3]], sampling)
    assert found.answers[0].finish_reason == "stop"
    assert isinstance(json.loads(found.text), dict)


def test_a_grammar_that_is_done_permits_the_end_alone(grammars: Grammars, tokenizer: Any) -> None:
    grammar = grammars.json_schema({"const": 1})
    logits_v = np.zeros(len(tokenizer) + PADDED, np.float32)
    (one,) = np.flatnonzero(grammar.mask_logits(logits_v) == 0).tolist()
    before = grammar.copy()
    grammar.accept(one)
    assert grammar.done
    assert not before.done
    assert np.flatnonzero(grammar.mask_logits(logits_v) == 0).tolist() == [tokenizer.eos_token_id]
    with pytest.raises(InputError, match="the grammar cannot go on"):
        before.accept(tokenizer.eos_token_id)


def test_padding_and_special_tokens_are_not_permitted(grammars: Grammars, tokenizer: Any) -> None:
    logits_v = np.zeros(len(tokenizer) + PADDED, np.float32)
    permitted = np.flatnonzero(grammars.regex("(.|\n)+").mask_logits(logits_v) == 0)
    assert len(permitted) > 40_000
    assert permitted.max() < len(tokenizer)
    assert not set(permitted.tolist()) & set(tokenizer.all_special_ids)


def sentencepiece() -> PlainTokenizer:
    """A tokenizer as Llama 2's: characters with ▁ for a space, and tokens for bytes."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a"]
    vocab = {name: id for id, name in enumerate(names)}
    found = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "a")], unk_token="<unk>", byte_fallback=True))
    found.normalizer = normalizers.Replace(" ", "▁")
    found.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    found.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PlainTokenizer(found)


def test_sentencepiece_with_tokens_for_bytes() -> None:
    tokenizer = sentencepiece()
    size = tokenizer.backend.get_vocab_size()
    grammar = Grammars(tokenizer, size + 5, [2]).regex("a aé")
    for token in (ids := tokenizer("a aé")["input_ids"]):
        assert np.isfinite(grammar.mask_logits(np.zeros(size + 5, np.float32))[token])
        grammar.accept(token)
    assert grammar.done
    assert tokenizer.decode(ids) == "a aé"


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {"type": "null"}}, "not"),
        ({"not": {"type": "null"}, "x-guidance": {"lenient": True}}, "not"),
        ({"type": "thing"}, "Invalid type: thing"),
        ({"type": "string", "pattern": "(?=a)"}, "look-ahead"),
        ({"$ref": "#/$defs/none"}, "/\\$defs/none"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
        ({"minimum": "x"}, "minimum"),
        ({"const": float("nan")}, "JSON"),
        ({"const": {1, 2}}, "set"),
        ([], "mapping"),
        (True, "mapping"),
    ],
)
def test_a_schema_that_is_not_supported_is_named(bad: Any, named: str, grammars: Grammars) -> None:
    with pytest.raises(InputError, match=named):
        grammars.json_schema(bad)


@pytest.mark.parametrize("bad", ["(", "(?=a)", "a{2", 5])
def test_a_regex_that_is_not_supported(bad: Any, grammars: Grammars) -> None:
    with pytest.raises(InputError, match="regular expression"):
        grammars.regex(bad)


def test_a_grammar_and_bans_that_leave_nothing(
    model: NeuronAutoModelForCausalLM, grammars: Grammars, tokenizer: Any
) -> None:
    ban = {tokenizer.convert_tokens_to_ids("7"): -np.inf}
    sampling = SamplingParams(max_tokens=4, logit_bias=ban, grammar=grammars.regex("7"))
    with pytest.raises(InputError, match="the grammar permits no token here"):
        model.generate([[1, 2, 3]], sampling)
    assert len(model.generate([[1, 2, 3]], SamplingParams(max_tokens=4))[0].ids) == 4


def test_what_grammars_take(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    with pytest.raises(InputError, match="end token"):
        Grammars(tokenizer, 50_000, [])
    with pytest.raises(InputError, match="fast tokenizer, and this is a int"):
        Grammars(3, 50_000, [2])
    with pytest.raises(InputError, match="tokens for bytes"):
        Grammars(tiny.tokenizer(), 101, [95]).regex("a")
    original = builtins.__import__

    def without(name: str, *args: Any, **others: Any) -> Any:
        if name == "llguidance":
            raise ImportError(name)
        return original(name, *args, **others)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match="pip install llguidance"):
        Grammars(tokenizer, 50_000, [2])
