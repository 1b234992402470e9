"""What every Python started by `gralora run` reads first: once it has imported PEFT, `peft.LoraConfig` is GraLoRA's.

Python imports the first module of this name on its path; `gralora run` puts this folder in front. A `sitecustomize` of
the environment's own is imported as well.
"""

import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class AfterImport(MetaPathFinder):
    """Calls `gralora.tool.run.install` when PEFT has been imported, and is then gone from the import system.

    Programs also ask for the spec alone, to see whether PEFT is there; that must not use it up.
    """

    asked = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "peft" or self.asked:
            return None
        self.asked = True  # by the search for the real spec
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.asked = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            sys.meta_path.remove(self)
            execute(module)
            from gralora.tool.run import install

            install()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def import_own() -> None:
    """Import the `sitecustomize` that this one stands in front of, if there is one."""
    here = os.path.dirname(os.path.abspath(__file__))
    others = [path for path in sys.path if os.path.abspath(path or ".") != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


sys.meta_path.insert(0, AfterImport())
import_own()
