"""Bucket choice, and the plan that puts prompts of any length through them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jx_neuron.engine.scheduler import Scheduler
from jx_neuron.engine.sequence import Sequence
from jx_neuron.errors import InputError
from jx_neuron.step.buckets import Buckets


def test_buckets_are_those_of_transformers_neuronx() -> None:
    assert Buckets.of(2048).tokens == (128, 256, 512, 1024, 2048)
    assert Buckets.of(2048).context == (64, 128, 256, 512, 1024)
    assert Buckets.of(300) == Buckets((64, 128, 150), (128, 256, 300))
    assert Buckets.of(64, 16) == Buckets((16,), (64,))
    assert Buckets.of([256, 512], [32, 64]) == Buckets((32, 64), (256, 512))


@pytest.mark.parametrize(("positions", "context"), [(0, None), (-4, None), ([], None), (64, 65), (64, [8, 0])])
def test_illegal_buckets_are_refused(positions: object, context: object) -> None:
    with pytest.raises(InputError, match=r"n_positions|context_length_estimate"):
        Buckets.of(positions, context)  # type: ignore[arg-type]


lengths = st.lists(st.integers(1, 97), min_size=1, max_size=4)


@given(
    lengths=lengths,
    context=st.none() | st.integers(1, 97) | st.lists(st.integers(1, 97), min_size=1, max_size=3),
    tokens=st.lists(st.integers(97, 200), min_size=1, max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_every_token_goes_through_once_and_after_its_past(
    lengths: list[int], context: object, tokens: list[int]
) -> None:
    buckets = Buckets.of(tokens, context)  # type: ignore[arg-type]
    compiled = set(buckets.programs(4, 1))
    scheduler = Scheduler(buckets, (4,), chunk_sizes=buckets.context[-1:])
    sequences = [Sequence(list(range(1, n + 1))) for n in lengths]
    for sequence in sequences:
        scheduler.submit(sequence)
    written = dict.fromkeys(sequences, 0)
    while turns := scheduler.plan().turns:
        for turn in turns:
            key, arrays = turn.step.key, turn.step.arrays
            assert key in compiled
            assert key.tokens < key.positions or not arrays["start_b"].any() or key.kind == "decode"
            for row in turn.rows:
                assert row.start == written[row.sequence]
                assert row.start + row.count <= key.positions
                part = row.sequence.tokens[row.start : row.start + row.count]
                assert arrays["tokens_bt"][row.index].tolist() == part + [0] * (key.tokens - row.count)
                assert int(arrays["start_b"][row.index]) + int(arrays["length_b"][row.index]) == len(
                    row.sequence.tokens
                )
                written[row.sequence] += row.count
    assert list(written.values()) == lengths
