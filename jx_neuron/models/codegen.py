"""CodeGen (Nijkamp et al., arXiv:2203.13474).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/codegen/modeling_codegen.py
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from jx_neuron.checkpoint.hf_config import HFConfig, divisible, one_of
from jx_neuron.checkpoint.weights import Copy, W
from jx_neuron.errors import ConfigError
from jx_neuron.models.rows import column_parallel, embedding, layer_norm, row_parallel
from jx_neuron.nn.attention import attend
from jx_neuron.nn.layers import ACT, Embedding, LayerNorm, Linear, through
from jx_neuron.nn.rope import Rotation, inverse_frequencies, rope_interleaved, rotation
from jx_neuron.nn.state import LayerState, Positions, State

SHARDS = 4  # of the cores that the checkpoints were trained on, each with the projections of its heads


@dataclass(frozen=True)
class Config(HFConfig):
    """HF's CodeGenConfig."""

    vocab_size: int = 50400
    n_positions: int = 2048
    n_embd: int = 4096
    n_layer: int = 28
    n_head: int = 16
    rotary_dim: int = 64
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = False

    MODEL_TYPE: ClassVar[str] = "codegen"
    COMPLETE: ClassVar[bool] = True
    LAYERS_ALIKE: ClassVar[bool] = True
    ALIASES: ClassVar[Mapping[str, str]] = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
    INERT: ClassVar[frozenset[str]] = frozenset(
        """attn_pdrop embd_pdrop resid_pdrop n_ctx summary_activation summary_first_dropout
        summary_proj_to_labels summary_type summary_use_proj""".split()
    )
    USUAL: ClassVar[Mapping[str, Any]] = {"scale_attn_weights": True}

    def __post_init__(self) -> None:
        one_of("codegen", "activation_function", self.activation_function, ACT)
        divisible("codegen", "n_embd", self.n_embd, "n_head", self.n_head)
        divisible("codegen", "n_head", self.n_head, "the shards of its checkpoints", SHARDS)
        r, h = self.rotary_dim, self.sizes["h"]
        if r % 2 or r > h:
            raise ConfigError(
                f"codegen: rotary_dim={r} is not supported; it may be an even number from 2 to the head size {h}"
            )

    @property
    def sizes(self) -> dict[str, int]:
        d, n = self.n_embd, self.n_head
        f = 4 * d if self.n_inner is None else self.n_inner
        return dict(d=d, n=n, k=n, h=d // n, f=f, v=self.vocab_size, m=SHARDS, c=3)


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, n, h, f = (cfg.sizes[c] for c in "dnhf")
        self.ln_1 = LayerNorm(d, cfg.layer_norm_epsilon)
        self.qvk_proj = Linear((d,), (3, n, h), bias=False, rngs=rngs)
        self.out_proj = Linear((n, h), (d,), bias=False, rngs=rngs)
        self.fc_in = Linear((d,), (f,), bias=True, rngs=rngs)
        self.fc_out = Linear((f,), (d,), bias=True, rngs=rngs)
        self.act = ACT[cfg.activation_function]

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        h_btd = self.ln_1(x_btd)
        qvk_btcnh = self.qvk_proj(h_btd)
        q_btnh, v_btnh, k_btnh = (qvk_btcnh[:, :, i] for i in range(3))
        a_btnh, state = attend(rope_interleaved(q_btnh, by), rope_interleaved(k_btnh, by), v_btnh, state, at)
        m_btf = self.act(self.fc_in(h_btd))
        return x_btd + self.out_proj(a_btnh) + self.fc_out(m_btf), state


class Model(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        self.wte = Embedding(cfg.vocab_size, cfg.n_embd, rngs=rngs)
        self.h = nnx.List(Block(cfg, rngs) for _ in range(cfg.n_layer))
        self.ln_f = LayerNorm(cfg.n_embd, cfg.layer_norm_epsilon)
        self.lm_head = None if cfg.tie_word_embeddings else Embedding(cfg.vocab_size, cfg.n_embd, rngs=rngs)
        self.lm_head_bias = nnx.Param(jnp.zeros((cfg.vocab_size,)))
        self.rotary_dim = cfg.rotary_dim

    def __call__(self, tokens_bt: Array, state: State, at: Positions) -> tuple[Array, State]:
        by = rotation(at, inverse_frequencies(self.rotary_dim, 10000.0))
        x_btd, state = through(self.h, self.wte(tokens_bt), state, at, by)
        return self.ln_f(x_btd), state

    def logits(self, x_btd: Array) -> Array:
        return (self.wte if self.lm_head is None else self.lm_head).attend(x_btd) + self.lm_head_bias[...]


HF, OURS = "transformer.h.{i}.", "h.{i}."
WEIGHTS = (
    embedding("transformer.wte", "wte"),
    *layer_norm(HF + "ln_1", OURS + "ln_1"),
    W(HF + "attn.qkv_proj.weight", OURS + "qvk_proj.kernel", "(m c n/m h) d -> d c n h", P(None, None, "tp", None)),
    *row_parallel(HF + "attn.out_proj", OURS + "out_proj", "n h", bias=False),
    *column_parallel(HF + "mlp.fc_in", OURS + "fc_in", "f"),
    *row_parallel(HF + "mlp.fc_out", OURS + "fc_out", "f"),
    *layer_norm("transformer.ln_f", "ln_f"),
    embedding("lm_head", "lm_head"),
    W("lm_head.bias", "lm_head_bias", "v -> v", P("tp")),
)

# causal masks that older checkpoints carry, and the head where it is tied
IGNORE = (r"h\.\d+\.attn\.((masked_)?bias|causal_mask)", Copy("lm_head.weight", of="transformer.wte.weight"))
