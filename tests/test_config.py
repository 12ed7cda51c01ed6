"""GenerationConfig and NeuronConfig: what they may hold, whenever it is assigned."""

import copy
import dataclasses
import math
import pickle
import re

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jx_neuron import GenerationConfig, NeuronConfig
from jx_neuron.errors import ConfigError

LEGAL = [
    ("max_length", np.int64(7), 7),
    ("max_length", None, None),
    ("do_sample", np.True_, True),
    ("top_k", np.uint8(5), 5),
    ("top_k", 0, 0),
    ("top_p", np.float32(0.5), 0.5),
    ("temperature", 0, 0.0),
    ("global_top_k", np.int32(256), 256),
    ("eos_token_id", [np.int16(3), 4], (3, 4)),
    ("eos_token_id", torch.tensor([3, 4]), (3, 4)),
    ("eos_token_id", -1, -1),
    ("top_p_min_tokens", jnp.array(2), 2),
]
ILLEGAL = [
    ("max_length", [0, -1, 2.5, "9", True]),
    ("do_sample", [1, "yes", None]),
    ("top_k", [-1, 2.5, None, math.nan, "5", [1, 2], True]),
    ("top_p", [0, 1.5, math.nan, None, "1", [0.5, 1.0]]),
    ("temperature", [-1, math.nan, math.inf, None, [1.0, 2.0]]),
    ("global_top_k", [0, 12, 8.0, None]),
    ("eos_token_id", ["</s>", 2.0, [2, None], -2, []]),
    ("top_p_min_tokens", [0, 1.5, None, [1, 1]]),
    ("dynamic", [1, None]),
    ("deterministic", [0, "no"]),
    ("per_batch_line", [1]),
    ("topk", [5]),
]


@pytest.mark.parametrize(("name", "value", "expected"), LEGAL, ids=str)
def test_fields_may_be_assigned(name: str, value: object, expected: object) -> None:
    config = GenerationConfig()
    setattr(config, name, value)
    assert getattr(config, name) == expected
    assert type(getattr(config, name)) is type(expected)
    assert config == GenerationConfig(**{name: value}) == dataclasses.replace(GenerationConfig(), **{name: value})


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in ILLEGAL for value in values], ids=str)
def test_what_is_not_legal_is_named_and_leaves_the_old_value(name: str, value: object) -> None:
    config = GenerationConfig(top_k=7)
    with pytest.raises(ConfigError, match=re.escape(name)):
        setattr(config, name, value)
    assert config == GenerationConfig(top_k=7)
    if name != "topk":
        with pytest.raises(ConfigError, match=name):
            GenerationConfig(**{name: value})


def test_lines_go_with_per_batch_line() -> None:
    lines = GenerationConfig(per_batch_line=True, top_k=np.array([1, 20]), top_p=[0.5, 1])
    assert lines.top_k == (1, 20)
    assert lines.top_p == (0.5, 1.0)
    with pytest.raises(ConfigError, match=r"top_k=\(1, 20\) is a list; with per_batch_line=True"):
        lines.per_batch_line = False
    assert lines.per_batch_line is True


def test_copies_are_equal_and_apart() -> None:
    config = GenerationConfig(top_k=5, eos_token_id=[1, 2])
    for other in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other == config
        other.top_k = 6
        assert config.top_k == 5
        assert other != config
    with pytest.raises(TypeError, match="unhashable"):
        hash(config)


def test_a_neuron_config_is_hashed_as_it_is_compared() -> None:
    one, other = (NeuronConfig(on_device_generation=GenerationConfig(top_k=5)) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    one.on_device_generation.top_k = 6
    assert one != other


@pytest.mark.parametrize(
    "options",
    [
        dict(on_device_generation={"top_k": 5}),
        dict(output_all_logits="yes"),
        dict(strict_sharding=None),
        dict(compilation_worker_count=0),
        dict(compilation_worker_count=1.5),
        dict(compilation_worker_count="two"),
        dict(padding_side=["left"]),
        dict(group_query_attention=["replicated-heads"]),
    ],
    ids=str,
)
def test_a_neuron_config_of_other_types_is_refused(options: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        NeuronConfig(**options)


def test_numpys_values_are_taken() -> None:
    config = NeuronConfig(compilation_worker_count=np.int64(3), output_all_logits=np.True_)
    assert config == NeuronConfig(compilation_worker_count=3, output_all_logits=True)
