"""Gated MLPs of models whose linear layers have adapters, computed as one operation: `ops.gated_mlp`.

A module is taken for such an MLP by what it computes, not by its class: one of SHAPES names its layers, and its
forward, run once on stand-ins for them, gives act(gate(x)) * up(x) to the last. So Liger's replacements and remote
code count too, and an MLP that clamps or scales something does not.
"""

import weakref
from collections.abc import Callable
from types import MethodType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .fast_path import FusedLayer, fused_calls
from .ops import GatedMlp, activations, gated_mlp
from .ops.torch_seam import children_of
from .promote import Transparent, demote


class Shape(NamedTuple):
    """Names of the layers of an MLP: `first` are gate and up, or one layer for both, then `down`."""

    first: tuple[str, ...]
    down: str

    @property
    def names(self) -> tuple[str, ...]:
        return *self.first, self.down


SHAPES = (
    Shape(("gate_proj", "up_proj"), "down_proj"),  # Llama, Mistral, Qwen, Gemma, SmolLM3, OLMo
    Shape(("gate_up_proj",), "down_proj"),  # Phi-3, GLM-4
    Shape(("w1", "w3"), "w2"),  # Llama as Meta names it, InternLM2
)

LARGE = 2**20  # elements of x


class AdaptedMlp(Transparent):
    """Mixin over a model's MLP, whose call is one operation where it can be.

    The call is replaced, not `forward`, since Liger and accelerate set a `forward` of the object's own.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and not is_compiling() and _is_worth_it(self, *args):
            mlp = fused_mlp(self, args[0])
            if mlp is not None:
                return mlp()
        return nn.Module.__call__(self, *args, **kwargs)  # type: ignore[arg-type]


def _is_worth_it(module: Any, x: Any) -> bool:
    """Whether one operation spares more than it costs the host: memory while training, else passes over large x."""
    return module.training or torch.is_grad_enabled() or isinstance(x, Tensor) and x.numel() >= LARGE


class FusedMlp(NamedTuple):
    """One operation that computes an MLP: `call()` is its output."""

    x: Tensor
    mlp: GatedMlp

    def __call__(self) -> Tensor:
        return gated_mlp(*self)


def fused_mlp(module: Any, x: Any) -> FusedMlp | None:
    """The operation that computes `module(x)`, or None if its layers are to be called one by one.

    It is one if the module has no hooks, and its layers can be computed together (`fast_path.fused_calls`).

    Args:
        module: an `AdaptedMlp`.
        x: its input, `[..., I]`.
    """
    children = children_of(module)
    shape = shape_of(module)
    layers = [] if shape is None else [children[name] for name in shape.names]
    own = module.__dict__
    if shape is None or not all(isinstance(layer, FusedLayer) for layer in layers):
        demote(module)  # the adapters are gone
        return None
    if (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or not isinstance(x, Tensor)
    ):
        return None
    calls = fused_calls(layers, x)
    if calls is None:
        return None
    activation = activation_of(module, shape, x.device)
    if activation is None:
        return None
    *first, down = (call.operands() for call in calls)
    dtype = calls[0].dtype
    return FusedMlp(x if x.dtype == dtype else x.to(dtype), GatedMlp(tuple(first), down, activation))


def shape_of(module: nn.Module) -> Shape | None:
    """The names of an MLP's layers; None if it has not such layers."""
    children = children_of(module)
    return next((shape for shape in SHAPES if all(name in children for name in shape.names)), None)


def is_mlp(module: nn.Module) -> bool:
    """Whether a module has the layers of an MLP, all with adapters that can be computed as one operation."""
    shape = shape_of(module)
    layers = [] if shape is None else [children_of(module)[name] for name in shape.names]
    return bool(layers) and all(isinstance(layer, FusedLayer) and layer.has_fused() for layer in layers)


# What an MLP computes

# of a module: its forward, which may be bound to it and so is held weakly, too; whether it trains; the activation
_found: "weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref[Any], bool, str | None]]"
_found = weakref.WeakKeyDictionary()


def activation_of(module: nn.Module, shape: Shape, device: torch.device) -> str | None:
    """The activation of an MLP, a name of `activations.ACTIVATIONS`; None if it computes something else."""
    forward = module.__dict__.get("forward", type(module).forward)
    known = _found.get(module)
    if known is None or known[0]() is not forward or known[1] != module.training:
        known = weakref.ref(forward), module.training, _seen_activation(module, shape, forward, device)
        _found[module] = known
    return known[2]


def same_random_numbers(device: torch.device) -> Any:
    """A context that gives torch's generators of the CPU and of a device back as they were."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _seen_activation(module: nn.Module, shape: Shape, forward: Any, device: torch.device) -> str | None:
    """`activation_of`, by running `forward` on an object that has stand-ins for the layers.

    Beside these it has only modules without parameters, so that a forward that reads anything else, such as a field of
    the model's config, fails. e and u reach beyond where some models clamp them.
    """
    if isinstance(forward, MethodType):  # set on the object, as Liger does
        forward = forward.__func__ if forward.__self__ is module else None
    if not callable(forward):
        return None
    numbers = torch.linspace(-30, 30, 512, device=device)
    e, u = numbers[None, None], numbers.flip(0).roll(77)[None, None]
    x, y, seen = torch.zeros(1, 1, 8, device=device), torch.zeros(1, 1, 8, device=device), []
    outputs = dict(zip(shape.first, (e, u) if len(shape.first) == 2 else (torch.cat([e, u], dim=-1),), strict=True))

    def layer(name: str) -> Callable[[Tensor], Tensor]:
        def call(given: Tensor) -> Tensor:
            seen.append((name, given))
            return outputs[name].clone() if name in outputs else y

        return call

    others = {name: child for name, child in children_of(module).items() if not list(child.parameters())}
    stand_in = SimpleNamespace(**others, **{name: layer(name) for name in shape.names})
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False), same_random_numbers(device):
            result = forward(stand_in, x)
    except Exception:  # whatever it reads, or does
        return None
    given = dict(seen)
    if result is not y or len(seen) != len(shape.names) or any(given.get(name) is not x for name in shape.first):
        return None
    for name, act in activations.ACTIVATIONS.items():
        wanted = act.value(e) * u
        if given[shape.down].shape == wanted.shape and torch.allclose(given[shape.down], wanted, 1e-5, 1e-5):
            return name
    return None
