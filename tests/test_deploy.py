"""save() and load(): what comes back, and what is refused."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tokenizers
import transformers
from flax import nnx
from mutations import limits

from jx_neuron import LlamaForSampling, NeuronAutoModelForCausalLM, NeuronConfig, OPTForSampling, request_devices
from jx_neuron.artifact.manifest import UNSEALED
from jx_neuron.checkpoint.folder import load_config
from jx_neuron.errors import ArtifactError, CheckpointError, ConfigError, InputError
from jx_neuron.lowering.hlo import proto
from jx_neuron.models import gpt2
from jx_neuron.runtime.deployment import choose_backend, config_of

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
        ({"amp": "bf16"}, "saved for dtype=float32 and not bfloat16"),
        ({"batch_size": 3}, "saved for batch_size="),
        ({"prompt_batch_size": 1}, "saved for prompt_batch_size=None and not 1"),
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
    monkeypatch.setattr("jx_neuron.runtime.deployment.lower", None)
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


def test_what_is_laid_into_the_folder_is_not_believed(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "copy")
    (folder / "added_tokens.json").write_text('{"a c": 77}')
    (folder / "special_tokens_map.json").write_text('{"extra_special_tokens": ["a"]}')
    (folder / "chat_template.jinja").write_text("laid in")
    size = (folder / "config.json").stat().st_size
    (folder / "config.json").write_text('{"model_type": "llama", "eos_token_id": 1}'.ljust(size))
    model = OPTForSampling.from_pretrained(folder)
    assert model.tokenizer("a c")["input_ids"] == [1, 3]
    assert len(model.tokenizer) == 4
    assert model.tokenizer.chat_template is None
    assert model.tokenizer.name_or_path == str(folder)
    assert config_of(folder) == load_config(saved) == model.config


def test_a_save_killed_between_its_two_renames_is_found(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / ".opt.0123.old")
    folder.with_suffix(".lock").touch()
    model = OPTForSampling.from_pretrained(tmp_path / "opt")
    assert model.tokenizer("a c")["input_ids"] == [1, 3]
    assert list(tmp_path.iterdir()) == [tmp_path / "opt"]


def altered(source: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy whose manifest is changed, and has the hash that it should have."""
    shutil.copytree(source, folder)
    content = json.loads((folder / "manifest.json").read_bytes())
    change(content)
    text = json.dumps({**content, "sha256": UNSEALED}, indent=1) + "\n"
    (folder / "manifest.json").write_text(text.replace(UNSEALED, hashlib.sha256(text.encode()).hexdigest(), 1))
    return folder


