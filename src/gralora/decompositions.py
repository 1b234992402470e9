"""Initialisations as functions of blocks: what each makes of the base weight, block by block of a grid.

A grid is k x k LoRAs of rank q = r_g / k, one for each block (j, i) of dW, and each starts as PEFT starts a LoRA of
that block: with k = 1 and no hybrid part, an adapter starts as PEFT's LoRA. The hybrid part stays as PEFT draws it,
so that it adds nothing until it is trained.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .blocks import blocks_of_A, blocks_of_B, join_blocks, split_blocks
from .seam import (
    COVARIANCE,
    GRADIENT,
    Conv1D,
    corda_decomposition,
    dequantize_module_weight,
    forget_preprocessing,
    gather_params_ctx,
)
from .warned import without

Pairs = tuple[Tensor, Tensor]
"""B and A of the LoRAs of all blocks, `[..., k_j, k_i, O/k, q]` and `[..., k_j, k_i, q, I/k]`."""


class Blocks(NamedTuple):
    """All blocks of one layer, as an initialisation sees them.

    Attributes:
        weight: the base weight's, `[..., k_j, k_i, O/k, I/k]`, float32 or float64.
        q: the rank of each block's LoRA.
        scaling: the factor that their products get.
        base: the base layer, with what PEFT's preprocessing has left there.
        config: the adapter's.
    """

    weight: Tensor
    q: int
    scaling: float
    base: Any
    config: Any


# Without the weight


@torch.no_grad()
def widen_by_fan_in(layer: Any, adapter: str, config: Any) -> None:
    """Multiply A by sqrt(k): Kaiming's bound is 1/sqrt(fan-in), and the fan-in of a block is I/k where LoRA's is I."""
    if layer.drawn_by_fan_in:
        A = layer.factors(adapter).A
        A.mul_(math.sqrt(A.shape[-3]))


def keep(layer: Any, adapter: str, config: Any) -> None:
    """Leave the factors as PEFT has drawn them."""


@torch.no_grad()
def orthogonal(layer: Any, adapter: str, config: Any) -> None:
    """Draw factors whose product is zero in every block: B's rows there are orthogonal to A's columns."""
    factors = layer.factors(adapter)
    down, up = blocks_of_A(factors.A), blocks_of_B(factors.B)
    q, options = down.shape[-2], {"device": factors.A.device, "dtype": torch.float64}
    Q, _ = torch.linalg.qr(torch.randn(*down.shape[:-2], q, q, **options))
    down.copy_((torch.randn(*down.shape[:-2], down.shape[-1], q // 2, **options) @ Q[..., 0::2, :]).mT / 10)
    up.copy_(torch.randn(*up.shape[:-1], q // 2, **options) @ Q[..., 1::2, :] / 10)  # PEFT's size


# Of the weight


def pissa(blocks: Blocks) -> Pairs:
    """PiSSA (arXiv 2404.02948): the best approximation of every block by one of rank q."""
    U, S, Vh = torch.linalg.svd(blocks.weight, full_matrices=False)
    return _balanced(U, S, Vh, blocks)


def pissa_by_iteration(blocks: Blocks) -> Pairs:
    """PiSSA by a randomised SVD; "pissa_niter_4" does four iterations."""
    iterations = int(blocks.config.init_lora_weights.rpartition("_")[2])
    with same_draws(blocks.weight.device):  # so that an adapter that is loaded meets the weight that it was trained on
        U, S, V = torch.svd_lowrank(blocks.weight, blocks.q, niter=iterations)
    return _balanced(U, S, V.mT, blocks)


def olora(blocks: Blocks) -> Pairs:
    """OLoRA (arXiv 2406.01775): the first q columns of Q and rows of R in the QR decomposition of every block."""
    Q, R = torch.linalg.qr(blocks.weight)
    return Q[..., : blocks.q], R[..., : blocks.q, :]


def mica(blocks: Blocks) -> Pairs:
    """MiCA (arXiv 2604.01694): the last q left singular vectors of every block, and A = 0; PEFT freezes B."""
    U, _, Vh = torch.linalg.svd(blocks.weight, full_matrices=False)
    return U[..., -blocks.q :], torch.zeros_like(Vh[..., : blocks.q, :])


def corda(blocks: Blocks) -> Pairs:
    """CorDA (arXiv 2406.05223): the SVD of every block times the covariance of the chunk of input that it meets.

    The covariance of chunk i is the i-th block on the diagonal of the one that `preprocess_corda` has gathered.
    """
    covariance = split_blocks(getattr(blocks.base, COVARIANCE), blocks.weight.shape[-3])
    kept = slice(blocks.q) if blocks.config.corda_config.corda_method == "ipm" else slice(-blocks.q, None)
    parts = [[corda_decomposition(W, covariance[i, i]) for i, W in enumerate(row)] for row in blocks.weight]
    U, S, V = (torch.stack([torch.stack([p[n].to(blocks.weight) for p in row]) for row in parts]) for n in range(3))
    return _balanced(U[..., kept], S[..., kept], V[..., kept].mT, blocks)


def lora_ga(blocks: Blocks) -> Pairs:
    """LoRA-GA (arXiv 2407.05000): singular vectors of every block of the gradient that `preprocess_loraga` has taken.

    Which ones, and their scales, are as in PEFT, for a LoRA with the features of a block.
    """
    options, q = blocks.config.lora_ga_config, blocks.q
    gradient = getattr(blocks.base, GRADIENT)
    gradient = gradient.T if isinstance(blocks.base, Conv1D) else gradient
    gradient = split_blocks(gradient, blocks.weight.shape[-3]).to(blocks.weight)
    with same_draws(gradient.device):
        U, S, V = torch.svd_lowrank(gradient, q=min(4 * q, *gradient.shape[-2:]), niter=4)
        drawn = torch.randperm(2 * q)[:q]
        largest = torch.svd_lowrank(blocks.weight, q=q, niter=4)[1][..., :1] if options.scale == "weight_svd" else S
    of_A, of_B = {
        "ArBr": (torch.arange(1, 2 * q, 2), torch.arange(0, 2 * q, 2)),
        "A2rBr": (torch.arange(q, 2 * q), torch.arange(q)),
        "ArB2r": (torch.arange(q), torch.arange(q, 2 * q)),
        "random": (drawn, drawn),
    }[options.direction]
    down, S = V[..., of_A].mT, S[..., of_B]
    up = U[..., of_B] * S[..., None, :]
    if options.scale == "stable":
        up = up * (up.shape[-2] ** 0.25 / options.stable_gamma**0.5)
    elif options.scale == "weight_svd":
        up = up * torch.where(S[..., :1] > 0, largest / S[..., :1], 1.0)[..., None]
    elif options.scale == "gd_scale":
        up, down = up / blocks.scaling, down / blocks.scaling
    return up, down


def _balanced(U: Tensor, S: Tensor, Vh: Tensor, blocks: Blocks) -> Pairs:
    """The first q terms of U S Vh as B and A, which get half of S each, divided by the scaling to come."""
    root = (S[..., : blocks.q] / blocks.scaling).sqrt()
    return U[..., : blocks.q] * root[..., None, :], root[..., None] * Vh[..., : blocks.q, :]


@contextmanager
def same_draws(device: torch.device) -> Iterator[None]:
    """Draw the same random numbers in every process, and leave the program's own sequence alone."""
    on_cpu = device.type == "cpu"
    devices = [] if on_cpu else list(range(torch.get_device_module(device).device_count()))
    with torch.random.fork_rng(devices, device_type="cuda" if on_cpu else device.type):
        torch.manual_seed(0)
        yield


