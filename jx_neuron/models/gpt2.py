"""GPT-2 (Radford et al., 2019).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/gpt2/modeling_gpt2.py
"""

import math
from dataclasses import dataclass

from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from jx_neuron.checkpoint.weights import Copy, W
from jx_neuron.models.causal_lm import CausalLM
from jx_neuron.models.gpt_like import GPTLikeConfig
from jx_neuron.models.rows import embedding, layer_norm, position_embedding
from jx_neuron.nn.attention import attend
from jx_neuron.nn.layers import Embedding, LayerNorm, Linear
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.nn.sublayers import MLP


@dataclass(frozen=True)
class Config(GPTLikeConfig):
    """HF's GPT2Config."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False

    MODEL_TYPE = "gpt2"
    COMPLETE = True
    LAYERS_ALIKE = True
    # reorder_and_upcast_attn: scores and softmax are float32 here in any case
    INERT = frozenset("n_ctx n_special output_past predict_special_tokens reorder_and_upcast_attn".split())

    @property
    def sizes(self) -> dict[str, int]:
        return super().sizes | {"c": 3}

    def scale(self, layer: int) -> float:
        """The factor of attention scores."""
        scale = 1 / math.sqrt(self.sizes["h"]) if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale


class Block(nnx.Module):
    def __init__(self, cfg: Config, layer: int, rngs: nnx.Rngs):
        d, n, h = (cfg.sizes[c] for c in "dnh")
        self.ln_1 = LayerNorm(d, cfg.layer_norm_epsilon)
        self.c_attn = Linear((d,), (3, n, h), bias=True, rngs=rngs)
        self.c_proj = Linear((n, h), (d,), bias=True, rngs=rngs)
        self.ln_2 = LayerNorm(d, cfg.layer_norm_epsilon)
        self.mlp = MLP(cfg.sizes, cfg.activation_function, bias=True, rngs=rngs)
        self.scale = cfg.scale(layer)

    def __call__(self, x_btd: Array, state: LayerState, at: Positions) -> tuple[Array, LayerState]:
        qkv_btcnh = self.c_attn(self.ln_1(x_btd))
        q_btnh, k_btnh, v_btnh = (qkv_btcnh[:, :, i] for i in range(3))
        a_btnh, state = attend(q_btnh, k_btnh, v_btnh, state, at, self.scale)
        x_btd = x_btd + self.c_proj(a_btnh)
        return x_btd + self.mlp(self.ln_2(x_btd)), state


class Model(CausalLM):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        norm = LayerNorm(cfg.n_embd, cfg.layer_norm_epsilon)
        super().__init__(cfg, (Block(cfg, layer, rngs) for layer in range(cfg.layers)), norm, rngs)
        self.wpe = Embedding(cfg.n_positions, cfg.n_embd, rngs=rngs)

    def embed(self, tokens_bt: Array, at: Positions) -> Array:
        return super().embed(tokens_bt, at) + self.wpe(at.position_bt)


HF, OURS = "transformer.h.{i}.", "layers.{i}."
WEIGHTS = (
    embedding("transformer.wte", "embed_tokens"),
    position_embedding("transformer.wpe"),
    *layer_norm(HF + "ln_1"),
    W(HF + "attn.c_attn.weight", OURS + "c_attn.kernel", "d (c n h) -> d c n h", P(None, None, "tp", None)),
    W(HF + "attn.c_attn.bias", OURS + "c_attn.bias", "(c n h) -> c n h", P(None, "tp", None)),
    W(HF + "attn.c_proj.weight", OURS + "c_proj.kernel", "(n h) d -> n h d", P("tp", None, None)),
    W(HF + "attn.c_proj.bias", OURS + "c_proj.bias", "d -> d"),
    *layer_norm(HF + "ln_2"),
    W(HF + "mlp.c_fc.weight", OURS + "mlp.up_proj.kernel", "d f -> d f", P(None, "tp")),
    W(HF + "mlp.c_fc.bias", OURS + "mlp.up_proj.bias", "f -> f", P("tp")),
    W(HF + "mlp.c_proj.weight", OURS + "mlp.down_proj.kernel", "f d -> f d", P("tp", None)),
    W(HF + "mlp.c_proj.bias", OURS + "mlp.down_proj.bias", "d -> d"),
    *layer_norm("transformer.ln_f", "norm"),
    embedding("lm_head"),
)

# causal masks that older checkpoints carry, and the head where it is tied
IGNORE = (r"h\.\d+\.(attn|crossattention)\.(masked_)?bias", Copy("lm_head.weight", of="transformer.wte.weight"))
