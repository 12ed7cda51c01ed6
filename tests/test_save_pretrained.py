"""`save_pretrained`: what it writes is what was loaded, for Hugging Face transformers and for this package."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tiny
import torch
import transformers
from converted import Converter
from families import OPTIONS
from flax import nnx
from gguf_models import MODELS
from safetensors.numpy import load_file
from test_families import FIRST, OTHERS, random_model
from test_multimodal import WRAPPERS

from jx_neuron import NeuronAutoModelForCausalLM, NeuronConfig, QuantizationConfig
from jx_neuron.checkpoint import open_checkpoint, writing
from jx_neuron.errors import ArtifactError, CheckpointError, ConfigError, InputError, JxNeuronError
from jx_neuron.models import mixtral


def load(folder: Path, **options: Any) -> NeuronAutoModelForCausalLM:
    return NeuronAutoModelForCausalLM.from_pretrained(folder, n_positions=64, **options)


def parameters(model: NeuronAutoModelForCausalLM) -> dict[str, np.ndarray]:
    return {path: part for path, (part,) in model._origin.parameters().items()}


def check_equal(one: NeuronAutoModelForCausalLM, other: NeuronAutoModelForCausalLM) -> None:
    """Holds the parameters of both to be the same, bit for bit."""
    arrays, others = parameters(one), parameters(other)
    assert arrays.keys() == others.keys()
    for path, array in arrays.items():
        assert array.dtype == others[path].dtype
        np.testing.assert_array_equal(array, others[path], err_msg=path)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def hf_logits(folder: Path, **options: Any) -> torch.Tensor:
    """The logits of HF's model of a folder, which has every tensor that the model needs, and no other."""
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(loading.values()), loading
    model.eval().set_experts_implementation("eager")
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, vocabulary, (2, 20)))
    with torch.inference_mode():
        return model(ids).logits


def check_round_trip(model_type: str, options: dict[str, Any], folder: Path) -> None:
    before, after, again = (folder / name for name in ("before", "after", "again"))
    random_model(model_type, options).save_pretrained(before)
    model = load(before)
    assert model.save_pretrained(after) == after
    assert torch.equal(hf_logits(after), hf_logits(before))
    written = load(after)
    check_equal(written, model)
    written.save_pretrained(again)
    assert files(again) == files(after)


@pytest.mark.parametrize(("model_type", "options"), FIRST)
def test_every_family(model_type: str, options: dict[str, Any], tmp_path: Path) -> None:
    check_round_trip(model_type, options, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "options"), OTHERS)
def test_other_options(model_type: str, options: dict[str, Any], tmp_path: Path) -> None:
    check_round_trip(model_type, options, tmp_path)


@pytest.mark.parametrize(("amp", "model_type"), [("bf16", "llama"), ("f16", "gpt2")])
def test_half_precision(amp: str, model_type: str, tmp_path: Path) -> None:
    """What is written is in the dtype that is loaded, split or not over cores, and config.json says it."""
    model = load(tiny.saved(model_type, tmp_path / "before"), amp=amp, tp_degree=4)
    written = load(model.save_pretrained(tmp_path / "after"), amp=amp, tp_degree=1)
    check_equal(written, load(tmp_path / "before", amp=amp))
    dtype = model.settings.dtype
    assert {array.dtype for array in load_file(tmp_path / "after" / "model.safetensors").values()} == {dtype}
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "after", dtype="auto")
    assert str(hf.dtype) == f"torch.{dtype.name}"


def test_what_is_float32_in_any_model_stays_so(tmp_path: Path) -> None:
    random_model("deepseek_v3", OPTIONS["deepseek_v3"][0]).save_pretrained(tmp_path / "before")
    model = load(tmp_path / "before", amp="bf16")
    tensors = load_file(model.save_pretrained(tmp_path / "after") / "model.safetensors")
    dtypes = {name.rpartition(".")[2]: array.dtype for name, array in tensors.items()}
    assert dtypes == {"weight": ml_dtypes.bfloat16, "e_score_correction_bias": np.float32}
    check_equal(load(tmp_path / "after", amp="bf16"), model)


@pytest.mark.parametrize("size", ["30KB", 30_000, 1])
def test_several_files_and_an_index(size: int | str, tmp_path: Path) -> None:
    before, after = tiny.saved("llama", tmp_path / "before"), tmp_path / "after"
    model = load(before)
    model.save_pretrained(after, max_shard_size=size)
    shards = sorted(path.name for path in after.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((after / "model.safetensors.index.json").read_text())
    tensors = {name: array for shard in shards for name, array in load_file(after / shard).items()}
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    largest = max(array.nbytes for array in tensors.values())
    sizes = [sum(array.nbytes for array in load_file(after / shard).values()) for shard in shards]
    assert max(sizes) <= max(largest, 30_000 if size != 1 else 1)
    assert torch.equal(hf_logits(after), hf_logits(before))
    check_equal(load(after), model)


def test_configs_and_the_tokenizer_come_along(tmp_path: Path) -> None:
    before = tiny.saved("llama", tmp_path / "before", tiny.tokenizer())
    (before / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true, "eos_token_id": [3, 5]}')
    after = load(before).save_pretrained(tmp_path / "after")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (after / name).read_bytes() == (before / name).read_bytes()
    for name in ("config.json", "generation_config.json"):
        assert json.loads((after / name).read_text()) == json.loads((before / name).read_text())


@pytest.mark.parametrize("name", ["mistral3", "gemma3"])
def test_the_text_model_of_a_multimodal_one(name: str, tmp_path: Path) -> None:
    model_type, options = WRAPPERS[name]
    config = transformers.AutoConfig.for_model(model_type, **options)
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "before")
    with pytest.warns(UserWarning, match="loaded as its text model"):
        model = load(tmp_path / "before")
    after = model.save_pretrained(tmp_path / "after")
    check_equal(load(after), model)
    assert hf_logits(after).isfinite().all()


