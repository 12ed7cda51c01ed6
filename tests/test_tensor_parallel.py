"""Any tensor-parallel degree gives what one core gives, and what HF gives."""

import functools
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tp_answers import LENGTH, answers, prompts

from jx_neuron import InputError
from jx_neuron.nn.sharding import Padding, mesh

VOCAB = 101
SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
GPT2 = SPECIAL | {"n_layer": 2, "vocab_size": VOCAB, "n_positions": 48}
LLAMA = SPECIAL | {"num_hidden_layers": 2, "vocab_size": VOCAB, "max_position_embeddings": 48}
CONFIGS = {
    "gpt2-12-heads": lambda: transformers.GPT2Config(**GPT2, n_embd=48, n_head=12),
    "gpt2-xl-25-heads": lambda: transformers.GPT2Config(**GPT2, n_embd=100, n_head=25),
    "opt-12-heads": lambda: transformers.OPTConfig(
        **SPECIAL, num_hidden_layers=2, vocab_size=VOCAB, max_position_embeddings=48, hidden_size=48, ffn_dim=90,
        num_attention_heads=12, word_embed_proj_dim=48,
    ),
    "llama-3-kv-heads": lambda: transformers.LlamaConfig(
        **LLAMA, hidden_size=48, intermediate_size=90, num_attention_heads=6, num_key_value_heads=3, head_dim=8
    ),
    "llama-8-kv-heads": lambda: transformers.LlamaConfig(
        **LLAMA, hidden_size=64, intermediate_size=90, num_attention_heads=16, num_key_value_heads=8, head_dim=4
    ),
}  # fmt: skip


class Case:
    """A random HF model, its checkpoint, and what HF answers."""

    def __init__(self, config: transformers.PretrainedConfig, folder: Path):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(0, 2 / math.sqrt(p.shape[-1])) if p.ndim > 1 else p.add_(0.2 * torch.randn_like(p))
        model.save_pretrained(folder)
        self.folder, self.vocab = folder, config.vocab_size
        ids = torch.tensor(prompts(self.vocab))
        with torch.no_grad():
            self.logits = model(ids).logits[:, -1].numpy()
        first = ids[:1]
        how = dict(attention_mask=torch.ones_like(first), max_length=LENGTH, do_sample=False, pad_token_id=0)
        self.greedy = model.generate(first, **how).numpy()
        self.one = functools.cache(lambda: answers(self.folder, 1, self.vocab))

    def holds(self, found: dict[str, np.ndarray], one: dict[str, np.ndarray]) -> None:
        np.testing.assert_allclose(found["logits"], self.logits, atol=1e-4, rtol=0)
        np.testing.assert_allclose(found["logits"], one["logits"], atol=1e-4, rtol=0)
        np.testing.assert_array_equal(found["tokens"][:1], self.greedy)
        np.testing.assert_array_equal(found["tokens"], one["tokens"])

    def in_child(self, folder: Path, devices: int, degrees: list[int]) -> dict[int, dict[str, np.ndarray]]:
        """The answers at each degree from a process of its own, which may have more devices than this one."""
        out = folder / "answers.npz"
        script = Path(__file__).with_name("tp_answers.py")
        words = [self.folder, out, devices, self.vocab, *degrees]
        environment = {**os.environ, "PYTHONPATH": str(script.parent.parent)}
        subprocess.run([sys.executable, script, *map(str, words)], check=True, env=environment)
        found = np.load(out)
        return {d: {name: found[f"{d}.{name}"] for name in ("logits", "tokens")} for d in degrees}


@pytest.fixture(scope="module", params=list(CONFIGS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(CONFIGS[request.param](), tmp_path_factory.mktemp(request.param))


@pytest.mark.few(2)
@pytest.mark.parametrize("tp_degree", [1, 2, 3, 4, 8])
def test_a_degree_changes_no_answer(case: Case, tp_degree: int) -> None:
    found = case.one() if tp_degree == 1 else answers(case.folder, tp_degree, case.vocab)
    case.holds(found, case.one())


@pytest.mark.slow
def test_any_degree_runs_where_jax_has_begun_with_one_device(tmp_path: Path) -> None:
    case = Case(CONFIGS["llama-3-kv-heads"](), tmp_path)
    found = case.in_child(tmp_path, 1, [1, 2, 4])
    for of_degree in found.values():
        case.holds(of_degree, found[1])


def test_a_degree_beyond_the_gpus_names_the_cpu() -> None:
    gpu = SimpleNamespace(platform="gpu")
    with pytest.raises(InputError, match=r"tp_degree=2 needs 2 devices and JAX has 1 \(gpu\).* JAX_PLATFORMS=cpu"):
        mesh(2, [gpu])


@pytest.mark.slow
def test_degrees_beyond_the_heads_change_no_answer(case: Case, tmp_path: Path) -> None:
    found = case.in_child(tmp_path, 32, [16, 32])
    for of_degree in found.values():
        case.holds(of_degree, case.one())


@pytest.mark.slow
def test_gpt2_of_full_size(tmp_path: Path) -> None:
    case = Case(transformers.GPT2Config(**SPECIAL), tmp_path)
    found = case.in_child(tmp_path, 32, [1, 8, 32])
    for of_degree in found.values():
        case.holds(of_degree, found[1])


def sizes(n: int, k: int) -> dict[str, int]:
    return dict(d=64, n=n, k=k, h=4, f=90, v=101)


@given(k=st.integers(1, 12), group=st.integers(1, 12), tp=st.integers(1, 100))
def test_the_sizes_of_padded_heads_are_those_of_their_slots(k: int, group: int, tp: int) -> None:
    padding = Padding(sizes(k * group, k), tp)
    assert (padding.size("n"), padding.size("k")) == (len(padding.query), len(padding.key_value))


def test_padding_says_what_it_does_and_what_it_costs() -> None:
    assert Padding(sizes(12, 12) | {"f": 96, "v": 104}, 4).describe(0.0) is None
    said = Padding(sizes(25, 25), 8).describe(0.123)
    assert said == (
        "tp_degree=8 pads 25 heads to 32, an MLP width of 90 to 96, a vocabulary of 101 to 104: 12.3% more weights"
    )
    said = Padding(sizes(6, 3), 8).describe(0.0001)
    assert "6 query heads to 8, 3 key/value heads by copies to 8" in said
    assert said.endswith("under 0.1% more weights")


@pytest.mark.parametrize(
    ("n", "k", "tp", "legal"), [(25, 25, 2, "1, 5, 25"), (6, 3, 4, "1, 3, 6"), (12, 12, 8, "1, 2, 3, 4")]
)
def test_strictness_refuses_padded_heads_and_names_the_degrees_that_divide(n: int, k: int, tp: int, legal: str) -> None:
    with pytest.raises(InputError, match=f"tp_degree={tp} .* degrees that do are {legal}"):
        Padding(sizes(n, k), tp).require_exact()


@pytest.mark.parametrize(("n", "k", "tp"), [(25, 25, 5), (16, 8, 8), (16, 8, 16), (12, 12, 4), (64, 8, 32)])
def test_strictness_allows_degrees_that_divide(n: int, k: int, tp: int) -> None:
    Padding(sizes(n, k), tp).require_exact()
