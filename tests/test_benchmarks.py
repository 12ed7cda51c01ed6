"""The scripts of benchmarks/ end to end on tiny models, and that a decode step moves next to nothing it could spare."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
import torch
import transformers

from jx_neuron.checkpoint.folder import open_checkpoint
from jx_neuron.models.known import config_of

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
WITHIN = 1.05


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


lowered = module("lowered")


def raw(model: str) -> dict[str, Any]:
    return dict(lowered.CONFIGS[model] if model in lowered.CONFIGS else config_of(model))


@pytest.mark.few(3)
@pytest.mark.parametrize("tp", [1, 8, 32])
@pytest.mark.parametrize("model", ["gpt2-xl", "facebook/opt-13b", "EleutherAI/gpt-j-6B", "Llama-3-8B"])
def test_two_layers_decode_within_five_percent_of_the_least_bytes(model: str, tp: int) -> None:
    config = raw(model)
    config |= {key: 2 for key in ("n_layer", "num_hidden_layers") if key in config}
    for step in lowered.steps(model, config, tp, [1, 8], bucket=512, capacity=1024):
        assert (step.bucket, step.capacity) == (512, 1024)
        assert 1 <= step.ratio <= WITHIN
        assert step.read <= WITHIN * step.least_read
        assert step.written == step.least_written
        assert step.moved <= 0.01 * step.read


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 8, 32])
@pytest.mark.parametrize("model", lowered.MODELS)
def test_whole_models_decode_within_five_percent_of_the_least_bytes(model: str, tp: int) -> None:
    for step in lowered.steps(model, raw(model), tp, [1, 8], bucket=2048):
        assert 1 <= step.ratio <= WITHIN
        assert step.moved <= 0.01 * step.read


def test_lowered_says_what_each_core_reads(tmp_path: Path) -> None:
    config = tiny.CONFIGS["gpt2"]()
    config.save_pretrained(tmp_path)
    done = run("lowered.py", tmp_path, "--tp", 1, 4, "--batch", 3, "--bucket", 32, "--capacity", 64, "--json")
    assert done.returncode == 0, done.stderr
    one, four = json.loads(done.stdout)
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(config)
    weights = sum(p.numel() for name, p in model.named_parameters() if "wpe" not in name)
    looked_up = 3 * 2 * 48  # a row of each table
    entries = 2 * 2 * 3 * 48
    assert one["least_read"] == 2 * (weights + looked_up + 32 * entries + entries)
    assert one["least_written"] == 2 * entries + 3 * 4 * (tiny.VOCAB + 2)
    assert (one["tp_degree"], one["bucket"], one["capacity"], one["padding"]) == (1, 32, 64, 0)
    assert (one["collectives"], one["collective_bytes"]) == ({}, 0)
    assert four["collectives"] == {"all-reduce": 5, "all-gather": 2}
    assert four["collective_bytes"] == 2 * 5 * 3 * 48 + (4 + 4) * 3 * 4
    assert 0 < four["padding"] < 0.1
    assert all(1 <= step["ratio"] <= WITHIN for step in (one, four))


def test_experts_as_a_table() -> None:
    done = run("experts.py", "Qwen/Qwen3-30B-A3B", "--tp", 32, "--tokens", 512)
    assert done.returncode == 0, done.stderr
    *_, row = done.stdout.splitlines()
    name, tp, tokens, flops, *_, taken = row.strip("| ").split(" | ")
    assert (name, tp, tokens, taken) == ("Qwen3-30B-A3B", "32", "512", "every expert")
    assert int(flops.split(" / ")[0]) == round(2 * 3 * 2048 * 768 // 32 * 128 * 512 / 1e9)


def test_lowered_as_a_table() -> None:
    done = run("lowered.py", "gpt2", "--tp", 1, "--batch", 1, "--bucket", 128)
    assert done.returncode == 0, done.stderr
    header, _, row = ([cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines())
    cells = dict(zip(header, row, strict=True))
    assert (cells["model"], cells["tp"], cells["bucket"]) == ("gpt2", "1", "128")
    assert cells["over the least"] in ("0.00%", "0.01%")
    # 124M parameters but the position table, in bfloat16, and 12 layers of 2 · 128 · 768
    assert float(cells["MB read"]) == pytest.approx((2 * (124_439_808 - 1024 * 768 + 2 * 768) + 4_718_592) / 1e6, abs=1)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["xla", "host"])
def test_two_streams_in_turn_take_about_the_time_of_a_batch(backend: str) -> None:
    done = run("streams.py", "--backend", backend)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["backend"], found["positions"], len(found["ratios"])) == (backend, 256, 7)
    assert found["in_turn_over_batch"] < 1.4  # 2 where each takes steps of its own; the rest is noise


@pytest.mark.slow
def test_rounding_on_the_demo_model() -> None:
    done = run("rounding.py", "--positions", 128, "--prompts", 4)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["prompts"], found["positions"]) == (4, 128)
    differences = found["differences"]
    assert set(differences) == {"ours, hf", "ours, exact", "hf, exact", "hf, hf nudged", "hf, hf eager"}
    for each in differences.values():  # of logits around 10, which float32 holds to 1e-6
        assert 1e-6 < each["median"] <= each["largest"] < 3e-4
    assert differences["ours, exact"]["median"] < 1.5 * differences["hf, exact"]["median"]


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["experts.py", "gpt2"], "gpt2 has no experts; name a model that has"),
        (["experts.py", "--tokens", "0"], "--tp and --tokens are at least 1"),
        (["lowered.py", "gpt2", "--tp", "0"], "--tp, --batch, --bucket and --capacity are at least 1"),
        (["lowered.py", "nobody/nothing"], "nobody/nothing"),
        (["gpu.py", "bloom"], "no model is called bloom; there are gptj-6b, llama-3-8b, opt-13b"),
        (["gpu.py", "--tiny", "--platform", "cpu", "--new", "60"], "60 new tokens exceed --bucket 64"),
        (["gpu.py", "--tiny"], "JAX has no gpu here"),
    ],
    ids=["experts", "tokens", "degree", "checkpoint", "model", "bucket", "no-gpu"],
)
def test_bad_input_is_told(arguments: list[str], told: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("models", [["llama-3-8b"], ["gptj-6b", "opt-13b"]], ids=" ".join)
def test_gpu_on_tiny_models(models: list[str]) -> None:
    done = run("gpu.py", *models, "--tiny", "--platform", "cpu", "--batch", 1, 2, "--runs", 1, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["hf_left_out"] == "it is measured on a GPU alone"
    assert (found["tiny"], found["bucket"], found["dtype"], found["runs"]) == (True, 64, "bfloat16", 1)
    assert [(row["model"], row["batch"]) for row in found["rows"]] == [
        (model, batch) for model in models for batch in (1, 2)
    ]
    gpu = module("gpu")
    for row in found["rows"]:
        config = transformers.AutoConfig.for_model(**gpu.MODELS[row["model"]] | gpu.TINY[row["model"]])
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        looked_up = ("embed_positions",) if config.tie_word_embeddings else ("embed_tokens", "wte")
        weights = sum(p.numel() for name, p in model.named_parameters() if not any(t in name for t in looked_up))
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        assert row["bytes_per_step"] == 2 * (weights + 2 * 2 * row["batch"] * 64 * kv_heads * 16)
        per_step = row["read_bytes_per_second"] / row["bytes_per_step"]
        assert row["tokens_per_second"] == pytest.approx(row["batch"] * per_step)
        assert row["fraction_of_copy"] == pytest.approx(row["read_bytes_per_second"] / row["copied_bytes_per_second"])
        assert row["hf_tokens_per_second"] is None


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gptj-6b", "llama-3-8b", "opt-13b"])
def test_hf_compiled_with_a_static_cache_answers(model: str) -> None:
    gpu = module("gpu")
    options = gpu.argparse.Namespace(batch=[1], bucket=128, new=64, runs=1)
    (rate,) = gpu.hf_rates(gpu.MODELS[model] | gpu.TINY[model], "cpu", options)
    assert rate > 0


@pytest.mark.slow
def test_peers_tells_its_options() -> None:
    done = run("peers.py", "--help")
    assert done.returncode == 0, done.stderr
    assert "--batch" in done.stdout
    assert "--rounds" in done.stdout


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return module("peers")


def test_peers_that_are_missing_or_cannot_are_named(
    peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("openvino", "llama_cpp"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", ModuleType("onnxruntime_genai"))
    task = peers.Task(tiny.model("gptj"), tmp_path, 2, 16)
    assert list(peers.built(task, ["hf", "openvino", "onnxruntime_genai", "llama_cpp"])) == ["hf"]
    openvino, onnxruntime_genai, llama_cpp = capsys.readouterr().err.splitlines()
    assert openvino.startswith("openvino is skipped: ")
    assert onnxruntime_genai == "onnxruntime_genai is skipped: its model builder knows no gptj"
    assert llama_cpp.startswith("llama_cpp is skipped: ")


def test_a_peer_that_makes_other_tokens_is_not_measured(peers: ModuleType, tmp_path: Path) -> None:
    model = tiny.model("opt")
    hf = peers.PEERS["hf"](peers.Task(model, tmp_path, 2, 16))
    prompt = tiny.prompts(2, 5)
    assert peers.agreement(model, "hf", prompt, 8, hf) == 1
    made = hf(prompt, 8)
    with pytest.raises(SystemExit, match="another is not measured: of its tokens, HF would make"):
        peers.agreement(model, "another", prompt, 8, lambda ids_bt, new: (made + 1) % tiny.VOCAB)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "opt", "gptj", "llama"])
@pytest.mark.parametrize("peer", ["ctranslate2", "openvino", "onnxruntime_genai", "llama_cpp"])
def test_peers_make_the_tokens_of_hf(
    peers: ModuleType, peer: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.CONFIGS[name]()
    config.vocab_size = 104  # CTranslate2 has OPT's in multiples of 8
    if (name, peer) == ("llama", "onnxruntime_genai"):
        config.head_dim = 16  # and it head sizes; CTranslate2 takes none but the width over the heads
    monkeypatch.setitem(tiny.CONFIGS, name, lambda: config)
    model = tiny.model(name)
    peers.save(model, tmp_path)
    engines = peers.built(peers.Task(model, tmp_path, 3, 32), [peer])
    if not engines:
        pytest.skip(f"{peer} is not here, or has no {name}")
    for rows, length in ((1, 5), (3, 20)):
        assert peers.agreement(model, peer, tiny.prompts(rows, length), 8, engines[peer]) > 0.9


def test_the_file_for_llama_cpp_holds_a_llama(peers: ModuleType, tmp_path: Path) -> None:
    model = tiny.model("llama")
    path = tmp_path / "llama.gguf"
    sys.modules["of_llama_cpp"].write_gguf(model, path, "F32")
    read = open_checkpoint(path)
    for field in ("hidden_size", "intermediate_size", "num_key_value_heads", "head_dim", "vocab_size"):
        assert read.config[field] == getattr(model.config, field)
    assert read.config["rope_parameters"]["rope_theta"] == model.config.rope_parameters["rope_theta"]
    state = model.state_dict()
    assert set(read.names()) == set(state)
    for name, tensor in state.items():
        np.testing.assert_array_equal(read.read(name), tensor.numpy())


def test_the_file_for_llama_cpp_holds_a_gpt2(peers: ModuleType, tmp_path: Path) -> None:
    model = tiny.model("gpt2")
    path = tmp_path / "gpt2.gguf"
    sys.modules["of_llama_cpp"].write_gguf(model, path, "F32")
    read = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    assert len(read) == len(list(model.parameters()))
    block = model.transformer.h[1]
    np.testing.assert_array_equal(read["blk.1.attn_qkv.weight"], block.attn.c_attn.weight.detach().T)
    np.testing.assert_array_equal(read["blk.1.ffn_down.bias"], block.mlp.c_proj.bias.detach())
    np.testing.assert_array_equal(read["position_embd.weight"], model.transformer.wpe.weight.detach())
