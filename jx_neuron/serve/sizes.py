"""A server's model: its name, and the batch and context buckets that it has by default."""

from pathlib import Path
from typing import Any

SLOTS = 8
CONTEXT = (16, 32)  # tokens of a prompt, on a CPU


def sizes(path: Any, batch_size: int | None, n_positions: int | None, context: list[int] | None) -> dict[str, Any]:
    """The batch and context buckets of the programs; a saved model has its own where these are not given."""
    import jax

    from jx_neuron.runtime.deployment import choose_backend, is_artifact
    from jx_neuron.step.buckets import powers_of_two

    where = Path(path).expanduser()
    if where.exists() and is_artifact(where):
        given = dict(batch_size=batch_size, context_length_estimate=context)
        return {name: value for name, value in given.items() if value is not None}
    if context is None and choose_backend(None) == "xla" and jax.default_backend() == "cpu":
        context = [t for t in CONTEXT if n_positions is None or t <= n_positions] or None
    return dict(batch_size=powers_of_two(batch_size or SLOTS), context_length_estimate=context)


def name_of(path: Any) -> str:
    """The model's name: a hub id as it is, or the name of a folder or file."""
    where = Path(path).expanduser()
    return where.resolve().name.removesuffix(".gguf") if where.exists() else str(path)
