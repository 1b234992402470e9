"""Leave out a warning of another library's that says less than ours, and nothing else."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def without(message: str) -> Iterator[None]:
    """Show no warning that begins with `message` while the context lasts.

    `warnings.catch_warnings` would do that as well, and make Python forget which warnings it has shown: those that
    come once would come again, for every layer that enters the context. The list of filters can be changed without.
    """
    rule = ("ignore", re.compile(re.escape(message)), Warning, None, 0)
    filters = warnings.filters
    filters.insert(0, rule)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        with suppress(ValueError):  # somebody else has changed the filters meanwhile
            filters.remove(rule)  # type: ignore[attr-defined]
