"""GraLoRA's two factors as modules that stand where PEFT's LoRA layers keep `lora_A[adapter]` and `lora_B[adapter]`.

They are callables: `lora_B(lora_A(dropout(x)))` is the adapter's output, so every PEFT layer that computes this is
right with them, whatever its base layer. All sizes are read from the tensors; there is no other state to keep in step.
The tensors are three-dimensional also for k = 1, so that a program that only knows plain LoRA refuses them by shape.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import ops
from .ops import reference


class Weights(NamedTuple):
    """The tensors of one factor without a module; attributes as those of `GranularDown` or `GranularUp`."""

    weight: Tensor
    hybrid_weight: Tensor | None = None

    @property
    def gain(self) -> float:
        return 1.0


class GranularDown(nn.Module):
    """The down-projections A and the exchange, with the plain LoRA part A_s beside them.

    Attributes:
        weight: A, `[k, I/k, r_g]`.
        hybrid_weight: A_s, `[hybrid_r, I]`, or None for a pure GraLoRA.
    """

    weight: nn.Parameter
    hybrid_weight: nn.Parameter | None

    def __init__(self, weight: Tensor, hybrid_weight: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.register_parameter("hybrid_weight", None if hybrid_weight is None else nn.Parameter(hybrid_weight))

    @classmethod
    def from_linear(cls, linear: nn.Linear, k: int, hybrid_r: int, gain: float = 1.0) -> "GranularDown":
        """Read the A of a plain LoRA, `[r, I]`, as GraLoRA factors of as many elements: nothing is drawn anew.

        Args:
            linear: PEFT's freshly initialised `lora_A[adapter]`.
            k: blocks per side.
            hybrid_r: rows that stay plain LoRA.
            gain: factor on A: sqrt(k) turns Kaiming's bound 1/sqrt(I) into the 1/sqrt(I/k) of a block.
        """
        return cls(*cls.read(linear.weight.detach(), k, hybrid_r, gain))

    @staticmethod
    def read(A: Tensor, k: int, hybrid_r: int, gain: float = 1.0) -> Weights:
        """A plain LoRA's A, `[..., r, I]` -> `[..., k, I/k, r_g]` and `[..., hybrid_r, I]`; see `from_linear`."""
        hybrid, grid = A.split([hybrid_r, A.shape[-2] - hybrid_r], dim=-2)
        grid = (gain * grid.mT).unflatten(-2, (k, -1)).contiguous()
        return Weights(grid, hybrid.clone() if hybrid_r else None)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., I]` -> exchanged sub-ranks and hybrid part, `[..., k * r_g + hybrid_r]`."""
        g = reference.down(x, self.weight)
        if self.hybrid_weight is None:
            return g
        return torch.cat([g, nn.functional.linear(x, self.hybrid_weight)], dim=-1)

    def extra_repr(self) -> str:
        k, chunk, r_g = self.weight.shape
        hybrid_r = 0 if self.hybrid_weight is None else self.hybrid_weight.shape[0]
        return f"in={k * chunk}, k={k}, r={r_g + hybrid_r}, hybrid_r={hybrid_r}"


class GranularUp(nn.Module):
    """The up-projections B, with the plain LoRA part B_s beside them.

    Attributes:
        weight: B, `[k, r_g, O/k]`.
        hybrid_weight: B_s, `[O, hybrid_r]`, or None for a pure GraLoRA.
        bias: `[O]` with PEFT's `lora_bias=True`, else None.
        gralora_scaling: as in the config; what it multiplies the output by, on top of PEFT's scaling, is `gain`.
    """

    weight: nn.Parameter
    hybrid_weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, hybrid_weight: Tensor | None = None, bias: Tensor | None = None) -> None:
        super().__init__()
        self.gralora_scaling = "lora"
        self.weight = nn.Parameter(weight)
        self.register_parameter("hybrid_weight", None if hybrid_weight is None else nn.Parameter(hybrid_weight))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))

    @classmethod
    def from_linear(cls, linear: nn.Linear, k: int, hybrid_r: int) -> "GranularUp":
        """Read the B of a plain LoRA, `[O, r]`, as GraLoRA factors; see `GranularDown.from_linear`."""
        bias = None if linear.bias is None else linear.bias.detach().clone()
        return cls(*cls.read(linear.weight.detach(), k, hybrid_r), bias)

    @staticmethod
    def read(B: Tensor, k: int, hybrid_r: int) -> Weights:
        """A plain LoRA's B, `[..., O, r]` -> `[..., k, r_g, O/k]` and `[..., O, hybrid_r]`; see `from_linear`."""
        hybrid, grid = B.split([hybrid_r, B.shape[-1] - hybrid_r], dim=-1)
        grid = grid.unflatten(-2, (k, -1)).mT.contiguous()
        return Weights(grid, hybrid.contiguous() if hybrid_r else None)

    @property
    def gain(self) -> float:
        k, r_g, _ = self.weight.shape[-3:]
        hybrid_r = 0 if self.hybrid_weight is None else self.hybrid_weight.shape[-1]
        return scaling_gain(self.gralora_scaling, k, r_g, hybrid_r)

    def forward(self, g: Tensor) -> Tensor:
        """Exchanged sub-ranks and hybrid part, `[..., k * r_g + hybrid_r]` -> `[..., O]`."""
        k, r_g, _ = self.weight.shape
        y = reference.up(g[..., : k * r_g], self.weight)
        if self.hybrid_weight is not None:
            y = y + nn.functional.linear(g[..., k * r_g :], self.hybrid_weight)
        y = y if self.gain == 1 else self.gain * y
        return y if self.bias is None else y + self.bias  # PEFT merges a bias without the gain

    def extra_repr(self) -> str:
        k, r_g, chunk = self.weight.shape
        hybrid_r = 0 if self.hybrid_weight is None else self.hybrid_weight.shape[1]
        return f"out={k * chunk}, k={k}, r={r_g + hybrid_r}, hybrid_r={hybrid_r}, bias={self.bias is not None}"


def delta_weight(down: GranularDown | Weights, up: GranularUp | Weights, scaling: float | Tensor) -> Tensor:
    """dW = scaling * gain * (grid + B_s A_s), `[O, I]`, in float32 for factors of half precision, else in their dtype.

    Half-precision factors are multiplied in float32, so that merging rounds once, when the sum is stored.
    """
    dtype = torch.promote_types(up.weight.dtype, torch.float32)
    scaling = float(scaling) * up.gain  # a tensor after prepare_model_for_compiled_hotswap
    dW = ops.delta_weight(down.weight.to(dtype), up.weight.to(dtype), scaling)
    if down.hybrid_weight is not None and up.hybrid_weight is not None:
        dW.addmm_(up.hybrid_weight.to(dtype), down.hybrid_weight.to(dtype), alpha=scaling)
    return dW


def kaiming_gain(k: int, init_lora_weights: bool | str) -> float:
    """Factor from LoRA's initial A to GraLoRA's: a block's fan-in is I/k; "gaussian" does not depend on fan-in."""
    return 1.0 if init_lora_weights == "gaussian" else math.sqrt(k)


def scaling_gain(gralora_scaling: str, k: int, r_g: int, hybrid_r: int) -> float:
    """Factor on PEFT's scaling: 1, or for "matched" sqrt(r / (r_g / k + hybrid_r)) with r = r_g + hybrid_r.

    r_g / k + hybrid_r ranks meet in one entry of dW, where LoRA has r; docs/scaling.md derives the root.
    """
    return 1.0 if gralora_scaling == "lora" else math.sqrt((r_g + hybrid_r) / (r_g / k + hybrid_r))
