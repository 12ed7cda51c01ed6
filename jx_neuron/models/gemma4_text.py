"""Gemma 4, its dense text model (Google DeepMind, 2026): per-layer inputs, wide heads without windows, shared keys.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/gemma4/modeling_gemma4.py
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from jx_neuron.checkpoint.hf_config import FULL
from jx_neuron.checkpoint.weights import W
from jx_neuron.errors import ConfigError
from jx_neuron.models import llama_like as like
from jx_neuron.models.llama_like import SLIDING, LlamaLikeConfig, LlamaLikeModel
from jx_neuron.models.rows import attention, embedding, gated_mlp, rms_norm
from jx_neuron.nn.attention import attend
from jx_neuron.nn.layers import ACT, Embedding, Linear, Linears, RMSNorm
from jx_neuron.nn.rope import Rotation, rope_half
from jx_neuron.nn.state import LayerState, Positions, State
from jx_neuron.util.arguments import shown

HEADS = {"head_dim": "h", "num_key_value_heads": "k"}  # what layers of a type may have of their own


@dataclass(frozen=True)
class Config(LlamaLikeConfig):
    """HF's Gemma4TextConfig."""

    vocab_size: int = 262144
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 30
    num_attention_heads: int = 8
    num_key_value_heads: int | None = 4
    head_dim: int | None = 256
    global_head_dim: int = 512
    num_global_key_value_heads: int | None = None
    per_layer_config: dict[str, Any] | None = None
    hidden_act: str = field(default="gelu_pytorch_tanh", metadata={"hf": "hidden_activation"})
    max_position_embeddings: int = 131072
    attention_bias: bool = False
    attention_k_eq_v: bool = False
    tie_word_embeddings: bool = True
    sliding_window: int = 512
    layer_types: list[str] | None = None
    num_kv_shared_layers: int = 0
    use_double_wide_mlp: bool = False
    final_logit_softcapping: float | None = None
    vocab_size_per_layer_input: int = 262144
    hidden_size_per_layer_input: int = field(default=256, metadata={"least": 0})

    MODEL_TYPE: ClassVar[str] = "gemma4_text"
    COMPLETE: ClassVar[bool] = True
    ROPE_BY_TYPE: ClassVar[bool] = True
    ROPE_USUAL: ClassVar[Mapping[str, Any]] = {
        SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
        FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
    }
    INERT: ClassVar[frozenset[str]] = frozenset({"attention_dropout"})
    ONLY: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **LlamaLikeConfig.ONLY,
        **{"enable_moe_block": (False,), "use_bidirectional_attention": (None, "vision")},
        **dict.fromkeys(("moe_intermediate_size", "num_experts", "top_k_experts"), (None,)),
    }

    def __post_init__(self) -> None:
        if not {*self.types} <= {*self.rope_fields}:
            raise ConfigError(f"gemma4_text: rope_parameters should have entries for {' and '.join({*self.types})}")
        if alone := {*self.types} - {*self.types[: self.own_state.count(True)]}:
            raise ConfigError(
                f"gemma4_text: num_kv_shared_layers={self.num_kv_shared_layers} leaves no {min(alone)} layer with keys "
                "and values for the others to share; lower it"
            )
        super().__post_init__()

    @property
    def types(self) -> list[str]:
        return [*like.layer_types(self, self.layer_types, like.full_every(6, self.layers))[:-1], FULL]

    @property
    def windows(self) -> list[int | None]:
        return like.layer_windows(self, self.types, self.sliding_window)

    @property
    def own_state(self) -> list[bool]:
        return [layer < self.layers - self.num_kv_shared_layers for layer in range(self.layers)]

    @cached_property
    def heads(self) -> dict[str, dict[str, int]]:
        """`HEADS` of each layer type: fields on the Hub, and layer by layer where HF has saved the config."""
        if self.per_layer_config is None:
            k = self.num_global_key_value_heads if self.attention_k_eq_v else None
            full = {"head_dim": self.global_head_dim, "num_key_value_heads": k or self.sizes["k"]}
            return {FULL: full, SLIDING: {}}
        entries = {layer.lstrip("0") or "0": entry for layer, entry in self.per_layer_config.items()}
        heads = {kind: entries.get(str(layer), {}) for layer, kind in enumerate(self.types)}
        same = {str(layer): heads[kind] for layer, kind in enumerate(self.types) if heads[kind]} == entries
        if not same or not all(type(x) is dict and x.keys() <= HEADS.keys() for x in heads.values()):
            raise ConfigError(
                f"gemma4_text: per_layer_config={shown(self.per_layer_config)} is not supported; legal are numbers of "
                f"layers, each with {' and '.join(HEADS)} as all other layers of its type"
            )
        return heads

    @property
    def sizes(self) -> dict[str, int]:
        p = self.hidden_size_per_layer_input or 1
        return super().sizes | dict(u=self.vocab_size_per_layer_input, p=p, q=p * self.layers, o=1)

    def sizes_of(self, layer: int | None) -> dict[str, int]:
        if layer is None:
            return self.sizes
        wide = 2 if self.use_double_wide_mlp and not self.own_state[layer] else 1
        own = {HEADS[name]: size for name, size in self.heads[self.types[layer]].items()}
        return self.sizes | own | dict(f=wide * self.intermediate_size)


