"""`gralora run`: start another training program, whose LoRA becomes GraLoRA.

The program builds `peft.LoraConfig` as it always does. The flags of GraLoRA are taken out of its command line and
handed down in the environment, and in every Python that it starts, torchrun's workers included, a hook gives each
LoraConfig that is made (not those that are read from a file) these fields. docs/trainers.md has tested commands.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gralora_command import likely

from ..config import SETTINGS, LoraConfig, parse
from . import parsers

HOOK = Path(__file__).parent / "hook"
# the same variables that ms-swift makes of --model_kwargs '{"gralora_k": 4}'
VARIABLES = {name: f"GRALORA_{name.removeprefix('gralora_').upper()}" for name in SETTINGS}
USED = "GRALORA_RUN_USED"  # names a file that is written when a config has got the fields
SEEN_IN = ("peft", "peft.tuners", "peft.tuners.lora")  # where programs import LoraConfig from


def main(argv: list[str]) -> None:
    """`gralora run [FLAGS] -- PROGRAM ARGUMENTS`: exits with the program's status.

    Raises:
        FileNotFoundError: if there is no such program.
        ValueError: for a wrong flag, or if the program has ended well and made no LoRA.
    """
    settings, command = read_command(argv)
    program = find_program(command[0])
    with tempfile.TemporaryDirectory(prefix="gralora-run-") as folder:
        used = Path(folder) / "used"
        status = start([program, *command[1:]], environment(settings) | {USED: str(used)})
        if status == 0 and not used.exists():
            raise ValueError(
                f"{command[0]} ended without making a peft.LoraConfig, so it has trained no GraLoRA. "
                "Does its command ask for LoRA (trl: --use_peft; llamafactory: finetuning_type: lora)?"
            )
    if status:
        sys.exit(status)
    listed = ", ".join(f"{name} {value}" for name, value in settings.items() if name != "use_gralora")
    print(f"gralora run: its LoRA was GraLoRA{f' with {listed}' if listed else ''}", file=sys.stderr)


def read_command(argv: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The settings of GraLoRA, wherever they stand, and the program's command without them."""
    parser = parsers.run()
    given: dict[str, str] = {}
    command: list[str] = []
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag in ("-h", "--help") and not command:
            parser.print_help()
            sys.exit(0)
        elif flag.removeprefix("--") not in SETTINGS or not flag.startswith("--"):
            command.append(word)
        elif flag == "--use_gralora" and not equals:
            given["use_gralora"] = "true"
        else:
            given[flag[2:]] = value if equals else next(words, "")
    command = command[command[:1] == ["--"] :]
    if not command or command[0].startswith("-"):
        unknown = f"flag {command[0]!r} is not known" if command else "PROGRAM is missing"
        near = likely(command[0].partition("=")[0], [f"--{name}" for name in SETTINGS]) if command else None
        unknown += f", did you mean {near}?" if near else ""
        parser.error(f"{unknown}; PROGRAM and its own flags come after the flags of gralora run.")
    settings = {name: parse(name, text) for name, text in given.items()}
    if not settings.setdefault("use_gralora", True):
        raise ValueError("--use_gralora false: start the program without `gralora run`.")
    return settings, command


def environment(settings: dict[str, Any]) -> dict[str, str]:
    """The environment of the program: the settings as variables, and the hook in front of Python's path."""
    path = os.pathsep.join([str(HOOK), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {name: value for name, value in os.environ.items() if name not in VARIABLES.values()}
    return own | {VARIABLES[name]: str(value) for name, value in settings.items()} | {"PYTHONPATH": path}


def find_program(name: str) -> str:
    """Its path: a command on PATH, or one of the environment that gralora is installed in."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        raise FileNotFoundError(f"there is no program {name!r} on PATH, nor beside {sys.executable}.")
    return found


def start(command: list[str], variables: dict[str, str]) -> int:
    """Run it to its end, handing it the signals that would end this process; returns its status as a shell would."""
    process = subprocess.Popen(command, env=variables)
    before = {one: signal.signal(one, lambda number, _: process.send_signal(number)) for one in (signal.SIGTERM,)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to both
    try:
        status = process.wait()
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    return status if status >= 0 else 128 - status  # as a shell says it


# In the program


def install() -> None:
    """Make `peft.LoraConfig` GraLoRA's, with the fields that the environment has; called when PEFT is imported."""
    settings = {name: parse(name, os.environ[v]) for name, v in VARIABLES.items() if v in os.environ}
    post_init = LoraConfig.__post_init__

    def with_settings(self: LoraConfig) -> None:
        if self.peft_type is None:  # made by the program: PEFT gives the type of those that it reads or copies
            for name, value in settings.items():
                setattr(self, name, value)
            report_use()
        post_init(self)

    LoraConfig.__post_init__ = with_settings  # type: ignore[method-assign]
    for module in SEEN_IN:
        sys.modules[module].LoraConfig = LoraConfig  # type: ignore[attr-defined]


def report_use() -> None:
    """Tell `gralora run` that a config has been made."""
    if used := os.environ.get(USED):
        Path(used).touch()
