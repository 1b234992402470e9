"""Plain LoRA adapters, computed by the operations that compute GraLoRA's.

`accelerate` promotes PEFT's LoRA layers to a `FusedLayer`, whose forward is one operation where `fused_call` finds one
and PEFT's own elsewhere. Nothing else of a layer changes, so that all that PEFT does with its adapters stays as it is.
The model is marked, by an attribute of the module that PEFT puts adapters into, for adapters that come later.
"""

from collections import Counter
from typing import Any, TypeVar

import torch
from peft import PeftMixedModel, PeftModel
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from . import parents
from .dora import FusedDora
from .experts import FusedExperts
from .fast_path import FusedLayer
from .kinds import fused_class
from .layers import GraloraLayer
from .ops import plans
from .ops.torch_seam import has_hooks
from .promote import demote, promote
from .seam import DoraLinearLayer

MARK = "_gralora_accelerates"

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model, enable: bool = True) -> Model:
    """Compute a model's plain LoRA adapters by gralora's operations, as fast as GraLoRA adapters.

    Parameters, their names and shapes, optimizer states, saved files and configs stay as they are. Adapters that are
    added or loaded later are computed so, too. A layer, or a call of it, that the operations do not support keeps
    PEFT's forward; `gralora.describe(model)` counts both.

    Args:
        model: a `peft.PeftModel`, or a model into which transformers, diffusers or `inject_adapter_in_model` have put
            adapters or will; also wrapped, as by DistributedDataParallel. It is changed.
        enable: False gives every layer PEFT's forward back.

    Returns:
        The model.

    Raises:
        TypeError: if `model` is no module, as a pipeline of diffusers, whose models are accelerated one by one.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"accelerate takes a torch.nn.Module, and this is a {type(model).__name__}; give it the model inside, "
            "e.g. `pipeline.transformer` or `pipeline.unet` of diffusers, or `trainer.model`."
        )
    for place in _adapted_models(model):
        if enable:
            setattr(place, MARK, True)
        else:
            vars(place).pop(MARK, None)
    for module in list(model.modules()):
        if isinstance(module, lora.LoraLayer):
            _set(module, enable)
    parents.adapt_all(model)
    return model


def is_default() -> bool:
    """Whether programs that accelerate unasked are to: GRALORA_KERNELS is neither torch nor reference."""
    return plans.choice not in ("torch", "reference")


def cover(model: nn.Module, config: Any, layer: nn.Module) -> None:
    """Accelerate a layer that has just got an adapter, if its model or the adapter's config asks for it.

    Args:
        model: the module that PEFT puts adapters into.
        config: of the adapter; a `gralora.LoraConfig` with `accelerate=True` asks for the whole model.
        layer: what stands in the place of the base layer now; wrappers of parameters may be nested.
    """
    if MARK not in vars(model):
        if getattr(config, "accelerate", False):
            accelerate(model)
        return
    while isinstance(layer, BaseTunerLayer):
        if isinstance(layer, lora.LoraLayer):
            _set(layer, True)
        layer = layer.base_layer  # type: ignore[assignment]


def _adapted_models(model: nn.Module) -> list[nn.Module]:
    """The modules into which PEFT has put adapters, as `PeftModel` and transformers keep them; else the model."""
    found: dict[nn.Module, None] = {}
    for module in model.modules():
        if isinstance(module, BaseTuner):
            found[module.model] = None
        elif "peft_config" in vars(module) and not isinstance(module, PeftModel | PeftMixedModel):
            found[module] = None
    return list(found) or [model]


def _set(layer: Any, enable: bool) -> None:
    for magnitude in layer.lora_magnitude_vector.values():
        if enable and type(magnitude) is DoraLinearLayer:
            promote(magnitude, FusedDora)
        elif not enable and isinstance(magnitude, FusedDora):
            demote(magnitude)
    if isinstance(layer, GraloraLayer):
        vars(layer).pop("fuses_plain", None)
        if enable:
            layer.fuses_plain = True
    elif not enable:
        if isinstance(layer, FusedLayer):
            demote(layer)
    elif (mixin := fused_class(layer)) is not None:
        promote(layer, mixin)


def describe(of: nn.Module | torch.device | str | None = None) -> str:
    """Say what runs for large layers on a device, and of a model how many of its LoRA layers run which way.

    A model is described as it would run now: with its active adapters, and under autocast if the call is. What a layer
    computes for inputs that are unusual, or by a tracer, may differ.

    Args:
        of: the device (default: CUDA if there is one), or a model with adapters.
    """
    if not isinstance(of, nn.Module):
        return plans.describe(of)
    layers = [module for module in of.modules() if isinstance(module, lora.LoraLayer)]
    if not layers:
        return "no LoRA layers"
    obstacles = [_obstacle(layer) for layer in layers]
    fused, rest = obstacles.count(""), Counter(filter(None, obstacles))
    text = f"{fused} of {len(layers)} LoRA layers run as one operation ({plans.describe(_device_of(layers[0]))})"
    if not rest:
        return text
    reasons = "; ".join(f"{number} {why}" for why, number in rest.most_common())
    return f"{text}, {len(layers) - fused} run PEFT's forward: {reasons}"


def _device_of(layer: nn.Module) -> torch.device:
    return next((p.device for p in layer.parameters()), torch.device("cpu"))


def _obstacle(layer: Any) -> str:
    """Say in words why a layer runs PEFT's forward; empty if it does not."""
    names = [name for name in layer.active_adapters if name in layer.scaling]
    base = layer.get_base_layer()
    if layer.disable_adapters:
        return "with adapters disabled"
    if layer.merged:
        return "with merged adapters"
    if not names:
        return "without an active adapter"
    if not isinstance(layer, FusedLayer) and fused_class(layer) is not None:
        return "not accelerated"
    if "forward" in vars(layer):
        return "with a forward of their own, as device maps give them"
    if isinstance(layer, FusedExperts):
        if len(names) > 1:
            return "with several active adapters"
        return "" if layer.single_adapter(names) else f"over {layer.get_param().dtype} or not accelerated"
    if not isinstance(layer, FusedLayer) or any(name not in layer.lora_A for name in names):
        return f"over {type(base).__name__}"
    x = _input_like(layer, names[0])
    if layer.fused_call(x) is not None:
        return ""
    return next(
        filter(None, (_adapters_obstacle(layer, name, x) for name in names)),
        f"over {type(base).__name__}, for another reason",
    )


