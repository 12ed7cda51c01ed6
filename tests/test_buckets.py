"""Bucket choice, and the plan that puts prompts of any length through them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jx_neuron.engine.chunks import prefill_calls
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
def test_every_token_goes_through_once_its_past_has(lengths: list[int], context: object, tokens: list[int]) -> None:
    buckets = Buckets.of(tokens, context)  # type: ignore[arg-type]
    rows = [np.arange(1, n + 1, dtype=np.int32) for n in lengths]
    compiled = {(s.tokens, s.slots) for s in buckets.shapes(len(rows), 1)}
    written = [0] * len(rows)
    for call in prefill_calls(rows, buckets):
        t = call.tokens_bt.shape[1]
        assert (t, call.slots) in compiled
        for r, row in enumerate(rows):
            start, remaining = int(call.start_b[r]), int(call.length_b[r])
            assert 0 <= start <= written[r]
            assert start + t <= call.slots
            assert start + remaining == len(row)
            np.testing.assert_array_equal(call.tokens_bt[r, :remaining], row[start : start + t])
            written[r] = max(written[r], min(start + t, len(row)))
    assert written == lengths
    assert all(s < n <= s + t for s, n in zip(call.start_b, lengths, strict=True))
