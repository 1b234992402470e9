"""LoftQ (arXiv 2310.08659) for a base model that is quantised already, with PEFT's name and arguments.

PEFT's `replace_lora_weights_loftq` writes the factors of a plain LoRA wherever it finds a 4-bit layer. The one here
does for a grid what that does for a LoRA, block by block, for whatever quantised layers PEFT can read.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..blocks import blocks_of_A, blocks_of_B
from ..decompositions import blocks_of, pissa, write
from ..layers import GraloraLayer
from ..seam import dequantize_module_weight
from .base import SINGLE, BaseModel, base_folder
from .files import read_safetensors


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: Any,
    model_path: str | os.PathLike[str] | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Let every block of an adapter's dW approximate what quantising the base model took from that block.

    Args:
        peft_model: the PEFT model, with an adapter that is not trained yet.
        model_path: the weights before they were quantised: a folder of safetensors, or its model.safetensors. By
            default what the model's config names, if it is on this machine.
        adapter_name: the adapter; its `init_lora_weights` stays what it is, as the base weights do.
        callback: called after each layer with the model and the layer's name; if it returns False, the layer's factors
            become what they were.

    Raises:
        OSError: if the weights are not there.
        ValueError: before anything is changed, if no quantised layer has a GraLoRA of this name, or if the files lack
            a layer's weight, or if its blocks have fewer features than ranks.
    """
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in peft_model.named_modules()
        if isinstance(layer, GraloraLayer) and layer.is_gralora(adapter_name) and is_quantised(layer.get_base_layer())
    }
    if not layers:
        raise ValueError(
            f"no quantised layer of the model has a GraLoRA adapter {adapter_name!r}; for a base model that is not "
            "quantised, use init_lora_weights='loftq'."
        )
    weights = _weights(peft_model, model_path)
    prefix = f"{getattr(peft_model.get_base_model(), 'base_model_prefix', '')}."
    names = {}
    for name, layer in layers.items():
        found = [n for n in (f"{name}.weight", f"{name.removeprefix(prefix)}.weight") if n in weights]
        if not found:
            raise ValueError(f"the files of the model before it was quantised have no '{name}.weight'.")
        factors = layer.factors(adapter_name)
        (out_features, q), in_features = blocks_of_B(factors.B).shape[-2:], blocks_of_A(factors.A).shape[-1]
        if q > min(in_features, out_features):
            raise ValueError(
                f"layer {name!r}: its blocks have {in_features} and {out_features} features, and rank {q}; use a "
                "smaller rank."
            )
        names[name] = found[0]
    for name, layer in layers.items():
        A, B = layer.factors(adapter_name)[:2]
        before = A.clone(), B.clone()
        weight = weights[names[name]].to(A.device, torch.float32)
        lost = weight - layer.as_matrix(dequantize_module_weight(layer.get_base_layer()).float())
        write(layer, adapter_name, *pissa(blocks_of(layer, adapter_name, None, lost)))
        if callback is not None and not callback(peft_model, name):
            A.copy_(before[0])
            B.copy_(before[1])


def is_quantised(base: Any) -> bool:
    """Whether a base layer's weight is not one of floats that can be read as they are."""
    weight = getattr(base, "weight", None)
    return type(weight) is not nn.Parameter or not weight.is_floating_point()


def _weights(peft_model: Any, model_path: str | os.PathLike[str] | None) -> Any:
    """Name -> tensor, read when it is asked for."""
    if model_path is None:
        return BaseModel(base_folder(getattr(peft_model.get_base_model(), "name_or_path", None)))
    path = Path(model_path)
    return read_safetensors(path) if path.name == SINGLE or path.is_file() else BaseModel(base_folder(path))
