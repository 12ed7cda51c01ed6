"""The key of a compiled program: its purpose and its static shapes."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

Kind = Literal["prefill", "decode", "score", "verify", "draft"]

SAMPLING = ("temperature_b", "top_k_b", "top_p_b", "uniform_b")


@dataclass(frozen=True, order=True)
class ProgramKey:
    """One program.

    kind:       "prefill" computes tokens of prompts in any slots, and returns the logits of each row's last token;
                "score" returns those of every token; "decode" computes one token in each of the first slots: row i is
                slot i; "verify" computes several there, and draws the token that follows each. "draft" is of an EAGLE
                head (`jx_neuron.step.draft`).
    rows:       sequences, b.
    tokens:     tokens of a row, t: a context bucket, or 1 to decode; to verify, a draft and the token before it.
    positions:  positions that attention sees, s: a token bucket. With s = t, rows begin at position 0.
    candidates: the number of most likely tokens that are sampled from; 1 is greedy.
    taps:       layers, ascending, for which it returns the hidden states that enter them.
    guesses:    of a "draft", how many tokens it draws, one after another.
    """

    kind: Kind
    rows: int
    tokens: int
    positions: int
    candidates: int = 1
    taps: tuple[int, ...] = ()
    guesses: int = 0

    @property
    def name(self) -> str:
        """The program's name, in lists and file names."""
        kinds = {
            "decode": "decode",
            "verify": f"verify{self.tokens}",
            "draft": f"draft{self.guesses}-context{self.tokens}",
        }
        kind = kinds.get(self.kind, f"context{self.tokens}")
        every = "-all" if self.kind == "score" else ""
        taps = "".join(f"-x{layer}" for layer in self.taps)
        return f"{kind}-b{self.rows}-s{self.positions}-k{self.candidates}{every}{taps}"

    @property
    def in_place(self) -> bool:
        """Whether row i is slot i, and no input names slots."""
        return self.kind in ("decode", "verify", "draft")

    @property
    def gives_every(self) -> bool:
        """Whether it returns the logits of every token, [b, t, v], or of every guess."""
        return self.kind in ("score", "verify", "draft")

    @property
    def drawn(self) -> tuple[int, int]:
        """The shape of the tokens that it draws: [b, 1], or [b, t] to verify, or a column a guess."""
        return self.rows, {"verify": self.tokens, "draft": self.guesses}.get(self.kind, 1)

    def inputs(self, *, adapters: bool = False) -> dict[str, tuple[tuple[int, ...], type[np.generic]]]:
        """Shape and dtype of each input besides parameters and state, in the program's order.

        adapters: whether the model has adapters, and each row the number of one.
        """
        b = (self.rows,)
        integers = [*([] if self.in_place else ["slot_b"]), "start_b", "length_b", *(["adapter_b"] if adapters else [])]
        inputs: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {
            "tokens_bt": ((self.rows, self.tokens), np.int32)
        }
        inputs |= dict.fromkeys(integers, (b, np.int32))
        if self.candidates > 1:
            inputs |= {name: (b, np.int32 if name == "top_k_b" else np.float32) for name in SAMPLING}
            if self.kind == "verify":
                del inputs["uniform_b"]
                inputs["uniform_bt"] = (self.drawn, np.float32)
        return inputs
