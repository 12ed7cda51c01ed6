"""Every family against HF: saved by HF, loaded here, and run as users run it, in the configs of tests/families_*.py.

Prompts of different lengths go through in chunks, and are continued beyond every window that the configs have.
"""

import dataclasses
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import OPTIONS
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, Phase, given, reject, settings
from hypothesis import strategies as st

from jx_neuron import NeuronAutoModelForCausalLM, NeuronConfig, SamplingParams
from jx_neuron.errors import ConfigError
from jx_neuron.integrations.hf_generate import CACHE
from jx_neuron.models import family
from jx_neuron.models.registry import FAMILIES

LENGTHS, CHUNK, STEPS, POSITIONS = (40, 23, 16, 1), 16, 32, 80
TOLERANCE = 1e-5  # of the largest logit
TARGETS = ("inf2", "trn1", "trn2")

# a latent and a mixture, a parallel residual, and rows of several matrices; others run as `slow`
USUAL = "deepseek_v3 gpt_neox phi3".split()
# HF's float32 itself is more than TOLERANCE from its float64: norms over the few features of a head magnify rounding
MAGNIFY = {"qwen3_5_moe_text", "qwen3_next"}
FIRST = [
    pytest.param(name, options[0], id=name, marks=[] if name in USUAL else pytest.mark.slow)
    for name, options in OPTIONS.items()
]
OTHERS = [
    pytest.param(name, options, id=f"{name}-{number}")
    for name, several in OPTIONS.items()
    for number, options in enumerate(several[1:], start=1)
]


def random_model(model_type: str, options: dict[str, Any]) -> Any:
    """HF's model, every parameter random: matrices keep the scale of what they multiply, norms are near 1 and biases
    far from 0, and so are buffers that checkpoints have."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **deepcopy(options))
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    model.set_experts_implementation("eager")  # others take no widths that are odd
    saved = model.state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1 / math.sqrt(parameter.shape[-1]))
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
            else:
                parameter.normal_(1, 0.3)
        for name, buffer in model.named_buffers():
            if name in saved and buffer.is_floating_point():
                buffer.add_(0.3 * torch.randn_like(buffer))
    return model


class Original:
    """HF's model saved in `folder`, and what it gives for a ragged batch of prompts, each row by itself."""

    def __init__(self, model_type: str, options: dict[str, Any], folder: Path):
        self.folder, self.model = folder, random_model(model_type, options)
        self.model.save_pretrained(folder)
        rng = np.random.default_rng(0)
        vocabulary = self.model.config.get_text_config().vocab_size
        self.prompts = [rng.integers(0, vocabulary, length).tolist() for length in LENGTHS]
        self.answers, self.logits = zip(*map(self._greedy, self.prompts), strict=True)
        self.tolerance = TOLERANCE * max(float(np.abs(logits).max()) for logits in self.logits)
        if model_type in MAGNIFY:
            self.allow_for_rounding()

    def _greedy(self, prompt: list[int]) -> tuple[list[int], np.ndarray]:
        """The tokens that continue `prompt`, and the logits [t, v] of each of its tokens and of theirs."""
        answer: list[int] = []
        logits = []
        with torch.inference_mode():
            self.model(torch.tensor([prompt[:1]]))  # HF's dynamic RoPE keeps the longest length of earlier calls
            out = self.model(torch.tensor([prompt]), use_cache=True)
            for _ in range(STEPS):
                logits.append(out.logits[0])
                answer.append(int(out.logits[0, -1].argmax()))
                out = self.model(torch.tensor([answer[-1:]]), use_cache=True, **{CACHE: out[CACHE]})
        return answer, torch.cat(logits).numpy()

    def allow_for_rounding(self) -> None:
        """Takes four times what rounding alone may change, where that is more than TOLERANCE."""
        self.tolerance = max(self.tolerance, 4 * self._rounding())

    def _rounding(self) -> float:
        """How far HF's logits move, all in float64, where every weight moves by as much as float32 rounds off: of
        some models far more than of others, for a norm over few features magnifies what it is given."""

        def logits(model: Any) -> np.ndarray:
            with torch.inference_mode():
                rows = zip(self.prompts, self.answers, strict=True)
                return np.concatenate([model(torch.tensor([p + answer[:-1]])).logits[0].numpy() for p, answer in rows])

        exact = deepcopy(self.model).double()
        at_weights = logits(exact)
        moved = []
        for _ in range(2):
            near = deepcopy(exact)
            with torch.no_grad():
                for parameter in near.parameters():
                    parameter.mul_(1 + 2**-24 * torch.randn_like(parameter))
            moved.append(float(np.abs(logits(near) - at_weights).max()))
        return max(moved)

    def load(self, **options: Any) -> NeuronAutoModelForCausalLM:
        return NeuronAutoModelForCausalLM.from_pretrained(
            self.folder,
            batch_size=len(LENGTHS),
            n_positions=POSITIONS,
            context_length_estimate=CHUNK,
            neuron_config=NeuronConfig(output_all_logits=True),
            **options,
        )

    def check_tokens(self, model: NeuronAutoModelForCausalLM) -> None:
        """Holds `model` to HF's greedy answers."""
        answers = model.generate(self.prompts, SamplingParams(max_tokens=STEPS, eos_token_id=-1))
        assert [list(answer.ids) for answer in answers] == list(self.answers)

    def check_logits(self, model: NeuronAutoModelForCausalLM) -> None:
        """Holds `model` to HF's logits of every token, those of prompts and, one by one, of HF's answers."""
        padded = max(LENGTHS)
        ids_bt = np.array([[0] * (padded - len(prompt)) + prompt for prompt in self.prompts])
        start_b = [padded - length for length in LENGTHS]
        steps = [model(ids_bt, start_ids=start_b)]
        for step in range(STEPS - 1):
            tokens_b1 = np.array([answer[step : step + 1] for answer in self.answers])
            steps.append(model(tokens_b1, cache_ids=padded + step, start_ids=start_b))
        for row, expected in enumerate(self.logits):
            prompt, *answer = (logits_btv[row] for logits_btv in steps)
            ours = np.concatenate([prompt[: LENGTHS[row]], *answer])
            np.testing.assert_allclose(ours, expected, rtol=0, atol=self.tolerance)


