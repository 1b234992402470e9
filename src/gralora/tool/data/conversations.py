"""Bring conversations into the form that chat templates read, and write them with a template.

Every part of a message to learn must be in the text written: templates silently drop the parts they do not know.
"""

import itertools
import json
import os.path
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

REASONING = ("reasoning_content", "reasoning", "thinking")
# fields that say whether a message is learnt: OpenAI's and ShareGPT's, axolotl's, ms-swift's
LEARN = ("weight", "train", "loss")
MESSAGE_FIELDS = {"role", "content", "name", "tool_calls", "tool_call_id", "function_call", *REASONING, *LEARN}
RECORD_FIELDS = ("system", "tools", "chat_template_kwargs")  # what templates read beside the messages
END_OF_THOUGHT = "</think>"


class Chat(NamedTuple):
    """A conversation as pieces of text, each with a flag that says whether it is learnt.

    Attributes:
        texts: one text. If the template changes a turn once others follow, there is instead one text per answer, each
            with what came before the answer.
        plain: whether to add the tokenizer's beginning and end tokens, as for pairs of texts.
    """

    texts: tuple[tuple[tuple[str, bool], ...], ...]
    plain: bool = False


def chat_example(
    name: str,
    messages: Any,
    record: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    given: int = 0,
) -> Chat:
    """Write the messages in field `name` of a record with the tokenizer's chat template.

    The assistant's messages are learnt, except in the first `given` messages and those with `weight: 0` or the like.

    Raises:
        ValueError: if a message is malformed, or the template refuses it or leaves a part of it out.
    """
    if not isinstance(messages, list):
        raise ValueError(f"field {name!r} must be a list of objects with role and content, got {messages!r:.80}.")
    bad = next((i for i, message in enumerate(messages) if not is_message(message, tokenizer)), None)
    if bad is not None:
        raise ValueError(
            f"field {name!r} must be a list of objects with role and content, or tool_calls; {name}[{bad}] is "
            f"{messages[bad]!r:.120}."
        )
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"field {name!r} needs a chat template, and the tokenizer has none: "
            f"{getattr(tokenizer, 'name_or_path', None)!r}; use a base model with one (often named Instruct or Chat), "
            "--chat_template_path, or the fields prompt+completion."
        )
    pairs = merged_calls(normalised(message, f"{name}[{i}]") for i, message in enumerate(messages))
    messages, flags = [message for message, _ in pairs], [flag for _, flag in pairs]
    added = 0
    if record.get("system"):
        added = 1
        if messages and messages[0]["role"] == "system":
            raise ValueError(f"field 'system' and {name}[0] are both the system's message; give one.")
        messages, flags, given = (
            [{"role": "system", "content": record["system"]}, *messages],
            [None, *flags],
            given + 1,
        )
    turns = [
        i
        for i, message in enumerate(messages)
        if i >= given and message["role"] == "assistant" and flags[i] is not False and any(parts(message, tokenizer))
    ]
    tools, options = parsed(record, "tools", list), parsed(record, "chat_template_kwargs", dict)
    return Writer(name, messages, tools, options, added).write(tokenizer, turns) if turns else Chat(())


def is_read(tokenizer: PreTrainedTokenizerBase | None, field: str) -> bool:
    """Tell whether the chat template reads a field of messages beside the usual ones."""
    return field not in MESSAGE_FIELDS and is_in_template(tokenizer, field)


def is_in_template(tokenizer: PreTrainedTokenizerBase | None, field: str) -> bool:
    """Tell whether the chat template has a field's name as a word."""
    template = str(getattr(tokenizer, "chat_template", None) or "")
    return re.search(rf"\b{re.escape(field)}\b", template) is not None


