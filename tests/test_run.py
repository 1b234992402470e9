"""`gralora run`: what it takes from a command line, and what the programs that it starts then have."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gralora.tool import run

PROGRAM = """
import importlib.util, json, sys
assert importlib.util.find_spec("peft")  # as transformers asks whether PEFT is there
import peft
from peft.tuners.lora import LoraConfig
class Theirs(LoraConfig):  # as ms-swift's
    pass
own, theirs = peft.LoraConfig(r=8), Theirs(r=8)
own.save_pretrained(sys.argv[1])
peft.LoraConfig.from_pretrained(sys.argv[2])
plain = peft.PeftConfig.from_pretrained(sys.argv[2])
import copy, dataclasses
same = dataclasses.replace(own)
print(json.dumps([[c.use_gralora, c.gralora_k, c.hybrid_r] for c in (own, theirs, same, plain)]), *sys.argv[3:])
"""


def test_flags_stand_anywhere():
    wanted = {"use_gralora": True, "gralora_k": 4, "hybrid_r": 2}
    command = ["trl", "sft", "--lora_r", "8", "--", "x"]
    for argv in (
        ["--gralora_k", "4", "--hybrid_r=2", "--", *command],
        ["--gralora_k=4", "--hybrid_r", "2", *command],
        ["--", "trl", "sft", "--gralora_k", "4", "--lora_r", "8", "--use_gralora", "--hybrid_r", "2", "--", "x"],
        ["--", "trl", "sft", "--use_gralora=true", "--gralora_k=4", "--lora_r", "8", "--hybrid_r=2", "--", "x"],
    ):
        assert run.read_command(argv) == (wanted, command)
    assert run.read_command(["--", "p"]) == ({"use_gralora": True}, ["p"])


def test_bad_command_lines(capsys):
    for argv, message in (
        (["--gralora_k", "few", "--", "trl"], "gralora_k='few' must be a whole number or 'auto'"),
        (["--hybrid_r"], "PROGRAM is missing"),
        (["--use_gralora"], "PROGRAM is missing"),
        (["--lora_r", "8", "trl"], "flag '--lora_r' is not known"),
        (["--gralora_K=8", "trl"], "did you mean --gralora_k?"),
        (["--use_gralora=false", "trl"], "start the program without `gralora run`"),
        (["trl", "--gralora_scaling", "big"], "gralora_scaling='big' must be one of lora, matched"),
    ):
        with pytest.raises((ValueError, SystemExit)) as raised:
            run.read_command(argv)
        assert message in str(raised.value) + capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="no program 'no-such-program'"):
        run.main(["--", "no-such-program"])


@pytest.fixture
def program(tmp_path: Path) -> Path:
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    return tmp_path


def test_the_program_and_its_children_make_gralora(program, capfd, monkeypatch):
    """A child of a child, as torchrun's workers are, with a `sitecustomize` of the environment's own in its path."""
    own = program / "own"
    own.mkdir()
    (own / "sitecustomize.py").write_text("print('their sitecustomize')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(own), *filter(None, [os.environ.get("PYTHONPATH")])]))
    child = [sys.executable, str(program / "program.py"), str(program / "saved"), str(program / "plain")]
    parent = f"import subprocess, sys; sys.exit(subprocess.call({child!r} + sys.argv[1:]))"
    run.main(["--gralora_k", "4", "--", sys.executable, "-c", parent, "--max_steps", "3", "--hybrid_r", "4"])
    ours = [True, 4, 4]
    printed = capfd.readouterr()
    assert printed.err.endswith("gralora run: its LoRA was GraLoRA with gralora_k 4, hybrid_r 4\n")
    out = printed.out.splitlines()
    assert out.count("their sitecustomize") == 2
    assert out[-1] == f"{json.dumps([ours, ours, ours, [False, 'auto', 0]])} --max_steps 3"
    saved = json.loads((program / "saved" / "adapter_config.json").read_text())
    assert (saved["use_gralora"], saved["gralora_k"], saved["hybrid_r"], saved["gralora_format"]) == (*ours, 1)


def test_a_program_that_trains_no_lora_is_reported():
    with pytest.raises(ValueError, match="ended without making a peft.LoraConfig"):
        run.main(["--", sys.executable, "-c", "pass"])


def test_status_and_signals_of_the_program(tmp_path):
    with pytest.raises(SystemExit) as raised:
        run.main(["--", sys.executable, "-c", "raise SystemExit(7)"])
    assert raised.value.code == 7
    code = f"import pathlib, time; pathlib.Path({str(tmp_path / 'up')!r}).touch(); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-m", "gralora.tool.cli", "run", "--", sys.executable, "-c", code])
    for _ in range(1200):
        if (tmp_path / "up").exists():
            break
        time.sleep(0.1)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
