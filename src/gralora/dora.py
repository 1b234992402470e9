"""DoRA (arXiv 2402.09353): W' = m (W + dW) / |W + dW|, with a norm per output row and m trained.

PEFT's `DoraLinearVariant` works through the layer's own lora_A, lora_B and get_delta_weight. Only its magnitude module
reads the factors, and expects two matrices, from which it forms dW. The modules here compute the norms without:
`GranularDora` of a grid, and `FusedDora` of a plain LoRA that is accelerated. Where one operation can compute the
layer, `dora_linear` does, and the modules hold no more than m.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .blocks import GranularDown, GranularUp, blocks_of_A, blocks_of_B
from .ops import AdaptedLinear, Factors, gralora_linear
from .ops.batched import BMM_WIDENS
from .ops.torch_seam import is_batched, unhooked_parameters
from .promote import Transparent
from .seam import Conv1D, DoraLinearLayer, DoraLinearVariant, dora_is_cached

if TYPE_CHECKING:
    Stock = DoraLinearLayer
else:
    Stock = object


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
        dora.weight = nn.Parameter(row_norms(weight, dora_factors(down, up, scaling)).to(stock.weight.dtype))
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
        norm = row_norms(weight, dora_factors(lora_A, lora_B, scaling))
        update = scaling * lora_B(lora_A(x))
        return rescaled(x, update, self.weight, norm, weight, base_layer.bias, base_result)


class FusedDora(Transparent, Stock):
    """Mixin over PEFT's magnitude module of a linear layer, for a plain LoRA."""

    def forward(self, x: Tensor, *, lora_A: Any, lora_B: Any, scaling: Any, base_layer: Any, **options: Any) -> Tensor:
        """Compute what PEFT's module does, with norms that are computed without dW where the weight can be read."""
        is_ordinary = isinstance(base_layer, nn.Linear | Conv1D) and type(base_layer.weight) is nn.Parameter
        if not is_ordinary or not type(lora_A) is type(lora_B) is nn.Linear or dora_is_cached(self):
            return super().forward(x, lora_A=lora_A, lora_B=lora_B, scaling=scaling, base_layer=base_layer, **options)
        weight = base_layer.weight.detach()
        weight = weight.T if self.fan_in_fan_out else weight
        norm = row_norms(weight, Factors(lora_A.weight, lora_B.weight, scaling=scaling))
        update = scaling * lora_B(lora_A(x))
        return rescaled(x, update, self.weight, norm, weight, base_layer.bias, options.get("base_result"))


def rescaled(
    x: Tensor,
    update: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    base_result: Tensor | None,
) -> Tensor:
    """What DoRA adds to a base layer's output: (m / |W + dW| - 1) W x + m / |W + dW| dW x.

    Args:
        x: `[..., I]`, after dropout.
        update: dW x, `[..., O]`.
        magnitude, norm: m and |W + dW|, `[O]`; the norm is a constant for the gradient, as in section 4.3 of DoRA.
        weight, bias: of the base layer, `[O, I]`, and `[O]` or None.
        base_result: output of the base layer for `x`, or None if dropout changed `x`.
    """
    gain = (magnitude / norm).to(x.dtype)
    if base_result is None:
        base_result = nn.functional.linear(x, weight.to(x.dtype))
    elif bias is not None:
        base_result = base_result - bias
    return (gain - 1) * base_result + gain * update


def dora_factors(down: GranularDown, up: GranularUp, scaling: float | Tensor) -> Factors:
    """The factors of a layer of which PEFT gives the two modules, and the scaling without the gain of `up`."""
    return Factors(down.weight, up.weight, down.hybrid_weight, up.hybrid_weight, scaling * up.gain)


def magnitude_of(layer: Any, adapter: str) -> Tensor | None:
    """m of an adapter whose variant is DoRA, `[O]`, or None if its variant or its magnitude module is another.

    Args:
        layer: one of PEFT's LoRA layers.
        adapter: one that has a variant.
    """
    magnitudes = layer.lora_magnitude_vector
    if type(layer.lora_variant[adapter]) is not DoraLinearVariant or adapter not in magnitudes:
        return None
    module = magnitudes[adapter]
    if not isinstance(module, GranularDora | FusedDora) or isinstance(module, FusedDora) and dora_is_cached(module):
        return None
    parameters = unhooked_parameters(module)
    weight = None if parameters is None else parameters.get("weight")
    return weight if type(weight) in (nn.Parameter, Tensor) else None


