"""The config that GPT-2 and the decoders that descend from it share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jx_neuron.checkpoint.hf_config import HFConfig, divisible, one_of
from jx_neuron.nn.layers import ACT

__all__ = ["GPTLikeConfig"]


@dataclass(frozen=True)
class GPTLikeConfig(HFConfig):
    """The fields of these decoders. Sizes have no defaults here: a family's `Config` gives those of its HF class."""

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True

    ALIASES: ClassVar[Mapping[str, str]] = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    def __post_init__(self) -> None:
        one_of(self.MODEL_TYPE, "activation_function", self.activation_function, ACT)
        divisible(self.MODEL_TYPE, "n_embd", self.n_embd, "n_head", self.n_head)

    @property
    def sizes(self) -> dict[str, int]:
        d, n = self.n_embd, self.n_head
        f = 4 * d if self.n_inner is None else self.n_inner
        return dict(d=d, n=n, k=n, h=d // n, f=f, v=self.vocab_size, s=self.n_positions)
