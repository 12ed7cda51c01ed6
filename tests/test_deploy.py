"""save() and load(): what comes back, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import tokenizers
import transformers
from flax import nnx

from jx_neuron import LlamaForSampling, NeuronAutoModelForCausalLM, NeuronConfig, OPTForSampling, request_devices
from jx_neuron.checkpoint import load_config
from jx_neuron.deploy import Saved, choose_backend
from jx_neuron.errors import ArtifactError, CheckpointError, ConfigError, InputError
from jx_neuron.lowering.manifest import read_manifest, sealed
from jx_neuron.models import gpt2

IDS = tiny.prompts(1, 9)
SHAPE = dict(n_positions=24, context_length_estimate=24)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OPT that ends in token 7, with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("opt")
    hf = tiny.model("opt")
    hf.generation_config.eos_token_id = hf.config.eos_token_id = 7
    hf.save_pretrained(folder)
    words = {word: i for i, word in enumerate(["<unk>", "a", "b", "c"])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = OPTForSampling.from_pretrained(checkpoint, tp_degree=2, **SHAPE)
    return model.save(tmp_path_factory.mktemp("saved") / "opt", sharded_weights=True)


@pytest.fixture(scope="module")
def programs(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, saved from what was saved, without weights."""
    return OPTForSampling.from_pretrained(saved).save(tmp_path_factory.mktemp("saved") / "programs")


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    return tiny.greedy(tiny.model("opt"), IDS, 24)


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_what_was_saved_is_all_that_is_needed(saved: Path, expected: np.ndarray) -> None:
    model = OPTForSampling.from_pretrained(saved, backend="host")
    np.testing.assert_array_equal(model.sample(IDS, 24, top_k=1, eos_token_override=-1), expected)
    assert model.eos_token_ids == (7,)
    assert model.tokenizer("a c")["input_ids"] == [1, 3]
    assert (model.settings.tp_degree, model.settings.dtype, model.buckets.tokens) == (2, np.float32, (24,))
    ranks = {"weights/rank-00.safetensors", "weights/rank-01.safetensors"}
    assert ranks | {"config.json", "tokenizer.json"} < files(saved)


def test_xla_is_the_checkpoints_way_and_host_the_artifacts(saved: Path, checkpoint: Path) -> None:
    assert OPTForSampling.from_pretrained(saved).backend == "host"
    with pytest.raises(ArtifactError, match="no model code"):
        OPTForSampling.from_pretrained(saved, backend="xla")
    assert OPTForSampling.from_pretrained(checkpoint).backend == "xla"
    with pytest.raises(ConfigError, match="backend='cpu' does not exist; it may be one of xla, host, neuron"):
        choose_backend("cpu")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"tp_degree": 4}, "saved for tp_degree=2 and not 4"),
        ({"amp": "bf16"}, "saved for amp=float32 and not bfloat16"),
        ({"batch_size": 3}, "saved for batch_size="),
        ({"n_positions": 17}, "saved for n_positions="),
        ({"context_length_estimate": 3}, "saved for context_length_estimate="),
    ],
)
def test_a_saved_model_refuses_to_be_another(saved: Path, asked: dict[str, object], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        OPTForSampling.from_pretrained(saved, **asked)


def test_saving_again_changes_nothing(saved: Path, programs: Path, tmp_path: Path) -> None:
    again = OPTForSampling.from_pretrained(saved).save(tmp_path / "again", sharded_weights=True)
    assert files(again) == files(saved)
    for name in files(saved):
        assert (again / name).read_bytes() == (saved / name).read_bytes(), name
    assert files(programs) == {name for name in files(saved) if not name.startswith("weights/")}


def test_programs_without_weights_spare_the_lowering(
    programs: Path, checkpoint: Path, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ArtifactError, match="saved without weights; make the model from its checkpoint and load"):
        OPTForSampling.from_pretrained(programs)
    monkeypatch.setattr("jx_neuron.deploy.lower", None)
    model = OPTForSampling.from_pretrained(checkpoint, backend="host", tp_degree=2, **SHAPE).load(programs)
    np.testing.assert_array_equal(model.sample(IDS, 24, top_k=1, eos_token_override=-1), expected)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tp_degree": 1}, "tp_degree=2 and not 1"),
        ({"amp": "bf16"}, "amp='f32' and not 'bf16'"),
        ({"batch_size": 2}, r"batch_sizes=\(1,\) and not \(2,\)"),
        ({"n_positions": 32}, "buckets=.* and not"),
        ({"context_length_estimate": 12}, "buckets=.* and not"),
        ({"neuron_config": NeuronConfig(output_all_logits=True)}, "all_logits=False and not True"),
    ],
)
def test_programs_for_other_settings_are_refused(options: dict, said: str, programs: Path, checkpoint: Path) -> None:
    model = OPTForSampling.from_pretrained(checkpoint, **(dict(tp_degree=2, **SHAPE) | options))
    with pytest.raises(ArtifactError, match=f"was saved for {said}"):
        model.load(programs)


