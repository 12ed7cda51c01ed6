"""Chat templates through --chat: what HF's tokenizer makes of a message, from folders, GGUF files and saved models."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
from checkpoints import add_bpe, bpe, write_gguf

from jx_neuron import InputError
from jx_neuron.checkpoint.folder import open_checkpoint
from jx_neuron.cli.prompts import from_text

TEMPLATES = {  # the forms that the families' own take, shortened
    "ChatML": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "begins with bos": (
        "{{ bos_token }}{%- for m in messages -%}{{ '<start_of_turn>' + m['role'] + '\n' + m['content'] | trim }}"
        "<end_of_turn>\n{%- endfor -%}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "ends with eos": (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}{{ eos_token if not add_generation_prompt }}"
    ),
    "parts": (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}"
    ),
    "tools, a date and namespaces": (
        "{% set ns = namespace(n=0) %}{% if tools %}{{ tools | tojson }}{% endif %}{{ strftime_now('%Y')[:2] }}"
        "{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ m.content | upper }}{% break %}{% endfor %}"
        "{% generation %}{{ 'x' }}{% endgeneration %}"
    ),
}
TEXTS = ["the cat's house", "  two  spaces \n", "</s> été 漢字"]


def ids_of(tokenizer: transformers.PreTrainedTokenizerBase, text: str) -> list[int]:
    """HF's own, template and tokens in one."""
    message = {"role": "user", "content": text}
    return tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=True, return_dict=False)


def chat_gguf(path: Path, template: str | list[dict[str, str]]) -> Path:
    def edit(writer):
        add_bpe(writer, bpe("llama-bpe"), "llama-bpe")  # which begins texts with bos
        del writer.kv_data[0]["tokenizer.chat_template"]
        writer.add_chat_template(template)

    return write_gguf(path, skip=("tokenizer",), edit=edit)


@pytest.mark.parametrize("name", TEMPLATES)
def test_messages_are_what_hfs_tokenizer_makes_of_them(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(chat_gguf(tmp_path / "m.gguf", TEMPLATES[name]))
    folder = tmp_path / "folder"
    folder.mkdir()
    checkpoint.save_tokenizer(folder)
    hf = transformers.AutoTokenizer.from_pretrained(folder)
    gguf = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert hf.chat_template == gguf.chat_template == TEMPLATES[name]
    model = SimpleNamespace(tokenizer=checkpoint.tokenizer())
    for text in TEXTS:
        prompt = from_text(model, text, chat=True)
        assert prompt.ids == ids_of(hf, text) == ids_of(gguf, text)
        assert prompt.ids.count(1) == ("bos" in name)


def test_named_templates(tmp_path: Path) -> None:
    both = [{"name": "default", "template": "<{{ messages[0].content }}>"}, {"name": "tool_use", "template": "tools"}]
    tokenizer = open_checkpoint(chat_gguf(tmp_path / "m.gguf", both)).tokenizer()
    assert tokenizer.chat_template == {"default": "<{{ messages[0].content }}>", "tool_use": "tools"}
    ids = from_text(SimpleNamespace(tokenizer=tokenizer), "the", chat=True).ids
    assert tokenizer.decode(ids) == "<the>"


def test_the_template_of_a_processor(tmp_path: Path) -> None:
    """Older multimodal checkpoints have one in chat_template.json alone, which HF's processor reads."""
    open_checkpoint(chat_gguf(tmp_path / "m.gguf", TEMPLATES["parts"])).save_tokenizer(tmp_path)
    (tmp_path / "m.gguf").unlink()
    template = (tmp_path / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3"}))
    (tmp_path / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    with pytest.raises(InputError, match="no chat template"):
        from_text(SimpleNamespace(tokenizer=open_checkpoint(tmp_path).tokenizer()), "the", chat=True)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    tokenizer = open_checkpoint(tmp_path).tokenizer()
    assert tokenizer.chat_template == template
    assert tokenizer.decode(from_text(SimpleNamespace(tokenizer=tokenizer), "the", chat=True).ids) == "the"
