"""The origin of a model: a checkpoint, a module, a config without weights, or a saved model."""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from jx_neuron.artifact.settings import Settings
from jx_neuron.checkpoint.folder import Checkpoint, open_checkpoint, token_ids
from jx_neuron.config import dtype_of
from jx_neuron.errors import CheckpointError, InputError
from jx_neuron.llm.options import (
    CheckpointOptions,
    LoweringOptions,
    ModelOptions,
    as_stored,
    settings_of,
    warn_if_widened,
)
from jx_neuron.runtime import deployment as deploy
from jx_neuron.runtime.base import Runtime
from jx_neuron.runtime.deployment import Deployment
from jx_neuron.util.arguments import integer

if TYPE_CHECKING:  # running a saved model needs no model code
    from flax import nnx

    from jx_neuron.checkpoint.hf_config import HFConfig
    from jx_neuron.checkpoint.weights import Params, Source, Tensors, W
    from jx_neuron.checkpoint.writing import HFTensors
    from jx_neuron.models import Decoder


class Origin(Protocol):
    """The origin of a model. `jx_neuron.runtime.saved.SavedModel` is one, and so are the other classes here."""

    @property
    def settings(self) -> Settings:
        """The model's settings."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """The contents of config.json."""
        ...

    @property
    def generation_config(self) -> dict[str, Any] | None:
        """The contents of generation_config.json, or else the end and padding tokens; None without either."""
        ...

    @property
    def path(self) -> Path | None:
        """Where its files are; None where it has none."""
        ...

    @property
    def parameter_count(self) -> int | None:
        """The number of its parameters; None where that is not known."""
        ...

    @property
    def deployment(self) -> Deployment:
        """Its programs, lowered or read when first asked for."""
        ...

    def matches(self, config: Mapping[str, Any]) -> bool:
        """Whether a config.json describes the model, whatever else it says."""
        ...

    def runtime(
        self, backend: str, deployment: Callable[[], Deployment], jobs: int | None, own: range | None = None
    ) -> Runtime:
        """The runtime, with the weights on the devices; `deployment` gives the programs, to the backends that need it.

        jobs: how many programs the compiler works on at once.
        own:  the ranks of this process, on backend "neuron"; None for all.
        """
        ...

    def parameters(self) -> Mapping[str, Sequence[np.ndarray]]:
        """Each rank's part of each parameter, read when asked for."""
        ...

    def hf_tensors(self) -> "HFTensors":
        """Its parameters as HF's tensors, read when asked for. Raises a JxNeuronError where there can be none."""
        ...

    def whole(self) -> "Source":
        """Its parameters, unpadded and not quantized. Raises a JxNeuronError where there are none."""
        ...

    def with_params(self, params: "Params") -> "Origin":
        """The same model with other parameters. Raises a JxNeuronError where it cannot have any."""
        ...

    def first_not_finite(self) -> str | None:
        """The first tensor that holds a NaN or an infinity once it is cast; all are read again."""
        ...

    def tokenizer(self, *, plain: bool = False) -> Any:
        """The tokenizer, an HF one, or where there can be one that is `plain`, that. Raises a JxNeuronError where
        there is none."""
        ...

    def save_tokenizer(self, folder: Path) -> Sequence[Path]:
        """Writes the tokenizer's files into `folder`, and returns their paths: none where there is none."""
        ...