def is_message(message: Any, tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Tell whether an object is a message: it has a role, and content, tool calls or what else the template reads."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    if message.get("content") is None:
        others = (key for key, value in message.items() if isinstance(value, str) and is_read(tokenizer, key))
        return bool(message.get("tool_calls") or message.get("function_call") or next(others, None))
    return isinstance(message["content"], (str, list))


def normalised(message: dict[str, Any], place: str) -> tuple[dict[str, Any], bool | None]:
    """Return a message as templates read it, and whether it says that it is learnt (None if it does not say).

    Null fields are left out, since parquet adds the fields of other messages as nulls. Lists of texts are joined, the
    arguments of tool calls are parsed if they are JSON text, and OpenAI's older `function_call` and ms-swift's
    messages of the role `tool_call` become tool calls. Content that is missing is "", since most templates want some.
    """
    message = {"content": ""} | {key: value for key, value in message.items() if value is not None}
    if message["role"] in SWIFT_ROLES:
        message = from_swift(message, place)
    if message.get("train_detail"):
        raise ValueError(
            f"{place}.train_detail: a message is learnt as a whole or not; give train: 0 or 1, or leave it out."
        )
    learn = None
    for key in LEARN:
        if key in message:
            value = message.pop(key)
            if value not in (0, 1):  # accepts False and True, too
                raise ValueError(f"{place}.{key}={value!r:.40} must be 0 or 1: a message is learnt or not.")
            if value and message["role"] != "assistant":
                raise ValueError(
                    f"{place}.{key}={value!r}: only the assistant's messages can be learnt one by one; "
                    "--train_on_inputs learns all."
                )
            learn = bool(value) and learn is not False
    if isinstance(message.get("content"), list):
        message["content"] = "".join(text_part(part, place) for part in message["content"])
    if call := message.pop("function_call", None):
        message.setdefault("tool_calls", []).append({"type": "function", "function": call})
    if calls := message.get("tool_calls"):
        if not isinstance(calls, list):
            raise ValueError(f"{place}.tool_calls must be a list, got {calls!r:.60}.")
        message["tool_calls"] = [tool_call(call, f"{place}.tool_calls[{i}]") for i, call in enumerate(calls)]
    return message, learn


SWIFT_ROLES = {"tool_call": "assistant", "tool_response": "tool"}  # ms-swift's


def from_swift(message: dict[str, Any], place: str) -> dict[str, Any]:
    message = message | {"role": SWIFT_ROLES[message["role"]], "from_swift": True}
    if message["role"] == "tool":
        return message
    try:
        call = json.loads(message["content"])
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{place}: the content of a tool_call must be JSON: {error}") from error
    return message | {"content": "", "tool_calls": [call]}


def merged_calls(
    pairs: Iterable[tuple[dict[str, Any], bool | None]],
) -> list[tuple[dict[str, Any], bool | None]]:
    """Put the calls of ms-swift's messages into the assistant's message just before them, as one turn."""
    merged: list[tuple[dict[str, Any], bool | None]] = []
    for message, learn in pairs:
        is_call = message.pop("from_swift", False) and message["role"] == "assistant"
        if is_call and merged and merged[-1][0]["role"] == "assistant" and merged[-1][1] == learn:
            before = merged[-1][0]
            before["tool_calls"] = [*before.get("tool_calls", ()), *message["tool_calls"]]
        else:
            merged.append((message, learn))
    return merged


def text_part(part: Any, place: str) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, dict) else part
        raise ValueError(f"{place}.content has a part that is no text: {kind!r:.60}; only text can be trained on.")
    return part["text"]


def tool_call(call: Any, place: str) -> dict[str, Any]:
    """Return a tool call with its arguments as an object; a template would encode JSON text a second time."""
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise ValueError(f"{place} must be an object with the function's name and arguments, got {call!r:.60}.")
    arguments = inner.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: the arguments are text that is not JSON: {error}") from error
    inner = inner | ({} if arguments is None else {"arguments": arguments})
    return call | {"function": inner} if "function" in call else inner


def parsed(record: dict[str, Any], name: str, kind: type) -> Any:
    """Return a field that is an object or a list, or JSON text of one; None if it is missing or empty."""
    value = record.get(name)
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            python = "; it is as Python prints a list, so save it with json.dumps" if value.startswith("[{'") else ""
            raise ValueError(f"field {name!r} is text that is not JSON: {error}{python}.") from error
    if value and not isinstance(value, kind):
        raise ValueError(f"field {name!r} must be a {kind.__name__}, or JSON text of one, got {value!r:.60}.")
    return value or None


