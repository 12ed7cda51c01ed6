"""What the engines are asked: a model, and the largest batch and sequence."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from tokenizers import Tokenizer, models

THREADS = os.cpu_count() or 1
Engine = Callable[[np.ndarray, int], np.ndarray]
"""Makes `new` tokens after a prompt [b, t], greedily and past any end of text: [b, new]."""


@dataclass(frozen=True)
class Task:
    """A model of HF transformers, saved in a folder, and the largest batch and sequence that it is asked for."""

    model: Any
    folder: Path
    batch: int
    length: int


class UnsupportedError(Exception):
    """The engine has no such model."""


def save(model: Any, folder: Path) -> None:
    """Saves a model, and ids as the tokens of its tokenizer: converters ask for one."""
    model.save_pretrained(folder)
    vocabulary = Tokenizer(models.WordLevel({str(i): i for i in range(model.config.vocab_size)}, unk_token="2"))
    special = {"bos_token": "0", "eos_token": "1", "unk_token": "2"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=vocabulary, **special).save_pretrained(folder)