class Block(nnx.Module):
    def __init__(self, cfg: Config, layer: int, rngs: nnx.Rngs):
        sizes, self.type, self.window = cfg.sizes_of(layer), cfg.types[layer], cfg.windows[layer]
        (d, n, k, h, f, p), eps, bias = (sizes[c] for c in "dnkhfp"), cfg.rms_norm_eps, cfg.attention_bias
        values = () if cfg.attention_k_eq_v and self.type == FULL else ("v_proj",)
        keys = dict.fromkeys(("k_proj", *values), (k, h)) if cfg.own_state[layer] else {}
        self.qkv, self.q_norm = Linears((d,), dict(q_proj=(n, h)) | keys, bias=bias, rngs=rngs), RMSNorm(h, eps)
        self.k_norm = RMSNorm(h, eps) if keys else None
        self.v_norm = RMSNorm(h, eps, affine=False) if keys else None
        self.o_proj = Linear((n, h), (d,), bias=bias, rngs=rngs)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(d, eps), RMSNorm(d, eps)
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = RMSNorm(d, eps), RMSNorm(d, eps)
        self.gate_up = Linears((d,), dict(gate_proj=(f,), up_proj=(f,)), bias=False, rngs=rngs)
        self.down_proj = Linear((f,), (d,), bias=False, rngs=rngs)
        self.layer_scalar, self.act = nnx.Param(jnp.ones((1,))), ACT[cfg.hidden_act]
        if cfg.hidden_size_per_layer_input:
            self.per_layer_input_gate = Linear((d,), (p,), bias=False, rngs=rngs)
            self.per_layer_projection = Linear((p,), (d,), bias=False, rngs=rngs)
            self.post_per_layer_input_norm = RMSNorm(d, eps)

    def __call__(
        self, x_btd: Array, state: LayerState, at: Positions, rotations: dict[str, Rotation], inputs_btlp: Array | None
    ) -> tuple[Array, LayerState]:
        (q_btnh, *kv), by, layer = self.qkv(self.input_layernorm(x_btd)), rotations[self.type], state.number
        q_btnh, k_btkh, v_btkh = rope_half(self.q_norm(q_btnh), by), None, None
        if self.k_norm and self.v_norm:
            k_btkh, v_btkh = rope_half(self.k_norm(kv[0]), by), self.v_norm(kv[-1])
        a_btnh, state = attend(q_btnh, k_btkh, v_btkh, state, at, 1.0, window=self.window)
        x_btd = x_btd + self.post_attention_layernorm(self.o_proj(a_btnh))
        gate_btf, up_btf = self.gate_up(self.pre_feedforward_layernorm(x_btd))
        x_btd = x_btd + self.post_feedforward_layernorm(self.down_proj(self.act(gate_btf) * up_btf))
        if inputs_btlp is not None:
            own_btp = self.act(self.per_layer_input_gate(x_btd)) * inputs_btlp[:, :, layer]
            x_btd = x_btd + self.post_per_layer_input_norm(self.per_layer_projection(own_btp))
        return x_btd * self.layer_scalar[...], state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        blocks = (Block(cfg, layer, rngs) for layer in range(cfg.layers))
        super().__init__(cfg, blocks, rngs, rope=cfg.ropes)
        self.soft_cap = cfg.final_logit_softcapping
        (d, u, p, q), self.p = (cfg.sizes[c] for c in "dupq"), cfg.hidden_size_per_layer_input
        self.scale = d**0.5
        if self.p:
            self.embed_tokens_per_layer = Embedding(u, q, rngs=rngs)
            self.per_layer_model_projection = Linear((d,), (q,), bias=False, rngs=rngs)
            self.per_layer_projection_norm = RMSNorm(p, cfg.rms_norm_eps)

    def __call__(self, tokens_bt: Array, state: State, at: Positions) -> tuple[Array, State]:
        x_btd = _scaled(self.embed_tokens(tokens_bt), self.scale)
        rotations = {kind: rope(at) for kind, rope in self.rope.items()}
        x_btd, state = self.layers(x_btd, state, at, rotations, self.inputs(tokens_bt, x_btd) if self.p else None)
        return self.norm(x_btd), state

    def logits(self, x_btd: Array) -> Array:
        logits_btv = super().logits(x_btd)
        return logits_btv if self.soft_cap is None else self.soft_cap * jnp.tanh(logits_btv / self.soft_cap)

    def inputs(self, tokens_bt: Array, x_btd: Array) -> Array:
        """What enters each layer beside the hidden states, [b, t, layers, p]: of the token, and of its embedding."""
        shape = (*tokens_bt.shape, -1, self.p)
        token_btlp = _scaled(self.embed_tokens_per_layer(tokens_bt), self.p**0.5).reshape(shape)
        context_btlp = (self.per_layer_model_projection(x_btd) / self.scale).reshape(shape)
        return (self.per_layer_projection_norm(context_btlp) + token_btlp) * 2**-0.5


