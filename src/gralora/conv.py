"""GraLoRA of convolutions, with blocks over input and output channels.

A convolution is a linear map of patches, `[I * P]` for `I` channels and `P` kernel positions, and GraLoRA puts its
grid on this linear map. A_i convolves the i-th chunk of channels with the layer's kernel size, stride, padding and
dilation. The sub-ranks are exchanged at every position, and B_j is a 1x1 convolution. dW has the layout of the weight,
`[O, I, *kernel]`.
"""

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn

from .blocks import GranularDown, GranularUp
from .layers import GraloraLayer
from .ops import Factors
from .ops.torch_seam import reversed_padding
from .seam import Conv1d

CONVOLUTIONS = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)


class ConvDown(GranularDown):
    """The down-projections A as one grouped convolution, and the exchange.

    Attributes:
        weight: A, `[k, I/k, *kernel, r_g]`: the linear factors, with channels and positions of a patch kept apart.
        hybrid_weight: A_s, `[hybrid_r, I, *kernel]`, or None for a pure GraLoRA.
    """

    def __init__(self, weight: Tensor, hybrid_weight: Tensor | None, base: Any) -> None:
        """Take the attributes, and in `base` the adapted nn.Conv1d, nn.Conv2d or nn.Conv3d."""
        super().__init__(weight, hybrid_weight)
        self.options = {"stride": base.stride, "padding": base.padding, "dilation": base.dilation}
        self.pad: tuple[list[int], str] | None = None
        if base.padding_mode != "zeros":  # as nn.Conv2d does it
            self.pad = reversed_padding(base), base.padding_mode
            self.options["padding"] = 0

    @classmethod
    def from_conv(cls, conv: Any, base: Any, k: int, hybrid_r: int) -> "ConvDown":
        """Regroup the A of PEFT's plain LoRA, weight `[r, I, *kernel]`; see `GranularDown.from_linear`."""
        A = conv.weight.detach()
        grid, hybrid = cls.read(A.flatten(1), k, hybrid_r)
        grid = grid.unflatten(1, (A.shape[1] // k, *A.shape[2:]))
        return cls(grid, None if hybrid is None else hybrid.unflatten(1, A.shape[1:]), base)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., I, *space]` -> exchanged sub-ranks and hybrid part, `[..., k * r_g + hybrid_r, *space']`."""
        if self.pad is not None:
            x = nn.functional.pad(x, self.pad[0], mode=self.pad[1])
        k, r_g, dims = self.weight.shape[0], self.weight.shape[-1], self.weight.ndim - 3
        convolve = CONVOLUTIONS[dims - 1]
        h = convolve(x, self.weight.movedim(-1, 1).flatten(0, 1), groups=k, **self.options)
        channels = h.ndim - dims - 1
        g = h.unflatten(channels, (k, k, r_g // k)).transpose(channels, channels + 1).flatten(channels, channels + 2)
        if self.hybrid_weight is None:
            return g
        return torch.cat([g, convolve(x, self.hybrid_weight, **self.options)], dim=channels)

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

    def fused_call(self, x: Tensor) -> None:
        return None

    def mixed_output(self, x: Tensor, adapter_names: Any) -> None:
        return None


def conv_obstacle(base: Any) -> str:
    """Say in words why a convolution cannot be adapted; empty if it can."""
    if base.groups > 1:
        return (
            f"with groups={base.groups}, whose channels are connected only within a group, so that a grid over all "
            "channels could not be merged into its weight"
        )
    if type(base).forward not in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward):
        return "whose class has a forward of its own, so that it may be another map than its weight's convolution"
    return ""
