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
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from huggingface_hub.dataclasses import type_validator
from torch import Tensor

from ..config import PATTERNS, LoraConfig
from ..fields import facts
from ..strings import printable

MATCHING_S = 10.0  # that matching an adapter's patterns with the model's layers may take
# of a regular expression that may take exponential time, or a high power of a name's length; others are not tried out
REPEATED_GROUP, REPEAT, FEW_REPEATS = re.compile(r"\)\s*[*+{]"), re.compile(r"[*+{]"), 3
LARGEST = torch.finfo(torch.float32).max
LARGEST_RANK = 1 << 20  # no layer has as many features
SHOWN = 5  # names in a message


@functools.cache
def field_types(is_gralora: bool) -> dict[str, Any]:
    """The type of each field's values, as JSON holds them.

    Args:
        is_gralora: Whether the adapter is GraLoRA. A plain LoRA may also have the parts of PEFT's config that are
            classes of their own, as those of initialisations; JSON holds them as objects.
    """
    types = typing.get_type_hints(LoraConfig)
    types |= {f.name: kind for f in dataclasses.fields(LoraConfig) if (kind := facts(f).json_type) is not None}
    if is_gralora:
        return types
    return {name: (dict | None) if _is_optional_class(kind) else kind for name, kind in types.items()}


def _is_optional_class(kind: Any) -> bool:
    return type(None) in typing.get_args(kind) and any(map(dataclasses.is_dataclass, typing.get_args(kind)))


def check_fields(fields: Mapping[str, Any]) -> None:
    """Raise ValueError if a value is not of its field's type, no finite number, or no regular expression.

    Args:
        fields: of `LoraConfig`, as JSON holds them; all of them must be known.
    """
    types = field_types(bool(fields.get("use_gralora")))
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
    for name, pattern in patterns(fields):
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{name} in the config has {pattern[:200]!r}, no regular expression: {error}") from None


def check_number(name: str, value: Any, kinds: tuple[type[int] | type[float], ...] = (int, float)) -> None:
    """Raise ValueError if `value` is not a number of one of these types that is finite in float32."""
    if not isinstance(value, kinds) or isinstance(value, bool) or not abs(value) <= LARGEST:
        raise ValueError(f"{name}={reprlib.repr(value)} in the config must be a finite number.")


def check_rank(name: str, value: Any) -> None:
    check_number(name, value, (int,))
    if value > LARGEST_RANK:
        raise ValueError(f"{name}={reprlib.repr(value)} in the config is more than {LARGEST_RANK}.")


def patterns(fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Field and content of every regular expression in a config, as PEFT matches it with the names of layers."""
    found = []
    for name in ("target_modules", "exclude_modules"):
        if isinstance(fields.get(name), str):
            found.append((name, fields[name]))
    layers_pattern = fields.get("layers_pattern") or []
    layers_pattern = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
    found += [("layers_pattern", rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.") for pattern in layers_pattern]
    found += [("modules_to_save", rf"(^|.*\.){module}($|\..*)") for module in fields.get("modules_to_save") or []]
    for name in PATTERNS.values():
        found += [(name, rf"(.*\.)?({key})$") for key in fields.get(name) or {}]
    return found


def check_matching_time(fields: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise ValueError if matching a config's patterns with these names does not end within MATCHING_S.

    Python cannot interrupt a match, so patterns that could take long are first tried in a process of their own.
    """
    risky = {
        pattern: name
        for name, pattern in patterns(fields)
        if REPEATED_GROUP.search(pattern) or len(REPEAT.findall(pattern)) > FEW_REPEATS
    }
    if not risky:
        return
    program = "import json, re, sys; ps, names = json.load(sys.stdin); [re.match(p, n) for p in ps for n in names]"
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", program],
            input=json.dumps([[f"(?:{pattern})$" for pattern in risky], list(names)]).encode(),
            timeout=MATCHING_S,
            capture_output=True,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"matching {', '.join(f'{name}={pattern[:200]!r}' for pattern, name in risky.items())} with the names of "
            f"layers takes more than {MATCHING_S:.0f} s; write it without nested repetitions, or as a list of names."
        ) from None


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError, with names, if tensors have NaN or infinite values: every output would be NaN."""
    broken = [name for name, t in tensors.items() if not is_finite(t)]
    if broken:
        raise ValueError(
            f"{len(broken)} of {len(tensors)} tensors have NaN or infinite values: {listed(broken)}. The adapter is "
            "broken, most likely since its training diverged; `gralora inspect` shows which layers."
        )


def is_finite(t: Tensor) -> bool:
    """Whether all values are finite in float32, which is what adapters are computed in."""
    t = t if t.dtype in (torch.float16, torch.bfloat16) else t.float()  # torch has no isfinite for float8
    return bool(t.isfinite().all())


def listed(names: list[str]) -> str:
    """The first names, for a message."""
    shown = [printable(name.removeprefix("base_model.model.")[:200]) for name in names[:SHOWN]]
    return ", ".join(shown) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
