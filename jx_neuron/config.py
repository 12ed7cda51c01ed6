"""Options of a model besides its checkpoint, named as in transformers-neuronx."""

import dataclasses
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any, Literal

from jx_neuron.continuous_batching import ContinuousBatchingConfig
from jx_neuron.errors import ConfigError
from jx_neuron.nn.dtypes import AMP, dtype_of
from jx_neuron.nn.encoded import StateDtype
from jx_neuron.util.arguments import flag, integer, integers, one_or_each, real, shown

__all__ = [
    "AMP",
    "GQA",
    "ContinuousBatchingConfig",
    "GenerationConfig",
    "KVCacheQuantizationConfig",
    "NeuronConfig",
    "PerRow",
    "QuantizationConfig",
    "dtype_of",
]


class GQA(Enum):
    """How key/value heads are distributed where there are fewer of them than cores."""

    SHARD_OVER_HEADS = "shard-over-heads"
    REPLICATED_HEADS = "replicated-heads"
    SHARD_OVER_BATCH = "shard-over-batch"
    ALL_GATHER_HEADS = "all-gather-heads"


_STORED: dict[str, StateDtype] = {"s8": "int8", "f8e4m3fn": "float8_e4m3", "f16": "float16", "bf16": "bfloat16"}
_CAST, _SCALED = "direct_cast", "vector_dynamic"


@dataclass(frozen=True)
class KVCacheQuantizationConfig:
    """How keys and values are stored: cast, or in int8 with scales. Attention computes in the model's dtype.

    quant_dtype:     s8, f8e4m3fn, f16 or bf16. Of f8e4m3fn the numbers within ±240, which every Neuron device has
                     (float8_e4m3); larger ones become ±240.
    dequant_dtype:   the model's, as `amp` names it; None for whichever that is.
    quantize_method: "vector_dynamic" for s8: each slot, head and position has a float32 scale, max abs(x) / 127.
                     "direct_cast" for the others, as in transformers-neuronx. None for the one of the dtype.

    Raises ConfigError for a value that is not legal.
    """

    quant_dtype: str = "s8"
    dequant_dtype: str | None = None
    quantize_method: str | None = None

    def __post_init__(self) -> None:
        if self.quant_dtype not in _STORED:
            raise ConfigError(f"quant_dtype={shown(self.quant_dtype)} is not legal; it is one of {', '.join(_STORED)}")
        if self.dequant_dtype is not None:
            dtype_of(self.dequant_dtype)
        method = _SCALED if self.quant_dtype == "s8" else _CAST
        if self.quantize_method not in (None, method):
            why = " (a cast to whole numbers would lose keys and values)" if method == _SCALED else ""
            raise ConfigError(
                f"quantize_method={shown(self.quantize_method)} does not go with quant_dtype={self.quant_dtype!r}; "
                f"leave it out, or say {method!r}{why}"
            )
        object.__setattr__(self, "quantize_method", method)

    @property
    def stored(self) -> StateDtype:
        """The dtype of the entries in a state table."""
        return _STORED[self.quant_dtype]


PerRow = float | Sequence[float]

# validation of the fields of GenerationConfig, and of sample's arguments of the same names
READ: dict[str, Callable[..., Any]] = dict(
    max_length=integer,
    do_sample=flag,
    top_k=partial(integer, least=0),
    top_p=partial(real, above=0, most=1),
    temperature=partial(real, least=0),
    global_top_k=integer,
    eos_token_id=partial(integer, least=-1),
    top_p_min_tokens=integer,
    dynamic=flag,
    deterministic=flag,
    per_batch_line=flag,
)
_LINES = ("top_k", "top_p", "temperature", "top_p_min_tokens")


