"""The float64 reference that each measured method is compared with before its figures are printed.

An adapted layer's reference is written from the method's formula, block by block, and shares no code with the package.
How far the results may be from it is measured too: twice as far as those of PEFT's LoRA, which are plain torch's in
the same dtypes, are from theirs.
"""

import copy
from collections.abc import Mapping

import torch
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn

from gralora.fp8 import float8_weight

YARDSTICK = "PEFT LoRA"
FLOOR = {"loss": 2e-3}  # relative error that is always allowed: a loss is one number, near to another by accident
LEAST = 1e-5
ROUNDING = {torch.bfloat16: 0.15, torch.float16: 0.05, torch.float32: 1e-4}  # explains no more than that

Outcome = Mapping[str, list[Tensor]]
"""What a step computes, by kind: "loss" or "y", "x" (gradients of the input), "A" and "B" (of the factors)."""


class NotTheReference(Exception):
    """A method's results are not those of the float64 reference, so its time means nothing."""


def grid_update(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """What a grid adds to a layer's output, without scaling: h_i = x_i A_i, g_j = concat_i h_i[j], y_j = g_j B_j.

    Args:
        x: `[..., I]`.
        A: `[k, I/k, r]`.
        B: `[k, r, O/k]`.

    Returns:
        `[..., O]`.
    """
    k, chunk, r = A.shape
    h = [x[..., i * chunk : (i + 1) * chunk] @ A[i] for i in range(k)]
    q = r // k
    return torch.cat([torch.cat([h_i[..., j * q : (j + 1) * q] for h_i in h], -1) @ B[j] for j in range(k)], -1)


class ExactLinear(nn.Module):
    """A linear layer, adapted or not, by its formula in float64; its base may be quantised by bitsandbytes."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        base = layer.base_layer if hasattr(layer, "base_layer") else layer
        self.weight = _weight64(base)
        self.bias = None if base.bias is None else base.bias.detach().double()
        self.A = nn.ParameterList()
        self.B = nn.ParameterList()
        self.scaling = []
        for A, B, scaling in _factors(layer):
            self.A.append(A.detach().double())
            self.B.append(B.detach().double())
            self.scaling.append(scaling)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.weight, self.bias)
        for A, B, scaling in zip(self.A, self.B, self.scaling, strict=True):
            update = x @ A.T @ B.T if A.ndim == 2 else grid_update(x, A, B)
            y = y + scaling * update
        return y


def _weight64(base: nn.Module) -> Tensor:
    if type(base.weight).__name__ in ("Params4bit", "Int8Params"):
        return dequantize_bnb_weight(base.weight, state=getattr(base, "state", None)).detach().double()
    packed = float8_weight(base)
    return base.weight.detach().double() if packed is None else packed.dense(torch.float32).double()


def _factors(layer: nn.Module) -> list[tuple[Tensor, Tensor, float]]:
    """(A, B, scaling) of every active adapter of a layer of one of the methods; a hybrid's plain part is one more."""
    if hasattr(layer, "gralora_A"):
        return [(layer.gralora_A[name], layer.gralora_B[name], layer.scaling[name]) for name in layer.active_adapters]
    found = []
    for name in layer.active_adapters if hasattr(layer, "lora_A") else ():
        A, B = layer.lora_A[name], layer.lora_B[name]
        for kind in ("weight", "hybrid_weight"):
            if getattr(A, kind, None) is not None:
                found.append((getattr(A, kind), getattr(B, kind), layer.scaling[name]))
    return found


def exact_model(plain: nn.Module, model: nn.Module) -> nn.Module:
    """The reference of a whole model.

    Args:
        plain: the base model before it was quantised, patched or adapted.
        model: what was made of it.

    Returns:
        `plain` in float64, with an `ExactLinear` for each of the layers that were adapted or quantised.
    """
    exact = copy.deepcopy(plain).requires_grad_(False).double()
    prefix = "base_model.model."
    for name, layer in model.named_modules():
        quantised = isinstance(layer, nn.Linear) and not layer.weight.is_floating_point()
        if (_factors(layer) or quantised) and not name.endswith("base_layer"):
            exact.set_submodule(name.removeprefix(prefix), ExactLinear(layer))
    return exact


def exact_loss(plain: nn.Module, model: nn.Module, tokens: Tensor) -> Outcome:
    """Loss and gradients of the reference of a model, one sequence after the other to save memory."""
    exact = exact_model(plain, model).train()
    exact.gradient_checkpointing_enable({"use_reentrant": False})
    layers = [module for module in exact.modules() if isinstance(module, ExactLinear)]
    total = torch.zeros((), dtype=torch.float64, device=tokens.device)
    for row in tokens:
        loss = exact(input_ids=row[None], labels=row[None], use_cache=False).loss.double() / len(tokens)
        if loss.requires_grad:
            loss.backward()
        total += loss.detach()
    return {"loss": [total], "A": _grads(layers, "A"), "B": _grads(layers, "B")}


def _grads(layers: list[ExactLinear], factor: str) -> list[Tensor]:
    return [parameter.grad for layer in layers for parameter in getattr(layer, factor)]


def named_gradients(model: nn.Module) -> dict[str, list[Tensor]]:
    """Gradients of the trainable parameters of a model of one of the methods, by factor, in the order of layers."""
    found: dict[str, list[Tensor]] = {"A": [], "B": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "A" if "lora_A" in name or "lora_embedding_A" in name else "B"
            found[kind].append(parameter.grad if parameter.grad is not None else torch.zeros_like(parameter))
    return found


def errors_of(own: Outcome, exact: Outcome) -> dict[str, float]:
    """By kind, the root mean square error of all numbers over that of the reference's numbers."""
    found = {}
    for kind, tensors in exact.items():
        if not tensors:
            continue
        pairs = list(zip(own[kind], tensors, strict=True))
        error = sum((a.double().reshape(b.shape) - b).square().sum() for a, b in pairs)
        found[kind] = float((error / sum(b.square().sum() for _, b in pairs)).sqrt())
    return found


def check(errors: Mapping[str, Mapping[str, float]], dtype: torch.dtype) -> None:
    """Raise NotTheReference if a method is further from its reference than rounding explains.

    Args:
        errors: method -> `errors_of` it; YARDSTICK is among them.
        dtype: of the products.
    """
    plain = errors[YARDSTICK]
    for method in sorted(errors, key=lambda name: name != YARDSTICK):
        for kind, error in errors[method].items():
            limit = max(2 * plain.get(kind, 0.0), FLOOR.get(kind, LEAST))
            most = max(ROUNDING[dtype], FLOOR.get(kind, 0.0))
            if not error <= min(limit, most):
                raise NotTheReference(
                    f"{method}: {kind} is {error:.2g} from the float64 reference, relatively, where "
                    f"{min(limit, most):.2g} is allowed ({YARDSTICK}'s is {plain.get(kind, 0.0):.2g}). "
                    "No figures are printed."
                )
