"""What tests of refusals' advice share: cases by the words of a refusal, and the refusals that a source file has."""

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ADVISES = re.compile(
    r"`gralora|(?<![\w-])--[a-z]|convert_lora|pip install|\b(give|use|remove|choose|say|leave|correct|write|save|move"
    r"|load|merge|wait|see|export|install|train|update|downloaded|try|run|keeps)\b(?! the)"
)
Cases = dict[str, Callable[..., Any]]


def register_in(cases: Cases) -> Callable[[str], Callable[[Callable[..., Any]], Callable[..., Any]]]:
    """A decorator of what follows the advice of the refusal whose source has the words that it is given."""

    def case(words: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            cases[words] = function
            return function

        return register

    return case


@contextmanager
def refused(*words: str, error: type[Exception] = ValueError) -> Iterator[None]:
    """The block is refused, with all of these words."""
    with pytest.raises(error) as raised:
        yield
    assert all(word in str(raised.value) for word in words), str(raised.value)


def follow(function: Callable[..., Any], folder: Path, request: pytest.FixtureRequest) -> None:
    """Call a case with a folder, and with the fixtures that its other arguments name."""
    names = function.__code__.co_varnames[1 : function.__code__.co_argcount]
    function(folder, **{name: request.getfixturevalue(name) for name in names})


def refusals(files: Iterable[Path]) -> dict[str, str]:
    """Where each refusal is raised -> the words of its message in the source, values left out."""
    found = {}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                parts = [p for argument in node.exc.args for p in ast.walk(argument)]
                texts = [p for p in parts if isinstance(p, ast.Constant) and isinstance(p.value, str)]
                texts.sort(key=lambda p: (p.lineno, p.col_offset))
                found[f"{file.name}:{node.lineno}"] = " ".join("".join(p.value for p in texts).split())
    return found


def check_all_are_followed(found: Mapping[str, str], cases: Cases, elsewhere: Mapping[str, tuple[str, str]]) -> None:
    """Each refusal that advises is in a case, or in a test elsewhere that exists; and each case is of a refusal."""
    squeezed = [" ".join(words.split()) for words in [*cases, *elsewhere]]
    missing = [
        f"{where}: {text}"
        for where, text in found.items()
        if ADVISES.search(text) and not any(words in text for words in squeezed)
    ]
    assert not missing, missing
    old = [words for words in squeezed if not any(words in text for text in found.values())]
    assert not old, old
    for file, name in elsewhere.values():
        assert f"def {name}(" in (Path(__file__).parent / file).read_text()
