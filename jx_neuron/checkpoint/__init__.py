"""Checkpoints: finding and opening them, the formats of their tensors, configs and tokenizers, and the weight table."""

import os

from jx_neuron.util.lazy import exports

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # transformers warns where torch is absent

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "demo": "demo_model",
        "folder": "Checkpoint load_config open_checkpoint",
        "hf_config": "INERT ONLY HFConfig divisible one_of",
        "weights": "Copy Params Source W from_params",
    },
)