# From blocks to layers


def by_block(decompose: Callable[[Blocks], Pairs]) -> Callable[[Any, str, Any], None]:
    """Make a row's function of one that decomposes blocks; the base weight W becomes W - dW."""

    @torch.no_grad()
    def fill(layer: Any, adapter: str, config: Any) -> None:
        base = layer.get_base_layer()
        with gather_params_ctx(layer.base_weight()):
            if is_bitsandbytes(base):
                _fill_quantised(layer, adapter, config, decompose)
            else:
                W = layer.base_matrix()
                layer.set_base_matrix(W - write(layer, adapter, *decompose(blocks_of(layer, adapter, config, W))))
        forget_preprocessing(base)

    return fill


def is_bitsandbytes(base: nn.Module) -> bool:
    """Whether a base layer's weight is one of bitsandbytes' two quantised ones."""
    return type(getattr(base, "weight", None)).__name__ in ("Params4bit", "Int8Params")


def _fill_quantised(layer: Any, adapter: str, config: Any, decompose: Callable[[Blocks], Pairs]) -> None:
    if layer.factors(adapter).A.is_meta:
        raise ValueError("an initialisation that changes a quantised weight needs low_cpu_mem_usage=False.")
    W = layer.as_matrix(dequantize_module_weight(layer.get_base_layer()))
    write(layer, adapter, *decompose(blocks_of(layer, adapter, config, W)))
    layer.merged_adapters.append(adapter)
    with without("Unmerge lora module"):  # it rounds, which PEFT's OLoRA does without a word
        layer.unmerge()  # PEFT's way to subtract dW from such a weight


