"""Keys and values in int8 with scales, in fp8 and in 16 bits: what is stored and read, and what models give."""

import dataclasses
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from families import OPTIONS
from steps import FORMULATION, filled
from test_families import random_model

from jx_neuron import KVCacheQuantizationConfig, NeuronAutoModelForCausalLM, NeuronConfig, SamplingParams
from jx_neuron.errors import ArtifactError, ConfigError
from jx_neuron.lowering.model import lower_model
from jx_neuron.models import Decoder
from jx_neuron.models.known import config_of
from jx_neuron.nn.attention import attend
from jx_neuron.nn.layout import KV, PLAIN, Kept
from jx_neuron.nn.ops import using
from jx_neuron.nn.positions import positions_of
from jx_neuron.planning import plan
from jx_neuron.runtime.cpu.layout import CPU
from jx_neuron.runtime.cpu.ops import CpuOps
from jx_neuron.step.program_key import ProgramKey

INT8, FP8 = KVCacheQuantizationConfig(), KVCacheQuantizationConfig("f8e4m3fn")
LAYOUTS = pytest.mark.parametrize("layout", [PLAIN, CPU], ids=["plain", "cpu"])
SLOTS, K, G, S, H = 3, 2, 2, 12, 8
LENGTHS, CHUNK, POSITIONS, NEW = (21, 9), 8, 32, 8


def oracle(x: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray | None]:
    """The codes of x, and the scale of each vector along its last axis."""
    if dtype == "float8_e4m3":
        return np.clip(x, -240, 240).astype(ml_dtypes.float8_e4m3), None
    if dtype != "int8":
        return x.astype(dtype), None
    scale = np.abs(x).max(-1) * np.float32(1 / 127)
    return np.rint(x / np.where(scale == 0, 1, scale)[..., None]).astype(np.int8), scale


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    codes, scale = oracle(x, dtype)
    wide = codes.astype(np.float32)
    return wide if scale is None else wide * scale[..., None]


def table(layout: Any, dtype: Any, windows: tuple[int | None, ...] = (None, None)) -> Any:
    rows = tuple(stored for row in KV for stored in row.encoded(dtype).stored_rows)
    sizes = tuple((K, 0, H)[: len(row.letters)] for row in rows)
    return filled(layout, [Kept(rows, sizes, window) for window in windows], SLOTS, S)


def at(start: Any, length: Any, slots: Any, tokens: int, positions: int = S) -> Any:
    start_b, length_b = (jnp.asarray(x, jnp.int32) for x in (start, length))
    return positions_of(start_b, length_b, None if slots is None else jnp.asarray(slots, jnp.int32), tokens, positions)


