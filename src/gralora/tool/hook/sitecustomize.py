"""What every Python started by `gralora run` reads first: once it has imported PEFT, `peft.LoraConfig` is GraLoRA's.

Python imports the first module of this name on its path; `gralora run` puts this folder in front. A `sitecustomize` of
the environment's own is imported as well.
"""

import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent


def load(path: Path) -> ModuleType:
    """A module by its file: importing it from its package would import torch into every Python that is started."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def install(peft: ModuleType) -> None:
    from gralora.tool import run

    run.install()


def import_own() -> None:
    """Import the `sitecustomize` that this one stands in front of, if there is one."""
    others = [path for path in sys.path if Path(path or os.curdir).resolve() != HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


load(HERE.parent.parent / "after_import.py").after_import("peft", install)
import_own()
