"""Hugging Face's `generate()` over a model of this package. It needs torch, for tensors; the model itself does not."""

import copy
from typing import Any

import numpy as np

from jx_neuron.engine import prompts
from jx_neuron.engine.rows import Rows
from jx_neuron.errors import InputError
from jx_neuron.util.arguments import integer, integers, plain, shown

try:
    import torch
    from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
    from transformers.cache_utils import Cache
    from transformers.modeling_outputs import CausalLMOutputWithPast
except ImportError as error:
    raise InputError(f"HuggingFaceGenerationModelAdapter takes torch ({error}): pip install torch") from None


# the cache's name in arguments and results, which transformers 5.24 changed
CACHE = next(name for name in ("cache", "past_key_values") if name in CausalLMOutputWithPast.__dataclass_fields__)


class DeviceCache(Cache):  # type: ignore[misc]
    """Stands for the state table in HF's generation loop: it has the length of HF's rows, and forwards operations."""

    is_compileable = False
    is_croppable = True
    is_linear = (False,)  # of each layer; HF passes on what the cache lacks only where there is one that is not

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.rows: Rows | None = None
        self.width = 0

    def required(self) -> Rows:
        """The rows computed so far. Raises InputError where there are none."""
        if self.rows is None:
            raise InputError("this cache holds nothing yet; begin with a prompt")
        return self.rows

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of computed positions of HF's rows, padding included."""
        return self.width

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i continues row `beam_idx[i]`. Raises InputError unless there are as many rows, all existing."""
        rows = self.required()
        index = integers("beam_idx", beam_idx, least=0, most=rows.count - 1)
        if len(index) != rows.count:
            raise InputError(f"beam_idx={shown(index)} must name {rows.count} rows, one for each row of the cache")
        rows.reorder(np.array(index))

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last -n tokens for a negative n; a positive one is the length to keep."""
        tokens = integer("tokens_to_remove", tokens_to_remove, least=-self.width)
        forgotten = -tokens if tokens <= 0 else max(0, self.width - tokens)
        if forgotten:
            self.required().crop(forgotten)
        self.width -= forgotten


