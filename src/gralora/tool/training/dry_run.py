"""What a run would take, from its shapes and some measured batches: `gralora finetune --dry_run`."""

import math
import time
from datetime import timedelta
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import Trainer

from ..arguments import FinetuneArguments
from ..data.corpus import Corpus
from .progress import peak_memory_gib, reset_peak_memory

GIB = 2**30
BATCHES = 4  # of which the time is measured


def dry_run(args: FinetuneArguments, trainer: Trainer, model: PeftModel, corpus: Corpus) -> dict[str, Any]:
    """Measure forward and backward of some micro-batches, and print what the whole run would take.

    Nothing is trained and nothing is written. The time is that of rows drawn as training draws them, padding and all;
    the memory is that of the longest rows, with the optimizer's states added.
    """
    batch = longest_batch(trainer, args.micro_batch_size)
    reset_peak_memory()
    drawn = drawn_batches(trainer, args.micro_batch_size)
    for first in (batch, drawn[0]):  # what is compiled or allocated for their shapes is not counted
        measured(trainer, first)
    seconds = sum(measured(trainer, each) for each in drawn) / len(drawn)
    step_s = seconds * trainer.args.gradient_accumulation_steps
    trainable, total = model.get_nb_trainable_parameters()
    states = 2 * 4 * trainable / GIB  # AdamW's two, in float32
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / GIB
    steps = steps_of(trainer)
    per_step = tokens_per_step(args, trainer, corpus)
    found = {
        "parameters": {"trainable": trainable, "total": total},
        "steps": steps,
        "tokens_per_step": per_step,
        "longest_tokens": batch["input_ids"].numel(),
        "tokens_per_s": None if per_step is None else round(per_step / step_s, 1),
        "step_s": step_s,
        "time_s": None if steps is None else step_s * steps,
        "weights_gib": round(weights, 3),
        "optimizer_gib": round(states, 3),
        "peak_memory_gib": round(peak_memory_gib() + states, 3),
        "reduce": advice(args, corpus, weights),
    }
    print_plan(found)
    return found


def longest_batch(trainer: Trainer, size: int) -> dict[str, Any]:
    """The micro-batch of the longest rows; of a stream, of the first ones."""
    rows = trainer.train_dataset
    if isinstance(rows, Dataset):
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))[:size]
        chosen = [rows[i] for i in order]
    else:
        chosen = list(rows.take(size))
    return trainer.data_collator(chosen)


def drawn_batches(trainer: Trainer, size: int) -> list[dict[str, Any]]:
    """Some micro-batches of rows drawn at random; of a stream, the first ones."""
    rows = trainer.train_dataset
    if isinstance(rows, Dataset):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        chosen = [rows[i] for i in order[: BATCHES * size]]
    else:
        chosen = list(rows.take(BATCHES * size))
    return [trainer.data_collator(chosen[i : i + size]) for i in range(0, len(chosen), size)]


def measured(trainer: Trainer, batch: dict[str, Any]) -> float:
    """Seconds of forward and backward of a batch."""
    model = trainer.model.train().to(trainer.args.device)
    started = time.monotonic()
    with trainer.accelerator.autocast():
        loss = trainer.compute_loss(model, trainer._prepare_inputs(dict(batch)))
    loss.backward()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.monotonic() - started
    model.zero_grad()
    return seconds


def steps_of(trainer: Trainer) -> int | None:
    """Optimizer steps of the run, counted as the Trainer counts them; None of a stream without `max_steps`."""
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    batches = len(trainer.get_train_dataloader())
    return math.ceil(args.num_train_epochs * math.ceil(batches / args.gradient_accumulation_steps))


def tokens_per_step(args: FinetuneArguments, trainer: Trainer, corpus: Corpus) -> int | None:
    """Tokens that go into an optimizer step on the average, over all devices; None of a stream."""
    if not isinstance(trainer.train_dataset, Dataset):
        return None
    kept = corpus.tokens - corpus.cut(args.length)["tokens"]
    training = trainer.args
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    return round(kept / len(trainer.train_dataset) * rows)


def advice(args: FinetuneArguments, corpus: Corpus, weights: float) -> list[str]:
    """Flags that would take less memory or time, the strongest first."""
    found = []
    if args.quantization == "none":
        found.append(f"--quantization 4bit: the base model's {weights:.2f} GiB of weights become about a quarter")
    if not (args.bf16 or args.fp16):
        found.append("--bf16: half the memory of weights and activations, and faster where the device computes in it")
    if not args.gradient_checkpointing:
        found.append("--gradient_checkpointing: activations of one layer instead of all, for about a third more time")
    if args.micro_batch_size > 1:
        found.append(f"--micro_batch_size {args.micro_batch_size // 2}: half the activations, the same steps")
    if corpus.lengths and corpus.length_of(0.99) < min(args.length, max(corpus.lengths)):
        found.append(f"--max_seq_length {corpus.length_of(0.99)}: 99% of the texts stay whole, the longest are cut")
    if not args.packing and len(corpus.lengths) > 1:
        found.append("--packing: no padding, so less time where lengths differ")
    return found


def print_plan(found: dict[str, Any]) -> None:
    print("dry run, nothing is trained or written:")
    print(f"  steps: {found['steps']}, of about {found['tokens_per_step']} tokens")
    speed = "" if found["tokens_per_s"] is None else f", {found['tokens_per_s']} tokens/s"
    print(f"  a step: {found['step_s']:.2f} s, as measured forward and backward{speed}")
    if found["time_s"] is not None:
        print(f"  time: about {timedelta(seconds=round(found['time_s']))}, without evaluations and checkpoints")
    print(
        f"  memory: about {found['peak_memory_gib']:.2f} GiB at the longest batch ({found['longest_tokens']} tokens), "
        f"of it {found['weights_gib']:.2f} weights and {found['optimizer_gib']:.2f} states of the optimizer"
    )
    for line in found["reduce"]:
        print(f"  less: {line}")
