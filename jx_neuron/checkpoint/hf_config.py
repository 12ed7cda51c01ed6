"""Reading an HF config.json. Each field is honoured, known not to affect the logits, or refused. A field that HF does
not read either is ignored with a warning."""

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from types import UnionType
from typing import Any, ClassVar, Self, Union, get_args, get_origin, get_type_hints

from jx_neuron.errors import ConfigError
from jx_neuron.util.arguments import shown

__all__ = ["FULL", "INERT", "ONLY", "HFConfig", "divisible", "one_of"]

FULL = "full_attention"

# https://github.com/huggingface/transformers/blob/main/src/transformers/configuration_utils.py: fields of any
# model that name it, steer training, describe other heads than the language model's, or are read by generation
INERT = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path _num_labels architectures
    attn_implementation auto_map bos_token_id chunk_size_feed_forward dtype eos_token_id finetuning_task
    gradient_checkpointing id2label initializer_range is_decoder label2id model_type name_or_path num_labels
    output_attentions output_hidden_states pad_token_id prefix problem_type return_dict sep_token_id
    task_specific_params tf_legacy_loss tie_encoder_decoder tie_last_hidden_states tokenizer_class torch_dtype
    torchscript transformers.js_config transformers_version use_bfloat16 use_cache xla_device

    activation_dropout attention_dropout attn_pdrop classifier_dropout dropout emb_pdrop embd_pdrop embed_dropout
    embedding_dropout hidden_dropout init_std layerdrop resid_dropout resid_pdrop residual_dropout

    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj

    assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens decoder_start_token_id
    diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty
    epsilon_cutoff eta_cutoff exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id
    length_penalty max_length min_length no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule
    num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values repetition_penalty
    return_dict_in_generate suppress_tokens target_lookbehind temperature top_k top_p typical_p
    """.split()
)
# Fields that any HF config may have and that HF's code reads, and the only values that decoders here support: of a list
# each element. tests/test_config_fields.py says where HF reads fields that its classes do not declare.
ONLY: Mapping[str, tuple[Any, ...]] = {
    "_heterogeneity_spec": (None,),
    "add_cross_attention": (False,),
    "attention_chunk_size": (None,),
    "attribute_map": ({},),
    "decoder": (None,),
    "fusion_config": (None,),
    "generator": (None,),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "kv_sharing_modes": (None,),
    "layer_types": (None, "full_attention"),
    "per_layer_config": (None, {}),
    "quantization_config": (None,),
    "sliding_window": (None,),
    "text_config": (None,),
    "text_encoder": (None,),
    "transformers_weights": (None,),
    "use_bidirectional_attention": (None, False),
}
_MOST_LAYERS = 500  # the deepest public decoders have some 130; building 500 takes seconds
_MOST_NAMES = 60  # names in a warning, and letters of each
_INTEGERS = 1, 2**31 - 1  # positions and token ids are int32
_FLOATS = 1.1754944e-38, 3.4028234e38  # the positive numbers of float32
# names of the number of layers, and of the longest sequence, in HF's configs and their attribute_map
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_POSITIONS = ("max_position_embeddings", "n_positions")


class HFConfig:
    """Base of a family's frozen `Config` dataclass. Its fields have HF's names and defaults.

    `MODEL_TYPE` is the HF model_type. `INERT` names further fields that HF does not read in inference. `ONLY` gives the
    legal values of fields that are supported in part. `ALIASES` is HF's attribute_map: other names of fields. `sizes`
    gives the size of each axis letter of the family's weight table, among them d, n, k, h and v.

    `LAYERS_ALIKE` says that layers of one type and window have the same shapes of parameters and state, and the same
    collectives. If all layers have one type and window, a plan then builds only one of them.

    Values must have the types of their fields. Integers are positive and below 2³¹, floats are positive numbers of
    float32. Both may be 0 where that is the default, and are at least the "least" of a field's metadata.

    Other fields are refused. Where `COMPLETE` is true, the fields, `INERT` and `ONLY` name all that HF's class declares
    and its code reads, so that others change nothing: these are ignored, and named in one warning. null, {} and the
    values of `USUAL` are ignored silently.
    """

    MODEL_TYPE: ClassVar[str]
    INERT: ClassVar[frozenset[str]] = frozenset()
    ONLY: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    ALIASES: ClassVar[Mapping[str, str]] = {}
    COMPLETE: ClassVar[bool] = False
    LAYERS_ALIKE: ClassVar[bool] = False
    USUAL: ClassVar[Mapping[str, Any]] = {}

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each axis letter of the weight table; each family has its own. Raises ConfigError otherwise."""
        raise ConfigError(
            f"{self.MODEL_TYPE}: Config has no property `sizes`; give it one that returns the size of each axis letter "
            "of WEIGHTS, such as dict(d=self.hidden_size, n=…, k=…, h=…, f=…, v=self.vocab_size)"
        )

    def sizes_of(self, layer: int) -> dict[str, int]:
        """The sizes in one layer, of the same letters: `sizes`, unless a family's layers differ."""
        return self.sizes

    @property
    def layers(self) -> int:
        """The number of decoder layers.

        By default HF's field, `num_hidden_layers`, `n_layer`, `n_layers` or `num_layers`. Raises ConfigError if the
        config has none of them.
        """
        for value in self._values(_LAYERS):
            return int(value)
        raise ConfigError(
            f"{self.MODEL_TYPE}: Config has none of the fields {', '.join(_LAYERS)}; add the one of HF's config, or a "
            "property `layers` that returns how many decoder layers there are"
        )

    @property
    def max_positions(self) -> int | None:
        """The longest sequence, prompt and answer together, for which the model has positions; None without a limit.

        By default HF's field, `max_position_embeddings` or `n_positions`, or None without such a field. A family whose
        positions are computed (RoPE, ALiBi) returns None.
        """
        return next(self._values(_POSITIONS), None)

    @property
    def chosen(self) -> int | None:
        """The number of experts that a token is computed by, of the e in `sizes`; None without experts."""
        return None

    @property
    def types(self) -> Sequence[str]:
        """The type of each layer, as HF's layer_types has them: rows of STATE may be of one type."""
        return [FULL] * self.layers

    @property
    def own_state(self) -> Sequence[bool]:
        """Whether each layer has its own state. A layer without one reads the state of the last layer before it with
        the same type, sizes and window; its block gives `attend` no keys and values."""
        return [True] * self.layers

    @property
    def windows(self) -> Sequence[int | None]:
        """The number of last positions that each layer attends to, including the token's own; None for all.

        A layer keeps only these positions, so its block must call `attend` with the same window.
        """
        return [None] * self.layers

    @property
    def layers_alike(self) -> bool:
        """Whether one layer tells the sizes and collectives of all."""
        return self.LAYERS_ALIKE and len({*zip(self.types, self.windows, strict=True)}) == 1

    def with_layers(self, layers: int) -> Self:
        """The same config with its first `layers`, or more where no field lists them, in HF's field.

        Raises ConfigError where there is none.
        """
        fields = {f.metadata.get("hf", f.name): f.name for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        types = getattr(self, "layer_types", None)
        changes = {} if types is None else {"layer_types": types[:layers]}
        for name in _LAYERS:
            if name in fields:
                return dataclasses.replace(self, **changes, **{fields[name]: layers})  # type: ignore[type-var]
        raise ConfigError(
            f"{self.MODEL_TYPE}: Config says LAYERS_ALIKE, and has none of the fields {', '.join(_LAYERS)}; "
            "set LAYERS_ALIKE = False"
        )

    def _values(self, names: Sequence[str]) -> Iterator[Any]:
        """The values of the fields that HF calls one of `names`."""
        fields = {f.metadata.get("hf", f.name): f.name for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return (getattr(self, fields[name]) for name in names if name in fields)

    @property
    def unread(self) -> Sequence[str]:
        """Names of entries within fields, such as rope_scaling, that HF does not read."""
        return ()

    @property
    def rotations(self) -> tuple[int, bool] | None:
        """Where RoPE depends on the length of the prompt: RopeScaling's `rotations`."""
        return None

    @property
    def trained_positions(self) -> int | None:
        """The longest sequence that the model was trained on, by HF's field; None where there is none."""
        fields = self.to_hf()
        return fields.get("max_position_embeddings") or fields.get("n_positions") or self.max_positions

    def beyond_training(self, n_positions: int) -> str | None:
        """A warning about positions that the model was not trained on; None where there are none.

        >>> from jx_neuron.models.llama import Config
        >>> Config(max_position_embeddings=256).beyond_training(300)
        'n_positions=300 is beyond the 256 positions that the model was trained on: answers get worse past them'
        """
        trained = self.trained_positions
        if trained is None or n_positions <= trained:
            return None
        return (
            f"n_positions={n_positions} is beyond the {trained} positions that the model was trained on: "
            "answers get worse past them"
        )

    def to_hf(self) -> dict[str, Any]:
        """The fields as config.json has them."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return {field.metadata.get("hf", field.name): getattr(self, field.name) for field in fields}

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> Self:
        """The config of a parsed config.json.

        Raises ConfigError, which names any unsupported field, and warns of fields that HF does not read.
        """
        fields = {f.metadata.get("hf", f.name): f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        hints = get_type_hints(cls)
        inert, only = INERT | cls.INERT, {**ONLY, **cls.ONLY}
        values: dict[str, Any] = {}
        ignored = []
        for key, value in raw.items():
            name = cls.ALIASES.get(key, key)
            if field := fields.get(name):
                parsed = _read(f"{cls.MODEL_TYPE}: {key}", value, hints[field.name], field)
                if values.setdefault(field.name, parsed) != parsed:
                    twins = " and ".join(f"{k}={shown(raw[k])}" for k in raw if cls.ALIASES.get(k, k) == name)
                    raise ConfigError(f"{cls.MODEL_TYPE}: {twins} are one field; keep the one that is meant")
            elif key in inert:
                continue
            elif key in only:
                items = value if value and isinstance(value, list) else [value]
                if not all(item in only[key] for item in items):
                    legal = " or ".join(repr(v) for v in only[key])
                    raise ConfigError(
                        f"{cls.MODEL_TYPE}: {key}={shown(value)} is not supported, only {legal}; "
                        "change the checkpoint's config.json, or register a decoder of your own that honours it"
                    )
            elif not cls.COMPLETE:
                raise ConfigError(
                    f"{cls.MODEL_TYPE}: config field {key!r} is not known here, so {key}={shown(value)} cannot be "
                    f"honoured; known are {', '.join(sorted(fields))}. Remove it from config.json if it does not "
                    "change the model"
                )
            elif value not in (None, {}, cls.USUAL.get(key)):
                ignored.append(key)
        _check_layers(cls.MODEL_TYPE, [values.get(fields[name].name, 0) for name in _LAYERS if name in fields])
        try:
            config = cls(**values)
        except TypeError as error:
            raise ConfigError(f"{cls.MODEL_TYPE}: {error}") from error
        _check_layers(cls.MODEL_TYPE, [config.layers])
        if ignored := [*ignored, *config.unread]:
            names = ", ".join(repr(name[:_MOST_NAMES]) for name in sorted(ignored)[:_MOST_NAMES])
            more = f" and {len(ignored) - _MOST_NAMES} more" if len(ignored) > _MOST_NAMES else ""
            message = f"{cls.MODEL_TYPE}: fields of config.json that HF does not read are ignored: {names}{more}"
            warnings.warn(message, UserWarning, stacklevel=2)
        return config


def _check_layers(model_type: str, counts: Sequence[int]) -> None:
    """Raises ConfigError where one of `counts` is more layers than are built."""
    if most := next((count for count in counts if count > _MOST_LAYERS), None):
        raise ConfigError(f"{model_type}: {most} layers are too many; at most {_MOST_LAYERS} are built")


def _read(name: str, value: object, hint: Any, field: "dataclasses.Field[Any]") -> object:
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    types = [get_origin(option) or option for option in options]
    if type(value) not in types and not (float in types and type(value) is int):
        names = " or ".join("null" if t is type(None) else t.__name__ for t in types)
        raise ConfigError(f"{name}={shown(value)} is of the wrong type; it should be {names}")
    if type(value) in (int, float):
        least, most = _FLOATS if float in types else _INTEGERS
        in_range(name, value, field.metadata.get("least", 0 if field.default == 0 else least), most)
    return float(value) if type(value) is int and int not in types else value


def in_range(name: str, value: Any, least: float, most: float) -> None:
    """Raises ConfigError unless `value` is an integer or a float from `least` to `most`, which NaN is not."""
    if type(value) not in (int, float) or not least <= value <= most:
        raise ConfigError(f"{name}={shown(value)} should be a number from {least:.10g} to {most:.10g}")


def one_of(model_type: str, field: str, value: object, legal: Mapping[str, object]) -> None:
    """Raises ConfigError unless `value` is a key of `legal`."""
    if value not in legal:
        raise ConfigError(f"{model_type}: {field}={shown(value)} is not supported; it may be one of {', '.join(legal)}")


def divisible(model_type: str, field: str, value: int, by: str, divisor: int) -> None:
    """Raises ConfigError unless `divisor` divides `value`."""
    if divisor < 1 or value % divisor:
        raise ConfigError(f"{model_type}: {field}={value} is not divisible by {by}={divisor}")
