"""`gralora finetune`: the Hugging Face Trainer with an adapter. There is no training loop of ours."""

import argparse
import dataclasses
import functools
import importlib.util
import json
import os
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    DataCollatorForSeq2Seq,
    EarlyStoppingCallback,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.hf_argparser import string_to_bool

from ..checkpoints.files import finish_replacing, replace_files
from . import configfile, output
from .arguments import FinetuneArguments
from .data.corpus import Corpus, load_corpus
from .data.examples import IGNORED, LEARNT, marked
from .data.packing import PackingCollator, check_packing
from .models import check_length, load_model, load_tokenizer
from .training.distributed import AdapterTrainer, holds_share
from .training.progress import Progress, peak_memory_gib
from .training.report import CARD, LOSS_PLOT, METRICS, history, plot_losses, report, write_card, write_json
from .training.resume import check_checkpoint, check_output, delete_checkpoints, find_checkpoint, train_or_interrupt
from .verify import LOGITS, PROBES, record_logits, verify_in_new_process

NEW = ".new"  # where the adapter is written, before it replaces an older one
SAMPLE_TOKENS = 48
TEXT_PROMPT_TOKENS = 16
EXAMPLES = """examples:
  gralora finetune --use_gralora --max_steps 40 --output_dir out
  gralora finetune --model_name_or_path MODEL --data_path data.jsonl --use_gralora --lora_r 64 --output_dir out
  gralora finetune --model_name_or_path MODEL --data_path data.jsonl --use_gralora --quantization 4bit --bf16 --packing
  gralora finetune --print_config > config.yaml
  gralora finetune config.yaml --learning_rate 1e-4
  gralora finetune config.yaml --resume_from_checkpoint latest
exit status: 0 done, 2 wrong arguments or data, 130 stopped by Ctrl-C with a checkpoint saved, 1 a fault"""


