"""`gralora verify`: whether a saved adapter, reloaded and merged, gives the logits that training ended with."""

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftConfig, PeftModel, prepare_model_for_kbit_training
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..checkpoints.files import write_json
from ..ops import fp8
from . import output, parsers
from .models import dequantized, load_model, quantization_of
from .training.report import METRICS

if TYPE_CHECKING:
    from .arguments import FinetuneArguments

PROBES = 4  # held-out examples whose logits are recorded
LOGITS = "logits.safetensors"
# how far logits may be off after reloading and merging, as a share of their root mean square; merging rounds weights
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# LLM.int8 rounds what goes into each layer as well, and a dequantised model does not
MERGE_TOLERANCE = {"none": TOLERANCE, "4bit": TOLERANCE, "8bit": dict.fromkeys(TOLERANCE, 5e-2), "fp8": TOLERANCE}


def last_logits(model: PreTrainedModel | PeftModel, texts: list[list[int]]) -> Tensor:
    """Logits after the last token of each text, `[texts, vocabulary]`, float32 on the CPU; texts are not padded."""
    model.eval()
    with torch.no_grad():
        rows = [model(input_ids=torch.tensor([ids], device=model.device)).logits[0, -1] for ids in texts]
    return torch.stack(rows).float().cpu()


def record_logits(
    args: "FinetuneArguments", model: PeftModel, texts: list[list[int]], path: Path, write: bool = True
) -> None:
    """Write what `verify` compares with: the logits of the model as it is, what it was given, and how to load it.

    Of several processes that share the model, all must call it, and one with `write`.
    """
    logits = last_logits(model, texts)
    if not write:
        return
    tensors = {f"text_{i}": torch.tensor(ids) for i, ids in enumerate(texts)}
    metadata = {"dtype": str(args.dtype).removeprefix("torch."), "device": model.device.type}
    metadata["quantization"] = args.quantization
    save_file(tensors | {"logits": logits}, path, metadata)


def verify(adapter: str | Path) -> dict[str, float]:
    """Reload an adapter that `finetune` saved with `verify`, merge it, and compare logits with those of training.

    A quantised base is merged in its dequantised form: merging into quantised weights rounds the update away, which
    is a property of the quantiser and no fault of the adapter. Where 8-bit floats are multiplied, it is compared with
    the reloaded model's logits by dequantised weights.

    Returns:
        Largest absolute differences from the recorded logits: `reloaded`, `merged`, and, to compare with, `base`: of
        the model without the adapter. They are also added to `metrics.json`.

    Raises:
        ValueError: if reloaded or merged differ by more than `TOLERANCE`.
        OSError: if files are missing; the message says which, and who writes them.
    """
    adapter = Path(adapter)
    missing = [name for name in (LOGITS, METRICS) if not (adapter / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{str(adapter)!r} has no {' and no '.join(missing)}. `gralora verify` compares with the logits that the "
            "training ended with, which `gralora finetune --verify` writes beside the adapter; another program leaves "
            "none. Of any adapter, `gralora inspect` shows what is in it, and `gralora verify --served URL --model "
            "NAME` compares a server's answers with the adapter's own."
        )
    with safe_open(adapter / LOGITS, "pt") as file:
        metadata, recorded = file.metadata(), file.get_tensor("logits")
        texts = [file.get_tensor(f"text_{i}").tolist() for i in range(len(recorded))]
    dtype, quantization = getattr(torch, metadata["dtype"]), metadata["quantization"]
    base = load_model(PeftConfig.from_pretrained(adapter).base_model_name_or_path, dtype, quantization)
    if quantization != "none":
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    quantization = quantization_of(base)  # by its files, too
    model = PeftModel.from_pretrained(base.to(metadata["device"]), adapter)
    logits = {"reloaded": last_logits(model, texts)}
    with model.disable_adapter():
        logits["base"] = last_logits(model, texts)
    expected = recorded  # of the merged model
    if quantization == "fp8":
        with fp8.dequantised():  # products would round inputs, which the merged model does not
            expected = last_logits(model, texts)
    if quantization != "none":
        model = PeftModel.from_pretrained(dequantized(model.unload(), quantization), adapter)
    logits["merged"] = last_logits(model.merge_and_unload(), texts)

    wanted = {"reloaded": recorded, "base": recorded, "merged": expected}
    differences = {name: (values - wanted[name]).abs().max().item() for name, values in logits.items()}
    metrics = json.loads((adapter / METRICS).read_text(encoding="utf-8"))
    write_json(adapter / METRICS, metrics | {"max_logit_difference": differences})
    for name, tolerances in (("reloaded", TOLERANCE), ("merged", MERGE_TOLERANCE[quantization])):
        allowed = tolerances[dtype] * recorded.square().mean().sqrt().item()
        error = (logits[name] - wanted[name]).square().mean().sqrt().item()
        if not error <= allowed:  # also for NaN
            raise ValueError(
                f"the {name} adapter of {str(adapter)!r} gives other logits than at the end of training: they differ "
                f"by {error:.3g} (root mean square; up to {differences[name]:.3g}), {allowed:.3g} is allowed."
            )
    return differences


def verify_in_new_process(adapter: Path) -> None:
    """Run `gralora verify` where nothing of the trained model but its files can be what is compared.

    Raises:
        ValueError: if it does not end well.
    """
    command = [sys.executable, "-m", "gralora_command", "verify", str(adapter)]
    result = subprocess.run(command, capture_output=True, text=True)
    print(result.stdout, end="")
    if result.returncode:
        reason = result.stderr.strip().split("gralora verify: error: ")[-1]
        raise ValueError(f"{str(adapter)!r} holds the adapter, but it did not pass `gralora verify`: {reason}")


def verify_main(argv: list[str]) -> None:
    """The command `gralora verify`."""
    args = parsers.verify().parse_args(argv)
    if args.served:
        from .served import verify_served

        if not args.model:
            raise ValueError("--served needs --model: the name under which the server has the adapter.")
        output.run(lambda: verify_served(args.adapter, args.served, args.model), args.quiet, args.json)
        return

    def command() -> dict[str, float]:
        differences = verify(args.adapter)
        print("largest difference of logits from the end of training:")
        print(f"  adapter reloaded: {differences['reloaded']:.3g}\n  adapter merged: {differences['merged']:.3g}")
        print(f"  (without the adapter: {differences['base']:.3g})")
        return differences

    output.run(command, args.quiet, args.json)
