"""`gralora finetune`: TRL's SFTTrainer with an adapter. There is no training loop of ours."""

import argparse
import contextlib
import dataclasses
import functools
import os
import platform
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import transformers
import trl
from datasets import Dataset
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    EarlyStoppingCallback,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from trl import SFTConfig

from gralora_command import Parser, add_output_flags, help_width

from ..acceleration import accelerate, is_default
from ..checkpoints.files import check_space, finish_replacing, locked, read_json, replace_files, write_json
from ..checkpoints.load import load_adapter
from ..config import LoraConfig
from ..ops import plans
from ..seam import string_to_bool
from . import configfile, output
from .arguments import LENGTH, FinetuneArguments
from .data.corpus import Corpus, load_corpus
from .data.packing import check_packing
from .data.tokens import IGNORED, LEARNT, marked
from .models import check_length, check_tokens, load_config, load_model, load_tokenizer, positions, vocabulary_size
from .side_by_side import stop_where_trained, tokenizer_of
from .trainer_fields import other_fields, other_flags
from .training.disk import full_disk_is_said, least_space
from .training.distributed import holds_share
from .training.dry_run import dry_run
from .training.progress import Progress, peak_memory_gib
from .training.report import LOSS_PLOT, METRICS, finite, history, plot_losses, report, summary, write_card
from .training.resume import (
    check_checkpoint,
    check_data,
    check_output,
    check_tensors,
    delete_checkpoints,
    find_checkpoint,
    measured_now,
    train_or_interrupt,
)
from .training.start import choose_layers, continued
from .training.stopping import StopAtNonFinite, check_loss, learnt_ends, learnt_nothing, stop_at
from .training.trainer import AdapterTrainer
from .verify import LOGITS, PROBES, record_logits, verify_in_new_process

NEW = ".new"  # where the adapter is written, before it replaces an older one
SAMPLE_TOKENS = 48
TEXT_PROMPT_TOKENS = 16
EXAMPLES = """examples:
  gralora finetune --use_gralora --gralora_scaling matched --max_steps 40
  gralora finetune --base_model MODEL --data_path data.jsonl --output_dir out \\
      --use_gralora --gralora_scaling matched
  gralora finetune --base_model MODEL --data_path data.jsonl --output_dir out \\
      --use_gralora --gralora_scaling matched --quantization 4bit --bf16 --packing
  gralora finetune --print_config > config.yaml
  gralora finetune config.yaml --learning_rate 1e-4
  gralora finetune config.yaml --dry_run
  gralora finetune config.yaml --resume_from_checkpoint latest
exit status: 0 done, 2 wrong arguments or data, or training that diverged,
130 stopped by Ctrl-C with a checkpoint saved, 1 a fault"""


class FlagParser(Parser, HfArgumentParser):
    """A flag for each field of dataclasses."""


def make_parser() -> FlagParser:
    parser = FlagParser(
        (FinetuneArguments, other_flags(FinetuneArguments)),
        prog="gralora finetune",
        usage="gralora finetune [CONFIG.yaml] [--flag value ...]",
        description="Fine-tune a causal language model with GraLoRA or plain LoRA.",
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
    )
    others = other_fields(FinetuneArguments)
    for action in parser._actions:
        if action.dest in others:
            action.default = argparse.SUPPRESS  # what is not given is left to SFTConfig
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
    parser.add_argument(
        "--dry_run", action="store_true", help="Measure some batches, print what the run would take, and stop."
    )
    parser.add_argument("--print_config", action="store_true", help="Print all settings as such a file, and stop.")
    add_output_flags(parser)
    return parser


def bits_or_none(bits: str, text: str) -> str:
    return bits if string_to_bool(text) else "none"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the examples as they are written; as wide as the help that is kept."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=help_width() - 2)  # argparse leaves two columns, too


