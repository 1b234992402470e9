"""Do something to a module when it is imported, or at once if it has been. Uses nothing but Python's own modules."""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def after_import(name: str, call: Callable[[ModuleType], None]) -> None:
    """Call `call` with the module `name` as soon as its import is done."""
    if name in sys.modules:
        call(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Finder(name, call))


class _Finder(MetaPathFinder):
    """Wraps the loader of one module; gone from the import system when that module is imported.

    Programs also ask for the spec alone, to see whether a package is there; that must not use it up.
    """

    def __init__(self, name: str, call: Callable[[ModuleType], None]) -> None:
        self.name, self.call, self.is_asked = name, call, False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.name or self.is_asked:
            return None
        self.is_asked = True  # by the search for the real spec
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.is_asked = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            execute(module)
            self.call(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
