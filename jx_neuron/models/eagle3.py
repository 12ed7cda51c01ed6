"""EAGLE-3 heads (Li et al., arXiv:2503.01840) of the form that is published for Llama and Qwen3.

https://github.com/SafeAILab/EAGLE/blob/main/eagle/model/cnets.py
https://github.com/vllm-project/vllm/blob/main/vllm/model_executor/models/llama_eagle3.py

A head is one decoder layer. Its inputs at a position are the target's features there and the token that follows. Its
sizes besides those of Llama: c both inputs of attention, e a feature, u the target's vocabulary; v is the head's own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from jx_neuron.checkpoint.weights import W
from jx_neuron.errors import ConfigError
from jx_neuron.models.llama_like import LlamaLikeConfig
from jx_neuron.models.rows import attention, embedding, gated_mlp, rms_norm
from jx_neuron.nn.layers import Embedding, Layers, Linear, RMSNorm
from jx_neuron.nn.rope import Rotation
from jx_neuron.nn.sharding import AXIS
from jx_neuron.nn.state import LayerState, Positions, State
from jx_neuron.nn.sublayers import Attention, GatedMLP
from jx_neuron.util.arguments import shown

ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM")
TAPS = 3
"""Layers of the target that a feature is made of."""

LAYER_IDS = "eagle_aux_hidden_state_layer_ids"


@dataclass(frozen=True)
class Config(LlamaLikeConfig):
    """The fields of published heads: Llama's, and their own.

    norm_before_residual: whether the residual is the normalized feature.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 1
    num_attention_heads: int = 32
    attention_bias: bool = False
    mlp_bias: bool = False
    draft_vocab_size: int | None = None
    target_hidden_size: int | None = None
    norm_before_residual: bool = False
    eagle_config: dict[str, Any] | None = None
    eagle_aux_hidden_state_layer_ids: list[int] | None = None

    MODEL_TYPE = "eagle3"
    COMPLETE = True
    # pretraining_tp: the same sums, in as many parts
    INERT = frozenset("is_llama_config max_window_layers pretraining_tp target_model_type unsloth_version".split())
    ONLY: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "bias": (None, False),
        "logit_scale": (None, 1),
        "norm_before_fc": (None, False),
        "norm_output": (None, False),
        "parallel_drafting": (None, False),
        "qkv_bias": (None, False),
        "tie_word_embeddings": (False,),
        "use_sliding_window": (None, False),
    }

    def __post_init__(self) -> None:
        if self.num_hidden_layers != 1:
            raise ConfigError(f"{self.MODEL_TYPE}: num_hidden_layers={self.num_hidden_layers}; a head has 1")
        if self.tie_word_embeddings:
            raise ConfigError(f"{self.MODEL_TYPE}: tie_word_embeddings=True is not supported, only False")
        if self.eagle_config and self.eagle_config.get("use_aux_hidden_state", True) is not True:
            raise ConfigError(
                f"{self.MODEL_TYPE}: eagle_config.use_aux_hidden_state may be true alone: a head without it is of "
                "another form than EAGLE-3"
            )
        super().__post_init__()

    @property
    def sizes(self) -> dict[str, int]:
        d, u = self.hidden_size, self.vocab_size
        return {**super().sizes, "c": 2 * d, "e": TAPS * d, "u": u, "v": self.draft_vocab_size or u}

    def taps(self, layers: int) -> tuple[int, ...]:
        """The layers, of a target that has `layers`, whose inputs a feature is made of.

        `eagle_aux_hidden_state_layer_ids` counts those layers, as vLLM reads it; within `eagle_config` it counts the
        layers before, as SGLang reads it.

        Raises ConfigError for others than three layers of the target.
        """
        within = (self.eagle_config or {}).get(LAYER_IDS)
        ids: Any = self.eagle_aux_hidden_state_layer_ids
        if ids is None and within is not None:
            ids = [one + 1 if type(one) is int else one for one in within] if isinstance(within, list) else within
        if ids is None:
            ids = [2, layers // 2, layers - 3]
        if not isinstance(ids, list) or len(ids) != TAPS or not all(type(i) is int and 0 <= i < layers for i in ids):
            raise ConfigError(
                f"{self.MODEL_TYPE}: the head takes what enters the layers {shown(ids)}, and a target of {layers} "
                f"layers has 0 to {layers - 1}; {LAYER_IDS} should be {TAPS} of these"
            )
        return tuple(ids)


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, eps = cfg.hidden_size, cfg.rms_norm_eps
        self.input_layernorm, self.hidden_norm = RMSNorm(d, eps), RMSNorm(d, eps)
        self.self_attn = Attention(cfg.sizes, inputs=2 * d, bias=cfg.attention_bias, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(d, eps)
        self.mlp = GatedMLP(cfg.sizes, cfg.hidden_act, bias=cfg.mlp_bias, rngs=rngs)
        self.norm_before_residual = cfg.norm_before_residual

    def __call__(
        self, x_btd: Array, state: LayerState, at: Positions, by: Rotation, token_btd: Array
    ) -> tuple[Array, LayerState]:
        normed_btd = self.hidden_norm(x_btd)
        x_btd = normed_btd if self.norm_before_residual else x_btd
        both_btc = jnp.concatenate([self.input_layernorm(token_btd), normed_btd], axis=-1)
        a_btd, state = self.self_attn(both_btc, state, at, by)
        x_btd = x_btd + a_btd
        return x_btd + self.mlp(self.post_attention_layernorm(x_btd)), state


class Model(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, e, u, v = (cfg.sizes[c] for c in "deuv")
        self.embed_tokens = Embedding(u, d, rngs=rngs)
        self.fc = Linear((e,), (d,), bias=False, rngs=rngs)
        self.layers = Layers([Block(cfg, rngs)])
        self.norm = RMSNorm(d, cfg.rms_norm_eps)
        self.lm_head = Embedding(v, d, rngs=rngs)
        self.d2t = nnx.Param(jnp.zeros((v,)))
        self.rope = cfg.rope

    def __call__(self, tokens_bt: Array, x_btd: Array, state: State, at: Positions) -> tuple[Array, State]:
        """The head's hidden states, from fused features or its own hidden states, and the tokens behind."""
        return self.layers(x_btd, state, at, self.rope(at), self.embed_tokens(tokens_bt))

    def fused(self, features_bte: Array) -> Array:
        """What the target's features come to, [b, t, d]."""
        return self.fc(features_bte)

    def logits(self, x_btd: Array) -> Array:
        """Logits [b, t, v] of hidden states."""
        return self.lm_head.attend(self.norm(x_btd))

    def of_target(self, token_b: Array) -> Array:
        """Tokens of the target's vocabulary, int32; negative ones stay."""
        offset_b = self.d2t[...].at[token_b].get(mode="clip").astype(jnp.int32)
        return jnp.where(token_b < 0, token_b, token_b + offset_b)


LAYER = "midlayer."
WEIGHTS = (
    W("embed_tokens.weight", "embed_tokens.embedding", "u d -> u d", P(AXIS, None)),
    W("fc.weight", "fc.kernel", "d e -> e d"),
    rms_norm(LAYER + "input_layernorm", "layers.{i}.input_layernorm"),
    rms_norm(LAYER + "hidden_norm", "layers.{i}.hidden_norm"),
    *attention(LAYER + "self_attn", "layers.{i}.self_attn", inputs="c"),
    rms_norm(LAYER + "post_attention_layernorm", "layers.{i}.post_attention_layernorm"),
    *gated_mlp(LAYER + "mlp", "layers.{i}.mlp"),
    rms_norm("norm"),
    embedding("lm_head"),
    W("d2t", "d2t", "v -> v", exact=True),
)

IGNORE = ("t2d", r"(midlayer\.self_attn\.)?rotary_emb\.inv_freq")
