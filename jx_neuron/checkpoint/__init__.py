"""Checkpoints: finding and opening them, the formats of their tensors, configs and tokenizers, and the weight table."""

from jx_neuron.util.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "demo": "demo_model",
        "folder": "Checkpoint load_config open_checkpoint",
        "hf_config": "INERT ONLY HFConfig divisible one_of",
        "weights": "Copy Params Source W from_params",
    },
)
