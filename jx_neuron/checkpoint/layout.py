"""From the axes of a checkpoint's tensor to those of a parameter."""

import math
import re
from collections.abc import Mapping, Sequence
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
    """An einops pattern, "(n h) d -> d n h", where a sum is an axis that several parameters take parts of.

    "([n h] + k h + k h) d -> d n h" takes the first n·h of n·h + k·h + k·h rows, and "(f ([1] + 1)) d -> d f" every
    second one. n/k is n divided by k: "(k n/k h) d -> d n h" has the n heads in k groups, and
    "(k ([n/k h] + h + h)) d -> d n h" takes the n heads out of each group. An axis of 1 is left out:
    "c 1 w -> w c".

    before: the tensor's axes, with `PARTS` for the sum.
    after:  the parameter's axes.
    parts:  the letters of each part, in order; none where there is no sum.
    part:   which of them is taken.
    """

    before: str
    after: str
    parts: tuple[str, ...] = ()
    part: int = 0

    @property
    def changes_nothing(self) -> bool:
        """Whether the parameter is the tensor."""
        return not self.parts and self.before.split() == self.after.split()

    @property
    def axes(self) -> list[str]:
        """The tensor's axes one by one."""
        return re.findall(r"[^\s()]+", self.before)

    @property
    def taken(self) -> str:
        """The axes before the arrow of what is taken."""
        return " ".join(self.axes).replace(PARTS, f"({self.parts[self.part]})") if self.parts else self.before

    def check(self) -> None:
        """Raises EinopsError or ValueError that says what is not legal."""
        letters = ParsedExpression(self.taken).identifiers
        after = ParsedExpression(self.composed)
        for part in self.parts:
            ParsedExpression(part)
        ParsedExpression(self.before)
        axes_of_one = not all(after.composition) or "()" in self.before.replace(" ", "")
        if _NAME.search(self.after):
            raise ValueError("a quotient is legal only before the arrow")
        if letters != after.identifiers or after.has_ellipsis or axes_of_one or "(" in self.after:
            raise ValueError(
                "there should be the same letters before and after the arrow, no other axes, and no parentheses after "
                "the arrow"
            )

    @property
    def letters(self) -> set[str]:
        """All letters, those of other parts too."""
        letters = {letter for part in (*self.axes, *self.parts) for letter in part.split()} - {PARTS, "1"}
        return {letter for name in letters for letter in name.split("_by_")}

    @property
    def quotients(self) -> list[tuple[str, str]]:
        """The letters of each quotient, dividend and divisor."""
        return sorted(set(_NAME.findall(" ".join((self.before, *self.parts)))))

    @property
    def composed(self) -> str:
        """The parameter's axes; an axis of a quotient is composed of its groups."""
        return " ".join(self._composed)

    @property
    def _composed(self) -> list[str]:
        quotients = _NAME.findall(self.taken)
        return [
            next((f"({b} {a}_by_{b})" for a, b in quotients if a == letter), letter) for letter in self.after.split()
        ]

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape that the tensor must have."""
        sizes = self._with_quotients(sizes)
        sizes = {**sizes, PARTS: sum(self._lengths(sizes)), "1": 1}
        return tuple(math.prod(sizes[axis] for axis in group) for group in self.groups)

    @property
    def groups(self) -> list[list[str]]:
        """The letters of each of the tensor's axes."""
        return [(many or one).split() for many, one in re.findall(r"\(([^)]*)\)|(\S+)", self.before)]

    def apply(self, tensor: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """The tensor, or the part that is taken, as the parameter."""
        sizes = self._with_quotients(sizes)
        if self.parts:
            lengths, axes = self._lengths(sizes), self.axes
            whole = {axis: sizes[axis] for axis in axes if axis not in (PARTS, "1")}
            tensor = einops.rearrange(tensor, f"{self.before} -> {' '.join(axes)}", **whole)
            start = sum(lengths[: self.part])
            part = slice(start, start + lengths[self.part])
            tensor = tensor[tuple(part if axis == PARTS else slice(None) for axis in axes)]
        used = {letter: sizes[letter] for letter in ParsedExpression(self.composed).identifiers}
        return einops.rearrange(tensor, f"{self.taken} -> {self.composed}", **used)

    def places(self, letter: str, sizes: Mapping[str, int]) -> "Places | None":
        """Where the parameter's entries along `letter` are in the tensor; None unless these are along one of its axes,
        which has letters of its own and any sum."""
        composed = dict(zip(self.after.split(), (set(re.findall(r"\w+", one)) for one in self._composed), strict=True))
        letters = [set(group) for group in self.groups]
        if self.parts:
            letters = [group | set(" ".join(self.parts).split()) if PARTS in group else group for group in letters]
        axis = next((i for i, group in enumerate(letters) if composed[letter] <= group), None)
        if axis is None or (self.parts and PARTS not in letters[axis]):
            return None
        if letters[axis] & set().union(*letters[:axis], *letters[axis + 1 :]) - {"1"}:
            return None
        own = [one for one in self.after.split() if composed[one] <= letters[axis]]
        used = {letter for one in (*letters[axis], *own) for letter in one.split("_by_")}
        alone = {one: size if one in used else 1 for one, size in sizes.items()}
        shape = self.shape(alone)
        number = self.apply(np.arange(1, shape[axis] + 1).reshape(shape), alone)
        return Places(axis, own, number.reshape([sizes[one] for one in own]))

    def placed(self, part: np.ndarray, places: "Places", index_n: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """The entries `places` of the parameter, of the entries `index_n` of the tensor's axis."""
        axis, number = places.axis, places.number
        if not index_n.size:
            index_n, part = np.zeros(1, int), np.zeros((*part.shape[:axis], 1, *part.shape[axis + 1 :]), part.dtype)
        taken = np.take(part, np.searchsorted(index_n, number - 1).clip(0, len(index_n) - 1), axis)
        if not number.all():
            taken *= (number > 0).reshape(*number.shape, *[1] * (part.ndim - axis - 1)).astype(part.dtype)
        before = [f"({' '.join(group)})" for group in self.groups]
        before[axis] = " ".join(places.letters)
        after = zip(self.after.split(), self._composed, strict=True)
        pattern = f"{' '.join(before)} -> {' '.join(one if one in places.letters else many for one, many in after)}"
        sizes = self._with_quotients(sizes)
        free = ParsedExpression(" ".join(before)).identifiers - set(places.letters)
        return einops.rearrange(taken, pattern, **{one: sizes[one] for one in free})

    def restore(self, parameter: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """The inverse of `apply`: the tensor, or the part that is taken, with the tensor's axes one by one."""
        sizes = self._with_quotients(sizes)
        used = {letter: sizes[letter] for letter in ParsedExpression(self.composed).identifiers}
        return einops.rearrange(parameter, f"{self.composed} -> {self.taken}", **used)

    def _with_quotients(self, sizes: Mapping[str, int]) -> dict[str, int]:
        return {**sizes, **{f"{a}_by_{b}": sizes[a] // sizes[b] for a, b in self.quotients}}

    def _lengths(self, sizes: Mapping[str, int]) -> list[int]:
        return [math.prod(sizes[letter] for letter in part.split() if letter != "1") for part in self.parts]


@dataclass(frozen=True)
class Places:
    """Entries of a parameter, and where they are along an axis of its tensor.

    letters: the axes of the parameter that the tensor's axis has.
    number:  over those, one more than the entry of the tensor's axis; 0 is a zero that pads.
    """

    axis: int
    letters: Sequence[str]
    number: np.ndarray


def restored(layouts: Sequence[Layout], parameters: Sequence[np.ndarray], sizes: Mapping[str, int]) -> np.ndarray:
    """The tensor of which each layout takes a parameter: the whole tensor, or together every part once."""
    first = layouts[0]
    if not first.parts:
        return first.restore(parameters[0], sizes)
    parts = {layout.part: layout.restore(array, sizes) for layout, array in zip(layouts, parameters, strict=True)}
    whole = np.concatenate([parts[number] for number in range(len(first.parts))], axis=first.axes.index(PARTS))
    return einops.rearrange(whole, f"{' '.join(first.axes)} -> {first.before}")


def axes_of(text: str) -> list[str]:
    """The axes of one side of a pattern as they are written.

    >>> axes_of("(k ([n/k h] + h + h)) d")
    ['(k ([n/k h] + h + h))', 'd']
    """
    return re.findall(r"\((?:[^()]|\([^()]*\))*\)|\S+", text)


@lru_cache(maxsize=1024)
def parse(text: str) -> Layout:
    """The layout that `text` writes. Raises ValueError unless it has one arrow, and in a sum one part in brackets."""
    before, after = (_QUOTIENT.sub(r"\1_by_\2", side).strip() for side in text.split("->"))
    total = _SUM.search(before)
    if total is None:
        return Layout(before, after)
    parts = [part.strip() for part in total[1].split("+")]
    taken = [i for i, part in enumerate(parts) if _BRACKETS.fullmatch(part)]
    if len(taken) != 1:
        raise ValueError(f"brackets should say which one part of {total[0]} is taken")
    parts[taken[0]] = parts[taken[0]][1:-1].strip()
    return Layout(before.replace(total[0], PARTS), after, tuple(parts), taken[0])
