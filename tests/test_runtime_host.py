"""What neuronx-cc is given, run on the host from a saved artifact by a process without model code, against HF."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny

from jx_neuron import InputError, NeuronAutoModelForCausalLM, NeuronConfig
from jx_neuron.checkpoint.folder import Checkpoint

DEGREES = {"gpt2": (1, 4), "opt": (2,), "gptj": (4,), "llama": (8,)}
ROWS, PROMPT, NEW = 2, 13, 64
LENGTH = PROMPT + NEW
RUN = """
import json, sys
import numpy as np
from jx_neuron import NeuronAutoModelForCausalLM

for folder in sys.argv[2:]:
    model = NeuronAutoModelForCausalLM.from_pretrained(folder, backend="host")
    ids = np.load(sys.argv[1])
    tokens = model.sample(ids, ids.shape[1] + 64, top_k=1)
    prefill = model(ids)
    decode = [model(tokens[:, [at]], cache_ids=[at]) for at in range(ids.shape[1], ids.shape[1] + 4)]
    np.savez(folder + ".npz", tokens=tokens, prefill=prefill, decode=np.stack(decode))
print(json.dumps(sorted(sys.modules)))
"""


@pytest.mark.parametrize(
    ("name", "degrees"),
    [
        *(pytest.param(*of, marks=[] if of[0] == "llama" else pytest.mark.slow, id=of[0]) for of in DEGREES.items()),
        *(pytest.param(name, (1, 2, 4, 8), marks=pytest.mark.slow, id=f"{name}-all") for name in tiny.CONFIGS),
    ],
)
def test_an_artifact_alone_gives_hfs_tokens_and_logits(name: str, degrees: tuple[int, ...], tmp_path: Path) -> None:
    hf = tiny.model(name)
    hf.save_pretrained(tmp_path / "checkpoint")
    ids = tiny.prompts(ROWS, PROMPT)
    np.save(tmp_path / "ids.npy", ids)
    folders = []
    for tp in degrees:
        model = NeuronAutoModelForCausalLM.from_pretrained(
            tmp_path / "checkpoint", batch_size=ROWS, n_positions=80, context_length_estimate=80, tp_degree=tp,
            backend="host",
        )  # fmt: skip
        folders.append(model.save(tmp_path / f"tp{tp}", sharded_weights=True))
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "ids.npy"), *map(str, folders)],
        check=True,
        capture_output=True,
        text=True,
    )
    modules = json.loads(done.stdout)
    assert not [m for m in modules if m.startswith(("jx_neuron.models", "flax", "torch"))]
    expected = tiny.greedy(hf, ids, LENGTH)
    logits = tiny.logits(hf, expected)
    for folder in folders:
        with np.load(f"{folder}.npz") as found:
            np.testing.assert_array_equal(found["tokens"], expected, err_msg=folder.name)
            np.testing.assert_allclose(found["prefill"], logits[:, PROMPT - 1], atol=1e-4, err_msg=folder.name)
            decoded = logits[:, PROMPT : PROMPT + 4].swapaxes(0, 1)
            np.testing.assert_allclose(found["decode"], decoded, atol=1e-4, err_msg=folder.name)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.slow
def test_host_and_xla_agree_whatever_is_asked(checkpoint: Path) -> None:
    ids = tiny.prompts(2, 21)
    options = dict(batch_size=2, n_positions=[40, 64], context_length_estimate=[8, 16], tp_degree=2)
    every = NeuronConfig(output_all_logits=True)
    host, xla = (
        NeuronAutoModelForCausalLM.from_pretrained(checkpoint, neuron_config=every, backend=backend, **options)
        for backend in ("host", "xla")
    )
    sampling = dict(top_k=20, top_p=0.9, temperature=1.3, seed=5, start_ids=[9, 0])
    np.testing.assert_array_equal(host.sample(ids, 60, **sampling), xla.sample(ids, 60, **sampling))
    np.testing.assert_allclose(host(ids), xla(ids), atol=2e-5)
    np.testing.assert_array_equal(host.sample(ids, 60, **sampling), xla.sample(ids, 60, **sampling))  # cache left dirty


@pytest.mark.parametrize("tp", [1, 4])
def test_a_checkpoint_is_read_once_whatever_the_degree(
    tp: int, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, load = Counter[str](), Checkpoint.read

    def read(self: Checkpoint, name: str) -> np.ndarray:
        reads[name] += 1
        return load(self, name)

    monkeypatch.setattr(Checkpoint, "read", read)
    model = NeuronAutoModelForCausalLM.from_pretrained(checkpoint, n_positions=16, tp_degree=tp, backend="host")
    tensors = set(model._origin.checkpoint.names())
    reads.clear()
    model.to_neuron()
    assert reads == dict.fromkeys(tensors, 1)
    model.save(tmp_path / "saved", sharded_weights=True)
    assert reads == dict.fromkeys(tensors, 2)


def test_more_candidates_than_were_compiled_are_refused(checkpoint: Path) -> None:
    model = NeuronAutoModelForCausalLM.from_pretrained(checkpoint, n_positions=16, backend="host")
    with pytest.raises(InputError, match=r"top_k=0 \(all\) needs more candidates than the 64"):
        model.sample(tiny.prompts(1, 4), 8, top_k=0)