@dataclass
class GenerationConfig:
    """The defaults of `sample`; the fields are its arguments.

    max_length:     the most tokens of prompt and answer, where `sample` gets no sequence_length.
    do_sample:      False takes the most likely token.
    global_top_k:   the number of candidates of compiled programs (the static size of their top-k); `top_k` may be
                    changed up to it without compiling anything.
    eos_token_id:   the token or tokens that end a row, instead of the checkpoint's; -1 for none.
    dynamic:        whether `update_generation_config` may change it, as in transformers-neuronx.
    deterministic:  every draw takes the median of the distribution: the first token at which the cumulative probability
                    exceeds 0.5.
    per_batch_line: top_k, top_p, temperature and top_p_min_tokens have a value for each row.

    Fields may be assigned. A model copies the config when it is made and at `update_generation_config`; a later
    assignment changes no model. Lists become tuples. Equal by value, and not hashable.

    Raises ConfigError for a value that is not legal, also at an assignment; the old value then stays.
    """

    max_length: int | None = None
    do_sample: bool = False
    top_k: int | Sequence[int] = 50
    top_p: PerRow = 1.0
    temperature: PerRow = 1.0
    global_top_k: int = 64
    eos_token_id: int | Sequence[int] | None = None
    top_p_min_tokens: int | Sequence[int] = 1
    dynamic: bool = False
    deterministic: bool = False
    per_batch_line: bool = False  # the last, as those before it are checked by it

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in READ:
            raise ConfigError(f"GenerationConfig has no {name!r}; it has {', '.join(READ)}")
        if value is not None or name not in ("max_length", "eos_token_id"):
            read = partial(one_or_each, read=READ[name]) if name in (*_LINES, "eos_token_id") else READ[name]
            value = read(name, value, error=ConfigError)
        if name == "global_top_k" and value > 1 and value % 8:
            raise ConfigError(f"global_top_k={value} is not legal; it is 1, or a multiple of 8")
        fields = vars(self) | {name: value}
        for line in _LINES:
            if isinstance(fields.get(line), tuple) and not fields.get("per_batch_line", True):
                raise ConfigError(f"{line}={fields[line]} is a list; with per_batch_line=True it holds one value a row")
        object.__setattr__(self, name, value)


_KINDS: dict[str, Literal["int8", "fp8", "int4"]] = {"s8": "int8", "f8e4m3fn": "fp8", "int4": "int4"}
_METHODS = ("vector_dynamic", "direct_cast")


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """Weights in 8 or 4 bits, rounded when a checkpoint is read. docs/quantization.md shows its use.

    The fields of transformers-neuronx, with its meaning:

    quant_dtype:      "s8" or "f8e4m3fn": each output channel has a float32 scale, its largest magnitude over 127 or
                      240, which multiplies the result of a product. Or "int4", which is this package's own: groups of
                      `group_size` inputs have a scale and an offset each.
    dequant_dtype:    f32, f16 or bf16, to which a scaled result is rounded before a bias is added; None for the dtype
                      of activations.
    quantize_method:  "vector_dynamic", or with f8e4m3fn "direct_cast": scales are 1, and weights are cast.
    quantize_attn:    whether the projections of attention and of recurrent layers are quantized too, or only those of
                      MLPs and experts. Embeddings, norms, biases, convolutions and routers never are.
    no_quantize_list: with f8e4m3fn, "model.layers.N" gives the MLP of that layer scales of 1. "self_attn" is legal with
                      quantize_attn=False.

    And of this package:

    group_size:       inputs of a group of int4, an even number, 32 by default. A matrix whose inputs on a core are no
                      multiple of twice as many is stored as s8.
    lm_head:          whether the head is stored as s8 with a scale a token; with it the table of embeddings, where the
                      two are tied.
    keep:             patterns of paths of parameters that are not quantized, such as "layers.0.*" or "*.down_proj.*".

    Raises ConfigError for a value that is not legal.
    """

    quant_dtype: str = "s8"
    dequant_dtype: str | None = None
    quantize_method: str = "vector_dynamic"
    quantize_attn: bool = True
    no_quantize_list: tuple[str, ...] = ()
    group_size: int | None = None
    lm_head: bool = False
    keep: tuple[str, ...] = ()

    @classmethod
    def named(cls, name: str) -> "QuantizationConfig":
        """The config of `--quant` int8, fp8 or int4: all matrices, the head too.

        >>> QuantizationConfig.named("int8").quant_dtype
        's8'
        """
        dtype = next((dtype for dtype, kind in _KINDS.items() if kind == name), None)
        if dtype is None:
            raise ConfigError(f"quant={name!r} is not legal; it is one of {', '.join(_KINDS.values())}")
        return cls(quant_dtype=dtype, lm_head=True)

    def __post_init__(self) -> None:
        dtypes = [*_KINDS]
        for name, legal in (
            ("quant_dtype", dtypes),
            ("dequant_dtype", [None, *AMP]),
            ("quantize_method", _METHODS if self.quant_dtype == "f8e4m3fn" else _METHODS[:1]),
        ):
            if (value := getattr(self, name)) not in legal:
                with_dtype = f" with quant_dtype={self.quant_dtype!r}" if name == "quantize_method" else ""
                raise ConfigError(f"{name}={value!r} is not legal{with_dtype}; it is {_either(legal)}")
        for name in ("quantize_attn", "lm_head"):
            object.__setattr__(self, name, flag(name, getattr(self, name), error=ConfigError))
        for name in ("no_quantize_list", "keep"):
            if isinstance(value := getattr(self, name), str) or not all(isinstance(entry, str) for entry in value):
                raise ConfigError(f"{name}={value!r} is not legal; it is a list of strings")
            object.__setattr__(self, name, tuple(value))
        if self.quant_dtype == "int4":
            size = integer("group_size", 32 if self.group_size is None else self.group_size, least=2, error=ConfigError)
            if size % 2:
                raise ConfigError(f"group_size={size} is not legal; it is an even number, for a byte has two weights")
            object.__setattr__(self, "group_size", size)
        elif self.group_size is not None:
            raise ConfigError(f"group_size={self.group_size} goes with quant_dtype='int4'; leave it out")
        for entry in self.no_quantize_list:
            if entry == "self_attn" and self.quantize_attn:
                raise ConfigError("no_quantize_list has 'self_attn', which goes with quantize_attn=False")
            if entry != "self_attn" and (self.quant_dtype != "f8e4m3fn" or self._layer(entry) is None):
                raise ConfigError(
                    f"no_quantize_list has {entry!r}; legal is 'self_attn', and with quant_dtype='f8e4m3fn' "
                    "'model.layers.N'. To leave weights as they are, give patterns of their paths as keep"
                )

    @property
    def kind(self) -> Literal["int8", "fp8", "int4"]:
        """The name that `--quant` has for it."""
        return _KINDS[self.quant_dtype]

    @property
    def cast_layers(self) -> frozenset[int]:
        """The layers whose MLPs have scales of 1."""
        return frozenset(layer for entry in self.no_quantize_list if (layer := self._layer(entry)) is not None)

    @staticmethod
    def _layer(entry: str) -> int | None:
        match = re.fullmatch(r"model\.layers\.(\d+)", entry)
        return int(match[1]) if match else None


