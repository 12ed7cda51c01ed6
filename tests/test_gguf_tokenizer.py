"""Tokenizers of GGUF files: the ids that HF's give, and the plain one's."""

import numpy as np
import pytest
from checkpoints import (
    TEXT,
    add_bpe,
    bpe,
    write,
    write_gguf,
)

from jx_neuron import NeuronAutoModelForCausalLM, SamplingParams
from jx_neuron.checkpoint.folder import open_checkpoint
from jx_neuron.checkpoint.gguf.tokenizer import SPLITS, Vocabulary
from jx_neuron.errors import CheckpointError


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "tekken"])
def test_gguf_tokenizer(tmp_path, pre):
    tokenizer = open_checkpoint(write_gguf(tmp_path / "m.gguf", pre=pre)).tokenizer()
    begin = [1] if pre in ("llama-bpe", "tekken") else []
    for text in (TEXT, "  two  spaces\t\n\n 12345 it's", "unseen ☃ 文"):
        assert tokenizer(text).input_ids == begin + bpe(pre).encode(text).ids
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert tokenizer("</s>the<s>", add_special_tokens=False).input_ids == [2, *bpe(pre).encode("the").ids, 1]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert tokenizer.pad_token is None
    assert len(tokenizer) == 320
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False)
    assert chat == "<s>the</s>"


HARD = [
    "  two  spaces\t\n\n 12345 it's",
    "It's 3.14, WE'LL — naïveté ÉTÉ 漢字かな 🙂👍🏽",
    "a\n \n\nb  ",
    "x=1;y+=2 // `c` <d> …",
]


