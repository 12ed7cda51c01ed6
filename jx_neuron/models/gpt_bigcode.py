"""GPTBigCode (SantaCoder, Ben Allal et al., arXiv:2301.03988; StarCoder, Li et al., arXiv:2305.06161).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/gpt_bigcode/modeling_gpt_bigcode.py
"""

from dataclasses import dataclass

from flax import nnx
from jax import Array

from jx_neuron.checkpoint.weights import Copy
from jx_neuron.models.causal_lm import CausalLM
from jx_neuron.models.gpt_like import GPTLikeConfig
from jx_neuron.models.rows import attention, embedding, layer_norm, mlp, position_embedding
from jx_neuron.nn.layers import Embedding, LayerNorm
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.nn.sublayers import MLP, Attention


@dataclass(frozen=True)
class Config(GPTLikeConfig):
    """HF's GPTBigCodeConfig."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    activation_function: str = "gelu_pytorch_tanh"
    scale_attn_weights: bool = True
    multi_query: bool = True

    MODEL_TYPE = "gpt_bigcode"
    COMPLETE = True
    LAYERS_ALIKE = True
    # scores and softmax are float32 here in any case, and multi_query says how many key/value heads there are
    INERT = frozenset("attention_softmax_in_fp32 num_key_value_heads scale_attention_softmax_in_fp32".split())

    @property
    def sizes(self) -> dict[str, int]:
        return super().sizes | ({"k": 1} if self.multi_query else {})


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, eps, scale = cfg.n_embd, cfg.layer_norm_epsilon, None if cfg.scale_attn_weights else 1.0
        self.ln_1 = LayerNorm(d, eps)
        self.attn = Attention(cfg.sizes, bias=True, scale=scale, rngs=rngs)
        self.ln_2 = LayerNorm(d, eps)
        self.mlp = MLP(cfg.sizes, cfg.activation_function, bias=True, rngs=rngs)

    def __call__(self, x_btd: Array, state: LayerState, at: Positions) -> tuple[Array, LayerState]:
        a_btd, state = self.attn(self.ln_1(x_btd), state, at)
        x_btd = x_btd + a_btd
        return x_btd + self.mlp(self.ln_2(x_btd)), state


class Model(CausalLM):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        norm = LayerNorm(cfg.n_embd, cfg.layer_norm_epsilon)
        super().__init__(cfg, (Block(cfg, rngs) for _ in range(cfg.layers)), norm, rngs)
        self.wpe = Embedding(cfg.n_positions, cfg.n_embd, rngs=rngs)

    def embed(self, tokens_bt: Array, at: Positions) -> Array:
        return super().embed(tokens_bt, at) + self.wpe(at.position_bt)


LAYER = "transformer.h.{i}."
WEIGHTS = (
    embedding("transformer.wte", "embed_tokens"),
    position_embedding("transformer.wpe"),
    *layer_norm(LAYER + "ln_1"),
    *attention(LAYER + "attn", grouped="c_attn", out="c_proj"),
    *layer_norm(LAYER + "ln_2"),
    *mlp(LAYER + "mlp", up="c_fc", down="c_proj"),
    *layer_norm("transformer.ln_f", "norm"),
    embedding("lm_head"),
)

# causal masks that older checkpoints carry, and the head where it is tied
IGNORE = (r"(h\.\d+\.attn\.)?(masked_)?bias", Copy("lm_head.weight", of="transformer.wte.weight"))
