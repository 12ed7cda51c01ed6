"""Command R (Cohere, 2024): attention and MLP side by side after one norm, and scaled logits.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/cohere/modeling_cohere.py
"""

from dataclasses import dataclass
from typing import ClassVar

from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from jx_neuron.checkpoint.weights import W
from jx_neuron.models.llama_like import EXTRA_TENSORS, GroupedQueryConfig, LlamaLikeModel
from jx_neuron.models.rows import attention, embedding, gated_mlp, layer_norm
from jx_neuron.nn.attention import attend
from jx_neuron.nn.layers import ACT, LayerNorm, Linear, Linears
from jx_neuron.nn.rope import Rotation, rope_interleaved
from jx_neuron.nn.state import LayerState, Positions


@dataclass(frozen=True)
class Config(GroupedQueryConfig):
    """HF's CohereConfig."""

    vocab_size: int = 256000
    hidden_size: int = 8192
    intermediate_size: int = 22528
    num_hidden_layers: int = 40
    num_attention_heads: int = 64
    max_position_embeddings: int = 8192
    layer_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    rope_theta: float = 500000.0
    attention_bias: bool = False
    use_qk_norm: bool = False
    logit_scale: float = 0.0625

    MODEL_TYPE: ClassVar[str] = "cohere"
    COMPLETE: ClassVar[bool] = True
    LAYERS_ALIKE: ClassVar[bool] = True
    INERT: ClassVar[frozenset[str]] = frozenset({"attention_dropout"})


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, n, k, h, f = (cfg.sizes[c] for c in "dnkhf")
        self.input_layernorm = LayerNorm(d, cfg.layer_norm_eps, bias=False)
        qkv = dict(q_proj=(n, h), k_proj=(k, h), v_proj=(k, h))
        self.qkv = Linears((d,), qkv, bias=cfg.attention_bias, rngs=rngs)
        self.q_norm = LayerNorm((n, h), cfg.layer_norm_eps, bias=False) if cfg.use_qk_norm else None
        self.k_norm = LayerNorm((k, h), cfg.layer_norm_eps, bias=False) if cfg.use_qk_norm else None
        self.o_proj = Linear((n, h), (d,), bias=cfg.attention_bias, rngs=rngs)
        self.gate_up = Linears((d,), dict(gate_proj=(f,), up_proj=(f,)), bias=False, rngs=rngs)
        self.down_proj = Linear((f,), (d,), bias=False, rngs=rngs)
        self.act = ACT[cfg.hidden_act]

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        h_btd = self.input_layernorm(x_btd)
        q_btnh, k_btkh, v_btkh = self.qkv(h_btd)
        if self.q_norm is not None and self.k_norm is not None:
            q_btnh, k_btkh = self.q_norm(q_btnh), self.k_norm(k_btkh)
        a_btnh, state = attend(rope_interleaved(q_btnh, by), rope_interleaved(k_btkh, by), v_btkh, state, at)
        gate_btf, up_btf = self.gate_up(h_btd)
        return x_btd + self.o_proj(a_btnh) + self.down_proj(self.act(gate_btf) * up_btf), state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        norm = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps, bias=False)
        super().__init__(cfg, (Block(cfg, rngs) for _ in range(cfg.layers)), rngs, norm=norm)
        self.logit_scale = cfg.logit_scale

    def logits(self, x_btd: Array) -> Array:
        return super().logits(x_btd) * self.logit_scale


HF, OURS = "model.layers.{i}.", "layers.{i}."
WEIGHTS = (
    embedding("model.embed_tokens", "embed_tokens"),
    *layer_norm(HF + "input_layernorm", OURS + "input_layernorm", bias=False),
    *attention(HF + "self_attn.", OURS),
    W(HF + "self_attn.q_norm.weight", OURS + "q_norm.scale", "n h -> n h", P("tp", None)),
    W(HF + "self_attn.k_norm.weight", OURS + "k_norm.scale", "k h -> k h", P("tp", None)),
    *gated_mlp(HF + "mlp.", OURS, bias=False),
    *layer_norm("model.norm", "norm", bias=False),
    embedding("lm_head", "lm_head"),
)

IGNORE = EXTRA_TENSORS
