"""`gralora evaluate`: adapters, and the base model without them, measured on one task and shown in one table."""

import argparse
import json
import math
import platform
import random
import time
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import transformers
from transformers import set_seed

from ..checkpoints.files import check_absent, write_json
from .adapters import DTYPES
from .models import load_tokenizer
from .side_by_side import SideBySide, common_base, load_side_by_side
from .tasks import TASKS

CONFIDENCE_Z = 1.959964  # of a normal distribution, two-sided 95 %
RESAMPLES = 1000
EXAMPLES = """examples:
  gralora evaluate outputs/finetune --task loss --data_path held_out.jsonl
  gralora evaluate embedded outputs/lora outputs/gralora --task gsm8k --data_path test.jsonl --limit 200
  gralora evaluate outputs/finetune --task multiple_choice --data_path ARC-Easy.test.json --json
  gralora evaluate outputs/finetune --task humaneval --num_samples 10 --temperature 0.8 --allow_code_execution
"""


class Estimate(NamedTuple):
    """A mean over items, and the ends of its 95 % confidence interval; None for a single item that is not 0 or 1."""

    mean: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        return f"{self.mean:.4g}" if self.low is None else f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


def estimate(values: list[float]) -> Estimate:
    """Mean of the items' scores, with Wilson's interval where each is 0 or 1, else the percentile bootstrap's."""
    n, mean = len(values), math.fsum(values) / len(values)
    if set(values) <= {0.0, 1.0}:
        z2 = CONFIDENCE_Z**2
        middle = (mean + z2 / (2 * n)) / (1 + z2 / n)
        half = CONFIDENCE_Z / (1 + z2 / n) * math.sqrt(mean * (1 - mean) / n + z2 / (4 * n**2))
        # exact at the ends, where subtraction would leave a rest
        return Estimate(mean, middle - half if mean > 0 else 0.0, middle + half if mean < 1 else 1.0)
    if n == 1:
        return Estimate(mean, None, None)
    draw = random.Random(0)
    means = sorted(math.fsum(draw.choices(values, k=n)) / n for _ in range(RESAMPLES))
    return Estimate(mean, means[round(0.025 * (RESAMPLES - 1))], means[round(0.975 * (RESAMPLES - 1))])


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gralora evaluate",
        description="Measure adapters on a task, and the base model where it is listed too, side by side.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="folder of an adapter; or the base model: hub id, folder, embedded")
    add("--task", choices=TASKS, required=True, help="what to measure")
    add("--data_path", "--dataset_name", help="file or folder of the task; for loss: default Python's library")
    add("--base_model", "--model_name_or_path", help="in place of the base model that the adapters name")
    add("--limit", type=int, help="only the first so many items")
    add("--batch_size", type=int, default=8, help="texts at once (default: 8)")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="of the base model (default: as it is stored)")
    add("--device", help="e.g. cpu or cuda:1 (default: the accelerator if there is one)")
    add("--seed", type=int, default=42, help="of sampling (default: 42)")
    add("--json", action="store_true", help="print JSON instead of a table")
    add("--out", type=Path, help="also write results, and each item's, into this new JSON file")

    group = parser.add_argument_group("generation, in gsm8k, humaneval and multiple_choice with --scoring generation")
    group.add_argument("--max_new_tokens", type=int, help="length of an answer (default: the task's)")
    group.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    group.add_argument("--top_p", type=float, default=0.95, help="with a temperature: nucleus (default: 0.95)")
    group.add_argument("--apply_chat_template", action="store_true", help="ask as a user of a chat, by the template")

    group = parser.add_argument_group("loss")
    group.add_argument("--max_seq_length", "--cutoff_len", type=int, default=256, help="tokens (default: 256)")
    group.add_argument("--val_set_size", type=int, default=0, help="only the rows that finetune holds out with it")
    group.add_argument("--skip_bad_rows", action="store_true", help="leave out broken rows instead of stopping")
    group = parser.add_argument_group("gsm8k")
    group.add_argument("--shots", "--num_fewshot", type=int, default=0, help="solved problems in the prompt")
    group.add_argument("--shots_path", help="file with the solved problems; the first ones are taken")
    group = parser.add_argument_group("multiple_choice")
    group.add_argument(
        "--scoring",
        choices=("loglikelihood", "generation"),
        default="loglikelihood",
        help="the likeliest option (default), or the first one that a generated answer names",
    )
    group = parser.add_argument_group("humaneval")
    group.add_argument("--num_samples", type=int, default=1, help="programs per problem (default: 1)")
    group.add_argument("--timeout", type=float, default=3.0, help="seconds that a program may run (default: 3)")
    group.add_argument("--allow_code_execution", action="store_true", help="run what the model writes, confined")
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    args = make_parser().parse_args(argv)
    least = {"limit": 1, "batch_size": 1, "max_new_tokens": 1, "max_seq_length": 2, "num_samples": 1}
    least |= {"shots": 0, "val_set_size": 0, "temperature": 0}
    for name, minimum in least.items():
        value = getattr(args, name)
        if value is not None and not value >= minimum:
            raise ValueError(f"{name}={value} must be at least {minimum}.")
    if not 0 < args.top_p <= 1:
        raise ValueError(f"top_p={args.top_p} must be above 0 and at most 1.")
    if not args.timeout > 0:
        raise ValueError(f"timeout={args.timeout} must be above 0.")
    if args.out is not None:
        check_absent(args.out)
        if not args.out.resolve().parent.is_dir():
            raise FileNotFoundError(f"out={str(args.out)!r} is in a folder that is not there.")
    if args.max_new_tokens is None:
        args.max_new_tokens = TASKS[args.task].max_new_tokens
    return args


