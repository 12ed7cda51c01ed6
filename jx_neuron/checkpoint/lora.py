"""LoRA adapters in folders of PEFT.

W' = W + s·B·A, where s = alpha / r, or alpha / √r with rslora (Hu et al., arXiv:2106.09685; Kalajdzievski,
arXiv:2312.03732).

https://github.com/huggingface/peft/blob/main/src/peft/tuners/lora/config.py
"""

import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from jx_neuron.checkpoint.hub import local_path
from jx_neuron.checkpoint.tensor_files import Tensor, check_file, safetensors_file, torch_file
from jx_neuron.errors import CheckpointError
from jx_neuron.nn.adapters import MOST_RANK
from jx_neuron.util.arguments import shown
from jx_neuron.util.parsing import boundary, read_json_file, typed

ADAPTER_CONFIG = "adapter_config.json"
FILES: Mapping[str, Callable[[Path], dict[str, Tensor]]] = {
    "adapter_model.safetensors": safetensors_file,
    "adapter_model.bin": torch_file,
}
MERGE = "Merge it into its base model with peft's `merge_and_unload()`, save that, and load it without an adapter"
# of training, of how A and B began, and of what made the file; PEFT itself corrects fan_in_fan_out
INERT = frozenset(
    "auto_mapping base_model_name_or_path corda_config eva_config fan_in_fan_out inference_mode lora_dropout "
    "lora_ga_config loftq_config megatron_core peft_version qalora_group_size revision runtime_config task_type".split()
)
LEGAL: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),  # others change the base model
}
ABSENT: tuple[Any, ...] = (None, False, [], {})
_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_LAYER = r".*?\.[^.]*\.(\d+)\."
Names = list[str] | str
Rank = Annotated[int, Field(gt=0, le=MOST_RANK)]


class LoraConfig(BaseModel):
    """The fields of an adapter_config.json that say what A and B are of, and how they are scaled."""

    model_config = ConfigDict(strict=True)
    r: Rank = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    target_modules: Names
    exclude_modules: Names | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: Names | None = None
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, float] | None = None

    def rank(self, module: str) -> int:
        """The rank of a module's A and B."""
        return _by_pattern(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """The factor of B·A."""
        rank = self.rank(module)
        return _by_pattern(self.alpha_pattern, module, self.lora_alpha) / (math.sqrt(rank) if self.use_rslora else rank)

    def selects(self, module: str) -> bool:
        """Whether PEFT gives a matrix A and B, by its module's name."""
        if self.exclude_modules and _names(self.exclude_modules, module):
            return False
        if isinstance(self.target_modules, str):
            return self.target_modules.lower() == "all-linear" or _names(self.target_modules, module)
        layers = self.layers_to_transform
        if module in self.target_modules or layers in (None, []):
            return _names(self.target_modules, module)
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        places = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] if patterns else [_LAYER]
        match = next((match for place in places if (match := re.match(place, module))), None)
        chosen = [layers] if isinstance(layers, int) else layers or []
        return match is not None and int(match[1]) in chosen and _names(self.target_modules, module)


def _names(targets: Names, module: str) -> bool:
    """Whether `targets`, a regular expression or ends of names, name a module."""
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(f".{module}".endswith(f".{target}") for target in targets)


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    return next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module)), default)


@dataclass(frozen=True)
class Pair:
    """A [r, inputs] and B [outputs, r] of a matrix, and their scale."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """[outputs, inputs]."""
        return self.b.shape[0], self.a.shape[1]

    def product(self) -> np.ndarray:
        """s·B·A, float32 [outputs, inputs]."""
        a, b = (tensor.load().astype(np.float32) for tensor in (self.a, self.b))
        return (b @ a) * np.float32(self.scale)

    def scaled_b(self) -> np.ndarray:
        """s·B, float32 [outputs, r]."""
        return self.b.load().astype(np.float32) * np.float32(self.scale)


@dataclass(frozen=True)
class Adapter:
    """An open adapter: `pairs` of its matrices, by the names of HF's modules."""

    path: Path
    pairs: Mapping[str, Pair]


def open_adapter(
    adapter: str | os.PathLike[str],
    *,
    token: str | bool | None = None,
    local_files_only: bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Adapter:
    """Opens an adapter: a folder of PEFT or, where no such path exists, the id of a Hub repository.

    Raises CheckpointError for what is missing or malformed, and for an option or a tensor that is not supported.
    """
    path = local_path(
        adapter,
        _files_to_download,
        revision=None,
        token=token,
        local_files_only=local_files_only,
        cache_dir=cache_dir,
    )
    with boundary(path):
        check_file(path / ADAPTER_CONFIG)
        config = _read_config(path / ADAPTER_CONFIG)
        file = next((path / name for name in FILES if (path / name).is_file()), None)
        if file is None:
            raise CheckpointError(f"{path} holds no weights of an adapter; legal are {', '.join(FILES)}.")
        parts = defaultdict[str, dict[str, Tensor]](dict)
        for name, tensor in FILES[file.name](file).items():
            if (match := _NAME.fullmatch(name)) is None:
                raise CheckpointError(f"{file}: {name!r} is no lora_A or lora_B of a module's weight. {MERGE}.")
            parts[match[1]][match[2]] = tensor
        if not parts:
            raise CheckpointError(f"{file} holds no tensors; save the adapter again.")
        return Adapter(path, {module: _pair(file, module, pair, config) for module, pair in parts.items()})


def _files_to_download(repo: str, files: Collection[str]) -> list[str]:
    weights = next((name for name in FILES if name in files), None)
    if ADAPTER_CONFIG not in files or weights is None:
        raise CheckpointError(
            f"{repo} on the Hub holds no adapter: legal are {ADAPTER_CONFIG} and one of {', '.join(FILES)}. Choose "
            "another repository."
        )
    return [ADAPTER_CONFIG, weights]


def _read_config(path: Path) -> LoraConfig:
    fields = read_json_file(path)
    used = set(LoraConfig.model_fields)
    for name, value in fields.items():
        legal = LEGAL.get(name, ABSENT)
        if name not in used | INERT and not any(value is one or value == one for one in legal):
            raise CheckpointError(
                f"{path}: {name}={shown(value)} is not supported; legal is {' or '.join(map(repr, legal))}. {MERGE}."
            )
    return typed(LoraConfig, {name: value for name, value in fields.items() if name in used}, str(path))


def _pair(file: Path, module: str, parts: Mapping[str, Tensor], config: LoraConfig) -> Pair:
    if missing := {"A", "B"} - parts.keys():
        raise CheckpointError(f"{file} lacks lora_{min(missing)} of {module}; save the adapter again.")
    a, b, rank = parts["A"], parts["B"], config.rank(module)
    if not config.selects(module):
        raise CheckpointError(f"{file} holds A and B of {module}, which {ADAPTER_CONFIG} does not select.")
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise CheckpointError(
            f"{file}: lora_A {list(a.shape)} and lora_B {list(b.shape)} of {module} are not [r, inputs] and "
            f"[outputs, r] with r={rank}, which {ADAPTER_CONFIG} says. {MERGE}."
        )
    return Pair(a, b, config.scale(module))
