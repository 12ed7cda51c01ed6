"""Programs that are kept between processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORK = """
import json
import jax, jax.numpy as jnp, numpy as np
from jx_neuron import sharding
from jx_neuron.step.program_key import ProgramKey
from jx_neuron.models import Decoder
from jx_neuron.runtime.xla import XlaRuntime
from jx_neuron.checkpoint.weights import from_params
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event.rpartition("/")[2]))
decoder = Decoder.from_config(dict(model_type="gpt2", n_embd=768, n_layer=3, n_head=12, vocab_size=100, n_positions=64))
params = {path: np.full(of.shape, 0.1, np.float32) for path, of in decoder.abstract_params("float32").items()}
source = from_params(params, decoder.rows, decoder.padding, jnp.dtype("float32"))
runtime = XlaRuntime(decoder, source, sharding.mesh(1), "float32")
runtime.load([ProgramKey("prefill", 1, 16, 16), ProgramKey("decode", 1, 1, 16)])
print(json.dumps([hits.count("cache_hits"), hits.count("cache_misses")]))
"""


def hits_and_misses(cache: Path, **environment: str) -> list[int]:
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)} | environment
    done = subprocess.run([sys.executable, "-c", WORK], env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found: list[int] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="XDG_CACHE_HOME is of Linux")
def test_programs_are_kept_however_fast_they_were_compiled(tmp_path: Path) -> None:
    hits, misses = hits_and_misses(tmp_path)
    assert hits == 0
    assert misses >= 2
    assert hits_and_misses(tmp_path) == [misses, 0]
    assert list((tmp_path / "jx-neuron" / "xla").rglob("jit_run*"))


@pytest.mark.few(1)
@pytest.mark.skipif(sys.platform != "linux", reason="XDG_CACHE_HOME is of Linux")
@pytest.mark.parametrize(
    "environment",
    [{"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "100"}, {"JAX_ENABLE_COMPILATION_CACHE": "false"}],
    ids=["seconds", "none"],
)
def test_who_wants_none_kept_says_so(environment: dict[str, str], tmp_path: Path) -> None:
    hits_and_misses(tmp_path, **environment)
    assert not list(tmp_path.rglob("jit_run*"))
