"""Which implementation runs: decided in one place, from the environment variable GRALORA_KERNELS and the tensors.

    auto       (default) Triton kernels where they win, else fused torch
    torch      fused torch operations everywhere
    triton     as auto, but an error where there are no kernels
    reference  the plain definition, layer by layer as PEFT computes LoRA: for debugging

The Triton modules are imported at the first CUDA tensor, never before: `import gralora` needs no GPU and no Triton.
"""

import functools
import os
from types import ModuleType

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.traceback import get_current_meta

CHOICES = ("auto", "torch", "triton", "reference")


def read_choice() -> str:
    """The value of GRALORA_KERNELS; ValueError if it is none of CHOICES."""
    value = os.environ.get("GRALORA_KERNELS", "auto")
    if value not in CHOICES:
        raise ValueError(f"GRALORA_KERNELS={value!r} is not known; use one of {', '.join(CHOICES)}.")
    return value


choice = read_choice()  # once: a constant for torch.compile


@functools.cache
def kernels(device: int | None = None) -> ModuleType | None:
    """The Triton kernels, or None where others are chosen, Triton is missing, or cannot use this GPU's tensor cores.

    Before Ampere it would multiply without them. Kernels on AMD's GPUs it launches in another way.
    """
    if choice in ("torch", "reference"):
        return None
    try:
        if torch.version.hip:
            raise ImportError("the kernels are for NVIDIA's GPUs, and this torch is for AMD's")
        from . import kernels

        if torch.cuda.get_device_capability(device) < (8, 0):
            name = torch.cuda.get_device_name(device)
            raise ImportError(f"the kernels are for GPUs of compute capability 8.0 and later, and this is a {name}")
    except ImportError as error:
        if choice == "triton":
            raise ImportError(f"GRALORA_KERNELS=triton: {error}. With auto, torch computes.") from error
        return None
    return kernels


@functools.cache
def hopper(device: int | None = None) -> ModuleType | None:
    """The Hopper kernel, or None where the GPU is another, or Triton has no Gluon (Triton < 3.6)."""
    if kernels(device) is None or torch.cuda.get_device_capability(device)[0] != 9:
        return None
    try:
        from . import hopper
    except ImportError:
        return None
    return hopper


HALF = (torch.bfloat16, torch.float16)
FEW_TOKENS = 2048  # up to which a launch costs more than what cuBLAS gains on a factor's gradient
MIN_SIZE = 2**22  # elements of x from which the matrix product itself takes the adapter's output in
MOST_KEPT = 1 / 8  # of the size of x, below which sub-ranks are kept for the backward
MIN_FEATURES = 2048  # in or out, from which a layer's products take longer than calling an operator of a graph


def factor_kernels(x: Tensor, dtype: torch.dtype | None = None) -> ModuleType | None:
    """The kernels that project x `[..., I]` down and up, in its dtype or another, or None where torch does that."""
    return kernels(x.device.index) if _takes_kernels(x, dtype or x.dtype) and x.stride()[-1] == 1 else None


def _takes_kernels(x: Tensor, dtype: torch.dtype) -> bool:
    return x.is_cuda and dtype in HALF


@torch.compiler.assume_constant_result
def _has_kernels(device: int) -> bool:
    """Whether there are kernels, also where torch.compile traces, which could not import them."""
    return kernels(device) is not None


def gradient_kernels(x: Tensor, dy: Tensor, g: Tensor) -> ModuleType | None:
    """The kernels that compute the factors' gradients, or None where torch is to do that; g `[k, T, R]`."""
    return factor_kernels(x) if g.shape[1] <= FEW_TOKENS and dy.stride()[-1] == 1 else None


def is_traced(x: Tensor) -> bool:
    """Whether torch.compile is tracing the operations and kernels of its graph, with tensors that have no memory."""
    return isinstance(x, FunctionalTensor)


def is_large(x: Tensor) -> bool:
    """Whether the matrix product itself should take in the adapter's output: a launch costs less than a pass.

    Never while it is traced: the compiler could not launch that product.
    """
    return x.is_cuda and x.numel() >= MIN_SIZE and not is_traced(x)


def projects_again(x: Tensor, g: Tensor, hybrid_A: Tensor | None, p: float) -> bool:
    """Whether a large layer's backward is to compute g anew from x, instead of the forward keeping it.

    GraLoRA has k times as many sub-ranks as LoRA: of the narrower layers they would be what takes it above LoRA's
    memory. Where the kernel projects all of x down as it is, that costs a launch and reading x. Where the forward is
    computed anew too, it would cost the same a second time.

    Args:
        x: the layer's input, `[..., I]`.
        g: `[k, T, R]`.
        hybrid_A: the plain LoRA part's, or None.
        p: probability of dropout.
    """
    many = g.shape[0] * g.shape[2] >= x.shape[-1] * MOST_KEPT
    return many and hybrid_A is None and not p and factor_kernels(x) is not None and not _is_saved_by_others()


def _is_saved_by_others() -> bool:
    """Whether what autograd saves is for hooks to drop, as gradient checkpointing does, or to move.

    Where torch 2.11 traces a checkpointed block, there are no hooks but a mark.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None or "recompute" in get_current_meta()


def linear_kernel(x: Tensor, weight: Tensor, B: Tensor, makes_gradients: bool) -> ModuleType | None:
    """The kernel that computes base and adapter in one, or None where it does not apply or win; x as in `wins`."""
    module = hopper(x.device.index)
    return module if module is not None and module.wins(x, weight, B, makes_gradients) else None


def compiled_as(x: Tensor, weight: Tensor, p: float) -> str:
    """What an adapted layer is in the graph of torch.compile.

    How many tokens x has does not matter, so that graphs for any number can be compiled.

    Args:
        x: its input, `[..., I]`.
        weight: `[O, I]`.
        p: probability of dropout.

    Returns:
        "kernels": an operator whose kernels the compiler sees, and launches itself but where `is_called`.
        "operator": one that it calls, of torch's kernels.
        "operations": those of the definition, which it fuses; `torch.export` can save these.
    """
    exporting = torch.compiler._is_exporting_flag  # is_exporting() is always true in a graph of torch 2.11
    if _takes_kernels(x, x.dtype) and _has_kernels(x.device.index) and not exporting:
        return "kernels"
    return "operator" if is_called(x, weight, p) else "operations"


def is_called(x: Tensor, weight: Tensor, p: float) -> bool:
    """Whether the compiler is to call what it could fuse or launch itself; arguments as in `compiled_as`.

    That saves more time than the call takes; with dropout it saves memory: its mask is drawn again where it is needed
    again.
    """
    return p > 0 or x.is_cuda and max(weight.shape) >= MIN_FEATURES


def use_delta_weight_kernel(A: Tensor) -> bool:
    return A.is_cuda and A.dtype == torch.float32 and kernels(A.device.index) is not None


def describe(device: torch.device | str | None = None) -> str:
    """What runs for large layers on a device (default: CUDA if there is one), in words."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if choice == "reference":
        return "reference"
    if device.type != "cuda" or kernels(device.index) is None:
        return "fused torch"
    return "fused torch + Triton" + (" + Hopper matmul" if hopper(device.index) else "")