@dataclass(frozen=True, eq=False)
class DecoderOrigin(ABC):
    """A decoder whose programs are traced from its code."""

    decoder: "Decoder"
    settings: Settings
    config: Mapping[str, Any]

    @abstractmethod
    def weights(self) -> "Source":
        """Where its parameters come from. Raises CheckpointError where there are none."""

    @abstractmethod
    def whole(self) -> "Source":
        """Its parameters, unpadded and not quantized. Raises CheckpointError where there are none."""

    @abstractmethod
    def with_params(self, params: "Params") -> "DecoderOrigin":
        """The same model with other parameters. Raises CheckpointError where it has no weights."""

    @abstractmethod
    def hf_tensors(self) -> "HFTensors":
        """Its parameters as HF's tensors, in the dtype of the model. Raises a JxNeuronError where there can be none."""

    @abstractmethod
    def tokenizer(self, *, plain: bool = False) -> Any:
        """The tokenizer, an HF one, or where there can be one that is `plain`, that. Raises a JxNeuronError where
        there is none."""

    @property
    def generation_config(self) -> dict[str, Any] | None:
        """Its end and padding tokens; None without either."""
        return self.settings.token_ids

    @property
    def path(self) -> Path | None:
        """None: it has no files."""
        return None

    @property
    def parameter_count(self) -> int:
        """The number of its parameters."""
        return sum(map(math.prod, self.decoder.shapes.values()))

    @cached_property
    def deployment(self) -> Deployment:
        """Its programs, lowered when first asked for."""
        return deploy.lower(self.decoder, self.settings)

    def matches(self, config: Mapping[str, Any]) -> bool:
        """Whether a config.json describes the decoder."""
        return type(self.decoder.config).from_hf(config) == self.decoder.config

    def runtime(
        self, backend: str, deployment: Callable[[], Deployment], jobs: int | None, own: range | None = None
    ) -> Runtime:
        """The runtime. Raises InputError if the weights and the smallest cache do not fit this machine."""
        settings = self.settings
        if backend == "xla":
            from jx_neuron.runtime import xla

            mesh = xla.mesh(settings.tp_degree)
            if mesh.devices.flat[0].platform == "cpu":
                self._check_host(settings.buckets.tokens[0])
            return xla.XlaRuntime(self.decoder, self.weights(), mesh, settings.dtype)
        if backend == "host":
            self._check_host(settings.buckets.capacity)
        parameters = self.weights().parts(settings.tp_degree, own)
        return deployment().run_on(backend, parameters, jobs, own)

    def _check_host(self, positions: int) -> None:
        from jx_neuron.lowering import _jaxlib
        from jx_neuron.planning import limits

        settings = self.settings
        rows = settings.batch_sizes[0]
        itemsize, processes = settings.dtype.itemsize, _jaxlib.processes()
        limits.check_host(self.decoder, settings.tp_degree, rows, positions, itemsize, processes)

    def parameters(self) -> Mapping[str, Sequence[np.ndarray]]:
        """Each rank's part of each parameter, read when asked for."""
        return self.weights().parts(self.settings.tp_degree)

    def first_not_finite(self) -> str | None:
        """The first tensor that holds a NaN or an infinity, by its name in the checkpoint."""
        from jx_neuron.checkpoint.weights import first_not_finite

        source = self.weights()
        path = first_not_finite(source.parts(1))
        return None if path is None else source.name(path)

    def save_tokenizer(self, folder: Path) -> Sequence[Path]:
        """None: there is no tokenizer."""
        return []


@dataclass(frozen=True, eq=False)
class CheckpointOrigin(DecoderOrigin):
    """A checkpoint, whose weights `source` reads."""

    source: "Source"
    checkpoint: Checkpoint
    tensors: "Tensors"
    params: "Params | None" = None

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        options: CheckpointOptions,
        backend: str,
        check_family: Callable[[Any], None],
    ) -> Self:
        """Opens a checkpoint, and matches its tensors with the decoder's parameters.

        check_family: is given the config's model_type, to refuse it before anything is made.
        """
        from jx_neuron.llm.adapters import adapted, beside
        from jx_neuron.models import Decoder, text_model

        dtype = dtype_of(options["amp"])
        checkpoint = open_checkpoint(
            path,
            revision=options["revision"],
            token=options["token"],
            local_files_only=options["local_files_only"],
            cache_dir=options["cache_dir"],
        )
        config, tensors = text_model(checkpoint.config, checkpoint)
        check_family(config.get("model_type"))
        decoder = as_stored(Decoder.from_config(config, integer("tp_degree", options["tp_degree"]), tensors), options)
        ids = _end_and_padding(config, checkpoint.generation_config or {})
        decoder, with_adapters = beside(decoder, tensors, options)
        settings = settings_of(decoder, options, backend, ids)
        warn_if_widened(settings, checkpoint.integer_bits)
        tensors = adapted(decoder, tensors, options)
        source = with_adapters(decoder.source(tensors, dtype), dtype)
        return cls(decoder, settings, config, source, checkpoint, tensors)

    @property
    def generation_config(self) -> dict[str, Any] | None:
        """The contents of generation_config.json; None without one."""
        return self.checkpoint.generation_config

    @property
    def path(self) -> Path | None:
        """A folder, or a GGUF file."""
        return self.checkpoint.path

    def weights(self) -> "Source":
        """Where its parameters come from."""
        return self.source

    def whole(self) -> "Source":
        """The checkpoint's parameters, or the ones in their place."""
        from jx_neuron.checkpoint import weights

        decoder, dtype = replace(self.decoder, tp_degree=1), self.settings.dtype
        if self.params is not None:
            return weights.from_params(self.params, decoder.rows, decoder.padding, dtype)
        return weights.from_checkpoint(
            decoder.match(self.tensors), decoder.config, decoder.padding, self.tensors, dtype
        )

    def with_params(self, params: "Params") -> Self:
        """The same model with other parameters."""
        return replace(self, source=self.decoder.source_of(params, self.settings.dtype), params=params)

    def hf_tensors(self) -> "HFTensors":
        """The checkpoint's tensors, by its names, as they are loaded."""
        from jx_neuron.checkpoint import writing

        decoder = replace(self.decoder, tp_degree=1)
        return writing.hf_tensors(decoder.match(self.tensors), decoder.config, self.whole().read, self.settings.dtype)

    def tokenizer(self, *, plain: bool = False) -> Any:
        """The checkpoint's tokenizer. Raises CheckpointError where there is none."""
        return self.checkpoint.tokenizer(plain=plain)

    def save_tokenizer(self, folder: Path) -> Sequence[Path]:
        """Writes the tokenizer's files into `folder`."""
        return self.checkpoint.save_tokenizer(folder)


