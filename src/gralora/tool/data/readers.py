"""Find local files of training text, and read their rows, each with its place in the file.

Rows are read one by one, so a file may be larger than memory, except a .json file that is one list.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def data_files(path: Path, split: str | None = None, preferred: str = "train") -> list[Path]:
    """Return the file itself, or the files directly in a folder, sorted.

    In a folder, only files whose names begin with `split` are taken. Without a split, those that begin with
    `preferred` are taken, or all if there are none.
    """
    endings = ", ".join(READERS)
    if not path.exists():
        raise FileNotFoundError(
            f"data_path={str(path)!r} is no file or folder here; give a local one ({endings}), or the id of a data "
            "set on the hub."
        )
    if not path.is_dir():
        if path.suffix.lower() not in READERS:
            raise ValueError(f"data_path={str(path)!r} must end in one of {endings}.")
        if split is not None:
            raise ValueError(f"split {split!r}: the file {str(path)!r} has no splits; a folder or a hub id may have.")
        return [path]
    files = sorted(file for file in path.iterdir() if file.is_file() and file.suffix.lower() in READERS)
    if not files:
        folders = ", ".join(sorted(str(folder) for folder in path.iterdir() if folder.is_dir())) or "none"
        raise ValueError(f"data_path={str(path)!r} has no file ending in {endings}; folders in it: {folders}.")
    named = [file for file in files if file.name.startswith(split or preferred)]
    if split is not None and not named:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"split {split!r}: no file in {str(path)!r} has a name that begins so; there are {names}.")
    return named or files


MAGIC = {  # first bytes of a file whose suffix does not fit its contents
    b"PAR1": "a parquet file; name it .parquet",
    b"\x1f\x8b": "compressed with gzip; decompress it",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"ARROW1": "an Arrow file; save it as parquet",
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
}


def check_contents(path: Path) -> None:
    """Raise ValueError, saying what to do, if a file that should be text is something else."""
    if path.suffix.lower() == ".parquet":
        return
    with path.open("rb") as file:
        start = file.read(8)
    for magic, what in MAGIC.items():
        if start.startswith(magic):
            raise ValueError(f"{path} is {what}.")


# A reader yields the place and the value of each row; the value of an unreadable row is a ValueError.
Rows = Iterator[tuple[str, Any]]


def lines(path: Path) -> Iterator[tuple[int, str | ValueError]]:
    """Yield number and text of each line, line break included; a ValueError for a line that is not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")  # spreadsheets write a BOM
            except UnicodeDecodeError:
                yield number, ValueError("not UTF-8 text.")


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield lines as `lines` does, but raise for an unreadable one: rows span lines, so none can be skipped."""
    for number, line in lines(path):
        if isinstance(line, ValueError):
            raise ValueError(f"{path}, line {number}: {line}")
        yield number, line


def jsonl_rows(path: Path) -> Rows:
    """Read one record per line, or the elements of the one list that the file holds."""
    if next((line for _, line in lines(path) if isinstance(line, ValueError) or line.strip()), "") in LISTS:
        yield from json_rows(path)
        return
    for number, line in lines(path):
        if isinstance(line, ValueError):
            yield f"line {number}", line
        elif line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                row = ValueError(f"not JSON: {error.msg}, column {error.colno}.")
            yield f"line {number}", row


LISTS = ("[\n", "[\r\n")  # the first line of a list over several lines


def json_rows(path: Path) -> Rows:
    """Read the elements of a list; a file that begins with an object is read line by line."""
    number, first = next(((number, line.strip()) for number, line in text_lines(path) if line.strip()), (1, ""))
    if first.startswith("{"):
        if not is_json(first) and (held := one_object(path)) is not None:
            lists = [key for key, value in held.items() if isinstance(value, list)]
            raise ValueError(
                f"{path}, line {number}: not JSON lines or a list, but one object with the fields "
                f"{', '.join(map(repr, held))}; "
                + (f"save the list in {lists[0]!r} alone." if lists else "write it on one line, or into a list.")
            )
        yield from jsonl_rows(path)
        return
    source = "".join(line for _, line in text_lines(path))
    try:
        rows = json.loads(source) if source.strip() else []
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON: {error.msg}, column {error.colno}.") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path}, line 1: the file must be a list of records, not a {type(rows).__name__}.")
    # the text is known to be a valid list, so what stands between two elements can be skipped
    decode, between, position = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*"), source.find("[") + 1
    line, counted = 1, 0
    for row in rows:
        position = between.match(source, position).end()  # type: ignore[union-attr]  # matches "" too
        line, counted = line + source.count("\n", counted, position), position
        yield f"line {line}", row
        _, position = decode(source, position)


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def one_object(path: Path) -> dict[str, Any] | None:
    """Return the object that fills the whole file, over several lines, or None."""
    try:
        held = json.loads("".join(line for _, line in text_lines(path)))
    except json.JSONDecodeError:
        return None
    return held if isinstance(held, dict) else None


def text_rows(path: Path) -> Rows:
    """Read one text per paragraph; blank lines separate paragraphs."""
    start, paragraph = 0, list[str]()
    for number, line in text_lines(path):
        if line.strip():
            start = start if paragraph else number
            paragraph.append(line)
        elif paragraph:
            yield f"line {start}", {"text": "".join(paragraph).rstrip("\r\n")}
            paragraph = []
    if paragraph:
        yield f"line {start}", {"text": "".join(paragraph).rstrip("\r\n")}


def csv_rows(path: Path) -> Rows:
    csv.field_size_limit(2**31 - 1)  # the default is too small for a long text
    reader = csv.DictReader((line for _, line in text_lines(path)), strict=True)
    number = 0
    try:
        header = list(reader.fieldnames or ())
        marks = [mark for mark in ("\t", ";") if len(header) == 1 and mark in header[0]]
        if marks:
            raise ValueError(f"{path} has columns separated by {marks[0]!r}; save it with commas.")
        for number, row in enumerate(reader, start=1):
            complete = None not in row and None not in row.values()
            yield f"row {number}", row if complete else ValueError("it has more or fewer fields than the header.")
    except csv.Error as error:
        yield f"row {number + 1}", ValueError(f"not CSV, so reading ends here: {error}.")


def parquet_rows(path: Path) -> Rows:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(1000) for row in batch.to_pylist())
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
