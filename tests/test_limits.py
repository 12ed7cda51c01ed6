"""What cannot be had is refused before anything is built, with its figure; what can is not."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from flax import nnx
from typer.testing import CliRunner

from jx_neuron import InputError, NeuronAutoModelForCausalLM, NeuronConfig
from jx_neuron.checkpoint.folder import load_config
from jx_neuron.cli.app import app
from jx_neuron.models import gpt2
from jx_neuron.planning.limits import check_host
from jx_neuron.runtime.xla import XlaRuntime
from jx_neuron.util import pages
from jx_neuron.util.pages import gib, memory_limit

IDS = tiny.prompts(2, 5)
HEADS, HEAD, LAYERS = 2, 12, 2  # key/value heads of the tiny Llama


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved("llama", tmp_path_factory.mktemp("limits"))


def from_pretrained(folder: Path, **options: Any) -> NeuronAutoModelForCausalLM:
    return NeuronAutoModelForCausalLM.from_pretrained(folder, **options)


def from_config(folder: Path, **options: Any) -> NeuronAutoModelForCausalLM:
    return NeuronAutoModelForCausalLM.from_config(load_config(folder), **options)


def from_module(folder: Path, **options: Any) -> NeuronAutoModelForCausalLM:
    config = gpt2.Config(n_embd=48, n_layer=1, n_head=4, vocab_size=tiny.VOCAB, n_positions=24)
    module = gpt2.Model(config, nnx.Rngs(0))
    return NeuronAutoModelForCausalLM.from_module(module, config, weights=gpt2.WEIGHTS, **options)


MAKERS = pytest.mark.parametrize("make", [from_pretrained, from_config, from_module])


@MAKERS
@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (dict(tp_degree=100_000), r"tp_degree=100000 pads this model to [\d,]+ times its weights; .* up to \d+$"),
        (dict(tp_degree=10**30), r"tp_degree=1000000000000000000000000000000 pads this model"),
        (dict(batch_size=1_000_000), "batch_size=1000000 is not legal; it takes an integer from 1 to 65536"),
        (dict(batch_size=[1, 10**6]), "batch_size=1000000 is not legal"),
        (dict(batch_size=range(1, 10**9)), "batch_size has 999999999 sizes.* 64 at most"),
        (dict(n_positions=10**9), "n_positions=1000000000 is not legal; it takes an integer from 1 to 16777216"),
        (dict(n_positions=range(1, 10**30)), "n_positions has inf sizes"),
        (dict(n_positions=[*range(1, 66)]), "n_positions has 65 sizes"),
        (dict(context_length_estimate=10**9), "context_length_estimate=1000000000 is not legal"),
        (dict(batch_size=4, prompt_batch_size=10**9), "prompt_batch_size=1000000000 goes with one batch_size that"),
        (dict(batch_size=True), "batch_size=True is not legal"),
        (dict(tp_degree=3, neuron_config=NeuronConfig(strict_sharding=True)), "tp_degree=3 does not divide the 4"),
    ],
    ids=str,
)
def test_what_is_absurd_is_refused_at_once(make: Any, asked: dict, words: str, checkpoint: Path) -> None:
    with pytest.raises(InputError, match=words):
        make(checkpoint, **asked)


def test_the_largest_legal_degree_is_legal_and_the_next_is_not(checkpoint: Path) -> None:
    with pytest.raises(InputError) as refusal:
        from_config(checkpoint, tp_degree=100_000)
    most = int(str(refusal.value).rpartition(" ")[2])
    with pytest.warns(UserWarning, match=f"tp_degree={most} pads .*: 1[45]\\d\\d\\..% more weights"):
        from_config(checkpoint, tp_degree=most)
    with pytest.raises(InputError, match="pads this model to 16 times"):
        from_config(checkpoint, tp_degree=most + 1)


def test_programs_that_no_instance_holds_are_refused_before_lowering(checkpoint: Path) -> None:
    with pytest.raises(InputError, match=r"n_positions=16777216 take .* TiB and the largest instance, trn2.48xlarge"):
        from_config(checkpoint, batch_size=65536, n_positions=2**24)
    from_config(checkpoint, batch_size=1, n_positions=2**24)


@pytest.mark.parametrize(
    "arguments",
    [
        ["sample", "MODEL", "--tp", "100000", "x"],
        ["sample", "MODEL", "--batch-size", "1000000", "x"],
        ["compile", "MODEL", "--hlo-only", "--tp", "100000", "-o", "OUT"],
        ["compile", "MODEL", "--hlo-only", "--no-weights", "--batch-size", "1000000", "-o", "OUT"],
        ["plan", "MODEL", "--tp", "100000"],
        ["plan", "MODEL", "--batch-size", "1000000"],
    ],
    ids=" ".join,
)
def test_the_command_line_refuses_the_same(arguments: list[str], checkpoint: Path, tmp_path: Path) -> None:
    places = {"MODEL": str(checkpoint), "OUT": str(tmp_path / "out")}
    done = CliRunner().invoke(app, [places.get(word, word) for word in arguments])
    assert isinstance(done.exception, InputError)
    assert re.search("tp_degree=100000|batch_size=1000000", str(done.exception))
    assert not (tmp_path / "out").exists()


def needed(folder: Path, rows: int, slots: int) -> int:
    """Bytes of weights and cache in float32, counted from HF's model."""
    weights = sum(tensor.numel() for tensor in tiny.model("llama").state_dict().values())
    return 4 * (weights + 2 * LAYERS * rows * HEADS * slots * HEAD)


