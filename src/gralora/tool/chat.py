"""`gralora chat`: talk to a model, with its adapters switched on, off, or side by side."""

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer, set_seed

from . import parsers
from .data.layouts import INSTRUCTION, instruction_example
from .data.tokens import prompt_ids
from .generation import chat_or_plain_ids, cut, generation_config
from .models import positions
from .side_by_side import SideBySide, load_side_by_side

OFF = "off"  # the name of the base model alone
STOP = {"instruction": (INSTRUCTION,)}


class Answer(TextStreamer):
    """A streamer that prints words as they come, and keeps them."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        super().on_finalized_text(text, stream_end)


class StopOnInterrupt(StoppingCriteria):
    """Inside `with`, end the answer at the next token after a first Ctrl-C; an exception could get lost instead."""

    def __enter__(self) -> "StopOnInterrupt":
        self.requested = False
        self.previous = signal.signal(signal.SIGINT, self.request)
        return self

    def __exit__(self, *_: Any) -> None:
        signal.signal(signal.SIGINT, self.previous)

    def request(self, *_: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), self.requested, device=input_ids.device)


@dataclass
class Conversation:
    """A conversation so far, and the model that answers next.

    Attributes:
        loaded: the base model and its adapters; `adapters` has `OFF` for the base model alone.
        args: the command's arguments.
        template: how turns become a text: chat, instruction or plain.
        active: the label in `loaded.adapters` of the model that answers.
        turns: messages with role and content, user and assistant alternating.
    """

    loaded: SideBySide
    args: argparse.Namespace
    template: str
    active: str
    turns: list[dict[str, str]] = field(default_factory=list)

    def prompt(self, text: str) -> list[int]:
        """Return the token ids of the conversation with a new message at its end."""
        tokenizer = self.loaded.tokenizer
        if self.template == "chat":
            system = [{"role": "system", "content": self.args.system}] if self.args.system else []
            return chat_or_plain_ids(tokenizer, text, True, (*system, *self.turns))
        if self.template == "instruction":
            said = [turn["content"] for turn in self.turns]
            pairs = zip(said[::2], said[1::2], strict=True)
            earlier = "".join(f"{instruction_example(question, '').prompt}{answer}\n\n" for question, answer in pairs)
            return prompt_ids(tokenizer, earlier + instruction_example(text, "").prompt)
        return prompt_ids(tokenizer, text)

    def answer(self, label: str, text: str) -> str:
        """Print the answer of one model as it comes.

        Raises:
            ValueError: if the conversation is too long for the model.
        """
        ids = self.prompt(text)
        if not ids:
            raise ValueError("the prompt has no tokens.")
        streamer, stop = Answer(self.loaded.tokenizer), STOP.get(self.template, ())
        with self.loaded.using(label) as model:
            most = positions(model.config)
            if most and len(ids) + self.args.max_new_tokens > most:
                raise ValueError(
                    f"the conversation has {len(ids)} tokens, and with max_new_tokens={self.args.max_new_tokens} more "
                    f"than the {most} that the model can take; /reset forgets it."
                )
            if self.args.seed is not None:
                set_seed(self.args.seed)
            inputs = torch.tensor([ids], device=model.device)  # [1, T]
            options: dict[str, Any] = {"stop_strings": list(stop), "tokenizer": self.loaded.tokenizer} if stop else {}
            config = generation_config(
                model, self.loaded.tokenizer, self.args.max_new_tokens, self.args.temperature, self.args.top_p
            )
            with torch.inference_mode(), StopOnInterrupt() as interrupt:
                model.generate(
                    input_ids=inputs,
                    attention_mask=torch.ones_like(inputs),
                    generation_config=config,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([interrupt]),
                    **options,
                )
        if interrupt.requested:
            if not sys.stdin.isatty():
                raise KeyboardInterrupt
            print(" [stopped]")
        return cut(streamer.text, stop)

    def say(self, text: str) -> None:
        answer = self.answer(self.active, text)
        self.turns += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]

    def command(self, line: str) -> bool:
        """Obey a line that begins with a slash, and return whether the chat goes on."""
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name == "/quit":
            return False
        if name == "/help":
            print(parsers.CHAT_COMMANDS)
        elif name == "/reset":
            self.turns.clear()
        elif name == "/adapter":
            self.switch(argument)
        elif name == "/compare" and argument:
            for label in self.loaded.adapters:
                print(f"---- {label}")
                self.answer(label, argument)
        else:
            raise ValueError(f"{line!r} is no command; /help lists them.")
        return True

    def switch(self, name: str) -> None:
        """Let another model answer, or list the models."""
        labels = list(self.loaded.adapters)
        if name == "on":
            name = next((label for label in labels if label != OFF), name)
        if name and name not in labels:
            raise ValueError(f"adapter {name!r} is not loaded; there are {', '.join(labels)}.")
        self.active = name or self.active
        print("adapters: " + ", ".join(f"[{label}]" if label == self.active else label for label in labels))


def parse(argv: list[str]) -> argparse.Namespace:
    args = parsers.chat().parse_args(argv)
    if args.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={args.max_new_tokens} must be at least 1.")
    if not args.temperature >= 0:
        raise ValueError(f"temperature={args.temperature} must be at least 0.")
    if not 0 < args.top_p <= 1:
        raise ValueError(f"top_p={args.top_p} must be above 0 and at most 1.")
    return args


def start(args: argparse.Namespace) -> Conversation:
    """Load the models, and switch the first adapter on."""
    loaded = load_side_by_side(args.models, args.base_model, args.dtype, args.device)
    adapters = {label: name for label, name in loaded.adapters.items() if name is not None}
    if OFF in adapters or "on" in adapters:
        raise ValueError("an adapter's folder must not be named on or off: /adapter has another meaning for these.")
    loaded.adapters = {OFF: None, **adapters}
    has_template = loaded.tokenizer.chat_template is not None
    template = ("chat" if has_template else "plain") if args.template == "auto" else args.template
    if template == "chat" and not has_template:
        raise ValueError(f"template='chat': the tokenizer {loaded.tokenizer.name_or_path!r} has no chat template.")
    if args.system and template != "chat":
        raise ValueError(f"system={args.system!r} needs a chat template, and this conversation is {template}.")
    return Conversation(loaded, args, template, next(iter(adapters), OFF))


def lines(conversation: Conversation) -> Iterator[str]:
    """Yield the lines that the user types, or those of standard input if it is not a terminal."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin)
        return
    with suppress(ImportError):  # on Windows
        import readline  # noqa: F401  gives input() its history and editing
    while True:
        try:
            yield input(f"{conversation.active}> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n/quit or Ctrl-D leaves")


def main(argv: list[str]) -> None:
    """Run the command `gralora chat`."""
    conversation = start(parse(argv))
    if sys.stdin.isatty():
        print(f"template: {conversation.template}; /help lists the commands")
    for line in lines(conversation):
        try:
            if line.startswith("/"):
                if not conversation.command(line):
                    break
            elif line:
                conversation.say(line)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print(" [stopped]")
        except ValueError as error:  # a mistake in one line does not end the conversation
            print(f"gralora chat: {error}", file=sys.stderr)
