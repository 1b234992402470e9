"""How one call of an adapted layer is computed: decided here, once, from where its tensors lie, and handed down.

`plan` makes a `Plan` from a row of `ARCHITECTURES` and from dtypes, shapes, strides and addresses; the functions below
(`fused`, `batched`, `kernels`, `hopper`) do what it says and ask nothing again. The environment variable
GRALORA_KERNELS restricts what is chosen:

    auto       (default) Triton kernels where they win, the product of a GPU's own where there is one, else torch
    portable   as auto, without products of a GPU's own: what runs on GPUs that have none
    torch      torch's operations everywhere
    triton     as auto, but an error where there are no kernels
    reference  the plain definition, layer by layer as PEFT computes LoRA: for debugging

Triton is imported at the first CUDA tensor, never before: `import gralora` needs no GPU and no Triton.
"""

import functools
import importlib
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from . import batched, fp8
from .architectures import ARCHITECTURES, NEVER, Architecture
from .architectures import CPU as CPU
from .architectures import HALF as HALF
from .interface import Kernels, KernelUnavailable, Product
from .layout import Ints, Layout
from .torch_seam import is_traced, saves_through_hooks
from .weights import Float8Weight, Weight, dense

if TYPE_CHECKING:  # a checker of types compares what a row may name with the protocols
    from . import fp8_hopper, hopper, kernels

    _with_torch: Kernels = batched
    _with_triton: Kernels = kernels
    _torch_product: Product[Tensor] = batched
    _hopper_product: Product[Tensor] = hopper
    _fp8_product: Product[Float8Weight] = fp8
    _fp8_hopper_product: Product[Float8Weight] = fp8_hopper

CHOICES = ("auto", "portable", "torch", "triton", "reference")


def read_choice() -> str:
    """The value of GRALORA_KERNELS; ValueError if it is none of CHOICES."""
    value = os.environ.get("GRALORA_KERNELS", "auto")
    if value not in CHOICES:
        raise ValueError(f"GRALORA_KERNELS={value!r} is not known; use one of {', '.join(CHOICES)}.")
    return value


def choose(value: str) -> None:
    """Restrict what is chosen from now on to one of CHOICES; to be called before models are compiled."""
    global choice
    choice = value
    _forget()


def _forget() -> None:
    """Forget what was chosen."""
    architecture.cache_clear()
    fp8_module.cache_clear()
    _plan.cache_clear()


choice = read_choice()  # once: a constant for torch.compile

_failed: set[str] = set()  # modules that could not compile here


@functools.cache
def architecture(device: int | None) -> Architecture:
    """The row of a CUDA device (None: the current one), without what is not installed, failed, or was not chosen.

    Raises:
        ImportError: with GRALORA_KERNELS=triton, if there are no kernels for it.
    """
    try:
        row = _with_kernels(device)
    except ImportError as error:
        if choice == "triton":
            raise ImportError(f"GRALORA_KERNELS=triton: {error}. With auto, torch computes.") from error
        return ARCHITECTURES[-1]
    return row if row.product and choice != "portable" and _is_there(row.product) else replace(row, product="")


def _with_kernels(device: int | None) -> Architecture:
    """The row of a CUDA device; ImportError if it has no kernels, or they are not chosen."""
    if choice in ("torch", "reference"):
        raise ImportError(f"GRALORA_KERNELS={choice}")
    if torch.version.hip:  # AMD's GPUs: kernels are launched in another way there
        raise ImportError("the kernels are for NVIDIA's GPUs, and this torch is for AMD's")
    import triton  # noqa: F401 (may be missing)

    capability = torch.cuda.get_device_capability(device)
    row = next(row for row in ARCHITECTURES if capability >= row.capability)
    if row.kernels == "batched":  # Triton would multiply without tensor cores
        name = torch.cuda.get_device_name(device)
        raise ImportError(f"the kernels are for GPUs of compute capability 8.0 and later, and this is a {name}")
    if row.kernels in _failed:
        raise ImportError("Triton could not compile the kernels")
    _module(row.kernels)
    return row


