"""The engines that ours is compared with, each a function of a task, on every core of the CPU."""

import json
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from of_llama_cpp import llama_cpp
from servers import vllm_server
from task import THREADS, Engine, Task, UnsupportedError

from jx_neuron.integrations.hf_generate import CACHE


def hf(task: Task, dtype: str = "float32") -> Engine:
    torch.set_num_threads(THREADS)
    model = task.model if dtype == "float32" else deepcopy(task.model).to(getattr(torch, dtype))

    def generate(ids_bt: np.ndarray, new: int) -> np.ndarray:
        ids = torch.from_numpy(ids_bt)
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return made[:, ids.shape[1] :].numpy()

    return generate


def ctranslate2(task: Task) -> Engine:
    from ctranslate2 import Generator
    from ctranslate2.converters import TransformersConverter

    converted = str(task.folder / "ctranslate2")
    TransformersConverter(str(task.folder)).convert(converted)
    generator = Generator(converted, compute_type="float32", intra_threads=THREADS)

    def generate(ids_bt: np.ndarray, new: int) -> np.ndarray:
        made = generator.generate_batch(
            [[str(i) for i in row] for row in ids_bt],
            max_length=new,
            min_length=new,
            sampling_topk=1,
            include_prompt_in_result=False,
            end_token=[],
        )
        return np.array([of.sequences_ids[0] for of in made])

    return generate


