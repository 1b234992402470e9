"""`gralora finetune`: arguments, and the Hugging Face Trainer around them. There is no training loop of ours.

Also what one wants to know of a run: held-out loss and a sample before and after, a plot of the losses, and whether
the saved adapter, reloaded by another process and merged, still gives the logits that training ended with.
"""

import argparse
import dataclasses
import importlib.util
import json
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.hf_argparser import HfArg
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from ..checkpoints.files import finish_replacing, replace_files
from ..config import LoraConfig
from .data import (
    IGNORED,
    LEARNT,
    READERS,
    RECORD_NAMES,
    Chat,
    Example,
    encode,
    file_examples,
    marked,
    split,
    stdlib_examples,
)
from .embedded import embedded_model

EMBEDDED = "embedded"
SAMPLE_TOKENS = 48
TEXT_PROMPT_TOKENS = 16
PROBES = 4  # held-out examples whose logits are recorded
METRICS, LOSS_PLOT, LOGITS = "metrics.json", "loss.png", "logits.safetensors"
# the words that the Trainer knows
KNOWN = {
    "optim": [kind.value for kind in OptimizerNames],
    "lr_scheduler_type": [kind.value for kind in SchedulerType],
    "report_to": ["none", *INTEGRATION_TO_CALLBACK],
}
NEW = ".new"  # where the adapter is written, before it replaces an older one
CARD, CARD_MARK = "README.md", "Written by `gralora finetune`."  # a card without the mark is the user's
# how far logits may be off after reloading and merging, as a share of their root mean square; merging rounds weights
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass
class FinetuneArguments:
    """What a fine-tuning run is asked for. Checked here as far as no model or data are needed."""

    base_model: str = HfArg(
        default=EMBEDDED,
        aliases=["--model_name_or_path"],
        help="A hub id or a local folder; 'embedded' is SmolLM2-135M-Instruct, which needs no hub.",
    )
    output_dir: str = HfArg(
        default="outputs/finetune", help="Folder for adapter, model card, checkpoints, metrics and plot."
    )
    data_path: str | None = HfArg(
        default=None,
        aliases=["--dataset_name"],
        help=f"A local file ({', '.join(READERS)}) or a folder of them, with the fields {' or '.join(RECORD_NAMES)}; "
        "without it, docstring-to-function pairs from Python's standard library.",
    )
    skip_bad_rows: bool = HfArg(default=False, help="Count broken rows of data_path instead of stopping at the first.")
    train_on_inputs: bool = HfArg(default=False, help="Learn prompts too; without it, answers only.")
    val_set_size: int = HfArg(default=64, help="Examples held out to measure the loss on; 0: none.")
    use_gralora: bool = HfArg(default=False, help="Train GraLoRA; without it, plain LoRA of the same size.")
    lora_r: int = HfArg(default=32, help="Total rank.")
    lora_alpha: int = HfArg(default=64, help="Scale of the adapter: it is multiplied by lora_alpha / lora_r.")
    use_rslora: bool = HfArg(default=False, help="Multiply the adapter by lora_alpha / sqrt(lora_r) instead.")
    lora_dropout: float = HfArg(default=0.0, help="Dropout on the adapter's input.")
    lora_target_modules: list[str] | None = HfArg(
        default=None, help="Names of the layers to adapt, or all-linear; without it, PEFT's choice for the model."
    )
    gralora_k: str = HfArg(default="auto", help="GraLoRA's blocks per side, a number or auto.")
    hybrid_r: int = HfArg(default=0, help="Part of lora_r that is plain LoRA (Hybrid GraLoRA).")
    gralora_scaling: str = HfArg(
        default="lora", help="'matched' makes GraLoRA's update as large as LoRA's at the same learning rate."
    )
    seed: int = HfArg(default=42, help="Of the adapter's start, the order of the data, and dropout.")
    num_train_epochs: float = HfArg(default=1.0, help="Passes over the data.")
    max_steps: int = HfArg(default=-1, help="Optimizer steps, instead of num_train_epochs where positive.")
    batch_size: int = HfArg(default=16, help="Examples per optimizer step, over all devices.")
    micro_batch_size: int = HfArg(
        default=4,
        aliases=["--per_device_train_batch_size"],
        help="Examples per forward pass and device; the rest is accumulated.",
    )
    gradient_checkpointing: bool = HfArg(default=False, help="Less memory: compute activations twice.")
    optim: str = HfArg(default="adamw_torch_fused", help="The Trainer's name of an optimizer.")
    weight_decay: float = HfArg(default=0.0, help="Of the optimizer.")
    learning_rate: float = HfArg(default=3e-4, help="Highest learning rate, reached after the warmup.")
    lr_scheduler_type: str = HfArg(default="linear", help="The Trainer's name of what the learning rate does then.")
    warmup_steps: float = HfArg(default=0.05, help="Steps of warmup, or a share of all steps where below 1.")
    max_seq_length: int = HfArg(
        default=256, aliases=["--cutoff_len", "--max_length"], help="Tokens at which examples are cut."
    )
    logging_steps: int = HfArg(default=10, help="Steps between two logged training losses.")
    eval_steps: float = HfArg(default=0.25, help="Steps between two held-out losses, or a share of all where below 1.")
    save_steps: float = HfArg(default=200, help="Steps between two checkpoints, or a share of all where below 1.")
    report_to: str = HfArg(default="none", help="Where losses are also logged: tensorboard, wandb, trackio or none.")
    bf16: bool = HfArg(default=False, help="Compute in bfloat16; without bf16 and fp16, in float32.")
    fp16: bool = HfArg(default=False, help="Compute in float16, with loss scaling; needs a GPU.")
    resume_from_checkpoint: str | None = HfArg(
        default=None, help="A checkpoint folder to go on from, with the arguments of the run that wrote it."
    )
    verify: bool = HfArg(
        default=False, help="At the end, reload and merge the adapter in a new process and compare logits."
    )

    def __post_init__(self) -> None:
        if self.gralora_k != "auto":
            try:
                self.gralora_k = int(self.gralora_k)
            except ValueError:
                raise ValueError(f"gralora_k={self.gralora_k!r} must be a whole number or 'auto'.") from None
        if self.bf16 and self.fp16:
            raise ValueError("bf16=True and fp16=True exclude each other; give one.")
        least = {"batch_size": 1, "micro_batch_size": 1, "max_seq_length": 2, "val_set_size": 0, "lora_r": 1}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {minimum}.")
        self.gradient_accumulation_steps(devices=1)
        for name, known in KNOWN.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(known)}.")
        if self.report_to != "none" and self.report_to not in get_available_reporting_integrations():
            raise ImportError(
                f"report_to={self.report_to!r} needs a package that is missing: pip install {self.report_to}; or give "
                "--report_to none."
            )

    def gradient_accumulation_steps(self, devices: int) -> int:
        """Forward passes per optimizer step on each of so many devices.

        Raises:
            ValueError: if `batch_size` is not a multiple of what the devices take at once.
        """
        at_once = self.micro_batch_size * devices
        if self.batch_size % at_once:
            below = self.batch_size // at_once * at_once
            fitting = f"{below + at_once}" if not below else f"{below} or {below + at_once}"
            raise ValueError(
                f"batch_size={self.batch_size} must be divisible by micro_batch_size={self.micro_batch_size} times "
                f"{devices} device(s); use batch_size={fitting}, or another micro_batch_size."
            )
        return self.batch_size // at_once

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32

    def lora_config(self) -> LoraConfig:
        targets = self.lora_target_modules
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            use_rslora=self.use_rslora,
            target_modules="all-linear" if targets == ["all-linear"] else targets,
            use_gralora=self.use_gralora,
            gralora_k=self.gralora_k,
            hybrid_r=self.hybrid_r,
            gralora_scaling=self.gralora_scaling,
        )

    def training_arguments(self) -> TrainingArguments:
        gpu = torch.accelerator.is_available()
        if self.fp16 and not gpu:
            raise ValueError("fp16=True needs a GPU, and none is found; use bf16 or neither.")
        training = TrainingArguments(
            output_dir=self.output_dir,
            seed=self.seed,
            num_train_epochs=self.num_train_epochs,
            max_steps=self.max_steps,
            per_device_train_batch_size=self.micro_batch_size,
            per_device_eval_batch_size=1,  # the Trainer averages over batches: of one, that is over answers
            optim=self.optim,
            weight_decay=self.weight_decay,
            learning_rate=self.learning_rate,
            lr_scheduler_type=self.lr_scheduler_type,
            warmup_steps=self.warmup_steps,
            logging_steps=self.logging_steps,
            logging_first_step=True,
            logging_nan_inf_filter=False,
            eval_strategy="steps" if self.val_set_size else "no",
            eval_steps=self.eval_steps if self.val_set_size else None,
            eval_on_start=bool(self.val_set_size),
            save_steps=self.save_steps,
            bf16=self.bf16,
            fp16=self.fp16,
            use_cpu=not gpu,
            dataloader_pin_memory=gpu,
            report_to=self.report_to,
        )
        devices = training.world_size * max(1, training.n_gpu)
        training.gradient_accumulation_steps = self.gradient_accumulation_steps(devices)
        return training


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
    check_length(args, model)
    if args.gradient_checkpointing:
        # the reentrant kind needs an input with gradients, and a frozen model's has none
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    finish_replacing(Path(args.output_dir))
    set_seed(args.seed)
    model = get_peft_model(model, lora_config)
    check_checkpoint(args, model)
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
    output, new = Path(args.output_dir), Path(args.output_dir, NEW)
    if trainer.is_world_process_zero():
        write_card(args, model, losses)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        shutil.copyfile(output / CARD, new / CARD)
    trainer.save_model(str(new))  # PEFT adds to the card what it knows
    if trainer.is_world_process_zero():
        replace_files(new, output)
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