def read_arguments(argv: list[str], caller: Parser | None = None) -> tuple[FinetuneArguments, dict[str, bool]]:
    """Read a command line: what to train, and the flags that say what to do with it and how to print."""
    call = vars(configfile.parse(make_parser().of(caller), argv))
    how = {name: call.pop(name) for name in ("quiet", "json", "print_config", "dry_run")}
    del call["config"]
    ours = {field.name for field in dataclasses.fields(FinetuneArguments)}
    trainer = {name: call.pop(name) for name in list(call) if name not in ours}
    return FinetuneArguments(**call, trainer=trainer), how


def main(argv: list[str]) -> None:
    """The command `gralora finetune`."""
    args, how = read_arguments(argv)
    quiet, as_json, dry = how["quiet"], how["json"], how["dry_run"]
    if how["print_config"]:
        print(configfile.dump(args, args.trainer), end="")
        return
    of_many = not is_first_process()  # of several processes one speaks
    output.run(lambda: plan(args) if dry else finetune(args), quiet or of_many, as_json and not of_many)


class Run(NamedTuple):
    """What a run needs before its first step."""

    args: FinetuneArguments
    training: SFTConfig
    tokenizer: PreTrainedTokenizerBase
    corpus: Corpus
    model: PeftModel
    trainer: AdapterTrainer
    progress: Progress
    checkpoint: str | None


def finetune(args: FinetuneArguments) -> dict[str, Any]:
    """Fine-tune a causal language model; see `FinetuneArguments`. Progress and results are printed.

    Returns:
        What was measured, as also written to `metrics.json` in `output_dir`, beside the adapter and `loss.png`.

    Raises:
        ValueError: if arguments, model and data do not fit each other, or training diverges.
        OSError: if model or data cannot be read, or the disk is full; the message says what is kept.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is saved; the message says where.
    """
    out = Path(args.output_dir).resolve()
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"output_dir={args.output_dir!r} is a file; give a folder, new or of an earlier run.")
    lock = locked(out.with_name(f".{out.name}.lock"), out) if is_first_process() else contextlib.nullcontext()
    with lock, full_disk_is_said(out):
        return train(args)


