"""CodeGen (Nijkamp et al., arXiv:2203.13474).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/codegen/modeling_codegen.py
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from jx_neuron.checkpoint.hf_config import divisible
from jx_neuron.checkpoint.weights import Copy, W
from jx_neuron.errors import ConfigError
from jx_neuron.models.causal_lm import CausalLM
from jx_neuron.models.gpt_like import GPTLikeConfig
from jx_neuron.models.rows import embedding, head_bias, layer_norm, mlp, row_parallel
from jx_neuron.nn.attention import attend
from jx_neuron.nn.layers import LayerNorm, Linear
from jx_neuron.nn.rope import Rotation, inverse_frequencies, rope_interleaved, rotation
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.nn.sublayers import MLP

SHARDS = 4  # of the cores that the checkpoints were trained on, each with the projections of its heads


@dataclass(frozen=True)
class Config(GPTLikeConfig):
    """HF's CodeGenConfig."""

    vocab_size: int = 50400
    n_positions: int = 2048
    n_embd: int = 4096
    n_layer: int = 28
    n_head: int = 16
    rotary_dim: int = 64
    tie_word_embeddings: bool = False

    MODEL_TYPE = "codegen"
    COMPLETE = True
    LAYERS_ALIKE = True
    INERT = frozenset({"n_ctx"})
    USUAL: ClassVar[Mapping[str, Any]] = {"scale_attn_weights": True}

    def __post_init__(self) -> None:
        super().__post_init__()
        divisible("codegen", "n_head", self.n_head, "the shards of its checkpoints", SHARDS)
        r, h = self.rotary_dim, self.sizes["h"]
        if r % 2 or r > h:
            raise ConfigError(
                f"codegen: rotary_dim={r} is not supported; it may be an even number from 2 to the head size {h}"
            )

    @property
    def sizes(self) -> dict[str, int]:
        return super().sizes | {"m": SHARDS, "c": 3}


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, n, h = (cfg.sizes[c] for c in "dnh")
        self.ln_1 = LayerNorm(d, cfg.layer_norm_epsilon)
        self.qvk_proj = Linear((d,), (3, n, h), bias=False, rngs=rngs)
        self.out_proj = Linear((n, h), (d,), bias=False, rngs=rngs)
        self.mlp = MLP(cfg.sizes, cfg.activation_function, bias=True, rngs=rngs)

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        h_btd = self.ln_1(x_btd)
        qvk_btcnh = self.qvk_proj(h_btd)
        q_btnh, v_btnh, k_btnh = (qvk_btcnh[:, :, i] for i in range(3))
        a_btnh, state = attend(rope_interleaved(q_btnh, by), rope_interleaved(k_btnh, by), v_btnh, state, at)
        return x_btd + self.out_proj(a_btnh) + self.mlp(h_btd), state


class Model(CausalLM):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        norm = LayerNorm(cfg.n_embd, cfg.layer_norm_epsilon)
        super().__init__(cfg, (Block(cfg, rngs) for _ in range(cfg.layers)), norm, rngs, head_bias=True)
        self.rotary_dim = cfg.rotary_dim

    def block_args(self, at: Positions) -> tuple[Any, ...]:
        return (rotation(at, inverse_frequencies(self.rotary_dim, 10000.0)),)


HF, OURS = "transformer.h.{i}.", "layers.{i}."
WEIGHTS = (
    embedding("transformer.wte", "embed_tokens"),
    *layer_norm(HF + "ln_1"),
    W(HF + "attn.qkv_proj.weight", OURS + "qvk_proj.kernel", "(m c n/m h) d -> d c n h", P(None, None, "tp", None)),
    *row_parallel(HF + "attn.out_proj", OURS + "out_proj", "n h", bias=False),
    *mlp(HF + "mlp", up="fc_in", down="fc_out"),
    *layer_norm("transformer.ln_f", "norm"),
    embedding("lm_head"),
    head_bias("lm_head", "lm_head_bias"),
)

# causal masks that older checkpoints carry, and the head where it is tied
IGNORE = (r"h\.\d+\.attn\.((masked_)?bias|causal_mask)", Copy("lm_head.weight", of="transformer.wte.weight"))
