"""GPTBigCode (SantaCoder, Ben Allal et al., arXiv:2301.03988; StarCoder, Li et al., arXiv:2305.06161).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/gpt_bigcode/modeling_gpt_bigcode.py
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from flax import nnx
from jax import Array

from jx_neuron.checkpoint.hf_config import HFConfig, divisible, one_of
from jx_neuron.checkpoint.weights import Copy, W
from jx_neuron.models.rows import column_parallel, embedding, grouped_qkv, layer_norm, row_parallel
from jx_neuron.nn.attention import attend
from jx_neuron.nn.layers import ACT, Embedding, LayerNorm, Linear, Linears, through
from jx_neuron.nn.state import LayerState, Positions, State


@dataclass(frozen=True)
class Config(HFConfig):
    """HF's GPTBigCodeConfig."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_pytorch_tanh"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    multi_query: bool = True
    tie_word_embeddings: bool = True

    MODEL_TYPE: ClassVar[str] = "gpt_bigcode"
    COMPLETE: ClassVar[bool] = True
    LAYERS_ALIKE: ClassVar[bool] = True
    ALIASES: ClassVar[Mapping[str, str]] = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
    # scores and softmax are float32 here in any case, and multi_query says how many key/value heads there are
    INERT: ClassVar[frozenset[str]] = frozenset(
        """attention_softmax_in_fp32 attn_pdrop embd_pdrop num_key_value_heads resid_pdrop
        scale_attention_softmax_in_fp32 summary_activation summary_first_dropout summary_proj_to_labels summary_type
        summary_use_proj""".split()
    )

    def __post_init__(self) -> None:
        one_of("gpt_bigcode", "activation_function", self.activation_function, ACT)
        divisible("gpt_bigcode", "n_embd", self.n_embd, "n_head", self.n_head)

    @property
    def sizes(self) -> dict[str, int]:
        d, n = self.n_embd, self.n_head
        f = 4 * d if self.n_inner is None else self.n_inner
        return dict(d=d, n=n, k=1 if self.multi_query else n, h=d // n, f=f, v=self.vocab_size, s=self.n_positions)


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, n, k, h, f = (cfg.sizes[c] for c in "dnkhf")
        self.ln_1 = LayerNorm(d, cfg.layer_norm_epsilon)
        self.qkv = Linears((d,), dict(q_proj=(n, h), k_proj=(k, h), v_proj=(k, h)), bias=True, rngs=rngs)
        self.c_proj = Linear((n, h), (d,), bias=True, rngs=rngs)
        self.ln_2 = LayerNorm(d, cfg.layer_norm_epsilon)
        self.c_fc = Linear((d,), (f,), bias=True, rngs=rngs)
        self.mlp_c_proj = Linear((f,), (d,), bias=True, rngs=rngs)
        self.act = ACT[cfg.activation_function]
        self.scale = None if cfg.scale_attn_weights else 1.0

    def __call__(self, x_btd: Array, state: LayerState, at: Positions) -> tuple[Array, LayerState]:
        q_btnh, k_btkh, v_btkh = self.qkv(self.ln_1(x_btd))
        a_btnh, state = attend(q_btnh, k_btkh, v_btkh, state, at, self.scale)
        x_btd = x_btd + self.c_proj(a_btnh)
        return x_btd + self.mlp_c_proj(self.act(self.c_fc(self.ln_2(x_btd)))), state


class Model(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        self.wte = Embedding(cfg.vocab_size, cfg.n_embd, rngs=rngs)
        self.wpe = Embedding(cfg.n_positions, cfg.n_embd, rngs=rngs)
        self.h = nnx.List(Block(cfg, rngs) for _ in range(cfg.layers))
        self.ln_f = LayerNorm(cfg.n_embd, cfg.layer_norm_epsilon)
        self.lm_head = None if cfg.tie_word_embeddings else Embedding(cfg.vocab_size, cfg.n_embd, rngs=rngs)

    def __call__(self, tokens_bt: Array, state: State, at: Positions) -> tuple[Array, State]:
        x_btd = self.wte(tokens_bt) + self.wpe(at.position_bt)
        x_btd, state = through(self.h, x_btd, state, at)
        return self.ln_f(x_btd), state

    def logits(self, x_btd: Array) -> Array:
        return (self.wte if self.lm_head is None else self.lm_head).attend(x_btd)


HF, OURS = "transformer.h.{i}.", "h.{i}."
WEIGHTS = (
    embedding("transformer.wte", "wte"),
    W("transformer.wpe.weight", "wpe.embedding", "s d -> s d"),
    *layer_norm(HF + "ln_1", OURS + "ln_1"),
    *grouped_qkv(HF + "attn.c_attn", OURS + "qkv"),
    *row_parallel(HF + "attn.c_proj", OURS + "c_proj", "n h"),
    *layer_norm(HF + "ln_2", OURS + "ln_2"),
    *column_parallel(HF + "mlp.c_fc", OURS + "c_fc", "f"),
    *row_parallel(HF + "mlp.c_proj", OURS + "mlp_c_proj", "f"),
    *layer_norm("transformer.ln_f", "ln_f"),
    embedding("lm_head", "lm_head"),
)

# causal masks that older checkpoints carry, and the head where it is tied
IGNORE = (r"(h\.\d+\.attn\.)?(masked_)?bias", Copy("lm_head.weight", of="transformer.wte.weight"))
