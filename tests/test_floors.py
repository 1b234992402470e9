"""Imports inside of the package point down, from the command to tensors, and never go in a circle."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import gralora

ROOT = Path(gralora.__file__).parent
FLOORS = (  # lowest first, as in docs/design.md; a file that is named nowhere is one of PEFT's layers
    {"versions", "strings", "settings", "warned", "seam"},
    {"ops"},
    {"blocks", "factors"},
    {"config", "decompositions", "fields", "inits"},
    set(),
    {"checkpoints"},
    {"tool", "plugins"},
)
PEFT_LAYERS = 4


def modules() -> dict[str, Path]:
    """Name below `gralora` -> file; the package itself, which names all that is public, is left out."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    del found[""]
    return found


def imported(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of the package that a file imports, at its top or inside of a function."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) + 1 - node.level] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                for candidate in (".".join([*base, alias.name]), ".".join(base)):
                    if candidate in known:
                        yield candidate
                        break


def floor(name: str) -> int:
    head = name.split(".")[0]
    return next((number for number, heads in enumerate(FLOORS) if head in heads), PEFT_LAYERS)


def test_imports_point_down() -> None:
    known = modules()
    graph = {name: set(imported(name, path, known)) - {name} for name, path in known.items()}
    assert sum(map(len, graph.values())) > 100
    up = [f"{name} imports {other}" for name in graph for other in graph[name] if floor(other) > floor(name)]
    assert not up
    list(TopologicalSorter(graph).static_order())  # CycleError if there is one
