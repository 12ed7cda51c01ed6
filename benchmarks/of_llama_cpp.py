"""llama.cpp by llama-cpp-python's bindings, and the GGUF files that it reads."""

import atexit
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from task import THREADS, Engine, Task, UnsupportedError


def llama_cpp(task: Task, stored: str = "F32") -> Engine:
    """llama.cpp in a process of its own, since its OpenMP and torch's do not go together. Matrices are `stored` as that
    type, and the cache is float32."""
    import llama_cpp  # noqa: F401

    converted = task.folder / f"llama_cpp_{stored}.gguf"
    write_gguf(task.model, converted, stored)
    command = [sys.executable, __file__, converted, task.batch, task.length, task.model.config.vocab_size]
    with converted.with_suffix(".log").open("w") as log:
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        child = subprocess.Popen(list(map(str, command)), **pipes)
    atexit.register(child.terminate)

    def generate(ids_bt: np.ndarray, new: int) -> np.ndarray:
        print(json.dumps([ids_bt.tolist(), new]), file=child.stdin, flush=True)
        return np.array(json.loads(child.stdout.readline()))

    return generate


def serve(path: str, batch: int, length: int, vocabulary: int) -> None:
    """Answers on standard output what `llama_cpp` asks on standard input, until that ends."""
    import llama_cpp as lib

    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
    options = lib.llama_context_default_params()
    options.n_ctx, options.n_batch = batch * length, batch * length
    options.n_seq_max, options.n_threads, options.n_threads_batch = batch, THREADS, THREADS
    options.type_k = options.type_v = lib.GGML_TYPE_F32
    context = lib.llama_init_from_model(model, options)

    def step(tokens_bt: np.ndarray, start: int) -> np.ndarray:
        """The likeliest token after each row's, which begin at position `start`: [b, 1]."""
        b, t = tokens_bt.shape
        inputs = lib.llama_batch_init(b * t, 0, 1)
        inputs.n_tokens = b * t
        for i, token in enumerate(tokens_bt.ravel().tolist()):
            row, position = divmod(i, t)
            inputs.token[i], inputs.pos[i] = token, start + position
            inputs.n_seq_id[i], inputs.seq_id[i][0] = 1, row
            inputs.logits[i] = position == t - 1
        if lib.llama_decode(context, inputs):
            raise RuntimeError("llama.cpp computed no step")
        lib.llama_batch_free(inputs)
        last = (lib.llama_get_logits_ith(context, (row + 1) * t - 1) for row in range(b))
        return np.array([[np.ctypeslib.as_array(logits, (vocabulary,)).argmax()] for logits in last])

    for line in sys.stdin:
        rows, new = json.loads(line)
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        made = [step(np.array(rows), 0)]
        for n in range(1, new):
            made.append(step(made[-1], len(rows[0]) + n - 1))
        print(json.dumps(np.concatenate(made, 1).tolist()), flush=True)


def write_gguf(model: Any, path: Path, stored: str) -> None:
    """Tensors named and laid out as by https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py.

    Matrices are `stored` as that type, and the table of tokens as Q8_0 at least.
    """
    import gguf

    architectures = {"gpt2": gguf.MODEL_ARCH.GPT2, "llama": gguf.MODEL_ARCH.LLAMA}
    config = model.config
    if config.model_type not in architectures:
        raise UnsupportedError(f"it is converted for {' and '.join(architectures)} alone, not {config.model_type}")
    architecture = architectures[config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    heads = {}
    if architecture == gguf.MODEL_ARCH.LLAMA:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
            add(config.head_dim)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    else:
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([str(i) for i in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    writer.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, parameter in model.named_parameters():  # tied ones once
        module, _, kind = name.rpartition(".")
        array = parameter.detach().numpy()
        if kind == "weight" and isinstance(model.get_submodule(module), transformers.pytorch_utils.Conv1D):
            array = array.T
        if n := heads.get(module.rpartition(".")[2]):  # [head, half, pair, …] → [head, pair, half, …]
            array = array.reshape(n, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        gguf_name, array = names.get_name(name, (".weight", ".bias")), np.ascontiguousarray(array)
        if stored != "F32" and array.ndim == 2 and "position" not in gguf_name:
            kind = gguf.GGMLQuantizationType["Q8_0" if gguf_name.startswith("token") else stored]
            writer.add_tensor(gguf_name, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    path, *sizes = sys.argv[1:]
    serve(path, *map(int, sizes))
