"""`gralora finetune`: the Hugging Face Trainer with an adapter. There is no training loop of ours."""

import dataclasses
import importlib.util
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    Trainer,
    set_seed,
)

from .arguments import FinetuneArguments
from .data import IGNORED, LEARNT, Chat, Example, encode, file_examples, marked, split
from .models import check_length, load_pretrained, load_tokenizer
from .report import LOSS_PLOT, METRICS, history, plot_losses, report, write_card, write_json
from .resume import check_checkpoint, train_or_interrupt
from .stdlib import stdlib_examples
from .verify import LOGITS, PROBES, record_logits

SAMPLE_TOKENS = 48
TEXT_PROMPT_TOKENS = 16


def main(argv: list[str]) -> None:
    """The command `gralora finetune`."""
    parser = HfArgumentParser(FinetuneArguments, prog="gralora finetune", allow_abbrev=False)
    finetune(FinetuneArguments(**vars(parser.parse_args(argv))))


def finetune(args: FinetuneArguments) -> dict[str, Any]:
    """Fine-tune a causal language model; see `FinetuneArguments`. Progress and results are printed.

    Returns:
        What was measured, as also written to `metrics.json` in `output_dir`, beside the adapter and `loss.png`.

    Raises:
        ValueError: if arguments, model and data do not fit each other.
        OSError: if model or data cannot be read.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is saved; the message says where.
    """
    check_packages("accelerate", "matplotlib")
    started = time.monotonic()
    training, lora_config = args.training_arguments(), args.lora_config()
    tokenizer = load_tokenizer(args.base_model)
    train_examples, held_out_examples = examples(args, tokenizer)
    encoded = [encode(tokenizer, [one], args.max_seq_length, args.train_on_inputs) for one in train_examples]
    train = [row for rows in encoded for row in rows]
    held_out = encode(tokenizer, held_out_examples, args.max_seq_length, args.train_on_inputs)[: args.val_set_size]
    if not train or (args.val_set_size and not held_out):
        raise ValueError(f"max_seq_length={args.max_seq_length} has no room for any prompt with an answer.")
    print(
        f"{len(train)} examples to train on ({encoded.count([])} more have prompts of {args.max_seq_length} tokens or "
        f"more), {len(held_out)} held out; the first, trained on what is between {' and '.join(LEARNT)}:\n"
        f"{marked(tokenizer, train[0])}\n----"
    )
    model = load_pretrained(AutoModelForCausalLM, args.base_model, dtype=args.dtype)
    check_length(args.max_seq_length, args.base_model, model)
    if args.gradient_checkpointing:
        # the reentrant kind needs an input with gradients, and a frozen model's has none
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    set_seed(args.seed)
    model = get_peft_model(model, lora_config)
    check_checkpoint(args.resume_from_checkpoint, model)
    model.print_trainable_parameters()
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=held_out or None,
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
        processing_class=tokenizer,
    )
    prompt = prompt_of(held_out[0]) if held_out else []
    sample_before = complete(model, tokenizer, prompt)
    train_or_interrupt(trainer, args.resume_from_checkpoint)
    losses = history(trainer.state.log_history)
    if trainer.is_world_process_zero():
        write_card(args, model, losses)
    trainer.save_model()  # PEFT adds to the card what it knows
    model = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # its forward without autocast again

    held_out_losses = [row["held_out_loss"] for row in losses if "held_out_loss" in row]
    trainable, total = model.get_nb_trainable_parameters()
    metrics = {
        "arguments": dataclasses.asdict(args) | {"gralora_k": model.peft_config["default"].gralora_k},
        "parameters": {"trainable": trainable, "total": total},
        "examples": {"train": len(train), "held_out": len(held_out)},
        "steps": trainer.state.global_step,
        "held_out_loss": {"before": held_out_losses[0], "after": held_out_losses[-1]} if held_out_losses else None,
        "history": losses,
        "sample": {
            "prompt": tokenizer.decode(prompt),
            "before": sample_before,
            "after": complete(model, tokenizer, prompt),
        },
        "time_s": round(time.monotonic() - started, 1),
        "device": str(training.device),
        "versions": {package.__name__: package.__version__ for package in (torch, transformers, peft)}
        | {"python": platform.python_version()},
    }
    if trainer.is_world_process_zero():
        output = Path(args.output_dir)
        write_json(output / METRICS, metrics)
        plot_losses(losses, output / LOSS_PLOT)
        report(metrics, output)
        if args.verify:
            record_logits(model, [row["input_ids"] for row in (held_out or train)[:PROBES]], output / LOGITS)
            # a process of its own: nothing of the trained model but the files can be what is compared
            subprocess.run([sys.executable, "-m", "gralora.tool.cli", "verify", str(output)], check=True)
            metrics = json.loads((output / METRICS).read_text(encoding="utf-8"))
    return metrics


def check_packages(*names: str) -> None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"fine-tuning needs the package(s) {', '.join(missing)}: pip install 'gralora[finetune]'")


def examples(
    args: FinetuneArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Example | Chat], list[Example | Chat]]:
    """Training and held-out examples: `val_set_size` of a file are held out, whole modules of the standard library."""
    if args.data_path is None:
        return stdlib_examples()
    found = file_examples(args.data_path, tokenizer, args.skip_bad_rows)
    print(f"data: {found}")
    return split(found.examples, args.val_set_size)


def prompt_of(row: dict[str, list[int]]) -> list[int]:
    """Token ids of an encoded example's prompt; of plain text, which has none, the beginning."""
    prompt = next(i for i, label in enumerate(row["labels"]) if label != IGNORED)
    return row["input_ids"][: prompt if prompt > 1 else TEXT_PROMPT_TOKENS]


def complete(model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompt: list[int]) -> str:
    """The model's greedy continuation of a prompt's token ids, up to `SAMPLE_TOKENS` tokens; "" of an empty one."""
    if not prompt:
        return ""
    ids = torch.tensor([prompt], device=model.device)  # [1, T]
    model.eval()
    with torch.no_grad():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=SAMPLE_TOKENS,
            pad_token_id=tokenizer.pad_token_id,
        )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
