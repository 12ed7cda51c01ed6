"""Layouts: from the axes of a checkpoint's tensor to those of a parameter."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import einops
import numpy as np
from einops.parsing import ParsedExpression

PARTS = "parts"  # stands for the sum in `Layout.before`
_SUM = re.compile(r"\(([^()]*\+[^()]*)\)")
_BRACKETS = re.compile(r"\[([^][]*)\]")
_QUOTIENT = re.compile(r"\b(\w)/(\w)\b")
_NAME = re.compile(r"\b(\w)_by_(\w)\b")  # n/k as an identifier


@dataclass(frozen=True)
class Layout:
    """An einops pattern, "(n h) d -> d n h", where a sum is a fused axis that several parameters are parts of.

    "([n h] + k h + k h) d -> d n h" selects the first n·h of n·h + k·h + k·h rows; "(f ([1] + 1)) d -> d f" selects
    every second row.

    before: the tensor's axes, with `PARTS` for the sum.
    after:  the parameter's axes.
    parts:  the letters of each part, in order; none where there is no sum.
    part:   the index of the selected part.
    """

    before: str
    after: str
    parts: tuple[str, ...] = ()
    part: int = 0

    @property
    def axes(self) -> list[str]:
        """The tensor's axes one by one."""
        return re.findall(r"[^\s()]+", self.before)

    @property
    def selected(self) -> str:
        """The axes before the arrow, with the selected part for the sum."""
        return " ".join(self.axes).replace(PARTS, f"({self.parts[self.part]})") if self.parts else self.before

    def check(self) -> None:
        """Raises EinopsError or ValueError, which says what is not legal."""
        letters = ParsedExpression(self.selected).identifiers
        after = ParsedExpression(self.after)
        for part in self.parts:
            ParsedExpression(part)
        ParsedExpression(self.before)
        axes_of_one = "1" in self.axes or not all(after.composition) or "()" in self.before.replace(" ", "")
        if _NAME.search(self.after):
            raise ValueError("a quotient stands before the arrow alone")
        if letters != after.identifiers or after.has_ellipsis or axes_of_one or "(" in self.after:
            raise ValueError(
                "there should be the same letters before and after the arrow, no other axes, and no parentheses after "
                "the arrow"
            )

    @property
    def letters(self) -> set[str]:
        """All letters, also those of other parts."""
        return {letter for part in (*self.axes, *self.parts) for letter in part.split()} - {PARTS, "1"}

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape that the tensor must have."""
        sizes = self._with_quotients(sizes)
        sizes = {**sizes, PARTS: sum(self._lengths(sizes))}
        groups = re.findall(r"\(([^)]*)\)|(\S+)", self.before)
        return tuple(math.prod(sizes[axis] for axis in (many or one).split()) for many, one in groups)

    def apply(self, tensor: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """The parameter: the tensor, or its selected part, rearranged."""
        if self.parts:
            lengths, axes = self._lengths(sizes), self.axes
            whole = {axis: sizes[axis] for axis in axes if axis != PARTS}
            tensor = einops.rearrange(tensor, f"{self.before} -> {' '.join(axes)}", **whole)
            start = sum(lengths[: self.part])
            part = slice(start, start + lengths[self.part])
            tensor = tensor[tuple(part if axis == PARTS else slice(None) for axis in axes)]
        axis_sizes = {letter: sizes[letter] for letter in self.after.split()}
        return einops.rearrange(tensor, f"{self.selected} -> {self.after}", **axis_sizes)

    def _lengths(self, sizes: Mapping[str, int]) -> list[int]:
        return [math.prod(sizes[letter] for letter in part.split() if letter != "1") for part in self.parts]


@lru_cache(maxsize=1024)
def parse(text: str) -> Layout:
    """Parses a layout. Raises ValueError unless it has one arrow, and a sum one part in brackets."""
    before, after = (side.strip() for side in text.split("->"))
    total = _SUM.search(before)
    if total is None:
        return Layout(before, after)
    parts = [part.strip() for part in total[1].split("+")]
    bracketed = [i for i, part in enumerate(parts) if _BRACKETS.fullmatch(part)]
    if len(bracketed) != 1:
        raise ValueError(f"brackets should say which one part of {total[0]} is taken")
    parts[bracketed[0]] = parts[bracketed[0]][1:-1].strip()
    return Layout(before.replace(total[0], PARTS), after, tuple(parts), bracketed[0])