def _scaled(x: Array, scale: float) -> Array:
    return x * jnp.asarray(scale, x.dtype)


HF, OURS = "model.layers.{i}.", "layers.{i}."
NORMS = "input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm"
WEIGHTS = (
    embedding("model.embed_tokens", "embed_tokens"),
    W("model.embed_tokens_per_layer.weight", "embed_tokens_per_layer.embedding", "u q -> u q", P("tp", None)),
    W("model.per_layer_model_projection.weight", "per_layer_model_projection.kernel", "q d -> d q"),
    rms_norm("model.per_layer_projection_norm", "per_layer_projection_norm", "p"),
    *attention(HF + "self_attn.", OURS),
    *(rms_norm(f"{HF}self_attn.{name}", f"{OURS}{name}", "h") for name in ("q_norm", "k_norm")),
    *(rms_norm(HF + name, OURS + name) for name in (*NORMS.split(), "post_per_layer_input_norm")),
    *gated_mlp(HF + "mlp.", OURS, bias=False),
    W(HF + "per_layer_input_gate.weight", OURS + "per_layer_input_gate.kernel", "p d -> d p"),
    W(HF + "per_layer_projection.weight", OURS + "per_layer_projection.kernel", "d p -> p d"),
    W(HF + "layer_scalar", OURS + "layer_scalar", "o -> o"),
    rms_norm("model.norm", "norm"),
    embedding("lm_head", "lm_head"),
)

# as HF does, keys and values of layers that share others'
IGNORE = (*like.EXTRA_TENSORS, r"layers\.\d+\.self_attn\.[kv]_(proj|norm)\..*")