def test_programs_of_another_config_are_refused_and_what_does_not_bear_on_it_is_not(
    programs: Path, checkpoint: Path
) -> None:
    config = load_config(checkpoint)
    options = dict(tp_degree=2, **SHAPE)
    OPTForSampling.from_config(config | {"_name_or_path": "elsewhere", "eos_token_id": 3}, **options).load(programs)
    with pytest.raises(ArtifactError, match="saved for another config"):
        OPTForSampling.from_config(config | {"activation_function": "gelu"}, **options).load(programs)
    with pytest.raises(ConfigError, match="LlamaForSampling takes models of model_type 'llama'"):
        LlamaForSampling.from_config(config)


def test_a_config_alone_lowers_and_does_not_run(checkpoint: Path, programs: Path, tmp_path: Path) -> None:
    model = OPTForSampling.from_config(load_config(checkpoint), tp_degree=2, **SHAPE)
    folder = model.save(tmp_path / "programs")
    for name in ("hlo/decode-b1-s24-k64.pb", "hlo/context24-b1-s24-k64.pb"):
        assert (folder / name).read_bytes() == (programs / name).read_bytes()
    for use in (model.to_neuron, lambda: model.save(tmp_path / "whole", sharded_weights=True)):
        with pytest.raises(CheckpointError, match="made from a config alone; make it with from_pretrained"):
            use()
    assert not (tmp_path / "whole").exists()


def test_a_rank_that_is_missing_is_named(saved: Path, tmp_path: Path) -> None:
    folder = OPTForSampling.from_pretrained(saved).save(tmp_path / "copy", sharded_weights=True)
    (folder / "weights/rank-01.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"weights/rank-01\.safetensors is missing"):
        OPTForSampling.from_pretrained(folder)


def test_an_altered_tokenizer_is_refused(saved: Path, tmp_path: Path) -> None:
    folder = OPTForSampling.from_pretrained(saved).save(tmp_path / "copy", sharded_weights=True)
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b'"c": 3', b'"d": 3'))
    with pytest.raises(ArtifactError, match=r"tokenizer\.json was altered"):
        _ = OPTForSampling.from_pretrained(folder).tokenizer


def test_a_checkpoint_is_not_overwritten(checkpoint: Path) -> None:
    before = files(checkpoint)
    with pytest.raises(ArtifactError, match="holds no artifact to replace"):
        OPTForSampling.from_config(load_config(checkpoint), **SHAPE).save(checkpoint)
    assert files(checkpoint) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"buckets": {"context": [24]}}, "settings are not those of a model"),
        ({"rope": 1}, "settings are not those of a model"),
        ({"batch_sizes": [2]}, "it lacks the program context24-b2-s24-k64"),
    ],
)
def test_a_manifest_with_other_settings_is_refused(change: dict, said: str, programs: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(programs, tmp_path / "copy")
    manifest = read_manifest(folder)
    changed = manifest.model_copy(update={"neuron": {**manifest.neuron, **change}})
    (folder / "manifest.json").write_bytes(sealed(changed))
    with pytest.raises(ArtifactError, match=said):
        _ = Saved.open(folder).deployment


def test_a_module_with_parameters_in_hand_is_saved_too(tmp_path: Path) -> None:
    request_devices(8)
    config = gpt2.Config(n_embd=48, n_layer=1, n_head=4, vocab_size=tiny.VOCAB, n_positions=24)
    module = gpt2.Model(config, nnx.Rngs(3))
    model = NeuronAutoModelForCausalLM.from_module(module, config, weights=gpt2.WEIGHTS, tp_degree=2, **SHAPE)
    folder = model.save(tmp_path / "module", sharded_weights=True)
    alone = NeuronAutoModelForCausalLM.from_pretrained(folder, backend="host")
    np.testing.assert_array_equal(alone.sample(IDS, 24, top_k=1), model.sample(IDS, 24, top_k=1))
    with pytest.raises(ArtifactError, match="saved without a tokenizer; use token ids"):
        _ = alone.tokenizer
    with pytest.raises(InputError, match="without a checkpoint, and has no tokenizer"):
        _ = model.tokenizer
    again = NeuronAutoModelForCausalLM.from_module(module, config, weights=gpt2.WEIGHTS, tp_degree=2, **SHAPE)
    assert again.load(folder).lowered().programs.keys() == model.lowered().programs.keys()


def test_the_manifest_says_what_was_saved(saved: Path) -> None:
    told = json.loads((saved / "manifest.json").read_text())
    assert told["neuron"]["buckets"] == {"context": [24], "tokens": [24]}
    assert told["neuron"]["generation"]["eos_token_id"] == 7
    decode = next(p for p in told["programs"] if p["name"] == "decode-b1-s24-k64")
    kinds = [t["kind"] for t in decode["inputs"]]
    assert kinds == sorted(kinds, key=["param", "cache", "input", "rank"].index)
    aliases = {t["name"]: decode["inputs"][t["alias"]]["name"] for t in decode["outputs"] if t["alias"] is not None}
    assert aliases == {f"cache.{i}.{of}": f"cache.{i}.{of}" for i in range(2) for of in "kv"}