@dataclass(frozen=True, eq=False)
class ModuleOrigin(DecoderOrigin):
    """A module with its parameters in memory."""

    source: "Source"
    params: "Params"

    @classmethod
    def of(
        cls, module: "nnx.Module", config: "HFConfig", weights: "Sequence[W]", options: ModelOptions, backend: str
    ) -> Self:
        """Takes a module, and its weight table `weights`."""
        from jx_neuron.checkpoint.weights import flatten
        from jx_neuron.models import Decoder

        decoder = as_stored(
            Decoder.from_module(module, config, weights, integer("tp_degree", options["tp_degree"])), options
        )
        settings = settings_of(decoder, options, backend)
        params = flatten(module)
        source = decoder.source_of(params, settings.dtype)
        return cls(decoder, settings, {"model_type": config.MODEL_TYPE, **config.to_hf()}, source, params)

    def weights(self) -> "Source":
        """Where its parameters come from."""
        return self.source

    def whole(self) -> "Source":
        """Its parameters."""
        from jx_neuron.checkpoint import weights

        decoder = replace(self.decoder, tp_degree=1)
        return weights.from_params(self.params, decoder.rows, decoder.padding, self.settings.dtype)

    def with_params(self, params: "Params") -> Self:
        """The same model with other parameters."""
        return replace(self, source=self.decoder.source_of(params, self.settings.dtype), params=params)

    def hf_tensors(self) -> "HFTensors":
        """Its parameters, by the first row of its weight table for each. Raises ConfigError where one has none."""
        from jx_neuron.checkpoint import writing
        from jx_neuron.models import checks

        decoder, dtype = replace(self.decoder, tp_degree=1), self.settings.dtype
        checks.table(decoder.table, decoder.config, decoder.shapes, complete=True)
        rows = list({row.target: row for row in reversed(decoder.rows)}.values())
        return writing.hf_tensors(rows, decoder.config, self.whole().read, dtype)

    def tokenizer(self, *, plain: bool = False) -> Any:
        """Raises InputError."""
        raise InputError("this model was made from a module, without a checkpoint, and has no tokenizer")


@dataclass(frozen=True, eq=False)
class ConfigOrigin(DecoderOrigin):
    """A config alone, without weights: its programs can be lowered, compiled and saved."""

    @classmethod
    def of(cls, config: Mapping[str, Any], options: LoweringOptions) -> Self:
        """Takes what a config.json says."""
        from jx_neuron.models import Decoder

        decoder = as_stored(Decoder.from_config(config, integer("tp_degree", options["tp_degree"])), options)
        return cls(decoder, settings_of(decoder, options, "host", _end_and_padding(config)), config)

    def weights(self) -> "Source":
        """Raises CheckpointError."""
        raise CheckpointError("this model was made from a config alone; make it with from_pretrained to have weights")

    def whole(self) -> "Source":
        """Raises CheckpointError."""
        return self.weights()

    def with_params(self, params: "Params") -> Self:
        """Raises CheckpointError."""
        self.weights()
        return self

    def hf_tensors(self) -> "HFTensors":
        """Raises CheckpointError."""
        raise CheckpointError("this model was made from a config alone; make it with from_pretrained to have weights")

    def tokenizer(self, *, plain: bool = False) -> Any:
        """Raises InputError."""
        raise InputError("this model was made from a config alone, without a checkpoint, and has no tokenizer")


def _end_and_padding(*configs: Mapping[str, Any]) -> dict[str, Any]:
    """The ids of the end and padding tokens: of a config.json, and of a generation_config.json that comes before it.

    Raises CheckpointError for what are no ids.
    """
    ids = [token_ids(config, "the config") for config in reversed(configs)]
    return {
        name: next((fields[name] for fields in ids if fields.get(name) is not None), None)
        for name in ("eos_token_id", "pad_token_id")
    }
