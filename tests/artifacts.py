"""A small artifact, and what tests do to one."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jx_neuron import artifact
from jx_neuron.artifact.settings import Settings
from jx_neuron.lowering import Program, TensorSpec
from jx_neuron.step.buckets import Buckets

TP = 2
RNG = np.random.default_rng(0)
WEIGHTS = [
    {
        "h.0.ln.scale": RNG.standard_normal(6).astype(np.float32),
        "h.0.mlp.kernel": RNG.standard_normal((4, 6)).astype(ml_dtypes.bfloat16).T,
        "head": RNG.standard_normal((6, 2)).astype(np.float16),
        "scale": np.array(RNG.standard_normal(), np.float32),
    }
    for _ in range(TP)
]
PARAMS = tuple(
    TensorSpec(name, "param", a.shape, a.dtype.name, (*[None] * (a.ndim - 1), "tp") if a.ndim else ())
    for name, a in sorted(WEIGHTS[0].items())
)
STATE = TensorSpec("k.0", "state", (1, 8, 2, 4), "bfloat16", (None, None, "tp", None))
TOKENS = TensorSpec("tokens_bt", "input", (1, 1), "int32", (None, None))
RANK = TensorSpec("rank", "rank", (1,), "int32", ("tp",))
LOGITS = TensorSpec("output.0", "output", (1, 2), "float32", (None, "tp"))


def program(name: str, hlo: bytes) -> Program:
    kept = TensorSpec(STATE.name, "state", STATE.shape, STATE.dtype, STATE.partition, alias=len(PARAMS))
    return Program(name, {"tp": TP}, (*PARAMS, STATE, TOKENS, RANK), (LOGITS, kept), hlo)


PROGRAMS = (program("context64-b1", b"the context's HLO"), program("decode-b1", b"the decode step's HLO"))
SETTINGS = Settings("gpt2", TP, "bf16", (1,), Buckets((64,), (64,)), candidates=1, all_logits=False, vocab_size=4)
OPT = dataclasses.replace(SETTINGS, model_type="opt")
EVERYTHING: dict[str, Any] = {
    "settings": SETTINGS,
    "config": {"n_layer": 1, "layer_norm_epsilon": 1e-05, "activation_function": "gelu_new", "n_inner": None},
    "programs": PROGRAMS,
    "hlo": lambda name: next(p.hlo_module for p in PROGRAMS if p.name == name),
    "parameters": {name: [rank[name] for rank in WEIGHTS] for name in WEIGHTS[0]},
    "neffs": {"decode-b1": b"the decode step's NEFF"},
    "extra_files": {"tokenizer.json": '{"é": 1}'.encode(), "special/merges.txt": b"a b"},
    "tools": {"neuronx-cc": "2.21"},
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return artifact.write(tmp_path / "model", **EVERYTHING)


def read_all(directory: Path) -> dict[str, Any]:
    """All that an artifact holds."""
    found = artifact.read(directory)
    names = [p.name for p in found.manifest.programs]
    return {
        "hlo": {name: found.hlo(name) for name in names},
        "neff": {name: found.neff(name) for name in names},
        "files": {name: found.file(name) for name in found.manifest.files},
        "weights": [
            {name: (a.dtype.name, a.shape, a.tobytes()) for name, a in found.weights(rank).items()}
            for rank in range(len(found.manifest.weights))
        ],
    }


def files_of(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def reseal(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest and gives it the hash that it should have."""
    path = directory / "manifest.json"
    told = json.loads(path.read_bytes())
    change(told)
    told["sha256"] = "0" * 64
    text = json.dumps(told, indent=1, ensure_ascii=False) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(text.replace("0" * 64, digest, 1), encoding="utf-8")
