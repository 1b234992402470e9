"""The command line: which commands there are, and how it ends."""

import contextlib
import importlib
import importlib.metadata
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from advice import refusals

import gralora
import gralora_command
from gralora.checkpoints.export import DIFFUSERS
from gralora.checkpoints.formats import FORMATS
from gralora.checkpoints.targets import GGUF_TARGETS, TARGETS
from gralora.config import SETTINGS
from gralora.settings import HELP
from gralora.tool import cli, parsers
from gralora.tool.arguments import LENGTH
from gralora.tool.data.tokens import TRUNCATION_MODES
from gralora.tool.models import EMBEDDED
from gralora_command import LIGHT

EXAMPLE = Path(__file__).parents[1] / "example_gralora_finetuning.py"


@pytest.fixture
def command(monkeypatch):
    """Add a command `try` that calls a function given by the test."""

    def add(function) -> None:
        module = type(sys)("gralora_try")
        module.run = function
        monkeypatch.setitem(sys.modules, "gralora_try", module)
        monkeypatch.setitem(cli.COMMANDS, "try", ("gralora_try", "run", "what it does"))

    return add


def failing(error: BaseException):
    def run(arguments: list[str]) -> None:
        raise error

    return run


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name, capsys, monkeypatch, tmp_path):
    """Its own, which is kept, and the same when it was kept."""
    monkeypatch.setenv("GRALORA_CACHE", str(tmp_path))
    module, function, _ = cli.COMMANDS[name]
    with pytest.raises(SystemExit) as stop:
        getattr(importlib.import_module(module), function)(["--help"])
    assert stop.value.code == 0
    own = capsys.readouterr().out
    assert f"usage: gralora {name}" in own
    assert re.search(f"^examples?:\n  gralora {name} ", own, re.MULTILINE)
    for argument in ("--help", "-h"):
        assert cli.main([name, argument]) == 0 and capsys.readouterr().out == own
    if name in LIGHT:
        return
    (kept,) = (tmp_path / "help").iterdir()
    kept.write_text("kept")
    assert cli.main([name, "--help"]) == 0 and capsys.readouterr().out == "kept"


def test_help_is_written_anew_for_another_width_and_where_nothing_can_be_kept(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("GRALORA_CACHE", str(tmp_path / "file" / "no folder"))
    (tmp_path / "file").write_text("")
    assert cli.main(["finetune", "--help"]) == 0 and "usage: gralora finetune" in capsys.readouterr().out
    monkeypatch.setenv("GRALORA_CACHE", str(tmp_path))
    capsys.readouterr()
    for width in (60, 80, 120):  # the last two share one text
        monkeypatch.setenv("COLUMNS", str(width))
        assert cli.main(["finetune", "--help"]) == 0
        wrapped = [line for line in capsys.readouterr().out.splitlines() if line.startswith(" " * 20)]
        assert min(width, 80) - 15 < max(map(len, wrapped)) <= min(width, 80)
    assert len(list((tmp_path / "help").iterdir())) == 2


def test_help_that_was_kept_imports_no_command(monkeypatch, tmp_path):
    monkeypatch.setenv("GRALORA_CACHE", str(tmp_path))
    code = "import sys, gralora_command as c; c.main(['finetune', '--help']); print('torch' in sys.modules)"
    said = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout for _ in range(2)]
    assert said[0].endswith("True\n") and said[1] == said[0].replace("True\n", "False\n")


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    output = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(name in output and what in output for name, (_, _, what) in cli.COMMANDS.items())
    assert max(map(len, output.splitlines())) <= 80
    assert cli.main([]) == cli.USER_ERROR and capsys.readouterr() == ("", output)


def test_help_imports_no_command():
    code = "import sys, gralora.tool.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {m for m, _, _ in c.COMMANDS.values()} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("name", LIGHT)
def test_help_of_light_commands_needs_no_torch(name):
    code = f"import sys, gralora_command as c\ntry: c.main([{name!r}, '--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'transformers', 'peft', 'gralora'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    assert f"usage: gralora {name}" in done.stdout


