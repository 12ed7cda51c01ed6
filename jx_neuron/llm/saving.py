"""Models back into folders that Hugging Face transformers loads."""

import os
from pathlib import Path
from typing import Any

from jx_neuron.artifact import check_replaceable
from jx_neuron.artifact.folder import resolved
from jx_neuron.artifact.writing import writing
from jx_neuron.checkpoint.folder import CONFIG, GENERATION_CONFIG
from jx_neuron.checkpoint.writing import byte_size, dtype_field, with_architecture, write_json, write_tensors
from jx_neuron.errors import ConfigError
from jx_neuron.llm.origin import Origin
from jx_neuron.util.durable import replacing, sync


def save_pretrained(origin: Origin, directory: str | os.PathLike[str], max_shard_size: Any) -> Path:
    """Writes a model as `NeuronAutoModelForCausalLM.save_pretrained` says, and returns the folder."""
    folder, shard_size = resolved(Path(directory)), byte_size("max_shard_size", max_shard_size)
    if origin.settings.quant is not None:
        raise ConfigError(
            "the weights of this model were quantized as they were read, and a checkpoint is written of whole ones; "
            "write a smaller checkpoint with `jx-neuron quantize`, or load the model without quant"
        )
    if origin.settings.adapters is not None:
        raise ConfigError(
            "this model has adapters side by side, and a checkpoint holds one set of weights; load it with the adapter "
            "to merge (adapter=), or without any"
        )
    check_replaceable(folder, overwrite=False)
    tensors, config = origin.hf_tensors(), origin.config
    with writing(folder), replacing(folder) as fresh:
        write_tensors(fresh, tensors, shard_size)
        write_json(fresh / CONFIG, {**with_architecture(config), dtype_field(config): origin.settings.dtype.name})
        if origin.generation_config is not None:
            write_json(fresh / GENERATION_CONFIG, origin.generation_config)
        for file in origin.save_tokenizer(fresh):
            sync(file)
    return folder
