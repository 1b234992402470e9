"""What an implementation of the adapter's operations provides: the contract of a kernel module.

`batched` (torch) and `kernels` (Triton) are `Kernels`; `batched` and `hopper` are a `Product` of tensors, `fp8` and
`fp8_hopper` one of a `Float8Weight`. To add one for another GPU, write a module with these functions and name it in a
row of `architectures.ARCHITECTURES`, and in a line for type checkers at the top of `plans`, with which
`make typecheck` compares the functions with those here.

All tensors of a call are on one device. `x` and `dy` have unit stride along their last dimension, and are `[T, n]` or
contiguous `[..., n]` (`layout.contiguous_or_rows`). Factors may have any strides and any float dtype; the dtype of x
is what is computed in. Letters are those of `reference`.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar

from torch import Tensor

from .layout import Layout


class KernelUnavailable(RuntimeError):
    """A kernel cannot run with this Triton on this GPU, which is known before anything is launched.

    Attributes:
        module: of `gralora.ops`, which implements `Kernels` or `Product` with it.
    """

    def __init__(self, message: str, module: str) -> None:
        super().__init__(message)
        self.module = module


class Conversion(NamedTuple):
    """Copy `source` to `target`, of the same shape and another dtype."""

    source: Tensor
    target: Tensor


class FactorGradients(NamedTuple):
    """Two gradients of factors, to be computed by the launch of a product: z_i^T g_i and x_i^T h_i, block by block.

    Attributes:
        z: `[T, O]` as x, O being the output features of the product.
        h: `[k, T, R]`, contiguous, dtype of x.
        z_grad: written: `[k, O/k, R]`, any float dtype, contiguous or the transpose of a contiguous tensor.
        x_grad: written: `[k, I/k, R]`, likewise.
    """

    z: Tensor
    h: Tensor
    z_grad: Tensor
    x_grad: Tensor


class Kernels(Protocol):
    """The adapter's operations besides the base layer's product."""

    def down(self, x: Tensor, A: Tensor, h: int, scaling: float, convert: Conversion | None = None) -> Tensor:
        """Project x down, exchange the sub-ranks, and scale.

        Args:
            x: `[T, I]`.
            A: `[k, I/k, R]`.
            h: number of A's last columns that are the plain LoRA part, whose result is not exchanged.
            scaling: factor on the result.
            convert: what else to copy, in the same launch where that is possible.

        Returns:
            g `[k, T, R]`, contiguous, dtype of x.
        """

    def downs(
        self,
        x: Tensor,
        As: Sequence[Tensor],
        h: int,
        scalings: Sequence[float],
        converts: Sequence[Conversion | None],
    ) -> list[Tensor]:
        """`down` of one x by several factors, with what else to copy for each: as many g."""

    def gated(self, e: Tensor, u: Tensor, activation: str, hidden: Tensor) -> None:
        """Write hidden = act(e) * u.

        Args:
            e, u: `[..., F]`, with unit stride along F and one stride from row to row, the same for both.
            activation: a name of `activations.ACTIVATIONS`.
            hidden: written: `[..., F]`, contiguous, dtype of e.
        """

    def gated_backward(self, e: Tensor, u: Tensor, d_hidden: Tensor, activation: str, de: Tensor, du: Tensor) -> None:
        """Write the gradients of e and u from that of hidden.

        Args:
            e, u, activation: as of `gated`.
            d_hidden: `[..., F]`, contiguous, dtype of e.
            de, du: written: as e and u, with a stride of their own; du may be d_hidden.
        """

    def up(self, g: Tensor, B: Tensor, y: Tensor) -> None:
        """Add up(g, B) to y in place: g `[k, T, R]` contiguous, B `[k, R, O/k]`, y `[T, O]` of any float dtype."""

    def factor_gradients(
        self,
        x: Tensor,
        dy: Tensor,
        g: Tensor,
        dh: Tensor,
        dA: Tensor | None,
        dB: Tensor | None,
        A: Tensor | None = None,
        dx: Tensor | None = None,
    ) -> None:
        """Write dA = x_i^T dh_i and dB = g_j^T dy_j, and add up(dh, A^T) to dx; None is not computed.

        Args:
            x, dy: `[T, I]`, `[T, O]`; one dtype.
            g, dh: `[k, T, R]`, contiguous, dtype of x.
            dA, dB: written: `[k, I/k, R]` and `[k, R, O/k]`, any float dtypes, each contiguous or the transpose of a
                contiguous tensor.
            A: `[k, I/k, R]`; needed with dx.
            dx: changed in place: `[T, I]`.
        """

    def dropout(self, x: Tensor, p: float, seed: Tensor) -> Tensor:
        """x `[T, I]` with elements set to zero with probability p, the others divided by 1 - p.

        Which ones depends on the seed (int64 `[]`), the shape and the device alone.
        """

    def delta_weight(self, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        """`reference.delta_weight` of contiguous float32 factors."""

    def dequantize_4bit(
        self,
        packed: Tensor,
        absmax: Tensor,
        code: Tensor,
        blocksize: int,
        w: Tensor,
        nested: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> None:
        """Unpack a weight that bitsandbytes has quantised to 4 bits.

        Args:
            packed: two values per byte, the first in its high bits; uint8, contiguous, its address a multiple of 4.
            absmax: one scale for each block of `blocksize` values: float32, or uint8 with `nested`.
            code: the 16 values that 4 bits stand for, float32.
            blocksize: a multiple of 8.
            w: written, with as many elements as there are values, a multiple of 8; contiguous, any float dtype.
            nested: set if the scales are quantised in turn: the 256 values that a byte stands for, one scale for each
                256 of the scales, and `[]`, an offset that is added to all; float32.
        """


WeightT = TypeVar("WeightT", contravariant=True)


class Product(Protocol[WeightT]):
    """The base layer's product with the adapter's output in it, for weights of one type."""

    def takes(self, x: Layout, weight: Layout, B: Layout, device: int, z: Layout | None = None) -> bool:
        """Whether it can compute with operands that lie like this, and is faster there than torch's product.

        Args:
            x, weight, B: `[T, I]`, `[O, I]` and `[k, R, O/k]`, all of one dtype of half precision.
            device: index of the GPU.
            z: of `FactorGradients`, if the same launch is to compute those.
        """

    def reads(self, x: Tensor) -> bool:
        """Whether x `[T, n]`, or contiguous `[..., n]`, can be an operand where it lies; if not, it is copied."""

    def linear(
        self,
        y: Tensor,
        x: Tensor,
        weight: WeightT,
        bias: Tensor | None,
        g: Tensor,
        B: Tensor,
        gradients: FactorGradients | None = None,
        adds: bool = False,
    ) -> None:
        """Write y = x W^T + bias + up(g, B), and `gradients` if they are given.

        Args:
            y: written: `[..., O]`, contiguous, dtype of x.
            x: `[T, I]`.
            weight: `[O, I]`, dtype of x if it is a tensor.
            adds: whether all that is added to what y holds, instead of overwriting it; not with a bias.
            bias: `[O]`, any float dtype, or None.
            g: `[k, T, R]`, contiguous, dtype of x.
            B: `[k, R, O/k]`, dtype of x.
        """
