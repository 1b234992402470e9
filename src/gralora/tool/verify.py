"""`gralora verify`: whether a saved adapter, reloaded and merged, gives the logits that training ended with."""

import argparse
import json
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from .report import METRICS, write_json

PROBES = 4  # held-out examples whose logits are recorded
LOGITS = "logits.safetensors"
# how far logits may be off after reloading and merging, as a share of their root mean square; merging rounds weights
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


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
