"""Parts of decoders whose layers have their own heads, keys and values, and inputs.

https://github.com/huggingface/transformers/tree/main/src/transformers/integrations/heterogeneity
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from jx_neuron.checkpoint.weights import W
from jx_neuron.errors import ConfigError
from jx_neuron.models.llama_like import LayerTypesConfig
from jx_neuron.models.rows import rms_norm
from jx_neuron.nn.layers import ACT, Embedding, Linear, RMSNorm
from jx_neuron.nn.sharding import AXIS
from jx_neuron.util.arguments import shown

__all__ = ["LayerInput", "LayerInputs", "PerLayerConfig", "layer_inputs"]

HEADS = {"head_dim": "h", "num_key_value_heads": "k"}


@dataclass(frozen=True, kw_only=True)
class PerLayerConfig(LayerTypesConfig):
    """Layers of a type may have heads of their own, the last layers may share keys and values, and each layer may have
    an input of its own.

    per_layer_config:            heads, layer by layer; where it is null, `usual_heads` gives them by type.
    num_kv_shared_layers:        this number of last layers attends to the keys and values of the last layer of their
                                 type before them.
    hidden_size_per_layer_input: the width of each layer's input; 0 for none.
    """

    per_layer_config: dict[str, Any] | None = None
    num_kv_shared_layers: int = 0
    vocab_size_per_layer_input: int = 262144
    hidden_size_per_layer_input: int = field(default=256, metadata={"least": 0})

    @property
    def usual_heads(self) -> Mapping[str, Mapping[str, int]]:
        """Of each layer type head_dim and num_key_value_heads, where these are not the model's."""
        return {}

    @cached_property
    def heads(self) -> Mapping[str, Mapping[str, int]]:
        """As `usual_heads`. Raises ConfigError where layers of a type differ, or in other fields."""
        if self.per_layer_config is None:
            return self.usual_heads
        entries = {layer.lstrip("0") or "0": entry for layer, entry in self.per_layer_config.items()}
        heads = {kind: entries.get(str(layer), {}) for layer, kind in enumerate(self.types)}
        alike = {str(layer): heads[kind] for layer, kind in enumerate(self.types) if heads[kind]} == entries
        if not alike or not all(map(_are_sizes, heads.values())):
            raise ConfigError(
                f"{self.MODEL_TYPE}: per_layer_config={shown(self.per_layer_config)} is not supported; legal are "
                f"numbers of layers, each with a {' and a '.join(HEADS)} as all layers of its type"
            )
        return heads

    @property
    def own_state(self) -> list[bool]:
        """Raises ConfigError where no layer of a type has keys and values."""
        first = self.layers - self.num_kv_shared_layers
        if alone := {*self.types} - {*self.types[: max(first, 0)]}:
            raise ConfigError(
                f"{self.MODEL_TYPE}: num_kv_shared_layers={self.num_kv_shared_layers} leaves no {min(alone)} layer "
                "with keys and values for others to share; lower it"
            )
        return [layer < first for layer in range(self.layers)]

    @property
    def sizes(self) -> dict[str, int]:
        p = self.hidden_size_per_layer_input or 1
        return super().sizes | dict(u=self.vocab_size_per_layer_input, p=p, q=p * self.layers, one=1)

    def sizes_of(self, layer: int) -> dict[str, int]:
        own = self.heads.get(self.types[layer], {})
        return self.sizes | {HEADS[name]: size for name, size in own.items()}


def _are_sizes(entry: Any) -> bool:
    return (
        type(entry) is dict
        and entry.keys() <= HEADS.keys()
        and all(type(size) is int and 0 < size < 2**31 for size in entry.values())
    )


class LayerInputs(nnx.Module):
    """The inputs of each layer besides the hidden states, from the token and from its embedding."""

    def __init__(self, sizes: Mapping[str, int], eps: float, rngs: nnx.Rngs):
        d, u, p, q = (sizes[c] for c in "dupq")
        self.embed_tokens_per_layer = Embedding(u, q, rngs=rngs)
        self.per_layer_model_projection = Linear((d,), (q,), bias=False, rngs=rngs)
        self.per_layer_projection_norm = RMSNorm(p, eps)
        self.d, self.p = d, p

    def __call__(self, tokens_bt: Array, x_btd: Array) -> Array:
        """[b, t, layers, p] of tokens and their embeddings."""
        shape = (*tokens_bt.shape, -1, self.p)
        token_btlp = (self.embed_tokens_per_layer(tokens_bt) * self.p**0.5).reshape(shape)
        context_btlp = (self.per_layer_model_projection(x_btd) * self.d**-0.5).reshape(shape)
        return (self.per_layer_projection_norm(context_btlp) + token_btlp) * 2**-0.5


class LayerInput(nnx.Module):
    """norm(projection(act(gate(x)) · a layer's input))."""

    def __init__(self, sizes: Mapping[str, int], act: str, eps: float, rngs: nnx.Rngs):
        d, p = sizes["d"], sizes["p"]
        self.per_layer_input_gate = Linear((d,), (p,), bias=False, rngs=rngs)
        self.per_layer_projection = Linear((p,), (d,), bias=False, rngs=rngs)
        self.post_per_layer_input_norm = RMSNorm(d, eps)
        self.act_fn = ACT[act]

    def __call__(self, x_btd: Array, input_btp: Array) -> Array:
        y_btp = self.act_fn(self.per_layer_input_gate(x_btd)) * input_btp
        return self.post_per_layer_input_norm(self.per_layer_projection(y_btp))


def layer_inputs(model: str, layer: str) -> tuple[W, ...]:
    """The rows of a `LayerInputs` named inputs, and of each layer's `LayerInput`, named input.

    HF's names begin with `model` and with `layer`.
    """
    table, projection, norm = "embed_tokens_per_layer", "per_layer_model_projection", "per_layer_projection_norm"
    gate, back, last = "per_layer_input_gate", "per_layer_projection", "post_per_layer_input_norm"
    own = "layers.{i}.input."
    return (
        W(f"{model}{table}.weight", f"inputs.{table}.embedding", "u q -> u q", P(AXIS, None)),
        W(f"{model}{projection}.weight", f"inputs.{projection}.kernel", "q d -> d q"),
        rms_norm(model + norm, f"inputs.{norm}", width="p"),
        W(f"{layer}{gate}.weight", f"{own}{gate}.kernel", "p d -> d p"),
        W(f"{layer}{back}.weight", f"{own}{back}.kernel", "d p -> p d"),
        rms_norm(layer + last, own + last),
    )
