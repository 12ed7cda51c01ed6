"""The plain tokenizer of a folder gives what HF's gives, and from the second process on without transformers."""

import json
import subprocess
import sys

import pytest
import transformers
from checkpoints import TEXT, bpe
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from jx_neuron.checkpoint.tokenizer import PlainTokenizer, load_plain_tokenizer, load_tokenizer

TEXTS = ["", " ", TEXT, "Ünïcode 🙂 text\n\n  with   spaces , and 12345.", "<|end|>between<|end|>", "don't  stop"]
CLASSES = ["PreTrainedTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer", "GPTNeoXTokenizer", "LlamaTokenizer"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "jx-neuron" / "tokenizers"


def folder_of(path, name, **fields):
    """A folder with a tokenizer.json whose class HF may build in a way of its own."""
    backend = bpe()
    backend.add_special_tokens(["<|end|>"])
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing("<|end|> $A", special_tokens=[("<|end|>", 320)]),
        ]
    )
    path.mkdir(exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    config = dict(tokenizer_class=name, eos_token="<|end|>", bos_token="<|end|>", unk_token="<|end|>", **fields)
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def load(path, plain=True):
    def save_files(into):
        for file in path.glob("tokenizer*"):
            (into / file.name).write_bytes(file.read_bytes())

    return (load_plain_tokenizer if plain else load_tokenizer)(path, {"model_type": "llama"}, save_files)


def require_same(plain, theirs):
    for text in TEXTS:
        for special in (False, True):
            ids = theirs(text, add_special_tokens=special)["input_ids"]
            assert plain(text, add_special_tokens=special)["input_ids"] == ids
            expected = theirs.decode(ids, skip_special_tokens=special, clean_up_tokenization_spaces=False)
            assert plain.decode(ids, skip_special_tokens=special, clean_up_tokenization_spaces=False) == expected


@pytest.mark.parametrize("name", CLASSES)
def test_kept_tokenizer_equals_hfs(tmp_path, cache, name):
    folder = folder_of(tmp_path / "model", name)
    theirs = load(folder, plain=False)
    first = load(folder)
    (kept,) = cache.iterdir()
    again = load(folder)
    assert isinstance(first, PlainTokenizer)
    assert isinstance(again, PlainTokenizer)
    require_same(first, theirs)
    require_same(again, theirs)
    assert again.backend.to_str() == theirs.backend_tokenizer.to_str()
    kept.write_text(kept.read_text()[:100])
    require_same(load(folder), theirs)


def test_special_tokens_that_are_split_are_hfs_own(tmp_path, cache):
    folder = folder_of(tmp_path / "model", "GPT2Tokenizer", split_special_tokens=True)
    tokenizer = load(folder)
    assert isinstance(tokenizer, transformers.PreTrainedTokenizerBase)
    assert not cache.exists()
    require_same(tokenizer, load(folder, plain=False))


def test_a_class_that_decodes_its_own_way_is_hfs_own(tmp_path):
    assert isinstance(load(folder_of(tmp_path / "model", "CodeGenTokenizer")), transformers.PreTrainedTokenizerBase)


def test_changed_files_are_read_anew(tmp_path):
    folder = folder_of(tmp_path / "model", "PreTrainedTokenizerFast")
    before = load(folder)("a b")["input_ids"]
    words = Tokenizer(models.WordLevel({"a": 5, "b": 6, "<|end|>": 0}, unk_token="<|end|>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    assert load(folder)("a b")["input_ids"] == [5, 6] != before
    require_same(load(folder), load(folder, plain=False))


@pytest.mark.slow
def test_the_second_process_does_without_transformers(tmp_path):
    """The answer to a text, of an HF folder, imports no transformers once the tokenizer is kept."""
    folder = folder_of(tmp_path / "model", "LlamaTokenizer")
    config = transformers.LlamaConfig(
        vocab_size=321, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    code = (
        "import sys; from jx_neuron import NeuronAutoModelForCausalLM as M, SamplingParams\n"
        f"model = M.from_pretrained({str(folder)!r}, n_positions=64)\n"
        "answer = model.generate('some text', SamplingParams(max_tokens=4))\n"
        "print(answer.text, list(answer.ids), 'transformers' in sys.modules)"
    )

    def run():
        process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return process.stdout.rsplit(maxsplit=1)

    first, second = run(), run()
    assert first[0] == second[0]
    assert (first[1], second[1]) == ("True", "False")
