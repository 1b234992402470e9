"""What a run leaves behind to read: metrics, a plot of the losses, a model card, a summary on the terminal."""

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import Trainer

from ...fast_path import FusedLayer
from ...ops.plans import describe
from ..arguments import FinetuneArguments
from ..models import EMBEDDED

METRICS, LOSS_PLOT = "metrics.json", "loss.png"
CARD, CARD_MARK = "README.md", "Written by `gralora finetune`."  # a card without the mark is the user's


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


def write_card(args: FinetuneArguments, model: PeftModel, loss: dict[str, float] | None, folder: Path) -> None:
    """Write the adapter's model card into `folder`; if `output_dir` has one of the user's, copy that."""
    existing = Path(args.output_dir, CARD)
    if existing.exists() and CARD_MARK not in existing.read_text(encoding="utf-8"):
        shutil.copyfile(existing, folder / CARD)
        return
    config = model.peft_config["default"]
    base = "SmolLM2-135M-Instruct" if args.base_model == EMBEDDED else args.base_model
    settings = {field.name: getattr(args, field.name) for field in dataclasses.fields(args)}
    settings |= {"gralora_k": config.gralora_k, "lora_target_modules": sorted(config.target_modules)}
    for name in ("base_model", "data_path", "output_dir", "overwrite", "resume_from_checkpoint", "verify"):
        del settings[name]
    result = f"Held-out loss: {loss['before']:.4f} before training, {loss['after']:.4f} after." if loss else ""
    needed = "import gralora  # so that PEFT knows GraLoRA adapters\n" if config.use_gralora else ""
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
{needed}from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained({args.output_dir!r})
tokenizer = AutoTokenizer.from_pretrained({args.output_dir!r})
```

## Settings

| | |
| --- | --- |
"""
    text += "".join(f"| {name} | {value} |\n" for name, value in settings.items()) + "\n"
    (folder / CARD).write_text(text, encoding="utf-8")


def finite(value: Any) -> Any:
    """The value with null for numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summary(args: FinetuneArguments, model: PeftModel, trainer: Trainer, trained: Path | None) -> list[str]:
    """Say in parts of one line what is trained: the adapter, its size, the base model, device, dtype and kernels."""
    config = model.peft_config["default"]
    layers = sum(isinstance(layer, BaseTunerLayer) for layer in model.modules())
    trainable, _ = model.get_nb_trainable_parameters()
    rows = trainer.train_dataset
    is_ours = any(isinstance(layer, FusedLayer) for layer in model.modules())
    parts = [f"training {'GraLoRA' if config.use_gralora else 'LoRA'} r={config.r}"]
    if config.use_gralora:
        others = [f"{layer} {k}" for layer, k in (config.gralora_k_pattern or {}).items()]
        parts[0] += f" k={config.gralora_k}" + (f" ({', '.join(others)})" if others else "")
        parts[0] += f" hybrid_r={config.hybrid_r}" if config.hybrid_r else ""
        parts.append(f"scaling {config.gralora_scaling}")
    parts += [f"alpha {config.lora_alpha}", f"{layers} layers", f"{trainable:,} parameters"]
    if trained:
        parts.append(f"going on with {trained}")
    parts.append(f"on {args.base_model}" + ("" if args.quantization == "none" else f" in {args.quantization}"))
    parts.append(f"{str(args.dtype).removeprefix('torch.')} on {trainer.args.device}")
    parts[-1] += f" by {describe(trainer.args.device)}" if is_ours else " by PEFT"
    if args.packing and isinstance(rows, Dataset):
        parts.append(f"packed into {len(rows)} rows")
    return parts


def report(metrics: dict[str, Any], output: Path) -> None:
    if metrics["sample"]["prompt"]:
        for name, text in metrics["sample"].items():
            print(f"---- sample, {name}:\n{text.rstrip()}")
        print("----")
    if loss := metrics["held_out_loss"]:
        print(f"held-out loss: {loss['before']:.4f} before, {loss['after']:.4f} after {metrics['steps']} steps")
    if metrics["notice"]:
        print(f"notice: {metrics['notice']}")
    speed = f", {metrics['tokens_per_s']} tokens/s while training" if metrics["tokens_per_s"] else ""
    print(f"time: {metrics['time_s']} s{speed}; peak memory: {metrics['peak_memory_gib']:.1f} GiB")
    print(f"talk to it: gralora chat {output}")
    print(f"adapter: {output}, metrics: {output / METRICS}, loss curve: {output / LOSS_PLOT}")
