"""Print everything, nothing (--quiet), or one JSON object for a script (--json), for every command alike."""

import contextlib
import json
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any


def run(command: Callable[[], dict[str, Any]], quiet: bool, as_json: bool) -> None:
    """Call `command` and print its output, nothing, or its results as JSON.

    Args:
        command: prints its output and returns its results, as JSON can hold them.
        quiet: drop what the command prints, and the progress bars and warnings of libraries.
        as_json: send what the command prints to stderr, and print the results as JSON on stdout.
    """
    with contextlib.ExitStack() as stack:
        if quiet:
            stack.enter_context(silent_libraries())
            stack.enter_context(without_bars())
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        elif as_json:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        results = command()
    if as_json:
        print(json.dumps(results))


WIDTH = 80  # columns that every terminal has


def fitted(parts: list[str], separators: tuple[str, ...] = ("  ", " "), width: int = WIDTH) -> str:
    """Put parts into one line, by the first of the separators with which it fits, else into several lines."""
    for separator in separators:
        if len(line := separator.join(parts)) <= width:
            return line
    end = separators[-1].rstrip()
    lines = [parts[0]]
    for part in parts[1:]:
        if len(longer := lines[-1] + separators[-1] + part) + len(end) <= width:
            lines[-1] = longer
        else:
            lines[-1] += end
            lines.append("  " + part)
    return "\n".join(lines)


def columns() -> int:
    """The width to print for: the terminal's, or without one as much as a line takes."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Let Hugging Face's libraries draw no bars; afterwards each of them draws them or not as before."""
    import transformers
    from huggingface_hub import utils as hub

    bars = transformers.logging
    # transformers' first, since it switches the hub's, too
    afterwards = [bars.enable_progress_bar] if bars.is_progress_bar_enabled() else []
    bars_of = [library for library in (hub, sys.modules.get("datasets")) if library is not None]
    for library in bars_of:
        were_off = library.are_progress_bars_disabled()
        afterwards.append(library.disable_progress_bars if were_off else library.enable_progress_bars)
    bars.disable_progress_bar()
    for library in bars_of:
        library.disable_progress_bars()
    try:
        yield
    finally:
        for switch in afterwards:
            switch()


@contextlib.contextmanager
def silent_libraries() -> Iterator[None]:
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # otherwise the Trainer draws its progress bar
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        transformers.logging.set_verbosity(level)