def setting(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: manifest["settings"].update(fields)


def decode(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: change(next(p for p in manifest["programs"] if p["name"] == "decode-b1-s24-k64"))


def with_callback(folder: Path) -> None:
    """A program of the folder that calls to an address, its hash with it."""
    path = folder / "hlo/decode-b1-s24-k64.pb"
    module = proto.parse(path.read_bytes())
    call = next(i for i in proto.instructions(module) if i.opcode == "custom-call")
    call.custom_call_target, call.backend_config = "xla_python_cpu_callback", b"140000000000000"
    path.write_bytes(proto.serialize(module))


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no buckets": (setting(buckets={"context": [24]}), "buckets.tokens: Field required"),
    "empty buckets": (setting(buckets={"context": [], "tokens": []}), "does not ascend from 1 or more"),
    "descending buckets": (setting(buckets={"context": [24], "tokens": [24, 12]}), "does not ascend"),
    "prompts beyond the capacity": (setting(buckets={"context": [48], "tokens": [24]}), "longer than its sequences"),
    "buckets as text": (setting(buckets={"context": ["24"], "tokens": [24]}), "should be a valid integer"),
    "absurd buckets": (setting(buckets={"context": [24], "tokens": [24, 10**12]}), "beyond 2147483647"),
    "many buckets": (setting(buckets={"context": [1], "tokens": list(range(1, 10**5))}), "fewer than its buckets"),
    "a field too many": (setting(rope=1), "rope: Unexpected keyword argument"),
    "another batch": (setting(batch_sizes=[2]), "it lacks the program context24-b2-s24-k64"),
    "no batch": (setting(batch_sizes=[]), "does not ascend"),
    "a batch as text": (setting(batch_sizes=["1"]), "batch_sizes.0"),
    "a fraction of candidates": (setting(candidates=64.0), "candidates"),
    "more candidates than tokens": (setting(candidates=200), "200 candidates of 101 tokens"),
    "ids as text": (setting(generation={"eos_token_id": "7"}), "eos_token_id='7' is no token id"),
    "ids as fractions": (setting(generation={"eos_token_id": [7.0]}), r"eos_token_id=\[7.0\] is no token id"),
    "ids beyond int32": (setting(generation={"pad_token_id": 2**31}), "pad_token_id=2147483648 is no token id"),
    "several paddings": (setting(generation={"pad_token_id": [1]}), "is no token id"),
    "an unknown id": (setting(generation={"bos": 1}), "bos=1 is no token id"),
    "another dtype": (setting(amp="f64"), "dtype 'f64' is not supported"),
    "another cache": (setting(amp="bf16"), "its state has state.0.k float32.*, not 1 slots of 24 positions, bfloat16"),
    "no such target": (setting(target="trn9"), "unknown target 'trn9'"),
    "another vocabulary": (setting(vocab_size=99), "are not of 99 tokens"),
    "an absurd vocabulary": (setting(vocab_size=10**10), "vocab_size: .*less than or equal to 2147483647"),
    "another family": (setting(model_type="gpt2"), "its settings are for gpt2 on 2 cores"),
    "another degree": (setting(tp_degree=1), "its settings are for opt on 1 cores"),
    "an absurd degree": (setting(tp_degree=10**9), "tp_degree: .*less than or equal to 4096"),
    "prompts that do not divide": (setting(prompt_batch=3), "3 rows do not divide"),
    "all logits as text": (setting(all_logits="no"), "all_logits"),
    "nothing": (lambda m: m.update(settings={}), "model_type: Field required"),
    "an output fewer": (decode(lambda p: p["outputs"].pop()), "not a token, logits and its state"),
    "no outputs": (decode(lambda p: p.update(outputs=[])), "not a token, logits and its state"),
    "token as float": (decode(lambda p: p["outputs"][0].update(dtype="float32")), "its next token is"),
    "logits of other rows": (decode(lambda p: p["outputs"][1].update(shape=[2, 51])), "its logits are"),
    "an input fewer": (decode(lambda p: p["inputs"].pop()), "takes other arrays than the manifest lists"),
    "an input renamed": (decode(lambda p: p["inputs"][-2].update(name="x")), "it takes tokens_bt int32.*, not"),
    "kinds out of order": (decode(lambda p: p["inputs"].reverse()), "cannot be an alias"),
    "a state as parameter": (decode(lambda p: p["inputs"][-9].update(kind="param")), "not of the kinds param, state"),
    "absurd caches": (
        lambda m: [t.update(shape=[1, 2**20, 24, 2**20]) for p in m["programs"] for t in p["inputs"] + p["outputs"]
                   if t["kind"] == "state" and len(t["shape"]) == 4],
        "more numbers a position than the model has parameters",
    ),
    "absurd parameters": (
        lambda m: [p["inputs"][0].update(shape=[2**40, 2**40]) for p in m["programs"]],
        "has .* bytes, and the programs' parameters|takes other arrays",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHANGES)
def test_a_manifest_of_another_model_is_refused_though_its_hash_is_right(
    kind: str, saved: Path, tmp_path: Path
) -> None:
    change, said = CHANGES[kind]
    with limits(), pytest.raises(ArtifactError, match=said):
        OPTForSampling.from_pretrained(altered(saved, tmp_path / "copy", change))


def test_a_program_that_calls_to_an_address_is_refused(saved: Path, tmp_path: Path) -> None:
    name = "hlo/decode-b1-s24-k64.pb"
    folder = shutil.copytree(saved, tmp_path / "other")
    with_callback(folder)
    data = (folder / name).read_bytes()
    record = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    altered(saved, tmp_path / "copy", lambda manifest: manifest["files"].update({name: record}))
    shutil.copy(folder / name, tmp_path / "copy" / name)
    with pytest.raises(ArtifactError, match="calls 'xla_python_cpu_callback', which no step does"):
        OPTForSampling.from_pretrained(tmp_path / "copy")


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
    assert told["settings"]["buckets"] == {"context": [24], "tokens": [24]}
    assert told["settings"]["generation"]["eos_token_id"] == 7
    decode = next(p for p in told["programs"] if p["name"] == "decode-b1-s24-k64")
    kinds = [t["kind"] for t in decode["inputs"]]
    assert kinds == sorted(kinds, key=["param", "state", "input", "rank"].index)
    aliases = {t["name"]: decode["inputs"][t["alias"]]["name"] for t in decode["outputs"] if t["alias"] is not None}
    names = [*(f"state.{i}.{row}" for i in range(2) for row in "kv"), "state.token"]
    assert aliases == {name: name for name in names}
