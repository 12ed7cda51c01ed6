"""Hugging Face's `generate()` over a model of this package. Takes torch, for its tensors; the model itself does not."""

import copy
from typing import Any

import numpy as np

from jx_neuron.errors import InputError
from jx_neuron.generation import prompts
from jx_neuron.generation.session import Session

try:
    import torch
    from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
    from transformers.cache_utils import Cache
    from transformers.modeling_outputs import CausalLMOutputWithPast
except ImportError as error:
    raise InputError(f"HuggingFaceGenerationModelAdapter takes torch ({error}): pip install torch") from None


# its name among a model's arguments and results, which transformers 5.24 changed
CACHE = next(name for name in ("cache", "past_key_values") if name in CausalLMOutputWithPast.__dataclass_fields__)


class DeviceCache(Cache):  # type: ignore[misc]
    """Stands for the cache on the devices in HF's generation loop: it knows its length, and passes on what to do."""

    is_compileable = False
    is_croppable = True
    is_linear = (False,)  # of each layer; HF passes on what the cache lacks only where there is one that is not

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.session: Session | None = None
        self.width = 0

    def held(self) -> Session:
        """The rows that have gone through. Raises InputError where there are none."""
        if self.session is None:
            raise InputError("this cache holds nothing yet; begin with a prompt")
        return self.session

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many positions of HF's rows have gone through, padding among them."""
        return self.width

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i goes on from what row `beam_idx[i]` held."""
        self.held().reorder(beam_idx.cpu().numpy())

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens, as many as the negative number says; a positive one is the length to keep."""
        forgotten = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.width - tokens_to_remove)
        if forgotten:
            self.held().crop(forgotten)
        self.width -= forgotten


class HuggingFaceGenerationModelAdapter(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """Gives a model HF's `generate()`: https://huggingface.co/docs/transformers/main_classes/text_generation

    config: the checkpoint's HF config. What its generation_config.json says is what `generate` does by default.

    Each call begins anew: nothing of the last one is left. With beams or several sequences a prompt takes as many rows,
    which the model's batch_size must have room for; fewer are padded.
    """

    main_input_name = "input_ids"
    _is_stateful = False
    _supports_sdpa = True  # or whatever the config names: attention is not HF's

    def __init__(self, config: PretrainedConfig, model: Any):
        super().__init__(copy.deepcopy(config))
        self.model = model
        if (told := model.hf_generation_config) is not None:
            self.generation_config = GenerationConfig(**told)

    @property
    def device(self) -> torch.device:
        """Where `generate` handles ids and logits."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits."""
        return torch.float32

    def can_generate(self) -> bool:
        """Yes."""
        return True

    def reset_generation(self) -> None:
        """Does nothing: each call of `generate` begins anew."""

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *others: Any
    ) -> None:
        if generation_config.use_cache is not False and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = DeviceCache()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: DeviceCache | None = None,
        past_key_values: DeviceCache | None = None,
        logits_to_keep: int = 0,
        use_cache: bool | None = True,
        return_dict: bool | None = True,
        **refused: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of `input_ids` [b, t], which follow what the cache holds.

        attention_mask: [b, tokens so far], 1 on real tokens.
        cache:          what earlier calls left; `past_key_values` to older transformers.
        logits_to_keep: of how many last tokens; 0 for all.

        Raises InputError for what this model does not give: attentions, hidden states, embeddings going in.
        """
        given = refused.pop("position_ids", None)
        refused.pop("tokenizer", None)  # which generate() hands on with stop_strings
        if asked := sorted(name for name, value in refused.items() if value is not None and value is not False):
            raise InputError(f"{', '.join(asked)}: this model gives logits alone; call generate() without")
        ids_bt, mask = input_ids.cpu().numpy(), None if attention_mask is None else attention_mask.cpu().numpy()
        every = logits_to_keep != 1
        held = past_key_values if cache is None else cache
        cache = held if held is not None and use_cache else DeviceCache()
        if given is not None:
            _check_positions(given.cpu().numpy(), cache, mask, ids_bt.shape)
        if cache.session is None:
            cache.session = Session(self.model.engine, self._rows(ids_bt, mask))
            logits = cache.session.logits(every)
            logits_btv = _at_the_end(logits, cache.session.start_b, ids_bt.shape[1]) if every else logits[:, None]
        else:
            logits_btv = cache.session.extend(ids_bt.astype(np.int32), every)
        cache.width += ids_bt.shape[1]
        kept = torch.from_numpy(logits_btv[:, -logits_to_keep:])
        return CausalLMOutputWithPast(logits=kept, **{CACHE: cache if use_cache else None})

    def _rows(self, ids_bt: np.ndarray, mask: np.ndarray | None) -> list[np.ndarray]:
        prompts.check(
            ids_bt,
            batch=self.model.most_prompts,
            vocab_size=self.model.settings.vocab_size,
            capacity=self.model.buckets.capacity,
            length=ids_bt.shape[1],
        )
        return prompts.rows_of(ids_bt, attention_mask=mask)


def _check_positions(given_bt: np.ndarray, cache: DeviceCache, mask: np.ndarray | None, shape: tuple[int, ...]) -> None:
    """Raises InputError for position_ids other than each row's own count of its real tokens."""
    mask = np.ones((shape[0], cache.width + shape[1]), int) if mask is None else mask
    ours_bt = (mask.cumsum(-1) - 1)[:, -shape[1] :]
    if (np.broadcast_to(given_bt, shape) != ours_bt)[mask[:, -shape[1] :] != 0].any():
        raise InputError("position_ids must count each row's real tokens from 0; leave them out to have that")


def _at_the_end(logits_btv: np.ndarray, length_b: np.ndarray, width: int) -> np.ndarray:
    """Logits as left-padded rows have them."""
    moved = np.zeros((len(logits_btv), width, logits_btv.shape[-1]), np.float32)
    for into, row, length in zip(moved, logits_btv, length_b, strict=False):
        into[width - length :] = row[:length]
    return moved
