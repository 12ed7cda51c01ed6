"""Saved models: an artifact's settings, programs, parameters and tokenizer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from jx_neuron import artifact
from jx_neuron.artifact.fit import check_fit
from jx_neuron.artifact.folder import Artifact
from jx_neuron.artifact.manifest import neff_file
from jx_neuron.artifact.settings import Settings
from jx_neuron.checkpoint.folder import NAMED_TEMPLATES, TOKENIZER_FILES
from jx_neuron.errors import ArtifactError
from jx_neuron.lowering.signature import ProgramSpec
from jx_neuron.runtime.base import Runtime
from jx_neuron.runtime.deployment import Deployment
from jx_neuron.step.program_key import ProgramKey


@dataclass(frozen=True)
class SavedModel:
    """A model opened from an artifact. Needs no model code."""

    artifact: Artifact

    @classmethod
    def open(cls, directory: Path | str) -> "SavedModel":
        """Opens an artifact. Raises ArtifactError, with the reason, where it is incomplete."""
        return cls(artifact.read(directory))

    @property
    def path(self) -> Path:
        """The folder of the artifact."""
        return self.artifact.directory

    @property
    def settings(self) -> Settings:
        """The settings that the model was lowered for."""
        return self.artifact.manifest.settings

    @property
    def config(self) -> Mapping[str, Any]:
        """The config.json of the model's checkpoint."""
        return self.artifact.manifest.config

    @property
    def generation_config(self) -> dict[str, Any] | None:
        """The end and padding tokens of the model's checkpoint; None where there are none."""
        return self.settings.token_ids

    @property
    def parameter_count(self) -> None:
        """None: an artifact has padded parts of parameters."""
        return None

    @cached_property
    def deployment(self) -> Deployment:
        """The programs. Raises ArtifactError unless every program of the settings is there and fits its key."""
        settings = self.settings
        saved = {program.name: program for program in self.artifact.manifest.programs}
        buckets = settings.buckets
        if len(settings.batch_sizes) * max(len(buckets.tokens), len(buckets.context) - 1) > len(saved):
            raise self._refusal(f"it has {len(saved)} programs, which is fewer than its buckets")
        programs: dict[ProgramKey, ProgramSpec] = {}
        for key in settings.programs:
            if key.name not in saved:
                raise self._refusal(f"it lacks the program {key.name}")
            programs[key] = saved[key.name]
            hlo = self.artifact.hlo(key.name)
            with self._errors_name_folder():
                check_fit(
                    programs[key],
                    hlo,
                    key,
                    slots=settings.slots,
                    positions=buckets.capacity,
                    state=settings.state,
                    state_dtypes=settings.state_dtypes,
                    dtype=settings.dtype,
                    vocab_size=settings.vocab_size,
                    quant=settings.quant,
                    adapters=settings.adapters,
                )
        files = self.artifact.manifest.files
        neffs = {name: partial(self.artifact.file, neff_file(name)) for name in saved if neff_file(name) in files}
        return Deployment(settings, programs, self.artifact.hlo, neffs)

    def require_complete(self) -> None:
        """Raises ArtifactError unless the artifact has weights and every program."""
        if not self.artifact.manifest.weights:
            raise ArtifactError(
                f"{self.path} was saved without weights; make the model from its checkpoint and load() this folder, "
                "or save with sharded_weights=True"
            )
        _ = self.deployment

    @contextmanager
    def _errors_name_folder(self) -> Iterator[None]:
        try:
            yield
        except ArtifactError as error:
            raise self._refusal(str(error)) from error

    def _refusal(self, reason: str) -> ArtifactError:
        return ArtifactError(f"artifact {self.path}: {reason}; save it again")

    def matches(self, config: Mapping[str, Any]) -> bool:
        """Whether `config` is the config.json of the model's checkpoint."""
        return config == self.config

    def runtime(
        self, backend: str, deployment: Callable[[], Deployment], jobs: int | None, own: range | None = None
    ) -> Runtime:
        """A runtime, "host" or "neuron", of the programs of `deployment` with these weights.

        Raises ArtifactError where the artifact is for hosts of another number of ranks than `own`.
        """
        each, degree = self.artifact.manifest.ranks_per_host, self.settings.tp_degree
        here = degree if own is None else len(own)
        if backend == "neuron" and each not in (None, here):
            raise ArtifactError(
                f"artifact {self.path} is for {degree // each} hosts of {each} ranks, and this process has {here} of "
                f"{degree}; start it on {degree // each} hosts, with --hosts, or save it for others"
            )
        return deployment().run_on(backend, self.parameters(own), jobs, own)

    def parameters(self, own: range | None = None) -> Mapping[str, Sequence[np.ndarray]]:
        """The parts of each parameter that the ranks `own` have, or all, read at access.

        Raises ArtifactError where they were not saved.
        """
        return self.artifact.parameters(own)

    def hf_tensors(self) -> NoReturn:
        """Raises ArtifactError: a saved model has each core's part of each parameter, and no weight table."""
        raise ArtifactError(
            f"artifact {self.path} holds weights as programs take them, of which no checkpoint is written; "
            "make the model from its checkpoint"
        )

    def whole(self) -> NoReturn:
        """Raises ArtifactError, as `hf_tensors` does."""
        self.hf_tensors()

    def with_params(self, params: Any) -> NoReturn:
        """Raises ArtifactError, as `hf_tensors` does."""
        self.hf_tensors()

    def first_not_finite(self) -> str | None:
        """The first parameter that holds a NaN or an infinity; None where none does."""
        from jx_neuron.checkpoint.weights import first_not_finite

        return first_not_finite(self.parameters())

    def tokenizer(self, *, plain: bool = False) -> Any:
        """HF's tokenizer, or where there can be one that is `plain`, that; of files whose hashes are checked.

        Raises ArtifactError where there is none.
        """
        from jx_neuron.checkpoint.tokenizer import load_plain_tokenizer, load_tokenizer

        if not set(TOKENIZER_FILES) & set(self.artifact.manifest.files):
            raise ArtifactError(f"artifact {self.path} was saved without a tokenizer; use token ids")
        load = load_plain_tokenizer if plain else load_tokenizer
        return load(self.path, self.config, self.save_tokenizer, ArtifactError)

    def save_tokenizer(self, folder: Path) -> list[Path]:
        """Writes the tokenizer's files into `folder`, once their hashes are checked, and returns their paths."""
        names = [
            name
            for name in self.artifact.manifest.files
            if name in TOKENIZER_FILES or name.startswith(f"{NAMED_TEMPLATES}/")
        ]
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(self.artifact.file(name))
        return [folder / name for name in names]