def load_pretrained(auto: type, base_model: str, **options: Any) -> Any:
    """What an Auto class of transformers makes of the base model."""
    folder = str(embedded_model()) if base_model == EMBEDDED else base_model
    try:
        # False, since the default asks people whether to run a model's code
        return auto.from_pretrained(folder, trust_remote_code=False, **options)
    except OSError as error:
        raise OSError(
            f"base_model={base_model!r} could not be loaded; give a local folder, a hub id that can be reached, or "
            f"{EMBEDDED!r}. {error}"
        ) from error


def load_tokenizer(base_model: str) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, with a padding token."""
    tokenizer = load_pretrained(AutoTokenizer, base_model)
    if tokenizer.eos_token is None:
        raise ValueError(f"base_model={base_model!r} has a tokenizer without an end token (eos_token); set one.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_length(args: FinetuneArguments, model: PreTrainedModel) -> None:
    """Raise ValueError if `max_seq_length` is more than the model has positions for."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions and args.max_seq_length > positions:
        raise ValueError(
            f"max_seq_length={args.max_seq_length} is more than the {positions} tokens that "
            f"base_model={args.base_model!r} can take."
        )


def check_checkpoint(args: FinetuneArguments, model: PeftModel) -> None:
    """Raise ValueError if `resume_from_checkpoint` is not a checkpoint of such an adapter.

    The Trainer loads weights alone: another `lora_alpha` would change the adapter, and nothing would say so.
    """
    if args.resume_from_checkpoint is None:
        return
    if not Path(args.resume_from_checkpoint, "trainer_state.json").is_file():
        raise ValueError(f"resume_from_checkpoint={args.resume_from_checkpoint!r} is not a folder with a checkpoint.")
    saved, asked = PeftConfig.from_pretrained(args.resume_from_checkpoint), model.peft_config["default"]
    for name in (
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "target_modules",
        "use_gralora",
        "gralora_k",
        "hybrid_r",
        "gralora_scaling",
    ):
        if getattr(saved, name) != getattr(asked, name):
            raise ValueError(
                f"the checkpoint {args.resume_from_checkpoint!r} has {name}={getattr(saved, name)!r}, this run "
                f"{getattr(asked, name)!r}; resume with the arguments of the run that wrote it."
            )


