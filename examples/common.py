"""What the examples share: a model, a task so small that a few steps show in the loss, and a training loop."""

import argparse

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from gralora.tool.embedded import embedded_model

IGNORED = -100  # labels that count for nothing


def parser(description: str, steps: int) -> argparse.ArgumentParser:
    """The flags of all examples."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--model", help="hub id or folder (default: SmolLM2-135M-Instruct, out of a Python package)")
    made.add_argument("--steps", type=int, default=steps, help=f"optimizer steps (default: {steps})")
    made.add_argument("--short", action="store_true", help="2 steps, to see that everything runs")
    made.add_argument("--out", default="outputs/example", help="folder to write to (default: outputs/example)")
    return made


def parse(made: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    args = made.parse_args(argv)
    args.model = args.model or str(embedded_model())
    args.steps = 2 if args.short else args.steps
    return args


def load(args: argparse.Namespace, **options: object) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(args.model, **options), tokenizer


def sums(tokenizer: PreTrainedTokenizerBase, count: int, difference: int = 1) -> list[dict[str, list[int]]]:
    """Rows "Next after 17: 18", with the loss on the answer only; `difference` makes other tasks of the same form."""
    rows = []
    for number in range(count):
        prompt = tokenizer(f"Next after {number}:")["input_ids"]
        answer = tokenizer(f" {number + difference}")["input_ids"] + [tokenizer.eos_token_id]
        rows.append({"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer})
        rows[-1]["attention_mask"] = [1] * len(rows[-1]["input_ids"])
    return rows


def batches(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, list[int]]], steps: int, size: int = 8) -> list:
    """Padded batches, the same at every call."""
    collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
    order = torch.Generator().manual_seed(0)
    picks = [torch.randint(len(rows), (size,), generator=order).tolist() for _ in range(steps)]
    return [collate([rows[i] for i in pick]) for pick in picks]


def train(model: nn.Module, data: list, learning_rate: float = 1e-3) -> list[float]:
    """One step per batch; the loss of each."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=learning_rate)
    model.train()
    losses = []
    for batch in data:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses
