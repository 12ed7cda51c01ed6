"""Memory does not creep: programs are kept up to a bound, and nothing else grows with calls."""

import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import tiny

from jx_neuron import NeuronAutoModelForCausalLM
from jx_neuron.runtime import xla

GROWTH = """
import json, sys
import numpy as np
from jx_neuron import NeuronAutoModelForCausalLM
from jx_neuron.util.pages import release_memory
from jx_neuron.runtime import xla

folder, most, warm_up, calls = sys.argv[1], *map(int, sys.argv[2:])
xla.MOST_PROGRAMS = most
model = NeuronAutoModelForCausalLM.from_pretrained(folder, batch_size=[1, 2], n_positions=[16, 32], backend="xla")
rng = np.random.default_rng(0)

def resident():
    release_memory()
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))

def call():
    rows, length = rng.integers(1, 3), rng.integers(1, 24)
    options = dict(top_k=int(rng.integers(1, 101)), temperature=rng.uniform(0.5, 2), top_p=rng.uniform(0.1, 1))
    if rng.random() < 0.2:
        options["min_p"] = 0.1
    ids, start_ids = rng.integers(0, 101, (rows, length)), rng.integers(0, length, rows)
    model.sample(ids, length + rng.integers(1, 9), start_ids, **options)

kept, sizes = set(), []
for count in (warm_up, calls):
    for _ in range(count):
        call()
        kept |= set(model.runtime._compiled)
    sizes.append(resident())
print(json.dumps([len(kept), len(model.runtime._compiled), *sizes]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is of Linux")
@pytest.mark.parametrize(("most", "warm_up", "calls"), [(128, 1000, 3000), (8, 200, 300)], ids=["all", "evicted"])
def test_memory_stops_growing(most: int, warm_up: int, calls: int, tmp_path: Path) -> None:
    words = [tiny.saved("llama", tmp_path / "llama"), most, warm_up, calls]
    child = subprocess.run(
        [sys.executable, "-c", GROWTH, *map(str, words)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "XDG_CACHE_HOME": str(tmp_path)},
        stdout=subprocess.PIPE,
        check=True,
    )
    used, kept, before, after = json.loads(child.stdout)
    assert kept == min(used, most)
    assert used > 8
    assert after < 1.02 * before


def test_the_programs_used_last_are_kept_and_answers_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla, "MOST_PROGRAMS", 2)
    folder = tiny.saved("llama", tmp_path)
    model = NeuronAutoModelForCausalLM.from_pretrained(folder, n_positions=[16, 32], backend="xla")
    ids = tiny.prompts(1, 20)
    programs = model.engine.runtime._compiled  # type: ignore[attr-defined]
    long, short = model.sample(ids, 26, top_k=1), model.sample(ids[:, :5], 10, top_k=1)
    names = [shape.name for shape, *_ in programs]
    assert names == ["context8-b1-s8-k1", "decode-b1-s16-k1"]
    first = weakref.ref(next(iter(programs.values())))
    gc.disable()
    try:
        np.testing.assert_array_equal(model.sample(ids, 26, top_k=1), long)
        assert first() is None, "an evicted program waits for the garbage collector"
    finally:
        gc.enable()
    np.testing.assert_array_equal(model.sample(ids[:, :5], 10, top_k=1), short)
    assert len(programs) == 2
