"""Adapters of a model that is made from a checkpoint."""

from typing import TYPE_CHECKING

from jx_neuron.checkpoint.lora import merged, open_adapter
from jx_neuron.llm.options import CheckpointOptions
from jx_neuron.models.wrapper import text_name

if TYPE_CHECKING:
    from jx_neuron.checkpoint.weights import Tensors
    from jx_neuron.models import Decoder


def adapted(decoder: "Decoder", tensors: "Tensors", options: CheckpointOptions) -> "Tensors":
    """A checkpoint's tensors with the adapter of `options` merged into them, where there is one.

    Raises CheckpointError for one that cannot be read, and for that of another model.
    """
    if options["adapter"] is None:
        return tensors
    adapter = open_adapter(
        options["adapter"],
        token=options["token"],
        local_files_only=options["local_files_only"],
        cache_dir=options["cache_dir"],
    )
    return merged(tensors, adapter, decoder.rows, decoder.match(tensors), decoder.config, text_name)
