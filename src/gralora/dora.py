"""DoRA (arXiv 2402.09353) on GraLoRA: W' = m (W + dW) / |W + dW|, with a norm per output row and m trained.

PEFT's `DoraLinearVariant` works through the layer's own lora_A, lora_B and get_delta_weight. Only its magnitude module
reads the factors, and expects two matrices. The module here reads a grid and computes the norms without forming dW.
"""

import torch
from torch import Tensor, nn

from .blocks import GranularDown, GranularUp, blocks_of_A, blocks_of_B
from .seam import DoraLinearLayer


class GranularDora(DoraLinearLayer):
    """PEFT's magnitude module, reading the factors of a grid.

    Attributes:
        weight: m, `[O]`.
    """

    @classmethod
    def from_linear(
        cls, stock: DoraLinearLayer, base_layer: nn.Module, down: GranularDown, up: GranularUp, scaling: float
    ) -> "GranularDora":
        """Make the module with m = |W + dW|, so that W' starts as W + dW; device and dtype are those of `stock`."""
        dora = cls(stock.fan_in_fan_out)
        weight = dora.base_weight(base_layer).to(stock.weight.device)
        dora.weight = nn.Parameter(row_norms(weight, down, up, scaling).to(stock.weight.dtype))
        return dora.requires_grad_(stock.weight.requires_grad)

    def base_weight(self, base_layer: nn.Module) -> Tensor:
        """W, `[O, I]`."""
        weight = base_layer.weight.detach()
        return weight.T if self.fan_in_fan_out else weight

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        lora_A: GranularDown,
        lora_B: GranularUp,
        scaling: float | Tensor,
        base_layer: nn.Module,
        base_result: Tensor | None = None,
        adapter_name: str = "default",
    ) -> Tensor:
        """Compute what DoRA adds to the base layer's output; see `DoraLinearLayer.forward`.

        Args:
            x: `[..., I]`, after dropout.
            base_result: output of the base layer for `x`, or None if dropout changed `x`.
        """
        weight = self.base_weight(base_layer)
        norm = row_norms(weight, lora_A, lora_B, scaling)  # a constant for the gradient, as in section 4.3 of DoRA
        gain = (self.weight / norm).to(x.dtype)
        if base_result is None:
            base_result = nn.functional.linear(x, weight.to(x.dtype))
        elif base_layer.bias is not None:
            base_result = base_result - base_layer.bias
        return (gain - 1) * base_result + gain * (scaling * lora_B(lora_A(x)))


@torch.no_grad()
def row_norms(weight: Tensor, down: GranularDown, up: GranularUp, scaling: float | Tensor) -> Tensor:
    """Compute |W + dW| for every output row, `[O]`, in float32 at least, without forming dW.

    Let dW = s (G + H), where G is the grid and H the hybrid part. The square of the norm is

        |W|^2 + s <2 W + s H, H> + s <2 W + 2 s H + s G, G>,

    where every product with H = B_s A_s, or with a block b a^T of G, goes through the ranks. The output blocks are
    computed one by one, so that only one block of W at a time is held in float32.

    Args:
        weight: W, `[O, I]`.
        down, up: the factors.
        scaling: s, without the gain of `up`.
    """
    scaling = scaling * up.gain
    dtype = torch.promote_types(weight.dtype, torch.float32)
    k = down.weight.shape[0]
    a = blocks_of_A(down.weight.to(dtype)).mT  # [k_j, k_i, I/k, q]
    b = blocks_of_B(up.weight.to(dtype))  # [k_j, k_i, O/k, q]
    squares = []
    for j, W in enumerate(weight.chunk(k)):
        W = W.to(dtype)
        square = W.square().sum(1)
        W_a = W.unflatten(1, (k, -1)).transpose(0, 1) @ a[j]  # [k_i, O/k, q]
        if down.hybrid_weight is not None and up.hybrid_weight is not None:
            A, B = down.hybrid_weight.to(dtype), up.hybrid_weight.to(dtype).chunk(k)[j]
            square += scaling * ((2 * W @ A.T + scaling * B @ (A @ A.T)) * B).sum(1)
            W_a += scaling * B @ (A.unflatten(1, (k, -1)).transpose(0, 1) @ a[j])
        square += scaling * ((2 * W_a + scaling * b[j] @ (a[j].mT @ a[j])) * b[j]).sum((0, 2))
        squares.append(square)
    return torch.cat(squares).clamp(min=0).sqrt()
