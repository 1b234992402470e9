"""Training text: records become (prompt, completion) pairs, pairs become tokens whose labels cover the answer only."""

import itertools
import os.path
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .sources import Source

IGNORED = -100  # the label that PyTorch's cross-entropy leaves out
INSTRUCTION = "### Instruction:"  # begins a prompt, and the next one, to which a model without an end token goes on


class Example(NamedTuple):
    """What the model is given and what it shall answer. An empty prompt means plain text, all of it learnt."""

    prompt: str
    completion: str


class Chat(NamedTuple):
    """A conversation as the tokenizer's chat template writes it: texts in pieces, each with whether it is learnt.

    One text; or one per answer, each with what came before it, where the template changes a turn once others follow.
    """

    texts: tuple[tuple[tuple[str, bool], ...], ...]


def text(record: dict[str, Any], name: str, optional: bool = False) -> str:
    value = record.get(name)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"field {name!r} must be text, got {value!r:.80}.")
    return value


def instruction_example(instruction: str, answer: str, about: str = "") -> Example:
    """An instruction, with the text it is about where there is one, and its answer."""
    task = "\n\n".join(part for part in (instruction, about) if part)
    return Example(f"{INSTRUCTION}\n{task}\n\n### Response:\n", answer)


def chat_example(
    name: str,
    messages: Any,
    record: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    given: int = 0,
) -> Chat:
    """The conversation in field `name`, written by the tokenizer's chat template.

    The assistant's turns are learnt, but not those among the first `given` messages.
    """
    if not isinstance(messages, list) or not all(is_message(message) for message in messages):
        raise ValueError(f"field {name!r} must be a list of objects with role and content, got {messages!r:.80}.")
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"field {name!r} needs a chat template, and the tokenizer has none: "
            f"{getattr(tokenizer, 'name_or_path', None)!r}; use a base model with one (often named Instruct or Chat), "
            "or the fields prompt+completion."
        )
    # parquet fills fields that only other messages have with null
    messages = [{name: value for name, value in message.items() if value is not None} for message in messages]
    turns = [i for i, m in enumerate(messages) if i >= given and m["role"] == "assistant" and says_something(m)]

    def render(count: int, **options: Any) -> str:
        tools = record.get("tools") or None
        return tokenizer.apply_chat_template(messages[:count], tools=tools, tokenize=False, **options)

    try:
        upto = [render(i + 1) for i in turns]
        before = [render(i, add_generation_prompt=True) for i in turns]
    except (TemplateError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"field {name!r}: the tokenizer's chat template does not take it: {error}") from error
    starts = [len(os.path.commonprefix(pair)) for pair in zip(before, upto, strict=True)]
    cuts = [0, *(cut for start, end in zip(starts, upto, strict=True) for cut in (start, len(end)))]
    if turns and cuts == sorted(cuts) and all(upto[-1].startswith(end) for end in upto):
        pieces = [upto[-1][start:end] for start, end in itertools.pairwise(cuts)]
        return Chat((tuple((piece, i % 2 == 1) for i, piece in enumerate(pieces)),))
    return Chat(tuple(((end[:start], False), (end[start:], True)) for start, end in zip(starts, upto, strict=True)))


def is_message(message: Any) -> bool:
    """Whether it is an object with a role, and with content or, instead, calls of tools."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    return isinstance(message.get("content"), str) or bool(
        message.get("content") is None and message.get("tool_calls")
    )


def says_something(message: dict[str, Any]) -> bool:
    return bool(message.get("content", "").strip() or message.get("tool_calls"))


# ShareGPT's names of who speaks -> the roles of chat templates
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


def sharegpt_message(turn: Any) -> Any:
    """A turn with ShareGPT's keys `from` and `value` as a message; others are passed on as they are."""
    if not isinstance(turn, dict) or "from" not in turn:
        return turn
    if turn["from"] not in SHAREGPT_ROLES:
        raise ValueError(
            f"field 'conversations': from={turn['from']!r} is not known; known: {', '.join(SHAREGPT_ROLES)}."
        )
    return {"role": SHAREGPT_ROLES[turn["from"]], "content": turn.get("value")}


