"""Whether a server answers as the adapter does: `gralora verify ADAPTER --served URL --model NAME`.

What is trained and what is served often differ in the chat template, or in the token that ends an answer. So each
prompt is asked twice: as a chat, which the server writes with its own template, and as the text that the adapter was
trained on. Answers are greedy. Any server with OpenAI's /v1/chat/completions and /v1/completions will do.
"""

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

import torch

from .data.tokens import beginning
from .generation import chat_or_plain_ids, generation_config
from .side_by_side import SideBySide, load_side_by_side

PROMPTS = ("Name three colours.", "What is 12 + 30?", "Write a short greeting.", "Which month comes after June?")
TOKENS = 48  # of each answer
# leading tokens in which a server must agree: later on, another rounding can make another of two likely words win
AGREEING = 8


@dataclass
class Answer:
    """A greedy answer.

    Attributes:
        text: without what ended it.
        ended: whether the model ended it, rather than the limit of tokens.
    """

    text: str
    ended: bool


def verify_served(adapter: str, url: str, model: str, prompts: tuple[str, ...] = PROMPTS) -> dict[str, Any]:
    """Compare a server's greedy answers with the adapter's own, and print both where they differ.

    Args:
        adapter: folder of the adapter.
        url: of the server, with or without /v1.
        model: the name under which it serves the adapter.
        prompts: what a user says.

    Returns:
        For each prompt the answers (`own`, `chat`, `text`), and the leading tokens in which they agree.

    Raises:
        ValueError: if an answer differs early, or does not end where the adapter's does; the message has the likely
            cause.
        OSError: if the server cannot be reached, or refuses a request.
    """
    loaded = load_side_by_side([adapter])
    url = url.rstrip("/").removesuffix("/v1")
    rows = [compare(loaded, url, model, prompt) for prompt in prompts]
    for row in rows:
        status = "as trained" if not row["faults"] else "; ".join(row["faults"])
        print(f"{row['prompt']!r}: {status}")
        if row["faults"]:
            print(f"  trained: {row['own']!r}\n  as a chat: {row['chat']!r}\n  the trained text: {row['text']!r}")
    faults = sorted({fault for row in rows for fault in row["faults"]})
    if faults:
        bad = sum(bool(row["faults"]) for row in rows)
        raise ValueError(
            f"{model!r} at {url} answers otherwise than {adapter!r} for {bad} of {len(rows)} prompts: "
            + "; ".join(faults)
        )
    return {"prompts": rows}


def compare(loaded: SideBySide, url: str, model: str, prompt: str) -> dict[str, Any]:
    """One prompt asked of the adapter and of the server, and what is wrong with the server's answers."""
    tokenizer = loaded.tokenizer
    has_template = tokenizer.chat_template is not None
    ids = chat_or_plain_ids(tokenizer, prompt, has_template)
    own = own_answer(loaded, ids)
    text = served(url, "completions", model, prompt=asked_text(tokenizer, ids))
    chat = text
    if has_template:
        chat = served(url, "chat/completions", model, messages=[{"role": "user", "content": prompt}])
    agreeing = {name: agreement(tokenizer, own, other) for name, other in (("chat", chat), ("text", text))}
    row = {"prompt": prompt, "own": own.text, "chat": chat.text, "text": text.text, "agreeing_tokens": agreeing}
    return row | {"faults": faults_of(tokenizer, own, chat, text)}


def asked_text(tokenizer: Any, ids: list[int]) -> str:
    """Decode a prompt without the beginning-of-text token that a server's tokenizer puts in front by itself."""
    start = beginning(tokenizer)
    return tokenizer.decode(ids[len(start) :] if ids[: len(start)] == start else ids)


def faults_of(tokenizer: Any, own: Answer, chat: Answer, text: Answer) -> list[str]:
    """The likely causes of a difference between answers; none where they agree, or differ late."""
    found = []
    for other in (text, chat) if text is not chat else (text,):
        agreeing = agreement(tokenizer, own, other)
        whole = len(tokenizer(own.text, add_special_tokens=False).input_ids)
        if agreeing >= whole and own.ended and len(other.text.strip()) > len(own.text.strip()):
            found.append(
                "the server goes on where the adapter ends: its end token is not the one that was trained (compare "
                "the server's eos or stop setting with generation_config.json beside the adapter)"
            )
        elif agreeing < min(AGREEING, whole):
            if other is text:
                found.append(
                    "other weights, or another tokenizer: the very text that was trained on is answered otherwise (is "
                    "the adapter loaded, under this name, on the same base model?)"
                )
            elif agreement(tokenizer, own, text) >= min(AGREEING, whole):
                found.append(
                    "another chat template: the trained text is answered as trained, the chat is not (give the server "
                    "the template in the adapter's folder)"
                )
    return list(dict.fromkeys(found))


def agreement(tokenizer: Any, one: Answer, other: Answer) -> int:
    """Leading tokens in which two answers agree."""
    rows = [tokenizer(answer.text.strip(), add_special_tokens=False).input_ids for answer in (one, other)]
    pairs = enumerate(zip(*rows, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(map(len, rows)))


@torch.inference_mode()
def own_answer(loaded: SideBySide, ids: list[int]) -> Answer:
    """The adapter's own greedy answer to token ids."""
    (label,) = loaded.adapters
    with loaded.using(label) as model:
        config = generation_config(model, loaded.tokenizer, TOKENS, 0.0, 1.0)
        inputs = torch.tensor([ids], device=model.device)
        output = model.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), generation_config=config)
    answer = output[0, len(ids) :].tolist()
    ended = bool(answer) and answer[-1] in config.eos_token_id
    return Answer(loaded.tokenizer.decode(answer, skip_special_tokens=True), ended)


def served(url: str, path: str, model: str, **asked: Any) -> Answer:
    """The server's greedy answer.

    Raises:
        OSError: if it cannot be reached, or answers with an error or with something else than OpenAI's form.
    """
    body = {"model": model, "temperature": 0, "max_tokens": TOKENS, "seed": 0, **asked}
    place = f"{url}/v1/{path}"
    request = urllib.request.Request(
        place, json.dumps(body).encode(), {"Content-Type": "application/json", "Authorization": "Bearer none"}
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as response:
            choice = json.load(response)["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
    except urllib.error.HTTPError as error:
        raise OSError(f"{place} answers {error.code}: {error.read().decode(errors='replace')[:200]}") from error
    except urllib.error.URLError as error:
        raise OSError(f"{place} cannot be reached: {error.reason}") from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise OSError(f"{place} does not answer in OpenAI's form: {error!r}") from error
    return Answer(text or "", choice.get("finish_reason") == "stop")
