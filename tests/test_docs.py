"""The documentation does what it says: its Python blocks run, its commands parse, its files and flags exist.

Names that the pages use for what a reader has, `MODEL`, `ADAPTER`, "gpt2", data.jsonl, are folders and files in the
directory where a page is run; the embedded model is stood in for by a tiny one. A Python block that cannot run here
has a comment above it, `<!-- not run: why -->`.
"""

import argparse
import importlib.util
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import gralora
from gralora import LoraConfig, config
from gralora.tool import cli, embedded, run
from gralora.tool.data import stdlib

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PYTHON_PAGES = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]
BLOCK = re.compile(r"(?:^<!-- not run: (?P<why>.+?) -->\n+)?^```(?P<language>\S*)\n(?P<code>.*?)^```$", re.M | re.S)
INLINE = re.compile(r"`gralora (?P<command>[a-z]+) (?P<rest>[^`\n]+)`")
RUN_COMMANDS = {"inspect", "convert", "export", "merge"}  # on ADAPTER and MODEL; seconds
RUN_PAGES = {"start.md"}  # every command of it
LIBRARY = (
    "calendar.py",
    "difflib.py",
    "inspect.py",
    "statistics.py",
    "doctest.py",
    "mailbox.py",
)  # the last two are held out
DATA = [{"instruction": f"Add {i} and 1.", "output": f"{i + 1}"} for i in range(96)]


class Block(NamedTuple):
    language: str
    code: str
    line: int  # of the page, of the first line of code
    why_not_run: str | None


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("code")) + 1
        yield Block(found["language"], found["code"], line, found["why"])


def command_lines(page: Path) -> Iterator[tuple[int, list[str]]]:
    """The commands of a page's blocks: those after "$ " where a block has any, else all lines that look like one."""
    for block in blocks(page):
        if block.language not in ("", "bash"):
            continue
        lines = block.code.replace("\\\n", "  ").splitlines()
        prompts = any(line.startswith("$ ") for line in lines)
        for offset, line in enumerate(lines):
            if prompts and not line.startswith("$ "):
                continue
            for command in split_pipe(line.removeprefix("$ ")):
                if command and command[0] in ("gralora", "make", "python"):
                    yield block.line + offset, command


def split_pipe(line: str) -> Iterator[list[str]]:
    """`a "b c" | d > file  # comment` -> [a, "b c"], [d]."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|>")
    lexer.whitespace_split = True
    try:
        words = list(lexer)
    except ValueError:  # an apostrophe in prose
        return
    while words:
        end = next((i for i, word in enumerate(words) if word in ("|", ">")), len(words))
        yield words[:end]
        words = words[end + (2 if words[end : end + 1] == [">"] else 1) :]


class Parsed(Exception):
    """Raised in place of what a command does, once its own parser has accepted its arguments."""


@pytest.fixture
def parsers(monkeypatch: pytest.MonkeyPatch) -> list[argparse.ArgumentParser]:
    """Commands end with `Parsed` when they have parsed; the list gets their parsers."""
    used: list[argparse.ArgumentParser] = []
    parse = argparse.ArgumentParser.parse_args

    def parse_only(self: argparse.ArgumentParser, *args: Any) -> argparse.Namespace:
        used.append(self)
        parse(self, *args)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    return used


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory, embedded_stand_in: Path) -> Path:
    """A folder with what the pages take for granted."""
    folder = tmp_path_factory.mktemp("docs")
    model = folder / "MODEL"
    shutil.copytree(embedded_stand_in / embedded.MODEL, model)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    shape = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=270, n_positions=256)
    GPT2LMHeadModel(shape).save_pretrained(folder / "gpt2")
    tokenizer.save_pretrained(folder / "gpt2")
    config = LoraConfig(use_gralora=True, r=8, hybrid_r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    for name, factor in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(factor, std=0.02)
    adapted.save_pretrained(folder / "ADAPTER")
    saved = json.loads((folder / "ADAPTER" / "adapter_config.json").read_text())
    (folder / "ADAPTER" / "adapter_config.json").write_text(
        json.dumps(saved | {"base_model_name_or_path": str(model)})  # a page may run in a copy
    )
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DATA))
    (folder / "config.yaml").write_text("seed: 1\n")
    return folder


@pytest.fixture(scope="module")
def little_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part of Python's standard library, for `gralora finetune` without data: reading all of it takes long."""
    whole, part = Path(sysconfig.get_path("stdlib")), tmp_path_factory.mktemp("stdlib")
    for name in LIBRARY:
        shutil.copy(whole / name, part)
    return part


