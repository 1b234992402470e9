"""The common layouts of training data: the fields of a record, and the example that it becomes."""

import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from .conversations import MESSAGE_FIELDS, RECORD_FIELDS, Chat, chat_example, is_in_template, is_read, parsed

INSTRUCTION = "### Instruction:"  # begins every prompt; a model without an end token goes on to write the next one


class Example(NamedTuple):
    """A prompt and the answer to learn. An empty prompt means plain text, all of it learnt."""

    prompt: str
    completion: str


def text(record: dict[str, Any], name: str, optional: bool = False) -> str:
    value = record.get(name)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"field {name!r} must be text, got {value!r:.80}.")
    return value


def instruction_example(instruction: str, answer: str, about: str = "") -> Example:
    """Make an example of an instruction, the text it is about, if any, and the answer."""
    task = "\n\n".join(part for part in (instruction, about) if part)
    return Example(f"{INSTRUCTION}\n{task}\n\n### Response:\n", answer)


def instruction_layout(question: str, answer: str, about: str | None = None) -> "Layout":
    """Make the layout of rows of an instruction and its answer, with LLaMA-Factory's optional `system` and `history`.

    As in LLaMA-Factory, the answers in `history`, a list of pairs, are learnt too.
    """

    def example(record: dict[str, Any], _: PreTrainedTokenizerBase | None) -> Example | Chat:
        last = instruction_example(
            text(record, question), text(record, answer), text(record, about, optional=True) if about else ""
        )
        system, history = text(record, "system", optional=True), parsed(record, "history", list) or []
        if not system and not history:
            return last
        pairs = []
        for i, pair in enumerate(history):
            if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(said, str) for said in pair):
                raise ValueError(f"history[{i}] must be a list of an instruction and its answer, got {pair!r:.60}.")
            pairs.append(instruction_example(*pair))
        pieces = [(f"{system}\n\n" if system else "", False)]
        for earlier in pairs:
            pieces += [(earlier.prompt, False), (earlier.completion, True), ("\n\n", False)]
        pieces += [(last.prompt, False), (last.completion, True)] if last.completion.strip() else []
        return Chat((tuple(pieces),) if any(piece.strip() for piece, learnt in pieces if learnt) else (), plain=True)

    others = ("system", "history") if about is None else (about, "system", "history")
    return Layout(example, others)


# ShareGPT's names for the speakers -> the roles of chat templates
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


def sharegpt_message(turn: Any) -> Any:
    """Convert a turn with ShareGPT's keys `from` and `value` to a message; return any other turn as it is."""
    if not isinstance(turn, dict) or "from" not in turn:
        return turn
    if turn["from"] not in SHAREGPT_ROLES:
        raise ValueError(
            f"field 'conversations': from={turn['from']!r} is not known; known: {', '.join(SHAREGPT_ROLES)}."
        )
    others = {key: value for key, value in turn.items() if key not in ("from", "value")}
    message = others | {"role": SHAREGPT_ROLES[turn["from"]], "content": turn.get("value")}
    if turn["from"] == "function_call":  # LLaMA-Factory's: the value is one call, or a list of calls, as JSON text
        calls = parsed(turn, "value", (dict, list)) or []  # type: ignore[arg-type]
        return message | {"content": None, "tool_calls": calls if isinstance(calls, list) else [calls]}
    return message