def _either(legal: Sequence[Any]) -> str:
    return " or ".join(map(repr, legal))


# options of transformers-neuronx's code generator that change no result: accepted, with a warning that they do nothing
_NO_EFFECT: dict[str, Any] = dict(
    allow_flash_attention=None,
    attention_layout=None,
    attn_output_transposed=False,
    cache_layout=None,
    collectives_layout=None,
    dynamic_batch_size_inference=False,
    fuse_mlp=False,
    fuse_qkv=False,
    fused_rmsnorm_mlp=False,
    fused_rmsnorm_qkv=False,
    lhs_aligned=None,
    mlp_out_weight_transpose=False,
    on_device_embedding=None,
    qkv_tiling=False,
    sequence_parallel_norm=False,
    sequence_parallel_norm_threshold=2048,
    shard_over_sequence=False,
    use_1d_query=False,
    use_2d_cache_ids=False,
    weight_tiling=False,
)
# options that would change results and are not supported: only these values are legal
_REFUSED: dict[str, Sequence[Any]] = dict(
    all_reduce_dtype=(None, "float32"),
    bf16_rms_norm=(False, None),
    cast_logits_dtype=("float32", None),
    has_pre_attention_norm=(True, None),
    is_eagle_draft=(False, None),
    is_eagle_target=(False, None),
    is_pp=(False, None),
    log_softmax_scores=(False, None),
    optimized_paged_attention=(False, None),
    paged_attention=(None,),
    sparse_attn=(None,),
)