@functools.cache
def fp8_module(device: int | None) -> tuple[str, str]:
    """The module of a device's product of FP8 weights, and what the device is called; torch's where ours cannot be."""
    if device is None:
        return CPU.fp8_product, "the CPU"
    name = torch.cuda.get_device_name(device)
    if torch.version.hip:
        return "", f"{name}, a GPU of AMD's with another format of such numbers,"
    capability = torch.cuda.get_device_capability(device)
    row = next(row for row in ARCHITECTURES if capability >= row.capability)
    product = row.fp8_product
    if product and (choice in ("portable", "torch", "reference") or not _is_there(product)):
        product = "fp8"
    return product, f"{name}, of compute capability {capability[0]}.{capability[1]},"


def _is_there(product: str) -> bool:
    try:
        _module(product)
    except ImportError:
        return False
    return product not in _failed


def _module(name: str) -> Any:
    try:
        return importlib.import_module(f".{name}", __package__)
    except (AttributeError, ImportError) as error:  # of a Triton that is older, or has moved what the kernels use
        import triton

        message = f"gralora.ops.{name} cannot be used with Triton {triton.__version__}: {error}."
        warnings.warn(f"{message} Other kernels or torch compute instead, more slowly.", RuntimeWarning, stacklevel=2)
        raise ImportError(message) from error


def _row_of(x: Tensor) -> Architecture:
    return architecture(x.get_device()) if x.is_cuda else CPU


def kernels_for(x: Tensor) -> Kernels:
    """The implementation of the adapter's operations that computes with x."""
    row = _row_of(x)
    return _module(row.kernels) if x.dtype in row.dtypes and x.stride()[-1] == 1 else batched


