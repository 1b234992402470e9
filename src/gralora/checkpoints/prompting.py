"""How an adapter was trained to be asked and where it was trained to stop, carried to the programs that serve it.

The folder of an adapter says so in its tokenizer, chat template and generation config. Some programs read these files,
others take flags; where a program has no place for one of them, docs/serving.md says so.
"""

import os
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..strings import check_printable
from .files import read_json

TEMPLATE, GENERATION = "chat_template.jinja", "generation_config.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
FILES = (TOKENIZER, TOKENIZER_CONFIG, TEMPLATE, GENERATION)


def copy_prompting(adapter: str | os.PathLike[str], out: Path, files: tuple[str, ...] = FILES) -> list[str]:
    """Copy those of the files that the adapter's folder has, over others of their names; return their names."""
    found = [name for name in files if Path(adapter, name).is_file()]
    for name in found:
        shutil.copyfile(Path(adapter, name), out / name)
    return found


@dataclass(frozen=True)
class Prompting:
    """What an adapter's folder says about prompts and ends.

    Attributes:
        folder: the adapter's folder.
        stops: token id -> text, of the tokens at which generation ends.
        end: text of the tokenizer's own end token, which programs know from the base model; None if not said.
    """

    folder: Path
    stops: dict[int, str]
    end: str | None = None

    @classmethod
    def of(cls, folder: str | os.PathLike[str]) -> "Prompting":
        """Read a folder; what it lacks is left out.

        Raises:
            ValueError: if the generation config names tokens that the tokenizer lacks, or whose texts cannot be
                printed.
        """
        folder = Path(folder)
        ids = read_json(folder / GENERATION).get("eos_token_id") if (folder / GENERATION).is_file() else None
        ids = [ids] if isinstance(ids, int) else ids or []
        stops: dict[int, str] = {}
        if ids and (folder / TOKENIZER).is_file():
            stops = texts(folder / TOKENIZER, ids)
        config = read_json(folder / TOKENIZER_CONFIG) if (folder / TOKENIZER_CONFIG).is_file() else {}
        end = config.get("eos_token")
        return cls(folder, stops, end["content"] if isinstance(end, dict) else end)

    @property
    def more(self) -> dict[int, str]:
        """The stops beside the tokenizer's own end token."""
        return {number: text for number, text in self.stops.items() if text != self.end}


def texts(tokenizer: Path, ids: list[Any]) -> dict[int, str]:
    """The texts of token ids, by a tokenizer.json."""
    from tokenizers import Tokenizer

    try:
        known = Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # it raises no class of its own
        raise ValueError(f"{str(tokenizer)!r} is not a tokenizer that can be read: {error}") from error
    found = {}
    for number in ids:
        text = known.id_to_token(number) if isinstance(number, int) and number >= 0 else None
        if text is None:
            raise ValueError(
                f"eos_token_id={number!r} in {GENERATION} is no token of {str(tokenizer)!r}; correct one of them."
            )
        check_printable("stop token", text)
        found[number] = text
    return found


# For one serving program each: put into a folder what the program reads there, and return the words that its command
# needs beside; `out` is the path that the folder will have.


def carry_peft(prompting: Prompting, folder: Path, out: Path) -> list[str]:
    copy_prompting(prompting.folder, folder)
    return []


def carry_vllm(prompting: Prompting, folder: Path, out: Path) -> list[str]:
    found = copy_prompting(prompting.folder, folder)
    words = ["--chat-template", str(out / TEMPLATE)] if TEMPLATE in found else []
    return words + (["--generation-config", str(out)] if GENERATION in found else [])


def carry_sglang(prompting: Prompting, folder: Path, out: Path) -> list[str]:
    return ["--chat-template", str(out / TEMPLATE)] if TEMPLATE in copy_prompting(prompting.folder, folder) else []


def carry_llamacpp(prompting: Prompting, folder: Path, out: Path) -> list[str]:
    found = copy_prompting(prompting.folder, folder, (TEMPLATE,))
    words = ["--jinja", "--chat-template-file", str(out / TEMPLATE)] if found else []
    # beside its end token, a GGUF file can name two more at which llama.cpp stops
    for key, number in zip(("eot", "eom"), prompting.more, strict=False):
        words += ["--override-kv", f"tokenizer.ggml.{key}_token_id=int:{number}"]
    return words


def carry_ollama(prompting: Prompting, folder: Path, out: Path) -> list[str]:
    """Add the stops to the Modelfile. Its TEMPLATE is of another language than chat templates, and is not written."""
    if prompting.stops:
        marks = {text: '"' * (3 if '"' in text else 1) for text in prompting.stops.values()}
        lines = [f"PARAMETER stop {mark}{text}{mark}\n" for text, mark in marks.items()]
        with (folder / "Modelfile").open("a", encoding="utf-8") as file:
            file.writelines(lines)
    return []


def carry_mlx(prompting: Prompting, folder: Path, out: Path) -> list[str]:
    found = copy_prompting(prompting.folder, folder, (TEMPLATE,))
    return ["--chat-template", Shell(f'"$(cat {shlex.quote(str(out / TEMPLATE))})"')] if found else []


class Shell(str):
    """A word of a command that the shell is to read as it stands."""


def command(line: str, words: list[str]) -> str:
    """A command line with more words at its end."""
    return " ".join([line, *(word if isinstance(word, Shell) else shlex.quote(word) for word in words)])
