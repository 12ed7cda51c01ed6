"""Rows of weight tables that stack a tensor of each head or expert."""

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import Tensors
from flax import nnx
from jax.sharding import PartitionSpec as P
from weight_rows import checkpoint, made

from jx_neuron.checkpoint.weights import W
from jx_neuron.errors import CheckpointError, ConfigError
from jx_neuron.models import Decoder, llama

pytestmark = pytest.mark.usefixtures("kept_registry")


@dataclass(frozen=True)
class Mixture(llama.Config):
    num_local_experts: int = 4

    MODEL_TYPE: ClassVar[str] = "mixture"

    @property
    def sizes(self) -> dict[str, int]:
        return super().sizes | {"e": self.num_local_experts}


class MixtureModel(llama.Model):
    def __init__(self, cfg: Mixture, rngs: nnx.Rngs):
        super().__init__(cfg, rngs)
        d, f, e = (cfg.sizes[c] for c in "dfe")
        for layer in self.layers:
            layer.w1, layer.w2 = nnx.Param(jnp.zeros((e, d, f))), nnx.Param(jnp.zeros((e, f, d)))


EXPERT = "model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight"
STACKED = "model.layers.{i}.block_sparse_moe.w2"
MIXTURE = (
    *llama.WEIGHTS,
    W(EXPERT, "layers.{i}.w1", "f d -> e d f", P(None, None, "tp")),
    W(STACKED, "layers.{i}.w2", "e d f -> e f d", P(None, "tp")),
)


def mixture(experts: int = 4) -> tuple[dict, dict[str, np.ndarray]]:
    raw = made("mixture", Mixture, MixtureModel, MIXTURE)
    tensors = checkpoint(Decoder.from_config(raw))
    rng = np.random.default_rng(1)
    names = [EXPERT.format(i=i, e=e) for i in range(2) for e in range(experts)]
    return raw, tensors | {name: rng.normal(size=(20, 24)).astype(np.float32) for name in names}


def test_the_tensors_of_all_heads_are_stacked() -> None:
    sizes = dict(n=3, k=2, h=4, e=5)
    scale_n, scale_k = (W(f"norms.{{{letter}}}.weight", letter, f"h -> {letter} h") for letter in "nk")
    assert list(scale_n.names(sizes)) == ["norms.0.weight", "norms.1.weight", "norms.2.weight"]
    assert list(scale_k.names(sizes)) == ["norms.0.weight", "norms.1.weight"]
    tensors = {name: np.full(4, i, np.float32) for i, name in enumerate(scale_n.names(sizes))}
    actual = scale_n.read(SimpleNamespace(sizes=sizes), Tensors(tensors))
    np.testing.assert_array_equal(actual, np.arange(3)[:, None] * np.ones(4))
    assert scale_n.source_shape(sizes) == (4,)


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_the_tensors_of_all_experts_are_stacked(prefix: str) -> None:
    raw, tensors = mixture()
    tensors = {name.replace("model.", prefix): array for name, array in tensors.items()}
    decoder = Decoder.from_config(raw, 3, Tensors(tensors))
    source = decoder.source(Tensors(tensors), np.float32)
    for layer in range(2):
        name = EXPERT.replace("model.", prefix)
        by_hand = np.stack([tensors[name.format(i=layer, e=e)].T for e in range(4)])
        actual = source.read(f"layers.{layer}.w1")
        np.testing.assert_array_equal(actual, np.pad(by_hand, ((0, 0), (0, 0), (0, 1))))  # 20 columns as 21
        stacked = tensors[STACKED.replace("model.", prefix).format(i=layer)]
        np.testing.assert_array_equal(source.read(f"layers.{layer}.w2")[:, :20], stacked.transpose(0, 2, 1))
        assert decoder.abstract_params("float32")[f"layers.{layer}.w1"].shape == actual.shape


def test_experts_that_are_missing_or_too_many_are_named() -> None:
    raw, tensors = mixture()
    missing = EXPERT.format(i=1, e=2)
    changed = {name: array for name, array in tensors.items() if name != missing}
    with pytest.raises(CheckpointError, match=rf"calls for 4 experts and the checkpoint lacks tensor {missing};"):
        Decoder.from_config(raw, 1, Tensors(changed))
    with pytest.raises(CheckpointError, match=r"calls for 2147483647 experts and .* lacks tensors .*experts.4.w1"):
        Decoder.from_config(raw | {"num_local_experts": 2**31 - 1}, 1, Tensors(tensors))
    changed = {name: array for name, array in tensors.items() if "layers.1.block_sparse_moe.experts" not in name}
    with pytest.raises(CheckpointError, match=r"lacks tensor model.layers.1.block_sparse_moe.experts.{e}.w1.weight,"):
        Decoder.from_config(raw).source(Tensors(changed), "f4")
    _, tensors = mixture(experts=5)
    headless = {name.removeprefix("model."): array for name, array in tensors.items()}
    with pytest.raises(CheckpointError, match=r"0\S+.4.w1.weight, \S+1\S+.4.w1.* stacks the 4 experts that"):
        Decoder.from_config(raw).source(Tensors(headless), "f4")
    with pytest.raises(CheckpointError, match=r"0\S+.4.w1.weight, \S+1\S+.4.w1.* stacks the 4 experts that"):
        Decoder.from_config(raw).source(Tensors(tensors), "f4")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(layout="f d -> d f"), "{e} puts an axis e before those of the tensor"),
        (dict(layout="e f d -> e d f"), "no einops pattern"),
        (dict(target="layers.{i}.w1.{e}"), r"'layers.{i}.w1.{e}' has braces; legal are {i}"),
    ],
)
def test_a_row_of_experts_that_does_not_fit_is_named(changes: dict, message: str) -> None:
    rows = [replace(row, **changes) if row.name == EXPERT else row for row in MIXTURE]
    with pytest.raises(ConfigError) as caught:
        made("mixture", Mixture, MixtureModel, rows)
    assert EXPERT in str(caught.value)
    assert message in str(caught.value)
