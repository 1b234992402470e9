"""Chat: who answers what, in which form; commands, scripts, Ctrl-C."""

import io
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import adapted, gralora_config
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from gralora.tool import chat, cli, parsers
from gralora.tool.chat import main, parse, start
from gralora.tool.data.tokens import prompt_ids

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
FLAGS = ["--temperature", "0", "--max_new_tokens", "8"]


@pytest.fixture(scope="module")
def chatty(tiny_model, tmp_path_factory) -> Path:
    """The tiny model with a chat template."""
    folder = tmp_path_factory.mktemp("bases") / "chatty"
    shutil.copytree(tiny_model, folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(chatty, tmp_path_factory) -> list[str]:
    """Two adapters of it with random factors, `first` and `second`."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("first", "second")):
        model = AutoModelForCausalLM.from_pretrained(chatty)
        config = gralora_config(k=2, r=8, target_modules=["q_proj", "up_proj"])
        adapted(model, config, seed=seed).save_pretrained(folder / name)
    return [str(folder / "first"), str(folder / "second")]


@pytest.fixture
def talk(monkeypatch, capsys):
    """The lines that a command prints when it reads these from a pipe."""

    def talk(models: list[str], *said: str, flags: list[str] = FLAGS) -> list[str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(said)))
        capsys.readouterr()
        main([*map(str, models), *flags])
        return capsys.readouterr().out.split("\n")[:-1]

    return talk


def expected(model_folder: str | Path, prompt: str, adapter: str | None = None) -> str:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    ids = torch.tensor([prompt_ids(tokenizer, prompt)])
    with torch.no_grad():
        output = model.eval().generate(input_ids=ids, do_sample=False, max_new_tokens=8, pad_token_id=0)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def test_the_first_adapter_answers_and_can_be_switched(chatty, adapters, talk):
    said = talk(adapters, "/compare add", "/adapter", "/adapter off", "/adapter second", "/adapter on", "/quit", "add")
    answers = {
        name: expected(chatty, "<user>add<assistant>", path)
        for name, path in zip(("off", "first", "second"), (None, *adapters), strict=True)
    }
    assert len(set(answers.values())) == 3
    compared = "\n".join(f"---- {name}\n{answer}" for name, answer in answers.items())
    switched = ["off, [first], second", "[off], first, second", "off, first, [second]", "off, [first], second"]
    assert said == [*compared.split("\n"), *(f"adapters: {names}" for names in switched)]


def test_conversation(chatty, adapters, talk):
    """Earlier turns are in the prompt until /reset, with who answered then; /compare adds none."""
    first = expected(chatty, "<user>add<assistant>", adapters[0])
    second = expected(chatty, f"<user>add<assistant>{first}<user>b<assistant>")
    fresh = expected(chatty, "<user>b<assistant>")
    assert second != fresh
    said = talk(adapters, "add", "", "/adapter off", "b", "/reset", "b", "/reset", "/compare c", "b")
    off = "adapters: [off], first, second"
    start = "\n".join([first, off, second, fresh, "---- off", ""])
    assert "\n".join(said).startswith(start) and "\n".join(said).endswith(f"\n{fresh}")


def test_system(chatty, talk):
    (answer,) = ["\n".join(talk([chatty], "add", flags=[*FLAGS, "--system", "def"]))]
    assert answer == expected(chatty, "<system>def<user>add<assistant>") != expected(chatty, "<user>add<assistant>")


def test_without_a_template_lines_are_continued(tiny_model, talk):
    said = "\n".join(talk([tiny_model], "def add", "return"))
    assert said == "\n".join(expected(tiny_model, line) for line in ("def add", "return"))


def test_instruction_template_is_the_one_of_training(tiny_model, talk):
    flags = [*FLAGS, "--template", "instruction"]
    first = expected(tiny_model, "### Instruction:\nadd\n\n### Response:\n")
    second = expected(
        tiny_model, f"### Instruction:\nadd\n\n### Response:\n{first}\n\n### Instruction:\nb\n\n### Response:\n"
    )
    assert "\n".join(talk([tiny_model], "add", "b", flags=flags)) == f"{first}\n{second}"


def test_what_follows_an_answer_is_not_kept(chatty, adapters, monkeypatch):
    conversation = start(parse([adapters[0], "--template", "instruction", *FLAGS]))
    answer = expected(chatty, "### Instruction:\nadd\n\n### Response:\n", adapters[0])
    at = next(i for i in range(1, len(answer)) if answer.index(answer[i]) == i)
    monkeypatch.setitem(chat.STOP, "instruction", (answer[at],))
    conversation.say("add")
    assert conversation.turns[1]["content"] == answer[:at]


def test_words_come_as_they_are_made(chatty, monkeypatch, capsys):
    """A part is printed before the model has made all."""
    printed = []

    class Watched(chat.Answer):
        def put(self, value):
            super().put(value)
            printed.append(capsys.readouterr().out)

    monkeypatch.setattr(chat, "Answer", Watched)
    start(parse([str(chatty), "--temperature", "0", "--max_new_tokens", "60"])).say("add")
    assert sum(map(bool, printed)) > 2


def test_seed_makes_answers_repeatable(chatty, talk):
    flags = ["--temperature", "1", "--max_new_tokens", "8", "--seed", "3"]
    once = talk([chatty], "add", flags=flags)
    assert once == talk([chatty], "add", flags=flags) != talk([chatty], "add", flags=[*flags, "--seed", "4"])


@pytest.mark.parametrize(
    "line, message",
    [
        ("/adapter third", "adapter 'third' is not loaded; there are off, first, second."),
        ("/nonsense", "'/nonsense' is no command; /help lists them."),
        ("/compare", "'/compare' is no command; /help lists them."),
        ("word " * 60, "with max_new_tokens=8 more than the 128 that the model can take; /reset forgets it."),
    ],
)
def test_a_mistake_does_not_end_the_conversation(adapters, talk, monkeypatch, capsys, line, message):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{line}\n/help\n"))
    main([*adapters, *FLAGS])
    output = capsys.readouterr()
    assert message in output.err and output.out == f"{parsers.CHAT_COMMANDS}\n"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--max_new_tokens", "0"], "max_new_tokens=0 must be at least 1"),
        (["--temperature", "-1"], "temperature=-1.0 must be at least 0"),
        (["--top_p", "2"], "top_p=2.0 must be above 0 and at most 1"),
        (["--template", "chat"], "template='chat': the tokenizer .* has no chat template"),
        (["--system", "be kind"], "system='be kind' needs a chat template, and this conversation is plain"),
    ],
)
def test_wrong_arguments(tiny_model, flags, message):
    with pytest.raises(ValueError, match=message):
        start(parse([str(tiny_model), *flags]))


def test_an_adapter_named_off_is_refused(adapters, tmp_path):
    shutil.copytree(adapters[0], tmp_path / "off")
    with pytest.raises(ValueError, match="must not be named on or off"):
        start(parse([str(tmp_path / "off")]))


def test_ctrl_c_in_a_script_ends_it(chatty, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("add\nadd\n"))
    monkeypatch.setattr(chat.Answer, "put", lambda *_: signal.raise_signal(signal.SIGINT))
    assert cli.main(["chat", str(chatty), *FLAGS]) == cli.INTERRUPTED


def test_ctrl_c_stops_the_answer_and_not_the_program(chatty, tmp_path):
    """In a terminal: a long answer is stopped, what was printed of it is kept, and the next line is answered."""
    script = f"""
import signal, sys, time
from gralora.tool import chat
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
put = chat.Answer.put
def slow(self, value):
    time.sleep(0.05)
    put(self, value)
chat.Answer.put = slow
chat.main([{str(chatty)!r}, "--temperature", "0", "--max_new_tokens", "100"])
print("left")
"""
    terminal, end = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", script], stdin=end, stdout=end, stderr=end, text=True) as process:
        os.close(end)
        seen = b""

        def wait_for(words: bytes, seconds: float = 60) -> None:
            nonlocal seen
            deadline = time.monotonic() + seconds
            while words not in seen:
                ready, _, _ = select.select([terminal], [], [], max(0, deadline - time.monotonic()))
                assert ready, seen
                seen += os.read(terminal, 1000)
            seen = seen.split(words, 1)[1]

        try:
            wait_for(b"/help lists the commands")
            wait_for(b"off> ")
            os.write(terminal, b"add\n")
            wait_for(b"add\r\n")
            time.sleep(0.7)
            process.send_signal(signal.SIGINT)
            wait_for(b" [stopped]")
            wait_for(b"off> ")
            for _ in range(60):  # one that comes before readline waits is noticed at the next key only: press again
                process.send_signal(signal.SIGINT)
                if seen or select.select([terminal], [], [], 1)[0]:
                    break
            wait_for(b"/quit or Ctrl-D leaves")
            wait_for(b"off> ")
            os.write(terminal, b"/adapter\n")
            wait_for(b"adapters: [off]")
            os.write(terminal, b"/quit\n")
            wait_for(b"left")
        except BaseException:
            process.kill()
            raise
    os.close(terminal)
    assert process.returncode == 0
