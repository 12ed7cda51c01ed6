"""Tiny random models of each family, as HF has them and as checkpoints on disk."""

from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models

VOCAB, POSITIONS = 101, 96
SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
GPT2 = SPECIAL | {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, "n_positions": POSITIONS}
CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(**GPT2),
    "opt": lambda: transformers.OPTConfig(
        **SPECIAL, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, ffn_dim=90, vocab_size=VOCAB,
        max_position_embeddings=POSITIONS, word_embed_proj_dim=48,
    ),
    "gptj": lambda: transformers.GPTJConfig(**GPT2, rotary_dim=8),
    "llama": lambda: transformers.LlamaConfig(
        **SPECIAL, hidden_size=48, intermediate_size=90, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=VOCAB, max_position_embeddings=POSITIONS,
    ),
}  # fmt: skip


def model(name: str) -> torch.nn.Module:
    """A random model whose logits are far enough apart for greedy tokens to be the same in any order of summation."""
    torch.manual_seed(0)
    found = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).float().eval()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.normal_(0, 0.3) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    return found


def greedy(hf: torch.nn.Module, ids: np.ndarray, length: int, **options: object) -> np.ndarray:
    prompt = torch.tensor(ids)
    options = dict(do_sample=False, max_length=length, pad_token_id=0) | options
    return hf.generate(prompt, attention_mask=torch.ones_like(prompt), **options).numpy()


def logits(hf: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return hf(torch.tensor(ids)).logits.numpy()


def prompts(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (rows, length))


def saved(name: str, folder: Path, tokenizer: transformers.PreTrainedTokenizerFast | None = None) -> Path:
    """A checkpoint of the model, and of the tokenizer where there is one."""
    model(name).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def tokenizer(chat_template: str | None = None) -> transformers.PreTrainedTokenizerFast:
    """A token for each printable ASCII character, and six special ones."""
    characters = {chr(32 + i): i for i in range(95)}
    found = Tokenizer(models.BPE(vocab=characters | {f"<{i}>": 95 + i for i in range(6)}, merges=[]))
    found.add_special_tokens([f"<{i}>" for i in range(6)])
    found.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=found, chat_template=chat_template)
