"""What an author of a decoder gets wrong is named: the part or the row, what would be legal, and what to do."""

import dataclasses
import re
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import transformers
from flax import nnx
from jax.sharding import PartitionSpec as P

from jx_neuron import NeuronAutoModelForCausalLM, model_types, register
from jx_neuron.checkpoint.hf_config import HFConfig
from jx_neuron.checkpoint.weights import Copy, W
from jx_neuron.errors import CheckpointError, ConfigError
from jx_neuron.integrations.parity import parity
from jx_neuron.models import Decoder, gpt2, llama, opt
from jx_neuron.nn.layers import Layers, Linear

pytestmark = pytest.mark.usefixtures("kept_registry")
NAME = "my_gpt2"
SIZES = dict(vocab_size=61, n_positions=32, n_embd=32, n_layer=2, n_head=4)


@dataclass(frozen=True)
class Config(gpt2.Config):
    vocab_size: int = 61
    n_positions: int = 32
    n_embd: int = 32
    n_layer: int = 2
    n_head: int = 4

    MODEL_TYPE: ClassVar[str] = NAME


def family(**parts: object) -> SimpleNamespace:
    return SimpleNamespace(**(dict(Config=Config, Model=gpt2.Model, WEIGHTS=gpt2.WEIGHTS, IGNORE=gpt2.IGNORE) | parts))


def table(parameter: str, **changes: object) -> tuple[W, ...]:
    """GPT-2's, but for the row of `parameter`."""
    assert any(row.target == parameter for row in gpt2.WEIGHTS)
    return tuple(replace(row, **changes) if row.target == parameter else row for row in gpt2.WEIGHTS)


def refused(of: object, *said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        register(NAME, of)
    for text in said:
        assert text in str(raised.value)
    assert NAME not in model_types()


def hf(**options: object) -> transformers.GPT2LMHeadModel:
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES | options)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


KERNEL, BIAS = "layers.{i}.c_attn.kernel", "layers.{i}.c_attn.bias"
UP = "layers.{i}.mlp.up_proj"


@pytest.mark.parametrize(
    ("target", "changes", "said"),
    [
        (
            KERNEL,
            dict(target="layers.{i}.c_atn.kernel"),
            ("did you mean 'layers.{i}.c_attn.kernel'?", "every parameter of Model"),
        ),
        (KERNEL, dict(layout="d (c n q) -> d c n q"), ("no letter 'q'", "it has c, d, f, h, k, n, s, v")),
        (
            KERNEL,
            dict(layout="d (c n h) -> d c n"),
            ("the same letters before and after the arrow", "'(n h) d -> d n h'"),
        ),
        (KERNEL, dict(layout="d (c n h -> d c n h"), ("no einops pattern", "Imbalanced parentheses")),
        (KERNEL, dict(layout="d (c n h) => d c n h"), ("no einops pattern", "legal are letters from HF's axes")),
        (KERNEL, dict(layout="d (c n h) -> d (c n h)"), ("no parentheses after the arrow",)),
        ("norm.scale", dict(layout="d () -> d"), ("no other axes",)),
        ("norm.scale", dict(layout="d ... -> d"), ("no other axes",)),
        (KERNEL, dict(layout="d (c n h) -> c d n h"), ("ends in c d n h, so [3, 32, 4, 8]", "has shape [32, 3, 4, 8]")),
        (
            KERNEL,
            dict(partition=P(None, None, "pt")),
            ("the partition P(None, None, 'pt') is not legal", "'tp', the mesh's only axis"),
        ),
        (KERNEL, dict(partition=P("tp", None, "tp")), ("for one of them 'tp'",)),
        (KERNEL, dict(partition=P(None, None, None, None, "tp")), ("each of the 4 axes d c n h",)),
        (KERNEL, dict(source="transformer.h.{l}.attn.c_attn.weight"), ("legal are {i}, which stands for the layer",)),
        ("norm.scale", dict(source="transformer.h.{i}.ln_f.weight"), ("the layer {i}", "write it in both")),
        (BIAS, dict(target=KERNEL, layout="(c n h) -> c n h"), ("2 rows fill 'layers.0.c_attn.kernel'", "keep one")),
    ],
)
def test_a_row_that_does_not_fit_is_named(target: str, changes: dict, said: tuple[str, ...]) -> None:
    rows = table(target, **changes)
    (wrong,) = set(rows) - set(gpt2.WEIGHTS)
    refused(family(WEIGHTS=rows), changes.get("source", wrong.source).split("{")[0], *said)


def test_a_parameter_without_a_row_is_named_once_for_all_layers() -> None:
    rows = [row for row in gpt2.WEIGHTS if row.target != BIAS]
    refused(family(WEIGHTS=rows), "no row of the weight table fills layers.{i}.c_attn.bias; every parameter of Model")


class WithoutLogits(nnx.Module):
    def __call__(self, tokens_bt, state, at): ...


class Misnamed(WithoutLogits):
    def logit(self, x_btd): ...


class TooFew(WithoutLogits):
    def __call__(self, tokens_bt, state): ...

    def logits(self, x_btd): ...


