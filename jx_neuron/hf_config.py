"""Reading an HF config.json strictly: each field is consumed, known not to bear on the logits, or refused."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from types import UnionType
from typing import Any, ClassVar, Self, get_args, get_origin, get_type_hints

from jx_neuron.errors import ConfigError

__all__ = ["INERT", "ONLY", "HFConfig", "divisible", "one_of"]

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

    assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens decoder_start_token_id
    diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty
    epsilon_cutoff eta_cutoff exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id
    length_penalty max_length min_length no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule
    num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values repetition_penalty
    return_dict_in_generate suppress_tokens target_lookbehind temperature top_k top_p typical_p
    """.split()
)
# fields that any HF config may carry, and the only values under which a decoder here means the same
ONLY: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
}
# what HF's configs and their attribute_map call the number of layers, and the longest sequence
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_POSITIONS = ("max_position_embeddings", "n_positions")


class HFConfig:
    """Base of a family's frozen `Config` dataclass, whose fields are named and defaulted as HF's.

    `MODEL_TYPE` is the HF model_type; `INERT` names further fields that HF itself reads nowhere when it infers;
    `ONLY` gives the legal values of fields that are supported in part. `sizes` gives the size of each axis
    letter that the family's weight table uses, among them d, n, k, h and v. Values are held to the type hints of
    their fields, and integers to 1 or more, or 0 or more where that is the default.
    """

    MODEL_TYPE: ClassVar[str]
    INERT: ClassVar[frozenset[str]] = frozenset()
    ONLY: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each axis letter of the weight table; each family has its own. Raises ConfigError otherwise."""
        raise ConfigError(
            f"{self.MODEL_TYPE}: Config has no property `sizes`; give it one that returns the size of each axis letter "
            "of WEIGHTS, such as dict(d=self.hidden_size, n=…, k=…, h=…, f=…, v=self.vocab_size)"
        )

    @property
    def layers(self) -> int:
        """How many decoder layers, each with a cache of its own.

        By default HF's field, `num_hidden_layers`, `n_layer`, `n_layers` or `num_layers`. Raises ConfigError where
        there is none.
        """
        for value in self._values(_LAYERS):
            return int(value)
        raise ConfigError(
            f"{self.MODEL_TYPE}: Config has none of the fields {', '.join(_LAYERS)}; add the one of HF's config, or a "
            "property `layers` that returns how many decoder layers there are"
        )

    @property
    def max_positions(self) -> int | None:
        """The longest sequence, prompt and answer together, that the model has positions for; None if any.

        By default HF's field, `max_position_embeddings` or `n_positions`, or None where there is none. A family whose
        positions are computed (RoPE, ALiBi), and so have no end, returns None.
        """
        return next(self._values(_POSITIONS), None)

    def _values(self, names: Sequence[str]) -> Iterator[Any]:
        """The values of the fields that HF calls one of `names`."""
        fields = {f.metadata.get("hf", f.name): f.name for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return (getattr(self, fields[name]) for name in names if name in fields)

    def to_hf(self) -> dict[str, Any]:
        """The fields as config.json has them."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return {field.metadata.get("hf", field.name): getattr(self, field.name) for field in fields}

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> Self:
        """The config of a parsed config.json. Raises ConfigError that names any field it cannot honour."""
        fields = {f.metadata.get("hf", f.name): f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        hints = get_type_hints(cls)
        only = {**ONLY, **cls.ONLY}
        values = {}
        for key, value in raw.items():
            if key in fields:
                field = fields[key]
                _check(cls.MODEL_TYPE, key, value, hints[field.name], least=0 if field.default == 0 else 1)
                values[field.name] = value
            elif key in only:
                if value not in only[key]:
                    legal = " or ".join(repr(v) for v in only[key])
                    raise ConfigError(
                        f"{cls.MODEL_TYPE}: {key}={value!r} is not supported, only {legal}; "
                        "change the checkpoint's config.json, or register a decoder of your own that honours it"
                    )
            elif key not in INERT and key not in cls.INERT:
                raise ConfigError(
                    f"{cls.MODEL_TYPE}: config field {key!r} is not known here, so {key}={value!r} cannot be "
                    f"honoured; known are {', '.join(sorted(fields))}. Remove it from config.json if it does not "
                    "change the model"
                )
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"{cls.MODEL_TYPE}: {error}") from error


def _check(model_type: str, field: str, value: object, hint: Any, least: int) -> None:
    options = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    types = [get_origin(option) or option for option in options]
    if type(value) not in types and not (float in types and type(value) is int):
        names = " or ".join("null" if t is type(None) else t.__name__ for t in types)
        raise ConfigError(f"{model_type}: {field}={value!r} is of the wrong type; it should be {names}")
    if type(value) is int and value < least:
        raise ConfigError(f"{model_type}: {field}={value!r} should be at least {least}")


def one_of(model_type: str, field: str, value: object, legal: Mapping[str, object]) -> None:
    """Raises ConfigError unless `value` is a key of `legal`."""
    if value not in legal:
        raise ConfigError(f"{model_type}: {field}={value!r} is not supported; it may be one of {', '.join(legal)}")


def divisible(model_type: str, field: str, value: int, by: str, divisor: int) -> None:
    """Raises ConfigError unless `divisor` divides `value`."""
    if divisor < 1 or value % divisor:
        raise ConfigError(f"{model_type}: {field}={value} is not divisible by {by}={divisor}")
