"""Left-padded, right-padded and single rows agree to the token, whatever their lengths and ends."""

from pathlib import Path

import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jx_neuron import NeuronAutoModelForCausalLM, NeuronConfig

BATCH, CAPACITY = 4, 40
ROWS = st.lists(st.lists(st.integers(0, tiny.VOCAB - 1), min_size=1, max_size=18), min_size=1, max_size=BATCH)
PROPERTY = dict(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


class Models:
    """A model of batch 4, the same with padding on the right, and one of batch 1."""

    def __init__(self, name: str, folder: Path):
        tiny.saved(name, folder)
        options = dict(n_positions=[24, CAPACITY], context_length_estimate=[4, 8])
        self.left, self.right, self.one = (
            NeuronAutoModelForCausalLM.from_pretrained(
                folder, batch_size=batch, neuron_config=NeuronConfig(padding_side=side), **options
            )
            for batch, side in ((BATCH, "left"), (BATCH, "right"), (1, "left"))
        )


@pytest.fixture(scope="module")
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(request.param, tmp_path_factory.mktemp(request.param))


def agree(models: Models, rows: list[list[int]], new: int, end: list[int], fill: int, how: dict) -> None:
    width = max(map(len, rows))
    edge = np.array([width - len(row) for row in rows])
    left, right = (np.full((len(rows), width), fill) for _ in range(2))
    mask = np.zeros((len(rows), width), int)
    for into_left, into_right, into_mask, row in zip(left, right, mask, rows, strict=True):
        into_left[width - len(row) :] = into_right[: len(row)] = row
        into_mask[: len(row)] = 1
    how = how | dict(eos_token_override=end or -1)
    length = width + new
    answers = {
        "left": models.left.sample(left, length, start_ids=edge, **how),
        "left, by mask": models.left.sample(left, length, attention_mask=mask[:, ::-1], **how),
        "right": models.right.sample(right, length, start_ids=edge, **how),
        "right, by mask": models.left.sample(right, length, attention_mask=mask, **how),
    }
    seeds = how.get("seed", [0] * len(rows))
    for i, row in enumerate(rows):
        alone = models.one.sample([row], len(row) + new, **how | dict(seed=seeds[i]))[0][len(row) :]
        for name, answer in answers.items():
            found = answer[i, width:].tolist()
            padding = [end[0]] * (len(found) - len(alone)) if end else []
            assert found == alone[: len(found)] + padding, name
    assert max(answer.shape[1] for answer in answers.values()) == min(answer.shape[1] for answer in answers.values())
    assert np.isfinite(models.left(left, start_ids=edge)).all()


def property_of(examples: int):
    @settings(max_examples=examples, **PROPERTY)
    @given(
        rows=ROWS,
        new=st.integers(1, 16),
        end=st.lists(st.integers(0, tiny.VOCAB - 1), max_size=12),
        fill=st.integers(0, tiny.VOCAB - 1),
        sampled=st.booleans(),
    )
    def holds(models: Models, rows: list[list[int]], new: int, end: list[int], fill: int, sampled: bool) -> None:
        seeds = [7 * i + len(row) for i, row in enumerate(rows)]
        agree(models, rows, new, end, fill, dict(top_k=12, temperature=1.4, seed=seeds) if sampled else dict(top_k=1))

    return holds


@pytest.mark.slow
@pytest.mark.parametrize("models", ["llama"], indirect=True)
def test_padding_changes_nothing(models: Models) -> None:
    property_of(5)(models)


@pytest.mark.slow
@pytest.mark.parametrize("models", tiny.CONFIGS, indirect=True)
def test_padding_changes_nothing_in_1000_batches(models: Models) -> None:
    property_of(1000)(models)
