"""The `gralora` command: one table of commands, each in a module that is imported when the command is called.

It stands beside the package because importing anything of the package imports torch and PEFT, which takes seconds.
"""

import argparse
import contextlib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import os
import re
import shutil
import sys
import traceback
import warnings
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

# name -> (module, function, what it does); the function takes the command's own arguments, a list of strings
COMMANDS = {
    "finetune": ("gralora.tool.finetune", "main", "fine-tune a causal language model with GraLoRA or plain LoRA"),
    "tune": ("gralora.tool.tune", "main", "find the learning rate, rank and k, candidates side by side"),
    "data": ("gralora.tool.preview", "main", "show what training data become: layouts, lengths, what is learnt"),
    "evaluate": ("gralora.tool.evaluate", "main", "measure adapters and their base model side by side"),
    "chat": ("gralora.tool.chat", "main", "talk to a model, with adapters switched on and off"),
    "inspect": ("gralora.tool.adapters", "inspect_command", "show sizes, norms, ranks and anomalies of an adapter"),
    "convert": ("gralora.tool.adapters", "convert_command", "write an adapter in another GraLoRA format"),
    "export": ("gralora.tool.adapters", "export_command", "write the plain LoRA that an adapter equals, for serving"),
    "merge": ("gralora.tool.adapters", "merge_command", "write the base model with an adapter merged in"),
    "verify": (
        "gralora.tool.verify",
        "verify_main",
        "compare an adapter that was saved, or is served, with training",
    ),
    "run": ("gralora.tool.run", "main", "start another trainer (TRL, torchrun, ...) and make its LoRA GraLoRA"),
}

# commands whose help needs no torch -> module, which imports only Python's own, and function that makes the parser
PARSERS = ("data", "chat", "inspect", "convert", "export", "merge", "verify", "run")
LIGHT = {name: ("gralora.tool.parsers", name) for name in PARSERS}
LIGHT |= {name: (f"gralora.tool.{name}", "make_parser") for name in ("evaluate", "tune")}

HELP_COLUMNS = 80  # of help that is kept, or those of a narrower terminal: wider ones share one text
USER_ERROR = 2  # as argparse
INTERRUPTED = 130  # as a shell reports a program that Ctrl-C ended
# what a wrong argument, file or missing package raises; anything else is a fault of the program and shows its trace
USER_ERRORS = (ValueError, OSError, ImportError)

# What libraries say of themselves while they are imported, by logger, as the beginnings of messages
NOISE: dict[str, str | tuple[str, ...]] = {
    "torchao": ("Failed to load ", "Skipping import of cpp extensions"),  # kernels, for GPUs or for another torch
    "torch.utils._pytree": "%s is an Enum subclass",  # torchao to torch
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",  # it has another one
    "transformers.trainer_utils": "mtime may not be reliable",  # in whose stead it orders checkpoints by their steps
}
# Modules that warn of what other libraries call there; those that read a user's settings are not among them
LIBRARIES = (
    r"(transformers|trl|peft|accelerate|datasets|torch|torchao|bitsandbytes|lm_eval)\.(?!training_args|.*config)"
)
# Flags of other programs that are spelt like none of ours
OTHER_FLAGS = {"--lr": "--learning_rate", "--k": "--gralora_k", "--r": "--lora_r", "--rank": "--lora_r"}


class Parser(argparse.ArgumentParser):
    """A parser that takes no abbreviations, and names what a wrong flag or choice may have meant."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False} | options)
        self.caller: argparse.ArgumentParser = self

    def of(self, caller: argparse.ArgumentParser | None) -> Any:
        """Speak for a parser that has taken its own flags out of the line before."""
        if caller is not None:
            self.prog, self.usage, self.caller = caller.prog, caller.usage, caller
        return self

    def error(self, message: str) -> NoReturn:
        unknown, _, listed = message.partition("unrecognized arguments: ")
        if not unknown:
            actions = self._actions + self.caller._actions
            given, known = listed.split(), [flag for action in actions for flag in action.option_strings]
        else:
            wrong = re.match(r".*invalid choice: '(.*?)' \(choose from (.*)\)", message)
            given, known = ([wrong[1]], re.findall(r"[\w.-]+", wrong[2])) if wrong else ([], [])
        flags = [word.partition("=")[0] for word in given]
        meant = [near for flag in flags if (near := likely(flag, known))]
        super().error(message + (f"; did you mean {' '.join(meant)}?" if meant else ""))


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="Print errors only.")
    parser.add_argument(
        "--json", action="store_true", help="Print the results as one JSON object on stdout, and all else on stderr."
    )


def likely(word: str, known: list[str]) -> str | None:
    """What somebody who wrote `word` may have meant of what is known; None if nothing is like it."""
    other = OTHER_FLAGS.get(word)
    return other if other in known else next(iter(get_close_matches(word, known, n=1)), None)


def is_no_noise(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(NOISE[record.name])


def leave_out_noise() -> None:
    """Show neither `NOISE` nor how libraries call each other; what they warn of the user's work is shown."""
    for name in NOISE:
        logging.getLogger(name).addFilter(is_no_noise)
    warnings.filterwarnings("ignore", category=FutureWarning, module=LIBRARIES)


