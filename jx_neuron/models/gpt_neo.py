"""GPT-Neo (Black et al., 2021, doi:10.5281/zenodo.5297715).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/gpt_neo/modeling_gpt_neo.py
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from flax import nnx
from jax import Array

from jx_neuron.checkpoint.hf_config import HFConfig, divisible, one_of
from jx_neuron.checkpoint.weights import Copy
from jx_neuron.errors import ConfigError
from jx_neuron.models.causal_lm import CausalLM
from jx_neuron.models.rows import attention, embedding, layer_norm, mlp, position_embedding
from jx_neuron.nn.layers import ACT, Embedding, LayerNorm
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.nn.sublayers import MLP, Attention
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

    MODEL_TYPE = "gpt_neo"
    COMPLETE = True
    ALIASES: ClassVar[Mapping[str, str]] = {"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"}

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
        d, eps, window = cfg.hidden_size, cfg.layer_norm_epsilon, cfg.window_size if kind == "local" else None
        self.ln_1 = LayerNorm(d, eps)
        self.attn = Attention(cfg.sizes, bias=False, out_bias=True, scale=1.0, window=window, rngs=rngs)
        self.ln_2 = LayerNorm(d, eps)
        self.mlp = MLP(cfg.sizes, cfg.activation_function, bias=True, rngs=rngs)

    def __call__(self, x_btd: Array, state: LayerState, at: Positions) -> tuple[Array, LayerState]:
        a_btd, state = self.attn(self.ln_1(x_btd), state, at)
        x_btd = x_btd + a_btd
        return x_btd + self.mlp(self.ln_2(x_btd)), state


class Model(CausalLM):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        norm = LayerNorm(cfg.hidden_size, cfg.layer_norm_epsilon)
        super().__init__(cfg, (Block(cfg, kind, rngs) for kind in cfg.kinds), norm, rngs)
        self.wpe = Embedding(cfg.max_position_embeddings, cfg.hidden_size, rngs=rngs)

    def embed(self, tokens_bt: Array, at: Positions) -> Array:
        return super().embed(tokens_bt, at) + self.wpe(at.position_bt)


LAYER = "transformer.h.{i}."
WEIGHTS = (
    embedding("transformer.wte", "embed_tokens"),
    position_embedding("transformer.wpe"),
    *layer_norm(LAYER + "ln_1"),
    *attention(LAYER + "attn.attention", "layers.{i}.attn", out="out_proj", bias=False, out_bias=True),
    *layer_norm(LAYER + "ln_2"),
    *mlp(LAYER + "mlp", up="c_fc", down="c_proj"),
    *layer_norm("transformer.ln_f", "norm"),
    embedding("lm_head"),
)

# causal masks that older checkpoints carry, and the head where it is tied
IGNORE = (r"h\.\d+\.attn\.attention\.(masked_)?bias", Copy("lm_head.weight", of="transformer.wte.weight"))