def sharegpt_example(record: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> Chat:
    turns = record["conversations"]
    messages = [sharegpt_message(turn) for turn in turns] if isinstance(turns, list) else turns
    return chat_example("conversations", messages, record, tokenizer)


def prompt_example(record: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> Example | Chat:
    """Make an example of prompt and completion, as texts or as messages; learn the assistant's of `completion`."""
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return chat_example("prompt and completion", prompt + completion, record, tokenizer, given=len(prompt))
    if isinstance(prompt, list) or isinstance(completion, list):
        listed, other = ("prompt", "completion") if isinstance(prompt, list) else ("completion", "prompt")
        raise ValueError(f"field {listed!r} must be text, as {other!r} is, or both must be lists of messages.")
    return Example(text(record, "prompt"), text(record, "completion"))


def with_lists(record: Any) -> Any:
    """Return a record with its conversations as lists: in CSV files, and in some of parquet, they are JSON text.

    Raises:
        ValueError: if a field of messages is text that is not JSON of a list.
    """
    if not isinstance(record, dict):
        return record
    texts = (name for name in ("messages", "conversations") if isinstance(record.get(name), str))
    lists = {name: parsed(record, name, list) for name in texts}
    pair = {name: said for name in ("prompt", "completion") if (said := messages_in(record.get(name)))}
    return record | lists | (pair if len(pair) == 2 else {})


def messages_in(text: Any) -> list[Any] | None:
    """Return the messages that a text is the JSON of, or None: a prompt may begin with a bracket."""
    try:
        said = json.loads(text) if isinstance(text, str) and text.lstrip().startswith("[") else None
    except json.JSONDecodeError:
        return None
    is_messages = isinstance(said, list) and all(isinstance(turn, dict) and "role" in turn for turn in said)
    return said if is_messages else None


class Layout(NamedTuple):
    """How records with certain fields become examples, and which further fields are read."""

    example: Callable[[dict[str, Any], PreTrainedTokenizerBase | None], Example | Chat]
    others: tuple[str, ...] = ()


# the fields that a record must have -> its layout; the first one that fits is taken
LAYOUTS: dict[tuple[str, ...], Layout] = {
    ("messages",): Layout(
        lambda record, tokenizer: chat_example("messages", record["messages"], record, tokenizer), RECORD_FIELDS
    ),
    ("conversations",): Layout(sharegpt_example, RECORD_FIELDS),
    ("instruction", "output"): instruction_layout("instruction", "output", about="input"),
    ("prompt", "completion"): Layout(prompt_example, RECORD_FIELDS),
    ("query", "response"): instruction_layout("query", "response"),
    ("question", "answer"): instruction_layout("question", "answer"),
    ("text",): Layout(lambda record, _: Example("", text(record, "text"))),
}
RECORD_NAMES = [*map("+".join, LAYOUTS)]
PREFERENCES = {"chosen", "rejected", "preferred_output", "non_preferred_output"}  # TRL's and OpenAI's
DESIRABLE = ("label", "kto_tag")  # TRL's and LLaMA-Factory's fields of KTO, which also learns from bad answers
EMPTY: tuple[Any, ...] = (None, "", [], "[]")  # the last as tables have it
PICTURES = ("images", "videos", "audios")  # TRL's, LLaMA-Factory's and ms-swift's fields


def record_example(
    record: Any, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[tuple[str, ...], Example | Chat]:
    """Return the fields of a record's layout and the record's example; ValueError if no layout fits."""
    if isinstance(record, ValueError):
        raise record
    kinds = " or ".join(RECORD_NAMES)
    if not isinstance(record, dict):
        raise ValueError(f"a record must be an object with the fields {kinds}, got {record!r:.80}.")
    kind = next((kind for kind in LAYOUTS if all(name in record for name in kind)), None)
    if kind is None:
        raise ValueError(f"the fields {sorted(record)} do not make a record; it needs {kinds}.{near_miss(record)}")
    for name in DESIRABLE:
        if record.get(name) in (False, "False", "false") and kind != ("text",):
            raise ValueError(
                f"field {name!r} is false, which marks an answer as a bad one, and fine-tuning learns every answer; "
                "leave such rows out, or take a trainer that learns from them, such as TRL's KTOTrainer."
            )
    for name in PICTURES:
        if record.get(name) not in EMPTY:
            raise ValueError(f"field {name!r} is not empty, and only text can be trained on.")
    return kind, LAYOUTS[kind].example(record, tokenizer)


def near_miss(record: dict[str, Any]) -> str:
    """Return a sentence about what a record of no layout may be instead; "" where nothing is like it."""
    if PREFERENCES & record.keys():
        return (
            " It has answers that are preferred to others: save the better ones as completion beside prompt, or train "
            "with TRL's DPOTrainer, which takes gralora.LoraConfig."
        )
    lower = {name.lower().strip(): name for name in record}
    for kind in LAYOUTS:
        if all(name in lower for name in kind):
            renamed = [f"{lower[name]!r} to {name!r}" for name in kind if lower[name] != name]
            return f" Rename {' and '.join(renamed)}."
    missing = {name: other for kind in LAYOUTS for name in kind for other in kind if name in record and other != name}
    needs = " and ".join(f"{name!r} needs {other!r} beside it" for name, other in missing.items())
    return f" {needs}; add or rename a field." if needs else ""


def unused_fields(
    record: dict[str, Any], kind: tuple[str, ...], tokenizer: PreTrainedTokenizerBase | None = None
) -> Iterator[str]:
    """Yield the names of fields that have a value but are not read; a message's field is `messages[].NAME`."""
    known = {*kind, *LAYOUTS[kind].others}
    yield from (name for name, value in record.items() if name not in known and value not in EMPTY)
    for name in kind:
        if isinstance(record[name], list):
            keys = {key for turn in record[name] if isinstance(turn, dict) for key in turn if turn[key] is not None}
            known = MESSAGE_FIELDS if is_in_template(tokenizer, "name") else MESSAGE_FIELDS - {"name"}
            unknown = sorted(keys - known - {"from", "value"})
            yield from (f"{name}[].{key}" for key in unknown if not is_read(tokenizer, key))


def roles_of(record: dict[str, Any], kind: tuple[str, ...]) -> set[str]:
    """Return the roles of the messages in a record; there are none in rows of texts."""
    turns = [turn for name in kind if isinstance(record[name], list) for turn in record[name]]
    return {str(turn.get("role", turn.get("from"))) for turn in turns if isinstance(turn, dict)}
