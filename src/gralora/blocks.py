"""GraLoRA's two factors as modules that stand where PEFT's LoRA layers keep `lora_A[adapter]` and `lora_B[adapter]`.

They are callables: `lora_B(lora_A(dropout(x)))` is the adapter's output, so every PEFT layer that computes this is
right with them, whatever its base layer. All sizes are read from the tensors; there is no other state to keep in step.
The tensors are three-dimensional also for k = 1, so that a program that only knows plain LoRA refuses them by shape.
"""

import math

import torch
from torch import Tensor, nn

from . import ops
from .ops import Factors, reference


class GridFactor(nn.Module):
    """What the two factors have in common: a grid's tensor, the plain LoRA part's beside it, and their sizes.

    Attributes:
        weight: of the grid.
        hybrid_weight: of the plain LoRA part, or None for a pure GraLoRA.
    """

    experts = 0  # 1 where both tensors have a dimension of experts in front

    weight: nn.Parameter
    hybrid_weight: nn.Parameter | None

    def __init__(self, weight: Tensor, hybrid_weight: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.register_parameter("hybrid_weight", None if hybrid_weight is None else nn.Parameter(hybrid_weight))

    @property
    def k(self) -> int:
        """Blocks per side."""
        return self.weight.shape[self.experts]

    @property
    def r_g(self) -> int:
        """Rank of the grid."""
        raise NotImplementedError

    @property
    def hybrid_r(self) -> int:
        """Rank of the plain LoRA part."""
        raise NotImplementedError

    def features(self) -> str:
        """The number of features, and what the tensors have besides, for `repr`."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        experts = f"experts={self.weight.shape[0]}, " if self.experts else ""
        return f"{experts}{self.features()}, k={self.k}, r={self.r_g + self.hybrid_r}, hybrid_r={self.hybrid_r}"


class GranularDown(GridFactor):
    """The down-projections A and the exchange, with the plain LoRA part A_s beside them.

    Attributes:
        weight: A, `[k, I/k, r_g]`.
        hybrid_weight: A_s, `[hybrid_r, I]`, or None for a pure GraLoRA.
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear, k: int, hybrid_r: int) -> "GranularDown":
        """Regroup the A of a plain LoRA, `[r, I]`, as GraLoRA factors of as many elements: nothing is drawn anew.

        Args:
            linear: PEFT's freshly initialised `lora_A[adapter]`.
            k: blocks per side.
            hybrid_r: rows that stay plain LoRA.
        """
        return cls(*cls.read(linear.weight.detach(), k, hybrid_r))

    @staticmethod
    def read(A: Tensor, k: int, hybrid_r: int) -> tuple[Tensor, Tensor | None]:
        """A plain LoRA's A, `[..., r, I]` -> `[..., k, I/k, r_g]` and `[..., hybrid_r, I]`; see `from_linear`."""
        hybrid, grid = A.split([hybrid_r, A.shape[-2] - hybrid_r], dim=-2)
        grid = grid.mT.unflatten(-2, (k, -1)).clone(memory_format=torch.contiguous_format)
        return grid, hybrid.clone() if hybrid_r else None

    @property
    def r_g(self) -> int:
        return self.weight.shape[-1]

    @property
    def hybrid_r(self) -> int:
        return 0 if self.hybrid_weight is None else self.hybrid_weight.shape[self.experts]

    def forward(self, x: Tensor) -> Tensor:
        """`[..., I]` -> exchanged sub-ranks and hybrid part, `[..., k * r_g + hybrid_r]`."""
        g = reference.down(x, self.weight)
        if self.hybrid_weight is None:
            return g
        return torch.cat([g, nn.functional.linear(x, self.hybrid_weight)], dim=-1)

    def features(self) -> str:
        return f"in={self.k * self.weight.shape[self.experts + 1]}"


