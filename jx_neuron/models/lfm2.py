"""LFM2 (Liquid AI, arXiv:2511.23404): short gated convolutions, with attention in some layers.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/lfm2/modeling_lfm2.py
"""

from dataclasses import dataclass, field
from typing import Any

from flax import nnx

from jx_neuron.models.llama_like import EXTRA_TENSORS, LlamaLikeConfig, LlamaLikeModel
from jx_neuron.models.recurrent import ATTENTION, FULL, HybridBlock, HybridConfig, short_conv, short_conv_state
from jx_neuron.models.rows import attention, column_parallel, embedding, rms_norm, row_parallel
from jx_neuron.nn.layers import ACT, RMSNorm
from jx_neuron.nn.recurrent import ShortConv
from jx_neuron.nn.sublayers import Attention, GatedMLP

CONV = "conv"


@dataclass(frozen=True)
class Config(HybridConfig, LlamaLikeConfig):
    """HF's Lfm2Config."""

    vocab_size: int = 65536
    hidden_size: int = 2560
    intermediate_size: int = 12288
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 128000
    rms_norm_eps: float = field(default=1e-5, metadata={"hf": "norm_eps"})
    rope_theta: float = 1000000.0
    tie_word_embeddings: bool = True
    conv_bias: bool = False
    conv_L_cache: int = field(default=3, metadata={"least": 2})  # noqa: N815
    block_multiple_of: int = 256
    block_ffn_dim_multiplier: float | None = 1.0
    block_auto_adjust_ff_dim: bool = True
    full_attn_idxs: list[int] | None = None

    MODEL_TYPE = "lfm2"
    COMPLETE = True
    RECURRENT = CONV
    ACT = {"silu": ACT["silu"]}  # noqa: RUF012
    ALIASES = {"block_ff_dim": "intermediate_size", "tie_embedding": "tie_word_embeddings"}  # noqa: RUF012
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
        f, multiple, w = self.intermediate_size, self.block_multiple_of, self.conv_L_cache
        if self.block_auto_adjust_ff_dim:
            f = int(2 * f / 3)
            if self.block_ffn_dim_multiplier is not None:
                f = -(-int(self.block_ffn_dim_multiplier * f) // multiple) * multiple
        return super().sizes | dict(f=f, c=self.hidden_size, w=w, r=w - 1)


class Block(HybridBlock):
    def __init__(self, cfg: Config, layer: int, rngs: nnx.Rngs):
        d, h, eps = cfg.hidden_size, cfg.sizes["h"], cfg.rms_norm_eps
        if cfg.types[layer] == FULL:
            norms: dict[str, Any] = dict(q_norm=RMSNorm(h, eps), k_norm=RMSNorm(h, eps))
            mixer: nnx.Module = Attention(cfg.sizes, bias=False, **norms, rngs=rngs)
        else:
            mixer = ShortConv(cfg.sizes, bias=cfg.conv_bias, rngs=rngs)
        mlp = GatedMLP(cfg.sizes, cfg.hidden_act, bias=False, rngs=rngs)
        super().__init__(RMSNorm(d, eps), mixer, RMSNorm(d, eps), mlp)


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        super().__init__(cfg, (Block(cfg, layer, rngs) for layer in range(cfg.layers)), rngs)


L, O = "model.layers.{i}.", "layers.{i}."  # noqa: E741
STATE = (*ATTENTION, short_conv_state(CONV))
WEIGHTS = (
    embedding("model.embed_tokens"),
    rms_norm(L + "operator_norm", O + "norm"),
    *attention(L + "self_attn", O + "mixer", out="out_proj", bias=False),
    *(rms_norm(f"{L}self_attn.{x}_layernorm", f"{O}mixer.{x}_norm", width="h") for x in "qk"),
    *short_conv(L + "conv", O + "mixer"),
    rms_norm(L + "ffn_norm", O + "mlp_norm"),
    *column_parallel(L + "feed_forward.w1", O + "mlp.gate_up.gate_proj", "f", bias=False),
    *column_parallel(L + "feed_forward.w3", O + "mlp.gate_up.up_proj", "f", bias=False),
    *row_parallel(L + "feed_forward.w2", O + "mlp.down_proj", "f", bias=False),
    rms_norm("model.embedding_norm", "norm"),
    embedding("lm_head"),
)

IGNORE = EXTRA_TENSORS
