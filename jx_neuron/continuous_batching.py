"""The configuration of continuous batching, named as in transformers-neuronx."""

from dataclasses import dataclass

from jx_neuron.errors import ConfigError
from jx_neuron.util.arguments import flag, integer


@dataclass(frozen=True, kw_only=True)
class ContinuousBatchingConfig:
    """Calls of the model name the sequence of each row, and its positions.

    max_num_seqs:                 the number of sequences, at most batch_size; None for batch_size.
    batch_size_for_shared_caches: the same.
    max_model_len:                the most positions of a sequence, at most n_positions; None for n_positions.
    optimized_paged_attention:    False. There are no pages: a sequence has a slot of n_positions.
    enable_chunked_prefill:       False. It went with pages. A prompt longer than the largest context bucket always goes
                                  through in chunks.

    Raises ConfigError for a value that is not legal, TypeError for an unknown name.
    """

    max_num_seqs: int | None = None
    batch_size_for_shared_caches: int | None = None
    max_model_len: int | None = None
    optimized_paged_attention: bool = False
    enable_chunked_prefill: bool = False

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "batch_size_for_shared_caches", "max_model_len"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, integer(name, value, error=ConfigError))
        for name in ("optimized_paged_attention", "enable_chunked_prefill"):
            if flag(name, getattr(self, name), error=ConfigError):
                raise ConfigError(
                    f"{name}=True is not supported: the cache has no pages. Leave it out, and give a server "
                    "block_size=max_model_len, so that a block is a sequence"
                )
        counts = {self.max_num_seqs, self.batch_size_for_shared_caches} - {None}
        if len(counts) > 1:
            raise ConfigError(
                f"max_num_seqs={self.max_num_seqs} is not batch_size_for_shared_caches="
                f"{self.batch_size_for_shared_caches}, which means the same; give one of them"
            )
        count = next(iter(counts), None)
        object.__setattr__(self, "max_num_seqs", count)
        object.__setattr__(self, "batch_size_for_shared_caches", count)

    def init_cache_engine(self, block_size: int, num_blocks: int) -> None:
        """Takes the size and the number of a server's blocks. It allocates nothing: the model has its slots.

        Raises ConfigError for blocks shorter than a sequence.
        """
        size = integer("block_size", block_size, error=ConfigError)
        integer("num_blocks", num_blocks, error=ConfigError)
        if self.max_model_len is not None and size < self.max_model_len:
            raise ConfigError(
                f"block_size={size} is less than max_model_len={self.max_model_len}, which takes a paged cache, and "
                f"there is none; give the server block_size={self.max_model_len}"
            )

    def require_fit(self, batch_size: int, n_positions: int) -> None:
        """Raises ConfigError for more sequences or positions than a model has."""
        for name, value, most_name, most in (
            ("max_num_seqs", self.max_num_seqs, "batch_size", batch_size),
            ("max_model_len", self.max_model_len, "n_positions", n_positions),
        ):
            if value is not None and value > most:
                raise ConfigError(f"{name}={value} exceeds {most_name}={most}; make the model with {most_name}={value}")