def is_first_process() -> bool:
    """Whether this process is the first, or the only one, of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def train(args: FinetuneArguments) -> dict[str, Any]:
    """As `finetune`, whose lock keeps others out of `output_dir`."""
    started = time.monotonic()
    run = prepare(args)
    trainer, tokenizer, output_dir = run.trainer, run.tokenizer, Path(args.output_dir)
    check_space(output_dir, least_space(run.model, run.training))
    # before training, a model that will be shared out is on the CPU, and in the first process only
    held_out = run.corpus.held_out
    prompt = prompt_of(held_out[0]) if held_out and not holds_share(trainer) else []
    sample = {"prompt": tokenizer.decode(prompt), "before": complete(run.model, tokenizer, prompt)}
    if run.checkpoint is None and trainer.is_world_process_zero():
        delete_checkpoints(args.output_dir)
    trained = train_or_interrupt(trainer, run.checkpoint, run.corpus.digest())
    losses = history(trainer.state.log_history)
    check_loss(losses, vocabulary_size(run.model.config), run.training)
    loss = held_out_loss(losses, trainer.state.best_metric) if trained else measured_now(trainer)
    save(run, loss, output_dir)
    model = trainer.accelerator.unwrap_model(run.model, keep_fp32_wrapper=False)  # its forward without autocast again
    sample["after"] = complete(model, tokenizer, prompt)
    metrics = measurements(run, losses, loss, sample) | {"time_s": round(time.monotonic() - started, 1)}
    if args.verify:  # in all processes, since each may hold a share of the model
        texts = [row["input_ids"] for row in (held_out or [run.corpus.first])[:PROBES]]
        record_logits(run.args, model, texts, output_dir / LOGITS, write=trainer.is_world_process_zero())
    if trainer.is_world_process_zero():
        write_json(output_dir / METRICS, metrics)
        plot_losses(losses, output_dir / LOSS_PLOT)
        report(metrics, output_dir)
        if args.verify:
            verify_in_new_process(output_dir)
            metrics = read_json(output_dir / METRICS)
    if run.training.push_to_hub:
        trainer.push_to_hub()
    return metrics


def plan(args: FinetuneArguments) -> dict[str, Any]:
    """What a run would take, from its shapes and some measured batches; nothing is written. See `dry_run`."""
    check_output(args.output_dir, find_checkpoint(args.resume_from_checkpoint, args.output_dir), args.overwrite)
    with tempfile.TemporaryDirectory() as folder:  # the Trainer makes its output folder
        elsewhere = dataclasses.replace(args, trainer=args.trainer, output_dir=folder, resume_from_checkpoint=None)
        run = prepare(elsewhere)
        return finite(dry_run(run.args, run.trainer, run.model, run.corpus))


class Loaded(NamedTuple):
    """Data, and a base model that is ready for adapters.

    Attributes:
        lora_config: of the adapter.
        trained: folder of the adapter that training goes on with; None: a new one.
    """

    args: FinetuneArguments
    tokenizer: PreTrainedTokenizerBase
    corpus: Corpus
    model: PreTrainedModel
    lora_config: LoraConfig
    trained: Path | None


def load(args: FinetuneArguments, training: SFTConfig) -> Loaded:
    """Load data and base model, and check that they fit each other and the arguments."""
    args, trained = continued(args)
    lora_config = args.lora_config()
    template, end, hub = (args.trainer.get(name) for name in ("chat_template_path", "eos_token", "trust_remote_code"))
    named = tokenizer_of([str(trained)] if trained else [], args.base_model)
    tokenizer = load_tokenizer(named, template, end, trust_remote_code=bool(hub))
    config = load_config(args.base_model, trust_remote_code=bool(hub))
    if args.max_seq_length is None:
        args.max_seq_length = min(LENGTH, positions(config) or LENGTH)
    training.max_length = args.length if args.packing else None
    check_length(args.length, args.base_model, config)
    check_tokens(tokenizer, args.base_model, config)
    corpus = load_corpus(args, tokenizer, vocabulary_size(config))
    show(corpus, tokenizer, args, positions(config))
    ends = learnt_ends(corpus, tokenizer)

    model = load_model(args.base_model, args.dtype, args.quantization, **args.model_options())
    if args.quantization != "none":
        model = prepare_model_for_kbit_training(model, args.gradient_checkpointing, {"use_reentrant": False})
    if trained is None:
        choose_layers(lora_config, args.base_model, model)
    stop_where_trained(model, trained)
    stop_at(model, ends, tokenizer)
    return Loaded(args, tokenizer, corpus, model, lora_config, trained)


def prepare(args: FinetuneArguments) -> Run:
    """Load data and model, and put the adapter on it."""
    training = args.training_arguments()
    with training.main_process_first():
        finish_replacing(Path(args.output_dir))
    checkpoint = find_checkpoint(args.resume_from_checkpoint, args.output_dir)
    check_output(args.output_dir, checkpoint, args.overwrite)
    args, tokenizer, corpus, model, lora_config, trained = load(args, training)
    set_seed(args.seed)
    plans.choose(args.kernels)
    model = get_peft_model(model, lora_config) if trained is None else load_adapter(model, trained, is_trainable=True)
    accelerate(model, enable=is_default())
    check_checkpoint(checkpoint, model)
    check_tensors(checkpoint, model)
    check_data(checkpoint, corpus.digest())
    if args.packing or training.padding_free:
        check_packing(model, args.base_model)
    trainer = AdapterTrainer(
        model=model,
        args=training,
        train_dataset=corpus.train,
        eval_dataset=Dataset.from_list(corpus.held_out).select_columns(["input_ids", "labels"])
        if corpus.held_out
        else None,
        processing_class=tokenizer,
    )
    trainer.add_callback(StopAtNonFinite(trainer))
    if args.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
    progress = Progress.replace(trainer)
    if trainer.is_world_process_zero():
        print(output.fitted(summary(args, model, trainer, trained), (", ",), output.columns()))
    return Run(args, training, tokenizer, corpus, model, trainer, progress, checkpoint)


def show(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, args: FinetuneArguments, most: int | None) -> None:
    """Print how many examples there are, what of them is cut, and one as a model of `most` tokens gets it."""
    counts = corpus.counts()
    train = f"{counts['train']} examples" if counts["train"] is not None else "a stream of examples"
    parts = [f"{train} to train on", f"{counts['held_out']} held out"]
    if counts["left_out"]:
        parts.append(f"{counts['left_out']} left out, whose prompts have {args.length} tokens or more")
    print(output.fitted(parts, (", ",), output.columns()))
    print(f"the first, trained on what is between {' and '.join(LEARNT)}:\n{marked(tokenizer, corpus.first)}\n----")
    cut = corpus.cut(args.length)
    if cut["examples"] and not args.splits_long_texts:
        lost = "beginning" if args.truncation_mode == "keep_end" else "end"
        texts = (
            f"cut: {cut['examples']} of {corpus.lengths.total()} texts are longer than max_seq_length={args.length}"
        )
        tokens = f"in all {cut['tokens'] / cut['of_tokens']:.1%} of the tokens; {corpus.whole(most)}"
        print(output.fitted([f"{texts} and lose their {lost}", tokens], (", ",), output.columns()))


def save(run: Run, loss: dict[str, float] | None, output_dir: Path) -> None:
    """Write adapter, tokenizer, generation config and card, in the place of those of an earlier run.

    What that run reported goes with its adapter, so that no report ever stands beside another one.
    """
    trainer, new = run.trainer, output_dir / NEW
    if trainer.is_world_process_zero():
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        write_card(run.args, run.model, loss, new)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(new), _internal_call=True)  # PEFT adds to the card what it knows; not yet to the hub
    if trainer.is_world_process_zero():
        run.model.get_base_model().generation_config.save_pretrained(new)
        for name in (METRICS, LOSS_PLOT, LOGITS):
            (output_dir / name).unlink(missing_ok=True)
        replace_files(new, output_dir)


def measurements(
    run: Run, losses: list[dict[str, float]], loss: dict[str, float] | None, sample: dict[str, str]
) -> dict[str, Any]:
    """What `metrics.json` holds."""
    trainable, total = run.model.get_nb_trainable_parameters()
    arguments = dataclasses.asdict(run.args) | run.args.trainer
    metrics = {
        "arguments": arguments | {"gralora_k": run.model.peft_config["default"].gralora_k},
        "parameters": {"trainable": trainable, "total": total},
        "examples": run.corpus.counts(),
        "cut": run.corpus.cut(run.args.length),
        "steps": run.trainer.state.global_step,
        "held_out_loss": loss,
        "notice": learnt_nothing(loss, run.training, run.trainer.state.max_steps),
        "history": losses,
        "sample": sample,
        "tokens": run.progress.tokens,
        "tokens_per_s": run.progress.tokens_per_s,
        "peak_memory_gib": round(peak_memory_gib(), 3),
        "device": str(run.training.device),
        "versions": {package.__name__: package.__version__ for package in (torch, transformers, peft, trl)}
        | {"python": platform.python_version()},
    }
    return finite(metrics)


def held_out_loss(losses: list[dict[str, float]], best: float | None) -> dict[str, float] | None:
    """Before training, and of the adapter that is kept: the last, or the best of a run that looks for it."""
    measured = [row["held_out_loss"] for row in losses if "held_out_loss" in row]
    return {"before": measured[0], "after": measured[-1] if best is None else best} if measured else None


def prompt_of(row: dict[str, list[int]]) -> list[int]:
    """Token ids of an encoded example's prompt; of plain text, which has none, the beginning."""
    prompt = next(i for i, label in enumerate(row["labels"]) if label != IGNORED)
    return row["input_ids"][: prompt if prompt > 1 else TEXT_PROMPT_TOKENS]


def complete(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, prompt: list[int]) -> str:
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
