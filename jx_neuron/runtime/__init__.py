"""Ways to run the step, behind one interface."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from jx_neuron.step.shape import Shape


class Result(NamedTuple):
    """What one program gave; arrays that may still be in the making until they are read with numpy.

    token_b1:  the next token of each row, int32 [b, 1], fit to be the next call's `tokens_bt`.
    logits_bv: float32 [b, v], or [b, t, v] where all were asked; v padded to the tensor-parallel degree.
    """

    token_b1: Any
    logits_bv: Any


class Runtime(Protocol):
    """Holds parameters and a cache on its devices, and runs programs on them."""

    @property
    def candidates(self) -> int | None:
        """How many candidates the programs sample from; None where one is compiled for any number."""
        ...

    def run(self, shape: Shape, inputs: Mapping[str, Any]) -> Result:
        """Runs the program of `shape` on `inputs` (those of `shape.inputs()`), reading and writing the cache."""
        ...

    def reset(self, slots: int = 0) -> None:
        """Says that what the cache holds is no longer needed, and that the next one has so many slots at least."""
        ...

    def keep(self) -> Any:
        """Sets the cache aside for `reorder`, and goes on with another."""
        ...

    def restore(self, kept: Any) -> None:
        """Goes on with a cache that `keep` set aside, which must not be used again."""
        ...

    def clear(self) -> None:
        """Forgets the cache's numbers, some of which are not finite: 0 · NaN is NaN, also where attention is masked."""
        ...

    def reorder(self, index_b: np.ndarray, kept: Any = None) -> None:
        """Makes row b of the cache what row `index_b[b]` is of it, or of a `kept` one, which stays as it is.

        There may be more rows than before, or fewer.
        """
        ...

    def compile(self, shapes: list[Shape]) -> None:
        """Makes the programs of `shapes` ready."""
        ...