def make_parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    parser = Parser(
        prog="gralora",
        description="GraLoRA (Granular Low-Rank Adaptation) on Hugging Face PEFT.",
        epilog="commands:\n"
        + "\n".join(f"  {name:{width}}  {what}" for name, (_, _, what) in COMMANDS.items())
        + "\n\nexample:\n"
        + "  gralora finetune --data_path data.jsonl --output_dir out \\\n"
        + "      --use_gralora --gralora_scaling matched"
        + f"\n\nexit status: 0 done, {USER_ERROR} wrong arguments or data, {INTERRUPTED} stopped by Ctrl-C, 1 a fault",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show where an error came from (also after the command)")
    parser.add_argument(
        "command", choices=COMMANDS, metavar="command", help="one of the below; command --help: its flags"
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the command")
    return parser


def load_light(module: str) -> ModuleType:
    """Load a command's module by its file, since importing it from its package would import torch."""
    package = importlib.util.find_spec("gralora")
    assert package is not None and package.submodule_search_locations is not None
    path = Path(package.submodule_search_locations[0], *module.split(".")[1:]).with_suffix(".py")
    spec = importlib.util.spec_from_file_location(module, path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def load(module: str, command: str) -> ModuleType:
    """A command's module; ImportError with what to install where a package is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise missing(command, error) from error


def missing(command: str, error: ModuleNotFoundError) -> ImportError:
    """The error of a missing package with what to install; the same error if a module of gralora's is missing."""
    if (error.name or "gralora").startswith("gralora"):
        return error
    return ImportError(f"{command} needs the package {error.name}, which is not installed: {install('finetune')}")


def install(extra: str) -> str:
    """The command that installs an extra of gralora from where gralora itself came from."""
    tree = Path(__file__).resolve().parents[1]
    if (tree / "pyproject.toml").is_file():  # a clone
        return f"pip install '{tree}[{extra}]'"
    try:
        text = importlib.metadata.distribution("gralora").read_text("direct_url.json")  # as PEP 610 defines it
    except importlib.metadata.PackageNotFoundError:
        text = None
    source = json.loads(text) if text else {}
    if not source.get("url"):
        return f"pip install 'gralora[{extra}]'"
    kind = f"{source['vcs_info']['vcs']}+" if "vcs_info" in source else ""
    return f"pip install 'gralora[{extra}] @ {kind}{source['url']}'"


def cache_folder() -> Path:
    """`$GRALORA_CACHE`, else `gralora` in `$XDG_CACHE_HOME`, else `~/.cache/gralora`."""
    if folder := os.environ.get("GRALORA_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gralora"


def print_help(command: str) -> None:
    """Print a command's help, and keep it for the next time: to import what its flags come from takes seconds."""
    kept = cache_folder() / "help" / f"{command}-{help_key()}.txt"
    try:
        text = kept.read_text(encoding="utf-8")
    except OSError:
        if sys.stderr.isatty():
            print("reading the flags of the installed TRL and transformers, once ...", file=sys.stderr)
        module, function, _ = COMMANDS[command]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            getattr(load(module, command), function)(["--help"])
        text = printed.getvalue()
        with contextlib.suppress(OSError):  # it is printed all the same
            kept.parent.mkdir(parents=True, exist_ok=True)
            new = kept.with_name(f"{kept.name}.{os.getpid()}")
            new.write_text(text, encoding="utf-8")
            os.replace(new, kept)
    print(text, end="")


def help_width() -> int:
    return min(HELP_COLUMNS, shutil.get_terminal_size().columns)


def help_key() -> str:
    """Name all that a help text depends on: gralora's files, versions of what has flags of its own, and the width."""
    facts = [sys.version, str(help_width())]
    for package in ("trl", "transformers", "peft", "lm_eval"):
        try:
            facts.append(importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            facts.append("")
    found = importlib.util.find_spec("gralora")
    for file in sorted(Path(found.origin).parent.rglob("*.py")) if found and found.origin else ():
        facts.append(f"{file} {file.stat().st_mtime_ns}")
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def printable(message: object) -> str:
    """A message without the control characters that a stranger's file could have put into it."""
    from gralora.strings import printable

    return printable(message, lines=True)


def main(argv: list[str] | None = None) -> int:
    """Run one command, `argv` or else the process's arguments, and return the exit status."""
    leave_out_noise()
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        make_parser().print_help(sys.stderr)
        return USER_ERROR
    debug = "--debug" in argv
    call = make_parser().parse_args([argument for argument in argv if argument != "--debug"])
    module, function, _ = COMMANDS[call.command]
    own = call.arguments[:1] if call.command == "run" else call.arguments  # the others may be another program's
    if call.command != "run" and ("--quiet" in own or not sys.stderr.isatty()):
        os.environ.setdefault("TQDM_DISABLE", "1")  # tqdm reads it when it is imported; in a file, a step is a line
    if call.command in LIGHT and {"-h", "--help"} & set(own):
        light, make = LIGHT[call.command]
        getattr(load_light(light), make)().print_help()
        return 0
    try:
        if call.arguments in (["-h"], ["--help"]):
            print_help(call.command)
            return 0
        getattr(load(module, call.command), function)(call.arguments)
    except KeyboardInterrupt as stop:
        print(f"gralora {call.command}: {printable(stop) or 'interrupted'}", file=sys.stderr)
        return INTERRUPTED
    except USER_ERRORS as error:
        shown = missing(call.command, error) if isinstance(error, ModuleNotFoundError) else error
        if debug:
            traceback.print_exc()
        hint = "" if debug else " (--debug shows where)"
        print(f"gralora {call.command}: error: {printable(shown)}{hint}", file=sys.stderr)
        return USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
