"""Reading the files of tasks: rows with certain fields, and where each is, for messages."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..data.layouts import text
from ..data.readers import READERS, data_files


def file_rows(path: str, fields: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The place and the fields of each row of a file, or of the files in a folder.

    Raises:
        ValueError: at a row that is broken or lacks one of the fields; the message has the place.
        OSError: if there is no such file.
    """
    for file in data_files(Path(path)):
        for place, row in READERS[file.suffix.lower()](file):
            where = f"{file}, {place}"
            if isinstance(row, ValueError):
                raise ValueError(f"{where}: {row}")
            if not isinstance(row, dict) or not all(name in row for name in fields):
                raise ValueError(f"{where}: this task needs rows with the fields {', '.join(fields)}.")
            try:
                yield where, row | {name: text(row, name) for name in fields}
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error


def needed_path(args: Any, what: str) -> str:
    if args.data_path is None:
        raise ValueError(f"task {args.task!r} needs --data_path: {what}.")
    return args.data_path