@pytest.mark.few(1)
@pytest.mark.parametrize(("model_type", "options"), FIRST)
def test_logits_and_greedy_tokens_are_hfs(model_type: str, options: dict[str, Any], tmp_path: Path) -> None:
    original = Original(model_type, options, tmp_path)
    model = original.load()
    original.check_logits(model)
    original.check_tokens(model)


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "options"), OTHERS)
def test_other_options(model_type: str, options: dict[str, Any], tmp_path: Path) -> None:
    original = Original(model_type, options, tmp_path)
    model = original.load()
    original.check_logits(model)
    original.check_tokens(model)


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "options"), FIRST + OTHERS)
def test_four_cores(model_type: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Heads, MLP and vocabulary split over four devices: by XLA, and by the lowered programs that the compiler gets."""
    original = Original(model_type, options, tmp_path)
    original.check_logits(original.load(tp_degree=4))
    lowered = original.load(tp_degree=4, backend="host")
    original.check_tokens(lowered)
    for target in TARGETS:
        lowered.lowered().check(target)


def test_every_family_is_here() -> None:
    ours = {name for name, entry in FAMILIES.items() if isinstance(entry, str)}  # others may have registered theirs
    assert ours == set(OPTIONS)


HEADS, KEY_HEADS = ("num_attention_heads", "num_heads", "n_head", "n_heads"), ("num_key_value_heads", "num_kv_heads")
WIDTHS, MLP_WIDTHS = (
    ("hidden_size", "n_embd", "d_model"),
    ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
)
HEALTH_CHECKS = [check for check in HealthCheck if check is not HealthCheck.filter_too_much]


@st.composite
def drawn(draw: st.DrawFn, model_type: str) -> dict[str, Any]:
    """Options of the family with other sizes and windows, and with the switches of its Config at random.

    None that HF refuses, or that we do.
    """
    options = draw(st.sampled_from(OPTIONS[model_type]))
    heads = draw(st.integers(1, 3)) * next(options[name] for name in HEADS if name in options)
    key_heads = draw(st.sampled_from([k for k in range(1, heads + 1) if heads % k == 0]))
    width = heads * draw(st.sampled_from([8, 12, 16, 20]))
    sizes = {
        **dict.fromkeys(HEADS, heads),
        **dict.fromkeys(KEY_HEADS, key_heads),
        **dict.fromkeys(WIDTHS, width),
        **dict.fromkeys(MLP_WIDTHS, draw(st.integers(5, 200))),
        "head_dim": draw(st.sampled_from([8, 16, 20, 24])),
        "vocab_size": draw(st.integers(50, 150)),
        "sliding_window": draw(st.integers(2, 40)),
        "window_size": draw(st.integers(2, 40)),
    }
    switches = [field for field in dataclasses.fields(family(model_type).Config) if isinstance(field.default, bool)]
    flipped = {field.metadata.get("hf", field.name): draw(st.booleans()) for field in switches}
    config = options | {name: size for name, size in sizes.items() if options.get(name) is not None} | flipped
    try:
        raw = transformers.AutoConfig.for_model(model_type, **deepcopy(config)).to_dict()
        family(model_type).Config.from_hf(raw)
    except (ConfigError, StrictDataclassError):  # such as for a list that is as long as a head
        reject()
    return config


@pytest.mark.slow
@pytest.mark.parametrize("model_type", OPTIONS)
@settings(max_examples=3, deadline=None, phases=[Phase.generate], suppress_health_check=HEALTH_CHECKS)
@given(data=st.data())
def test_drawn_configs(model_type: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    config = data.draw(drawn(model_type))
    try:
        original = Original(model_type, config, tmp_path_factory.mktemp(model_type))
    except (IndexError, RuntimeError):  # HF itself cannot run it
        reject()
    original.allow_for_rounding()
    original.check_logits(original.load())
