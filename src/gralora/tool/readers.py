"""Local files of training text: which there are, and their rows, each with its place in the file."""

import csv
import importlib.util
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def data_files(path: Path) -> list[Path]:
    """The file itself, or the files to read in a folder."""
    endings = ", ".join(READERS)
    if not path.exists():
        raise FileNotFoundError(f"data_path={str(path)!r} is no file or folder here; give a local one ({endings}).")
    if not path.is_dir():
        if path.suffix.lower() not in READERS:
            raise ValueError(f"data_path={str(path)!r} must end in one of {endings}.")
        return [path]
    files = sorted(file for file in path.iterdir() if file.is_file() and file.suffix.lower() in READERS)
    if not files:
        folders = ", ".join(sorted(str(folder) for folder in path.iterdir() if folder.is_dir())) or "none"
        raise ValueError(f"data_path={str(path)!r} has no file ending in {endings}; folders in it: {folders}.")
    return [file for file in files if file.name.startswith("train")] or files


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # spreadsheets put a mark in front
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 text.") from error


# A reader yields the place and the value of each row; of a row that cannot be read, a ValueError as its value.
Rows = Iterator[tuple[str, Any]]


def jsonl_rows(path: Path) -> Rows:
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                row = ValueError(f"not JSON: {error.msg}, column {error.colno}.")
            yield f"line {number}", row


def json_rows(path: Path) -> Rows:
    """The elements of a list; a file that begins with an object is read line by line."""
    source = read_text(path)
    if source.lstrip().startswith("{"):
        yield from jsonl_rows(path)
        return
    try:
        rows = json.loads(source) if source.strip() else []
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON: {error.msg}, column {error.colno}.") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path}, line 1: the file must be a list of records, not a {type(rows).__name__}.")
    # the text is known to be a valid list, so elements can be walked with what stands between them skipped
    decode, between, position = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*"), source.find("[") + 1
    line, counted = 1, 0
    for row in rows:
        position = between.match(source, position).end()
        line, counted = line + source.count("\n", counted, position), position
        yield f"line {line}", row
        _, position = decode(source, position)


def text_rows(path: Path) -> Rows:
    """A text per paragraph; blank lines separate them."""
    source = read_text(path)
    line, counted = 1, 0
    for match in re.finditer(r"(?:[^\n]*\S[^\n]*(?:\n|$))+", source):
        line, counted = line + source.count("\n", counted, match.start()), match.start()
        yield f"line {line}", {"text": match.group().rstrip("\n")}


def csv_rows(path: Path) -> Rows:
    csv.field_size_limit(2**31 - 1)  # the default is less than a long text
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    number = 0
    try:
        for number, row in enumerate(reader, start=1):
            complete = None not in row and None not in row.values()
            yield f"row {number}", row if complete else ValueError("it has more or fewer fields than the header.")
    except csv.Error as error:
        yield f"row {number + 1}", ValueError(f"not CSV, so reading ends here: {error}.")


def parquet_rows(path: Path) -> Rows:
    if importlib.util.find_spec("pyarrow") is None:
        raise ImportError(f"{path} needs the package pyarrow: pip install pyarrow")
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))
    except ArrowException as error:
        raise ValueError(f"{path}: not a parquet file that can be read: {error}") from error


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": jsonl_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".parquet": parquet_rows,
    ".txt": text_rows,
}
