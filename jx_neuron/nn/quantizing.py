"""Which matrices of a module a QuantizationConfig quantizes, and how."""

from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from flax import nnx

from jx_neuron.config import QuantizationConfig
from jx_neuron.errors import ConfigError
from jx_neuron.nn.experts import ExpertLinear, Experts
from jx_neuron.nn.layers import Embedding, LinearParams
from jx_neuron.nn.quantized import Form, Quantized
from jx_neuron.nn.sublayers import MLP, GatedMLP

EXEMPT = frozenset(("logits", "gate", "dt", "a", "b"))
"""Layers with an output an expert or a head: those of routers, of gates, and of a recurrence's steps and decays."""

HEADS = ("lm_head", "embed_tokens")
"""Names of the table of the head; the first that exists is used. The second is the table of embeddings too."""

Path = tuple[Any, ...]


def forms(module: Any, config: QuantizationConfig, on_core: Callable[[str], tuple[int, ...]]) -> dict[str, Form]:
    """How each parameter that `config` quantizes is stored, by path.

    on_core: the shape of a parameter's part on one core.

    Raises ConfigError for layers of no_quantize_list, and patterns of keep, that the module does not have.
    """
    nodes = dict(nnx.iter_graph(module))
    mlps = [path for path, node in nodes.items() if isinstance(node, MLP | GatedMLP | Experts)]
    layers = {_layer(path) for path in nodes}
    if absent := sorted(config.cast_layers - layers):
        raise ConfigError(
            f"no_quantize_list has model.layers.{absent[0]}, and the model has {len(layers - {None})} layers"
        )
    unused = set(config.keep)

    def is_kept(name: str) -> bool:
        matches = {pattern for pattern in config.keep if fnmatchcase(name, pattern)}
        unused.difference_update(matches)
        return bool(matches)

    def of_matrix(name: str, path: Path, node: Any) -> Form:
        inputs, lead = (1, 1) if isinstance(node, ExpertLinear) else (node.axes, 0)
        is_mlp = _within(path, mlps)
        cast = config.quantize_method == "direct_cast" or (is_mlp and _layer(path) in config.cast_layers)
        kind, group = config.kind, config.group_size or 0
        if group and on_core(name)[lead + inputs - 1] % (2 * group):  # a byte has codes of two groups
            kind, group = "int8", 0
        return Form(kind, inputs, lead, group, cast=cast, result=config.dequant_dtype)

    def quantized() -> Iterator[tuple[str, Form]]:
        for path, node in nodes.items():
            if not isinstance(node, LinearParams | ExpertLinear) or _layer(path) is None or path[-1] in EXEMPT:
                continue
            name = ".".join(map(str, (*path, "kernel")))
            if (config.quantize_attn or _within(path, mlps)) and not is_kept(name):
                yield name, of_matrix(name, path, node)
        if config.lm_head and (head := _head(nodes)) and not is_kept(head):
            yield head, Form("int8", 1, rows=True)

    found = dict(sorted(quantized()))
    if unused:
        raise ConfigError(f"keep has {sorted(unused)[0]!r}, which no parameter matches that would be quantized")
    if not found:
        raise ConfigError("quantize_attn=False and keep leave no matrix to quantize; quantize more, or leave quant out")
    return found


def notes(forms: Mapping[str, Form], config: QuantizationConfig | None) -> Iterator[str]:
    """The parameters that `forms` stores in another form than `config` says, and the reasons."""
    if config is None:
        return
    wider = [path for path, form in forms.items() if not form.rows and form.kind != config.kind]
    if wider:
        yield (
            f"{len(wider)} of {len(forms)} quantized matrices are stored in int8, such as {wider[0]}: their inputs on "
            f"a core are no multiple of two groups of {config.group_size}; a smaller group_size may fit"
        )
    if config.lm_head and not any(form.rows for form in forms.values()):
        yield "the head is not quantized: keep names it, or the model calls it otherwise"


def _head(nodes: Mapping[Path, Any]) -> str | None:
    """The path of the head's table; None where it is called otherwise."""
    return next((f"{name}.embedding" for name in HEADS if isinstance(nodes.get((name,)), Embedding)), None)


def replace(module: Any, forms: Mapping[str, Form]) -> None:
    """Replaces the parameters of `forms` in a module of shapes by `Quantized`, without arrays."""
    for path, node in list(nnx.iter_graph(module)):
        for name in ("kernel", "embedding"):
            if (form := forms.get(".".join(map(str, (*path, name))))) is not None:
                setattr(node, name, Quantized(form))


def _layer(path: Path) -> int | None:
    return next((part for part in path if isinstance(part, int)), None)


def _within(path: Path, others: list[Path]) -> bool:
    return any(path[: len(other)] == other for other in others)
