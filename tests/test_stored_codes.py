"""Quantized checkpoints that are quantized as they are read: the codes and scales that are stored are kept."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from quantized import INT4, LAYOUTS, Layout, awq, compressed, gptq, llama

from jx_neuron import QuantizationConfig
from jx_neuron.checkpoint import open_checkpoint
from jx_neuron.checkpoint.gguf.format import Entry, affine, load
from jx_neuron.models import Decoder
from jx_neuron.nn.quantized import Form, Quantized

pytestmark = pytest.mark.filterwarnings("ignore:quantization_config quantizes")

S8, F8 = QuantizationConfig(), QuantizationConfig(quant_dtype="f8e4m3fn")
GROUPS = QuantizationConfig(quant_dtype="int4", group_size=8)
EXACT = {
    "int8-channel": (LAYOUTS["int8-channel"], S8),
    "int8-tensor": (LAYOUTS["int8-tensor"], S8),
    "int8-packed": (LAYOUTS["packed-8"], S8),
    "int8-gptq": (gptq(8, -1, sym=True), S8),
    "four-bits-a-channel": (compressed("pack-quantized", num_bits=4, strategy="channel"), S8),
    "int4-groups-of-32": (compressed("pack-quantized", **INT4), GROUPS),
    "int4-groups-of-16": (compressed("pack-quantized", torch.float16, **INT4 | {"group_size": 16}), GROUPS),
    "int4-channel": (compressed("pack-quantized", num_bits=4, strategy="channel"), GROUPS),
    "three-bits": (compressed("pack-quantized", **INT4 | {"num_bits": 3}), GROUPS),
    "int4-gptq": (gptq(4, 32, sym=True), GROUPS),
    "int4-gptq-v2": (gptq(4, 32, sym=True, checkpoint_format="gptq_v2"), GROUPS),
}
OFFSETS_ROUNDED = {
    "int4-asymmetric": compressed("pack-quantized", torch.float16, **INT4 | {"symmetric": False}),
    "int4-gptq": gptq(4, 32),
    "int4-awq": awq(32),
}


def matrices(layout: Layout, folder: Path, quant: QuantizationConfig) -> Iterator[tuple[Quantized, np.ndarray]]:
    """Each quantized matrix of a Llama in `layout`, as `quant` stores it and as the checkpoint means it."""
    checkpoint = open_checkpoint(llama(layout, folder)[0])
    decoder = Decoder.from_config(checkpoint.config)
    coded, plain = (replace(decoder, quant=each).source(checkpoint, np.dtype(np.float32)) for each in (quant, None))
    for path, form in replace(decoder, quant=quant).forms.items():
        parts = {part: jnp.asarray(coded.read(f"{path}.{part}")) for part in form.parts}
        yield Quantized(form, **parts), plain.read(path)


@pytest.mark.few(3)
@pytest.mark.parametrize("name", EXACT)
def test_a_form_that_has_the_stored_numbers_gives_them_exactly(name: str, tmp_path: Path) -> None:
    compared = [
        np.testing.assert_array_equal(quantized.widened(jnp.float32), plain)
        for quantized, plain in matrices(EXACT[name][0], tmp_path, EXACT[name][1])
    ]
    assert len(compared) == 14


@pytest.mark.parametrize("name", OFFSETS_ROUNDED)
def test_offsets_that_float16_rounds_are_its_nearest(name: str, tmp_path: Path) -> None:
    """(code - zero) · scale has scale in float16, and zero · scale four bits more."""
    for quantized, plain in matrices(OFFSETS_ROUNDED[name], tmp_path, GROUPS):
        scales = np.abs(np.asarray(quantized.scales[...], np.float32))
        error = np.abs(np.asarray(quantized.widened(jnp.float32)) - plain)
        assert 0 < error.max() <= 15 * scales.max() * 2.0**-11


@pytest.mark.parametrize("name", ["float8-channel", "float8-tensor", "fp8-tensor"])
def test_codes_of_fp8_are_halved_where_they_are_beyond_its_range(name: str, tmp_path: Path) -> None:
    """e4m3fn reaches 448, and e4m3 240: exact but for odd multiples of its least number, 2^-9."""
    for quantized, plain in matrices(LAYOUTS[name], tmp_path, F8):
        scales = np.asarray(quantized.scales[...])
        error = np.abs(np.asarray(quantized.widened(jnp.float32)) - plain)
        assert (error <= 2.0**-10 * scales + 1e-7 * np.abs(plain)).all()


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q4_1])
def test_blocks_of_a_gguf_file_that_no_rounding_would_give(kind: gguf.GGMLQuantizationType, tmp_path: Path) -> None:
    """Codes at random, whose largest is not at an end, as llama.cpp gives with an importance matrix."""
    rng, shape = np.random.default_rng(0), (48, 128)
    _, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (48 * 4, size), np.uint8)
    blocks[:, size - 16 :] = blocks[:, size - 16 :] & 0x77 | 0x11  # 1 to 7
    numbers = (0.01 * rng.standard_normal((48 * 4, (size - 16) // 2))).astype(np.float16)
    blocks[:, : size - 16] = numbers.view(np.uint8)
    (tmp_path / "blocks").write_bytes(blocks.tobytes())
    entry = Entry(shape, kind, 0)
    wide = load(tmp_path / "blocks", entry)
    np.testing.assert_array_equal(wide, gguf.dequantize(blocks.reshape(48, -1), kind))
    scales, offsets = affine(tmp_path / "blocks", entry)
    parts = Form("int4", 1, group=32).encode(wide.T, np.float32, (scales.T, offsets.T))
    stored = Quantized(Form("int4", 1, group=32), **{name: jnp.asarray(part) for name, part in parts.items()})
    np.testing.assert_array_equal(stored.widened(jnp.float32).T, wide)
    np.testing.assert_array_equal(parts["scales"].T, numbers[:, 0].reshape(48, 4))


def test_groups_of_a_k_quant_keep_their_codes(tmp_path: Path) -> None:
    """A block of Q4_K has 8 groups, whose scales and minimums are products that float16 rounds."""
    rng, shape, kind = np.random.default_rng(0), (48, 512), gguf.GGMLQuantizationType.Q4_K
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (48 * 512 // block, size), np.uint8)
    blocks[:, :4] = rng.uniform(1e-4, 2e-4, (len(blocks), 2)).astype(np.float16).view(np.uint8)
    (tmp_path / "blocks").write_bytes(blocks.tobytes())
    entry = Entry(shape, kind, 0)
    wide = load(tmp_path / "blocks", entry)
    scales, offsets = affine(tmp_path / "blocks", entry)
    parts = Form("int4", 1, group=32).encode(wide.T, np.float32, (scales.T, offsets.T))
    stored = Quantized(Form("int4", 1, group=32), **{name: jnp.asarray(part) for name, part in parts.items()})
    rounding = 2.0**-11 * (15 * scales.astype(np.float32) + np.abs(offsets.astype(np.float32))) + 2.0**-24
    assert (np.abs(np.asarray(stored.widened(jnp.float32)).T - wide) <= rounding).all()
    # d · 32 codes in pairs of 32: the low bits of 32 bytes are a group, their high bits the next
    raw = blocks[:, size - block // 2 :].reshape(-1, 4, 1, 32) >> np.array([0, 4], np.uint8)[:, None] & 15
    pairs = parts["codes"].T.reshape(48, -1, 32)
    codes = np.stack([pairs & 15, pairs >> 4], 2).reshape(48, -1, 32)
    kept = codes == raw.reshape(48, -1, 32)
    assert kept[scales.reshape(48, -1, 32) > 0].all()


def test_codes_of_bitsandbytes_are_kept(tmp_path: Path) -> None:
    """Its numbers are rounded twice in float32."""
    for quantized, plain in matrices(LAYOUTS["llm-int8"], tmp_path, S8):
        np.testing.assert_allclose(quantized.widened(jnp.float32), plain, rtol=3e-7)


def test_groups_that_the_form_cannot_have_are_rounded_anew(tmp_path: Path) -> None:
    """Act-order: neighbours have scales of their own."""
    for quantized, plain in matrices(LAYOUTS["gptq-4-act-order"], tmp_path, GROUPS):
        error = np.asarray(quantized.widened(jnp.float32)) - plain
        assert 0 < np.square(error).mean() < 0.01 * np.square(plain).mean()
