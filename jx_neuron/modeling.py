"""What a user holds: a decoder with its weights, made from a checkpoint, and asked for tokens or logits."""

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np
from flax import nnx

from jx_neuron import sharding, weights
from jx_neuron.checkpoint import Checkpoint, open_checkpoint
from jx_neuron.config import GenerationConfig, NeuronConfig, dtype_of
from jx_neuron.errors import ConfigError, InputError
from jx_neuron.generation import loop, prompts
from jx_neuron.hf_config import HFConfig
from jx_neuron.lowering.buckets import Buckets
from jx_neuron.models import Decoder
from jx_neuron.runtime import Runtime
from jx_neuron.runtime.xla import XlaRuntime
from jx_neuron.weights import W, flatten

Lengths = int | Sequence[int]
DEFAULT_POSITIONS = 2048


class NeuronAutoModelForCausalLM:
    """A decoder of any supported family.

    Made by `from_pretrained` or `from_module`; `to_neuron` reads its weights (the first use does, where it was not
    called); then `sample` and `stream` give tokens, and calling it gives logits.
    """

    MODEL_TYPE: ClassVar[str | None] = None

    def __init__(
        self,
        decoder: Decoder,
        checkpoint: Checkpoint | None,
        *,
        batch_size: int,
        buckets: Buckets,
        dtype: np.dtype[Any],
        neuron_config: NeuronConfig,
        params: weights.Params | None = None,
    ):
        self.decoder, self.checkpoint, self.batch_size, self.buckets = (
            decoder,
            checkpoint,
            batch_size,
            buckets,
        )
        self.dtype, self.neuron_config = dtype, neuron_config
        self._params = params
        self._runtime: Runtime | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        batch_size: int = 1,
        n_positions: Lengths | None = None,
        tp_degree: int = 1,
        amp: str = "f32",
        context_length_estimate: Lengths | None = None,
        neuron_config: NeuronConfig | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> Self:
        """Opens a checkpoint: a folder, a .gguf file, or a Hugging Face hub id.

        batch_size:              rows of every call.
        n_positions:             longest sequence, prompt and answer together, or a list of token buckets; by default
                                 2048, or what the model has positions for where that is less.
        tp_degree:               how many cores share the model.
        amp:                     dtype of weights and cache: f32, f16 or bf16.
        context_length_estimate: the longest prompt that goes through in one piece, or a list of context buckets.

        Names and shapes of all tensors are checked here; `to_neuron` reads them.

        Raises CheckpointError, ConfigError or InputError that says what cannot be had.
        """
        dtype = dtype_of(amp)
        checkpoint = open_checkpoint(
            pretrained_model_name_or_path,
            revision=revision,
            token=token,
            local_files_only=local_files_only,
            cache_dir=cache_dir,
        )
        if cls.MODEL_TYPE not in (None, checkpoint.config.get("model_type")):
            raise ConfigError(
                f"{cls.__name__} takes checkpoints of model_type {cls.MODEL_TYPE!r} and this one is of "
                f"{checkpoint.config.get('model_type')!r}; NeuronAutoModelForCausalLM takes any"
            )
        decoder = Decoder.from_config(checkpoint.config, _positive("tp_degree", tp_degree))
        model = cls._make(decoder, checkpoint, batch_size, n_positions, context_length_estimate, dtype, neuron_config)
        model._rows  # noqa: B018
        return model

    @classmethod
    def from_module(
        cls,
        module: nnx.Module,
        config: HFConfig,
        *,
        weights: Sequence[W] = (),
        batch_size: int = 1,
        n_positions: Lengths | None = None,
        tp_degree: int = 1,
        amp: str = "f32",
        context_length_estimate: Lengths | None = None,
        neuron_config: NeuronConfig | None = None,
    ) -> Self:
        """Takes a decoder with its parameters in hand, such as one just trained, and no checkpoint.

        `module` does as the families' `Model` does; `weights` is its weight table, which says how parameters are split,
        and may be left out at a `tp_degree` of 1. The other arguments are those of `from_pretrained`.
        """
        decoder = Decoder.from_module(module, config, weights, _positive("tp_degree", tp_degree))
        return cls._make(
            decoder,
            None,
            batch_size,
            n_positions,
            context_length_estimate,
            dtype_of(amp),
            neuron_config,
            params=flatten(module),
        )

    @classmethod
    def _make(
        cls,
        decoder: Decoder,
        checkpoint: Checkpoint | None,
        batch_size: int,
        n_positions: Lengths | None,
        context_length_estimate: Lengths | None,
        dtype: np.dtype[Any],
        neuron_config: NeuronConfig | None,
        params: weights.Params | None = None,
    ) -> Self:
        most = decoder.config.max_positions
        if n_positions is None:
            n_positions = min(DEFAULT_POSITIONS, most or DEFAULT_POSITIONS)
        buckets = Buckets.of(n_positions, context_length_estimate)
        if most is not None and buckets.capacity > most:
            raise InputError(
                f"n_positions={buckets.capacity} exceeds the {most} positions that this {decoder.model_type} has; "
                f"ask for at most {most}"
            )
        return cls(
            decoder,
            checkpoint,
            batch_size=_positive("batch_size", batch_size),
            buckets=buckets,
            dtype=dtype,
            neuron_config=neuron_config or NeuronConfig(),
            params=params,
        )

    @cached_property
    def _rows(self) -> list[W]:
        assert self.checkpoint is not None
        of = self.decoder
        return weights.match(of.table, of.ignore, of.shapes, of.config.layers, of.padding, self.checkpoint)

    def to_neuron(self) -> Self:
        """Reads the weights onto the devices. Programs are compiled when they are first needed."""
        if self._runtime is None:
            sharding.request_devices(self.decoder.tp_degree)
            mesh = sharding.mesh(self.decoder.tp_degree)
            if self.checkpoint is not None:
                params = weights.load(
                    self._rows, self.decoder.padding, self.checkpoint, self.dtype, mesh, "loading weights"
                )
            else:
                params = weights.shard(self._params or {}, self.decoder.rows, self.decoder.padding, self.dtype, mesh)
                self._params = None
            self._runtime = XlaRuntime(self.decoder, params, mesh, self.dtype)
        return self

    @property
    def runtime(self) -> Runtime:
        """What runs the programs."""
        self.to_neuron()
        assert self._runtime is not None
        return self._runtime

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, an HF one. Raises InputError where there is no checkpoint."""
        if self.checkpoint is None:
            raise InputError("this model was made from a module, without a checkpoint, and has no tokenizer")
        return self.checkpoint.tokenizer()

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a row, by generation_config.json or else config.json."""
        given = self._hf("eos_token_id")
        return () if given is None else tuple(np.atleast_1d(given).tolist())

    def _hf(self, field: str) -> Any:
        if self.checkpoint is None:
            return None
        found = (self.checkpoint.generation_config or {}).get(field)
        return self.checkpoint.config.get(field) if found is None else found

    def __call__(self, input_ids: Any, cache_ids: Any = None, start_ids: Any = None) -> np.ndarray:
        """Logits after the last token of each row, float32 [b, v]; of every token [b, t, v] with `output_all_logits`.

        input_ids: [b, t] integers, as lists, numpy, jax or torch.
        cache_ids: None for prompts, which empty the cache first; or the position of the first token, to go on from it.
        start_ids: [b], the first real position of each left-padded row.

        Raises InputError where the compiled model cannot take them.
        """
        ids_bt, _ = prompts.as_array(input_ids)
        rows = self._check(ids_bt, start_ids, None, ids_bt.shape[1])
        start_b = np.zeros(len(rows), np.int32)
        if cache_ids is not None:
            start_b += int(np.asarray(cache_ids).reshape(-1)[0])
            if start_ids is not None:
                start_b -= np.asarray(start_ids, np.int32).reshape(-1)
        all_logits = self.neuron_config.output_all_logits
        logits = loop.logits(self.runtime, rows, start_b, self.buckets, all_logits, fresh=cache_ids is None)
        return logits[..., : self.decoder.config.sizes["v"]]

    def sample(
        self,
        input_ids: Any,
        sequence_length: int,
        start_ids: Any = None,
        *,
        attention_mask: Any = None,
        top_k: int | Sequence[int] | None = None,
        top_p: float | Sequence[float] | None = None,
        temperature: float | Sequence[float] | None = None,
        eos_token_override: int | Sequence[int] | None = None,
        seed: int | None = None,
        streamer: Any = None,
    ) -> Any:
        """Continues each row up to `sequence_length` tokens, the prompt counted, or until all rows have ended.

        input_ids:          [b, t] integers, as lists, numpy, jax or torch.
        start_ids:          [b], the first real position of each left-padded row; or give attention_mask [b, t].
        top_k:              1 is greedy; 0 keeps the whole vocabulary; 50 where neither this nor a GenerationConfig says.
        top_p, temperature: 1.0 each by default; a temperature of 0 is greedy. All three may be given one a row.
        eos_token_override: the token or tokens that end a row, instead of the checkpoint's; -1 for none.
        seed:               the same seed gives a row the same tokens in any batch, bucket and degree; None draws one.
        streamer:           an HF streamer; its put() gets the prompt, then the tokens of each step.

        Returns ids [b, up to sequence_length] in the kind that was given, prompt first; a row that has ended goes on in
        the padding token (the end token where the checkpoint has none). Raises InputError before anything runs where the
        compiled model cannot take the call.
        """
        ids_bt, restore = prompts.as_array(input_ids)
        tokens = [ids_bt]
        if streamer is not None:
            streamer.put(restore(ids_bt))
        for token_b, _ in self.stream(
            ids_bt,
            sequence_length,
            start_ids,
            attention_mask=attention_mask,
            top_k=top_k,
            top_p=top_p,
            temperature=temperature,
            eos_token_override=eos_token_override,
            seed=seed,
        ):
            tokens.append(token_b[:, None])
            if streamer is not None:
                streamer.put(restore(token_b[:, None])[:, 0])
        if streamer is not None:
            streamer.end()
        return restore(np.concatenate(tokens, axis=1))

    def stream(
        self,
        input_ids: Any,
        sequence_length: int,
        start_ids: Any = None,
        *,
        attention_mask: Any = None,
        top_k: int | Sequence[int] | None = None,
        top_p: float | Sequence[float] | None = None,
        temperature: float | Sequence[float] | None = None,
        eos_token_override: int | Sequence[int] | None = None,
        seed: int | None = None,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The tokens of `sample` as they are made: pairs of ids [b] and whether each row has ended [b]."""
        ids_bt, _ = prompts.as_array(input_ids)
        width = ids_bt.shape[1]
        rows = self._check(ids_bt, start_ids, attention_mask, sequence_length)
        draw = self._draw(top_k, top_p, temperature, seed)
        override = None if eos_token_override is None else np.atleast_1d(eos_token_override).tolist()
        eos = self.eos_token_ids if override is None else tuple(id for id in override if id >= 0)
        pad = self._hf("pad_token_id")
        if pad is None:
            pad = eos[0] if eos else 0
        return loop.answer(self.runtime, rows, self.buckets, draw, sequence_length - width, eos, pad)

    def _check(self, ids_bt: np.ndarray, start_ids: Any, attention_mask: Any, length: int) -> list[np.ndarray]:
        prompts.check(
            ids_bt,
            batch=self.batch_size,
            vocab_size=self.decoder.config.sizes["v"],
            capacity=self.buckets.capacity,
            length=length,
        )
        return prompts.rows_of(ids_bt, start_ids, attention_mask, padding_side=self.neuron_config.padding_side)

    def _draw(self, top_k: Any, top_p: Any, temperature: Any, seed: int | None) -> loop.Draw:
        default = self.neuron_config.on_device_generation
        fallback = default or GenerationConfig(do_sample=True)
        if top_k is None:
            top_k = fallback.top_k if fallback.do_sample else 1
        return loop.Draw.of(
            self.batch_size,
            top_k=top_k,
            top_p=fallback.top_p if top_p is None else top_p,
            temperature=fallback.temperature if temperature is None else temperature,
            seed=seed,
            global_top_k=fallback.global_top_k,
            vocab_size=self.decoder.config.sizes["v"],
        )


class GPT2ForSampling(NeuronAutoModelForCausalLM):
    """GPT-2."""

    MODEL_TYPE = "gpt2"


class GPTJForSampling(NeuronAutoModelForCausalLM):
    """GPT-J."""

    MODEL_TYPE = "gptj"


class LlamaForSampling(NeuronAutoModelForCausalLM):
    """Llama, and what shares its architecture: CodeLlama, SmolLM2, and others of model_type llama."""

    MODEL_TYPE = "llama"


class OPTForSampling(NeuronAutoModelForCausalLM):
    """OPT."""

    MODEL_TYPE = "opt"


def _positive(name: str, value: int) -> int:
    if not isinstance(value, int) or value < 1:
        raise InputError(f"{name}={value!r} is not legal; it takes a positive integer")
    return value
