"""The methods that are compared, all with r * (in + out) trainable parameters in a layer."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import peft
import torch
from torch import nn

import gralora

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ACCELERATED = "PEFT LoRA, accelerated"  # PEFT's LoRA computed by gralora's operations
METHODS = ("frozen", "PEFT LoRA", ACCELERATED, "PEFT GRALORA", "gralora")
UNSLOTH = "Unsloth"  # PEFT's LoRA computed by Unsloth's functions: only where a wheel of it is given


@dataclass(frozen=True)
class Method:
    """A way to train the base model.

    Attributes:
        name: as in tables.
        config: the adapter's config; None for the frozen base.
        patch: what is done to the adapted model at last.
    """

    name: str
    config: peft.PeftConfig | None
    patch: Callable[[nn.Module], object] | None = None

    def adapt(self, model: nn.Module, fp32_adapters: bool) -> nn.Module:
        """A copy of `model` that shares its weights, with the adapter, whose factors are random and not zero."""
        model = copy.deepcopy(model, memo={id(p): p for p in model.parameters()}).requires_grad_(False)
        if self.config is None:
            return model
        model = peft.get_peft_model(model, copy.deepcopy(self.config), autocast_adapter_dtype=fp32_adapters)
        randomize(model)
        if self.patch is not None:
            self.patch(model)
        return model


def randomize(model: nn.Module) -> None:
    """Fill all trainable parameters with random numbers: factors at zero would hide what a wrong one does."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            numbers = torch.randn(parameter.shape, generator=generator) * 0.02
            parameter.data.copy_(numbers)


def lora_config(name: str, r: int, k: int, **fields: object) -> peft.PeftConfig | None:
    """The config of one of METHODS at a rank; None for the frozen base. `fields` are PEFT's, as target_modules."""
    if name == "frozen":
        return None
    if name == "PEFT GRALORA":
        return peft.GraloraConfig(r=r, alpha=r, gralora_k=k, **fields)
    if name == "gralora":
        return gralora.LoraConfig(r=r, lora_alpha=r, use_gralora=True, gralora_k=k, **fields)
    return peft.LoraConfig(r=r, lora_alpha=r, **fields)


def methods_of(
    names: Iterable[str],
    r: int,
    k: int,
    targets: list[str],
    patches: dict[str, Callable[[nn.Module], object]] | None = None,
) -> list[Method]:
    """The methods of these names with adapters on the modules `targets`.

    Args:
        names: of METHODS, or UNSLOTH.
        patches: name of a method -> its `patch`; that of ACCELERATED is known.
    """
    patches = {ACCELERATED: gralora.accelerate} | (patches or {})
    return [Method(name, lora_config(name, r, k, target_modules=targets), patches.get(name)) for name in names]
