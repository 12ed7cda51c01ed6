"""Rotary embeddings against HF's, type by type, within and beyond the lengths they were made for."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as gptj_rotate
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotate
from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale
from transformers.models.olmo3.modeling_olmo3 import Olmo3RotaryEmbedding
from transformers.models.stablelm.modeling_stablelm import StableLmRotaryEmbedding

from jx_neuron.errors import ConfigError
from jx_neuron.models.llama import Config
from jx_neuron.models.llama_like import FULL, SLIDING, LayerTypesConfig
from jx_neuron.nn.rope import RopeScaling, inverse_frequencies, query_scale, rope_half, rope_interleaved, rotation
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
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.4, "rope_theta": 1e6},
    "proportional-factor": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "factor": 8.0},
    "proportional-whole": {"rope_type": "proportional", "original_max_position_embeddings": 32},
}
HALF = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": PARAMETERS["dynamic"],
    "yarn": PARAMETERS["yarn-betas"],
    "longrope": {
        "rope_type": "longrope",
        "short_factor": SHRINKING[:4],
        "long_factor": GROWING[:4],
        "original_max_position_embeddings": 32,
    },
    "llama3": PARAMETERS["llama3"],
}


def positions(start_b: list[int], length_b: list[int], tokens: int) -> Positions:
    """Where `tokens` tokens of each row stand."""
    start, length = (jnp.asarray(x, jnp.int32) for x in (start_b, length_b))
    return positions_of(start, length, None, tokens, 1)


def hf_config(**options) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(hidden_size=4 * HEAD, num_attention_heads=4, max_position_embeddings=64, **options)


def hf_rotation(embedding: Any, start: int, tokens: int, *layer_type: str) -> list[np.ndarray]:
    position = torch.arange(start, start + tokens)[None]
    return [angle[0, :, : angle.shape[-1] // 2].numpy() for angle in embedding(torch.zeros(1), position, *layer_type)]


def check(rope: RopeScaling, config: Any, kind: Any = LlamaRotaryEmbedding, *layer_type: str) -> None:
    """A prefill within the maximum, one that ends beyond it, and decode steps about it, as rows of one batch."""
    for tokens, starts in ((30, (0, 2, 3, 34, 35, 170)), (1, (31, 32, 63, 64, 65, 200))):
        at = positions(starts, [tokens] * len(starts), tokens)
        cos, sin = (np.asarray(x) for x in rope(at))
        for row, start in enumerate(starts):
            for ours, hf in zip((cos, sin), hf_rotation(kind(config), start, tokens, *layer_type), strict=True):
                # an angle is as exact as its frequency, 1e-7 of it, is times the position
                np.testing.assert_allclose(ours[row], hf, rtol=0, atol=3e-7 * (start + tokens) + 3e-7)


@pytest.mark.parametrize("name", PARAMETERS)
def test_types_agree_with_hf(name: str) -> None:
    parameters = PARAMETERS[name]
    check(RopeScaling(parameters, HEAD, 64), hf_config(rope_parameters=dict(parameters) or None))


@pytest.mark.parametrize("part", [0.1, 0.2])
def test_pairs_are_rotated(part: float) -> None:
    with pytest.raises(ConfigError, match=f"partial_rotary_factor={part} would rotate .* even number from 2 to 16"):
        RopeScaling({}, HEAD, 64, partial_rotary_factor=part)


@pytest.mark.parametrize("name", HALF)
def test_types_agree_with_hf_where_half_of_a_head_is_rotated(name: str) -> None:
    config = transformers.StableLmConfig(
        hidden_size=4 * HEAD,
        num_attention_heads=4,
        max_position_embeddings=64,
        rope_parameters=dict(HALF[name]) | {"rope_theta": 5e4},
        partial_rotary_factor=0.5,
    )
    ours = RopeScaling(HALF[name], HEAD, 64, 5e4, partial_rotary_factor=0.5)
    assert ours.r == HEAD // 2
    check(ours, config, StableLmRotaryEmbedding)
    own = RopeScaling(HALF[name] | {"partial_rotary_factor": 0.5}, HEAD, 64, 5e4, partial_rotary_factor=1.0)
    check(own, config, StableLmRotaryEmbedding)


@dataclass(frozen=True)
class Layered(LayerTypesConfig, Config):
    """A decoder with layers of two types, and rope_parameters for each."""

    ROPE_BY_TYPE: ClassVar[bool] = True

    @property
    def usual_types(self) -> list[str]:
        return [FULL, SLIDING]


BY_TYPE = {
    SLIDING: {"rope_type": "linear", "factor": 2.0},
    FULL: PARAMETERS["yarn-betas"] | {"rope_theta": 5e5, "truncate": False, "alpha": 1.0},
}
SIZES = {"hidden_size": 4 * HEAD, "num_attention_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 64}


def test_each_layer_type_has_its_own() -> None:
    raw = SIZES | {"layer_types": [SLIDING, FULL], "sliding_window": 8, "rope_theta": 3e4, "rope_parameters": BY_TYPE}
    with pytest.warns(UserWarning, match=r"ignored: 'rope_parameters.full_attention.alpha', '.*full_attention.trunc"):
        config = Layered.from_hf(raw)
    assert config.windows == [8, None]
    theirs = transformers.Olmo3Config(**raw)
    for kind, rope in config.ropes.items():
        check(rope, theirs, Olmo3RotaryEmbedding, kind)
    assert config.rotations is None


def test_one_for_all_layer_types() -> None:
    config = Layered(**SIZES, sliding_window=8, rope_parameters=PARAMETERS["dynamic"])
    assert {kind: rope.kind for kind, rope in config.ropes.items()} == {FULL: "dynamic", SLIDING: "dynamic"}
    assert config.rotations == (64, True)
    nowhere = Layered(**SIZES, sliding_window=8, rope_parameters={FULL: None, SLIDING: LONGROPE})
    assert nowhere.ropes[FULL] is None
    assert nowhere.rotations == (64, False)
    both = Layered(**SIZES, sliding_window=8, rope_parameters={FULL: PARAMETERS["longrope"], SLIDING: LONGROPE})
    assert both.rotations == (32, True)  # between 32 and 64, one of the two may differ


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_parameters": {FULL: {}}}, f"rope_parameters: {SLIDING}=None is not supported.*an object for each"),
        ({"rope_parameters": {FULL: {}, SLIDING: 3.0}}, f"rope_parameters: {SLIDING}=3.0 is not supported"),
        ({"rope_parameters": {FULL: {}, SLIDING: {"rope_type": "su"}}}, "'su' is not supported"),
        ({"layer_types": [FULL]}, "layer_types has 1 entries for 2 layers"),
        ({"layer_types": [FULL, "conv"]}, "may hold full_attention and sliding_attention, and not 'conv'"),
        ({"sliding_window": None}, "sliding_window is null"),
    ],
)
def test_refusals_of_layer_types(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Layered(**SIZES | {"sliding_window": 8} | fields)


def test_queries_grow_as_hfs() -> None:
    at = positions([0, 90], [40, 40], 40)
    theirs = get_llama_4_attn_scale(torch.from_numpy(np.array(at.position_bt)), 0.3, 16)
    np.testing.assert_allclose(query_scale(at, 0.3, 16)[:, :, 0, 0], theirs[:, 0, :, 0], rtol=2e-7)


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

    expected, _ = llama_rotate(theirs[..., :6], theirs[..., :6], *(angle.tile(2) for angle in (cos, sin)), 2)
    np.testing.assert_allclose(rope_half(jnp.asarray(x), by), torch.cat([expected, theirs[..., 6:]], -1), atol=1e-6)


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
        ({"rope_type": "axial"}, "'axial' is not supported.*llama3"),
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
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is supported as 1.0 alone"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor=1.5 should be a number from 1e-09 to 1$"),
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
            with pytest.raises(ConfigError, match=rf"{key}=.* a number from (1e-09 to 1(e\+15)?|1 to 2147483647)$"):
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
        elif key == "partial_rotary_factor":
            changed |= {key: min(value, 1)}
        for angle in RopeScaling(changed, HEAD, 64)(at):
            assert np.isfinite(angle).all(), (key, value)


def test_dynamic_needs_two_pairs() -> None:
    with pytest.raises(ConfigError, match="4 or more rotated entries"):
        RopeScaling({"rope_type": "dynamic", "factor": 2.0}, 2, 64)