def dora_linear(x: Tensor, layer: AdaptedLinear, magnitude: Tensor) -> Tensor:
    """y = m / |W + dW| (W + dW) x + bias, `[..., O]`, differentiable in x, m and the factors.

    The product is that of the layer without DoRA; its result is kept for the gradient of m.

    Args:
        x: `[..., I]`, dtype of the weight.
        layer: weight `[O, I]`, not packed, bias and factors.
        magnitude: m, `[O]`, any float dtype.
    """
    weight, bias, factors, *_ = layer
    assert isinstance(weight, Tensor)
    z = gralora_linear(x, weight, None, factors)
    gain = magnitude / row_norms(weight, factors)
    if torch.compiler.is_compiling():  # which fuses these
        return (z * gain if bias is None else z * gain + bias).to(z.dtype)
    return RescaledFunction.apply(z, gain, bias)


class RescaledFunction(torch.autograd.Function):
    """y = gain * z + bias, `[..., O]`, in one pass and with gain `[O]` as exact as it comes.

    torch's own operations would make tensors of float32 of half-precision z.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(z, gain)
        y = torch.empty_like(z)
        return torch.mul(z, gain, out=y) if bias is None else torch.addcmul(bias, z, gain, out=y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        z, gain = ctx.saved_tensors
        needs_z, needs_gain, _ = ctx.needs_input_grad
        dz = dgain = None
        if needs_z and (torch.is_grad_enabled() or is_batched(dy)):  # create_graph=True, is_grads_batched=True
            dz = (dy * gain).to(z.dtype)
        elif needs_z:
            dz = torch.mul(dy, gain, out=torch.empty_like(z))
        if needs_gain:
            dgain = (dy * z).reshape(-1, len(gain)).sum(0, dtype=gain.dtype)
        return dz, dgain, None


@torch.no_grad()
def row_norms(weight: Tensor, factors: Factors) -> Tensor:
    """Compute |W + dW| for every output row, `[O]`, in float32 at least, without forming dW.

    Let dW = s (G + H), where G is the grid and H the hybrid part. The square of the norm is

        |W|^2 + s <2 W + s H, H> + s <2 W + 2 s H + s G, G>,

    where every product with H = B_s A_s, or with a block b a^T of G, goes through the ranks. W is read twice, as it
    is: for its own norm, and for its products with a and A_s.

    Args:
        weight: W, `[O, I]`.
        factors: of a grid or a plain LoRA; their scaling is s.
    """
    grid_A, grid_B, hybrid_A, hybrid_B, s = factors.as_grid()
    dtype, k = torch.promote_types(weight.dtype, torch.float32), grid_A.shape[0]
    a = blocks_of_A(grid_A.to(dtype)).transpose(-2, -1)  # [k_j, k_i, I/k, q]
    b = blocks_of_B(grid_B.to(dtype))  # [k_j, k_i, O/k, q]
    rows = (W.unflatten(1, (k, -1)).transpose(0, 1) for W in weight.chunk(k))  # [k_i, O/k, I/k]
    W_a = torch.stack([_product(W, a_j) for W, a_j in zip(rows, a, strict=True)])  # [k_j, k_i, O/k, q]
    squares = torch.linalg.vector_norm(weight, dim=1, dtype=dtype).square()
    if hybrid_A is not None and hybrid_B is not None:
        A, B = hybrid_A.to(dtype), hybrid_B.to(dtype)
        W_A = _product(weight.unsqueeze(0), A.T.unsqueeze(0)).squeeze(0)
        squares += s * ((2 * W_A + s * B @ (A @ A.T)) * B).sum(1)
        W_a += s * B.unflatten(0, (k, 1, -1)) @ (A.unflatten(1, (k, -1)).transpose(0, 1) @ a)
    squares += s * ((2 * W_a + s * b @ (a.transpose(-2, -1) @ a)) * b).sum((1, 3)).flatten()
    return squares.clamp(min=0).sqrt()


def _product(W: Tensor, a: Tensor) -> Tensor:
    """W a for a batch of matrices, in the dtype of a; on a GPU a weight of half precision is read as it is.

    There a is rounded to the dtype of W, as the layer's own product rounds it, and the sums are in float32.
    """
    if W.dtype == a.dtype:
        return W @ a
    return torch.bmm(W, a.to(W.dtype), out_dtype=a.dtype) if W.is_cuda and BMM_WIDENS else W.to(a.dtype) @ a