class HuggingFaceGenerationModelAdapter(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """Gives a model HF's `generate()`: https://huggingface.co/docs/transformers/main_classes/text_generation

    config: the checkpoint's HF config. Its generation_config.json gives the defaults of `generate`.

    Calls are independent. A prompt with beams or several sequences takes as many rows, which must not exceed the
    model's batch_size; fewer rows are padded.
    """

    main_input_name = "input_ids"
    _is_stateful = False
    _supports_sdpa = True  # or whatever the config names: attention is not HF's

    def __init__(self, config: PretrainedConfig, model: Any):
        super().__init__(copy.deepcopy(config))
        self.model = model
        if (generation_config := model.hf_generation_config) is not None:
            self.generation_config = GenerationConfig(**generation_config)

    @property
    def device(self) -> torch.device:
        """The device of ids and logits in `generate`."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the logits."""
        return torch.float32

    def generate(self, inputs: torch.Tensor | None = None, *others: Any, **options: Any) -> Any:
        """HF's `generate`. Raises InputError for a prompt or a mask that the model cannot take."""
        if options.get("inputs_embeds") is not None:
            raise InputError("inputs_embeds: this model takes token ids alone; give input_ids")
        ids = options.get("input_ids") if inputs is None else inputs
        if ids is not None:
            shape = self._ids(ids).shape
            if (mask := options.get("attention_mask")) is not None:
                prompts.mask_of(mask, shape)
        return super().generate(inputs, *others, **options)

    def can_generate(self) -> bool:
        """True."""
        return True

    def reset_generation(self) -> None:
        """Does nothing: each call of `generate` starts from the beginning."""

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *others: Any
    ) -> None:
        if generation_config.use_cache is not False and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = DeviceCache()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: DeviceCache | None = None,
        past_key_values: DeviceCache | None = None,
        logits_to_keep: int = 0,
        use_cache: bool | None = True,
        return_dict: bool | None = True,
        **refused: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of `input_ids` [b, t], which continue the rows of the cache.

        attention_mask: [b, tokens so far], 1 on real tokens.
        cache:          the cache of earlier calls; `past_key_values` in older transformers.
        logits_to_keep: the number of last tokens whose logits are returned; 0 for all.

        Raises InputError for unsupported arguments (attentions, hidden states, input embeddings), and for ids, a mask
        or a cache that do not fit the model, or each other.
        """
        positions = refused.pop("position_ids", None)
        refused.pop("tokenizer", None)  # generate() passes it on with stop_strings
        if names := sorted(name for name, value in refused.items() if value is not None and value is not False):
            raise InputError(f"{', '.join(names)}: this model gives logits alone; call generate() without")
        ids_bt = self._ids(input_ids)
        keep_last = integer("logits_to_keep", logits_to_keep, least=0)
        earlier = past_key_values if cache is None else cache
        if not isinstance(earlier, DeviceCache | None):
            raise InputError(f"a cache is what this adapter left, and this is a {type(earlier).__name__}")
        cache = earlier if earlier is not None and use_cache else DeviceCache()
        shape = (len(ids_bt), cache.width + ids_bt.shape[1])
        mask = np.ones(shape, bool) if attention_mask is None else prompts.mask_of(attention_mask, shape)
        if positions is not None:
            _check_positions(positions, mask, ids_bt.shape)
        if cache.rows is None:
            cache.rows = Rows(self.model.engine, prompts.rows_of(ids_bt, attention_mask=mask))
            logits = cache.rows.logits(keep_last != 1)
            logits_btv = logits[:, None] if keep_last == 1 else _at_the_end(logits, cache.rows.lengths, ids_bt.shape[1])
        else:
            _check_goes_on(cache.rows, mask, ids_bt.shape)
            logits_btv = cache.rows.extend(ids_bt, keep_last != 1)
        cache.width += ids_bt.shape[1]
        return CausalLMOutputWithPast(
            logits=torch.from_numpy(logits_btv[:, -keep_last:]), **{CACHE: cache if use_cache else None}
        )

    def _ids(self, ids: Any) -> np.ndarray:
        if not isinstance(ids, torch.Tensor):
            raise InputError(f"input_ids takes a torch tensor [batch, tokens], and this is a {type(ids).__name__}")
        return prompts.batch_of(ids, self.model.limits)


def _check_goes_on(rows: Rows, mask: np.ndarray, shape: tuple[int, ...]) -> None:
    """Raises InputError where new tokens, padding or not, do not fit the computed rows."""
    count, new = shape
    if count != rows.count:
        raise InputError(f"input_ids has {count} rows and the cache {rows.count}; give one for each of its rows")
    real_b, expected_b = mask.sum(-1), rows.lengths + new
    if (wrong_b := real_b != expected_b).any():
        row = wrong_b.argmax()
        raise InputError(
            f"attention_mask has {real_b[row]} real tokens in row {row}, and with the new ones the cache has "
            f"{expected_b[row]}; it is 1 on all new tokens, and elsewhere what it was"
        )


def _check_positions(positions: Any, mask: np.ndarray, shape: tuple[int, ...]) -> None:
    """Raises InputError for position_ids that do not count each row's real tokens."""
    ours_bt, real_bt = (mask.cumsum(-1) - 1)[:, -shape[1] :], mask[:, -shape[1] :]
    theirs_bt = np.asarray(plain(positions))
    if theirs_bt.shape not in (shape, (1, shape[1]), shape[1:]) or (theirs_bt != ours_bt)[real_bt].any():
        raise InputError("position_ids must count each row's real tokens from 0; leave them out to have that")


def _at_the_end(logits_btv: np.ndarray, length_b: np.ndarray, width: int) -> np.ndarray:
    """Logits of right-padded rows, moved to where left-padded rows have them."""
    moved = np.zeros((len(logits_btv), width, logits_btv.shape[-1]), np.float32)
    for into, row, length in zip(moved, logits_btv, length_b, strict=False):
        into[width - length :] = row[:length]
    return moved