class GranularUp(GridFactor):
    """The up-projections B, with the plain LoRA part B_s beside them.

    Attributes:
        weight: B, `[k, r_g, O/k]`.
        hybrid_weight: B_s, `[O, hybrid_r]`, or None for a pure GraLoRA.
        bias: `[O]` with PEFT's `lora_bias=True`, else None.
        gralora_scaling: as in the config; what it multiplies the output by, on top of PEFT's scaling, is `gain`.
    """

    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, hybrid_weight: Tensor | None = None, bias: Tensor | None = None) -> None:
        super().__init__(weight, hybrid_weight)
        self.gralora_scaling = "lora"
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))

    @classmethod
    def from_linear(cls, linear: nn.Linear, k: int, hybrid_r: int) -> "GranularUp":
        """Regroup the B of a plain LoRA, `[O, r]`, as GraLoRA factors; see `GranularDown.from_linear`."""
        bias = None if linear.bias is None else linear.bias.detach().clone()
        return cls(*cls.read(linear.weight.detach(), k, hybrid_r), bias)

    @staticmethod
    def read(B: Tensor, k: int, hybrid_r: int) -> tuple[Tensor, Tensor | None]:
        """A plain LoRA's B, `[..., O, r]` -> `[..., k, r_g, O/k]` and `[..., O, hybrid_r]`; see `from_linear`."""
        hybrid, grid = B.split([hybrid_r, B.shape[-1] - hybrid_r], dim=-1)
        grid = grid.unflatten(-2, (k, -1)).mT.contiguous()
        return grid, hybrid.contiguous() if hybrid_r else None

    @property
    def r_g(self) -> int:
        return self.weight.shape[-2]

    @property
    def hybrid_r(self) -> int:
        return 0 if self.hybrid_weight is None else self.hybrid_weight.shape[-1]

    @property
    def gain(self) -> float:
        """The factor that `gralora_scaling` puts on top of PEFT's scaling."""
        return scaling_gain(self.gralora_scaling, self.k, self.r_g, self.hybrid_r)

    def forward(self, g: Tensor) -> Tensor:
        """Exchanged sub-ranks and hybrid part, `[..., k * r_g + hybrid_r]` -> `[..., O]`."""
        k, r_g, _ = self.weight.shape
        y = reference.up(g[..., : k * r_g], self.weight)
        if self.hybrid_weight is not None:
            y = y + nn.functional.linear(g[..., k * r_g :], self.hybrid_weight)
        y = y if self.gain == 1 else self.gain * y
        return y if self.bias is None else y + self.bias  # PEFT merges a bias without the gain

    def features(self) -> str:
        return f"out={self.k * self.weight.shape[-1]}"

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bias={self.bias is not None}"


def delta_weight(factors: Factors) -> Tensor:
    """dW = scaling * (grid + B_s A_s), `[O, I]`, in float32 for factors of half precision, else in their dtype.

    Half-precision factors are multiplied in float32, so that merging rounds once, when the sum is stored.
    """
    A, B, hybrid_A, hybrid_B, scaling = factors
    dtype = torch.promote_types(B.dtype, torch.float32)
    scaling = float(scaling)  # it is a tensor after prepare_model_for_compiled_hotswap
    dW = ops.delta_weight(A.to(dtype), B.to(dtype), scaling)
    if hybrid_A is not None and hybrid_B is not None:
        dW.addmm_(hybrid_B.to(dtype), hybrid_A.to(dtype), alpha=scaling)
    return dW


def blocks_of_A(A: Tensor) -> Tensor:
    """View a grid's A, or its gradient, as those of k x k LoRAs, in PEFT's layout.

    Block (j, i) of dW, output block j and input block i, is `scaling * blocks_of_B(B)[j, i] @ blocks_of_A(A)[j, i]`.

    Args:
        A: `[..., k, I/k, r_g]`.

    Returns:
        `[..., k, k, r_g/k, I/k]`, indexed by j and i.
    """
    return A.unflatten(-1, (A.shape[-3], -1)).movedim(-2, -4).transpose(-2, -1)  # ONNX has no mT


def blocks_of_B(B: Tensor) -> Tensor:
    """View a grid's B `[..., k, r_g, O/k]`, or its gradient, as `[..., k, k, O/k, r_g/k]`; see `blocks_of_A`."""
    return B.unflatten(-2, (B.shape[-3], -1)).transpose(-2, -1)


def split_blocks(matrix: Tensor, k: int) -> Tensor:
    """View `[..., O, I]` as k x k blocks, `[..., k_j, k_i, O/k, I/k]`."""
    return matrix.unflatten(-1, (k, -1)).unflatten(-3, (k, -1)).transpose(-2, -3)


def join_blocks(blocks: Tensor) -> Tensor:
    """The inverse of `split_blocks`, in memory of its own."""
    return blocks.transpose(-2, -3).flatten(-2).flatten(-3, -2)


def transposed(factors: Factors) -> Factors:
    """The factors, as views, of the grid whose dW is the transpose: A and B swap their roles."""
    A, B, hybrid_A, hybrid_B, scaling = factors
    hybrid_A, hybrid_B = (None if t is None else t.mT for t in (hybrid_B, hybrid_A))
    return Factors(B.mT, A.mT, hybrid_A, hybrid_B, scaling)


def scaling_gain(gralora_scaling: str, k: int, r_g: int, hybrid_r: int) -> float:
    """Factor on PEFT's scaling: 1, or for "matched" sqrt(r / (r_g / k + hybrid_r)) with r = r_g + hybrid_r.

    r_g / k + hybrid_r ranks meet in one entry of dW, where LoRA has r; docs/gralora.md derives the root.
    """
    return 1.0 if gralora_scaling == "lora" else math.sqrt((r_g + hybrid_r) / (r_g / k + hybrid_r))
