"""A mapping that computes each value at each access."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class OnDemand(Mapping[str, T]):
    """Maps each of `names` to `read(name)`, which is called at each access."""

    names: Collection[str]
    read: Callable[[str], T]

    def __getitem__(self, name: str) -> T:
        if name not in self.names:
            raise KeyError(name)
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