class Plain(HFConfig):
    MODEL_TYPE = NAME


@dataclass(frozen=True)
class Unsized(HFConfig):
    num_hidden_layers: int = 2

    MODEL_TYPE = NAME


@dataclass(frozen=True)
class Layerless(HFConfig):
    hidden_size: int = 8

    MODEL_TYPE = NAME
    sizes = gpt2.Config(**SIZES).sizes


@dataclass(frozen=True)
class Nameless(HFConfig):
    num_hidden_layers: int = 2


@dataclass(frozen=True)
class Required(HFConfig):
    layers: int

    MODEL_TYPE = NAME


class WithoutHeads(Config):
    sizes = {letter: size for letter, size in gpt2.Config(**SIZES).sizes.items() if letter not in "nk"}  # noqa: RUF012


class Halves(Config):
    sizes = gpt2.Config(**SIZES).sizes | {"h": 8.0}


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (dict(Model=WithoutLogits), "Model has no method logits; it needs __call__(self, tokens_bt, state, at)"),
        (dict(Model=Misnamed), "did you mean logits by logit?"),
        (dict(Model=nnx.Module), "Model has no method __call__"),
        (dict(Model=TooFew), "Model.__call__ should take 3 arguments after self"),
        (dict(Model=object), "class Model(nnx.Module)"),
        (dict(Config=Plain), "@dataclass(frozen=True) class Config(HFConfig)"),
        (dict(Config=dict), "@dataclass(frozen=True) class Config(HFConfig)"),
        (dict(Config=Nameless), f"Config should say MODEL_TYPE = {NAME!r}"),
        (dict(Config=Required), "the field 'layers' of Config needs a default"),
        (dict(Config=WithoutHeads), "Config.sizes lacks n, k; it needs d (model width), n (query heads)"),
        (dict(Config=Halves), "Config.sizes['h']=8.0 is not legal"),
        (dict(WEIGHTS="v d -> v d"), "WEIGHTS should be a sequence of W"),
        (dict(WEIGHTS=[("a", "b", "d -> d")]), "WEIGHTS should be a sequence of W"),
        (dict(IGNORE=r"h\.\d+\.attn\.bias"), "one in parentheses needs a comma after it"),
        (dict(IGNORE=[r"h\.(\d+"]), "is no regular expression (missing )"),
    ],
)
def test_a_part_of_the_wrong_kind_is_named(parts: dict, said: str) -> None:
    refused(family(**parts), said)


def test_a_misspelt_part_is_suggested() -> None:
    refused(SimpleNamespace(Config=Config, Model=gpt2.Model, WEIGHT=(), IGNORE=()), "did you mean WEIGHTS by WEIGHT?")


def test_a_config_without_sizes_or_layers_says_what_to_add() -> None:
    refused(family(Config=Unsized), "Config has no property `sizes`")
    with pytest.raises(ConfigError, match=r"has none of the fields num_hidden_layers, n_layer, .* a property `layers`"):
        Layerless().layers  # noqa: B018


@pytest.mark.parametrize("hf_name", ["num_hidden_layers", "n_layer", "n_layers", "num_layers"])
def test_layers_and_positions_are_hf_s_fields(hf_name: str) -> None:
    @dataclass(frozen=True)
    class Short(HFConfig):
        depth: int = field(default=3, metadata={"hf": hf_name})
        n_positions: int = 77

        MODEL_TYPE: ClassVar[str] = "short"

    assert (Short.from_hf({hf_name: 5}).layers, Short().layers) == (5, 3)
    assert Short.from_hf({"n_positions": 12}).max_positions == 12
    assert Unsized().max_positions is None


@pytest.mark.parametrize("module", [gpt2, llama, opt], ids=lambda m: m.__name__)
def test_rows_of_parameters_that_a_switch_makes_are_no_fault(module) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        register(NAME, module)
    said = [str(warning.message) for warning in caught]
    if module is opt:  # project_in and project_out come with a width, which is no switch
        assert len(said) == 1
        assert set(re.findall(r"\'(project_\w+\.kernel)\'", said[0])) == {"project_in.kernel", "project_out.kernel"}
    else:
        assert said == []


def test_a_row_that_nothing_uses_is_named_in_a_warning() -> None:
    stray = W("transformer.extra.weight", "extra.kernel", "d -> d")
    with pytest.warns(UserWarning, match=r"fill no parameter.*W\('transformer.extra.weight', 'extra.kernel'.*Remove"):
        register(NAME, family(WEIGHTS=(*gpt2.WEIGHTS, stray)))
    assert NAME in model_types()


def test_what_a_checkpoint_s_config_brings_out_is_named_on_first_use() -> None:
    misspelt = table("lm_head.embedding", target="lm_hed.embedding")
    with pytest.warns(UserWarning, match="lm_hed"):
        register(NAME, family(WEIGHTS=misspelt))
    raw = {"model_type": NAME, **SIZES}
    assert Decoder.from_config(raw).config.layers == 2
    with pytest.raises(ConfigError, match=r"lm_hed.embedding', which Model has not: did you mean 'lm_head.embedding'"):
        Decoder.from_config(raw | {"tie_word_embeddings": False})


