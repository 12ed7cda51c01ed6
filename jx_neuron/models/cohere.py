"""Command R (Cohere, 2024): attention and MLP side by side after one norm, and scaled logits.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/cohere/modeling_cohere.py
"""

from dataclasses import dataclass

from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from jx_neuron.checkpoint.weights import W
from jx_neuron.models.llama_like import EXTRA_TENSORS, GroupedQueryConfig, LlamaLikeModel
from jx_neuron.models.rows import attention, embedding, gated_mlp, layer_norm
from jx_neuron.nn.layers import LayerNorm
from jx_neuron.nn.rope import Rotation, rope_interleaved
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.nn.sublayers import Attention, GatedMLP


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

    MODEL_TYPE = "cohere"
    COMPLETE = True
    LAYERS_ALIKE = True


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, n, k, h = (cfg.sizes[c] for c in "dnkh")
        eps = cfg.layer_norm_eps
        self.input_layernorm = LayerNorm(d, eps, bias=False)
        self.self_attn = Attention(
            cfg.sizes,
            bias=cfg.attention_bias,
            q_norm=LayerNorm((n, h), eps, bias=False) if cfg.use_qk_norm else None,
            k_norm=LayerNorm((k, h), eps, bias=False) if cfg.use_qk_norm else None,
            rope=rope_interleaved,
            rngs=rngs,
        )
        self.mlp = GatedMLP(cfg.sizes, cfg.hidden_act, bias=False, rngs=rngs)

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        h_btd = self.input_layernorm(x_btd)
        a_btd, state = self.self_attn(h_btd, state, at, by)
        return x_btd + a_btd + self.mlp(h_btd), state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        norm = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps, bias=False)
        super().__init__(cfg, (Block(cfg, rngs) for _ in range(cfg.layers)), rngs, norm=norm)
        self.logit_scale = cfg.logit_scale

    def logits(self, x_btd: Array) -> Array:
        return super().logits(x_btd) * self.logit_scale


LAYER = "model.layers.{i}."
WEIGHTS = (
    embedding("model.embed_tokens"),
    *layer_norm(LAYER + "input_layernorm", bias=False),
    *attention(LAYER + "self_attn"),
    W(LAYER + "self_attn.q_norm.weight", "layers.{i}.self_attn.q_norm.scale", "n h -> n h", P("tp", None)),
    W(LAYER + "self_attn.k_norm.weight", "layers.{i}.self_attn.k_norm.scale", "k h -> k h", P("tp", None)),
    *gated_mlp(LAYER + "mlp", bias=False),
    *layer_norm("model.norm", bias=False),
    embedding("lm_head"),
)

IGNORE = EXTRA_TENSORS
