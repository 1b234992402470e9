"""The frozen weight of a base layer: a tensor, or something that a tensor is made from whenever a product needs it."""

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


Weight = Tensor | PackedWeight


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The weight as a tensor: itself, or unpacked in `dtype`."""
    return weight if isinstance(weight, Tensor) else weight.dense(dtype)
