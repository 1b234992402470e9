"""Dropout that keeps no mask: the mask is a function of a seed, and drawn again where it is needed again."""

import torch
from torch import Tensor

from . import plans
from .layout import rows


def draw_seed(x: Tensor) -> Tensor:
    """A seed, int64 `[]` on the device of x, from torch's default generator there."""
    return torch.randint(2**63 - 1, (), device=x.device)


def dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """x with elements set to zero with probability p, the others divided by 1 - p.

    Which ones depends on seed, shape and device alone, so the gradient of this is this, applied to the gradient.

    Args:
        x: `[T, I]`, any dtype.
        p: probability, 0 to 1.
        seed: int64 `[]`, on the device of x; read on the host where there is no kernel.
    """
    return plans.kernels_for(x).dropout(x, p, seed)


def dropout_mask(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """What `dropout` multiplies x `[..., I]` with, 0 or 1 / (1 - p)."""
    return dropout(torch.ones_like(rows(x)), p, seed).view_as(x)