def main(argv: list[str]) -> None:
    """The command `gralora evaluate`."""
    args = parse(argv)
    started = time.monotonic()
    task = TASKS[args.task]
    # before the model is loaded, since most mistakes are found here
    items = task.read(args, load_tokenizer(common_base(args.models, args.base_model)))[: args.limit]
    if not items:
        raise ValueError(f"data_path={args.data_path!r} has no rows.")
    loaded = load_side_by_side(args.models, args.base_model, args.dtype, args.device)
    records: dict[str, list[dict[str, Any]]] = {}
    try:
        for label in loaded.adapters:
            records[label] = run_task(args, loaded, label, items)
    finally:  # after Ctrl-C, what is known so far
        if records:
            show(args, report(args, loaded, records, time.monotonic() - started), records)


def run_task(args: argparse.Namespace, loaded: SideBySide, label: str, items: list[Any]) -> list[dict[str, Any]]:
    """One record per item of what a model did; the same for a model whatever others are listed."""
    set_seed(args.seed)
    with loaded.using(label) as model:
        return TASKS[args.task].run(args, model, loaded.tokenizer, items)


def summary(records: list[dict[str, Any]]) -> dict[str, Estimate]:
    """Estimates by metric; a loss also as perplexity."""
    metrics = {name: estimate([record["scores"][name] for record in records]) for name in records[0]["scores"]}
    if loss := metrics.get("loss"):
        metrics["perplexity"] = Estimate(
            math.exp(loss.mean), *(None if end is None else math.exp(end) for end in loss[1:])
        )
    return metrics


def report(
    args: argparse.Namespace, loaded: SideBySide, records: dict[str, list[dict[str, Any]]], seconds: float
) -> dict[str, Any]:
    return {
        "task": args.task,
        "items": len(next(iter(records.values()))),
        "results": {
            label: {name: value._asdict() for name, value in summary(own).items()} for label, own in records.items()
        },
        "not_finished": [label for label in loaded.adapters if label not in records],
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": str(loaded.model.device),
        "time_s": round(seconds, 1),
        "versions": {package.__name__: package.__version__ for package in (torch, transformers, peft)}
        | {"python": platform.python_version()},
    }


def show(args: argparse.Namespace, results: dict[str, Any], records: dict[str, list[dict[str, Any]]]) -> None:
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        print(table(results))
    if args.out is not None:
        write_json(args.out, results | {"records": records})


def table(results: dict[str, Any]) -> str:
    """A line per model, a column per metric, each with its 95 % interval."""
    metrics = list(next(iter(results["results"].values())))
    lines = [["model", *metrics]]
    for label, values in results["results"].items():
        lines.append([label, *(str(Estimate(**values[name])) for name in metrics)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [f"{results['task']}, {results['items']} items; in brackets, 95 % confidence intervals", ""]
    text += ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    if results["not_finished"]:
        text += ["", f"not finished: {', '.join(results['not_finished'])}"]
    return "\n".join(text)