@pytest.fixture
def desk(
    things: Path, embedded_stand_in: Path, little_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The current directory, with a copy of `things`."""
    shutil.copytree(things, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRALORA_CACHE", str(embedded_stand_in))
    monkeypatch.setattr(stdlib.sysconfig, "get_path", lambda name: str(little_library))
    monkeypatch.setattr("sys.stdin", io.StringIO())  # nobody types
    return tmp_path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PYTHON_PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page: Path, desk: Path) -> None:
    """Block after block, in one namespace per page; a trace has the page's own line numbers."""
    namespace: dict[str, Any] = {"MODEL": "MODEL", "__name__": page.stem}
    for block in blocks(page):
        if block.language == "python" and block.why_not_run is None:
            exec(compile("\n" * (block.line - 1) + block.code, page, "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_are_of_known_kinds(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = list(blocks(page))
    assert len(found) * 2 == len(re.findall(r"^\s*```", text, re.M)), "a block is indented or not closed"
    for block in found:
        assert block.language in ("", "bash", "python", "yaml"), f"{page.name}:{block.line}"
        if block.language == "" and re.search(r"^(import|from) \w+", block.code, re.M):
            pytest.fail(f"{page.name}:{block.line}: Python in a block that does not say so, and so is not run")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page: Path, desk: Path, parsers: list[argparse.ArgumentParser]) -> None:
    for line, (program, *arguments) in command_lines(page):
        where = f"{page.name}:{line}"
        if program == "gralora" and arguments[0] == "run":
            assert len(run.read_command(arguments[1:])[1]) > 1, where  # which takes words, and starts a program
        elif program == "gralora":
            try:
                with pytest.raises(Parsed):
                    cli_module(arguments[0])(arguments[1:])
            except SystemExit:
                pytest.fail(f"{where}: gralora {' '.join(arguments)} is not accepted")
        elif program == "make":
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
            assert set(arguments) <= set(targets), where
        elif arguments[0] != "-m" or arguments[1].startswith("benchmarks"):
            source = source_of(arguments)
            for flag in (word for word in arguments[1:] if word.startswith("--")):
                if "parse" in source:
                    assert f'"{flag}"' in source, f"{where}: {arguments[0]} has no {flag}"


def source_of(arguments: list[str]) -> str:
    """Of the script, or of the module after -m, which may be a package, that Python is given."""
    if arguments[0] != "-m":
        return (ROOT / arguments[0]).read_text(encoding="utf-8")
    path = ROOT.joinpath(*arguments[1].split("."))
    return (path / "__main__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_in_the_text_exist(page: Path, desk: Path, parsers: list[argparse.ArgumentParser]) -> None:
    for found in INLINE.finditer(page.read_text(encoding="utf-8")):
        command, rest = found["command"], found["rest"]
        assert command in cli.COMMANDS, f"{page.name}: {found[0]}"
        if command == "run":  # which knows its own flags alone, before those of the program that it starts
            known, rest = {f"--{name}" for name in config.SETTINGS}, rest.partition(" -- ")[0]
        else:
            with pytest.raises((Parsed, SystemExit)):  # a sentence may leave arguments out
                cli_module(command)([])
            known = parsers[-1]._option_string_actions
        for flag in re.findall(r"(?<!\S)--[a-z0-9_-]+", rest):
            assert flag in known or flag == "--debug", f"{page.name}: gralora {command} has no {flag}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_short_commands_run(page: Path, desk: Path) -> None:
    for line, (program, *arguments) in command_lines(page):
        if program == "gralora" and (arguments[0] in RUN_COMMANDS or page.name in RUN_PAGES):
            shutil.rmtree("OUT", ignore_errors=True)
            assert cli.main(arguments) == 0, f"{page.name}:{line}: gralora {' '.join(arguments)}"


def test_site_is_built_strictly(tmp_path: Path) -> None:
    """Every page is in the navigation, and no link or anchor leads nowhere."""
    pytest.importorskip("material", reason="needs the extra `docs`")
    pytest.importorskip("mkdocstrings", reason="needs the extra `docs`")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    for name in gralora.__all__:
        assert re.search(rf'id="gralora\.[\w.]*{name}"', api), name
    assert "pip install" in (tmp_path / "index.html").read_text(encoding="utf-8")


def hooks() -> Any:
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_site_links_the_repository_and_no_password() -> None:
    for remote in ("https://host/us/gralora.git", "https://me:secret@host/us/gralora", "git@host:us/gralora.git"):
        assert hooks().address(remote) == "https://host/us/gralora"
    assert hooks().address("/home/me/gralora") is None and hooks().address("") is None
    front = hooks().front((ROOT / "README.md").read_text(encoding="utf-8"), "https://host/us/gralora")
    assert "git clone https://host/us/gralora gralora" in front and "REPOSITORY" not in front


def test_code_breaks_where_it_may() -> None:
    """Only tables break names, and what is copied is the code; a cell of much text is marked for style.css."""
    long, call = "test_layers.py::test_an_adapter", "a.call(of_one_thing=False, x)"
    cells = f"<td><code>{long}</code></td><td>Many words beside <code>{call}</code>.</td>"
    html = hooks().on_page_content(f"{cells}<p><code>{long} --top_k 1 a--b</code></p>")
    assert html.startswith("<td><code>test_<wbr>layers.<wbr>py::<wbr>test_<wbr>an_<wbr>adapter</code></td>")
    assert (
        '<td class="long">Many words beside <code>a.<wbr>call(<wbr>of_<wbr>one_<wbr>thing=<wbr>False, x)</code>.</td>'
        in html
    )
    assert html.endswith(f'<code>{long} <span class="flag">--top</span>_k 1 a--b</code></p>')


def test_every_public_name_is_in_the_reference() -> None:
    page = hooks().with_references((ROOT / "docs" / "api.md").read_text(encoding="utf-8"))
    named = {found.rpartition(".")[2] for found in re.findall(r"^::: (\S+)$", page, re.M)}
    assert set(gralora.__all__) <= named


def test_figures_are_small_and_their_text_is_text() -> None:
    drawn = re.findall(r"^FIGURES = \{(.*)\}", (ROOT / "docs" / "figures.py").read_text(encoding="utf-8"), re.M)[0]
    names = re.findall(r'"(\w+)":', drawn)
    assert len(names) >= 4
    for path in (ROOT / "docs").glob("*.svg"):
        assert path.stat().st_size < 100_000, path.name
        filled = set(re.findall(r"<(\w+)[^>]*fill: #333333", path.read_text(encoding="utf-8")))
        assert filled <= {"text", "tspan", "use", "g"}, path.name  # benchmarks.pictures turns these light in the dark
    for name in names:
        assert "<text" in (ROOT / "docs" / f"{name}.svg").read_text(encoding="utf-8"), name


def cli_module(command: str) -> Any:
    module, function, _ = cli.COMMANDS[command]
    return getattr(importlib.import_module(module), function)