@pytest.mark.parametrize(("backend", "slots"), [("xla", 16), ("host", 64)])
def test_weights_and_the_smallest_cache_are_held_against_the_memory_here(
    backend: str, slots: int, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = needed(checkpoint, 2, slots)
    model = from_pretrained(checkpoint, batch_size=[2, 4], n_positions=[16, 64], backend=backend)
    monkeypatch.setattr(pages, "memory_limit", lambda: size - 1)
    with pytest.raises(InputError, match=f"2 rows and {slots} positions take .* GiB of memory"):
        model.to_neuron()
    monkeypatch.setattr(pages, "memory_limit", lambda: size)
    check_host(model._origin.decoder, 1, 2, slots, 4)
    if backend == "xla":
        assert isinstance(model.runtime, XlaRuntime)


def test_a_call_whose_cache_cannot_be_had_is_refused_and_the_model_goes_on(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = from_pretrained(checkpoint, batch_size=[1, 4096], n_positions=[16, 64], backend="xla")
    one = model.sample(IDS[:1], 12, top_k=1)
    monkeypatch.setattr(pages, "memory_limit", lambda: 4 * 2 * LAYERS * 4096 * HEADS * 16 * HEAD - 1)
    with pytest.raises(InputError, match="the keys and values of 4096 rows and 16 positions take"):
        model.sample(IDS, 12, top_k=1)
    np.testing.assert_array_equal(model.sample(IDS[:1], 12, top_k=1), one)


@pytest.mark.parametrize(("container", "room"), [("max\n", 3 * 2**20), ("1048576\n", 2**20), (None, 3 * 2**20)])
def test_memory_here_is_with_swap_and_within_the_container_s(
    container: str | None, room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:        2048 kB\nMemFree: 7 kB\nSwapCached: 9 kB\nSwapTotal: 1024 kB\n")
    if container is not None:
        (tmp_path / "max").write_text(container)
    monkeypatch.setattr(pages, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(pages, "CONTAINER", tmp_path / "max")
    assert memory_limit() == room
    monkeypatch.setattr(pages, "MEMORY", tmp_path / "none")
    assert memory_limit() is None


def test_sizes_are_said_in_gib_or_tib() -> None:
    assert [gib(2**29), gib(999 * 2**30), gib(3 * 2**40)] == ["0.5 GiB", "999 GiB", "3 TiB"]


@pytest.mark.slow
def test_numpy_s_integers_are_integers(checkpoint: Path) -> None:
    plain = dict(batch_size=4, prompt_batch_size=2, n_positions=[16, 32], tp_degree=2, context_length_estimate=8)
    numpy = dict(
        batch_size=np.int64(4),
        prompt_batch_size=np.int8(2),
        n_positions=np.array([16, 32]),
        tp_degree=np.uint16(2),
        context_length_estimate=np.int32(8),
    )
    for backend in ("xla", "host"):
        one, other = (from_pretrained(checkpoint, backend=backend, **of) for of in (plain, numpy))
        assert one.settings == other.settings
        np.testing.assert_array_equal(one.sample(IDS, 12, seed=1), other.sample(IDS, 12, seed=1))
    assert from_config(checkpoint, n_positions=np.int64(300)).buckets.tokens == (128, 256, 300)


def test_going_on_with_other_rows_than_the_cache_holds_is_refused(checkpoint: Path) -> None:
    model = from_pretrained(checkpoint, batch_size=[1, 2], n_positions=32, backend="xla")
    model(IDS)
    with pytest.raises(InputError, match=r"1 rows cannot go on at positions .*: the last call left 2 rows"):
        model(IDS[:1, :1], cache_ids=5)