@torch.no_grad()
def minor_components(layer: Any, adapter: str, config: Any) -> None:
    """Write MiCA's B and A, whose product is zero."""
    with gather_params_ctx(layer.base_weight()):
        write(layer, adapter, *mica(blocks_of(layer, adapter, config, layer.base_matrix())))


@torch.no_grad()
def loftq(layer: Any, adapter: str, config: Any) -> None:
    """LoftQ (arXiv 2310.08659): W becomes its quantised values, and dW approximates the rest block by block."""
    with gather_params_ctx(layer.base_weight()):
        W = layer.base_matrix()
        dW, quantised = torch.zeros_like(W), W
        for _ in range(config.loftq_config["loftq_iter"]):
            stored = layer.as_weight(W - dW).float().contiguous()
            quantised = layer.as_matrix(after_quantising(stored, config.loftq_config["loftq_bits"]))
            dW = write(layer, adapter, *pissa(blocks_of(layer, adapter, config, W - quantised)))
        layer.set_base_matrix(quantised)


def after_quantising(weight: Tensor, bits: int) -> Tensor:
    """The values that bitsandbytes gives back for a float32 weight: in nf4 for 4 bits, int8 by rows for 8."""
    from bitsandbytes import functional

    if bits == 4:
        return functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type="nf4"))
    packed, scales, _ = functional.int8_vectorwise_quant(weight.half())
    return functional.int8_vectorwise_dequant(packed, scales)


def blocks_of(layer: Any, adapter: str, config: Any, matrix: Tensor) -> Blocks:
    """A matrix `[..., O, I]` as the blocks that the adapter's grid has."""
    A, _, _, _, scaling = layer.factors(adapter)
    k, r_g = A.shape[-3], A.shape[-1]
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    return Blocks(split_blocks(matrix, k), r_g // k, float(scaling), layer.get_base_layer(), config)


def write(layer: Any, adapter: str, up: Tensor, down: Tensor) -> Tensor:
    """Write the LoRAs of all blocks into a grid.

    The grid may be without values (on the meta device, by PEFT's `low_cpu_mem_usage`), which a file will give it.

    Returns:
        dW `[..., O, I]`, scaled, of the factors as the grid's dtype rounds them.
    """
    A, B, _, _, scaling = layer.factors(adapter)
    new_A, new_B = (torch.empty_like(t, device=up.device) for t in (A, B))
    blocks_of_A(new_A).copy_(down)
    blocks_of_B(new_B).copy_(up)
    A.copy_(new_A)
    B.copy_(new_B)
    return join_blocks(blocks_of_B(new_B.to(up)) @ blocks_of_A(new_A.to(down))) * float(scaling)