def test_words_of_light_parsers_are_those_of_the_tables():
    """They are written down once more, since the tables import torch."""
    assert tuple(FORMATS) == parsers.READABLE
    assert tuple(name for name, known in FORMATS.items() if known.write_config is not None) == parsers.WRITABLE
    assert (*TARGETS, DIFFUSERS) == parsers.TARGETS and tuple(GGUF_TARGETS) == parsers.GGUF_TARGETS
    assert tuple(TRUNCATION_MODES) == parsers.TRUNCATION_MODES
    assert (parsers.LENGTH, parsers.EMBEDDED) == (LENGTH, EMBEDDED)
    assert list(HELP) == list(SETTINGS)
    assert set(LIGHT) == set(cli.COMMANDS) - {"finetune"}, "whose flags are fields of TRL's config, too"


@pytest.mark.parametrize("argv", [["nonsense"], ["finetune", "--no_such_flag", "1"], ["finetune", "--seed", "x"]])
def test_wrong_usage_ends_with_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == cli.USER_ERROR == 2
    assert "usage: gralora" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, meant",
    [
        (["finetun"], "finetune"),
        (["finetune", "--use_gralra"], "--use_gralora"),
        (["finetune", "--lr", "1e-4", "--rank=8"], "--learning_rate --lora_r"),
        (["verify", "adapter", "--serve", "URL"], "--served"),
        (["export", "adapter", "out", "--for", "vlm"], "vllm"),
        (["data", "x.jsonl", "--row", "3"], "--rows"),
        (["tune", "--rung", "0.1", "--use_gralra"], "--rungs --use_gralora"),
    ],
    ids=" ".join,
)
def test_what_was_meant_is_suggested(argv, meant, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == cli.USER_ERROR
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith(f"; did you mean {meant}?") and said.startswith(("gralora: ", f"gralora {argv[0]}: error: "))


def test_nothing_is_suggested_for_what_is_like_nothing(capsys):
    with pytest.raises(SystemExit):
        cli.main(["verify", "adapter", "--zzzzz"])
    assert "did you mean" not in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["finetune", "--use_gralra"], ["inspect", "nowhere"]])
def test_a_command_says_nothing_of_its_libraries(argv):
    """In a process of its own, where torchao and bitsandbytes are imported for the first time; nor draws any bars."""
    code = f"import sys, gralora_command as c; s = c.main({argv!r}); import tqdm; list(tqdm.tqdm([1])); sys.exit(s)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == cli.USER_ERROR and done.stdout == ""
    said = [line for line in done.stderr.splitlines() if not line.startswith(("usage: ", f"gralora {argv[0]}: error"))]
    assert said == []


