"""Checks of what an adapter's files say, before anything acts on it: an adapter may come from anyone.

A config's values have the types that they are used as, its regular expressions end, and tensors are finite.
"""

import dataclasses
import functools
import json
import re
import reprlib
import subprocess
import sys
import typing
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import PATTERNS, LoraConfig
from ..fields import facts
from ..seam import type_validator
from ..strings import printable

MATCHING_S = (
    1.0  # of a processor, to match an adapter's patterns with the model's layers once; loading does it ten times
)
WAITING_S = 60.0  # for the process that tries it
LITERAL = re.compile(r"(?:[\w-]|\\?\.)*")  # a pattern that takes no longer than the name that it is
MOST_PATTERNS, LONGEST_PATTERN = 1024, 1 << 16
MOST_COMPARISONS = 20_000_000  # of listed names with names of layers: a few seconds
MOST_MATCHES = 5_000_000  # of patterns with names of layers: the same
CACHED = 500  # patterns that `re` keeps compiled; with more, each match costs a hundred times as much
LONGEST_NAME = 1024
LARGEST = torch.finfo(torch.float32).max
LARGEST_RANK = 1 << 20  # no layer has as many features
SHOWN = 5  # names in a message


@functools.cache
def field_types() -> dict[str, Any]:
    """The type of each field's values, as JSON holds them: parts that are classes of their own are objects."""
    types = typing.get_type_hints(LoraConfig)
    types |= {f.name: kind for f in dataclasses.fields(LoraConfig) if (kind := facts(f).json_type) is not None}
    return {name: (dict | None) if _is_optional_class(kind) else kind for name, kind in types.items()}


def _is_optional_class(kind: Any) -> bool:
    return type(None) in typing.get_args(kind) and any(map(dataclasses.is_dataclass, typing.get_args(kind)))


def check_fields(fields: Mapping[str, Any]) -> None:
    """Raise ValueError if a value is not of its field's type, no finite number, or no regular expression.

    Args:
        fields: of `LoraConfig`, as JSON holds them; all of them must be known.
    """
    types = field_types()
    for name, value in fields.items():
        expected = types[name]
        try:
            type_validator(name, value, expected)
        except TypeError:
            what = getattr(expected, "__name__", None) if isinstance(expected, type) else None
            what = what or str(expected).replace("typing.", "")
            raise ValueError(f"{name}={reprlib.repr(value)} in the config must be of type {what}.") from None
    for field in dataclasses.fields(LoraConfig):
        check = {"rank": check_rank, "number": check_number}.get(facts(field).saved_as or "")
        if check is None:
            continue
        if field.name in fields or fields.get("use_gralora"):
            check(field.name, fields.get(field.name))
        pattern = facts(field).pattern
        for key, value in (fields.get(pattern) or {}).items() if pattern else ():
            check(f"{pattern}[{key!r}]", value)
    dropout = fields.get("lora_dropout", 0.0)
    check_number("lora_dropout", dropout)
    if not 0 <= dropout <= 1:
        raise ValueError(f"lora_dropout={dropout!r} in the config must be from 0 to 1.")
    for field_name, written, matched in patterns(fields):
        if len(written) > LONGEST_PATTERN:
            raise ValueError(f"{field_name} in the config has a pattern of {len(written)} characters.")
        try:
            re.compile(matched)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"{field_name} in the config has {matched[:200]!r}, no regular expression: {error}"
            ) from None


def check_number(name: str, value: Any, kinds: tuple[type[int] | type[float], ...] = (int, float)) -> None:
    """Raise ValueError if `value` is not a number of one of these types that is finite in float32."""
    if not isinstance(value, kinds) or isinstance(value, bool) or not abs(value) <= LARGEST:
        raise ValueError(f"{name}={reprlib.repr(value)} in the config must be a finite number.")


def check_rank(name: str, value: Any) -> None:
    check_number(name, value, (int,))
    if value > LARGEST_RANK:
        raise ValueError(f"{name}={reprlib.repr(value)} in the config is more than {LARGEST_RANK}.")


class Pattern(NamedTuple):
    """A regular expression of a config: its field, what the config has, and what PEFT matches with names of layers."""

    field: str
    written: str
    matched: str