def has_kernels(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether there are kernels on the device of x that compute in this dtype."""
    row = _row_of(x)
    return dtype in row.dtypes and row.kernels != "batched"


def grouped_kernels(x: Tensor) -> Any | None:
    """The module of kernels for experts, `grouped_kernels`, that computes with x; None if there is none here."""
    return _module("grouped_kernels") if has_kernels(x, x.dtype) and "grouped_kernels" not in _failed else None


@dataclass(frozen=True, eq=False)
class Plan:
    """How one call of an adapted layer is computed, forward and backward.

    Attributes:
        down: who projects down, and drops out.
        up: who adds up(g, B) to a result that has no product of ours.
        gradients: who computes the factors' gradients where no product does.
        forward, backward: products that take the adapter's output in; None for torch's product, and `up` after it.
        takes_packed: whether these two take the weight as it is stored, instead of dequantised.
        gradients_in_product: whether the launch of `backward` computes the factors' gradients, too.
        keeps_g: whether the backward gets g from the forward, instead of projecting x down again.
        converts_A, converts_B: whether this factor is copied to the dtype of x before it projects up.
    """

    down: Kernels = batched
    up: Kernels = batched
    gradients: Kernels = batched
    forward: Product[Any] | None = None
    backward: Product[Any] | None = None
    takes_packed: bool = False
    gradients_in_product: bool = False
    keeps_g: bool = True
    converts_A: bool = False
    converts_B: bool = False

    def operand(self, weight: Weight, dtype: torch.dtype) -> Any:
        """A weight as `forward` and `backward` take it."""
        return weight if self.takes_packed else dense(weight, dtype)


TORCH = Plan()  # torch's operations, a product and then the adapter


def plan(x: Tensor, weight: Weight | None, A: Tensor | None, B: Tensor, h: int = 0, p: float = 0.0) -> Plan:
    """Decide how a layer is computed; cached, so that it costs the host little.

    Args:
        x: `[T, I]` with unit stride along I, or contiguous `[..., I]`.
        weight: `[O, I]`; None if the base layer's product is not ours to compute.
        A, B: the factors with the plain LoRA part in them, `[k, I/k, R]` and `[k, R, O/k]`. A is None if there is
            nothing but `forward` to plan.
        h: rank of the plain LoRA part.
        p: probability of dropout.
    """
    row = _row_of(x)
    if isinstance(weight, Float8Weight) and not is_traced(x):
        product, card = fp8_module(x.get_device() if x.is_cuda else None)
        if fp8.multiplies(weight, bool(product), card):
            has_few_tokens = x.numel() // x.shape[-1] <= row.few_tokens
            return _packed_plan(row, x.dtype, has_few_tokens, product, None if A is None else A.dtype, B.dtype)
    if row.large == NEVER:
        return TORCH
    if isinstance(weight, Tensor) and weight.dtype != x.dtype:
        raise TypeError(f"x has dtype {x.dtype}, weight {weight.dtype}; convert one of them.")
    (k, _, chunk_out), n_in = B.shape, x.shape[-1]
    tokens = x.numel() // n_in
    if is_traced(x) or tokens * (n_in + k * chunk_out) < row.large:
        return _small_plan(row, x.dtype, bool(tokens <= row.few_tokens))
    if isinstance(weight, Tensor):
        place: _Place | None = _place(weight)
    else:
        place = None if weight is None else (weight.shape, (weight.shape[1], 1), True)
    of_A = (None, None) if A is None else (_place(A), A.dtype)
    flags = h, p > 0, saves_through_hooks()
    return _plan(row, x.get_device(), x.dtype, _place(x), place, *of_A, _place(B), B.dtype, *flags)


_Place = tuple[Ints, Ints, bool]


def _place(t: Tensor) -> _Place:
    """The fields of a `Layout` without their names, which would double the time of a plan."""
    return t.shape, t.stride(), not t.data_ptr() % 16


@functools.cache
def _small_plan(row: Architecture, dtype: torch.dtype, has_few_tokens: bool) -> Plan:
    """torch's product, and a kernel before and after it; also what the compiler launches."""
    if dtype not in row.dtypes:
        return TORCH
    kernels = _module(row.kernels)
    return Plan(kernels, kernels, kernels if has_few_tokens else batched)


@functools.cache
def _packed_plan(
    row: Architecture,
    dtype: torch.dtype,
    has_few_tokens: bool,
    name: str,
    A_dtype: torch.dtype | None,
    B_dtype: torch.dtype,
) -> Plan:
    """Products that take the weight as it is stored, whatever the number of tokens, so that all are rounded alike."""
    small, product = _small_plan(row, dtype, has_few_tokens), _module(name)
    return replace(
        small,
        up=batched,
        forward=product,
        backward=product,
        takes_packed=True,
        gradients_in_product=not has_few_tokens and product.MAKES_GRADIENTS,
        converts_A=A_dtype != dtype,
        converts_B=B_dtype != dtype,
    )


@functools.lru_cache(4096)
def _plan(
    row: Architecture,
    device: int,
    dtype: torch.dtype,
    of_x: _Place,
    of_weight: _Place | None,
    of_A: _Place | None,
    A_dtype: torch.dtype | None,
    of_B: _Place,
    B_dtype: torch.dtype,
    h: int,
    has_dropout: bool,
    goes_through_hooks: bool,
) -> Plan:
    """The plan of a large layer."""
    x, B = Layout(*of_x), Layout(*of_B)
    weight, A = (None if place is None else Layout(*place) for place in (of_weight, of_A))
    (k, R, chunk_out), n_in, tokens = B.shape, x.shape[-1], math.prod(x.shape[:-1])
    n_out = k * chunk_out
    small = _small_plan(row, dtype, tokens <= row.few_tokens)
    forward: Product[Tensor] | None = None
    backward: Product[Tensor] | None = None
    gradients_in_product = False
    if weight is not None:
        forward = backward = batched
        if row.product and dtype in row.dtypes:
            product: Product[Tensor] = _module(row.product)
            if product.takes(x, weight, _converted(B, B_dtype, dtype), device):
                forward = product
            if A is not None:
                A_up = Layout((k, R, n_in // k), (A.strides[0], A.strides[2], A.strides[1]), A.aligned)
                base = Layout((tokens, n_out), (n_out, 1)), Layout((n_in, n_out), weight.strides[::-1], weight.aligned)
                operands_up = *base, _converted(A_up, A_dtype, dtype), device
                gradients_in_product = not has_dropout and product.takes(*operands_up, x)
                if gradients_in_product or product.takes(*operands_up):
                    backward = product
    return replace(
        small,
        up=batched,
        forward=forward,
        backward=backward,
        gradients_in_product=gradients_in_product,
        keeps_g=goes_through_hooks or _keeps_g(row, small.down, k * R, n_in, h > 0, has_dropout),
        converts_A=A_dtype != dtype,
        converts_B=B_dtype != dtype,
    )


def _keeps_g(row: Architecture, down: Kernels, sub_ranks: int, n_in: int, has_plain: bool, has_dropout: bool) -> bool:
    """Whether a large layer keeps g for its backward, where nothing computes the forward again anyway.

    GraLoRA has k times as many sub-ranks as LoRA: those of the narrower layers would take it above LoRA's memory.
    Projecting again costs a launch and reading x where a kernel does it, all of x as it is.
    """
    return sub_ranks < n_in * row.most_kept or has_plain or has_dropout or down is batched


def keeps_g(x: Tensor, sub_ranks: int, has_plain: bool, has_dropout: bool) -> bool:
    """`Plan.keeps_g` of a large layer that torch.compile traces: x `[..., I]`, sub_ranks k * R."""
    down = kernels_for(x)
    return saves_through_hooks() or _keeps_g(_row_of(x), down, sub_ranks, x.shape[-1], has_plain, has_dropout)


def _converted(factor: Layout, factor_dtype: torch.dtype | None, dtype: torch.dtype) -> Layout:
    """Where a factor `[k, R, n]` lies after `torch.empty_like(factor, dtype=dtype)`."""
    if factor_dtype == dtype:
        return factor
    like = torch.empty_strided(factor.shape, factor.strides, device="meta")
    return Layout(factor.shape, torch.empty_like(like).stride())


Compute = TypeVar("Compute", bound=Callable[..., Any])


def falls_back(compute: Compute) -> Compute:
    """Call `compute` again, with less of Triton, if a kernel turns out not to compile here.

    `compute` makes its own plan; what it changes, it changes in its last launch.
    """

    @functools.wraps(compute)
    def call(*args: Any) -> Any:
        try:
            return compute(*args)
        except KernelUnavailable as error:
            give_up(error)
        return call(*args)

    return call  # type: ignore[return-value]


def give_up(error: KernelUnavailable) -> None:
    """Take the module that cannot be compiled out of all plans, with one warning; raise `error` if that was done."""
    if choice == "triton" or error.module in _failed:
        raise error
    _failed.add(error.module)
    _forget()
    is_product = any(error.module == row.product for row in ARCHITECTURES)
    instead = "the portable kernels compute" if is_product else "torch computes"
    warnings.warn(f"{error}. From now on {instead} instead, more slowly.", RuntimeWarning, stacklevel=2)


def delta_weight_kernels(A: Tensor) -> Kernels:
    """The implementation that computes the delta weight of float32 factors A."""
    return _module(_row_of(A).kernels)


def has_delta_weight_kernel(A: Tensor) -> bool:
    return A.is_cuda and A.dtype == torch.float32 and _row_of(A).kernels != "batched"


def describe(device: torch.device | str | None = None) -> str:
    """What runs for large layers on a device (default: CUDA if there is one), in words."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if choice == "reference":
        return "reference"
    row = architecture(device.index) if device.type == "cuda" else CPU
    if row.kernels == "batched":
        return "fused torch"
    from . import launch

    product = f" + {row.name} matmul" if row.product else ""
    return f"fused torch + Triton{product} ({launch.describe()})"
