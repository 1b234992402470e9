"""Where rows come from: a local file, a folder of files, or a data set of the Hugging Face hub."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .readers import READERS, Rows, check_contents, data_files

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
SAVED_BY_DATASETS = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves in a folder


@dataclass
class Source:
    """Rows of one split.

    Attributes:
        path: a file that one of `READERS` reads, a folder of such files or of `datasets.save_to_disk`, or a hub id.
        split: how the names of a folder's files begin, or the split of a data set; `preferred` if None.
        preferred: the split to take if none is named; if no file of a folder belongs to it, all are taken.
        config: configuration of a data set of the hub that has several.
        streaming: read a data set of the hub row by row instead of downloading it first.
        without_nulls: rows of the last pass in which nulls among tools or arguments of calls were left out.
    """

    path: str
    split: str | None = None
    preferred: str = "train"
    config: str | None = None
    streaming: bool = False
    without_nulls: int = 0

    def __post_init__(self) -> None:
        path = Path(self.path)
        saved = path.is_dir() and any((path / name).exists() for name in SAVED_BY_DATASETS)
        on_hub = not path.exists() and path.suffix.lower() not in READERS and HUB_ID.fullmatch(self.path)
        self.files = [] if saved or on_hub else data_files(path, self.split, self.preferred)
        if not on_hub and self.config is not None:
            raise ValueError(f"dataset_config={self.config!r} is for data sets of the hub, {self.path!r} is local.")
        if not self.files:
            self.dataset = self.load_saved() if saved else self.load_from_hub()

    def __str__(self) -> str:
        if not self.files:
            return f"{self.path}, {self.split or self.preferred}"
        more = f" and {len(self.files) - 3} more files" if len(self.files) > 3 else ""
        return f"{', '.join(map(str, self.files[:3]))}{more}"

    def rows(self) -> Rows:
        """Yield place and value of each row; the value of an unreadable row is a ValueError."""
        self.without_nulls = 0
        for file in self.files:
            check_contents(file)
            read = self.with_own_keys if file.suffix.lower() == ".parquet" else lambda row: row
            yield from ((f"{file}, {place}", read(row)) for place, row in READERS[file.suffix.lower()](file))
        if not self.files:
            rows = enumerate(self.dataset, start=1)
            yield from ((f"{self}, row {number}", self.with_own_keys(row)) for number, row in rows)

    def with_own_keys(self, row: dict[str, Any]) -> dict[str, Any]:
        """Leave out the nulls inside the fields of a row, and count the rows whose tools or arguments had some.

        Arrow and parquet give an object the keys of the same object in all rows, and null where it had none: tool
        calls would be learnt with the arguments of other tools.
        """
        kept = {name: without_nulls(value) for name, value in row.items()}
        self.without_nulls += any(map(has_null, (row.get("tools"), *arguments(row))))
        return kept

    def load_saved(self) -> Any:
        import datasets  # a second, which local files do not need

        found = datasets.load_from_disk(self.path)
        if not isinstance(found, datasets.DatasetDict):
            if self.split is not None:
                raise ValueError(f"split {self.split!r}: the data set in {self.path!r} was saved without splits.")
            return found
        if (self.split or self.preferred) not in found:
            raise ValueError(f"split {self.split or self.preferred!r}: {self.path!r} has the splits {[*found]}.")
        return found[self.split or self.preferred]

    def load_from_hub(self) -> Any:
        import datasets  # a second, which local files do not need

        try:
            return datasets.load_dataset(
                self.path, self.config, split=self.split or self.preferred, streaming=self.streaming
            )
        except (OSError, RuntimeError) as error:
            raise OSError(
                f"data_path={self.path!r} is no file or folder here, and no data set that could be loaded from the "
                f"hub or its cache (HF_HUB_OFFLINE=1 allows only the cache): {error}"
            ) from error


def without_nulls(value: Any) -> Any:
    """Copy a JSON value without the keys of its objects that are null."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def has_null(value: Any) -> bool:
    """Tell whether a key of an object inside a JSON value is null."""
    if isinstance(value, dict):
        return any(inner is None or has_null(inner) for inner in value.values())
    return isinstance(value, list) and any(map(has_null, value))


def arguments(value: Any) -> Iterator[Any]:
    """Yield the arguments of all tool calls in a row."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from [inner] if key == "arguments" else arguments(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from arguments(inner)