@dataclass(frozen=True, init=False)
class NeuronConfig:
    """Options of the lowered model.

    group_query_attention:     a `GQA`; heads are replicated or padded for the tensor-parallel degree.
    on_device_generation:      a `GenerationConfig`: the defaults of `sample`, and the number of candidates of programs.
    quant:                     a `QuantizationConfig`: weights are stored in 8 or 4 bits.
    output_all_logits:         calling the model returns the logits of every token of the prompt.
    padding_side:              the side of a row on which `start_ids` and `attention_mask` have padding; the right one
                               with continuous_batching.
    compilation_worker_count:  the number of programs that the compiler works on at once.
    strict_sharding:           refuses a tensor-parallel degree for which heads would be padded.
    kv_cache_quant:            a `KVCacheQuantizationConfig`: how keys and values are stored, if not in `amp`.
    speculation_length:        tokens of the programs that verify drafts, 2 to 16, or several such numbers. A draft has
                               one token fewer. None for no such programs. Backend "xla" always has some.
    continuous_batching:       a `ContinuousBatchingConfig`: calls of the model name sequences.

    Raises ConfigError for an option that is unknown, or whose value changes results in a way that is not supported.
    """

    group_query_attention: GQA | None
    on_device_generation: GenerationConfig | None = field(hash=False)
    quant: QuantizationConfig | None
    output_all_logits: bool
    padding_side: str
    compilation_worker_count: int | None
    strict_sharding: bool
    kv_cache_quant: KVCacheQuantizationConfig | None
    speculation_length: tuple[int, ...]
    continuous_batching: ContinuousBatchingConfig | None

    def __init__(
        self,
        *,
        group_query_attention: GQA | str | None = None,
        on_device_generation: GenerationConfig | None = None,
        quant: QuantizationConfig | None = None,
        output_all_logits: bool = False,
        padding_side: str = "left",
        compilation_worker_count: int | None = None,
        strict_sharding: bool = False,
        kv_cache_quant: KVCacheQuantizationConfig | None = None,
        speculation_length: int | Sequence[int] | None = None,
        continuous_batching: ContinuousBatchingConfig | None = None,
        **others: Any,
    ):
        try:
            gqa = None if group_query_attention is None else GQA(group_query_attention)
        except ValueError:
            modes = ", ".join(mode.value for mode in GQA)
            raise ConfigError(f"group_query_attention={group_query_attention!r} may be one of {modes}") from None
        if padding_side not in ("left", "right"):
            raise ConfigError(f"padding_side={padding_side!r} may be left or right")
        if gqa in (GQA.SHARD_OVER_BATCH, GQA.ALL_GATHER_HEADS):
            warnings.warn(f"{gqa} has no effect here: heads are replicated or padded", UserWarning, stacklevel=2)
        for name, given, kind in (
            ("on_device_generation", on_device_generation, GenerationConfig),
            ("quant", quant, QuantizationConfig),
            ("kv_cache_quant", kv_cache_quant, KVCacheQuantizationConfig),
            ("continuous_batching", continuous_batching, ContinuousBatchingConfig),
        ):
            if given is not None and not isinstance(given, kind):
                raise ConfigError(f"{name}={shown(given)} is not legal; it is a jx_neuron.{kind.__name__}")
        if (workers := compilation_worker_count) is not None:
            workers = integer("compilation_worker_count", workers, error=ConfigError)
        for name, value in dict(
            group_query_attention=gqa,
            on_device_generation=on_device_generation,
            quant=quant,
            output_all_logits=flag("output_all_logits", output_all_logits, error=ConfigError),
            padding_side=padding_side if continuous_batching is None else "right",
            compilation_worker_count=workers,
            strict_sharding=flag("strict_sharding", strict_sharding, error=ConfigError),
            kv_cache_quant=kv_cache_quant,
            speculation_length=_lengths(speculation_length),
            continuous_batching=continuous_batching,
        ).items():
            object.__setattr__(self, name, value)
        _check(others)


def _lengths(speculation_length: Any) -> tuple[int, ...]:
    if speculation_length is None:
        return ()
    lengths = integers("speculation_length", speculation_length, least=2, most=16, error=ConfigError)
    return tuple(sorted(set(lengths)))


def _check(options: dict[str, Any]) -> None:
    known = [f.name for f in dataclasses.fields(NeuronConfig)]
    for name, value in options.items():
        if name in _REFUSED:
            if value not in _REFUSED[name]:
                raise ConfigError(
                    f"NeuronConfig({name}={value!r}) is not supported; it may be {_either(_REFUSED[name])}"
                )
        elif name not in _NO_EFFECT:
            legal = ", ".join(sorted([*known, *_NO_EFFECT, *_REFUSED]))
            raise ConfigError(f"NeuronConfig has no {name!r}; it has {legal}")
        elif value != _NO_EFFECT[name]:
            warnings.warn(f"NeuronConfig({name}=…) has no effect here: the compiler decides", UserWarning, stacklevel=4)
