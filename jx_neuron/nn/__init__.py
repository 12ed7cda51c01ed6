"""The parts of decoders: layers, attention, rotary embeddings, state, sampling; and how arrays are split."""

from jx_neuron.util.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "attention": "alibi_bias attend",
        "layers": "ACT Embedding LayerNorm Layers Linear Linears RMSNorm through",
        "rope": "RopeScaling Rotation inverse_frequencies rope_half rope_interleaved rotation",
        "sharding": "Padding request_devices",
        "sublayers": "Attention GatedMLP MLP",
        "state": "Cache KV LayerKV LayerState Positions S Span State",
    },
)
