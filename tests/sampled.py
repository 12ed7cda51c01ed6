"""A tiny GPT-2, two prompts, and the answers of HF, for tests of sample() and stream()."""

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

WIDTH, LENGTH = 9, 30
SAMPLED = dict(top_k=20, top_p=0.9, temperature=1.3, seed=5)
BUCKETS = dict(n_positions=[32, 64], context_length_estimate=[16, 32])


@pytest.fixture(scope="module")
def hf() -> torch.nn.Module:
    return tiny.model("gpt2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved("gpt2", tmp_path_factory.mktemp("gpt2"), tiny.tokenizer())


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return tiny.prompts(2, WIDTH)


def of_hf(hf: torch.nn.Module, ids: np.ndarray, **options: object) -> np.ndarray:
    return tiny.greedy(hf, ids, LENGTH, **options)
