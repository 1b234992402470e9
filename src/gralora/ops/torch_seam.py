"""Every name of torch that is private, or may change, and that gralora relies on: imported here and nowhere else.

A line says what each must do. tests/test_seam.py checks it, by name, so a torch that moves one is noticed before a
user is. Nothing of PEFT is here: `gralora.seam` has that, and `gralora.ops` is used without it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch, _get_tracing_state, _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.fx.traceback import get_current_meta
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.modules.module import _has_any_global_hook

__all__ = [
    "NonDynamicallyQuantizableLinear",
    "apply_to",
    "children_of",
    "current_device",
    "current_raw_stream",
    "has_global_hooks",
    "has_hooks",
    "is_batched",
    "is_capturing",
    "is_exporting",
    "is_traced",
    "is_transformed",
    "is_view",
    "parameters_of",
    "reversed_padding",
    "saves_through_hooks",
    "unhooked_parameters",
    "unsafe_view",
    "version_of",
]

# The out-projection of nn.MultiheadAttention, whose weight is read while the module is never called.
assert issubclass(NonDynamicallyQuantizableLinear, nn.Linear)

# Truthy while a hook on all modules is registered (torch.nn.modules.module.register_module_*_hook).
has_global_hooks = _has_any_global_hook

# What launching a kernel asks of CUDA, without the checks of `torch.cuda`'s functions: () -> index of the current
# device, (device) -> handle of its current stream, () -> whether that stream is being recorded in a graph.
current_device: Any = getattr(torch._C, "_cuda_getDevice", None)
current_raw_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
is_capturing: Any = getattr(torch._C, "_cuda_isCurrentStreamCapturing", None)

# (module, function, recurse) -> the module with function(t) in the place of each tensor t, in the same parameters:
# what `to`, `half` and the like call, as the method `_apply`.
apply_to = nn.Module._apply

# Whether autograd takes a tensor for a view of another, so that changing it in place would change that one.
is_view = Tensor._is_view


def parameters_of(module: nn.Module) -> dict[str, Any]:
    """A module's own parameters by name: an attribute costs a call of nn.Module.__getattr__ for each."""
    return module._parameters


def children_of(module: nn.Module) -> dict[str, Any]:
    """A module's own modules by name, as `parameters_of` its parameters."""
    return module._modules


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module does more than its class's `forward`: hooks, or a `forward` of its own."""
    return unhooked_parameters(module) is None


def unhooked_parameters(module: nn.Module) -> dict[str, Any] | None:
    """`parameters_of` a module without hooks, else None: one call for both questions."""
    own = module.__dict__
    if (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    ):
        return None
    return own["_parameters"]


def reversed_padding(conv: nn.Module) -> list[int]:
    """The padding of a convolution as `torch.nn.functional.pad` takes it, for a padding_mode other than zeros."""
    return conv._reversed_padding_repeated_twice  # type: ignore[return-value]


def is_traced(x: Tensor) -> bool:
    """Whether torch.compile is tracing operations and kernels for its graph, with tensors that have no memory.

    torch 2.11 to 2.13: the body of a `triton_op` gets a FunctionalTensor.
    """
    return isinstance(x, FunctionalTensor)


def is_exporting() -> bool:
    """Whether torch.export is tracing; `torch.compiler.is_exporting()` is always true in a graph of torch 2.11."""
    return torch.compiler._is_exporting_flag


def saves_through_hooks() -> bool:
    """Whether tensors that autograd saves now go through hooks, as gradient checkpointing and offloading set them.

    torch 2.11 to 2.13: the top pair of `torch.autograd.graph.saved_tensors_hooks`, or None. Where torch.compile traces
    a checkpointed block there are no hooks, but a mark in the metadata of its nodes.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None or "recompute" in get_current_meta()


def unsafe_view(y: Tensor, shape: tuple[int, ...]) -> Tensor:
    """y in another shape, which autograd does not take for a view, so that callers may change it in place.

    torch's own matmul returns its result in this way.
    """
    return torch.ops.aten._unsafe_view.default(y, shape)


def version_of(t: Tensor) -> int:
    """How often t was changed in place: what autograd compares between forward and backward."""
    return t._version


@torch.compiler.assume_constant_result  # asked while torch.compile traces, which enters the transforms as it goes
def is_transformed() -> bool:
    """Whether operations may be run by a transform or tracer, for which an `autograd.Function` is opaque.

    True inside of `torch.func` (grad, vmap, jvp, jacrev, ...), at a level of forward-mode differentiation, and while
    `torch.jit.trace`, the TorchScript ONNX exporter or `make_fx` record. torch.compile alone does not count.
    """
    return (
        peek_interpreter_stack() is not None
        or _get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or (_len_torch_dispatch_stack() > 0 and _records_operations())
    )


def _records_operations() -> bool:
    """Whether one of the active dispatch modes is that of `make_fx`."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def is_batched(dy: Tensor) -> bool:
    """Whether a backward gets many gradients at once (`is_grads_batched=True`), or is itself transformed."""
    return _functorch.is_legacy_batchedtensor(dy) or is_transformed()
