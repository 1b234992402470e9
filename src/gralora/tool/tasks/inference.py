"""What tasks ask of a model: losses of given answers, and generated ones. Batches change neither."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data.tokens import IGNORED, prompt_ids
from ..models import positions


def batches(lengths: list[int], batch_size: int, what: str) -> Iterator[list[int]]:
    """Indices in batches, the longest first: little padding, and too little memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    starts = range(0, len(order), batch_size)
    for start in tqdm(starts, desc=what, unit="batch", leave=False, disable=None):
        yield order[start : start + batch_size]


def check_lengths(model: PreTrainedModel, lengths: list[int], more: int = 0) -> None:
    """Raise ValueError if a text, with so many more tokens, is longer than the model has positions for."""
    most = positions(model.config)
    longest = max(lengths, default=0)
    if most and longest + more > most:
        parts = f"{longest} tokens and max_new_tokens={more}" if more else f"{longest} tokens"
        raise ValueError(f"row {lengths.index(longest) + 1} has {parts}; the model can take {most} in all.")


def padded(rows: list[list[int]], value: int, side: str) -> tuple[Tensor, Tensor]:
    """Rows as one tensor `[rows, longest]` of int64, and a mask of that shape with 1 where there is no padding."""
    ids = pad_sequence([torch.tensor(row) for row in rows], True, value, side)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.int64) for row in rows], True, 0, side)
    return ids, mask


@torch.inference_mode()
def answer_losses(
    model: PreTrainedModel, rows: list[dict[str, list[int]]], batch_size: int, pad_token_id: int
) -> list[tuple[float, int]]:
    """Cross-entropy of each row's labels: the sum over its tokens, in nats, and their number.

    Args:
        model: a causal language model.
        rows: `input_ids` and `labels` of one length; labels `IGNORED` do not count, nor does the first.
        batch_size: rows per forward pass.
        pad_token_id: any token.
    """
    check_lengths(model, [len(row["input_ids"]) for row in rows])
    results: list[tuple[float, int]] = [(0.0, 0)] * len(rows)
    for batch in batches([len(row["input_ids"]) for row in rows], batch_size, "loss"):
        # padded on the right, where a causal model's other tokens do not see it
        ids, mask = padded([rows[i]["input_ids"] for i in batch], pad_token_id, "right")
        labels, _ = padded([rows[i]["labels"] for i in batch], IGNORED, "right")
        logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
        labels = labels[:, 1:].to(model.device)
        for i, row_logits, row_labels in zip(batch, logits[:, :-1], labels, strict=True):
            loss = F.cross_entropy(row_logits.float(), row_labels, ignore_index=IGNORED, reduction="sum")
            results[i] = (loss.item(), int((row_labels != IGNORED).sum()))
    return results


def chat_or_plain_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    apply_chat_template: bool,
    earlier: tuple[dict[str, str], ...] = (),
) -> list[int]:
    """Token ids of a prompt; with `apply_chat_template`, of a user's message after those of `earlier`.

    Raises:
        ValueError: if the tokenizer has no chat template.
    """
    if not apply_chat_template:
        return prompt_ids(tokenizer, prompt)
    if tokenizer.chat_template is None:
        raise ValueError(f"apply_chat_template: the tokenizer {tokenizer.name_or_path!r} has no chat template.")
    messages = [*earlier, {"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids


def generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, temperature: float, top_p: float
) -> GenerationConfig:
    """Greedy at temperature 0, else sampling from the `top_p` nucleus; the model gives its end tokens only."""
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted({*ends, tokenizer.eos_token_id}),
        pad_token_id=tokenizer.pad_token_id,
        repetition_penalty=1.0,
        **sampling,
    )


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    *,
    batch_size: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: tuple[str, ...] = (),
) -> list[str]:
    """Continuations of prompts given as token ids, each without the prompt and cut before the first `stop` string."""
    check_lengths(model, [len(prompt) for prompt in prompts], max_new_tokens)
    config = generation_config(model, tokenizer, max_new_tokens, temperature, top_p)
    stopping = {"stop_strings": list(stop), "tokenizer": tokenizer} if stop else {}
    texts = [""] * len(prompts)
    for batch in batches([len(prompt) for prompt in prompts], batch_size, "generate"):
        ids, mask = (t.to(model.device) for t in padded([prompts[i] for i in batch], tokenizer.pad_token_id, "left"))
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, **stopping)
        answers = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        for i, answer in zip(batch, answers, strict=True):
            texts[i] = cut(answer, stop)
    return texts


def generated(
    args: Any,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    stop: tuple[str, ...],
) -> list[str]:
    """What `generate` makes of the arguments of `gralora evaluate`; in a chat, the model ends its answers itself."""
    return generate(
        model,
        tokenizer,
        prompts,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        stop=() if args.apply_chat_template else stop,
    )


def cut(text: str, stop: tuple[str, ...]) -> str:
    """The text up to the first of the strings that is in it."""
    return text[: min((text.find(word) for word in stop if word in text), default=len(text))]
