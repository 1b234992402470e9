"""Read the examples of a source row by row, count them by layout, and name the fields that nothing reads."""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from .conversations import Chat
from .layouts import Example, record_example, roles_of, unused_fields, with_lists
from .sources import Source


@dataclass
class Found:
    """The examples found in a source, and counts of its rows.

    Attributes:
        source: where the rows come from.
        text_field: name of the field of plain texts, if it is not `text`.
        examples: the examples; only `file_examples` fills it.
        kinds: rows with something to train on, by layout.
        unused: rows that have a field that nothing reads, by the field's name.
        empty: rows with nothing to train on; `roles` are those of their messages.
        broken: rows that were skipped; `first_broken` describes the first one.
    """

    source: Source
    text_field: str = "text"
    examples: list[Example | Chat] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)
    empty: int = 0
    roles: set[str] = field(default_factory=set)
    broken: int = 0
    first_broken: str = ""

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} of {kind}" for kind, count in self.kinds.items()) or "none"
        parts = [f"{self.source}: rows with something to train on: {kinds}"]
        if self.empty:
            roles = f" (their roles: {', '.join(sorted(self.roles))}; only assistant is learnt)" if self.roles else ""
            parts += [f"left out with nothing to train on: {self.empty}{roles}"]
        parts += [f"left out as broken: {self.broken}, the first: {self.first_broken}"] if self.broken else []
        if nulls := self.source.without_nulls:
            parts += [f"nulls among tools or arguments, taken for keys of other rows and left out: in {nulls} rows"]
        if self.unused:
            names = ", ".join(
                f"{name} ({count} row{'s' * (count != 1)})" for name, count in sorted(self.unused.items())
            )
            parts += [f"fields that are not used: {names}"]
        return "; ".join(parts)

    def read(self, tokenizer: PreTrainedTokenizerBase | None, skip_bad_rows: bool) -> Iterator[Example | Chat]:
        """Yield the examples of the source's rows one by one, keeping none, and count the rows.

        Raises:
            ValueError: for a broken row, unless `skip_bad_rows`, and for a source with nothing to train on.
        """
        self.kinds, self.unused, self.empty, self.roles, self.broken = Counter(), Counter(), 0, set(), 0
        for place, row in self.source.rows():
            if isinstance(row, dict) and self.text_field in row and self.text_field != "text":
                row = {key: value for key, value in row.items() if key != self.text_field} | {
                    "text": row[self.text_field]
                }
            try:
                row = with_lists(row)
                kind, example = record_example(row, tokenizer)
            except ValueError as error:
                if not skip_bad_rows:
                    raise ValueError(f"{place}: {error}") from error
                self.first_broken = self.first_broken if self.broken else f"{place}: {error}"
                self.broken += 1
                continue
            self.unused.update(unused_fields(row, kind, tokenizer))
            if example.texts if isinstance(example, Chat) else example.completion.strip():
                self.kinds["+".join(kind)] += 1
                yield example
            else:
                self.empty += 1
                self.roles |= roles_of(row, kind)
        if not self.kinds:
            raise ValueError(f"data_path={self.source.path!r} has no records to train on. {self}")


def file_examples(
    path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None, skip_bad_rows: bool = False, **options: Any
) -> Found:
    """Read all examples of a local file or folder, or of a data set of the hub.

    A record has the fields of one line of `layouts.LAYOUTS`; other fields are counted as unused.

    Args:
        path: path of the file or folder, or hub id.
        tokenizer: its chat template writes conversations.
        skip_bad_rows: count a broken row instead of raising.
        options: further fields of `Source`.

    Raises:
        ValueError: for a file of another kind, a file with nothing to train on, or a broken row. The message names the
            file and the line, or, in csv and parquet, the row, counted from 1 without the header.
        OSError: if a file cannot be read.
    """
    found = Found(Source(str(path), **options))
    found.examples = list(found.read(tokenizer, skip_bad_rows))
    return found


def split(examples: list[Example | Chat], held_out_size: int) -> tuple[list[Example | Chat], list[Example | Chat]]:
    """Take `held_out_size` different examples out, at random but always the same; copies of a row go together.

    Raises:
        ValueError: if no example would be left for training.
    """
    unique = list(dict.fromkeys(examples))
    if held_out_size >= len(unique):
        raise ValueError(
            f"val_set_size={held_out_size} leaves none of {len(unique)} different records to train on; give a smaller "
            "val_set_size (0: no held-out loss), or eval_data_path."
        )
    random.Random(0).shuffle(unique)
    held_out = unique[:held_out_size]
    left_out = set(held_out)
    return [example for example in examples if example not in left_out], held_out
