"""What a fine-tuning run is asked for: one field per flag, and every check that needs neither model nor data.

Fields here have the names of the research scripts, or a meaning that depends on data and model. All other fields of
TRL's SFTConfig, and so of transformers' TrainingArguments, are flags under their own names; see trainer_fields.py.
"""

import json
from dataclasses import InitVar, dataclass, make_dataclass
from typing import Any, get_type_hints

import torch
from transformers.integrations import get_available_reporting_integrations
from trl import SFTConfig

from ..config import FLAGS, SETTINGS, LoraConfig, is_set, parse
from ..ops import plans
from ..seam import INTEGRATION_TO_CALLBACK, HfArg, OptimizerNames, SchedulerType
from .data.layouts import RECORD_NAMES
from .data.readers import READERS
from .data.tokens import TRUNCATION_MODES
from .models import EMBEDDED, QUANTIZATIONS
from .trainer_fields import (
    CHECKPOINTING,
    CHECKPOINTING_OPTIONS,
    NEEDS_GPU,
    OF_DATA,
    SPLITTING,
    checkpointing_options,
    other_fields,
    same_names,
)

# the words that the Trainer knows
KNOWN = {
    "optim": [kind.value for kind in OptimizerNames],
    "lr_scheduler_type": [kind.value for kind in SchedulerType],
    "quantization": ["none", *QUANTIZATIONS],
    "kernels": list(plans.CHOICES),
}
LEAST = {"batch_size": 1, "micro_batch_size": 1, "gradient_accumulation_steps": 1, "max_seq_length": 2, "lora_r": 1}
LEAST |= {"val_set_size": 0, "max_grad_norm": 0, "neftune_noise_alpha": 0, "early_stopping_patience": 1}
LEAST |= {"save_total_limit": 1}
BATCH_SIZE = 16  # unless asked for otherwise
HELD_OUT = 64  # examples held out, unless asked for otherwise
LENGTH = 2048  # tokens at which examples are cut, unless asked for otherwise or the model takes fewer


def _flag_type(name: str) -> type:
    """The type of a flag: of what has words among its values it is text, which `parse` reads."""
    kind = get_type_hints(LoraConfig)[name]
    return kind if kind in (bool, int, float) else str


# one flag for each of gralora's own fields, with the field's default and help
GraloraFlags: Any = make_dataclass(
    "GraloraFlags",
    [(name, _flag_type(name), HfArg(default=f.default, help=f.metadata["help"])) for name, f in SETTINGS.items()],
)


