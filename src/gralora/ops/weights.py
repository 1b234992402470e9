"""The frozen weight of a base layer: a tensor, or something that a tensor is made from whenever a product needs it."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class PackedWeight(Protocol):
    """A quantised weight, `[O, I]`. Nothing that it is unpacked to is kept: forward and backward unpack it anew."""

    @property
    def shape(self) -> tuple[int, int]:
        """O and I."""

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight as a new tensor `[O, I]`, contiguous, of this dtype."""


@dataclass(frozen=True, eq=False)
class Float8Weight:
    """A weight of 8-bit floats with scales: it is `values * scales`, each scale standing for a block of values.

    Attributes:
        values: `[O, I]`, float8_e4m3fn or float8_e5m2.
        scales: `[ceil(O/a), ceil(I/b)]`, float32.
        block: a and b; `(1, I)` with scales per row, `(O, I)` with one scale.
        quantises_input: whether the layer that holds it multiplies with inputs that are quantised, too.
        transpose_of: the values that these are a transposed view of, if they are one.
    """

    values: Tensor
    scales: Tensor
    block: tuple[int, int]
    quantises_input: bool = False
    transpose_of: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        n_out, n_in = self.values.shape
        return n_out, n_in

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight as a new tensor `[O, I]` of this dtype: the product, rounded once."""
        (n_out, n_in), (a, b) = self.shape, self.block
        w = self.values.to(dtype)  # exact
        scales = self.scales.repeat_interleave(a, 0)[:n_out] if 1 < len(self.scales) < n_out else self.scales
        if scales.shape[1] == 1:
            return w.mul_(scales)
        whole = n_in // b  # blocks; scales repeated over columns would take as much memory as the weight
        w[:, : whole * b].unflatten(1, (whole, b)).mul_(scales[:, :whole, None])
        w[:, whole * b :].mul_(scales[:, whole:])
        return w

    def t(self) -> "Float8Weight":
        """The transposed weight `[I, O]`; a view, only products of FP8 take it."""
        return Float8Weight(self.values.t(), self.scales.t(), self.block[::-1], self.quantises_input, self.values)


Weight = Tensor | PackedWeight


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The weight as a tensor: itself, or unpacked in `dtype`."""
    return weight if isinstance(weight, Tensor) else weight.dense(dtype)
