"""The decoder families: one file each, named by the HF model_type, and the registry that finds them."""

from jx_neuron.models.decoder import Decoder, DecoderModule
from jx_neuron.models.registering import register
from jx_neuron.models.registry import Family, family, model_types, text_config, text_model

__all__ = ["Decoder", "DecoderModule", "Family", "family", "model_types", "register", "text_config", "text_model"]