def test_what_libraries_warn_of_is_shown_or_not_by_who_is_meant():
    """FutureWarnings of one library's code about another's are left out; those of settings and of users' are not."""
    code = """
import logging, warnings, gralora_command as c
c.leave_out_noise()
for module in ("transformers.modeling_utils", "trl.models.utils", "transformers.training_args", "data"):
    warnings.warn_explicit(module, FutureWarning, "file", 1, module)
logging.getLogger("torchao").warning("Failed to load x: y")
logging.getLogger("torchao").warning("another")
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    lines = [line for line in said.splitlines() if "FutureWarning" in line or "another" in line or "load" in line]
    assert lines == ["file:1: FutureWarning: transformers.training_args", "file:1: FutureWarning: data", "another"]


GIT = {"url": "https://host/gralora.git", "vcs_info": {"vcs": "git", "commit_id": "1"}}


@pytest.mark.parametrize(
    "source, expected",
    [
        (None, "pip install 'gralora[finetune]'"),  # from an index
        (GIT, "pip install 'gralora[finetune] @ git+https://host/gralora.git'"),
        (
            {"url": "file:///wheels/gralora.whl", "archive_info": {}},
            "'gralora[finetune] @ file:///wheels/gralora.whl'",
        ),
    ],
)
def test_what_to_install_comes_from_where_gralora_came_from(source, expected, monkeypatch, tmp_path, command, capsys):
    """A module that a command imports late is no other case."""
    assert gralora_command.install("x") == f"pip install '{EXAMPLE.parent}[x]'", "a clone"
    monkeypatch.setattr(gralora_command, "__file__", str(tmp_path / "site-packages" / "gralora_command.py"))
    said = SimpleNamespace(read_text=lambda name: json.dumps(source) if source and name == "direct_url.json" else None)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: said)
    command(failing(ModuleNotFoundError("No module named 'rich'", name="rich")))
    assert cli.main(["try"]) == cli.USER_ERROR
    said = capsys.readouterr().err
    assert "gralora try: error: try needs the package rich, which is not installed: pip install " in said
    assert expected in said


def test_arguments_reach_the_command(command):
    given = []
    command(given.append)
    assert cli.main(["try", "--r", "8", "folder"]) == 0
    assert cli.main(["try", "--debug", "--r"]) == 0
    assert given == [["--r", "8", "folder"], ["--r"]]


@pytest.mark.parametrize("error", [ValueError("r=3 is odd"), OSError("no such file"), ImportError("install it")])
def test_user_errors_have_no_trace(command, capsys, error):
    command(failing(error))
    assert cli.main(["try"]) == cli.USER_ERROR
    output = capsys.readouterr().err
    assert output == f"gralora try: error: {error} (--debug shows where)\n"


@pytest.mark.parametrize("argv", [["--debug", "try"], ["try", "--debug"]])
def test_debug_shows_the_trace(command, capsys, argv):
    command(failing(ValueError("r=3 is odd")))
    assert cli.main(argv) == cli.USER_ERROR
    output = capsys.readouterr().err
    assert "Traceback" in output and "in run" in output and output.endswith("gralora try: error: r=3 is odd\n")


def test_faults_of_the_program_are_not_hidden(command):
    command(failing(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["try"])


@pytest.mark.parametrize("message, shown", [("saved in x", "saved in x"), ("", "interrupted")])
def test_interrupt(command, capsys, message, shown):
    command(failing(KeyboardInterrupt(message)))
    assert cli.main(["try"]) == cli.INTERRUPTED == 130
    assert capsys.readouterr().err == f"gralora try: {shown}\n"


def test_example_script_is_the_finetune_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--base_model", "gpt2", "--batch_size", "5"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert stop.value.code == cli.USER_ERROR
    assert "gralora finetune: error: batch_size=5 must be divisible" in capsys.readouterr().err


# Flags of other programs that refusals name, and whose
FOREIGN = {"use_peft": "trl", "tuner_type": "ms-swift"}
MODULES = {  # where a refusal stands -> the commands that its flags are of
    "tool/tuning": ["tune", "finetune"],
    "tool/tune.py": ["tune", "finetune"],
    "tool/evaluat": ["evaluate"],
    "tool/side_by_side.py": ["evaluate", "chat"],
    "tool/verify.py": ["verify", "finetune"],
    "tool/run.py": ["run"],
    "checkpoints": ["export", "merge", "convert", "inspect"],
}


def test_refusals_name_flags_and_commands_that_exist(capsys: pytest.CaptureFixture) -> None:
    """Of the command that refuses, where one module is of one command; those of the data are finetune's."""
    flags = {}
    for command in cli.COMMANDS:
        with contextlib.suppress(SystemExit):
            cli.main([command, "--help"])
        flags[command] = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", capsys.readouterr().out))
    package, named, missing = Path(gralora.__file__).parent, 0, []
    for file in package.rglob("*.py"):
        where = str(file.relative_to(package))
        commands = next((c for place, c in MODULES.items() if where.startswith(place)), ["finetune"])
        known = set().union(FOREIGN, *(flags[command] for command in commands))
        for line, text in refusals([file]).items():
            for flag in re.findall(r"(?<![\w-])--([a-z][\w-]*)", text):
                named += 1
                missing += [] if flag in known else [f"{line}: --{flag}"]
            missing += [f"{line}: {c}" for c in re.findall(r"`gralora ([a-z]\w*)", text) if c not in cli.COMMANDS]
    assert named > 40 and not missing, missing
