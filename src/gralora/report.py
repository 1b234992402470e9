"""Say of a model's LoRA layers what they are, and how each of them runs: `describe`."""

from collections import Counter
from typing import Any

import torch
from peft.tuners import lora
from torch import nn

from .experts import FusedExperts
from .fast_path import FusedLayer, fused_calls
from .kinds import fused_class
from .layers import GraloraLayer
from .mlp import AdaptedMlp, fused_mlp, shape_of
from .ops import plans
from .ops.torch_seam import children_of, has_hooks
from .siblings import SharingInput, groups_of

COLUMNS = ("layers", "number", "adapter", "method", "r", "hybrid_r", "k", "scaling", "runs")


def describe(of: nn.Module | torch.device | str | None = None) -> str:
    """Say what runs for large layers on a device; or of a model, what its LoRA layers are and how they run.

    A model is described as it would run now: with its active adapters, and under autocast if the call is. What a layer
    computes for inputs that are unusual, or by a tracer, may differ.

    Args:
        of: the device (default: CUDA if there is one), or a model with adapters.

    Returns:
        Of a model, a line that counts the layers that run as one operation, and says by which kernels; those that run
        PEFT's forward, which is slower, with the reasons. Then a table: for layers of the same name and settings in
        several blocks of the model their number, the active adapter, its rank, k and scaling, and how they run. What
        is the same for all layers is in a line above the table, which then fits a terminal.
    """
    if not isinstance(of, nn.Module):
        return plans.describe(of)
    layers: dict[str, Any] = {
        name: module for name, module in of.named_modules() if isinstance(module, lora.LoraLayer)
    }
    if not layers:
        return "no LoRA layers"
    obstacles = {name: _obstacle(layer) for name, layer in layers.items()}
    fused, rest = list(obstacles.values()).count(""), Counter(filter(None, obstacles.values()))
    device = next((p.device for layer in layers.values() for p in layer.parameters()), torch.device("cpu"))
    text = f"{fused} of {len(layers)} LoRA layers run as one operation ({plans.describe(device)})"
    if rest:
        reasons = "; ".join(f"{number} {why}" for why, number in rest.most_common())
        text += f", {len(layers) - fused} run PEFT's forward: {reasons}"
    together = _together(of)
    rows: Counter[tuple[str, ...]] = Counter()
    for name, layer in layers.items():
        runs = f"PEFT's forward, {obstacles[name]}" if obstacles[name] else together.get(id(layer), "one operation")
        for adapter in [one for one in layer.active_adapters if one in layer.scaling] or [""]:
            rows[(_place(name, layer), *_settings(layer, adapter), runs)] += 1
    return "\n".join([text, *_table([(row[0], str(number), *row[1:]) for row, number in rows.items()])])


def _place(name: str, layer: Any) -> str:
    """A layer's name with * for the numbers in it, which are those of blocks."""
    parts = name.removeprefix("base_model.model.").split(".")
    parameter = f" {layer.parameter_name}" if isinstance(layer, lora.ParamWrapper) else ""
    return ".".join("*" if part.isdigit() else part for part in parts) + parameter


def _settings(layer: Any, adapter: str) -> tuple[str, ...]:
    """Name, method, r, hybrid_r, k and scaling of a layer's adapter, as they are shown; "" is none."""
    if not adapter:
        return ("-",) * 6
    if not (isinstance(layer, GraloraLayer) and layer.is_gralora(adapter)):
        return adapter, "LoRA", str(layer.r[adapter]), "-", "-", f"{float(layer.scaling[adapter]):.4g}"
    A, _, hybrid_A, _, scaling = layer.factors(adapter)  # A [..., k, I/k, r_g], hybrid_A [..., hybrid_r, I]
    hybrid_r = 0 if hybrid_A is None else hybrid_A.shape[-2]
    sizes = map(str, (A.shape[-1] + hybrid_r, hybrid_r, A.shape[-3]))
    return adapter, "GraLoRA", *sizes, f"{float(scaling):.4g}"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    columns = list(zip(COLUMNS, *rows, strict=True))
    shared = [column for column in columns[2:-1] if len(set(column[1:])) == 1]  # of the settings
    facts = ", ".join(f"{name} {value}" for name, value, *_ in shared if value != "-")
    columns = [column for column in columns if column not in shared]
    padded = zip(*([cell.ljust(max(map(len, column))) for cell in column] for column in columns), strict=True)
    return [f"all layers: {facts}"] * bool(facts) + ["  ".join(row).rstrip() for row in padded]


def _together(model: nn.Module) -> dict[int, str]:
    """The id of each layer that is computed in one operation with others, and with which."""
    found: dict[int, str] = {}
    for module in model.modules():
        children = children_of(module)
        if isinstance(module, AdaptedMlp) and (shape := shape_of(module)) is not None:
            groups = [shape.names]
        else:
            groups = list(groups_of(module)) if isinstance(module, SharingInput) else []
        for names in groups:
            layers: list[Any] = [children[name] for name in names]
            if any(not isinstance(layer, lora.LoraLayer) or _obstacle(layer) for layer in layers):
                continue
            x = _input_like(layers[0], next(name for name in layers[0].active_adapters if name in layers[0].scaling))
            if isinstance(module, AdaptedMlp):
                is_one = fused_mlp(module, x) is not None
            else:
                is_one = not x.is_inference() and fused_calls(layers, x) is not None
            for name, layer in zip(names, layers, strict=True):
                others = [other for other in names if other != name]
                if is_one:
                    found[id(layer)] = f"one operation with {', '.join(others)}"
    return found


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
        if layer.is_routed():
            return ""
        if len(names) > 1:
            return "with several active adapters"
        return "" if layer.single_adapter(names) else f"over {layer.get_param().dtype} or not accelerated"
    if not isinstance(layer, FusedLayer) or any(
        name not in layer.lora_A and name not in layer.lora_embedding_A for name in names
    ):
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
    if name in layer.lora_embedding_A:
        return (
            "" if isinstance(layer, GraloraLayer) and layer.is_gralora(name) else "with a plain LoRA on an embedding"
        )
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
    """An input of one token, or one position, of the dtype in which the base layer computes."""
    if adapter in layer.lora_embedding_A:
        A = layer.lora_embedding_A[adapter]
        return torch.zeros(1, dtype=torch.int64, device="cpu" if A.is_meta else A.device)
    A, base = layer.lora_A[adapter].weight, layer.get_base_layer()
    weight = getattr(base, "weight", None)
    dtype = getattr(base, "compute_dtype", None) or getattr(weight, "dtype", None)
    dtype = dtype if dtype is not None and dtype.is_floating_point and dtype.itemsize > 1 else A.dtype
    space = [1] * len(getattr(base, "kernel_size", ()))
    return torch.empty(1, layer.in_features, *space, dtype=dtype, device="cpu" if A.is_meta else A.device)