def sharegpt_example(record: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> Chat:
    turns = record["conversations"]
    messages = [sharegpt_message(turn) for turn in turns] if isinstance(turns, list) else turns
    return chat_example("conversations", messages, record, tokenizer)


def prompt_example(record: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> Example | Chat:
    """Texts, or lists of messages, of which the assistant's in `completion` are learnt."""
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return chat_example("prompt and completion", prompt + completion, record, tokenizer, given=len(prompt))
    return Example(text(record, "prompt"), text(record, "completion"))


# the fields that a record must have -> how it becomes an example; the first line that fits is taken
RECORD_KINDS: dict[tuple[str, ...], Callable[[dict[str, Any], PreTrainedTokenizerBase | None], Example | Chat]] = {
    ("messages",): lambda record, tokenizer: chat_example("messages", record["messages"], record, tokenizer),
    ("conversations",): sharegpt_example,
    ("instruction", "output"): lambda record, _: instruction_example(
        text(record, "instruction"), text(record, "output"), text(record, "input", optional=True)
    ),
    ("prompt", "completion"): prompt_example,
    ("query", "response"): lambda record, _: instruction_example(text(record, "query"), text(record, "response")),
    ("question", "answer"): lambda record, _: instruction_example(text(record, "question"), text(record, "answer")),
    ("text",): lambda record, _: Example("", text(record, "text")),
}
RECORD_NAMES = [*map("+".join, RECORD_KINDS)]


@dataclass
class Found:
    """What the rows of a source became."""

    source: Source
    examples: list[Example | Chat] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    empty: int = 0  # rows with nothing to train on
    broken: int = 0  # rows that were skipped
    first_broken: str = ""  # where it is, and what is wrong with it

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} of {kind}" for kind, count in self.kinds.items()) or "none"
        parts = [f"{self.source}: rows with something to train on: {kinds}"]
        parts += [f"left out with nothing to train on: {self.empty}"] if self.empty else []
        parts += [f"left out as broken: {self.broken}, the first: {self.first_broken}"] if self.broken else []
        return "; ".join(parts)

    def read(self, tokenizer: PreTrainedTokenizerBase | None, skip_bad_rows: bool) -> Iterator[Example | Chat]:
        """The examples that the source's rows stand for, one after the other, and none kept; rows are counted.

        Raises:
            ValueError: for a broken row, unless `skip_bad_rows`, and for a source with nothing to train on.
        """
        self.kinds, self.empty, self.broken = Counter(), 0, 0
        for place, row in self.source.rows():
            try:
                kind, example = record_example(row, tokenizer)
            except ValueError as error:
                if not skip_bad_rows:
                    raise ValueError(f"{place}: {error}") from error
                self.first_broken = self.first_broken if self.broken else f"{place}: {error}"
                self.broken += 1
                continue
            if example.texts if isinstance(example, Chat) else example.completion.strip():
                self.kinds["+".join(kind)] += 1
                yield example
            else:
                self.empty += 1
        if not self.kinds:
            raise ValueError(f"data_path={self.source.path!r} has no records to train on. {self}")


def file_examples(
    path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None, skip_bad_rows: bool = False, **options: Any
) -> Found:
    """All examples of a local file or folder, or of a data set of the hub.

    A record holds the fields of one line of `RECORD_KINDS`; other fields are ignored.

    Args:
        path: of the file or folder, or hub id.
        tokenizer: whose chat template writes conversations.
        skip_bad_rows: count a broken row instead of raising.
        options: others of `Source`.

    Raises:
        ValueError: for another kind of file, one with nothing to train on, or a broken row; the message has the file
            and the line, or, of csv and parquet, the row, counted from 1 without the header.
        OSError: if a file cannot be read.
        ImportError: for parquet without pyarrow, for the hub without datasets.
    """
    found = Found(Source(str(path), **options))
    found.examples = list(found.read(tokenizer, skip_bad_rows))
    return found


def record_example(
    record: Any, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[tuple[str, ...], Example | Chat]:
    """The kind of a record and the example that it stands for; a ValueError if it stands for none."""
    if isinstance(record, ValueError):
        raise record
    kinds = " or ".join(RECORD_NAMES)
    if not isinstance(record, dict):
        raise ValueError(f"a record must be an object with the fields {kinds}, got {record!r:.80}.")
    kind = next((kind for kind in RECORD_KINDS if all(name in record for name in kind)), None)
    if kind is None:
        raise ValueError(f"the fields {sorted(record)} do not make a record; it needs {kinds}.")
    return kind, RECORD_KINDS[kind](record, tokenizer)


def split(examples: list[Example | Chat], held_out_size: int) -> tuple[list[Example | Chat], list[Example | Chat]]:
    """Take `held_out_size` different examples out, at random but always the same; copies of a row go together.

    Raises:
        ValueError: if no example would be left for training.
    """
    unique = list(dict.fromkeys(examples))
    if held_out_size >= len(unique):
        raise ValueError(f"val_set_size={held_out_size} leaves none of {len(unique)} different records to train on.")
    random.Random(0).shuffle(unique)
    held_out = unique[:held_out_size]
    left_out = set(held_out)
    return [example for example in examples if example not in left_out], held_out


# ---- tokens --------------------------------------------------------------------------------------------------------


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt, with the beginning-of-text token where the tokenizer sets one, never an end token."""
    special = tokenizer("").input_ids
    start = special[:1] if special[:1] == [tokenizer.bos_token_id] else []
    return start + tokenizer(prompt, add_special_tokens=False).input_ids


def encode(
    tokenizer: PreTrainedTokenizerBase,
    examples: Iterable[Example | Chat],
    max_seq_length: int,
    train_on_inputs: bool = False,
) -> list[dict[str, list[int]]]:
    """Tokens of each text, `input_ids`, `attention_mask` and `labels` of one length.

    A pair ends in the end token, a chat as its template has it. Labels of what is not learnt are `IGNORED`, unless
    `train_on_inputs`. What is longer than `max_seq_length` tokens is cut, and then has no end token; a text whose
    prompt leaves no room for an answer is left out.
    """

    def tokens(piece: str) -> list[int]:
        return tokenizer(piece, add_special_tokens=False).input_ids

    rows = []
    for example in examples:
        if isinstance(example, Chat):
            texts = [[(tokens(piece), learnt) for piece, learnt in pieces] for pieces in example.texts]
        else:
            answer = tokens(example.completion) + [tokenizer.eos_token_id]
            texts = [[(prompt_ids(tokenizer, example.prompt), False), (answer, True)]]
        for pieces in texts:
            ids = [token for piece, _ in pieces for token in piece][:max_seq_length]
            learnt = [learnt or train_on_inputs for piece, learnt in pieces for _ in piece]
            labels = [token if learn else IGNORED for token, learn in zip(ids, learnt, strict=False)]
            # a first token is never predicted; a label of its own would count in the mean of the loss
            labels[:1] = [IGNORED] * len(labels[:1])
            if any(label != IGNORED for label in labels):
                rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return rows


LEARNT = (">>>", "<<<")  # around what is learnt
SHOWN = 1500  # characters of one piece


def marked(tokenizer: PreTrainedTokenizerBase, row: dict[str, list[int]]) -> str:
    """The text of an encoded example with what is learnt between the marks `LEARNT`, long pieces shortened."""
    shown = []
    tokens = zip(row["input_ids"], row["labels"], strict=True)
    for learnt, piece in itertools.groupby(tokens, key=lambda token: token[1] != IGNORED):
        words = tokenizer.decode([token for token, _ in piece])
        if len(words) > SHOWN:
            words = f"{words[: SHOWN // 2]} [...] {words[-SHOWN // 2 :]}"
        shown.append(words.join(LEARNT) if learnt else words)
    return "".join(shown)
