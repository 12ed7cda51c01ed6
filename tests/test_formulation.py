"""How a CPU multiplies is chosen by its instruction sets, or by measuring it once, or as pinned."""

import json
import time

import jax
import pytest

from jx_neuron.errors import ConfigError
from jx_neuron.runtime import xla_options
from jx_neuron.runtime.cpu import formulation
from jx_neuron.runtime.cpu.formulation import VARIABLE, by_instruction_sets, choose, measure
from jx_neuron.runtime.cpu.kernel import Formulation

PINNED = {"bfloat16": {"wide": [1], "passes": 16, "dot": "ynnpack"}}


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """The folder of compiled programs, empty; and nothing chosen yet."""
    monkeypatch.setenv(VARIABLE, "measure")
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    formulation._choose.cache_clear()
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)
    formulation._choose.cache_clear()


@pytest.mark.parametrize(
    ("names", "float32", "bfloat16", "float16"),
    [
        ("fpu avx2", ((), 8, "eigen"), ((), 32, "eigen"), ((), 32, "eigen")),
        ("avx2 avx512f", ((8,), 8, "eigen"), ((8,), 32, "eigen"), ((8,), 32, "eigen")),
        ("avx512f avx512_bf16", ((8,), 8, "eigen"), ((8,), 32, "ynnpack"), ((8,), 32, "eigen")),
        ("avx512f amx_tile amx_bf16", ((1, 8), 8, "eigen"), ((1, 8), 8, "ynnpack"), ((1, 8), 8, "eigen")),
        ("", ((), 8, "eigen"), ((), 32, "eigen"), ((), 32, "eigen")),
    ],
)
def test_by_instruction_sets(names, float32, bfloat16, float16) -> None:
    for dtype, expected in (("float32", float32), ("bfloat16", bfloat16), ("float16", float16)):
        assert by_instruction_sets(dtype, frozenset(names.split())) == Formulation(*expected)


def test_it_is_measured_once_and_kept_for_all_processes(kept, monkeypatch) -> None:
    result, calls = Formulation((4,), 8, "eigen"), []
    monkeypatch.setattr(formulation, "measure", lambda *of: calls.append(of[0]) or result)
    assert choose("float32") == (result, "measured")
    (path,) = kept.iterdir()
    assert json.loads(path.read_text())["float32"] == {"wide": [4], "passes": 8, "dot": "eigen"}
    formulation._choose.cache_clear()  # as another process
    assert choose("float32") == (result, "measured")
    choose("bfloat16")
    assert calls == ["float32", "bfloat16"]
    assert set(json.loads(path.read_text())) == {"float32", "bfloat16"}
    path.write_text('{"float32": {"wide": [3]}}')  # damaged: measured again
    formulation._choose.cache_clear()
    assert choose("float32") == (result, "measured")
    assert calls == ["float32", "bfloat16", "float32"]


def test_a_folder_that_cannot_be_written_is_no_error(kept, monkeypatch) -> None:
    result = Formulation((), 8, "eigen")
    monkeypatch.setattr(formulation, "measure", lambda *of: result)
    (kept / "file").write_text("")
    jax.config.update("jax_compilation_cache_dir", str(kept / "file"))
    assert choose("float32") == (result, "measured")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_takes_less_time_is_chosen(dtype, monkeypatch) -> None:
    """With times made up, by a table of what is fast."""
    best = Formulation((1, 4), 8, "eigen" if dtype == "float32" else "ynnpack")
    monkeypatch.setattr(xla_options, "instruction_sets", lambda: frozenset({"avx512f"}))
    monkeypatch.setattr(formulation, "BYTES", 2**20)

    def faster(w_nk, dtype, rows, usual, other):
        def is_best(form):
            return (
                (form.is_wide(rows) == best.is_wide(rows) or rows > 8)
                and (form.in_passes(rows) == best.in_passes(rows) or rows not in (16, 32))
                and (form.dot == best.dot or form.in_passes(rows))
            )

        return other if is_best(other) and not is_best(usual) else usual

    monkeypatch.setattr(formulation, "_faster", faster)
    assert measure(dtype, by_instruction_sets(dtype, frozenset({"avx512f"}))) == best


@pytest.mark.slow
def test_measuring_ends_in_time_and_gives_what_can_be_computed() -> None:
    began = time.perf_counter()
    usual = by_instruction_sets("bfloat16", frozenset())
    assert measure("bfloat16", usual, seconds=0) == usual
    assert time.perf_counter() - began < 5
    chosen = measure("bfloat16", usual, seconds=60)
    assert set(chosen.wide) <= {1, 4, 8}
    assert chosen.passes in (8, 16, 32)


def test_it_is_pinned(monkeypatch) -> None:
    monkeypatch.setenv(VARIABLE, json.dumps(PINNED))
    assert choose("bfloat16") == (Formulation((1,), 16, "ynnpack"), "pinned")
    assert choose("float32").reason == "instruction sets"


@pytest.mark.parametrize(
    ("setting", "word"),
    [
        ("fastest", "measure, instruction-sets"),
        ("[]", "JSON object"),
        ('{"float64": {}}', "float64"),
        ('{"float32": {"wide": [2], "passes": 8, "dot": "eigen"}}', "float32"),
        ('{"float32": {"wide": [], "passes": 12, "dot": "eigen"}}', "passes=12"),
        ('{"float32": {"wide": [], "passes": 8, "dot": "blas"}}', "ynnpack"),
        ("", "measure, instruction-sets"),
    ],
)
def test_what_the_variable_may_not_be_is_named(setting, word, monkeypatch) -> None:
    monkeypatch.setenv(VARIABLE, setting)
    with pytest.raises(ConfigError) as raised:
        choose("float32")
    assert VARIABLE in str(raised.value)
    assert word in str(raised.value)