@pytest.mark.parametrize("pre", sorted(SPLITS))
def test_gguf_pre_tokenizers(tmp_path, pre):
    transformers = pytest.importorskip("transformers")
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", pre=pre))
    ours, plain = checkpoint.tokenizer(), checkpoint.tokenizer(plain=True)
    for text in (*HARD, "</s>the<s>"):
        for special in (False, True):
            ids = ours(text, add_special_tokens=special).input_ids
            assert plain(text, add_special_tokens=special)["input_ids"] == ids
            assert plain.decode(ids, skip_special_tokens=special) == ours.decode(ids, skip_special_tokens=special)
    for text in HARD:
        assert ours.decode(ours(text, add_special_tokens=False).input_ids) == text
    if pre in GGUF_PRE_TOKENIZER_SPLITS:  # HF splits texts as GPT-2 where it does not know the name
        hf = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
        for text in HARD:
            ids = ours(text, add_special_tokens=False).input_ids
            assert ids == hf(text, add_special_tokens=False).input_ids
            split = [part for part, _ in ours.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]
            assert split == [part for part, _ in hf.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def test_texts_take_the_plain_tokenizer_until_hfs_is_loaded(tmp_path, monkeypatch):
    model = NeuronAutoModelForCausalLM.from_pretrained(write_gguf(tmp_path / "m.gguf"), n_positions=128)
    sampling = SamplingParams(max_tokens=8, stop="zz")
    with monkeypatch.context() as without:
        without.delattr(Vocabulary, "hf_tokenizer")
        plain = model.generate(TEXT, sampling)
    assert list(plain.prompt_ids) == model.tokenizer(TEXT).input_ids
    assert plain.text == model.tokenizer.decode(plain.ids, skip_special_tokens=True)
    assert model.text_tokenizer is model.tokenizer  # which its owner may change


def test_gguf_tokenizer_saved(tmp_path):
    transformers = pytest.importorskip("transformers")
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf"))
    files = checkpoint.save_tokenizer(tmp_path / "saved")
    assert all(file.is_file() for file in files)
    again, tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved"), checkpoint.tokenizer()
    assert again(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert again.chat_template == tokenizer.chat_template
    assert again.eos_token_id == 2


def test_folder_tokenizer(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    folder = write(tmp_path / "folder", config={"model_type": "llama"})
    with pytest.raises(CheckpointError, match=r"holds no tokenizer: none of tokenizer\.json"):
        open_checkpoint(folder).tokenizer()
    open_checkpoint(tmp_path / "m.gguf").save_tokenizer(folder)
    checkpoint = open_checkpoint(folder)
    assert {file.name for file in checkpoint.tokenizer_files} == {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert checkpoint.tokenizer()(TEXT).input_ids == bpe().encode(TEXT).ids
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot make a tokenizer"):
        open_checkpoint(folder).tokenizer()


SENTENCES = {  # by hand: the pair whose piece scores best merges, and bytes stand in for the unknown
    "ab": ["▁ab"],
    " ab": ["▁", "▁ab"],
    "abab": ["▁ab", "ab"],
    "bab": ["▁", "b", "ab"],
    "a ab": ["▁", "a", "▁ab"],
    "é": ["▁", "<0xC3>", "<0xA9>"],
    "ab</s>ab": ["▁ab", "</s>", "▁ab"],
}


def sentencepiece_gguf(path, prefix=None):
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "ab", "▁ab", "▁", "a", "b"]

    def edit(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list(pieces)
        writer.add_token_scores([0.0] * 259 + [-1.0, -2.0, -1e9, -1e9, -1e9])
        writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * 5)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        if prefix is not None:
            writer.add_add_space_prefix(prefix)

    return open_checkpoint(write_gguf(path, skip=("tokenizer",), edit=edit)).tokenizer()


def test_gguf_sentencepiece_tokenizer(tmp_path):
    tokenizer = sentencepiece_gguf(tmp_path / "m.gguf")
    for text, pieces in SENTENCES.items():
        ids = tokenizer(text).input_ids
        assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", *pieces]
    assert tokenizer.decode(tokenizer(" abé ab").input_ids, skip_special_tokens=True) == " abé ab"
    bare = sentencepiece_gguf(tmp_path / "bare.gguf", prefix=False)
    assert bare.convert_ids_to_tokens(bare("ab").input_ids) == ["<s>", "ab"]
    assert bare.decode(bare(" ab").input_ids, skip_special_tokens=True) == " ab"


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "phi3"])
def test_gguf_sentencepiece_is_hfs(tmp_path, architecture):
    transformers = pytest.importorskip("transformers")
    rng = np.random.default_rng(0)
    runs = {"".join(rng.choice(list("ab▁"), rng.integers(2, 5))) for _ in range(200)}
    plain = [run for run in sorted(runs) if "▁" not in run[1:] and run != "▁"]
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\n\n", "  ", "   "]
    kinds = [3, 3, 3, 2] + [6] * 256 + [4] * 3

    def edit(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list([*pieces, *plain, "▁", "a", "b", "\n"])
        writer.add_token_scores([-1000.0] * len(kinds) + [-float(i) for i in range(len(plain) + 4)])
        writer.add_token_types(kinds + [1] * (len(plain) + 4))
        writer.add_bos_token_id(2)
        writer.add_eos_token_id(1)
        writer.add_unk_token_id(3)
        writer.add_add_space_prefix(architecture in ("llama", "phi3"))

    path = write_gguf(tmp_path / "m.gguf", architecture=architecture, skip=("tokenizer",), edit=edit)
    ours = open_checkpoint(path).tokenizer()
    hf = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    texts = [
        "ab",
        "abba bab",
        "aab  ba   ab",
        "éa\n\nb\nc",
        "a<eos>",
        *("".join(rng.choice(list("ab "), 30)).strip() for _ in range(20)),
    ]
    if architecture == "llama":  # of which HF puts a space before the first text alone, and llama.cpp after each token
        texts = [text for text in texts if "  " not in text and "\n\n" not in text]
    else:
        texts += [" ab", "   ba "]
    for text in texts:
        assert ours(text).input_ids == hf(text).input_ids, text
        assert ours.decode(ours(text).input_ids) == hf.decode(hf(text).input_ids)


def test_gguf_tokenizer_of_an_unknown_kind(tmp_path):
    def edit(writer):
        add_bpe(writer, bpe(), "unheard-of")

    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", skip=("tokenizer",), edit=edit))
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.pre is 'unheard-of'; legal are .*llama-bpe.*smollm"):
        checkpoint.tokenizer()
