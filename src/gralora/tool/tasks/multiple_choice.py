"""Multiple choice in the layout of LLM-Adapters' commonsense files (arXiv 2304.01933).

A row's instruction ends in "Answer format: answer1/answer2/...", its output is "the correct answer is answer2", its
answer "answer2".
"""

import re
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.layouts import INSTRUCTION, instruction_example
from ..data.tokens import IGNORED
from .inference import answer_losses, chat_or_plain_ids, generated
from .rows import file_rows, needed_path

FORMAT = re.compile(r"Answer format:\s*(\S+(?:/\S+)+)")
ANSWER = "the correct answer is "  # how all of LLM-Adapters' outputs begin


def read(args: Any, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    path = needed_path(args, "a file with the fields instruction and answer, in the layout of LLM-Adapters")
    items = []
    for where, row in file_rows(path, ("instruction", "answer")):
        found = FORMAT.findall(row["instruction"])
        options = found[-1].split("/") if found else []
        if row["answer"] not in options:
            raise ValueError(
                f"{where}: answer {row['answer']!r} is none of the options {options}; the instruction must end in "
                "'Answer format: answer1/answer2/...'."
            )
        prompt = "\n\n".join(part for part in (row["instruction"], row.get("input") or "") if part)
        if not args.apply_chat_template:
            prompt = instruction_example(row["instruction"], "", row.get("input") or "").prompt
        ids = chat_or_plain_ids(tokenizer, prompt, args.apply_chat_template)
        items.append({"prompt": prompt, "ids": ids, "options": options, "target": row["answer"]})
    return items


def run(
    args: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    choose = {"loglikelihood": most_likely, "generation": first_choice}[args.scoring]
    records = choose(args, model, tokenizer, items)
    for item, record in zip(items, records, strict=True):
        record |= {"prompt": item["prompt"], "target": item["target"]}
        record["scores"] = {"accuracy": float(record["choice"] == item["target"])}
    return records


def most_likely(
    args: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The option whose answer, "the correct answer is OPTION", has the highest log-likelihood, summed over tokens."""
    rows = []
    for item in items:
        for option in item["options"]:
            answer = tokenizer(ANSWER + option, add_special_tokens=False).input_ids
            labels = [IGNORED] * len(item["ids"]) + answer
            rows.append({"input_ids": item["ids"] + answer, "labels": labels})
    losses = iter(answer_losses(model, rows, args.batch_size, tokenizer.pad_token_id))
    records = []
    for item in items:
        likelihoods = {option: -next(losses)[0] for option in item["options"]}
        records.append({"choice": max(likelihoods, key=likelihoods.__getitem__), "loglikelihoods": likelihoods})
    return records


def first_choice(
    args: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The first option that the generated text names, as LLM-Adapters reads it; None, and wrong, if it names none."""
    answers = generated(args, model, tokenizer, [item["ids"] for item in items], stop=(INSTRUCTION,))
    return [
        {"choice": first_named(answer, item["options"]), "generated": answer}
        for item, answer in zip(items, answers, strict=True)
    ]


def first_named(text: str, options: list[str]) -> str | None:
    found = re.search("|".join(map(re.escape, sorted(options, key=len, reverse=True))), text)
    return found.group() if found else None