def openvino(task: Task, precision: str = "f32", codes: bool = False) -> Engine:
    """With `codes`, matrices are int8 with a scale an output channel, and activations what OpenVINO makes of them."""
    import openvino as ov

    settings = {
        "INFERENCE_NUM_THREADS": THREADS,
        "INFERENCE_PRECISION_HINT": precision,
        "KV_CACHE_PRECISION": precision,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = ov.Core().compile_model(_stateful(task.model, codes), "CPU", settings).create_infer_request()

    def generate(ids_bt: np.ndarray, new: int) -> np.ndarray:
        request.reset_state()
        b, t = ids_bt.shape
        tokens_bt, made = ids_bt, []
        for end in range(t, t + new):
            positions_t = np.arange(end - tokens_bt.shape[1], end)
            later_ts = np.arange(end) > positions_t[:, None]
            given = {
                "tokens": tokens_bt,
                "positions": np.tile(positions_t, (b, 1)),
                "mask": np.where(later_ts, np.finfo(np.float32).min, np.float32(0))[None, None],
                "rows": np.arange(b),
            }
            tokens_bt = request.infer(given, share_outputs=True)[0].argmax(-1)[:, None]
            made.append(tokens_bt)
        return np.concatenate(made, 1)

    return generate


class _Step(torch.nn.Module):
    """Logits [b, v] of the last position, and the caches [b, k, s, h] (key, value of each layer) with what is new.

    The mask [1, 1, t, s] is added to scores. Taking rows of a cache first is the form that OpenVINO knows a cache by.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        tokens_bt: torch.Tensor,
        positions_bt: torch.Tensor,
        mask_11ts: torch.Tensor,
        rows_b: torch.Tensor,
        *caches: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        past = transformers.DynamicCache(config=self.model.config)
        for layer, key, value in zip(past.layers, caches[::2], caches[1::2], strict=True):
            layer.lazy_initialization(key, value)
            layer.keys, layer.values = key.index_select(0, rows_b), value.index_select(0, rows_b)
        logits = self.model(
            input_ids=tokens_bt,
            position_ids=positions_bt,
            attention_mask=mask_11ts,
            logits_to_keep=1,
            **{CACHE: past},
        ).logits
        return logits[:, -1], *(cache for layer in past.layers for cache in (layer.keys, layer.values))


def _stateful(model: Any, codes: bool) -> Any:
    """OpenVINO's form of a model, its caches as state. optimum-intel, which would export it, wants transformers < 5.6.

    https://docs.openvino.ai/2026/openvino-workflow/running-inference/inference-request/stateful-models.html
    """
    import openvino as ov
    from openvino import opset13
    from openvino._offline_transformations import apply_make_stateful_transformation

    config = model.config
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    inputs = {
        "tokens": ([-1, -1], torch.ones(2, 3, dtype=torch.long)),
        "positions": ([-1, -1], torch.arange(3).tile(2, 1)),
        "mask": ([1, 1, -1, -1], torch.zeros(1, 1, 3, 5)),
        "rows": ([-1], torch.arange(2)),
    }
    caches = {f"past.{i}": f"present.{i}" for i in range(2 * config.num_hidden_layers)}
    inputs |= {name: ([-1, kv_heads, -1, head_dim], torch.zeros(2, kv_heads, 2, head_dim)) for name in caches}
    with torch.inference_mode():
        made = ov.convert_model(_Step(model), example_input=tuple(example for _, example in inputs.values()))
    for port, (name, (shape, _)) in zip(made.inputs, inputs.items(), strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_partial_shape(ov.PartialShape(shape))
    for port, name in zip(made.outputs[1:], caches.values(), strict=True):
        port.get_tensor().set_names({name})
    made.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(made, caches)
    batch = opset13.gather(opset13.shape_of(made.input("tokens")), opset13.constant([0]), opset13.constant(0))
    empty = opset13.concat([batch, opset13.constant([kv_heads, 0, head_dim])], 0)
    for node in made.get_ops():
        if node.get_type_name() == "ReadValue":
            node.set_arguments([opset13.broadcast(opset13.constant(np.float32(0)), empty)])
    if codes:
        _in_int8(made)
    made.validate_nodes_and_infer_types()
    return made


def _in_int8(made: Any) -> None:
    """Matrices as Constant(i8) → Convert → Multiply, the form that nncf.compress_weights gives and a CPU takes."""
    from openvino import opset13

    for node in made.get_ordered_ops():
        is_matrix = node.get_type_name() == "Constant" and len(node.shape) == 2 and min(node.shape) > 1
        users = node.output(0).get_target_inputs() if is_matrix else ()
        matmuls = [user.get_node() for user in users if user.get_node().get_type_name() == "MatMul"]
        if not matmuls:
            continue
        matrix, axis = node.data, 1 if matmuls[0].get_attributes()["transpose_b"] else 0
        scales = np.abs(matrix).max(axis, keepdims=True) / np.float32(127)
        codes = opset13.constant(np.rint(matrix / scales).astype(np.int8))
        widened = opset13.multiply(opset13.convert(codes, "f32"), opset13.constant(scales.astype(np.float32)))
        for user in users:
            user.replace_source_output(widened.output(0))


def onnxruntime_genai(task: Task) -> Engine:
    import onnxruntime_genai as og

    if task.model.config.model_type != "llama":
        raise UnsupportedError(f"its model builder knows no {task.model.config.model_type}")
    converted = task.folder / "onnxruntime_genai"
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "fp32", "-e", "cpu"]
    _run([*builder, "-i", task.folder, "-o", converted, "-c", task.folder / "cache"])
    config = og.Config(str(converted))
    session = {"intra_op_num_threads": THREADS}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    model = og.Model(config)

    def generate(ids_bt: np.ndarray, new: int) -> np.ndarray:
        b, t = ids_bt.shape
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(batch_size=b, do_sample=False, min_length=t + new, max_length=t + new)
        generator = og.Generator(model, parameters)
        generator.append_tokens(ids_bt.astype(np.int32))
        for _ in range(new):
            generator.generate_next_token()
        return np.array([generator.get_sequence(i)[t:] for i in range(b)])

    return generate


def vllm(task: Task, dtype: str = "float32") -> Engine:
    """vLLM over HTTP."""
    ask = vllm_server(task, dtype)

    def generate(ids_bt: np.ndarray, new: int) -> np.ndarray:
        asked = {
            "model": str(task.folder),
            "prompt": ids_bt.tolist(),
            "max_tokens": new,
            "ignore_eos": True,
            "temperature": 0,
            "return_token_ids": True,
        }
        choices = sorted(ask("v1/completions", asked)["choices"], key=lambda choice: choice["index"])
        return np.array([choice["token_ids"] for choice in choices])

    return generate


def _run(command: list[str | Path]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed: {done.stdout[-2000:]}")


PEERS: dict[str, Callable[[Task], Engine]] = {
    **{engine.__name__: engine for engine in (hf, ctranslate2, openvino, onnxruntime_genai, llama_cpp, vllm)},
    "hf_bf16": partial(hf, dtype="bfloat16"),
    "llama_cpp_q4_0": partial(llama_cpp, stored="Q4_0"),
    "llama_cpp_q8_0": partial(llama_cpp, stored="Q8_0"),
    "openvino_bf16": partial(openvino, precision="bf16"),
    "openvino_int8": partial(openvino, codes=True),
    "vllm_bf16": partial(vllm, dtype="bfloat16"),
}
"""In float32, or in what the name ends with."""