def test_a_config_that_cannot_be_made_of_defaults_is_checked_on_first_use() -> None:
    @dataclass(frozen=True)
    class Without(Config):
        n_inner: int = field(kw_only=True)

        MODEL_TYPE: ClassVar[str] = NAME

    register(NAME, family(Config=Without, WEIGHTS=table(KERNEL, partition=P("model"))))
    with pytest.raises(ConfigError, match="the mesh's only axis"):
        Decoder.from_config({"model_type": NAME, "n_inner": 64})


def test_a_table_for_a_module_in_hand_is_checked() -> None:
    config = Config()
    with pytest.raises(ConfigError, match="ends in d v, so"):
        NeuronAutoModelForCausalLM.from_module(
            gpt2.Model(config, nnx.Rngs(0)), config, weights=table("embed_tokens.embedding", layout="v d -> d v")
        )


def test_an_axis_split_in_one_row_alone_is_named_where_it_is_padded() -> None:
    register(NAME, family(WEIGHTS=table(BIAS, partition=P())))
    raw = {"model_type": NAME, **SIZES}
    assert Decoder.from_config(raw, 4).padding.size("n") == 4  # four heads on four cores: nothing is padded
    with pytest.raises(ConfigError, match=r"c_attn.bias'.* leaves the axis 'n' whole.*it has 4 entries .* and 6 in"):
        Decoder.from_config(raw, 3)


class Biasless(gpt2.Block):
    def __init__(self, cfg, layer, rngs):
        super().__init__(cfg, layer, rngs)
        self.mlp.up_proj = Linear((cfg.n_embd,), (4 * cfg.n_embd,), bias=False, rngs=rngs)


class Half(gpt2.Block):
    """Wrong from its second layer on."""

    def __init__(self, cfg, layer, rngs):
        super().__init__(cfg, layer, rngs)
        self.scale = self.scale / (1 + layer)


class Model(gpt2.Model):
    block: type[gpt2.Block]

    def __init__(self, cfg, rngs):
        super().__init__(cfg, rngs)
        self.layers = Layers(self.block(cfg, i, rngs) for i in range(cfg.n_layer))


class OfBiasless(Model):
    block = Biasless


class OfHalf(Model):
    block = Half


class Doubled(gpt2.Model):
    def logits(self, x_btd):
        return 2 * super().logits(x_btd)


class Shifted(gpt2.Model):
    def __call__(self, tokens_bt, state, at):
        return super().__call__(tokens_bt, state, dataclasses.replace(at, position_bt=at.position_bt + 1))


def test_a_forgotten_bias_is_named_with_its_row() -> None:
    with pytest.warns(UserWarning, match=f"{UP}.bias"):
        register(NAME, family(Model=OfBiasless))
    with pytest.raises(CheckpointError, match=r"W\('transformer.h.0.mlp.c_fc.bias', .*bias=False") as raised:
        parity(hf(), model_type=NAME)
    assert "not of the same model" not in str(raised.value)
    rows = [row for row in gpt2.WEIGHTS if row.target != f"{UP}.bias"]
    register(NAME, family(Model=OfBiasless, WEIGHTS=rows))
    with pytest.raises(CheckpointError, match=r"h.0.mlp.c_fc.bias.*a parameter in Model and a row in WEIGHTS"):
        parity(hf(), model_type=NAME)


def test_a_layout_that_is_not_hf_s_is_named() -> None:
    register(NAME, family(WEIGHTS=table(f"{UP}.kernel", layout="f d -> d f")))
    with pytest.raises(CheckpointError, match=r"\[32, 128\] .* \[128, 32\], by the layout 'f d -> d f'.*is wrong"):
        parity(hf(), model_type=NAME)


@pytest.mark.few(1)
@pytest.mark.parametrize("tp_degree", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("model", "first"),
    [
        (Shifted, "the embeddings, by"),
        pytest.param(OfHalf, "layer 1, by", marks=pytest.mark.slow),
        (Doubled, "no hidden state of the longest prompt: the logits of Model.logits"),
    ],
)
def test_parity_names_what_differs_first(model: type, first: str, tp_degree: int) -> None:
    register(NAME, family(Model=model))
    original = hf(n_layer=3)
    result = parity(original, model_type=NAME, steps=1, tp_degree=tp_degree)
    assert result.worst > 1e-3
    assert result.first_difference is not None
    assert result.first_difference.startswith(first)
    right = parity(original, steps=1, tp_degree=tp_degree)
    assert right.worst < 1e-5
    assert right.first_difference is None


def test_a_copy_of_a_tied_head_has_to_equal_it(tmp_path: Path) -> None:
    register(NAME, family(IGNORE=(Copy("lm_head.weight", of="transformer.wte.weight"),)))
    assert parity(hf(), model_type=NAME, steps=1).worst < 1e-5
    register(NAME, family(IGNORE=()))
    with pytest.raises(CheckpointError, match=r"holds tensor lm_head.weight, which no parameter takes.*a tied head"):
        parity(hf(), model_type=NAME, steps=1)
