"""Problems whose answer is one number, as in GSM8K (arXiv 2110.14168): the final number must match exactly."""

import re
from decimal import Decimal
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.layouts import INSTRUCTION, instruction_example
from .inference import chat_or_plain_ids, generated
from .rows import file_rows, needed_path

NUMBER = re.compile(r"(?:(?<![\w).])-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
MARK = "####"  # before the final number in GSM8K's answers


def final_number(text: str) -> Decimal | None:
    """The number after the first "####", else the last one of the text; None if there is none."""
    if MARK in text and (found := NUMBER.match(text.split(MARK, 1)[1].lstrip(" \n$"))):
        numbers = [found.group()]
    else:
        numbers = NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


def read(args: Any, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    path = needed_path(args, "a file with the fields question and answer, such as GSM8K's test.jsonl")
    earlier: list[tuple[str, str]] = []
    if args.shots:
        if args.shots_path is None:
            raise ValueError(f"shots={args.shots} needs --shots_path: a file of solved ones.")
        earlier = [(row["question"], row["answer"]) for _, row in file_rows(args.shots_path, ("question", "answer"))]
        if len(earlier) < args.shots:
            raise ValueError(f"shots={args.shots} is more than the {len(earlier)} rows of {args.shots_path!r}.")
    items = []
    for where, row in file_rows(path, ("question", "answer")):
        target = final_number(row["answer"])
        if target is None:
            raise ValueError(f"{where}: the answer has no number.")
        ids = problem_ids(args, tokenizer, row["question"], earlier[: args.shots])
        items.append({"question": row["question"], "target": target, "ids": ids})
    return items


def problem_ids(
    args: Any, tokenizer: PreTrainedTokenizerBase, question: str, earlier: list[tuple[str, str]]
) -> list[int]:
    """The prompt that finetune makes of such a row, after solved ones; or the same as a conversation."""
    if args.apply_chat_template:
        turns = [
            {"role": role, "content": content}
            for pair in earlier
            for role, content in zip(("user", "assistant"), pair, strict=True)
        ]
        return chat_or_plain_ids(tokenizer, question, True, tuple(turns))
    solved = "".join(f"{instruction_example(*pair).prompt}{pair[1]}\n\n" for pair in earlier)
    return chat_or_plain_ids(tokenizer, solved + instruction_example(question, "").prompt, False)


def run(
    args: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    answers = generated(args, model, tokenizer, [item["ids"] for item in items], stop=(INSTRUCTION,))
    records = []
    for item, answer in zip(items, answers, strict=True):
        number = final_number(answer)
        record = {"question": item["question"], "target": str(item["target"]), "generated": answer}
        record |= {"number": None if number is None else str(number)}
        records.append(record | {"scores": {"exact_match": float(number == item["target"])}})
    return records
