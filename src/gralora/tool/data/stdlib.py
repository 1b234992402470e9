"""Make the default training text from the functions of the standard library, which every Python brings along.

Signature and docstring are the prompt, and the body is the answer.
"""

import ast
import random
import sys
import sysconfig
import textwrap
import tokenize
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from .conversations import Chat
from .layouts import Example

HELD_OUT_SHARE = 8  # one module in about this many is held out
# tests, programs and generated tables: little in them is a function that its docstring describes
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data", "encodings"}


def stdlib_examples(root: Path | None = None) -> tuple[list[Example | Chat], list[Example | Chat]]:
    """Return docstring-to-body pairs from Python's own library, for training and held out.

    Top-level modules are split by a hash of their names, the same on every machine and in every Python version. No
    body occurs twice, compared without comments and formatting, so no held-out answer was trained on.

    Args:
        root: folder with the library's source; default: that of the running Python.

    Returns:
        Training pairs and held-out pairs, each in a fixed order that mixes the modules.

    Raises:
        ValueError: if the folder has no Python source, as in installations that ship bytecode only.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    train: list[Example | Chat] = []
    held_out: list[Example | Chat] = []
    seen: set[str] = set()
    for path in stdlib_files(root):
        side = held_out if is_held_out(path.relative_to(root).parts[0]) else train
        for example, code in function_examples(path):
            if code not in seen:
                seen.add(code)
                side.append(example)
    if not train or not held_out:
        raise ValueError(f"no standard library source with docstrings in {str(root)!r}; give --data_path instead.")
    for side in (train, held_out):
        random.Random(0).shuffle(side)
    return train, held_out


def stdlib_files(root: Path) -> Iterator[Path]:
    """Yield the source files of the standard library, sorted, without site-packages and `SKIPPED_FOLDERS`."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] in sys.stdlib_module_names and not SKIPPED_FOLDERS.intersection(parts):
            yield path


def is_held_out(file_or_folder: str) -> bool:
    """Tell whether a top-level module is held out; `_x` goes with `x`, since one often implements the other."""
    name = file_or_folder.removesuffix(".py").lstrip("_")
    return int(sha256(name.encode()).hexdigest(), 16) % HELD_OUT_SHARE == 0


def function_examples(path: Path) -> Iterator[tuple[Example, str]]:
    """Yield one pair per function or method that has a docstring and a body, with the body's normalised code.

    Functions inside functions are part of the outer answer. A file that Python cannot parse has none.
    """
    try:
        with tokenize.open(path) as file:
            source = file.read()
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError):
        return
    lines = source.splitlines()
    for node in outer_functions(tree):
        if ast.get_docstring(node) is None or all(is_placeholder(statement) for statement in node.body[1:]):
            continue
        docstring, first = node.body[:2]
        if first.lineno == docstring.end_lineno:
            continue  # `def f(): "doc"; return 1`: nowhere to cut between lines
        text = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])).split("\n")
        if not text[0].startswith(("def ", "async def ")):
            continue  # a string with less indentation than the code: dedent found nothing to take off
        cut = (docstring.end_lineno or node.lineno) - node.lineno + 1
        prompt, completion = "\n".join(text[:cut]) + "\n", "\n".join(text[cut:]).strip("\n")
        yield Example(prompt, completion), "\n".join(ast.unparse(statement) for statement in node.body[1:])


def outer_functions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield the functions below a node that are not inside another function, in source order."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield child
        else:
            yield from outer_functions(child)


def is_placeholder(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Pass) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and statement.value.value is ...
    )
