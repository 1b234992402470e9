"""What a fine-tuning run is asked for: one field per flag, and every check that needs neither model nor data."""

from dataclasses import dataclass

import torch
from transformers import TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from ..config import LoraConfig
from .data import READERS, RECORD_NAMES
from .models import EMBEDDED

# the words that the Trainer knows
KNOWN = {
    "optim": [kind.value for kind in OptimizerNames],
    "lr_scheduler_type": [kind.value for kind in SchedulerType],
    "report_to": ["none", *INTEGRATION_TO_CALLBACK],
}


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
