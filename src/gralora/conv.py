"""GraLoRA of convolutions, with blocks over input and output channels.

A convolution is a linear map of patches, `[I * P]` for `I` channels and `P` kernel positions, and GraLoRA puts its
grid on this linear map. A_i convolves the i-th chunk of channels with the layer's kernel size, stride, padding and
dilation. The sub-ranks are exchanged at every position, and B_j is a 1x1 convolution. dW has the layout of the weight,
`[O, I, *kernel]`.
"""

from typing import Any, NamedTuple

import torch
from peft.tuners import lora
from torch import Tensor, nn

from .blocks import GranularDown, GranularUp
from .fast_path import Adapter, adapters_of, setting_of
from .layers import GraloraLayer
from .ops import Factors
from .ops.convolution import Geometry, conv_down, conv_update, convolve
from .ops.torch_seam import apply_to, has_hooks, is_view, reversed_padding
from .seam import Conv1d

FORWARDS = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


class ConvDown(GranularDown):
    """The down-projections A as one grouped convolution, and the exchange.

    Attributes:
        weight: A, `[k, I/k, *kernel, r_g]`: the linear factors, with channels and positions of a patch kept apart.
        hybrid_weight: A_s, `[hybrid_r, I, *kernel]`, or None for a pure GraLoRA.
    """

    def __init__(self, weight: Tensor, hybrid_weight: Tensor | None, base: Any) -> None:
        """Take the attributes, and in `base` the adapted nn.Conv1d, nn.Conv2d or nn.Conv3d."""
        super().__init__(weight, hybrid_weight)
        self.geometry, self.pad = geometry_of(base)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Do what `to` and the like do; as a matrix for each block, A is no image to `to(memory_format=...)`."""

        def apply(t: Tensor) -> Tensor:
            return fn(t) if t.dim() != self.weight.dim() else fn(t.flatten(1, -2)).unflatten(1, t.shape[1:-1])

        return apply_to(self, apply, recurse)

    @classmethod
    def from_conv(cls, conv: Any, base: Any, k: int, hybrid_r: int) -> "ConvDown":
        """Regroup the A of PEFT's plain LoRA, weight `[r, I, *kernel]`; see `GranularDown.from_linear`."""
        A = conv.weight.detach()
        grid, hybrid = cls.read(A.flatten(1), k, hybrid_r)
        grid = grid.unflatten(1, (A.shape[1] // k, *A.shape[2:]))
        return cls(grid, None if hybrid is None else hybrid.unflatten(1, A.shape[1:]), base)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., I, *space]` -> exchanged sub-ranks and hybrid part, `[..., k * r_g + hybrid_r, *space']`."""
        x = padded(x, self.pad)
        g = conv_down(x, self.weight, self.geometry)
        if self.hybrid_weight is None:
            return g
        return torch.cat([g, convolve(x, self.hybrid_weight, self.geometry)], dim=2 - self.weight.dim())

    def features(self) -> str:
        return f"{super().features()}, kernel={tuple(self.weight.shape[2:-1])}"


class ConvUp(GranularUp):
    """The up-projections B, `[k, r_g, O/k]`, applied to the channels, as a 1x1 convolution does."""

    def __init__(
        self, weight: Tensor, hybrid_weight: Tensor | None = None, bias: Tensor | None = None, dims: int = 1
    ) -> None:
        """Take the arguments of `GranularUp`, and in `dims` the number of spatial dimensions."""
        super().__init__(weight, hybrid_weight, bias)
        self.dims = dims

    @classmethod
    def from_conv(cls, conv: Any, k: int, hybrid_r: int) -> "ConvUp":
        """Regroup the B of PEFT's plain LoRA, a 1x1 convolution of weight `[O, r, 1, ...]`."""
        B, bias = conv.weight.detach(), None if conv.bias is None else conv.bias.detach().clone()
        return cls(*cls.read(B.flatten(1), k, hybrid_r), bias, dims=B.ndim - 2)

    def forward(self, g: Tensor) -> Tensor:
        """Exchanged sub-ranks and hybrid part, `[..., k * r_g + hybrid_r, *space]` -> `[..., O, *space]`."""
        channels = g.ndim - self.dims - 1
        return super().forward(g.movedim(channels, -1)).movedim(-1, channels)


class GranularConv(GraloraLayer):
    """Mixin over PEFT's `lora.Conv1d`, `lora.Conv2d` and `lora.Conv3d`, whose factors are convolutions."""

    peft_class = Conv1d, lora.Conv2d, lora.Conv3d
    linear_factors = False

    def read_factors(self, adapter_name: str, k: int, hybrid_r: int) -> None:
        A, B = self.lora_A[adapter_name], self.lora_B[adapter_name]
        down = ConvDown.from_conv(A, self.get_base_layer(), k, hybrid_r)
        up = ConvUp.from_conv(B, k, hybrid_r)
        self.lora_A[adapter_name] = down.requires_grad_(A.weight.requires_grad)
        self.lora_B[adapter_name] = up.requires_grad_(B.weight.requires_grad)

    def factors(self, adapter: str) -> Factors:
        """Return the factors of the linear map of patches, with channels times kernel positions as input features."""
        A, B, hybrid_A, hybrid_B, scaling = super().factors(adapter)
        return Factors(A.flatten(1, -2), B, None if hybrid_A is None else hybrid_A.flatten(1), hybrid_B, scaling)

    def as_weight(self, matrix: Tensor) -> Tensor:
        """`[O, I * P]` -> `[O, I, *kernel]`."""
        return matrix.unflatten(1, (-1, *self.get_base_layer().kernel_size))

    def as_matrix(self, weight: Tensor) -> Tensor:
        """`[O, I, *kernel]` -> `[O, I * P]`."""
        return weight.flatten(1)

    def plain_lora(self, adapter: str, rank: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the equal plain LoRA's factors, `[rank, I, *kernel]` and `[O, rank, 1, ...]`."""
        A, B = super().plain_lora(adapter, rank)
        kernel = self.get_base_layer().kernel_size
        return A.unflatten(1, (-1, *kernel)), B.unflatten(1, (-1, *[1] * len(kernel)))

    @classmethod
    def names_saved(cls, tensor: str, ndim: int) -> str:
        """Recognise a factor with more than three dimensions; `target_parameters` tells experts' factors apart."""
        return "a convolution's factor" if tensor.endswith(".lora_A.weight") and ndim > 3 else ""

    factor_modules = ConvDown, ConvUp

    def fused_call(self, x: Tensor) -> "ConvCall | None":  # type: ignore[override]
        """The operation that computes this layer for x `[N, I, *space]`, or None where PEFT's forward is needed."""
        setting = setting_of(self, x)
        if setting is None or torch.compiler.is_compiling() or x.dim() != len(self.get_base_layer().kernel_size) + 2:
            return None
        names, dtype, autocast = setting
        adapters = adapters_of(self, names, None if autocast else dtype)
        if not adapters:
            return None
        down = self.lora_A[names[0]]
        return ConvCall(self.base_layer, adapters, dtype, down.geometry, down.pad)

    def mixed_output(self, x: Tensor, adapter_names: Any) -> None:
        return None


class ConvCall(NamedTuple):
    """One operation that computes an adapted convolution: `call(x)` is the layer's output.

    Attributes:
        base: the base layer, which is called.
        adapters: the active ones, each of which adds its output.
        dtype: what they are computed in.
        geometry, pad: of the layer; see `geometry_of`.
    """

    base: nn.Module
    adapters: list[Adapter]
    dtype: torch.dtype
    geometry: Geometry
    pad: Any

    @property
    def weight(self) -> None:
        """None, since the base layer is called: no operation of several layers takes this one in."""
        return None

    def __call__(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if type(self.base).forward not in FORWARDS or is_view(y) or has_hooks(self.base):
            y = y.clone()  # must be nobody else's, nor kept for the backward
        for factors, p, _ in self.adapters:
            seen = nn.functional.dropout(x, p) if p else x
            y = conv_update(y, padded(seen.to(self.dtype), self.pad), factors, self.geometry)
        return y


def geometry_of(base: Any) -> tuple[Geometry, tuple[list[int], str] | None]:
    """How the kernel of a convolution moves, and what x is padded with before: arguments of `padded`, or None.

    Padding that is not of zeros, or not the same on both sides, is done before, as torch's own layers do it.
    """
    padding, pad = base.padding, None
    if padding == "valid":
        padding = (0,) * len(base.kernel_size)
    elif padding == "same":
        sizes = reversed_padding(base)[::-1]  # right and left of each axis, in their order
        if sizes[::2] == sizes[1::2]:
            padding = tuple(sizes[::2])
        else:
            pad = reversed_padding(base), "constant"
    if base.padding_mode != "zeros":
        pad = reversed_padding(base), base.padding_mode
    return Geometry(base.stride, (0,) * len(base.kernel_size) if pad else padding, base.dilation), pad


def padded(x: Tensor, pad: tuple[list[int], str] | None) -> Tensor:
    return x if pad is None else nn.functional.pad(x, pad[0], mode=pad[1])


def conv_obstacle(base: Any) -> str:
    """Say in words why a convolution cannot be adapted; empty if it can."""
    if base.groups > 1:
        return (
            f"with groups={base.groups}, whose channels are connected only within a group, so that a grid over all "
            "channels could not be merged into its weight"
        )
    if type(base).forward not in FORWARDS:
        return "whose class has a forward of its own, so that it may be another map than its weight's convolution"
    return ""
