"""The sizes of a model, its memory and its backends, from its config and the headers of its files, without weights."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jx_neuron.checkpoint.folder import CONFIG
from jx_neuron.checkpoint.quantized import FIELD
from jx_neuron.checkpoint.tensor_files import safetensors_file
from jx_neuron.config import QuantizationConfig, dtype_of
from jx_neuron.errors import InputError
from jx_neuron.planning.instances import INSTANCES
from jx_neuron.planning.outline import Outline
from jx_neuron.planning.request import Request
from jx_neuron.step.buckets import Buckets
from jx_neuron.util.pages import memory_limit
from jx_neuron.util.parsing import read_json_file

FORMS = {"f32": ("f32", None), "bf16": ("bf16", None), "int8": ("bf16", "int8"), "int4": ("bf16", "int4")}
"""Of each form of weights, the dtype of what is not quantized, and how the matrices are."""
SIZES = {"d": "width", "n": "heads", "k": "key/value heads", "h": "head size", "f": "MLP width", "e": "experts"}


def describe(config: Mapping[str, Any], n_positions: int | None = None) -> dict[str, Any]:
    """The model of a parsed config.json; sizes in bytes.

    forms: for each of `FORMS` the weights, the keys and values of a token and of one sequence of `n_positions`, whether
    they fit this machine's memory, and the tensor-parallel degree on each instance that runs it, the smallest first.

    Raises ConfigError where the config is not supported, and InputError for positions that the model does not have.
    """
    outline = Outline.of(config)
    settings = outline.config
    buckets = Buckets.within(settings.max_positions, settings.trained_positions, n_positions, None)
    forms = {
        name: _form(outline.quantized(QuantizationConfig.named(quant)) if quant else outline, amp, buckets)
        for name, (amp, quant) in FORMS.items()
    }
    return dict(
        model_type=outline.decoder.model_type,
        parameters=outline.parameter_count,
        active_parameters=outline.active_parameter_count,
        layers=outline.layers,
        sizes={title: settings.sizes[letter] for letter, title in SIZES.items() if letter in settings.sizes},
        vocabulary=settings.sizes["v"],
        trained_positions=settings.trained_positions,
        n_positions=buckets.capacity,
        machine_bytes=memory_limit(),
        forms=forms,
    )


def _form(outline: Outline, amp: str, buckets: Buckets) -> dict[str, Any]:
    itemsize, capacity = dtype_of(amp).itemsize, buckets.capacity
    request = Request(outline, 1, buckets, itemsize)
    weights, cache = outline.weight_bytes(1, itemsize), outline.cache_bytes(1, 1, capacity, itemsize)
    degrees = {
        instance.name: degree
        for instance in INSTANCES
        if (degree := request.best_degree(instance)) is not None and request.fits_host(instance, degree)
    }
    room = memory_limit()
    return dict(
        weights=weights,
        cache=cache,
        cache_of_a_token=outline.cache_bytes(1, 1, 2, itemsize) - outline.cache_bytes(1, 1, 1, itemsize),
        fits_here=room is None or weights + cache <= room,
        instances=degrees,
    )


def stored(path: Path) -> dict[str, Any]:
    """How the files of a checkpoint store its weights: bytes by dtype, and the method where they are quantized.

    path: a GGUF file or a folder. A folder without safetensors has no dtypes.

    Raises CheckpointError for files that are damaged.
    """
    if path.suffix == ".gguf":
        return dict(dtypes=_gguf(path), method="gguf")
    dtypes = Counter[str]()
    for file in sorted(path.glob("*.safetensors")):
        for tensor in safetensors_file(file).values():
            dtypes[tensor.dtype.name] += tensor.nbytes
    fields = read_json_file(path / CONFIG).get(FIELD) if (path / CONFIG).is_file() else None
    return dict(dtypes=dict(dtypes), method=fields.get("quant_method") if isinstance(fields, Mapping) else None)


def _gguf(path: Path) -> dict[str, int]:
    from math import prod

    from gguf import GGML_QUANT_SIZES

    from jx_neuron.checkpoint.gguf.format import read_gguf

    dtypes = Counter[str]()
    for entry in read_gguf(path).entries.values():
        block, size = GGML_QUANT_SIZES[entry.type]
        dtypes[entry.type.name] += prod(entry.shape) // block * size
    return dict(dtypes)


def adapter(folder: Path) -> dict[str, Any]:
    """A LoRA adapter in a folder of PEFT: its rank, alpha, base model, matrices, parameters and bytes.

    Raises CheckpointError for files that are damaged, and InputError without safetensors.
    """
    from jx_neuron.checkpoint.lora import ADAPTER_CONFIG

    fields, file = read_json_file(folder / ADAPTER_CONFIG), folder / "adapter_model.safetensors"
    if not file.is_file():
        raise InputError(f"{folder} has no {file.name}; save the adapter as safetensors")
    tensors = safetensors_file(file).values()
    return dict(
        base=fields.get("base_model_name_or_path"),
        r=fields.get("r"),
        alpha=fields.get("lora_alpha"),
        matrices=len(tensors) // 2,
        parameters=sum(tensor.nbytes // tensor.dtype.itemsize for tensor in tensors),
        bytes=sum(tensor.nbytes for tensor in tensors),
    )


def saved(path: Path) -> dict[str, Any]:
    """A saved model: what its programs were made for. Raises ArtifactError where it is damaged."""
    from jx_neuron import artifact

    manifest = artifact.read(path).manifest
    settings = manifest.settings
    return dict(
        amp=settings.amp,
        quant=settings.quant.quant_dtype if settings.quant else None,
        tp_degree=settings.tp_degree,
        batch_sizes=list(settings.batch_sizes),
        n_positions=settings.buckets.capacity,
        target=settings.target,
        programs=len(manifest.programs),
        compiled=any(name.endswith(".neff") for name in manifest.files),
        weights=sum(manifest.files[name].size for name in manifest.weights),
    )