class SaveOnInterrupt(TrainerCallback):
    """Inside `with`, the first Ctrl-C makes the Trainer save a checkpoint at the end of the step and stop."""

    def __enter__(self) -> "SaveOnInterrupt":
        self.requested = False
        self.handles = threading.current_thread() is threading.main_thread()  # Python allows no other to
        if self.handles:
            self.previous = signal.signal(signal.SIGINT, self.request)
        return self

    def __exit__(self, *_: Any) -> None:
        if self.handles:
            signal.signal(signal.SIGINT, self.previous)

    def request(self, *_: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt("stopped at once, without a checkpoint of the last step")
        self.requested = True
        print("\nCtrl-C: saving a checkpoint after this step; once more to stop at once", file=sys.stderr)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.requested:
            control.should_save = control.should_training_stop = True


def train_or_interrupt(trainer: Trainer, checkpoint: str | None) -> None:
    """Train, from a checkpoint if one is given; raise KeyboardInterrupt if Ctrl-C ended it early."""
    with SaveOnInterrupt() as interrupt:
        trainer.add_callback(interrupt)
        trainer.train(resume_from_checkpoint=checkpoint)
    state = trainer.state
    if state.global_step < state.max_steps:
        saved = Path(trainer.args.output_dir, f"checkpoint-{state.global_step}")
        raise KeyboardInterrupt(
            f"stopped at step {state.global_step} of {state.max_steps}, checkpoint saved in {saved}; to go on, repeat "
            f"the command with --resume_from_checkpoint {saved}"
        )


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


def history(log: list[dict[str, float]]) -> list[dict[str, float]]:
    """The losses in a Trainer's log: rows of `step` with `loss` (train) or `held_out_loss`."""
    names = {"loss": "loss", "eval_loss": "held_out_loss"}
    return [{"step": row["step"], name: row[key]} for row in log for key, name in names.items() if key in row]


def plot_losses(losses: list[dict[str, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, style, label in (("loss", "-", "train"), ("held_out_loss", "o--", "held out")):
        points = [(row["step"], row[name]) for row in losses if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def write_card(args: FinetuneArguments, model: PeftModel, losses: list[dict[str, float]]) -> None:
    """Write the adapter's model card into `output_dir`, unless there is one that `write_card` did not write."""
    path = Path(args.output_dir, CARD)
    if path.exists() and CARD_MARK not in path.read_text(encoding="utf-8"):
        return
    config = model.peft_config["default"]
    base = "SmolLM2-135M-Instruct" if args.base_model == EMBEDDED else args.base_model
    held_out = [row["held_out_loss"] for row in losses if "held_out_loss" in row]
    settings = {field.name: getattr(args, field.name) for field in dataclasses.fields(args)}
    settings |= {"gralora_k": config.gralora_k, "lora_target_modules": sorted(config.target_modules)}
    for name in ("base_model", "data_path", "output_dir", "resume_from_checkpoint", "verify"):
        del settings[name]
    result = f"Held-out loss: {held_out[0]:.4f} before training, {held_out[-1]:.4f} after." if held_out else ""
    text = f"""---
library_name: peft
---

# {"GraLoRA" if args.use_gralora else "LoRA"} adapter for {base}

{CARD_MARK}

- base model: {base}
- data: {args.data_path or "functions of Python's standard library, from docstring to body"}
- trainable parameters: {model.get_nb_trainable_parameters()[0]}

{result}

## Use

```python
import gralora  # so that PEFT knows GraLoRA adapters
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained({args.output_dir!r})
tokenizer = AutoTokenizer.from_pretrained({args.output_dir!r})
```

## Settings

| | |
| --- | --- |
"""
    text += "".join(f"| {name} | {value} |\n" for name, value in settings.items()) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def report(metrics: dict[str, Any], output: Path) -> None:
    if metrics["sample"]["prompt"]:
        for name, text in metrics["sample"].items():
            print(f"---- sample, {name}:\n{text.rstrip()}")
        print("----")
    if loss := metrics["held_out_loss"]:
        print(f"held-out loss: {loss['before']:.4f} before, {loss['after']:.4f} after {metrics['steps']} steps")
    print(f"time: {metrics['time_s']} s")
    print(f"adapter: {output}, metrics: {output / METRICS}, loss curve: {output / LOSS_PLOT}")


# ---- verification --------------------------------------------------------------------------------------------------


def last_logits(model: PreTrainedModel | PeftModel, texts: list[list[int]]) -> Tensor:
    """Logits after the last token of each text, `[texts, vocabulary]`, float32 on the CPU; texts are not padded."""
    model.eval()
    with torch.no_grad():
        rows = [model(input_ids=torch.tensor([ids], device=model.device)).logits[0, -1] for ids in texts]
    return torch.stack(rows).float().cpu()


def record_logits(model: PeftModel, texts: list[list[int]], path: Path) -> None:
    """Write what `verify` compares with: the logits of the model as it is, and what it was given."""
    tensors = {f"text_{i}": torch.tensor(ids) for i, ids in enumerate(texts)}
    dtype = next(p.dtype for p in model.parameters() if not p.requires_grad)
    metadata = {"dtype": str(dtype).removeprefix("torch."), "device": model.device.type}
    save_file(tensors | {"logits": last_logits(model, texts)}, path, metadata)


def verify(adapter: str | Path) -> dict[str, float]:
    """Reload an adapter that `finetune` saved with `verify`, merge it, and compare logits with those of training.

    Returns:
        Largest absolute differences from the recorded logits: `reloaded`, `merged`, and, to compare with, `base`: of
        the model without the adapter. They are also added to `metrics.json`.

    Raises:
        ValueError: if reloaded or merged differ by more than `TOLERANCE`.
        OSError: if files are missing.
    """
    adapter = Path(adapter)
    with safe_open(adapter / LOGITS, "pt") as file:
        metadata, recorded = file.metadata(), file.get_tensor("logits")
        texts = [file.get_tensor(f"text_{i}").tolist() for i in range(len(recorded))]
    dtype = getattr(torch, metadata["dtype"])
    base = AutoModelForCausalLM.from_pretrained(
        PeftConfig.from_pretrained(adapter).base_model_name_or_path, dtype=dtype
    ).to(metadata["device"])
    model = PeftModel.from_pretrained(base, adapter)
    logits = {"reloaded": last_logits(model, texts)}
    with model.disable_adapter():
        logits["base"] = last_logits(model, texts)
    logits["merged"] = last_logits(model.merge_and_unload(), texts)

    differences = {name: (values - recorded).abs().max().item() for name, values in logits.items()}
    metrics = json.loads((adapter / METRICS).read_text(encoding="utf-8"))
    write_json(adapter / METRICS, metrics | {"max_logit_difference": differences})
    allowed = TOLERANCE[dtype] * recorded.square().mean().sqrt().item()
    for name in ("reloaded", "merged"):
        error = (logits[name] - recorded).square().mean().sqrt().item()
        if not error <= allowed:  # also for NaN
            raise ValueError(
                f"the {name} adapter of {str(adapter)!r} gives other logits than at the end of training: they differ "
                f"by {error:.3g} (root mean square; up to {differences[name]:.3g}), {allowed:.3g} is allowed."
            )
    return differences


def verify_main(argv: list[str]) -> None:
    """The command `gralora verify`."""
    parser = argparse.ArgumentParser(prog="gralora verify", description=verify.__doc__.split("\n")[0])
    parser.add_argument("adapter", help="the output_dir of gralora finetune --verify")
    differences = verify(parser.parse_args(argv).adapter)
    print("largest difference of logits from the end of training:")
    print(f"  adapter reloaded: {differences['reloaded']:.3g}\n  adapter merged: {differences['merged']:.3g}")
    print(f"  (without the adapter: {differences['base']:.3g})")
