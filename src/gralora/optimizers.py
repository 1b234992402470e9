"""PEFT's preconditioning optimizers for GraLoRA, whose grid is k x k independent LoRAs of rank r_g / k.

The originals in `peft.optimizers` expect factors of two dimensions: LoRA-FA fails at its first step on a grid, and
the Riemannian optimizer leaves the grid's gradients as they are. LoRA+ (`create_loraplus_optimizer`) needs no change.
LoRA-Muon, which PEFT has not, is here because a block is the matrix that it is about.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from .blocks import blocks_of_A, blocks_of_B
from .layers import GraloraLayer


class Pair(NamedTuple):
    """The factors of one LoRA, `[r, I]` and `[O, r]`, or of a grid, `[k, I/k, r_g]` and `[k, r_g, O/k]`."""

    A: nn.Parameter
    B: nn.Parameter
    scaling: float

    def of(self, read: Callable[[nn.Parameter], Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
        """Apply `read` to A and B, and view the results as LoRAs, `[..., rank, in]` and `[..., out, rank]`."""
        A, B = read(self.A), read(self.B)
        if self.A.ndim == 2:
            return A, B
        return None if A is None else blocks_of_A(A), None if B is None else blocks_of_B(B)


def lora_pairs(model: nn.Module) -> Iterator[Pair]:
    """Yield the factors of all adapters of linear layers: grids, their hybrid parts and plain LoRAs.

    Raises:
        ValueError: naming the layer, if a GraLoRA layer is of another kind than linear.
    """
    for where, layer in model.named_modules():
        for name in layer.lora_A if isinstance(layer, LoraLayer) else ():
            if isinstance(layer, GraloraLayer) and layer.is_gralora(name):
                if not layer.linear_factors:
                    raise ValueError(
                        f"layer {where!r}: a GraLoRA of a {type(layer).__name__} cannot be preconditioned."
                    )
                A, B, hybrid_A, hybrid_B, scaling = layer.factors(name)
                yield Pair(A, B, float(scaling))
                if hybrid_A is not None:
                    yield Pair(hybrid_A, hybrid_B, float(scaling))
            elif layer.lora_A[name].weight.ndim == 2:
                yield Pair(layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name]))


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, reg: float = 1e-2, **kwargs: Any
) -> Optimizer:
    """Like `peft.optimizers.create_riemannian_optimizer` (arXiv 2402.02347), but precondition every block of a grid.

    Before each step grad_A becomes `(B^T B + reg)^-1 grad_A`, and grad_B becomes `grad_B (A A^T + reg)^-1`.

    Args:
        model: the PEFT model; every trainable parameter is optimised, adapters of linear layers are preconditioned.
        optimizer_cls: e.g. `torch.optim.AdamW`. Its step gets no closure, which would compute the gradients anew.
        lr: learning rate.
        reg: added to the diagonal of the matrix that is inverted.
        **kwargs: passed on to `optimizer_cls`.

    Raises:
        ValueError: if the model has no trainable adapter of a linear layer, or a step gets a closure.
    """
    pairs = [pair for pair in lora_pairs(model) if pair.A.requires_grad and pair.B.requires_grad]
    if not pairs:
        raise ValueError("the model has no trainable lora_A and lora_B of a linear layer to precondition.")

    def precondition(pair: Pair) -> None:
        (A, B), (grad_A, grad_B) = pair.of(_value), pair.of(_gradient)
        if grad_A is not None:
            grad_A.copy_(_inverse(B.mT @ B, reg) @ grad_A.to(B.dtype))
        if grad_B is not None:
            grad_B.copy_(grad_B.to(A.dtype) @ _inverse(A @ A.mT, reg))

    optimizer = optimizer_cls([p for p in model.parameters() if p.requires_grad], lr=lr, **kwargs)
    return _before_each_step(optimizer, precondition, pairs)


def create_lorafa_optimizer(model: nn.Module, *, lr: float, weight_decay: float = 0.0) -> Optimizer:
    """Create LoRA-FA (arXiv 2308.03303): A is frozen, and the gradient of B is projected block by block.

    Before each step of torch's AdamW the gradient of B becomes `grad_B (A A^T)^-1 / scaling^2`, which brings the
    change of dW as close to full fine-tuning as A allows. Unlike `peft.optimizers.create_lorafa_optimizer`, this
    computes in float32 at least, and takes the scaling from the layers.

    Args:
        model: the PEFT model; its lora_A are frozen by this call.
        lr: learning rate.
        weight_decay: the weight decay of AdamW.

    Raises:
        ValueError: if the model has no trainable adapter of a linear layer, or a step gets a closure.
    """
    pairs = [pair for pair in lora_pairs(model) if pair.B.requires_grad]
    if not pairs:
        raise ValueError("the model has no trainable lora_B of a linear layer.")
    for pair in pairs:
        pair.A.requires_grad_(False)

    def project(pair: Pair) -> None:
        (A, _), (_, grad_B) = pair.of(_value), pair.of(_gradient)
        if grad_B is not None:
            grad_B.copy_(grad_B.to(A.dtype) @ _inverse(A @ A.mT, 1e-8) / pair.scaling**2)

    parameters = [p for p in model.parameters() if p.requires_grad]
    return _before_each_step(AdamW(parameters, lr=lr, eps=1e-6, weight_decay=weight_decay), project, pairs)


def create_muon_optimizer(model: nn.Module, *, lr: float, momentum: float = 0.95) -> Optimizer:
    """Create LoRA-Muon (arXiv 2606.12921): each block of dW takes a step of a given size in the spectral norm.

    A block's LoRA, `dW = scaling * B A` with B `[out, q]`, changes by `dB A + B dA`. Of all changes whose two parts
    have the spectral norm `lr / 2 * sqrt(out / in)`, these are the steepest, with P the polar factor U V^T of U S V^T:

        dB = -c P(grad_B R_A) R_A,  dA = -c R_B P(R_B grad_A),  R_A = (A A^T)^-1/2,  R_B = (B^T B)^-1/2

    and `c = lr / (2 * scaling) * sqrt(out / in)`. So what a learning rate does depends neither on rank and scaling nor
    on how the size of dW is shared between A and B. The gradients are averaged over steps as in torch's Muon. The
    inverse roots and polar factors come from eigenvalue decompositions of q x q matrices, at once for all layers of
    one shape.

    Args:
        model: the PEFT model; nothing but adapters of linear layers may be trainable.
        lr: learning rate; a scheduler may change it.
        momentum: of the average of gradients, in Nesterov's form.

    Returns:
        A `torch.optim.SGD` whose state has the averages, as `momentum_buffer`.

    Raises:
        ValueError: if other parameters are trainable, or a factor whose partner is frozen, or a step gets a closure.
    """
    pairs = [pair for pair in lora_pairs(model) if pair.A.requires_grad and pair.B.requires_grad]
    inside = {id(p) for pair in pairs for p in (pair.A, pair.B)}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in inside]
    if not pairs:
        raise ValueError("the model has no trainable lora_A and lora_B of a linear layer.")
    if others:
        raise ValueError(
            f"LoRA-Muon trains lora_A and lora_B of linear layers, both of each, and {len(others)} other parameters "
            f"are trainable, as {others[0]!r}; freeze them, or use another optimizer."
        )
    parameters = [p for pair in pairs for p in (pair.A, pair.B)]
    optimizer = torch.optim.SGD(parameters, lr=lr)

    def average(p: nn.Parameter) -> Tensor:
        if p.grad is None:
            return torch.zeros_like(_value(p))
        buffer = optimizer.state[p].setdefault("momentum_buffer", torch.zeros_like(p.grad))
        buffer.lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(buffer, momentum).to(torch.promote_types(p.dtype, torch.float32))

    def steepest(pairs: list[Pair]) -> None:
        pairs = [pair for pair in pairs if pair.A.grad is not None or pair.B.grad is not None]
        if not pairs:
            return
        A, B = (torch.stack(parts) for parts in zip(*(pair.of(_value) for pair in pairs), strict=True))
        mean_A, mean_B = (torch.stack(parts) for parts in zip(*(pair.of(average) for pair in pairs), strict=True))
        size = (B.shape[-2] / A.shape[-1]) ** 0.5 / (2 * pairs[0].scaling)
        root_A, root_B = _inverse_root(A @ A.mT), _inverse_root(B.mT @ B)
        step_A = size * root_B @ _polar((root_B @ mean_A).mT).mT
        step_B = size * _polar(mean_B @ root_A) @ root_A
        for pair, *steps in zip(pairs, step_A, step_B, strict=True):
            for gradient, step in zip(pair.of(_gradient), steps, strict=True):
                if gradient is not None:
                    gradient.copy_(step)

    return _before_each_step(optimizer, steepest, list(_alike(pairs).values()))


def _alike(pairs: list[Pair]) -> dict[tuple[Any, ...], list[Pair]]:
    """Pairs by what must be equal to be decomposed at once: a GPU takes hardly longer for many small matrices."""
    groups: dict[tuple[Any, ...], list[Pair]] = {}
    for pair in pairs:
        key = pair.A.shape, pair.B.shape, pair.scaling, pair.A.dtype, pair.B.dtype, pair.A.device
        groups.setdefault(key, []).append(pair)
    return groups


def _polar(matrix: Tensor) -> Tensor:
    """U V^T of a tall matrix U S V^T, without what belongs to singular values of about zero."""
    return matrix @ _inverse_root(matrix.mT @ matrix)


def _inverse_root(gram: Tensor) -> Tensor:
    """The inverse square root of a symmetric matrix, where it has one: zero along eigenvectors of about zero."""
    values, vectors = torch.linalg.eigh(gram)
    largest = values[..., -1:]
    roots = torch.where((values > 1e-6 * largest) & (largest > 0), values.clamp(min=0).rsqrt(), 0.0)
    return vectors * roots[..., None, :] @ vectors.mT


def _value(p: nn.Parameter) -> Tensor:
    return p.detach().to(torch.promote_types(p.dtype, torch.float32))


def _gradient(p: nn.Parameter) -> Tensor | None:
    return p.grad


def _inverse(matrix: Tensor, reg: float) -> Tensor:
    """Invert a symmetric matrix with `reg` added to its diagonal, by the pseudo-inverse if the sum is singular."""
    return torch.linalg.pinv(matrix + reg * torch.eye(matrix.shape[-1]).to(matrix), hermitian=True)


def _before_each_step(optimizer: Optimizer, change: Callable[[Any], None], pairs: list[Any]) -> Optimizer:
    @torch.no_grad()
    def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(arg is not None for arg in [*args[1:], *kwargs.values()]):
            raise ValueError(
                "step() takes no closure here: it would compute the gradients anew, without preconditioning."
            )
        for pair in pairs:
            change(pair)

    optimizer.register_step_pre_hook(hook)
    return optimizer
