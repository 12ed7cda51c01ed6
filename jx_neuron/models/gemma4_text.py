"""Gemma 4, its text model (Google DeepMind, 2026): inputs of each layer's own, wide heads, shared keys, and experts.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/gemma4/modeling_gemma4.py
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jx_neuron.checkpoint.weights import W
from jx_neuron.models.experts_beside import ExpertsBeside, ExpertsBesideConfig, experts_beside
from jx_neuron.models.llama_like import EXTRA_TENSORS, FULL, SLIDING, LlamaLikeConfig, LlamaLikeModel, full_every
from jx_neuron.models.per_layer import LayerInput, LayerInputs, PerLayerConfig, layer_inputs
from jx_neuron.models.rows import attention, embedding, gated_mlp, rms_norm
from jx_neuron.nn.layers import RMSNorm
from jx_neuron.nn.rope import Rotation
from jx_neuron.nn.state import LayerState, Positions, State
from jx_neuron.nn.sublayers import Attention, GatedMLP


@dataclass(frozen=True)
class Config(ExpertsBesideConfig, PerLayerConfig, LlamaLikeConfig):
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
    hidden_act: str = field(default="gelu_pytorch_tanh", metadata={"hf": "hidden_activation"})
    max_position_embeddings: int = 131072
    attention_bias: bool = False
    attention_k_eq_v: bool = False
    tie_word_embeddings: bool = True
    sliding_window: int | None = 512
    use_double_wide_mlp: bool = False
    final_logit_softcapping: float | None = None

    MODEL_TYPE = "gemma4_text"
    COMPLETE = True
    ROPE_BY_TYPE = True
    ROPE_USUAL: ClassVar[Mapping[str, Any]] = {
        SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
        FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
    }
    ONLY: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **LlamaLikeConfig.ONLY,
        "use_bidirectional_attention": (None, "vision"),
    }

    @property
    def usual_types(self) -> list[str]:
        return full_every(6, self.layers)

    @property
    def types(self) -> list[str]:
        return [*super().types[:-1], FULL]

    @property
    def usual_heads(self) -> Mapping[str, Mapping[str, int]]:
        k = self.num_global_key_value_heads if self.attention_k_eq_v else None
        return {FULL: dict(head_dim=self.global_head_dim, num_key_value_heads=k or self.sizes["k"])}

    def sizes_of(self, layer: int) -> dict[str, int]:
        wide = self.use_double_wide_mlp and not self.own_state[layer]
        return super().sizes_of(layer) | dict(f=self.intermediate_size * (1 + wide))


class Block(nnx.Module):
    def __init__(self, cfg: Config, layer: int, rngs: nnx.Rngs):
        self.type, sizes, eps, own = cfg.types[layer], cfg.sizes_of(layer), cfg.rms_norm_eps, cfg.own_state[layer]
        (d, h), k_eq_v = (sizes[c] for c in "dh"), cfg.attention_k_eq_v and self.type == FULL
        names = ("q_proj", "k_proj", "v_proj")[: 1 + own * (2 - k_eq_v)]
        norms: dict[str, Any] = dict(q_norm=RMSNorm(h, eps), v_norm=RMSNorm(h, eps, affine=False))
        norms |= dict(k_norm=RMSNorm(h, eps)) if own else {}
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(d, eps), RMSNorm(d, eps)
        self.self_attn = Attention(
            sizes, bias=cfg.attention_bias, projections=names, **norms, scale=1.0, window=cfg.windows[layer], rngs=rngs
        )
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = RMSNorm(d, eps), RMSNorm(d, eps)
        self.mlp = GatedMLP(sizes, cfg.hidden_act, bias=False, rngs=rngs)
        self.beside = ExpertsBeside(sizes, cfg.chosen, cfg.hidden_act, eps, rngs) if cfg.chosen else None
        self.input = LayerInput(sizes, cfg.hidden_act, eps, rngs) if cfg.hidden_size_per_layer_input else None
        self.layer_scalar = nnx.Param(jnp.ones((1,)))

    def __call__(
        self, x_btd: Array, state: LayerState, at: Positions, rotations: dict[str, Rotation], inputs_btlp: Array | None
    ) -> tuple[Array, LayerState]:
        a_btd, state = self.self_attn(self.input_layernorm(x_btd), state, at, rotations[self.type])
        x_btd = x_btd + self.post_attention_layernorm(a_btd)
        m_btd = self.mlp(self.pre_feedforward_layernorm(x_btd))
        m_btd = m_btd if self.beside is None else self.beside(x_btd, m_btd)
        x_btd = x_btd + self.post_feedforward_layernorm(m_btd)
        if self.input is not None and inputs_btlp is not None:
            x_btd = x_btd + self.input(x_btd, inputs_btlp[:, :, state.number])
        return x_btd * self.layer_scalar[...], state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        blocks = (Block(cfg, layer, rngs) for layer in range(cfg.layers))
        super().__init__(cfg, blocks, rngs, rope=cfg.ropes, soft_cap=cfg.final_logit_softcapping)
        self.inputs = LayerInputs(cfg.sizes, cfg.rms_norm_eps, rngs) if cfg.hidden_size_per_layer_input else None
        self.scale = cfg.hidden_size**0.5

    def __call__(self, tokens_bt: Array, state: State, at: Positions) -> tuple[Array, State]:
        x_btd = self.embed_tokens(tokens_bt)
        x_btd = x_btd * jnp.asarray(self.scale, x_btd.dtype)
        rotations = {kind: rope(at) for kind, rope in self.rope.items()}
        inputs_btlp = None if self.inputs is None else self.inputs(tokens_bt, x_btd)
        x_btd, state = self.layers(x_btd, state, at, rotations, inputs_btlp)
        return self.norm(x_btd), state


LAYER = "model.layers.{i}."
NORMS = "input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm".split()
WEIGHTS = (
    embedding("model.embed_tokens"),
    *(rms_norm(LAYER + name) for name in NORMS),
    *attention(LAYER + "self_attn"),
    *(rms_norm(f"{LAYER}self_attn.{name}", width="h") for name in ("q_norm", "k_norm")),
    *gated_mlp(LAYER + "mlp", bias=False),
    *experts_beside(LAYER),
    *layer_inputs("model.", LAYER),
    W(LAYER + "layer_scalar", "layers.{i}.layer_scalar", "one -> one"),
    rms_norm("model.norm"),
    embedding("lm_head"),
)

# as HF does, keys and values of layers that share others'
IGNORE = (*EXTRA_TENSORS, r"layers\.\d+\.self_attn\.[kv]_(proj|norm)\..*")
