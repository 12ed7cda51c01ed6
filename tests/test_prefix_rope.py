"""A kept prefix is reused only where its keys are rotated as the prompt's would be."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers

from jx_neuron import LlamaForSampling

LIMIT = 16
RNG = np.random.default_rng(0)
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": RNG.uniform(1, 2, 6).tolist(),
    "long_factor": RNG.uniform(3, 9, 6).tolist(),
    "original_max_position_embeddings": LIMIT,
}
KINDS: dict[str, dict[str, Any]] = {
    "longrope": {"rope_parameters": LONGROPE, "max_position_embeddings": 64},
    "dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        "max_position_embeddings": LIMIT,
    },
    "default": {"max_position_embeddings": 64},
}
# (tokens of the prefix, of the whole prompt, rope types that may reuse it)
LENGTHS = [
    (9, 14, {"longrope", "dynamic", "default"}),
    (9, LIMIT, {"longrope", "dynamic", "default"}),
    (9, LIMIT + 1, {"default"}),
    (LIMIT, 25, {"default"}),
    (20, 25, {"longrope", "default"}),
]


@pytest.fixture(
    scope="module", params=[pytest.param(kind, marks=() if kind == "dynamic" else pytest.mark.slow) for kind in KINDS]
)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(kind: str, tmp_path_factory: pytest.TempPathFactory) -> LlamaForSampling:
    folder: Path = tmp_path_factory.mktemp(kind)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**tiny.CONFIGS["llama"]().to_dict() | KINDS[kind])
    hf = transformers.LlamaForCausalLM(config)
    for parameter in hf.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    hf.save_pretrained(folder)
    return LlamaForSampling.from_pretrained(folder, batch_size=2, n_positions=48, context_length_estimate=4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "total", "reusing"), [LENGTHS[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in LENGTHS[1:])]
)
def test_logits_are_those_without_it(model, kind, length, total, reusing, monkeypatch) -> None:
    ids = np.random.default_rng(total).integers(0, tiny.VOCAB, (2, total))
    ids[1, :length] = ids[0, :length]
    expected = model(ids)
    tokens: list[int] = []
    run = model.runtime.run
    monkeypatch.setattr(model.runtime, "run", lambda step: tokens.append(step.key.tokens) or run(step))
    model.keep_prefix(ids[0, :length])
    tokens.clear()
    try:
        np.testing.assert_allclose(model(ids), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    finally:
        model.keep_prefix(None)
    assert (sum(tokens) < total) == (kind in reusing)


def test_one_row_beyond_the_limit_has_the_batch_computed_anew(model, kind) -> None:
    ids = np.random.default_rng(1).integers(0, tiny.VOCAB, (2, LIMIT + 4))
    ids[1, :9] = ids[0, :9]
    mask = np.ones_like(ids)
    mask[1, 12:] = 0
    expected = model.sample(ids, 30, top_k=1, attention_mask=mask)
    model.keep_prefix(ids[0, :9])
    np.testing.assert_array_equal(model.sample(ids, 30, top_k=1, attention_mask=mask), expected)
    model.keep_prefix(None)
