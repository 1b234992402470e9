"""Every name of torch that is private, or may change, and that gralora relies on: imported here and nowhere else.

A line says what each must do. tests/test_seam.py checks it, by name, so a torch that moves one is noticed before a
user is. Nothing of PEFT is here: `gralora.seam` has that, and `gralora.ops` is used without it.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.modules.module import _has_any_global_hook

__all__ = [
    "NonDynamicallyQuantizableLinear",
    "children_of",
    "has_global_hooks",
    "has_hooks",
    "is_view",
    "parameters_of",
    "reversed_padding",
]

# The out-projection of nn.MultiheadAttention, whose weight is read while the module is never called.
assert issubclass(NonDynamicallyQuantizableLinear, nn.Linear)

# Truthy while a hook on all modules is registered (torch.nn.modules.module.register_module_*_hook).
has_global_hooks = _has_any_global_hook

# Whether autograd takes a tensor for a view of another, so that changing it in place would change that one.
is_view = Tensor._is_view


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """A module's own parameters by name: an attribute costs a call of nn.Module.__getattr__ for each."""
    return module._parameters


def children_of(module: nn.Module) -> dict[str, Any]:
    """A module's own modules by name, as `parameters_of` its parameters."""
    return module._modules


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module does more than its class's `forward`: hooks, or a `forward` of its own."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


def reversed_padding(conv: nn.Module) -> list[int]:
    """The padding of a convolution as `torch.nn.functional.pad` takes it, for a padding_mode other than zeros."""
    return conv._reversed_padding_repeated_twice  # type: ignore[return-value]
