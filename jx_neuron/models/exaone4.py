"""EXAONE 4.0 (LG AI Research, arXiv:2507.11407): norms of what sublayers give; with windows, RoPE where they are alone.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/exaone4/modeling_exaone4.py
"""

from dataclasses import dataclass, field

from flax import nnx
from jax import Array

from jx_neuron.errors import ConfigError
from jx_neuron.models.llama_like import EXTRA_TENSORS, LayerTypesConfig, LlamaLikeConfig, LlamaLikeModel, full_every
from jx_neuron.models.rows import attention, embedding, gated_mlp, rms_norm
from jx_neuron.nn.layers import RMSNorm
from jx_neuron.nn.rope import Rotation
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.nn.sublayers import Attention, GatedMLP
from jx_neuron.util.arguments import shown


@dataclass(frozen=True)
class Config(LayerTypesConfig, LlamaLikeConfig):
    """HF's Exaone4Config."""

    vocab_size: int = 102400
    hidden_size: int = 4096
    intermediate_size: int = 16384
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 32
    rms_norm_eps: float = 1e-5
    sliding_window: int | None = 4096
    sliding_window_pattern: int | str | None = field(default=4, metadata={"least": 0})

    MODEL_TYPE = "exaone4"
    COMPLETE = True

    @property
    def usual_types(self) -> list[str]:
        pattern = self.sliding_window_pattern
        if self.sliding_window is None:
            return super().usual_types
        if not isinstance(pattern, int) or pattern == 0:  # HF divides by it
            raise ConfigError(
                f"exaone4: sliding_window_pattern={shown(pattern)} is not supported without layer_types; legal is a "
                "number of layers, of which the last sees all positions"
            )
        return full_every(pattern, self.layers)


class Block(nnx.Module):
    def __init__(self, cfg: Config, layer: int, rngs: nnx.Rngs):
        d, h, eps, window = cfg.hidden_size, cfg.sizes["h"], cfg.rms_norm_eps, cfg.windows[layer]
        q_norm, k_norm = RMSNorm(h, eps), RMSNorm(h, eps)
        self.self_attn = Attention(cfg.sizes, bias=False, q_norm=q_norm, k_norm=k_norm, window=window, rngs=rngs)
        self.rotates = cfg.sliding_window is None or window is not None
        self.post_attention_layernorm = RMSNorm(d, eps)
        self.mlp = GatedMLP(cfg.sizes, cfg.hidden_act, bias=False, rngs=rngs)
        self.post_feedforward_layernorm = RMSNorm(d, eps)

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        a_btd, state = self.self_attn(x_btd, state, at, by if self.rotates else None)
        x_btd = x_btd + self.post_attention_layernorm(a_btd)
        return x_btd + self.post_feedforward_layernorm(self.mlp(x_btd)), state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        super().__init__(cfg, (Block(cfg, layer, rngs) for layer in range(cfg.layers)), rngs)


LAYER = "model.layers.{i}."
WEIGHTS = (
    embedding("model.embed_tokens"),
    *attention(LAYER + "self_attn", bias=False),
    rms_norm(LAYER + "self_attn.q_norm", width="h"),
    rms_norm(LAYER + "self_attn.k_norm", width="h"),
    rms_norm(LAYER + "post_attention_layernorm"),
    *gated_mlp(LAYER + "mlp", bias=False),
    rms_norm(LAYER + "post_feedforward_layernorm"),
    rms_norm("model.norm"),
    embedding("lm_head"),
)

IGNORE = EXTRA_TENSORS
