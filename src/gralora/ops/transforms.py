"""Whether torch is transforming or recording the function that is running, which only plain operations let it do."""

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad


@torch.compiler.assume_constant_result  # asked while torch.compile traces, which enters the transforms as it goes
def is_transformed() -> bool:
    """Whether operations may be run by a transform or tracer, for which an `autograd.Function` is opaque.

    True inside of `torch.func` (grad, vmap, jvp, jacrev, ...), at a level of forward-mode differentiation, and while
    `torch.jit.trace`, the TorchScript ONNX exporter or `make_fx` record. torch.compile alone does not count.
    """
    return (
        _functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or (torch._C._len_torch_dispatch_stack() > 0 and _records_operations())
    )


def _records_operations() -> bool:
    """Whether one of the active dispatch modes is that of `make_fx`."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def is_batched(dy: Tensor) -> bool:
    """Whether a backward gets many gradients at once (`is_grads_batched=True`), or is itself transformed."""
    return _functorch.is_legacy_batchedtensor(dy) or is_transformed()
