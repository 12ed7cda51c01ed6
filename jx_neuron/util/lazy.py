"""Lazy exports: a package imports each public name from its module at first access."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType
from typing import Any


def exports(
    package: str, modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """A package's `__getattr__`, `__dir__` and `__all__`.

    modules: module, relative to `package` → the names that it exports, separated by spaces.
    """
    homes = {name: module for module, names in modules.items() for name in names.split()}

    def getter(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return getter, lambda: sorted(homes), sorted(homes)


class Moved(MetaPathFinder, Loader):
    """Imports modules by their former names.

    modules: former name → present name.
    """

    def __init__(self, modules: Mapping[str, str]):
        self._modules = modules

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        return spec_from_loader(fullname, self) if fullname in self._modules else None

    def exec_module(self, module: ModuleType) -> None:
        """Replaces `module` by the module that moved."""
        sys.modules[module.__name__] = import_module(self._modules[module.__name__])
