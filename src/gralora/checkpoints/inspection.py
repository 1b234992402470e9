"""Describe an adapter without its base model: format, sizes, anomalies, and norms and ranks of its updates.

Norms and singular values come from the factors; no dW is formed.
"""

import os
from typing import Any

import torch

from ..factors import hybrid_to_lora, singular_values
from ..fields import plain
from . import formats
from .adapter import Adapter
from .files import read_adapter_folder
from .untrusted import is_finite


def inspect_adapter(adapter: str | os.PathLike[str], source: str | None = None) -> dict[str, Any]:
    """Describe a saved adapter of any GraLoRA format.

    Args:
        adapter: folder of the adapter.
        source: format of the adapter, needed only if its config leaves that open.

    Returns:
        `format`, `base`, `r` (total), `gralora_k`, `gralora_k_pattern`, `hybrid_r`, `parameters`, `dtype`, `lora_rank`
        (of the equivalent plain LoRA), `layers` (see `describe_layer`), `norm` (of all updates together), `others`
        (names of tensors that are no factors), `notices`, and `anomalies`, a list of sentences.

    Raises:
        OSError, ValueError: as `gralora.checkpoints.formats.read`.
    """
    read = formats.read(*read_adapter_folder(adapter), source=source, as_linear=True)
    layers = {layer: describe_layer(read, layer) for layer in sorted(read.layers, key=natural)}
    specs = read.tensors.specs
    factors = [t for layer in read.layers for t in read.specs(layer) if t is not None]
    return {
        "format": read.format,
        "base": read.config.base_model_name_or_path,
        "r": read.config.r,
        "gralora_k": read.config.gralora_k,
        "gralora_k_pattern": read.config.gralora_k_pattern,
        "hybrid_r": read.config.hybrid_r,
        "lora_alpha": read.config.lora_alpha,
        "use_rslora": read.config.use_rslora,
        "target_modules": plain(read.config.target_modules),
        "dtype": sorted({str(t.dtype).removeprefix("torch.") for t in factors}),
        "parameters": sum(t.numel() for t in factors),
        "lora_rank": max(map(read.lora_rank, read.layers)),
        "norm": sum(d["norm"] ** 2 for d in layers.values()) ** 0.5,
        "layers": layers,
        "others": {name: list(specs[name].shape) for name in read.others},
        "notices": list(read.notices),
        "anomalies": anomalies(read, layers),
    }


def natural(name: str) -> list[tuple[bool, int, str]]:
    """Return a sort key that puts layer 2 before layer 10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def describe_layer(adapter: Adapter, layer: str) -> dict[str, Any]:
    """Describe one layer's sizes and its dW, scaling included.

    Returns:
        `in_features`, `out_features`, `r`, `k`, `scaling`, `norm` (Frobenius), `spectral_norm`, `rank`, `lora_rank`
        (the highest possible rank), `norm_A`, `norm_B`, `finite`. As in `torch.linalg.matrix_rank`, `rank` counts the
        singular values above the largest one times float32's precision times the longer side of dW.
    """
    f, scaling = adapter.factors(layer), adapter.scaling(layer)
    in_features, out_features = adapter.features(layer)
    finite = all(is_finite(t) for t in f if t is not None)
    values = scaling * singular_values(*hybrid_to_lora(*f[:4])) if finite else torch.tensor([torch.nan])
    tolerance = max(in_features, out_features) * torch.finfo(torch.float32).eps * values.max()
    norm_A, norm_B = (
        sum(t.double().square().sum().item() for t in ts if t is not None) ** 0.5
        for ts in ((f.A, f.hybrid_A), (f.B, f.hybrid_B))
    )
    return {
        "in_features": in_features,
        "out_features": out_features,
        "r": adapter.rank(layer),
        "k": adapter.k(layer),
        "scaling": scaling,
        "norm": values.norm().item(),
        "spectral_norm": values.max().item(),
        "rank": int((values > tolerance).sum()),
        "lora_rank": min(adapter.lora_rank(layer), in_features, out_features),
        "norm_A": norm_A,
        "norm_B": norm_B,
        "finite": finite,
    }


def anomalies(adapter: Adapter, layers: dict[str, dict[str, Any]]) -> list[str]:
    """List, as sentences, what should not be in a trained adapter."""
    found = [f"{layer}: NaN or infinite values" for layer, d in layers.items() if not d["finite"]]
    zero = [layer for layer, d in layers.items() if d["norm_B"] == 0]
    if len(zero) == len(layers):
        found.append("all B factors are zero: the adapter was not trained, and does nothing")
    else:
        found += [f"{layer}: B is zero, so its update is" for layer in zero]
    found += [f"{layer}: A is zero, so its update is" for layer, d in layers.items() if d["norm_A"] == 0]
    config = adapter.config
    explained = config.modules_to_save or config.trainable_token_indices or config.bias != "none"
    if adapter.others and not explained:
        found.append(f"tensors that the config does not explain: {', '.join(adapter.others)}")
    for module in config.modules_to_save or []:
        if not any(f".{module}." in name for name in adapter.others):
            found.append(f"modules_to_save names {module!r}, and no tensor is of it")
    return found
