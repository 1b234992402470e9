"""Adapters saved in every format, with random non-zero tensors, and the logits that they must give."""

import json
from pathlib import Path
from typing import Any

import peft
import torch
from helpers import MODELS, TARGETS, adapted, gralora_config, token_ids
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FORMATS = ["gralora", "peft", "squeezebits", "fork"]


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config))
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    return folder


def edit(folder: Path, **fields: Any) -> Path:
    """Set fields of a saved config, or remove those given as `...`."""
    config, _ = read(folder)
    config = {name: value for name, value in (config | fields).items() if value is not ...}
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Of fixed tokens, in float64, to which the model is cast, so that comparisons can be tight."""
    out = model.double().eval()(token_ids(2, 5))
    return out if isinstance(out, Tensor) else out.logits


def save_gralora(folder: Path, model: str = "llama", **config: Any) -> Tensor:
    """Train-like adapter of ours; returns its logits."""
    config = {"target_modules": TARGETS[model], "k": 2, "r": 8, "hybrid_r": 2} | config
    trained = adapted(MODELS[model](), gralora_config(**config))
    trained.save_pretrained(folder)
    return logits(trained)


def save_peft(folder: Path, model: str = "llama", **config: Any) -> Tensor:
    """An adapter of PEFT's own GRALORA, in which r=6 and hybrid_r=2 make a total of 8; returns PEFT's logits."""
    fields = {"target_modules": TARGETS[model], "gralora_k": 2, "r": 6, "hybrid_r": 2, "alpha": 20} | config
    torch.manual_seed(1)
    trained = peft.get_peft_model(MODELS[model](), peft.GraloraConfig(init_weights=False, **fields))
    trained.save_pretrained(folder)
    return logits(trained)


def save_squeezebits(folder: Path) -> Tensor:
    """The same tensors as SqueezeBits' code saves them: its r includes hybrid_r, its alpha has another name."""
    expected = save_peft(folder, alpha=20)
    config, tensors = read(folder)
    fields = {"r": 8, "hybrid_r": 2, "gralora_alpha": 20, "gralora_dropout": 0.0, "gralora_k": 2, "bias": "none"}
    kept = ("base_model_name_or_path", "target_modules", "fan_in_fan_out", "modules_to_save", "task_type", "revision")
    write(folder, {"peft_type": "GRALORA", **fields, **{name: config[name] for name in kept}}, tensors)
    return expected


def save_fork(folder: Path) -> Tensor:
    """The same tensors as the HaohanTsao/peft fork saves them: beside the LoRA that it creates and never uses."""
    expected = save_peft(folder, alpha=20)
    config, tensors = read(folder)
    for name in [name for name in tensors if name.endswith(".gralora_A")]:
        layer = name.removesuffix(".gralora_A")
        _, chunk_in, _ = tensors[name].shape
        chunk_out = tensors[f"{layer}.gralora_B"].shape[2]
        tensors[f"{layer}.lora_A.weight"] = torch.randn(8, 2 * chunk_in)
        tensors[f"{layer}.lora_B.weight"] = torch.zeros(2 * chunk_out, 8)
    fields = {"r": 8, "lora_alpha": 20, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "bias": "none"}
    fields |= {"use_gralora": True, "gralora_k": 2, "hybrid_r": 2, "target_modules": config["target_modules"]}
    write(folder, {"peft_type": "LORA", "base_model_name_or_path": None, "use_dora": False, **fields}, tensors)
    return expected


def save(folder: Path, name: str) -> Tensor:
    """An adapter of the format `name` on the tiny Llama; returns its logits."""
    savers = {"gralora": save_gralora, "peft": save_peft, "squeezebits": save_squeezebits, "fork": save_fork}
    return savers[name](folder)
