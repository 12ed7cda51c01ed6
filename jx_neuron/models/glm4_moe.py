"""GLM-4.5 (GLM-4.5 Team, arXiv:2508.06471): experts by DeepSeek's router, and one of every token.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/glm4_moe/modeling_glm4_moe.py
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from flax import nnx
from jax import Array

from jx_neuron.models.llama_like import EXTRA_TENSORS, LlamaLikeConfig, LlamaLikeModel
from jx_neuron.models.mixture import TRAINING, GroupedExpertsConfig, correction, experts, router, stacked_experts
from jx_neuron.models.rows import attention, embedding, gated_mlp, rms_norm
from jx_neuron.nn.experts import Experts, MoE, Router
from jx_neuron.nn.layers import RMSNorm
from jx_neuron.nn.rope import Rotation
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.nn.sublayers import Attention, GatedMLP


@dataclass(frozen=True)
class Config(GroupedExpertsConfig, LlamaLikeConfig):
    """HF's Glm4MoeConfig."""

    vocab_size: int = 151552
    hidden_size: int = 4096
    intermediate_size: int = 10944
    num_hidden_layers: int = 46
    num_attention_heads: int = 96
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    partial_rotary_factor: float = 0.5
    attention_bias: bool = False
    use_qk_norm: bool = False
    n_routed_experts: int = 128
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 1408
    first_k_dense_replace: int = field(default=1, metadata={"least": 0})
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0

    MODEL_TYPE = "glm4_moe"
    COMPLETE = True
    INERT = TRAINING | {"num_mtp_layers", "num_nextn_predict_layers"}
    ALIASES: ClassVar[Mapping[str, str]] = {"num_local_experts": "n_routed_experts"}


class Block(nnx.Module):
    def __init__(self, cfg: Config, layer: int, rngs: nnx.Rngs):
        d, eps, sizes, act = cfg.hidden_size, cfg.rms_norm_eps, cfg.sizes_of(layer), cfg.hidden_act
        h, bias = sizes["h"], cfg.attention_bias
        norms: dict[str, Any] = {name: RMSNorm(h, eps) for name in ("q_norm", "k_norm") if cfg.use_qk_norm}
        self.input_layernorm = RMSNorm(d, eps)
        self.self_attn = Attention(sizes, bias=bias, out_bias=False, **norms, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(d, eps)
        mlp = GatedMLP(sizes, act, bias=False, rngs=rngs)
        self.mlp: nnx.Module = mlp
        if cfg.has_experts(layer):
            gate = Router(
                sizes,
                cfg.chosen,
                score="sigmoid",
                corrected=True,
                groups=cfg.groups,
                normalize=cfg.norm_topk_prob,
                eps=1e-20,
                scale=cfg.routed_scaling_factor,
                rngs=rngs,
            )
            self.mlp = MoE(gate, Experts(sizes, act, rngs=rngs), mlp)

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        a_btd, state = self.self_attn(self.input_layernorm(x_btd), state, at, by)
        x_btd = x_btd + a_btd
        return x_btd + self.mlp(self.post_attention_layernorm(x_btd)), state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        super().__init__(cfg, (Block(cfg, layer, rngs) for layer in range(cfg.layers)), rngs)


LAYER, MLP = "model.layers.{i}.", "layers.{i}.mlp."
WEIGHTS = (
    embedding("model.embed_tokens"),
    rms_norm(LAYER + "input_layernorm"),
    *attention(LAYER + "self_attn", out_bias=False),
    rms_norm(LAYER + "self_attn.q_norm", width="h"),
    rms_norm(LAYER + "self_attn.k_norm", width="h"),
    rms_norm(LAYER + "post_attention_layernorm"),
    *gated_mlp(LAYER + "mlp", bias=False),
    router(LAYER + "mlp.gate", MLP + "gate"),
    correction(LAYER + "mlp.gate.e_score_correction_bias", MLP + "gate"),
    *experts(LAYER + "mlp.experts", MLP + "experts"),
    *stacked_experts(LAYER + "mlp.experts.gate_up_proj", LAYER + "mlp.experts.down_proj", MLP + "experts"),
    *gated_mlp(LAYER + "mlp.shared_experts", MLP + "shared_expert", bias=False),
    rms_norm("model.norm"),
    embedding("lm_head"),
)

# as HF does, layers that predict several tokens at once
IGNORE = (*EXTRA_TENSORS, r"layers\.(46|92)\..*")
