"""Quantised base layers whose weight our own product computes with, unpacked whenever it is needed.

A kind of layer is a function here, and a row of READERS. Libraries' own layers may keep the unpacked weight for the
backward, as torchao's FP8 layers do; ours never do. bitsandbytes' 8-bit layers round their input to 8 bits besides,
except where it trains on CPUs; in training they are computed as there, everywhere.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .ops import Float8Weight, PackedWeight, plans
from .ops.torch_seam import parameters_of

MANY_TOKENS = 128  # from which unpacking 4 bits is faster, forward and backward together; seen on an H200


class FourBitWeight:
    """A weight that bitsandbytes has quantised to nf4 or fp4, its scales quantised in turn or not.

    Args:
        packed: its numbers, of any dtype.
        state: bitsandbytes' quantisation state of them.
    """

    def __init__(self, packed: Tensor, state: Any) -> None:
        self.packed, self.state = packed, state
        self.shape = tuple(self.state.shape)

    @plans.falls_back
    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight `[O, I]`, with the bits that bitsandbytes unpacks to in this dtype."""
        packed, state = self.packed.data, self.state
        w = torch.empty(self.shape, dtype=dtype, device=packed.device)
        nested = (state.state2.code, state.state2.absmax, state.offset) if state.nested else None
        plans.kernels_for(w).dequantize_4bit(packed, state.absmax, state.code, state.blocksize, w, nested)
        return w


class EightBitWeight:
    """A weight that bitsandbytes has quantised to 8 bits, with one scale for each row.

    Args:
        numbers: `[O, I]`, int8.
        scales: `[O]`, float32: what 127 stands for.
    """

    def __init__(self, numbers: Tensor, scales: Tensor) -> None:
        self.numbers, self.scales = numbers, scales
        self.shape = (numbers.shape[0], numbers.shape[1])

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight `[O, I]`, in one pass, with the bits that bitsandbytes unpacks to in this dtype."""
        scales = self.scales.unsqueeze(1).mul(1 / 127).to(torch.promote_types(dtype, torch.float32))
        w = torch.empty(self.shape, dtype=dtype, device=self.numbers.device)
        return torch.mul(self.numbers, scales, out=w)


class DequantizedWeight:
    """A weight that its library unpacks: HQQ's by a method of the layer, torchao's by one of the tensor.

    Args:
        owner: has the method `dequantize`.
        shape: O and I.
    """

    def __init__(self, owner: Any, shape: tuple[int, int]) -> None:
        self.owner, self.shape = owner, shape

    @torch.no_grad()
    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight `[O, I]`, in this dtype."""
        return self.owner.dequantize().to(dtype).contiguous()


def _four_bits(base: Any, weight: Any, x: Tensor, dtype: torch.dtype) -> FourBitWeight | None:
    """bitsandbytes multiplies with the packed weight for few tokens, and so is called for these."""
    # FSDP leaves a plain tensor as the weight, and the layer keeps the state
    state = getattr(weight, "quant_state", getattr(base, "quant_state", None))
    if not plans.has_kernels(x, dtype) or state is None or base.compute_dtype != dtype:
        return None
    if x.numel() < MANY_TOKENS * x.shape[-1]:
        return None
    if state.shape[1] != base.in_features or weight.numel() % 4 or state.nested and state.state2.blocksize != 256:
        return None
    return FourBitWeight(weight, state)


def torchao_float8(weight: Any) -> Float8Weight:
    """torchao's `Float8Tensor` `[O, I]`, which shares its memory."""
    return Float8Weight(weight.qdata, weight.scale, tuple(weight.block_size), weight.act_quant_kwargs is not None)


def fine_grained_float8(base: Any) -> Float8Weight | None:
    """The weight of transformers' `FP8Linear`, which shares its memory; None if it holds no 8-bit floats."""
    values, scales = base.weight, base.weight_scale_inv
    if values.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        return None
    block = tuple(values.shape) if base.block_size is None else tuple(base.block_size)
    scales = scales.detach().float().reshape(-(-values.shape[0] // block[0]), -1)
    return Float8Weight(values.detach(), scales, block, quantises_input=True)  # type: ignore[arg-type]


def _is_trained(base: Any, x: Tensor, dtype: torch.dtype) -> bool:
    """Libraries have products of their own for inference, and differ in the dtype that they return under autocast."""
    return base.training and x.dtype == dtype


def _eight_bits(base: Any, weight: Any, x: Tensor, dtype: torch.dtype) -> EightBitWeight | None:
    state = base.state
    numbers, scales = (state.CB, state.SCB) if weight.CB is None else (weight.CB, weight.SCB)
    if not _is_trained(base, x, dtype) or state.has_fp16_weights or numbers is None or scales is None:
        return None
    return EightBitWeight(numbers, scales) if numbers.device == x.device else None


def _torchao_int8(base: Any, weight: Any, x: Tensor, dtype: torch.dtype) -> DequantizedWeight | None:
    if not _is_trained(base, x, dtype) or weight.requires_grad:
        return None
    return DequantizedWeight(weight, (weight.shape[0], weight.shape[1]))


def _hqq(base: Any, weight: Any, x: Tensor, dtype: torch.dtype) -> DequantizedWeight | None:
    if not _is_trained(base, x, dtype) or base.compute_dtype != dtype:
        return None
    return DequantizedWeight(base, (base.out_features, base.in_features))


# Name of the class of a layer's weight, or of the layer -> (layer, weight, its input `[..., I]`, the dtype that is
# computed in) -> the weight that our product computes with; None if the layer is to be called.
Read = Callable[[Any, Any, Tensor, torch.dtype], PackedWeight | None]
READERS: Mapping[str, Read] = {
    "Params4bit": _four_bits,
    "Linear4bit": _four_bits,
    "Int8Params": _eight_bits,
    "Int8Tensor": _torchao_int8,
    "HQQLinear": _hqq,
    "Float8Tensor": lambda base, weight, x, dtype: torchao_float8(weight),
    "FP8Linear": lambda base, weight, x, dtype: fine_grained_float8(base),
}


def holds_float8(base: nn.Module) -> bool:
    """Whether a layer's weight is one of those in FP8 that have a reader."""
    return type(parameters_of(base).get("weight")).__name__ == "Float8Tensor" or type(base).__name__ == "FP8Linear"


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
    read = READERS.get(type(weight).__name__) or READERS.get(type(base).__name__)
    if read is None or bias is not None and bias.requires_grad:
        return None
    return read(base, weight, x, dtype)