def _adapters_obstacle(layer: Any, name: str, x: torch.Tensor) -> str:
    """Say why one adapter keeps a layer from running as one operation for x; empty if it does not."""
    if name in layer.lora_variant:
        return f"with {type(layer.lora_variant[name]).__name__}"
    if not layer.fuses_plain and isinstance(layer.lora_A[name], nn.Linear):
        return "with a plain LoRA that is not accelerated"
    if layer.lora_bias.get(name):
        return "with lora_bias"
    if any(has_hooks(part[name]) for part in (layer.lora_A, layer.lora_B, layer.lora_dropout)):
        return "with hooks on its factors or dropout"
    dtypes = {layer.lora_A[name].weight.dtype, layer.lora_B[name].weight.dtype}
    if dtypes != {x.dtype} and not torch.is_autocast_enabled(x.device.type):
        factors = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        return f"with factors in {factors} for inputs in {str(x.dtype).removeprefix('torch.')}, without autocast"
    return ""


def _input_like(layer: Any, adapter: str) -> torch.Tensor:
    """An input of one token, of the dtype in which the base layer computes."""
    A, base = layer.lora_A[adapter].weight, layer.get_base_layer()
    weight = getattr(base, "weight", None)
    dtype = getattr(base, "compute_dtype", None) or getattr(weight, "dtype", None)
    dtype = dtype if dtype is not None and dtype.is_floating_point and dtype.itemsize > 1 else A.dtype
    return torch.empty(1, layer.in_features, dtype=dtype, device="cpu" if A.is_meta else A.device)
