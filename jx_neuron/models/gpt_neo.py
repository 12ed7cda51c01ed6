"""GPT-Neo (Black et al., 2021, doi:10.5281/zenodo.5297715).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/gpt_neo/modeling_gpt_neo.py
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from flax import nnx
from jax import Array

from jx_neuron.checkpoint.hf_config import HFConfig, divisible, one_of
from jx_neuron.checkpoint.weights import Copy, W
from jx_neuron.errors import ConfigError
from jx_neuron.models.rows import attention, column_parallel, embedding, layer_norm, row_parallel
from jx_neuron.nn.attention import attend
from jx_neuron.nn.layers import ACT, Embedding, LayerNorm, Layers, Linear, Linears
from jx_neuron.nn.state import LayerState, Positions, State
from jx_neuron.util.arguments import shown


@dataclass(frozen=True)
class Config(HFConfig):
    """HF's GPTNeoConfig."""

    vocab_size: int = 50257
    max_position_embeddings: int = 2048
    hidden_size: int = 2048
    num_layers: int = 24
    attention_types: list[Any] | None = None
    attention_layers: list[Any] | None = None
    num_heads: int = 16
    intermediate_size: int | None = None
    window_size: int = 256
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True

    MODEL_TYPE: ClassVar[str] = "gpt_neo"
    COMPLETE: ClassVar[bool] = True
    ALIASES: ClassVar[Mapping[str, str]] = {"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"}
    INERT: ClassVar[frozenset[str]] = frozenset(
        """attention_dropout classifier_dropout embed_dropout resid_dropout summary_activation summary_first_dropout
        summary_proj_to_labels summary_type summary_use_proj""".split()
    )

    def __post_init__(self) -> None:
        one_of("gpt_neo", "activation_function", self.activation_function, ACT)
        divisible("gpt_neo", "hidden_size", self.hidden_size, "num_heads", self.num_heads)
        kinds = self.kinds
        if len(kinds) != self.num_layers or any(kind not in ("global", "local") for kind in kinds):
            raise ConfigError(
                f"gpt_neo: attention_types={shown(self.attention_types)} and attention_layers="
                f"{shown(self.attention_layers)} should make one of 'global' and 'local' for each of the "
                f"{self.num_layers} layers, as does [[['global', 'local'], {self.num_layers // 2}]]"
            )

    @property
    def kinds(self) -> list[str]:
        """Of each layer "global" or "local"; `attention_layers` goes before `attention_types`, as in HF."""
        if self.attention_layers is not None:
            return self.attention_layers
        types: list[Any] = [[["global", "local"], 12]] if self.attention_types is None else self.attention_types
        try:
            return [kind for kinds, times in types for kind in list(kinds) * times]
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"gpt_neo: attention_types={shown(types)} should be like [[['global', 'local'], 12]]"
            ) from error

    @property
    def sizes(self) -> dict[str, int]:
        d, n = self.hidden_size, self.num_heads
        f = 4 * d if self.intermediate_size is None else self.intermediate_size
        return dict(d=d, n=n, k=n, h=d // n, f=f, v=self.vocab_size, s=self.max_position_embeddings)


class Block(nnx.Module):
    def __init__(self, cfg: Config, kind: str, rngs: nnx.Rngs):
        d, n, h, f = (cfg.sizes[c] for c in "dnhf")
        self.ln_1 = LayerNorm(d, cfg.layer_norm_epsilon)
        self.qkv = Linears((d,), dict(q_proj=(n, h), k_proj=(n, h), v_proj=(n, h)), bias=False, rngs=rngs)
        self.out_proj = Linear((n, h), (d,), bias=True, rngs=rngs)
        self.ln_2 = LayerNorm(d, cfg.layer_norm_epsilon)
        self.c_fc = Linear((d,), (f,), bias=True, rngs=rngs)
        self.c_proj = Linear((f,), (d,), bias=True, rngs=rngs)
        self.act = ACT[cfg.activation_function]
        self.window = cfg.window_size if kind == "local" else None

    def __call__(self, x_btd: Array, state: LayerState, at: Positions) -> tuple[Array, LayerState]:
        q_btnh, k_btnh, v_btnh = self.qkv(self.ln_1(x_btd))
        a_btnh, state = attend(q_btnh, k_btnh, v_btnh, state, at, scale=1.0, window=self.window)
        x_btd = x_btd + self.out_proj(a_btnh)
        return x_btd + self.c_proj(self.act(self.c_fc(self.ln_2(x_btd)))), state


class Model(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        self.wte = Embedding(cfg.vocab_size, cfg.hidden_size, rngs=rngs)
        self.wpe = Embedding(cfg.max_position_embeddings, cfg.hidden_size, rngs=rngs)
        self.h = Layers(Block(cfg, kind, rngs) for kind in cfg.kinds)
        self.ln_f = LayerNorm(cfg.hidden_size, cfg.layer_norm_epsilon)
        self.lm_head = None if cfg.tie_word_embeddings else Embedding(cfg.vocab_size, cfg.hidden_size, rngs=rngs)

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
    *attention(HF + "attn.attention.", OURS, out="out_proj", bias=False, out_bias=True),
    *layer_norm(HF + "ln_2", OURS + "ln_2"),
    *column_parallel(HF + "mlp.c_fc", OURS + "c_fc", "f"),
    *row_parallel(HF + "mlp.c_proj", OURS + "c_proj", "f"),
    *layer_norm("transformer.ln_f", "ln_f"),
    embedding("lm_head", "lm_head"),
)

# causal masks that older checkpoints carry, and the head where it is tied
IGNORE = (r"h\.\d+\.attn\.attention\.(masked_)?bias", Copy("lm_head.weight", of="transformer.wte.weight"))
