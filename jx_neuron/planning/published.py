"""Times that AWS has published, to fit and test the speed model.

From the AWS Neuron SDK documentation, its pages on inference performance of inf2 and of trn1, and for trn2 the NxD
Inference tutorials; P50 unless noted:
https://awsdocs-neuron.readthedocs-hosted.com/en/latest/libraries/nxd-inference/tutorials/index.html

The configs have those fields of the named checkpoints that determine sizes.
"""

from dataclasses import dataclass
from typing import Any


def _llama(d: int, f: int, layers: int, n: int, k: int, v: int) -> dict[str, Any]:
    return dict(
        model_type="llama",
        hidden_size=d,
        intermediate_size=f,
        num_hidden_layers=layers,
        num_attention_heads=n,
        num_key_value_heads=k,
        vocab_size=v,
        max_position_embeddings=131072,
    )


CONFIGS: dict[str, dict[str, Any]] = {
    "Llama-2-7b": _llama(4096, 11008, 32, 32, 32, 32000),
    "Llama-2-13b": _llama(5120, 13824, 40, 40, 40, 32000),
    "Llama-2-70b": _llama(8192, 28672, 80, 64, 8, 32000),
    "Llama-3-8B": _llama(4096, 14336, 32, 32, 8, 128256),
    "Llama-3.3-70B": _llama(8192, 28672, 80, 64, 8, 128256),
    "Llama-3.1-405B": _llama(16384, 53248, 126, 128, 8, 128256),
}


@dataclass(frozen=True)
class Decode:
    """A published time per output token.

    sequence:     positions of the compiled KV cache.
    int8:         whether weights are quantized to int8, as transformers-neuronx does; the head is not.
    fitted:       whether the constants of `speed` were fitted on this row; the other rows test them.
    """

    model: str
    instance: str
    tp_degree: int
    batch_size: int
    sequence: int
    milliseconds: float
    int8: bool = False
    fitted: bool = False


DECODE = (
    Decode("Llama-3-8B", "inf2.48xlarge", 24, 1, 4096, 6.42, int8=True),
    Decode("Llama-3-8B", "inf2.48xlarge", 24, 8, 4096, 10.45, int8=True),
    Decode("Llama-2-7b", "inf2.48xlarge", 24, 1, 4096, 6.47, fitted=True),
    Decode("Llama-2-7b", "inf2.48xlarge", 24, 8, 4096, 12.1, fitted=True),
    Decode("Llama-2-13b", "inf2.48xlarge", 24, 1, 4096, 9.17),
    Decode("Llama-2-70b", "inf2.48xlarge", 24, 1, 256, 32.9),
    Decode("Llama-3-8B", "trn1.32xlarge", 32, 1, 4096, 5.86, int8=True),
    Decode("Llama-2-70b", "trn1.32xlarge", 32, 1, 256, 25.2, fitted=True),
    Decode("Llama-2-70b", "trn1.32xlarge", 32, 4, 4096, 31.8),
    Decode("Llama-3.3-70B", "trn2.48xlarge", 64, 1, 11_500, 19.6),
    Decode("Llama-3.1-405B", "trn2.48xlarge", 64, 1, 11_500, 37.9),
)


@dataclass(frozen=True)
class Prefill:
    """A published time to first token, batch 1."""

    model: str
    instance: str
    tp_degree: int
    tokens: int
    milliseconds: float
    fitted: bool = False


PREFILL = (
    Prefill("Llama-2-70b", "inf2.48xlarge", 24, 1024, 277),
    Prefill("Llama-2-70b", "trn1.32xlarge", 32, 1024, 232, fitted=True),
)
