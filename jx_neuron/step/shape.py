"""What a compiled program of a model is for, and what it takes beside parameters and cache."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

INPUTS = ("tokens_bt", "start_b", "length_b")
SAMPLING = ("temperature_b", "top_k_b", "top_p_b", "uniform_b")


@dataclass(frozen=True, order=True)
class Shape:
    """One program.

    batch:      rows.
    tokens:     query tokens a row, t: a context bucket, or 1 to decode.
    slots:      cache slots read, s: a token bucket.
    candidates: how many of the most likely tokens are sampled from; 1 is greedy.
    all_logits: logits of every token, not only of each row's last.
    """

    batch: int
    tokens: int
    slots: int
    candidates: int = 1
    all_logits: bool = False

    @property
    def name(self) -> str:
        """The program's name, in lists and file names."""
        kind = "decode" if self.tokens == 1 else f"context{self.tokens}"
        return f"{kind}-b{self.batch}-s{self.slots}-k{self.candidates}" + ("-all" if self.all_logits else "")

    def as_dict(self) -> dict[str, Any]:
        """The fields, for a manifest."""
        return asdict(self)

    def inputs(self) -> dict[str, tuple[tuple[int, ...], type[np.generic]]]:
        """Shape and dtype of each input beside parameters and cache, in the program's order."""
        b = (self.batch,)
        found: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {
            "tokens_bt": ((self.batch, self.tokens), np.int32),
            "start_b": (b, np.int32),
            "length_b": (b, np.int32),
        }
        if self.candidates > 1:
            found |= {name: (b, np.int32 if name == "top_k_b" else np.float32) for name in SAMPLING}
        return found
