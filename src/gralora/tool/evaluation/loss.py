"""Loss and perplexity on a user's own answers, with the data preparation of `gralora finetune`."""

import argparse
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedModel

from ..arguments import LENGTH
from ..data.examples import file_examples, split
from ..data.stdlib import stdlib_examples
from ..data.tokens import IGNORED, Row, encode
from ..models import load_config, positions
from ..side_by_side import SideBySide, common_base, common_tokenizer
from .paired import Estimate, difference, estimate

Records = dict[str, list[dict[str, Any]]]  # label -> one record per item, with `loss` in nats and `tokens`


def read(args: argparse.Namespace) -> list[Row]:
    """Return the encoded examples: those that finetune holds out with `val_set_size`, else all of `data_path`."""
    base = common_base(args.models, args.base_model)
    tokenizer = common_tokenizer(args.models, base)
    if args.max_seq_length is None:
        args.max_seq_length = min(LENGTH, positions(load_config(base)) or LENGTH)
    if args.data_path is None:
        examples = stdlib_examples()[1]
    else:
        examples = file_examples(args.data_path, tokenizer, args.skip_bad_rows, split=args.eval_split).examples
        if args.val_set_size:
            examples = split(examples, args.val_set_size)[1]
    rows = encode(tokenizer, examples, args.max_seq_length, args.train_on_inputs, args.truncation_mode)
    if not rows:
        raise ValueError(f"max_seq_length={args.max_seq_length} has no room for any prompt with an answer.")
    return rows[: args.val_set_size or None][: None if args.limit is None else int(args.limit)]


def run(args: argparse.Namespace, loaded: SideBySide, rows: list[Row], records: Records) -> None:
    """Add each model's records to `records`, one model after the other."""
    for label in loaded.adapters:
        with loaded.using(label) as model:
            losses = answer_losses(model, rows, int(args.batch_size), loaded.tokenizer.pad_token_id)
        records[label] = [{"tokens": count, "loss": total / count} for total, count in losses]


def report(records: Records, rows: list[Row]) -> dict[str, Any]:
    """Return each model's mean loss over answers and its perplexity, and the paired differences to the first model."""
    losses = {label: [record["loss"] for record in own] for label, own in records.items()}
    results, differences = {}, []
    for label, own in losses.items():
        loss = estimate(own)
        perplexity = Estimate(*(None if end is None else math.exp(end) for end in loss))  # type: ignore[arg-type]
        results[label] = {"loss": loss.named("mean"), "perplexity": perplexity.named("mean")}
    first, *others = losses
    for label in others:
        change = difference(losses[label], losses[first])
        differences.append({"metric": "loss", "model": label, "reference": first} | change.named("difference"))
    return {
        "task": "loss",
        "items": len(losses[first]),
        "results": results,
        "differences": differences,
        "records": records,
    }


def table(results: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """Return a title, and a line per model, each value with its 95 % interval."""
    changes = {row["model"]: row for row in results["differences"]}
    first = next(iter(results["results"]))
    lines = [["model", "loss", "perplexity"] + ([f"loss minus {first}'s"] if changes else [])]
    for label, values in results["results"].items():
        line = [label, *(str(Estimate.read(values[name], "mean")) for name in ("loss", "perplexity"))]
        if label in changes:
            line.append(str(Estimate.read(changes[label], "difference")))
        lines.append(line)
    return f"loss, {results['items']} items; in brackets, 95 % confidence intervals", lines


def batches(lengths: list[int], batch_size: int) -> Iterator[list[int]]:
    """Yield indices in batches, the longest texts first: little padding, and too little memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in tqdm(range(0, len(order), batch_size), desc="loss", unit="batch", leave=False, disable=None):
        yield order[start : start + batch_size]


def check_lengths(model: PreTrainedModel, lengths: list[int]) -> None:
    """Raise ValueError if a text is longer than the model has positions for."""
    most = positions(model.config)
    longest = max(lengths, default=0)
    if most and longest > most:
        row = lengths.index(longest) + 1
        raise ValueError(f"row {row} has {longest} tokens; the model can take {most}: give --max_seq_length {most}.")


def padded(rows: list[list[int]], value: int) -> Tensor:
    """Return rows as one tensor `[rows, longest]` of int64, filled up with `value` on the right."""
    return pad_sequence([torch.tensor(row) for row in rows], True, value)


@torch.inference_mode()
def answer_losses(
    model: PreTrainedModel, rows: list[Row], batch_size: int, pad_token_id: int
) -> list[tuple[float, int]]:
    """Return the cross-entropy of each row's labels: the sum over its tokens, in nats, and their number.

    Args:
        model: a causal language model.
        rows: `input_ids` and `labels` of one length; labels `IGNORED` do not count, nor does the first.
        batch_size: rows per forward pass.
        pad_token_id: any token.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    check_lengths(model, lengths)
    results: list[tuple[float, int]] = [(0.0, 0)] * len(rows)
    for batch in batches(lengths, batch_size):
        # padded on the right, where a causal model's other tokens do not see it
        ids = padded([rows[i]["input_ids"] for i in batch], pad_token_id).to(model.device)
        mask = padded([[1] * lengths[i] for i in batch], 0).to(model.device)
        labels = padded([rows[i]["labels"] for i in batch], IGNORED).to(model.device)[:, 1:]
        logits = model(input_ids=ids, attention_mask=mask).logits
        for i, row_logits, row_labels in zip(batch, logits[:, :-1], labels, strict=True):
            loss = F.cross_entropy(row_logits.float(), row_labels, ignore_index=IGNORED, reduction="sum")
            results[i] = (loss.item(), int((row_labels != IGNORED).sum()))
    return results
