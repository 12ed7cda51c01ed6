"""Rotary embeddings against HF's, type by type, within and beyond the lengths they were made for."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as gptj_rotate
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotate

from jx_neuron.errors import ConfigError
from jx_neuron.models.llama import Config
from jx_neuron.nn.rope import RopeScaling, inverse_frequencies, rope_half, rope_interleaved, rotation
from jx_neuron.nn.state import Positions, positions_of

HEAD = 16
GROWING = np.linspace(1, 8, HEAD // 2).tolist()
SHRINKING = np.linspace(1, 0.5, HEAD // 2).tolist()
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "short_factor": SHRINKING, "long_factor": GROWING}
PARAMETERS = {
    "default": {},
    "default-theta": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5, "rope_theta": 5e4},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn-own-max": {"rope_type": "yarn", "factor": 4.0},
    "yarn-ratio": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32},
    "yarn-attention": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.7},
    "yarn-mscale": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn-one-mscale": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7},
    "yarn-betas": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 8, "beta_slow": 0.25},
    "yarn-untruncated": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 8, "truncate": False},
    "yarn-null-truncate": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 8, "truncate": None},
    "yarn-shrinking": {"rope_type": "yarn", "factor": 0.5},
    "longrope": LONGROPE | {"original_max_position_embeddings": 32},
    "longrope-own-max": LONGROPE,
    "longrope-factor": LONGROPE | {"original_max_position_embeddings": 32, "factor": 16.0},
    "longrope-attention": LONGROPE | {"original_max_position_embeddings": 32, "attention_factor": 1.5},
    "llama3": LLAMA3 | {"original_max_position_embeddings": 32},
    "llama3-own-max": LLAMA3,
}


def positions(start_b: list[int], length_b: list[int], tokens: int) -> Positions:
    """Where `tokens` tokens of each row stand."""
    start, length = (jnp.asarray(x, jnp.int32) for x in (start_b, length_b))
    return positions_of(start, length, None, tokens, 1)


def hf_config(**options) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(hidden_size=4 * HEAD, num_attention_heads=4, max_position_embeddings=64, **options)


def hf_rotation(config: transformers.LlamaConfig, start: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    position = torch.arange(start, start + tokens)[None]
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), position)
    return cos[0, :, : HEAD // 2].numpy(), sin[0, :, : HEAD // 2].numpy()


def check(rope: RopeScaling, config: transformers.LlamaConfig) -> None:
    """A prefill within the maximum, one that ends beyond it, and decode steps about it, as rows of one batch."""
    for tokens, starts in ((30, (0, 2, 3, 34, 35, 170)), (1, (31, 32, 63, 64, 65, 200))):
        at = positions(starts, [tokens] * len(starts), tokens)
        cos, sin = (np.asarray(x) for x in rope(at))
        for row, start in enumerate(starts):
            for ours, hf in zip((cos, sin), hf_rotation(config, start, tokens), strict=True):
                # an angle is as exact as its frequency, 1e-7 of it, is times the position
                np.testing.assert_allclose(ours[row], hf, rtol=0, atol=3e-7 * (start + tokens) + 3e-7)


@pytest.mark.parametrize("name", PARAMETERS)
def test_types_agree_with_hf(name: str) -> None:
    parameters = PARAMETERS[name]
    check(RopeScaling(parameters, HEAD, 64), hf_config(rope_parameters=dict(parameters) or None))


@pytest.mark.parametrize("key", ["type", "rope_type"])
@pytest.mark.parametrize("name", ["linear", "dynamic", "yarn", "longrope", "llama3"])
def test_older_configs_agree_with_hf(name: str, key: str) -> None:
    older = {k: v for k, v in PARAMETERS[name].items() if k not in ("rope_type", "rope_theta")} | {key: name}
    theirs = hf_config(rope_scaling=dict(older), rope_theta=3e4)
    check(RopeScaling(older, HEAD, 64, 3e4), theirs)


@pytest.mark.parametrize(
    ("parameters", "unread"),
    [
        ({"factor": 2.0}, ["factor"]),
        ({"rope_type": "linear", "factor": 2.0, "attention_factor": 3.0, "beta": None}, ["attention_factor"]),
        ({"type": "dynamic", "factor": 2.0, "alpha": "x", "mscale": 0.7}, ["alpha", "mscale"]),
        (PARAMETERS["yarn"] | {"low_freq_factor": 9.0, "extension": 1.0}, ["extension", "low_freq_factor"]),
        (
            LONGROPE | {"short_mscale": 1.5, "long_mscale": 1.5, "mscale": 0.7},
            ["long_mscale", "mscale", "short_mscale"],
        ),
        (LLAMA3 | {"attention_factor": 3.0, "short_factor": [2.0]}, ["attention_factor", "short_factor"]),
    ],
)
def test_what_hf_does_not_read_is_ignored_in_one_warning(parameters: dict, unread: list[str]) -> None:
    check(RopeScaling(parameters, HEAD, 64), hf_config(rope_scaling=dict(parameters)))
    with pytest.warns(UserWarning, match="that HF does not read are ignored: ") as caught:
        Config.from_hf({"hidden_size": 4 * HEAD, "num_attention_heads": 4, "rope_scaling": parameters})
    names = ", ".join(f"'rope_parameters.{key}'" for key in unread)
    (warning,) = map(str, (one.message for one in caught))
    assert warning == f"llama: fields of config.json that HF does not read are ignored: {names}"


def test_the_configs_own_original_length_goes_first() -> None:
    parameters = LLAMA3 | {"original_max_position_embeddings": 16}
    theirs = hf_config(rope_parameters=dict(parameters), original_max_position_embeddings=32)
    check(RopeScaling(parameters, HEAD, 64, original_max_position_embeddings=32), theirs)


def test_a_prompt_in_chunks_turns_as_the_whole_does() -> None:
    """Every chunk is turned by what suits the length of the whole prompt, which it does not hold."""
    for name in ("dynamic", "longrope"):
        rope = RopeScaling(PARAMETERS[name], HEAD, 64)
        whole = rope(positions([0], [100], 100))
        for start in range(0, 100, 25):
            part = rope(positions([start], [100 - start], 25))
            np.testing.assert_allclose(part.cos_btr, whole.cos_btr[:, start : start + 25], rtol=0, atol=1e-6)
            np.testing.assert_allclose(part.sin_btr, whole.sin_btr[:, start : start + 25], rtol=0, atol=1e-6)


def test_turning_agrees_with_hf() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, HEAD)).astype(np.float32)
    at = positions([0, 7], [5, 5], 5)
    theirs = torch.from_numpy(x)

    by = rotation(at, inverse_frequencies(HEAD, 10000.0))
    cos, sin = (torch.from_numpy(np.tile(a, 2)) for a in by)
    expected, _ = llama_rotate(theirs, theirs, cos, sin, unsqueeze_dim=2)
    np.testing.assert_allclose(rope_half(jnp.asarray(x), by), expected, atol=1e-6)

    by = rotation(at, inverse_frequencies(6, 10000.0))
    cos, sin = (torch.from_numpy(np.array(a)) for a in by)
    expected = torch.cat([gptj_rotate(theirs[..., :6], sin, cos), theirs[..., 6:]], -1)
    np.testing.assert_allclose(rope_interleaved(jnp.asarray(x), by), expected, atol=1e-6)


@pytest.mark.parametrize("theta", [1e4, 1e5, 5e5, 1e6])
@pytest.mark.parametrize("r", [64, 80, 128])
def test_inverse_frequencies_are_hf_s_to_the_bit(r: int, theta: float) -> None:
    config = transformers.LlamaConfig(head_dim=r, rope_parameters={"rope_type": "default", "rope_theta": theta})
    theirs = LlamaRotaryEmbedding(config).inv_freq.numpy()
    ours = inverse_frequencies(r, theta)
    assert ours.dtype == np.float32
    assert (ours == theirs).mean() > 0.95  # torch's own power is one float32 off here and there
    np.testing.assert_allclose(ours, theirs, rtol=1.2e-7)


def test_bfloat16_is_turned_in_float32_and_keeps_its_type() -> None:
    at = positions([3000], [1], 1)
    by = rotation(at, inverse_frequencies(HEAD, 10000.0))
    x = jnp.linspace(-1, 1, HEAD, dtype=jnp.bfloat16).reshape(1, 1, 1, HEAD)
    for rotate in (rope_half, rope_interleaved):
        turned = rotate(x, by)
        assert turned.dtype == jnp.bfloat16
        np.testing.assert_array_equal(turned, rotate(x.astype(jnp.float32), by).astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "proportional"}, "'proportional' is not supported.*llama3"),
        ({"type": "su"}, "'su' is not supported"),
        ({"rope_type": "linear"}, "'linear' needs factor"),
        ({"rope_type": "linear", "factor": None}, "'linear' needs factor"),
        (
            {"full_attention": {"rope_type": "linear", "factor": 2.0}},
            "'full_attention' is an object.*one for all layers",
        ),
        ({"rope_type": "llama3", "factor": 8.0}, "needs high_freq_factor, low_freq_factor"),
        (LLAMA3 | {"high_freq_factor": 1.0}, "high_freq_factor greater than its low_freq_factor"),
        (LONGROPE | {"short_factor": [1.0]}, "short_factor should be 8 numbers"),
        ({"rope_type": "linear", "factor": 0.0}, "factor=0.0 should be a number from 1e-09 to"),
        ({"rope_type": "linear", "factor": "2"}, "factor='2' should be a number"),
        (LONGROPE | {"long_factor": 2.0}, "long_factor should be 8 numbers"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_type": ["linear"]}, "is not supported"),
        (PARAMETERS["yarn"] | {"truncate": 1}, "truncate=1 should be true, false or null"),
        (PARAMETERS["yarn"] | {"rope_theta": 1}, "'yarn' needs a rope_theta other than 1"),
        (LONGROPE | {"original_max_position_embeddings": 1}, "original_max_position_embeddings above 1"),
        (LONGROPE | {"short_factor": {"0": 1.0}}, "short_factor should be 8 numbers"),
    ],
)
def test_refusals(parameters: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RopeScaling(parameters, HEAD, 64)


NO_NUMBER = [math.nan, math.inf, -math.inf, -1.0, 0, True, "2", [2.0], {"x": 1}, 10**400, 10**5000]


@pytest.mark.parametrize("value", NO_NUMBER, ids=lambda value: type(value).__name__)
def test_what_is_no_number_of_use_is_refused_in_every_key(value: object) -> None:
    tried = 0
    for parameters in PARAMETERS.values():
        for key in {"rope_theta", "original_max_position_embeddings", *parameters} - {"rope_type", "truncate"}:
            wrong = [value] * (HEAD // 2) if isinstance(parameters.get(key), list) else value
            with pytest.raises(ConfigError, match=rf"{key}=.* a number from (1e-09 to 1e\+15|1 to 2147483647)$"):
                RopeScaling(parameters | {key: wrong}, HEAD, 64)
            tried += 1
    assert tried > 2 * len(PARAMETERS)
    if not isinstance(value, str | list | dict | bool):
        with pytest.raises(ConfigError, match=r"rope_theta=.* should be a number"):
            RopeScaling({}, HEAD, 64, rope_theta=value)


@pytest.mark.parametrize("value", [1e-9, 1e15, 10**15])
@pytest.mark.parametrize("name", PARAMETERS)
def test_at_the_least_and_the_greatest_numbers_nothing_overflows(name: str, value: float) -> None:
    at = positions([0, 2**31 - 8], [3, 3], 3)
    for key in {"rope_theta", *PARAMETERS[name]} - {"rope_type", "truncate"}:
        far = [value] * (HEAD // 2) if isinstance(PARAMETERS[name].get(key), list) else value
        changed = PARAMETERS[name] | {key: far}
        if key == "low_freq_factor" and value > 1:
            changed |= {"high_freq_factor": value, "low_freq_factor": 1.0}
        elif key == "high_freq_factor" and value < 1:
            changed |= {"low_freq_factor": value, "high_freq_factor": 1.0}
        elif key == "original_max_position_embeddings":
            changed |= {key: 2 if value < 1 else 2**31 - 1}
        for angle in RopeScaling(changed, HEAD, 64)(at):
            assert np.isfinite(angle).all(), (key, value)


def test_dynamic_needs_two_pairs() -> None:
    with pytest.raises(ConfigError, match="size 4 or more"):
        RopeScaling({"rope_type": "dynamic", "factor": 2.0}, 2, 64)
