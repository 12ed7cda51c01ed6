"""The architectures of GGUF files: what HF calls the model, its tensors and its config's fields.

What each differs in is as https://github.com/ggml-org/llama.cpp/tree/master/conversion writes it.
"""

from collections.abc import Mapping

from jx_neuron.checkpoint.gguf import fields
from jx_neuron.checkpoint.gguf.architecture import (
    PAIRS,
    Architecture,
    Fields,
    Names,
    by_key_head,
    decoder,
    llama_like,
    transposed,
)
from jx_neuron.checkpoint.gguf.keys import Header

WINDOWS = {"attention.sliding_window", "attention.sliding_window_pattern"}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ATTENTION = dict(zip(("attn_q", "attn_k", "attn_v"), QKV, strict=True)) | {"attn_output": "self_attn.o_proj"}
UP_DOWN = {"ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
GATED = {"ffn_gate": "mlp.gate_proj"} | UP_DOWN
FUSED_GATE = UP_DOWN | {"ffn_up": "mlp.gate_up_proj"}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
PRE_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
POST_NORMS = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
SANDWICH = POST_NORMS | {"attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm"}


GPT2_NAMES = decoder(
    "transformer.wte transformer.ln_f lm_head",
    "transformer.h",
    dict(
        attn_norm="ln_1",
        attn_qkv="attn.c_attn",
        attn_output="attn.c_proj",
        ffn_norm="ln_2",
        ffn_up="mlp.c_fc",
        ffn_down="mlp.c_proj",
    ),
) | {"position_embd": "transformer.wpe"}
DENSE = llama_like(**PRE_NORMS, **ATTENTION, **GATED)
MEGATRON = {
    "attn_qkv": "self_attention.query_key_value",
    "attn_output": "self_attention.dense",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
ATTENTION_BIAS = {"attention_bias": ("attn_q.bias",)}
BIASES = ATTENTION_BIAS | {"mlp_bias": ("ffn_up.bias",)}
LAYER_NORM: Fields = {"rms_epsilon": None, "epsilon": "layer_norm_eps"}
EPSILON: Fields = {"rms_epsilon": None, "epsilon": "layer_norm_epsilon"}
ALL_HEADS: Fields = {"kv_heads": None, "key_length": None}  # as many key heads as query heads
GPT2: Fields = {
    **EPSILON,
    **ALL_HEADS,
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "block_count": "n_layer",
    "heads": "n_head",
    "feed_forward_length": "n_inner",
}


def falcon_names(header: Header) -> Names:
    two = header.has("attn_norm_2.weight")
    norms = {"attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"} if two else {"attn_norm": "input_layernorm"}
    return decoder("transformer.word_embeddings transformer.ln_f lm_head", "transformer.h", norms | MEGATRON)


ARCHITECTURES: Mapping[str, Architecture] = {
    "apertus": Architecture(
        model_type="apertus",
        names=llama_like(
            attn_norm="attention_layernorm", ffn_norm="feedforward_layernorm", **ATTENTION, **HEAD_NORMS, **UP_DOWN
        ),
        flags=ATTENTION_BIAS,
        lists={
            "xielu.alpha_p": ("model.layers.{i}.mlp.act_fn.alpha_p", (1,)),
            "xielu.alpha_n": ("model.layers.{i}.mlp.act_fn.alpha_n", (1,)),
            "xielu.beta": ("model.layers.{i}.mlp.act_fn.beta", ()),
            "xielu.eps": ("model.layers.{i}.mlp.act_fn.eps", ()),
        },
    ),
    "arcee": Architecture(
        model_type="arcee", names=llama_like(**PRE_NORMS, **ATTENTION, **UP_DOWN), flags=BIASES, edits=PAIRS
    ),
    "bloom": Architecture(
        model_type="bloom",
        names=decoder("transformer.word_embeddings transformer.ln_f lm_head", "transformer.h", PRE_NORMS | MEGATRON)
        | {"token_embd_norm": "transformer.word_embeddings_layernorm"},
        fields=EPSILON
        | ALL_HEADS
        | {"context_length": "seq_length", "block_count": "n_layer", "heads": "n_head", "feed_forward_length": None},
        edits={"attn_qkv": by_key_head},
        rope=None,
    ),
    "chatglm": Architecture(
        model_type="glm",
        names=llama_like(attn_qkv=QKV, **PRE_NORMS, **ATTENTION, **FUSED_GATE),
        flags={"attention_bias": ("attn_q.bias", "attn_qkv.bias")},
        partial=True,
    ),
    "cohere2": Architecture(
        model_type="cohere2",
        names=llama_like(attn_norm="input_layernorm", **ATTENTION, **GATED),
        fields=LAYER_NORM,
        numbers={"logit_scale": "logit_scale"},
        flags=ATTENTION_BIAS,
        reads=WINDOWS,
        more=fields.windowed(4),
    ),
    "command-r": Architecture(
        model_type="cohere",
        names=llama_like(attn_norm="input_layernorm", **ATTENTION, **HEAD_NORMS, **GATED),
        fields=LAYER_NORM,
        numbers={"logit_scale": "logit_scale"},
        flags=ATTENTION_BIAS | {"use_qk_norm": ("attn_q_norm.weight",)},
    ),
    "ernie4_5": Architecture(model_type="ernie4_5", names=DENSE, flags={"use_bias": ("attn_q.bias",)}),
    "exaone4": Architecture(
        model_type="exaone4",
        names=llama_like(**POST_NORMS, **ATTENTION, **HEAD_NORMS, **GATED),
        reads=WINDOWS,
        more=fields.windowed(4),
    ),
    "falcon": Architecture(
        model_type="falcon",
        names=falcon_names,
        fields=EPSILON | {"kv_heads": "num_kv_heads", "key_length": None, "feed_forward_length": "ffn_hidden_size"},
        flags={"bias": ("attn_qkv.bias",)},
        edits={"attn_qkv": by_key_head},
        more=fields.falcon,
        legal={"tensor_data_layout": ("jploski",)},
    ),
    "gemma": Architecture(model_type="gemma", names=DENSE, flags=ATTENTION_BIAS, one_added=True, in_order=True),
    "gemma2": Architecture(
        model_type="gemma2",
        names=llama_like(**SANDWICH, **ATTENTION, **GATED),
        numbers={name: name for name in ("attn_logit_softcapping", "final_logit_softcapping")},
        flags=ATTENTION_BIAS,
        one_added=True,
        in_order=True,
        reads=WINDOWS,
        more=lambda header: fields.windowed(2)(header) | fields.query_scalar(header, layers=46),
    ),
    "gemma3": Architecture(
        model_type="gemma3_text",
        names=llama_like(**SANDWICH, **ATTENTION, **HEAD_NORMS, **GATED),
        numbers={"final_logit_softcapping": "final_logit_softcapping"},
        flags=ATTENTION_BIAS,
        one_added=True,
        in_order=True,
        rope=lambda header: fields.full_alone(header, 10000.0),
        reads=WINDOWS | {"rope.freq_base_swa"},
        more=lambda header: fields.windowed(6)(header) | fields.query_scalar(header, layers=62),
    ),
    "gemma4": Architecture(
        model_type="gemma4_text",
        names=llama_like(
            inp_gate="per_layer_input_gate",
            proj="per_layer_projection",
            post_norm="post_per_layer_input_norm",
            **SANDWICH,
            **ATTENTION,
            **HEAD_NORMS,
            **GATED,
        )
        | {
            "blk.{i}.layer_output_scale.weight": "model.layers.{i}.layer_scalar",
            "per_layer_token_embd": "model.embed_tokens_per_layer",
            "per_layer_model_proj": "model.per_layer_model_projection",
            "per_layer_proj_norm": "model.per_layer_projection_norm",
        },
        fields={"key_length": "global_head_dim"},
        numbers={
            "attention.key_length_swa": "head_dim",
            "attention.shared_kv_layers": "num_kv_shared_layers",
            "embedding_length_per_layer_input": "hidden_size_per_layer_input",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        flags=ATTENTION_BIAS,
        rope=fields.proportional,
        several=fields.GEMMA4_SEVERAL,
        reads=WINDOWS
        | {"rope.freq_base_swa", "rope.dimension_count_swa", "attention.key_length_swa", "attention.value_length_swa"},
        more=fields.gemma4,
    ),
    "glm4": Architecture(
        model_type="glm4",
        names=llama_like(
            post_attention_norm="post_self_attn_layernorm",
            post_ffw_norm="post_mlp_layernorm",
            **PRE_NORMS,
            **ATTENTION,
            **FUSED_GATE,
        ),
        flags=ATTENTION_BIAS,
        partial=True,
    ),
    "gpt2": Architecture(
        model_type="gpt2",
        names=GPT2_NAMES,
        fields=GPT2,
        edits=dict.fromkeys(("attn_qkv", "attn_output", "ffn_up", "ffn_down"), transposed),
        rope=None,
    ),
    "gptj": Architecture(
        model_type="gptj",
        names=decoder(
            "transformer.wte transformer.ln_f lm_head",
            "transformer.h",
            dict(
                attn_norm="ln_1",
                attn_q="attn.q_proj",
                attn_k="attn.k_proj",
                attn_v="attn.v_proj",
                attn_output="attn.out_proj",
                ffn_up="mlp.fc_in",
                ffn_down="mlp.fc_out",
            ),
        ),
        fields=GPT2 | {"rotated": "rotary_dim"},
        rope=None,
    ),
    "gptneox": Architecture(
        model_type="gpt_neox",
        names=decoder(
            "gpt_neox.embed_in gpt_neox.final_layer_norm embed_out",
            "gpt_neox.layers",
            PRE_NORMS
            | dict(
                attn_qkv="attention.query_key_value",
                attn_output="attention.dense",
                ffn_up="mlp.dense_h_to_4h",
                ffn_down="mlp.dense_4h_to_h",
            ),
        ),
        fields=LAYER_NORM | ALL_HEADS,
        numbers={"use_parallel_residual": "use_parallel_residual"},
        flags={"attention_bias": ("attn_qkv.bias",)},
        edits={"attn_qkv": by_key_head},
        partial=True,
    ),
    "granite": Architecture(
        model_type="granite",
        names=DENSE,
        numbers={
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "logit_scale": "logits_scaling",
            "residual_scale": "residual_multiplier",
        },
        flags=BIASES,
        edits=PAIRS,
        more=lambda header: {"attention_multiplier": header.fields.get("attention.scale", header.head_dim**-0.5)},
    ),
    "hunyuan-dense": Architecture(
        model_type="hunyuan_v1_dense",
        names=DENSE | llama_like(attn_q_norm="self_attn.query_layernorm", attn_k_norm="self_attn.key_layernorm"),
        flags=ATTENTION_BIAS,
    ),
    "llama": Architecture(model_type="llama", names=DENSE, flags=BIASES, edits=PAIRS),
    "mistral3": Architecture(
        model_type="ministral3",
        names=DENSE,
        edits=PAIRS,
        rope=fields.tempered,
        more=fields.mistral3,
        reads={fields.TEMPERATURE},
    ),
    "mpt": Architecture(
        model_type="mpt",
        names=decoder(
            "transformer.wte transformer.norm_f lm_head",
            "transformer.blocks",
            dict(
                attn_norm="norm_1",
                attn_qkv="attn.Wqkv",
                attn_output="attn.out_proj",
                ffn_norm="norm_2",
                ffn_up="ffn.up_proj",
                ffn_down="ffn.down_proj",
            ),
        ),
        fields=EPSILON
        | ALL_HEADS
        | {
            "context_length": "max_seq_len",
            "embedding_length": "d_model",
            "block_count": "n_layers",
            "heads": "n_heads",
            "feed_forward_length": None,
        },
        rope=None,
        more=lambda header: {"attn_config": {"clip_qkv": header.fields.get("attention.clamp_kqv")}},
        reads={"attention.clamp_kqv"},
        legal={"attention.max_alibi_bias": (8.0,)},
    ),
    "nemotron": Architecture(
        model_type="nemotron",
        names=llama_like(**PRE_NORMS, **ATTENTION, **UP_DOWN),
        fields={"rms_epsilon": None, "epsilon": "norm_eps"},
        flags=BIASES,
        one_added=True,
        partial=True,
    ),
    "olmo": Architecture(
        model_type="olmo",
        names=llama_like(**ATTENTION, **GATED),
        fields={"rms_epsilon": None},
        numbers={"attention.clamp_kqv": "clip_qkv"},
        edits=PAIRS,
        legal={"attention.layer_norm_epsilon": (1e-5,)},
    ),
    "olmo2": Architecture(
        model_type="olmo2",
        names=llama_like(**POST_NORMS, **ATTENTION, **HEAD_NORMS, **GATED),
        flags=ATTENTION_BIAS,
        rope=lambda header: fields.full_alone(header, header.keys.rope_theta) if header.windows.size else header.rope(),
        reads=WINDOWS | {"rope.freq_base_swa"},
        more=lambda header: {"model_type": "olmo3", **fields.windowed(4)(header)} if header.windows.size else {},
    ),
    "phi2": Architecture(
        model_type="phi",
        names=decoder(
            "model.embed_tokens model.final_layernorm lm_head",
            "model.layers",
            (ATTENTION | {"attn_output": "self_attn.dense"})
            | dict(attn_norm="input_layernorm", attn_qkv=QKV, ffn_up="mlp.fc1", ffn_down="mlp.fc2"),
        ),
        fields=LAYER_NORM | {"key_length": None},
        partial=True,
    ),
    "phi3": Architecture(
        model_type="phi3",
        names=llama_like(attn_qkv="self_attn.qkv_proj", attn_output="self_attn.o_proj", **PRE_NORMS, **FUSED_GATE),
        partial=True,
        more=fields.phi3,
        reads={"attention.sliding_window"},
    ),
    "qwen2": Architecture(model_type="qwen2", names=DENSE),
    "qwen3": Architecture(model_type="qwen3", names=DENSE | llama_like(**HEAD_NORMS), flags=ATTENTION_BIAS),
    "seed_oss": Architecture(
        model_type="seed_oss",
        names=llama_like(
            attn_norm="input_layernorm", post_attention_norm="post_attention_layernorm", **ATTENTION, **GATED
        ),
        flags=BIASES | {"attention_out_bias": ("attn_output.bias",)},
    ),
    "smollm3": Architecture(model_type="smollm3", names=DENSE, flags=BIASES, edits=PAIRS),
    "stablelm": Architecture(
        model_type="stablelm",
        names=DENSE
        | llama_like(attn_q_norm="self_attn.q_layernorm.norms.{r}", attn_k_norm="self_attn.k_layernorm.norms.{r}"),
        fields=LAYER_NORM | {"key_length": None},
        flags={"use_qkv_bias": ("attn_q.bias",), "qk_layernorm": ("attn_q_norm.weight",)},
        partial=True,
        more=lambda header: {"use_parallel_residual": not header.has("ffn_norm.weight")},
        legal={"use_parallel_residual": (True, False)},
    ),
    "starcoder": Architecture(
        model_type="gpt_bigcode",
        names=GPT2_NAMES,
        fields=GPT2,
        rope=None,
        legal={"attention.head_count_kv": (1,)},
    ),
    "starcoder2": Architecture(
        model_type="starcoder2",
        names=llama_like(ffn_up="mlp.c_fc", ffn_down="mlp.c_proj", **PRE_NORMS, **ATTENTION),
        fields={"rms_epsilon": None, "epsilon": "norm_epsilon"},
        flags={"use_bias": ("attn_q.bias",)},
    ),
}
"""By general.architecture."""