def make_parser() -> HfArgumentParser:
    parser = HfArgumentParser(
        FinetuneArguments,
        prog="gralora finetune",
        usage="gralora finetune [CONFIG.yaml] [--flag value ...]",
        description="Fine-tune a causal language model with GraLoRA or plain LoRA.",
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    for bits in ("4bit", "8bit"):
        parser.add_argument(
            f"--load_in_{bits}",
            dest="quantization",
            nargs="?",
            const="true",
            default=argparse.SUPPRESS,
            type=functools.partial(bits_or_none, bits),
            help=f"The same as --quantization {bits}.",
        )
    parser.add_argument("--config", help="A YAML file with flags by their names; flags given here win over it.")
    parser.add_argument("--print_config", action="store_true", help="Print all settings as such a file, and stop.")
    output.add_output_flags(parser)
    return parser


def bits_or_none(bits: str, text: str) -> str:
    return bits if string_to_bool(text) else "none"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the examples as they are written."""


def main(argv: list[str]) -> None:
    """The command `gralora finetune`."""
    call = vars(configfile.parse(make_parser(), argv))
    quiet, as_json, print_config = call.pop("quiet"), call.pop("json"), call.pop("print_config")
    del call["config"]
    args = FinetuneArguments(**call)
    if print_config:
        print(configfile.dump(args), end="")
        return
    of_many = os.environ.get("RANK", "0") != "0"  # of several processes one speaks
    output.run(lambda: finetune(args), quiet or of_many, as_json and not of_many)


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
    output_dir = Path(args.output_dir)
    with training.main_process_first():
        finish_replacing(output_dir)
    checkpoint = find_checkpoint(args.resume_from_checkpoint, args.output_dir)
    check_output(args.output_dir, checkpoint, args.overwrite)
    tokenizer = load_tokenizer(args.base_model)
    corpus = load_corpus(args, tokenizer)
    show(corpus, tokenizer, args)
    model = prepared_model(args)

    set_seed(args.seed)
    model = get_peft_model(model, lora_config)
    check_checkpoint(checkpoint, model)
    model.print_trainable_parameters()
    if args.packing:
        check_packing(model, args.base_model)
    padding = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
    trainer = AdapterTrainer(
        model=model,
        args=training,
        train_dataset=corpus.train,
        eval_dataset=corpus.held_out or None,
        data_collator=PackingCollator() if args.packing else padding,
        processing_class=tokenizer,
    )
    progress = Progress.replace(trainer)
    if args.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
    # before training, a model that will be shared out is on the CPU, and in the first process only
    prompt = prompt_of(corpus.held_out[0]) if corpus.held_out and not holds_share(trainer) else []
    sample_before = complete(model, tokenizer, prompt)
    if checkpoint is None and trainer.is_world_process_zero():
        delete_checkpoints(args.output_dir)
    train_or_interrupt(trainer, checkpoint)
    losses = history(trainer.state.log_history)
    loss = held_out_loss(losses, trainer.state.best_metric)
    new = output_dir / NEW
    if trainer.is_world_process_zero():
        write_card(args, model, loss)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        shutil.copyfile(output_dir / CARD, new / CARD)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(new))  # PEFT adds to the card what it knows
    if trainer.is_world_process_zero():
        replace_files(new, output_dir)
    model = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # its forward without autocast again

    trainable, total = model.get_nb_trainable_parameters()
    metrics = {
        "arguments": dataclasses.asdict(args) | {"gralora_k": model.peft_config["default"].gralora_k},
        "parameters": {"trainable": trainable, "total": total},
        "examples": corpus.counts(),
        "steps": trainer.state.global_step,
        "held_out_loss": loss,
        "history": losses,
        "sample": {
            "prompt": tokenizer.decode(prompt),
            "before": sample_before,
            "after": complete(model, tokenizer, prompt),
        },
        "tokens": progress.tokens,
        "tokens_per_s": progress.tokens_per_s,
        "peak_memory_gib": round(peak_memory_gib(), 3),
        "time_s": round(time.monotonic() - started, 1),
        "device": str(training.device),
        "versions": {package.__name__: package.__version__ for package in (torch, transformers, peft)}
        | {"python": platform.python_version()},
    }
    if args.verify:  # in all processes, since each may hold a share of the model
        texts = [row["input_ids"] for row in (corpus.held_out or [corpus.first])[:PROBES]]
        record_logits(args, model, texts, output_dir / LOGITS, write=trainer.is_world_process_zero())
    if trainer.is_world_process_zero():
        write_json(output_dir / METRICS, metrics)
        plot_losses(losses, output_dir / LOSS_PLOT)
        report(metrics, output_dir)
        if args.verify:
            verify_in_new_process(output_dir)
            metrics = json.loads((output_dir / METRICS).read_text(encoding="utf-8"))
    return metrics


def show(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, args: FinetuneArguments) -> None:
    """Print how many examples there are, and one as the model gets it."""
    counts = corpus.counts()
    train = f"{counts['train']} examples" if counts["train"] is not None else "a stream of examples"
    packed = f" in {len(corpus.train)} rows" if args.packing and counts["train"] is not None else ""
    print(
        f"{train}{packed} to train on ({counts['left_out']} more have prompts of {args.max_seq_length} tokens or "
        f"more), {counts['held_out']} held out; the first, trained on what is between {' and '.join(LEARNT)}:\n"
        f"{marked(tokenizer, corpus.first)}\n----"
    )


def prepared_model(args: FinetuneArguments) -> PreTrainedModel:
    """The base model as it is trained on, checked against the arguments."""
    options = {"attn_implementation": args.attn_implementation} if args.attn_implementation else {}
    model = load_model(args.base_model, args.dtype, args.quantization, **options)
    check_length(args.max_seq_length, args.base_model, model)
    # the reentrant kind needs an input with gradients, and a frozen model's has none
    checkpointing = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    if args.quantization != "none":
        model = prepare_model_for_kbit_training(model, args.gradient_checkpointing, **checkpointing)
    elif args.gradient_checkpointing:
        model.gradient_checkpointing_enable(**checkpointing)
    return model


def held_out_loss(losses: list[dict[str, float]], best: float | None) -> dict[str, float] | None:
    """Before training, and of the adapter that is kept: the last, or the best of a run that looks for it."""
    measured = [row["held_out_loss"] for row in losses if "held_out_loss" in row]
    return {"before": measured[0], "after": measured[-1] if best is None else best} if measured else None


def check_packages(*names: str) -> None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"fine-tuning needs the package(s) {', '.join(missing)}: pip install 'gralora[finetune]'")


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
