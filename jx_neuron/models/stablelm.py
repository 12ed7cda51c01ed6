"""StableLM (Bellagente et al., arXiv:2402.17834).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/stablelm/modeling_stablelm.py
"""

from dataclasses import dataclass

from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from jx_neuron.checkpoint.weights import W
from jx_neuron.models.llama_like import EXTRA_TENSORS, LlamaLikeModel, MultiHeadConfig
from jx_neuron.models.rows import attention, embedding, gated_mlp, layer_norm
from jx_neuron.nn.layers import LayerNorm
from jx_neuron.nn.rope import Rotation
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.nn.sublayers import Attention, GatedMLP


@dataclass(frozen=True)
class Config(MultiHeadConfig):
    """HF's StableLmConfig."""

    vocab_size: int = 50304
    hidden_size: int = 2560
    intermediate_size: int = 6912
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int | None = None  # HF's RoPE reads it, and its attention does not
    max_position_embeddings: int = 4096
    layer_norm_eps: float = 1e-5
    use_qkv_bias: bool = False
    qk_layernorm: bool = False
    use_parallel_residual: bool = False
    partial_rotary_factor: float = 0.25

    MODEL_TYPE = "stablelm"
    COMPLETE = True
    LAYERS_ALIKE = True
    HEADS_FILL_WIDTH = True


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, n, k, h = (cfg.sizes[c] for c in "dnkh")
        eps = cfg.layer_norm_eps
        self.input_layernorm = LayerNorm(d, eps)
        self.self_attn = Attention(
            cfg.sizes,
            bias=cfg.use_qkv_bias,
            out_bias=False,
            q_norm=LayerNorm((n, h), eps, bias=False) if cfg.qk_layernorm else None,
            k_norm=LayerNorm((k, h), eps, bias=False) if cfg.qk_layernorm else None,
            rngs=rngs,
        )
        self.post_attention_layernorm = None if cfg.use_parallel_residual else LayerNorm(d, eps)
        self.mlp = GatedMLP(cfg.sizes, cfg.hidden_act, bias=False, rngs=rngs)

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        h_btd = self.input_layernorm(x_btd)
        a_btd, state = self.self_attn(h_btd, state, at, by)
        x_btd = x_btd + a_btd
        if self.post_attention_layernorm is not None:
            h_btd = self.post_attention_layernorm(x_btd)
        return x_btd + self.mlp(h_btd), state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        norm = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
        super().__init__(cfg, (Block(cfg, rngs) for _ in range(cfg.layers)), rngs, norm=norm)


LAYER = "model.layers.{i}."
WEIGHTS = (
    embedding("model.embed_tokens"),
    *layer_norm(LAYER + "input_layernorm"),
    *attention(LAYER + "self_attn", out_bias=False),
    W(LAYER + "self_attn.q_layernorm.norms.{n}.weight", "layers.{i}.self_attn.q_norm.scale", "h -> n h", P("tp", None)),
    W(LAYER + "self_attn.k_layernorm.norms.{k}.weight", "layers.{i}.self_attn.k_norm.scale", "h -> k h", P("tp", None)),
    *layer_norm(LAYER + "post_attention_layernorm"),
    *gated_mlp(LAYER + "mlp", bias=False),
    *layer_norm("model.norm"),
    embedding("lm_head"),
)

IGNORE = EXTRA_TENSORS
