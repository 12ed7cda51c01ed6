"""RoPE whose rotation of keys depends on the length of the prompt in which they were computed."""

from typing import NamedTuple


class Rotations(NamedTuple):
    """RoPE whose frequencies change where a prompt has more than `limit` tokens.

    by_length: whether every length above the limit has its own frequencies (dynamic NTK), or all share one set
               (LongRoPE).
    """

    limit: int
    by_length: bool

    def same(self, a: int, b: int) -> bool:
        """Whether prompts of `a` and of `b` tokens have the same frequencies.

        >>> Rotations(4096, by_length=False).same(5000, 6000)
        True
        """
        if max(a, b) <= self.limit or a == b:
            return True
        return min(a, b) > self.limit and not self.by_length