def test_a_gguf_file(tmp_path: Path) -> None:
    hf = random_model("gemma2", MODELS["gemma2"][0])  # whose file has norms with 1 added
    converter, vocabulary = Converter(hf, tmp_path / "m.gguf"), tiny.tokenizer().get_vocab()
    converter.writer.add_tokenizer_model("gpt2")
    converter.writer.add_tokenizer_pre("gpt-2")
    converter.writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    converter.writer.add_token_merges([])
    converter.write()
    model = load(tmp_path / "m.gguf")
    after = model.save_pretrained(tmp_path / "after")
    check_equal(load(after), model)
    assert load(after).tokenizer("text")["input_ids"] == model.tokenizer("text")["input_ids"]
    hf.save_pretrained(tmp_path / "hf")
    torch.testing.assert_close(hf_logits(after), hf_logits(tmp_path / "hf"), rtol=0, atol=1e-5)


def test_a_checkpoint_of_the_base_model_keeps_its_names(tmp_path: Path) -> None:
    tiny.model("gpt2").transformer.save_pretrained(tmp_path / "before")
    after = load(tmp_path / "before").save_pretrained(tmp_path / "after")
    assert open_checkpoint(after).names() == open_checkpoint(tmp_path / "before").names()
    assert torch.equal(hf_logits(after), hf_logits(tmp_path / "before"))


def test_a_module_in_memory(tmp_path: Path) -> None:
    """HF's names are those of the first row of the weight table for each parameter, as files have them."""
    options = OPTIONS["mixtral"][0]
    config = mixtral.Config.from_hf(transformers.AutoConfig.for_model("mixtral", **options).to_dict())
    module = mixtral.Model(config, nnx.Rngs(0))
    model = NeuronAutoModelForCausalLM.from_module(module, config, weights=mixtral.WEIGHTS, n_positions=64)
    after = model.save_pretrained(tmp_path / "after")
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in open_checkpoint(after).names()
    check_equal(load(after), model)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, 20))
    np.testing.assert_allclose(model(ids)[0], load_and_run(after, ids), rtol=0, atol=1e-5)


def load_and_run(folder: Path, ids: np.ndarray) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    model.set_experts_implementation("eager")
    return tiny.logits(model, ids)[0, -1]


def test_experts_are_read_once(tmp_path: Path) -> None:
    """Tensors of several experts come from one parameter, which is read once."""
    random_model("mixtral", OPTIONS["mixtral"][0]).save_pretrained(tmp_path)
    decoder, checkpoint = (origin := load(tmp_path)._origin).decoder, open_checkpoint(tmp_path)
    reads: list[str] = []

    def read(path: str) -> np.ndarray:
        reads.append(path)
        return origin.source.read(path)

    tensors = writing.hf_tensors(decoder.match(checkpoint), decoder.config, read, np.dtype(np.float32))
    assert tensors.layouts.keys() == checkpoint.names()
    for name, (dtype, shape) in tensors.layouts.items():
        array = tensors.read(name)
        assert (array.dtype, array.shape) == (dtype, shape)
        np.testing.assert_array_equal(array, checkpoint.read(name))
    assert sorted(reads) == sorted(origin.source.paths)


def from_config(folder: Path) -> NeuronAutoModelForCausalLM:
    return NeuronAutoModelForCausalLM.from_config(json.loads((folder / "config.json").read_text()), n_positions=64)


def quantized(folder: Path) -> NeuronAutoModelForCausalLM:
    return load(folder, neuron_config=NeuronConfig(quant=QuantizationConfig()))


def artifact(folder: Path) -> NeuronAutoModelForCausalLM:
    saved = load(folder, backend="host").save(folder.parent / "artifact", sharded_weights=True)
    return NeuronAutoModelForCausalLM.from_pretrained(saved, backend="host")


@pytest.mark.parametrize(
    ("make", "options", "error", "said"),
    [
        (quantized, {}, ConfigError, "jx-neuron quantize"),
        (from_config, {}, CheckpointError, "from_pretrained"),
        (artifact, {}, ArtifactError, "from its checkpoint"),
        (load, {"max_shard_size": "5 gigabytes"}, InputError, "max_shard_size='5 gigabytes'.*'5GB'"),
        (load, {"max_shard_size": 0}, InputError, "max_shard_size=0"),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_refused(make: Any, options: Any, error: type[JxNeuronError], said: str, tmp_path: Path) -> None:
    model = make(tiny.saved("llama", tmp_path / "before"))
    with pytest.raises(error, match=said):
        model.save_pretrained(tmp_path / "after", **options)
    assert not (tmp_path / "after").exists()


def test_a_folder_with_files_is_refused(tmp_path: Path) -> None:
    before = tiny.saved("llama", tmp_path / "before")
    content = files(before)
    with pytest.raises(ArtifactError, match="is not empty"):
        load(before).save_pretrained(before)
    assert files(before) == content


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_nothing_is_left_of_an_unfinished_one(error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tiny.saved("llama", tmp_path / "before"))
    write = writing.write_safetensors

    def fails(files: Any, layouts: Any, *rest: Any) -> None:
        if "model.norm.weight" in layouts:
            raise error
        write(files, layouts, *rest)

    monkeypatch.setattr(writing, "write_safetensors", fails)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else ArtifactError):
        model.save_pretrained(tmp_path / "after", max_shard_size="30KB")
    assert [path.name for path in tmp_path.iterdir()] == ["before"]
