"""The drafter that a call's `draft` names."""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jx_neuron.engine.draft_model import ModelDrafter
from jx_neuron.engine.drafting import Drafter, FeatureDrafter, NgramDrafter
from jx_neuron.errors import ConfigError, InputError
from jx_neuron.llm import eagle
from jx_neuron.llm.origin import DecoderOrigin, Origin
from jx_neuron.util.arguments import shown

if TYPE_CHECKING:
    from jx_neuron.llm.calls import Calls


def drafter_of(draft: Any, target: "Calls") -> Drafter | None:
    """The drafter that `draft` names: "ngram", an EAGLE-3 head, another model, or a drafter itself; None for None.

    Raises InputError for anything else, and ConfigError where the target cannot verify drafts, or a model cannot draft
    for it.
    """
    from jx_neuron.llm.calls import Calls

    if draft is None:
        return None
    if target.backend != "xla" and not target.settings.speculation:
        raise ConfigError(
            "the programs of this model verify no drafts; make it with NeuronConfig(speculation_length=8), or compile "
            "it with --speculation-length 8, or leave draft out"
        )
    if isinstance(draft, Calls):
        return _of_model(draft, target)
    if isinstance(draft, str) and draft == "ngram":
        return NgramDrafter()
    if isinstance(draft, os.PathLike) or (isinstance(draft, str) and ("/" in draft or os.path.exists(draft))):
        return eagle.drafter_of(draft, target)
    if all(hasattr(draft, name) for name in ("propose", "close", "pause")):
        drafter: Drafter = draft
        if isinstance(drafter, FeatureDrafter):
            eagle.check(drafter, target)
        return drafter
    raise InputError(
        f'draft={shown(draft)} is not legal; it takes "ngram", the folder of an EAGLE-3 head, another model, or a '
        "jx_neuron.engine.drafting.Drafter"
    )


def enabled(origin: Origin, lengths: Sequence[int]) -> Origin:
    """The origin of the same model, with programs that verify drafts. Raises ConfigError for a saved one."""
    if not isinstance(origin, DecoderOrigin):
        raise ConfigError("a saved model has the programs that it was saved with; save it with speculation_length")
    decoder, settings = origin.decoder.with_drafts(), origin.settings
    slot = decoder.slot(settings.buckets.capacity)
    settings = replace(settings, speculation=tuple(lengths), state=slot, state_dtypes=decoder.state_dtypes)
    return replace(origin, decoder=decoder, settings=settings)


def _of_model(draft: "Calls", target: "Calls") -> ModelDrafter:
    settings = draft.settings
    if draft is target:
        raise ConfigError("a model cannot draft for itself: each token would be computed twice; give a smaller one")
    if settings.window == 0:
        raise ConfigError(
            f"a model of model_type {settings.model_type!r} drafts for none: its recurrent layers keep one state of a "
            "sequence, which cannot go back to before a draft. Give a model without such layers"
        )
    if settings.slots < target.settings.slots:
        raise ConfigError(
            f"the draft model has batch_size={settings.slots}, and the model {target.settings.slots} rows; make it "
            f"with batch_size={target.settings.slots}"
        )
    return ModelDrafter(draft.engine, min(settings.window or settings.buckets.capacity, settings.buckets.capacity))
