"""Plain LoRA adapters, computed by the operations that compute GraLoRA's.

`accelerate` promotes PEFT's LoRA layers to a `FusedLayer`, whose forward is one operation where `fused_call` finds one
and PEFT's own elsewhere. Nothing else of a layer changes, so that all that PEFT does with its adapters stays as it is.
The model is marked, by an attribute of the module that PEFT puts adapters into, for adapters that come later.
"""

from typing import Any, TypeVar

from peft import PeftMixedModel, PeftModel
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from . import parents
from .dora import FusedDora
from .fast_path import FusedLayer
from .kinds import fused_class
from .layers import GraloraLayer
from .ops import plans
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
