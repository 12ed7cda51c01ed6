"""GPT-NeoX (Black et al., arXiv:2204.06745), and Pythia (Biderman et al., arXiv:2304.01373).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/gpt_neox/modeling_gpt_neox.py
"""

from dataclasses import dataclass, field

from flax import nnx
from jax import Array

from jx_neuron.checkpoint.weights import Copy
from jx_neuron.models.llama_like import LlamaLikeModel, MultiHeadConfig
from jx_neuron.models.rows import attention, embedding, layer_norm, mlp
from jx_neuron.nn.layers import LayerNorm
from jx_neuron.nn.rope import Rotation
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.nn.sublayers import MLP, Attention


@dataclass(frozen=True)
class Config(MultiHeadConfig):
    """HF's GPTNeoXConfig."""

    vocab_size: int = 50432
    hidden_size: int = 6144
    num_hidden_layers: int = 44
    num_attention_heads: int = 64
    intermediate_size: int = 24576
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    use_parallel_residual: bool = True
    attention_bias: bool = True
    head_dim: int | None = None  # HF's RoPE reads it, and its attention does not
    partial_rotary_factor: float = field(default=0.25, metadata={"hf": "rotary_pct"})
    rope_theta: float = field(default=10000.0, metadata={"hf": "rotary_emb_base"})

    MODEL_TYPE = "gpt_neox"
    COMPLETE = True
    LAYERS_ALIKE = True
    HEADS_FILL_WIDTH = True


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, eps = cfg.hidden_size, cfg.layer_norm_eps
        self.input_layernorm = LayerNorm(d, eps)
        self.attention = Attention(cfg.sizes, bias=cfg.attention_bias, rngs=rngs)
        self.post_attention_layernorm = LayerNorm(d, eps)
        self.mlp = MLP(cfg.sizes, cfg.hidden_act, bias=True, rngs=rngs)
        self.parallel = cfg.use_parallel_residual

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        a_btd, state = self.attention(self.input_layernorm(x_btd), state, at, by)
        y_btd = x_btd + a_btd
        return y_btd + self.mlp(self.post_attention_layernorm(x_btd if self.parallel else y_btd)), state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        norm = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
        super().__init__(cfg, (Block(cfg, rngs) for _ in range(cfg.layers)), rngs, norm=norm)


LAYER = "gpt_neox.layers.{i}."
WEIGHTS = (
    embedding("gpt_neox.embed_in", "embed_tokens"),
    *layer_norm(LAYER + "input_layernorm"),
    *attention(LAYER + "attention", grouped="query_key_value", out="dense"),
    *layer_norm(LAYER + "post_attention_layernorm"),
    *mlp(LAYER + "mlp", up="dense_h_to_4h", down="dense_4h_to_h"),
    *layer_norm("gpt_neox.final_layer_norm", "norm"),
    embedding("embed_out", "lm_head"),
)

# causal masks and inverse frequencies that older checkpoints carry, and the head where it is tied
IGNORE = (
    r"layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",
    Copy("embed_out.weight", of="gpt_neox.embed_in.weight"),
)
