"""A YAML file with the flags of a command, by their names; flags on the command line win over it."""

import argparse
import dataclasses
import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """What `argv` asks for; a first argument that is no flag is a YAML file, as is that of `--config`.

    Raises:
        ValueError: if the file has an unknown key or a value that its flag would not take.
        OSError: if it cannot be read.
    """
    if argv and not argv[0].startswith("-"):
        argv = ["--config", *argv]
    named = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    named.add_argument("--config")
    found, argv = named.parse_known_args(argv)
    # what the file gives is there before the flags are read, so these replace it
    return parser.parse_args(argv, read(parser, Path(found.config)) if found.config else None)


def read(parser: argparse.ArgumentParser, path: Path) -> argparse.Namespace:
    """The file's settings, checked as if they were flags."""
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold `name: value` lines, not a {type(settings).__name__}.")
    actions = {flag.removeprefix("--"): a for a in parser._actions for flag in a.option_strings if flag[:2] == "--"}
    given: dict[str, str] = {}  # field -> key
    namespace = argparse.Namespace()
    for key, value in settings.items():
        if key not in actions or key in ("help", "config", "print_config", "dry_run"):
            near = get_close_matches(str(key), actions, n=3)
            raise ValueError(
                f"{path}: unknown key {key!r}" + (f"; did you mean {' or '.join(near)}?" if near else ".")
            )
        action = actions[key]
        if action.dest in given:
            raise ValueError(f"{path}: {given[action.dest]!r} and {key!r} are the same setting; give one.")
        given[action.dest] = key
        if value is not None:  # null is the default
            setattr(namespace, action.dest, convert(parser, action, value, f"{path}: {key}"))
    return namespace


def convert(parser: argparse.ArgumentParser, action: argparse.Action, value: Any, place: str) -> Any:
    """A value of YAML, where 1e-4 is text, as its flag would have it."""
    several = action.nargs in ("+", "*")
    if isinstance(value, dict) and takes_json(action):
        value = json.dumps(value)
    values = value if isinstance(value, list) and several else [value]
    if not values or any(isinstance(one, (dict, list)) for one in values):
        raise ValueError(f"{place}={value!r} must be {'a list of words' if several else 'one value'}.")
    if action.nargs == 0:  # a switch
        if not isinstance(value, bool):
            raise ValueError(f"{place}={value!r} must be true or false.")
        return value
    try:
        converted = [parser._get_value(action, str(one)) for one in values]
    except argparse.ArgumentError as error:
        raise ValueError(f"{place}={value!r}: {error.message}.") from error
    return converted if several else converted[0]


def takes_json(action: argparse.Action) -> bool:
    """Whether a flag takes an object as JSON text, as the Trainer's fields that end so do."""
    return action.dest.endswith(("_kwargs", "_config"))


def dump(arguments: Any, others: dict[str, Any] | None = None) -> str:
    """A dataclass of arguments as such a file, each field under its help, and other settings below."""
    lines = []
    for field in dataclasses.fields(arguments):
        value = yaml.safe_dump({field.name: getattr(arguments, field.name)}, sort_keys=False, width=10**6)
        lines.append(f"# {field.metadata['help']}\n{value}")
    return "".join(lines) + (yaml.safe_dump(others, sort_keys=False, width=10**6) if others else "")
