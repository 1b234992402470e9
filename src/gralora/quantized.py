"""Quantised base layers whose weight our own product computes with, unpacked whenever it is needed.

bitsandbytes' 4-bit layers (QLoRA) unpack their weight, too, for many tokens in the forward and always in the backward;
here the product takes the adapter's output in. For few tokens bitsandbytes multiplies with the packed weight, and the
layer is called as it is.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .ops import PackedWeight, plans
from .ops.torch_seam import parameters_of

MANY_TOKENS = 128  # from which unpacking the weight is faster, forward and backward together; seen on an H200


class FourBitWeight:
    """A weight that bitsandbytes has quantised to nf4 or fp4, its scales quantised in turn or not.

    Args:
        packed: `Params4bit`, with its quantisation state.
    """

    def __init__(self, packed: Any) -> None:
        self.packed, self.state = packed, packed.quant_state
        self.shape = tuple(self.state.shape)

    @plans.falls_back
    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight `[O, I]`, with the bits that bitsandbytes unpacks to in this dtype."""
        packed, state = self.packed.data, self.state
        w = torch.empty(self.shape, dtype=dtype, device=packed.device)
        nested = (state.state2.code, state.state2.absmax, state.offset) if state.nested else None
        plans.kernels_for(w).dequantize_4bit(packed, state.absmax, state.code, state.blocksize, w, nested)
        return w


def packed_weight(base: nn.Module, x: Tensor, dtype: torch.dtype) -> PackedWeight | None:
    """The weight of a quantised layer that our product is to compute with, or None if the layer is to be called.

    Args:
        base: the base layer.
        x: its input, `[..., I]`.
        dtype: what is computed in.
    """
    parameters = parameters_of(base)
    weight: Any = parameters.get("weight")
    bias = parameters.get("bias")
    if type(weight).__name__ != "Params4bit" or not plans.has_kernels(x, dtype):
        return None
    state = weight.quant_state
    if state is None or base.compute_dtype != dtype or x.numel() < MANY_TOKENS * x.shape[-1]:
        return None
    if bias is not None and bias.requires_grad:
        return None
    if state.shape[1] != base.in_features or weight.numel() % 4 or state.nested and state.state2.blocksize != 256:
        return None
    return FourBitWeight(weight)