class Writer(NamedTuple):
    """Write the conversation of the field `name`, which has `added` messages in front, with a chat template."""

    name: str
    messages: list[dict[str, Any]]
    tools: list[Any] | None
    options: dict[str, Any] | None
    added: int = 0

    def write(self, tokenizer: PreTrainedTokenizerBase, turns: list[int]) -> Chat:
        """Write the conversation with the template; the messages at `turns` are learnt."""
        try:
            texts = self.rendered(tokenizer, turns, self.messages)
        except TypeError:  # some templates join the arguments of calls as text (DeepSeek-V3's)
            texts = self.rendered(tokenizer, turns, [with_text_arguments(message) for message in self.messages])
        before, upto = texts
        starts = [len(os.path.commonprefix(pair)) for pair in zip(before, upto, strict=True)]
        self.check_written(tokenizer, turns, starts, upto)
        cuts = [0, *(cut for start, end in zip(starts, upto, strict=True) for cut in (start, len(end)))]
        if cuts == sorted(cuts) and all(upto[-1].startswith(end) for end in upto):
            pieces = [upto[-1][start:end] for start, end in itertools.pairwise(cuts)]
            return Chat((tuple((piece, i % 2 == 1) for i, piece in enumerate(pieces)),))
        return Chat(
            tuple(((end[:start], False), (end[start:], True)) for start, end in zip(starts, upto, strict=True))
        )

    def rendered(
        self, tokenizer: PreTrainedTokenizerBase, turns: list[int], messages: list[dict[str, Any]]
    ) -> tuple[list[str], list[str]]:
        """Return two lists: for each turn, the text before it, which prompts the model, and the text including it."""

        def render(count: int, **more: Any) -> str:
            options = (self.options or {}) | more
            return tokenizer.apply_chat_template(messages[:count], tools=self.tools, tokenize=False, **options)

        try:
            return [render(i, add_generation_prompt=True) for i in turns], [render(i + 1) for i in turns]
        except (TemplateError, IndexError, ValueError) as error:
            raise ValueError(
                f"field {self.name!r}: the tokenizer's chat template does not take it: {error}"
            ) from error

    def check_written(
        self, tokenizer: PreTrainedTokenizerBase, turns: list[int], starts: list[int], upto: list[str]
    ) -> None:
        """Raise ValueError, naming the field, if the template left a part out."""
        learnt = {i: squashed(text[start:]) for i, start, text in zip(turns, starts, upto, strict=True)}
        whole = squashed(upto[-1])
        for i, message in enumerate(self.messages[: turns[-1] + 1]):
            place = f"{self.name}[{i - self.added}]" if i >= self.added else "system"
            for field, words in parts(message, tokenizer, i in learnt):
                if not is_written(words, learnt.get(i, whole)):
                    raise ValueError(
                        f"{place}.{field} is not in what the chat template writes: {words!r:.60}. The model would be "
                        "trained without it; take a base model whose template writes it, or take it out of the data."
                    )
        for tool in self.tools or ():
            name = tool.get("function", tool).get("name") if isinstance(tool, dict) else None
            if isinstance(name, str) and not is_written(name, whole):
                raise ValueError(f"field 'tools': the chat template does not write the tool {name!r}.")


def with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    if "tool_calls" not in message:
        return message
    calls = [
        call | {"function": call["function"] | {"arguments": json.dumps(call["function"].get("arguments", {}))}}
        for call in message["tool_calls"]
        if "function" in call
    ]
    return message | {"tool_calls": calls}


def parts(
    message: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None, learnt: bool = True
) -> Iterator[tuple[str, str]]:
    """Yield the texts that a written message must contain, without thoughts of turns that are not learnt.

    Templates leave out the thoughts of earlier turns on purpose.
    """
    content = message.get("content", "")
    if message["role"] == "assistant" and not learnt:
        content = content.rpartition(END_OF_THOUGHT)[2]
    elif END_OF_THOUGHT in content:  # templates write such thoughts in a form of their own
        yield from (("content", part.removeprefix("<think>")) for part in content.split(END_OF_THOUGHT))
        content = ""
    if content.strip():
        yield "content", content
    yield from (
        (field, words)
        for field, words in message.items()
        if is_read(tokenizer, field) and words and isinstance(words, str)
    )
    if learnt:
        yield from ((field, message[field]) for field in REASONING if isinstance(message.get(field), str))
    for i, call in enumerate(message.get("tool_calls", ())):
        function = call.get("function", call)
        yield f"tool_calls[{i}]", function["name"]
        yield from ((f"tool_calls[{i}].arguments", text) for text in texts_in(function.get("arguments")))


def texts_in(value: Any) -> Iterator[str]:
    """Yield all keys and texts inside a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from texts_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from texts_in(inner)


def squashed(text: str) -> str:
    return "".join(text.split())


def is_written(words: str, text: str) -> bool:
    """Tell whether a squashed text has the words, verbatim or as JSON writes them, apart from spaces."""
    forms = (words, json.dumps(words, ensure_ascii=False)[1:-1], json.dumps(words)[1:-1])
    return any(squashed(form) in text for form in forms)