def heads(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Vectors of very different lengths, one of zeros."""
    x = rng.normal(size=shape) * np.exp(2 * rng.normal(size=(*shape[:-1], 1)))
    x[0, 0, 0] = 0
    return x.astype(np.float32)


@pytest.mark.few(3)
@LAYOUTS
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3", "bfloat16", "float16"])
def test_entries_are_stored_as_numpy_encodes_them(layout: Any, dtype: str) -> None:
    rng = np.random.default_rng(0)
    k, v = (300 * heads(rng, 2, 3, K, H) for _ in range(2))
    state = table(layout, dtype)
    before = jax.tree.map(np.asarray, state.arrays)
    write = jax.jit(lambda state, at, k, v: state.of_layer(1).write(at, k=k, v=v).state)
    written = write(state, at([4, 2], [3, 1], [2, 0], 3), k, v)
    every = at([1] * SLOTS, [1] * SLOTS, None, 1)
    for name, new in (("k", k), ("v", v)):
        expected = np.zeros((SLOTS, K, S, H), np.float32)
        expected[2, :, 4:7] = rounded(new[0], dtype).swapaxes(0, 1)
        expected[0, :, 2:3] = rounded(new[1, :1], dtype).swapaxes(0, 1)
        np.testing.assert_array_equal(written.of_layer(1).read(name, every), expected)
        np.testing.assert_array_equal(written.of_layer(0).read(name, every), np.zeros_like(expected))
    if layout is PLAIN:
        assert [array.dtype for array in written.arrays[1]] == [array.dtype for array in before[1]]
        codes, scale = oracle(k[0], dtype)
        np.testing.assert_array_equal(np.asarray(written.arrays[1][0])[2, :, 4:7], codes.swapaxes(0, 1))
        if scale is not None:
            np.testing.assert_array_equal(np.asarray(written.arrays[1][1])[2, :, 4:7], scale.T)


@pytest.mark.few(2)
@LAYOUTS
@pytest.mark.parametrize(
    ("dtype", "window"), [pytest.param("int8", None, marks=pytest.mark.slow), ("int8", 5), ("float8_e4m3", None)]
)
def test_attention_is_that_of_the_decoded_entries(layout: Any, dtype: Any, window: int | None) -> None:
    rng = np.random.default_rng(1)
    q = rng.normal(size=(SLOTS, S, K * G, H)).astype(np.float32)
    k, v = (heads(rng, SLOTS, S, K, H) for _ in range(2))
    wide_k, wide_v = (np.repeat(rounded(x, dtype), G, axis=2).astype(np.float64) for x in (k, v))
    w_bnts = np.einsum("btnh,bsnh->bnts", q.astype(np.float64), wide_k) / np.sqrt(H)
    distance_ts = np.arange(S)[:, None] - np.arange(S)
    w_bnts = np.where((distance_ts >= 0) & (distance_ts < (window or S)), w_bnts, -np.inf)
    p_bnts = np.exp(w_bnts - w_bnts.max(-1, keepdims=True))
    expected = np.einsum("bnts,bsnh->btnh", p_bnts / p_bnts.sum(-1, keepdims=True), wide_v)
    state, done = table(layout, dtype, (window, window)), 0
    run = jax.jit(lambda state, at, *x: attend(*x, state.of_layer(0), at, window=window))
    for t in (5, 5, 1, 1):  # more and fewer rows than one pass takes, beyond the window
        rows = at([done] * SLOTS, [t] * SLOTS, None if t == 1 else range(SLOTS), t, 5 if done == 0 else S)
        with using(CpuOps(FORMULATION)) if layout is CPU else nullcontext():
            found, part = run(state, rows, *(x[:, done : done + t] for x in (q, k, v)))
        state, wanted = part.state, expected[:, done : done + t]
        np.testing.assert_allclose(found, wanted, atol=2e-6 * np.abs(wide_v).max())
        done += t
    assert done == S


def model(folder: Path, quant: KVCacheQuantizationConfig | None, **options: Any) -> NeuronAutoModelForCausalLM:
    fixed: dict[str, Any] = dict(batch_size=2, n_positions=POSITIONS, context_length_estimate=CHUNK)
    config = NeuronConfig(kv_cache_quant=quant)
    return NeuronAutoModelForCausalLM.from_pretrained(folder, neuron_config=config, **(fixed | options))


def prompts(vocab: int = tiny.VOCAB) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocab, length).tolist() for length in LENGTHS]


def tokens(of: NeuronAutoModelForCausalLM, rows: list[list[int]]) -> list[list[int]]:
    return [list(answer.ids) for answer in of.generate(rows, SamplingParams(max_tokens=NEW, eos_token_id=-1))]


def logits(of: NeuronAutoModelForCausalLM, rows: list[list[int]]) -> np.ndarray:
    most = max(map(len, rows))
    ids_bt = np.array([[0] * (most - len(row)) + row for row in rows])
    return of(ids_bt, start_ids=[most - len(row) for row in rows])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def answers(llama: Path) -> list[list[int]]:
    return tokens(model(llama, INT8), prompts())


def near(one: np.ndarray, other: np.ndarray, within: float) -> None:
    """The same logits but for what codes round off."""
    difference = np.abs(one - other).max() / np.abs(other).max()
    assert 0 < difference < within


@pytest.mark.slow
def test_logits_are_near_those_of_float32(llama: Path) -> None:
    exact, int8, fp8 = (logits(model(llama, quant), prompts()) for quant in (None, INT8, FP8))
    near(int8, exact, 0.03)
    near(fp8, exact, 0.25)


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_host_answers_as_xla_does(llama: Path, answers: list[list[int]], tp: int) -> None:
    """At 4, two key heads are there twice each."""
    assert tokens(model(llama, INT8, tp_degree=tp, backend="host"), prompts()) == answers


@pytest.mark.slow
@pytest.mark.parametrize("tp", [2, 4])
def test_answers_are_the_same_at_any_degree(llama: Path, answers: list[list[int]], tp: int) -> None:
    assert tokens(model(llama, INT8, tp_degree=tp, backend="xla"), prompts()) == answers


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_host_answers_as_xla_does_in_fp8(llama: Path, tp: int) -> None:
    expected = tokens(model(llama, FP8, backend="xla"), prompts())
    assert tokens(model(llama, FP8, tp_degree=tp, backend="host"), prompts()) == expected


@pytest.mark.slow
def test_answers_are_the_same_alone_whole_and_of_a_copied_prefix(llama: Path, answers: list[list[int]]) -> None:
    whole = model(llama, INT8, batch_size=1, context_length_estimate=POSITIONS)
    assert [tokens(whole, [prompt])[0] for prompt in prompts()] == answers
    prefixed, prompt = model(llama, INT8), prompts()[0]
    prefixed.keep_prefix(prompt[:13])
    assert tokens(prefixed, [prompt, prompt]) == [answers[0]] * 2


FAMILIES = [
    pytest.param(name, id=name, marks=[] if name == "deepseek_v3" else pytest.mark.slow)
    for name in "gemma2 gemma3_text gemma4_text deepseek_v2 deepseek_v3 qwen3_next falcon_h1 gpt_oss lfm2".split()
]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_windows_shared_keys_latents_and_recurrent_layers(family: str, tmp_path: Path) -> None:
    random_model(family, OPTIONS[family][0]).save_pretrained(tmp_path)
    plain, encoded = (model(tmp_path, quant, batch_size=1, backend="xla") for quant in (None, INT8))
    rows = prompts(plain.settings.vocab_size)[:1]  # beyond the windows, and in chunks
    near(logits(encoded, rows), logits(plain, rows), 0.05)
    kept, own = plain.settings, encoded.settings
    stored = Counter(dtype for dtype in own.state_dtypes.values())
    recurrent = len(kept.state_dtypes)
    assert stored["int8"] == stored["float32"] - recurrent > 0
    assert {name: shape for name, shape in own.state.items() if not name.endswith(".scale")} == kept.state


@pytest.mark.slow
@pytest.mark.parametrize("family", [name.values[0] for name in FAMILIES])
def test_families_answer_on_the_host_as_on_xla(family: str, tmp_path: Path) -> None:
    random_model(family, OPTIONS[family][0]).save_pretrained(tmp_path)
    xla = model(tmp_path, INT8, backend="xla")
    rows = prompts(xla.settings.vocab_size)
    assert tokens(model(tmp_path, INT8, backend="host", tp_degree=2), rows) == tokens(xla, rows)


KEYS = [ProgramKey("decode", 2, 1, 64, 16), ProgramKey("prefill", 2, 32, 32), ProgramKey("prefill", 2, 16, 64)]
LOWERED = [("llama", "int8"), ("llama", "float8_e4m3"), ("gemma3_text", "int8"), ("deepseek_v3", "int8")]


@pytest.mark.few(1)
@pytest.mark.parametrize(("family", "dtype"), LOWERED)
def test_lowered_programs_pass_and_scales_move_between_no_cores(family: str, dtype: Any) -> None:
    import transformers

    options = OPTIONS[family][0]
    decoder = Decoder.from_config(transformers.AutoConfig.for_model(family, **options).to_dict(), 2)
    keys = KEYS if family == "llama" else KEYS[-1:]
    plain, encoded = (list(lower_model(of, keys, 3, 96, jnp.bfloat16)) for of in (decoder, decoder.with_cache(dtype)))
    for before, after in zip(plain, encoded, strict=True):
        for target in ("inf2", "trn1", "trn2"):
            assert after.verify(target) == [], f"{after.name} on {target}"
        assert [(c.opcode, c.shape) for c in after.collectives()] == [(c.opcode, c.shape) for c in before.collectives()]
        states = [spec for spec in after.inputs if spec.kind == "state"]
        assert {spec.dtype for spec in states} >= {dtype}
        held = sum(spec.nbytes for spec in states) - 4 * 3
        assert held == decoder.with_cache(dtype).state_bytes(3, 96, 2)


@pytest.mark.slow
def test_a_saved_model_keeps_its_form(llama: Path, answers: list[list[int]], tmp_path: Path) -> None:
    made = model(llama, INT8, backend="host", tp_degree=2)
    folder = made.save(tmp_path / "saved", sharded_weights=True)
    opened = NeuronAutoModelForCausalLM.from_pretrained(folder)
    assert opened.settings == made.settings
    assert opened.settings.cache_dtype == "int8"
    assert tokens(opened, prompts()) == answers
    again = NeuronConfig(kv_cache_quant=INT8)
    assert NeuronAutoModelForCausalLM.from_pretrained(folder, neuron_config=again).settings == made.settings
    with pytest.raises(ArtifactError, match="kv_cache_quant=int8 and not float8_e4m3"):
        NeuronAutoModelForCausalLM.from_pretrained(folder, neuron_config=NeuronConfig(kv_cache_quant=FP8))
    with pytest.raises(ArtifactError, match="saved for cache_dtype='int8' and not 'float32'; make"):
        model(llama, None, backend="host", tp_degree=2).load(folder)


def test_bytes_are_counted_as_they_are_stored() -> None:
    raw = config_of("HuggingFaceTB/SmolLM2-135M")
    decoder = Decoder.from_config(raw)
    vectors = 30 * 2 * 3 * 4 * 2048  # layers, keys and values, heads, slots, positions
    assert decoder.state_bytes(4, 2048, 4) == vectors * 64 * 4
    assert decoder.with_cache("int8").state_bytes(4, 2048, 4) == vectors * (64 + 4)
    assert decoder.with_cache("float8_e4m3").state_bytes(4, 2048, 4) == vectors * 64
    options: Any = dict(batch_size=4, n_positions=2048, amp="bf16")
    before, after = (plan(raw, "trn1.2xlarge", 1, kv_cache_quant=quant, **options) for quant in (None, INT8))
    assert (before.memory.cache, before.cache_dtype) == (vectors * 128, None)
    assert (after.memory.cache, after.cache_dtype) == (vectors * 68, "int8")
    assert after.seconds_per_token < before.seconds_per_token
    assert plan(decoder.with_cache("int8"), "trn1.2xlarge", 1, **options).memory == after.memory


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(quant_dtype="s4"), "quant_dtype='s4' is not legal; it is one of s8, f8e4m3fn, f16, bf16"),
        (dict(quantize_method="direct_cast"), "leave it out, or say 'vector_dynamic' .a cast to whole numbers"),
        (dict(quant_dtype="f8e4m3fn", quantize_method="vector_dynamic"), "say 'direct_cast'"),
        (dict(dequant_dtype="s8"), "dtype 's8' is not supported"),
    ],
    ids=str,
)
def test_what_is_not_legal_is_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        KVCacheQuantizationConfig(**options)


def test_a_model_that_cannot_have_it_says_so(llama: Path) -> None:
    with pytest.raises(ConfigError, match="dequant_dtype='bf16' is not amp='f32'"):
        model(llama, dataclasses.replace(INT8, dequant_dtype="bf16"))
    with pytest.raises(ConfigError, match="kv_cache_quant='int8' is not legal"):
        NeuronConfig(kv_cache_quant="int8")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="mamba2 keeps no keys and values"):
        Decoder.from_config({"model_type": "mamba2", "num_heads": 8, "hidden_size": 256}).with_cache("int8")


@pytest.mark.slow
def test_perplexity_of_smollm2_in_int8_is_that_of_float32() -> None:
    from pydoc_data.topics import topics

    from jx_neuron.checkpoint.demo import demo_model

    text = "\n\n".join(topics[name] for name in sorted(topics))
    perplexities = []
    for quant in (None, INT8):
        config = NeuronConfig(kv_cache_quant=quant, output_all_logits=True)
        of = NeuronAutoModelForCausalLM.from_pretrained(demo_model(), n_positions=1024, neuron_config=config)
        ids = of.tokenizer(text)["input_ids"][:20_000]
        perplexities.append(of.score([ids])[0].perplexity)
    before, after = perplexities
    assert abs(after / before - 1) < 0.003
