"""GPT-2 (Radford et al., 2019).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/gpt2/modeling_gpt2.py
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from jx_neuron.checkpoint.hf_config import HFConfig, divisible, one_of
from jx_neuron.checkpoint.weights import Copy, W
from jx_neuron.models.rows import embedding, layer_norm
from jx_neuron.nn.attention import attend
from jx_neuron.nn.layers import ACT, Embedding, LayerNorm, Layers, Linear
from jx_neuron.nn.state import LayerState, Positions, State


@dataclass(frozen=True)
class Config(HFConfig):
    """HF's GPT2Config."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True

    MODEL_TYPE: ClassVar[str] = "gpt2"
    COMPLETE: ClassVar[bool] = True
    LAYERS_ALIKE: ClassVar[bool] = True
    ALIASES: ClassVar[Mapping[str, str]] = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
    # reorder_and_upcast_attn: scores and softmax are float32 here in any case
    INERT: ClassVar[frozenset[str]] = frozenset(
        """attn_pdrop embd_pdrop resid_pdrop n_ctx n_special predict_special_tokens output_past reorder_and_upcast_attn
        summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj""".split()
    )

    def __post_init__(self) -> None:
        one_of("gpt2", "activation_function", self.activation_function, ACT)
        divisible("gpt2", "n_embd", self.n_embd, "n_head", self.n_head)

    @property
    def sizes(self) -> dict[str, int]:
        f = self.n_inner if self.n_inner is not None else 4 * self.n_embd
        h = self.n_embd // self.n_head
        return dict(d=self.n_embd, n=self.n_head, k=self.n_head, h=h, f=f, v=self.vocab_size, s=self.n_positions, c=3)

    def scale(self, layer: int) -> float:
        """What attention scores are multiplied by."""
        scale = 1 / math.sqrt(self.sizes["h"]) if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale


class Block(nnx.Module):
    def __init__(self, cfg: Config, layer: int, rngs: nnx.Rngs):
        d, n, h, f = (cfg.sizes[c] for c in "dnhf")
        self.ln_1 = LayerNorm(d, cfg.layer_norm_epsilon)
        self.c_attn = Linear((d,), (3, n, h), bias=True, rngs=rngs)
        self.c_proj = Linear((n, h), (d,), bias=True, rngs=rngs)
        self.ln_2 = LayerNorm(d, cfg.layer_norm_epsilon)
        self.c_fc = Linear((d,), (f,), bias=True, rngs=rngs)
        self.mlp_c_proj = Linear((f,), (d,), bias=True, rngs=rngs)
        self.act = ACT[cfg.activation_function]
        self.scale = cfg.scale(layer)

    def __call__(self, x_btd: Array, state: LayerState, at: Positions) -> tuple[Array, LayerState]:
        qkv_btcnh = self.c_attn(self.ln_1(x_btd))
        q_btnh, k_btnh, v_btnh = (qkv_btcnh[:, :, i] for i in range(3))
        a_btnh, state = attend(q_btnh, k_btnh, v_btnh, state, at, self.scale)
        x_btd = x_btd + self.c_proj(a_btnh)
        return x_btd + self.mlp_c_proj(self.act(self.c_fc(self.ln_2(x_btd)))), state


class Model(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        self.wte = Embedding(cfg.vocab_size, cfg.n_embd, rngs=rngs)
        self.wpe = Embedding(cfg.n_positions, cfg.n_embd, rngs=rngs)
        self.h = Layers(Block(cfg, i, rngs) for i in range(cfg.n_layer))
        self.ln_f = LayerNorm(cfg.n_embd, cfg.layer_norm_epsilon)
        self.lm_head = None if cfg.tie_word_embeddings else Embedding(cfg.vocab_size, cfg.n_embd, rngs=rngs)

    def __call__(self, tokens_bt: Array, state: State, at: Positions) -> tuple[Array, State]:
        x_btd = self.wte(tokens_bt) + self.wpe(at.position_bt)
        x_btd, state = self.h(x_btd, state, at)
        return self.ln_f(x_btd), state

    def logits(self, x_btd: Array) -> Array:
        return (self.wte if self.lm_head is None else self.lm_head).attend(x_btd)


HF, OURS = "transformer.h.{i}.", "h.{i}."
WEIGHTS = (
    embedding("transformer.wte", "wte"),
    W("transformer.wpe.weight", "wpe.embedding", "s d -> s d"),
    *layer_norm(HF + "ln_1", OURS + "ln_1"),
    W(HF + "attn.c_attn.weight", OURS + "c_attn.kernel", "d (c n h) -> d c n h", P(None, None, "tp", None)),
    W(HF + "attn.c_attn.bias", OURS + "c_attn.bias", "(c n h) -> c n h", P(None, "tp", None)),
    W(HF + "attn.c_proj.weight", OURS + "c_proj.kernel", "(n h) d -> n h d", P("tp", None, None)),
    W(HF + "attn.c_proj.bias", OURS + "c_proj.bias", "d -> d"),
    *layer_norm(HF + "ln_2", OURS + "ln_2"),
    W(HF + "mlp.c_fc.weight", OURS + "c_fc.kernel", "d f -> d f", P(None, "tp")),
    W(HF + "mlp.c_fc.bias", OURS + "c_fc.bias", "f -> f", P("tp")),
    W(HF + "mlp.c_proj.weight", OURS + "mlp_c_proj.kernel", "f d -> f d", P("tp", None)),
    W(HF + "mlp.c_proj.bias", OURS + "mlp_c_proj.bias", "d -> d"),
    *layer_norm("transformer.ln_f", "ln_f"),
    embedding("lm_head", "lm_head"),
)

# causal masks that older checkpoints carry, and the head where it is tied
IGNORE = (r"h\.\d+\.(attn|crossattention)\.(masked_)?bias", Copy("lm_head.weight", of="transformer.wte.weight"))