@dataclass
class FinetuneArguments(GraloraFlags):
    """What a fine-tuning run is asked for. Checked here as far as no model or data are needed.

    Args:
        trainer: other fields of SFTConfig, by their names.
    """

    base_model: str = HfArg(
        default=EMBEDDED,
        aliases=["--model_name_or_path"],
        help="A hub id or a local folder; 'embedded' is SmolLM2-135M-Instruct, which needs no hub.",
    )
    output_dir: str = HfArg(
        default="outputs/finetune", help="Folder for adapter, model card, checkpoints, metrics and plot."
    )
    overwrite: bool = HfArg(
        default=False,
        aliases=["--overwrite_output_dir"],
        help="Start anew where output_dir holds an earlier run; its checkpoints are deleted.",
    )
    data_path: list[str] | None = HfArg(
        default=None,
        aliases=["--dataset_name"],
        help=f"A local file ({', '.join(READERS)}), a folder of them, or the id of a data set on the hub, with the "
        f"fields {' or '.join(RECORD_NAMES)}; or several of them. Without it, docstring-to-function pairs from "
        "Python's standard library.",
    )
    data_weights: list[float] | None = HfArg(
        default=None,
        help="How often each of several data_path is drawn from, in proportion; without it, each row comes once.",
    )
    dataset_config: str | None = HfArg(default=None, help="Configuration of a hub's data set that has several.")
    train_split: str | None = HfArg(
        default=None,
        aliases=["--dataset_train_split"],
        help="Split of the data set, or what the names of a folder's files begin with; without it, train.",
    )
    eval_data_path: str | None = HfArg(
        default=None, help="What the held-out loss is measured on, as data_path; without it, part of data_path."
    )
    eval_split: str | None = HfArg(
        default=None,
        aliases=["--dataset_test_split"],
        help="Split of eval_data_path, or else of data_path, to measure the held-out loss on.",
    )
    val_set_size: int | None = HfArg(
        default=None,
        help="Examples to measure the held-out loss on, 0: none; without it, all of eval_data_path or eval_split, or "
        f"else {HELD_OUT} taken out of data_path, or a quarter of few rows.",
    )
    skip_bad_rows: bool = HfArg(default=False, help="Count broken rows of the data instead of stopping at the first.")
    streaming: bool = HfArg(
        default=False,
        help="Read data_path while training, for more than fits in memory; needs max_steps.",
    )
    train_on_inputs: bool = HfArg(default=False, help="Learn prompts too; without it, answers only.")
    max_seq_length: int | None = HfArg(
        default=None,
        aliases=["--cutoff_len", "--max_length"],
        help=f"Tokens at which examples are cut; without it, {LENGTH}, or what the model takes if that is less.",
    )
    packing: bool = HfArg(
        default=False,
        help="Fill rows of max_seq_length tokens with several examples, which do not see each other; batch sizes then "
        "count such rows. Held-out examples are never packed.",
    )
    quantization: str = HfArg(
        default="none",
        help="Load the base model in 4bit (QLoRA: nf4, double quantisation) or 8bit with bitsandbytes, or in fp8 with "
        "torchao.",
    )
    attn_implementation: str | None = HfArg(
        default=None, help="The base model's attention, as transformers names it: sdpa, eager, flash_attention_2."
    )
    kernels: str = HfArg(
        default=plans.choice,
        help="What computes the adapters: auto, portable, torch, triton or reference, as the variable GRALORA_KERNELS "
        "has it otherwise. With torch and reference, plain LoRA is computed as PEFT does.",
    )
    lora_r: int = HfArg(default=32, help="Total rank.")
    lora_alpha: int = HfArg(default=64, help="Scale of the adapter: it is multiplied by lora_alpha / lora_r.")
    use_rslora: bool = HfArg(default=False, help="Multiply the adapter by lora_alpha / sqrt(lora_r) instead.")
    lora_dropout: float = HfArg(default=0.0, help="Dropout on the adapter's input.")
    lora_target_modules: list[str] | None = HfArg(
        default=None, help="Names of the layers to adapt, or all-linear; without it, PEFT's choice for the model."
    )
    seed: int = HfArg(default=42, help="Of the adapter's start, the order of the data, and dropout.")
    num_train_epochs: float = HfArg(default=1.0, help="Passes over the data.")
    max_steps: int = HfArg(default=-1, help="Optimizer steps, instead of num_train_epochs where positive.")
    batch_size: int | None = HfArg(
        default=None, help=f"Examples per optimizer step, over all devices; without it, {BATCH_SIZE}."
    )
    micro_batch_size: int = HfArg(
        default=4,
        aliases=["--per_device_train_batch_size"],
        help="Examples per forward pass and device; the rest is accumulated.",
    )
    gradient_accumulation_steps: int | None = HfArg(
        default=None, help="Forward passes per optimizer step, instead of batch_size."
    )
    gradient_checkpointing: bool = HfArg(
        default=False, aliases=["--activation_checkpointing"], help="Less memory: compute activations twice."
    )
    optim: str = HfArg(default="adamw_torch_fused", help="The Trainer's name of an optimizer.")
    weight_decay: float = HfArg(default=0.0, help="Of the optimizer.")
    max_grad_norm: float = HfArg(default=1.0, help="Norm to which longer gradients are cut; 0: they are not.")
    learning_rate: float = HfArg(default=3e-4, help="Highest learning rate, reached after the warmup.")
    lr_scheduler_type: str = HfArg(default="linear", help="The Trainer's name of what the learning rate does then.")
    warmup_steps: float = HfArg(default=0.05, help="Steps of warmup, or a share of all steps where below 1.")
    neftune_noise_alpha: float | None = HfArg(
        default=None, help="Scale of the noise on the embeddings while training (NEFTune); 5 is usual."
    )
    early_stopping_patience: int | None = HfArg(
        default=None,
        help="Stop after so many held-out losses in a row that are no better than the best, and keep the best "
        "adapter; checkpoints are then saved every eval_steps.",
    )
    bf16: bool = HfArg(default=False, help="Compute in bfloat16; without bf16 and fp16, in float32.")
    fp16: bool = HfArg(default=False, help="Compute in float16, with loss scaling; needs a GPU.")
    logging_steps: int = HfArg(default=10, help="Steps between two logged training losses.")
    eval_steps: float = HfArg(default=0.25, help="Steps between two held-out losses, or a share of all where below 1.")
    save_steps: float = HfArg(default=200, help="Steps between two checkpoints, or a share of all where below 1.")
    save_total_limit: int | None = HfArg(default=None, help="Checkpoints to keep; without it, all.")
    report_to: list[str] | None = HfArg(
        default=None,
        help="Where losses are also logged: tensorboard, wandb, trackio ..., or all; without it, none.",
    )
    resume_from_checkpoint: str | None = HfArg(
        default=None,
        help="A checkpoint folder to go on from, with the arguments of the run that wrote it; latest (or true): the "
        "last complete one in output_dir.",
    )
    verify: bool = HfArg(
        default=False, help="At the end, reload and merge the adapter in a new process and compare logits."
    )

    trainer: InitVar[dict[str, Any] | None] = None

    def __post_init__(self, trainer: dict[str, Any] | None) -> None:
        self.trainer = dict(trainer or {})
        if isinstance(self.data_path, list) and len(self.data_path) == 1:
            (self.data_path,) = self.data_path
        for name in SETTINGS:
            if isinstance(text := getattr(self, name), str):
                setattr(self, name, parse(name, text))
        for name, minimum in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"{name}={value} must be at least {minimum}.")
        for name, known in KNOWN.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(known)}.")
        self.accumulation(devices=1)
        self.check_combinations()
        self.check_trainer()
        for name in self.reporters:
            if name not in ("all", *INTEGRATION_TO_CALLBACK):
                raise ValueError(f"report_to={name!r} must be one of none, all, {', '.join(INTEGRATION_TO_CALLBACK)}.")
            if name != "all" and name not in get_available_reporting_integrations():
                raise ImportError(
                    f"report_to={name!r} needs a package that is missing: pip install {name}; or give "
                    "--report_to none."
                )

    def check_trainer(self) -> None:
        """Check and apply the fields of SFTConfig that mean something for the data; ValueError for what is unknown."""
        unknown = set(self.trainer) - set(other_fields(type(self)))
        if unknown:
            raise ValueError(f"{sorted(unknown)} are no fields of TRL's SFTConfig, or have another name here.")
        for name in ("completion_only_loss", "assistant_only_loss"):
            learnt_only = self.trainer.get(name)
            if learnt_only and self.train_on_inputs:
                raise ValueError(f"{name}=True and train_on_inputs=True contradict each other; give one.")
            if learnt_only is False:
                self.train_on_inputs = True
        if self.truncation_mode not in TRUNCATION_MODES:
            raise ValueError(f"truncation_mode={self.truncation_mode!r} must be one of {', '.join(TRUNCATION_MODES)}.")

    def check_combinations(self) -> None:
        """Raise ValueError if fields contradict each other."""
        if self.data_weights is not None:
            if len(self.data_weights) != len(self.data_paths) or len(self.data_paths) < 2:
                raise ValueError(
                    f"data_weights={self.data_weights} must be as many numbers as there are data_path, of which there "
                    f"are {len(self.data_paths)}; one data_path needs none."
                )
            if not all(weight > 0 for weight in self.data_weights):
                raise ValueError(f"data_weights={self.data_weights} must be above 0; leave out a data_path instead.")
        if "all-linear" in (self.lora_target_modules or ()) and len(self.lora_target_modules) > 1:
            raise ValueError(
                f"lora_target_modules={self.lora_target_modules}: all-linear stands alone, for all linear layers but "
                "the output layer; with others, name each, as in q_proj k_proj v_proj up_proj down_proj lm_head."
            )
        if self.bf16 and self.fp16:
            raise ValueError("bf16=True and fp16=True exclude each other; give one.")
        if self.data_path is None:
            for name in ("dataset_config", "train_split", "streaming"):
                if getattr(self, name):
                    raise ValueError(f"{name}={getattr(self, name)!r} needs data_path.")
            if self.eval_split is not None and self.eval_data_path is None:
                raise ValueError(f"eval_split={self.eval_split!r} needs data_path or eval_data_path.")
        if self.eval_data_path is None and self.eval_split is not None and self.eval_split == self.train_split:
            raise ValueError(f"eval_split={self.eval_split!r} is the split that is trained on.")
        if self.streaming and self.max_steps < 1:
            raise ValueError("streaming=True needs max_steps: how much data there is is not known beforehand.")
        if self.early_stopping_patience is not None and not self.holds_out:
            raise ValueError(
                f"early_stopping_patience={self.early_stopping_patience} needs a held-out loss; val_set_size is 0."
            )

    def accumulation(self, devices: int) -> int:
        """Forward passes per optimizer step on each of so many devices.

        Raises:
            ValueError: if `batch_size` is not a multiple of what the devices take at once, or contradicts
                `gradient_accumulation_steps`.
        """
        at_once = self.micro_batch_size * devices
        if self.batch_size is None and self.gradient_accumulation_steps is not None:
            return self.gradient_accumulation_steps
        batch_size = BATCH_SIZE if self.batch_size is None else self.batch_size
        if batch_size % at_once:
            below = batch_size // at_once * at_once
            fitting = f"{below + at_once}" if not below else f"{below} or {below + at_once}"
            raise ValueError(
                f"batch_size={batch_size} must be divisible by micro_batch_size={self.micro_batch_size} times "
                f"{devices} device(s); use batch_size={fitting}, or another micro_batch_size."
            )
        if self.gradient_accumulation_steps not in (None, batch_size // at_once):
            raise ValueError(
                f"batch_size={batch_size} with micro_batch_size={self.micro_batch_size} on {devices} device(s) is "
                f"gradient_accumulation_steps={batch_size // at_once}, not {self.gradient_accumulation_steps}; give "
                "one of batch_size and gradient_accumulation_steps."
            )
        return batch_size // at_once

    @property
    def holds_out(self) -> bool:
        """Whether a held-out loss is measured."""
        return self.val_set_size != 0

    @property
    def data_paths(self) -> list[str]:
        return [self.data_path] if isinstance(self.data_path, str) else list(self.data_path or ())

    @property
    def length(self) -> int:
        """Tokens at which examples are cut."""
        return LENGTH if self.max_seq_length is None else self.max_seq_length

    @property
    def truncation_mode(self) -> str:
        return self.trainer.get("truncation_mode", "keep_start")

    @property
    def splits_long_texts(self) -> bool:
        """Whether packing divides long texts among rows, so that nothing is to be cut before."""
        return self.packing and self.trainer.get("packing_strategy") in SPLITTING

    @property
    def is_flat(self) -> bool:
        """Whether a batch is one row of texts without padding."""
        return self.packing or bool(self.trainer.get("padding_free"))

    @property
    def reporters(self) -> list[str]:
        names = [self.report_to] if isinstance(self.report_to, str) else self.report_to or []
        return [name for name in names if name != "none"]

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32

    def model_options(self) -> dict[str, Any]:
        """What `from_pretrained` is given to load the base model."""
        given = self.trainer.get("model_init_kwargs") or {}
        options = {"trust_remote_code": bool(self.trainer.get("trust_remote_code"))}
        if self.attn_implementation:
            options["attn_implementation"] = self.attn_implementation
        return options | (json.loads(given) if isinstance(given, str) else given)

    def lora_config(self) -> LoraConfig:
        """The adapter's config.

        Raises:
            ValueError: if fields of GraLoRA's are set without `use_gralora`.
        """
        fields = {name: getattr(self, flag) for name, flag in FLAGS.items()}
        granular = {name: fields[name] for name in SETTINGS if name != "use_gralora" and is_set(name, fields[name])}
        if granular and not self.use_gralora:
            flags = " ".join(f"--{name} {value}" for name, value in granular.items())
            raise ValueError(
                f"{flags}: without --use_gralora a plain LoRA is trained, which has no such setting. Give "
                "--use_gralora, too, or leave this out."
            )
        if self.lora_target_modules == ["all-linear"]:
            fields["target_modules"] = "all-linear"
        return LoraConfig(task_type="CAUSAL_LM", **fields)

    def training_arguments(self) -> SFTConfig:
        """What TRL's trainer is asked for; a field that was given by its own name wins.

        Examples are cut before the trainer gets them, so it is told a length for packing alone.
        """
        gpu = torch.accelerator.is_available()
        for name, instead in {} if gpu else NEEDS_GPU.items():
            if self.trainer.get(name, getattr(self, name, False)):
                raise ValueError(f"{name}=True needs a GPU, and none is found; {instead}.")
        early = self.early_stopping_patience is not None
        settings = {name: getattr(self, name) for name in same_names(type(self)) - {"gradient_checkpointing"}}
        settings |= {
            "per_device_train_batch_size": self.micro_batch_size,
            "per_device_eval_batch_size": 1,  # the Trainer averages over batches: of one, that is over answers
            "max_length": self.length if self.packing else None,
            "eval_packing": False,
            "logging_first_step": True,
            "logging_nan_inf_filter": False,
            "eval_strategy": "steps" if self.holds_out else "no",
            "eval_steps": self.eval_steps if self.holds_out else None,
            "eval_on_start": self.holds_out,
            "save_steps": self.eval_steps if early else self.save_steps,
            "load_best_model_at_end": early,
            "metric_for_best_model": "eval_loss" if early else None,
            # without padding there is no mask to count by
            "include_num_input_tokens_seen": "all" if self.is_flat else "non_padding",
            CHECKPOINTING: self.gradient_checkpointing,
            f"{CHECKPOINTING}_kwargs": checkpointing_options(self.trainer, self.gradient_checkpointing),
            # of a stream, one process would read batches for all, and answers of different lengths do not fit in one
            "accelerator_config": {"dispatch_batches": False},
            "use_cpu": not gpu,
            "dataloader_pin_memory": gpu,
            "report_to": self.reporters or "none",
        }
        passed = {name: value for name, value in self.trainer.items() if name not in OF_DATA | CHECKPOINTING_OPTIONS}
        training = SFTConfig(**settings | passed)
        devices = training.world_size * max(1, training.n_gpu)
        training.gradient_accumulation_steps = self.accumulation(devices)
        return training