def patterns(fields: Mapping[str, Any]) -> list[Pattern]:
    """Every regular expression in a config."""
    found = []
    for name in ("target_modules", "exclude_modules"):
        if isinstance(text := fields.get(name), str):
            found.append(Pattern(name, text, text))
    layers_pattern = fields.get("layers_pattern") or []
    layers_pattern = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
    found += [Pattern("layers_pattern", p, rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\.") for p in layers_pattern]
    saved = fields.get("modules_to_save") or []
    found += [Pattern("modules_to_save", module, rf"(^|.*\.){module}($|\..*)") for module in saved]
    for name in PATTERNS.values():
        found += [Pattern(name, key, rf"(.*\.)?({key})$") for key in fields.get(name) or {}]
    return found


def check_matching_time(fields: Mapping[str, Any], layers: Iterable[str]) -> None:
    """Raise ValueError if matching a config's patterns and lists with these names of layers would take long.

    Python cannot interrupt a match, so every pattern that is more than a name is first tried in a process of its own.
    """
    layers = list(layers)
    too_long = [name for name in layers if len(name) > LONGEST_NAME]
    if too_long:
        raise ValueError(f"{len(too_long)} names have more than {LONGEST_NAME} characters: {listed(too_long)}.")
    found = patterns(fields)
    counts = dict(Counter(one.field for one in found))
    matches = len(found) * len(layers) * (1 if len(found) <= CACHED else 100)
    if len(found) > MOST_PATTERNS or matches > MOST_MATCHES * (1 if len(found) <= CACHED else 10):
        raise ValueError(
            f"the config has {len(found)} patterns ({counts}) for {len(layers)} layers, more than can be matched in "
            f"seconds; at most {MOST_PATTERNS} are taken."
        )
    for name in ("target_modules", "exclude_modules"):
        entries = fields.get(name)
        if entries and not isinstance(entries, str):
            others = len(set(layers).difference(entries))
            if len(entries) * others > MOST_COMPARISONS:
                raise ValueError(
                    f"{name} has {len(entries)} entries to compare with {others} names of layers, more than can be "
                    "compared in seconds."
                )
    risky = [one for one in found if not LITERAL.fullmatch(one.written)]
    if not risky:
        return
    task = json.dumps([MATCHING_S, [f"(?:{one.matched})$" for one in risky], layers])
    command = [sys.executable, "-I", "-S", "-c", TRY]
    try:
        ended = subprocess.run(command, input=task.encode(), timeout=WAITING_S, capture_output=True).returncode == 0
    except subprocess.TimeoutExpired:
        ended = False
    if not ended:
        raise ValueError(
            f"matching {', '.join(f'{one.field}={one.written[:200]!r}' for one in risky[:SHOWN])} with the names of "
            f"layers takes more than {MATCHING_S:.0f} s; write it without nested repetitions, or as a list of names."
        )


# tries patterns; the system ends it at its limit of processor time, which a busy machine does not shorten
TRY = """
import json, re, sys
limit, patterns, names = json.load(sys.stdin)
try:
    import signal
    signal.setitimer(signal.ITIMER_VIRTUAL, limit)
except (ImportError, AttributeError):
    pass
for pattern in patterns:
    pattern = re.compile(pattern)
    for name in names:
        pattern.match(name)
"""


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError, with names, if tensors have NaN or infinite values: every output would be NaN."""
    broken = [name for name, t in tensors.items() if not is_finite(t)]
    if broken:
        raise ValueError(
            f"{len(broken)} of {len(tensors)} tensors have NaN or infinite values: {listed(broken)}. The adapter is "
            "broken, most likely since its training diverged."
        )


def is_finite(t: Tensor) -> bool:
    """Whether all values are finite in float32, which is what adapters are computed in."""
    t = t if t.dtype in (torch.float16, torch.bfloat16) else t.float()  # torch has no isfinite for float8
    return bool(t.isfinite().all())


def listed(names: list[str]) -> str:
    """The first names, for a message."""
    shown = [printable(name.removeprefix("base_model.model.")[:200]) for name in names[:SHOWN]]
    return ", ".join(shown) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
