"""GPT-J (Wang and Komatsuzaki, 2021).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/gptj/modeling_gptj.py
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from flax import nnx
from jax import Array

from jx_neuron.checkpoint.weights import Copy
from jx_neuron.errors import ConfigError
from jx_neuron.models.causal_lm import CausalLM
from jx_neuron.models.gpt_like import GPTLikeConfig
from jx_neuron.models.rows import attention, embedding, head_bias, layer_norm, mlp
from jx_neuron.nn.layers import LayerNorm
from jx_neuron.nn.rope import Rotation, inverse_frequencies, rope_interleaved, rotation
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.nn.sublayers import MLP, Attention


@dataclass(frozen=True)
class Config(GPTLikeConfig):
    """HF's GPTJConfig."""

    vocab_size: int = 50400
    n_positions: int = 2048
    n_embd: int = 4096
    n_layer: int = 28
    n_head: int = 16
    rotary_dim: int | None = 64
    tie_word_embeddings: bool = False

    MODEL_TYPE = "gptj"
    COMPLETE = True
    LAYERS_ALIKE = True
    INERT = frozenset({"n_ctx"})
    USUAL: ClassVar[Mapping[str, Any]] = {"rotary": True, "scale_attn_weights": True}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rotary < 2 or self.rotary % 2 or self.rotary > self.sizes["h"]:
            raise ConfigError(
                f"gptj: rotary_dim={self.rotary_dim} is not supported; it may be an even number from 2 to the head "
                f"size {self.sizes['h']}, or null for the whole head where that is even"
            )

    @property
    def rotary(self) -> int:
        """How many entries of each head are rotated."""
        return self.sizes["h"] if self.rotary_dim is None else self.rotary_dim


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        self.ln_1 = LayerNorm(cfg.n_embd, cfg.layer_norm_epsilon)
        self.attn = Attention(cfg.sizes, bias=False, rope=rope_interleaved, rngs=rngs)
        self.mlp = MLP(cfg.sizes, cfg.activation_function, bias=True, rngs=rngs)

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        h_btd = self.ln_1(x_btd)
        a_btd, state = self.attn(h_btd, state, at, by)
        return x_btd + a_btd + self.mlp(h_btd), state


class Model(CausalLM):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        norm = LayerNorm(cfg.n_embd, cfg.layer_norm_epsilon)
        super().__init__(cfg, (Block(cfg, rngs) for _ in range(cfg.layers)), norm, rngs, head_bias=True)
        self.rotary_dim = cfg.rotary

    def block_args(self, at: Positions) -> tuple[Any, ...]:
        return (rotation(at, inverse_frequencies(self.rotary_dim, 10000.0)),)


LAYER = "transformer.h.{i}."
WEIGHTS = (
    embedding("transformer.wte", "embed_tokens"),
    *layer_norm(LAYER + "ln_1"),
    *attention(LAYER + "attn", out="out_proj", bias=False),
    *mlp(LAYER + "mlp", up="fc_in", down="fc_out"),
    *layer_norm("transformer.ln_f", "norm"),
    embedding("lm_head"),
    head_bias("lm_head", "lm_head_bias"),
)

# causal masks and position tables that older checkpoints carry, and the head where it is tied
IGNORE = (r"h\.\d+\.attn\.((masked_)?bias|embed_positions)", Copy("lm_head.weight", of="transformer.wte.weight"))
