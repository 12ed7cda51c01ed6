"""LFM2 (Liquid AI, arXiv:2511.23404): short gated convolutions, with attention in some layers.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/lfm2/modeling_lfm2.py
"""

from dataclasses import dataclass

from flax import nnx

from jx_neuron.models.llama_like import EXTRA_TENSORS, LlamaLikeModel
from jx_neuron.models.recurrent import FULL
from jx_neuron.models.rows import embedding, rms_norm
from jx_neuron.models.short_conv import CONV, LFM2_LAYER, SHORT_CONV_STATE, ShortConvBlock, ShortConvConfig
from jx_neuron.nn.sublayers import GatedMLP


@dataclass(frozen=True)
class Config(ShortConvConfig):
    """HF's Lfm2Config."""

    vocab_size: int = 65536
    hidden_size: int = 2560
    intermediate_size: int = 12288
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 128000
    block_multiple_of: int = 256
    block_ffn_dim_multiplier: float | None = 1.0
    block_auto_adjust_ff_dim: bool = True
    full_attn_idxs: list[int] | None = None

    MODEL_TYPE = "lfm2"
    COMPLETE = True
    ALIASES = {**ShortConvConfig.ALIASES, "block_ff_dim": "intermediate_size"}  # noqa: RUF012
    # as in files of the Hub: other names of sizes, and what steers initialization
    INERT = frozenset(
        "block_dim block_mlp_init_scale block_norm_eps block_out_init_scale block_use_swiglu block_use_xavier_init "
        "conv_dim conv_dim_out conv_use_xavier_init num_heads use_pos_enc".split()
    )

    @property
    def usual_types(self) -> list[str]:
        attends = range(self.layers) if self.full_attn_idxs is None else self.full_attn_idxs
        return [FULL if layer in attends else CONV for layer in range(self.layers)]

    @property
    def sizes(self) -> dict[str, int]:
        f, multiple = self.intermediate_size, self.block_multiple_of
        if self.block_auto_adjust_ff_dim:
            f = int(2 * f / 3)
            if self.block_ffn_dim_multiplier is not None:
                f = -(-int(self.block_ffn_dim_multiplier * f) // multiple) * multiple
        return super().sizes | dict(f=f)


class Block(ShortConvBlock):
    def __init__(self, cfg: Config, layer: int, rngs: nnx.Rngs):
        super().__init__(cfg, layer, GatedMLP(cfg.sizes, cfg.hidden_act, bias=False, rngs=rngs), rngs)


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        super().__init__(cfg, (Block(cfg, layer, rngs) for layer in range(cfg.layers)), rngs)


STATE = SHORT_CONV_STATE
WEIGHTS = (
    embedding("model.embed_tokens"),
    *LFM2_LAYER,
    rms_norm("model.embedding_norm", "norm"),
    embedding("lm_head"),
)

IGNORE = EXTRA_TENSORS
