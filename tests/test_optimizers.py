"""Optimizers for LoRA on GraLoRA adapters: LoRA+ is PEFT's; LoRA-FA and the Riemannian one are gralora's."""

import copy

import peft
import pytest
import torch
from helpers import (
    CASES,
    FEW_CASES,
    MODELS,
    TARGETS,
    Case,
    adapted,
    adapter_parameters,
    assert_close64,
    case_config,
    factors_of,
    gralora_config,
    naive_update,
    one_layer,
    only_layer,
    random_input,
    set_factors,
    token_ids,
)
from peft import optimizers as stock
from torch import Tensor, nn

import gralora
from gralora.blocks import split_blocks

riemannian = pytest.mark.skipif(not hasattr(stock, "create_riemannian_optimizer"), reason="came with PEFT 0.21")
cases = pytest.mark.parametrize("case", [*FEW_CASES, CASES[2]], ids=str)


def loss_of(model, case: Case) -> Tensor:
    return model(random_input(7, case.in_features)).square().sum()


def naive_riemannian(A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor, reg: float) -> tuple[Tensor, Tensor]:
    """The paper's equation for one LoRA, `[r, I]` and `[O, r]`."""
    eye = torch.eye(A.shape[0], dtype=A.dtype)
    return torch.linalg.inv(B.T @ B + reg * eye) @ grad_A, grad_B @ torch.linalg.inv(A @ A.T + reg * eye)


def naive_lorafa(A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(A), grad_B @ torch.linalg.pinv(A @ A.T) / scaling**2


def naive_muon(A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """The steepest change of one LoRA, `[r, I]` and `[O, r]`, by singular value decompositions."""

    def polar(M: Tensor) -> Tensor:
        U, _, Vh = torch.linalg.svd(M, full_matrices=False)
        return U @ Vh

    def inverse_root(M: Tensor) -> Tensor:
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
        return Vh.T @ torch.diag(1 / S) @ Vh

    size = (B.shape[0] / A.shape[1]) ** 0.5 / (2 * scaling)
    root_A, root_B = inverse_root(A.T), inverse_root(B)  # of A A^T and of B^T B
    return size * root_B @ polar(root_B @ grad_A), size * polar(grad_B @ root_A) @ root_A


def by_blocks(factors, gradients, rule) -> list[Tensor]:
    """`rule` on every block's own LoRA, and on the plain part's."""
    A, B, hybrid_A, hybrid_B = (None if t is None else t.detach() for t in factors)
    grad_A, grad_B, grad_hybrid_A, grad_hybrid_B = gradients
    k, q = A.shape[0], A.shape[2] // A.shape[0]
    new_A, new_B = torch.zeros_like(A), torch.zeros_like(B)
    for i in range(k):
        for j in range(k):
            in_A, in_B = slice(j * q, (j + 1) * q), slice(i * q, (i + 1) * q)
            block = rule(A[i][:, in_A].T, B[j][in_B].T, grad_A[i][:, in_A].T, grad_B[j][in_B].T)
            new_A[i][:, in_A], new_B[j][in_B] = block[0].T, block[1].T
    plain = [] if hybrid_A is None else rule(hybrid_A, hybrid_B, grad_hybrid_A, grad_hybrid_B)
    return [new_A, new_B, *plain]


@cases
def test_riemannian_steps_are_those_of_every_block(case: Case) -> None:
    """Each block's gradients, and the plain part's, are preconditioned by that block's own factors."""
    model = adapted(one_layer(case), case_config(case)).train()
    factors = factors_of(only_layer(model))
    before = [t.detach().clone() for t in factors.tensors()]
    gradients = torch.autograd.grad(loss_of(model, case), factors.tensors())
    padded = [*gradients, *[None] * (4 - len(gradients))]
    expected = by_blocks(factors, padded, lambda *block: naive_riemannian(*block, reg=1e-2))
    optimizer = gralora.create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-3)
    loss_of(model, case).backward()
    optimizer.step()
    for t, old, step in zip(factors.tensors(), before, expected, strict=True):
        assert_close64(t.detach(), old - 1e-3 * step)


@riemannian
def test_riemannian_steps_of_one_block_are_those_of_peft() -> None:
    """With k=1 it is PEFT's optimizer on plain LoRA, over several steps, with momentum."""
    case = Case(1, 4, 0, 20, 12)
    mine = adapted(one_layer(case), case_config(case)).train()
    plain = adapted(one_layer(case), peft.LoraConfig(r=4, lora_alpha=12, target_modules=["layer"])).train()
    A, B, _, _ = factors_of(only_layer(mine))
    only_layer(plain).lora_A["default"].weight.data = A.data[0].T.clone()
    only_layer(plain).lora_B["default"].weight.data = B.data[0].T.clone()
    pairs = [(mine, gralora.create_riemannian_optimizer), (plain, stock.create_riemannian_optimizer)]
    for model, create in pairs:
        optimizer = create(model, torch.optim.SGD, lr=1e-4, reg=0.5, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model, case).backward()
            optimizer.step()
    assert_close64(only_layer(mine).get_delta_weight("default"), only_layer(plain).get_delta_weight("default"))


@cases
def test_lorafa_steps_are_those_of_every_block(case: Case) -> None:
    """A is frozen; the gradient of each block's B is projected by that block's A, then AdamW takes its step."""
    model = adapted(one_layer(case), case_config(case)).train()
    factors = factors_of(only_layer(model))
    gradients = torch.autograd.grad(loss_of(model, case), factors.tensors())
    padded = [*gradients, *[None] * (4 - len(gradients))]
    expected = by_blocks(factors, padded, lambda *block: naive_lorafa(*block, scaling=3.0))
    naive = [t.detach().clone() for t in factors.tensors()]
    reference = torch.optim.AdamW(naive[1::2], lr=1e-2, eps=1e-6, weight_decay=0.1)
    for t, gradient in zip(naive[1::2], expected[1::2], strict=True):
        t.grad = gradient
    reference.step()
    optimizer = gralora.create_lorafa_optimizer(model, lr=1e-2, weight_decay=0.1)
    loss_of(model, case).backward()
    assert all(p.grad is None for name, p in adapter_parameters(model).items() if "lora_A" in name)
    optimizer.step()
    for t, exact, gradient in zip(factors.tensors(), naive, expected, strict=True):
        torch.testing.assert_close(t.detach(), exact, rtol=1e-6, atol=1e-6)
        if t.requires_grad:
            torch.testing.assert_close(t.grad, gradient, rtol=1e-5, atol=1e-5)


def test_lorafa_projects_the_full_gradient() -> None:
    """What the projection is for: the change of dW is the least-squares fit of full fine-tuning's in A's row space."""
    case = Case(2, 8, 0, 20, 12)
    model = adapted(one_layer(case), case_config(case)).train()
    layer, x = only_layer(model), random_input(7, 20)
    G = torch.zeros(12, 20, dtype=torch.float64, requires_grad=True)  # a change of the whole weight
    out = layer.base_layer(x) + 3.0 * naive_update(x, factors_of(layer)) + x @ G.T
    (full,) = torch.autograd.grad(out.square().sum(), G)
    optimizer = gralora.create_lorafa_optimizer(model, lr=0.0)
    loss_of(model, case).backward()
    A, B, _, _ = factors_of(layer)
    before = layer.get_delta_weight("default").detach()
    optimizer.step()
    set_factors(layer, factors_of(layer)._replace(B=B.detach() - B.grad))
    change = before - layer.get_delta_weight("default").detach()
    for j in range(2):
        for i in range(2):
            rows, columns, q = slice(6 * j, 6 * j + 6), slice(10 * i, 10 * i + 10), slice(4 * j, 4 * j + 4)
            basis = torch.linalg.qr(A[i][:, q].detach())[0]  # of the block's row space
            torch.testing.assert_close(
                change[rows, columns], full[rows, columns] @ basis @ basis.T, rtol=1e-5, atol=1e-5
            )


@cases
def test_muon_steps_are_those_of_every_block(case: Case) -> None:
    """Two steps, with momentum: each block's dW changes by two parts of the same spectral norm."""
    model = adapted(one_layer(case), case_config(case)).train()
    layer = only_layer(model)
    optimizer = gralora.create_muon_optimizer(model, lr=1e-2, momentum=0.8)
    buffers = [torch.zeros_like(t) for t in factors_of(layer).tensors()]
    for _ in range(2):
        optimizer.zero_grad()
        before = [t.detach().clone() for t in factors_of(layer).tensors()]
        loss_of(model, case).backward()
        gradients = [t.grad.clone() for t in factors_of(layer).tensors()]
        buffers = [0.8 * b + 0.2 * g for b, g in zip(buffers, gradients, strict=True)]
        means = [0.2 * g + 0.8 * b for b, g in zip(buffers, gradients, strict=True)]
        padded = [*means, *[None] * (4 - len(means))]
        expected = by_blocks(factors_of(layer), padded, lambda *block: naive_muon(*block, scaling=3.0))
        optimizer.step()
        for t, old, step in zip(factors_of(layer).tensors(), before, expected, strict=True):
            torch.testing.assert_close(t.detach(), old - 1e-2 * step, rtol=1e-6, atol=1e-8)


def test_muon_steps_of_layers_of_one_shape_are_their_own() -> None:
    """Two layers decomposed at once change as each does alone; one without gradients does not change."""
    names = ("first", "second", "unused")
    base = nn.ModuleDict({name: nn.Linear(20, 12, bias=False) for name in names}).double()
    model = adapted(base, gralora_config(k=2, r=4, target_modules=list(names))).double().train()
    x = torch.randn(5, 20, dtype=torch.float64)

    def stepped(trained: tuple[str, ...]) -> dict[str, Tensor]:
        own = copy.deepcopy(model)
        layers = own.base_model.model
        for name, p in own.named_parameters():
            p.requires_grad_("lora_" in name and any(f".{one}." in name for one in trained))
        optimizer = gralora.create_muon_optimizer(own, lr=1e-2)
        sum(layers[name](x).square().sum() * scale for name, scale in (("first", 1), ("second", 3))).backward()
        optimizer.step()
        return {name: layers[name].get_delta_weight("default").detach() for name in names}

    together, alone = stepped(names), [stepped((name,)) for name in ("first", "second")]
    before = model.base_model.model["unused"].get_delta_weight("default")
    assert torch.equal(together["unused"], before)
    for name, one in zip(names, alone, strict=False):
        torch.testing.assert_close(together[name], one[name])
        assert not torch.equal(together[name], model.base_model.model[name].get_delta_weight("default"))


def test_muon_steps_do_not_depend_on_how_a_block_is_shared() -> None:
    """A twice as large and B half as large: the same change of dW, of singular values lr / 2 * sqrt(O / I)."""
    case, changes = Case(2, 4, 0, 20, 12), []
    for factor in (1.0, 2.0):
        model = adapted(one_layer(case), case_config(case)).train()
        layer = only_layer(model)
        A, B, *_ = factors_of(layer)
        A.data *= factor
        B.data /= factor
        before = A.detach().clone(), layer.get_delta_weight("default").detach()
        optimizer = gralora.create_muon_optimizer(model, lr=1e-4)
        loss_of(model, case).backward()
        optimizer.step()
        changes.append(layer.get_delta_weight("default").detach() - before[1])
        A.data.copy_(before[0])  # what B alone has changed
        change = split_blocks(layer.get_delta_weight("default").detach() - before[1], 2)
        values = torch.linalg.svdvals(change)[..., :2]
        torch.testing.assert_close(values, torch.full_like(values, 0.5e-4 * (12 / 20) ** 0.5))
    torch.testing.assert_close(changes[0], changes[1])


@pytest.mark.parametrize(
    "create",
    [gralora.create_riemannian_optimizer, gralora.create_lorafa_optimizer, gralora.create_muon_optimizer],
)
def test_whole_models_train(create) -> None:
    """A model with a GraLoRA and a plain adapter, in bfloat16, learns; what is not trainable does not move."""
    model = adapted(MODELS["llama"](torch.bfloat16), gralora_config(2, hybrid_r=2, target_modules="all-linear"))
    model.add_adapter("plain", peft.LoraConfig(r=4, target_modules=TARGETS["llama"]))
    model.base_model.set_adapter(["default", "plain"])
    arguments = {"optimizer_cls": torch.optim.AdamW} if create is gralora.create_riemannian_optimizer else {}
    lr = 2e-2 if create is gralora.create_muon_optimizer else 2e-3
    optimizer = create(model.train(), lr=lr, **arguments)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    ids, losses = token_ids(2, 9), []
    for _ in range(12):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


def test_optimizers_refuse_what_they_cannot_do() -> None:
    """A closure, and a model without trainable adapters, are refused."""
    case = CASES[2]
    model = adapted(one_layer(case), case_config(case))
    for optimizer in (
        gralora.create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-3),
        gralora.create_muon_optimizer(model, lr=1e-3),
        gralora.create_lorafa_optimizer(model, lr=1e-3),
    ):
        with pytest.raises(ValueError, match="no closure"):
            optimizer.step(lambda: loss_of(model, case))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable lora_A and lora_B"):
        gralora.create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-3)
    with pytest.raises(ValueError, match="no trainable lora_B"):
        gralora.create_lorafa_optimizer(model, lr=1e-3)
    with pytest.raises(ValueError, match="no trainable lora_A and lora_B"):
        gralora.create_muon_optimizer(model, lr=1e-3)
    biased = adapted(one_layer(case), case_config(case, bias="all"))
    with pytest.raises(
        ValueError, match="1 other parameters are trainable, as 'base_model.model.layer.base_layer.bias'"
    ):
        gralora.create_muon_optimizer(biased, lr=1e-3)


def test_muon_starts_where_an_adapter_starts() -> None:
    """B is zero then, and A has no gradient: the first step moves B alone, the second both, and all stays finite."""
    case = CASES[2]
    model = peft.get_peft_model(one_layer(case), case_config(case)).train()
    A, B, *_ = factors_of(only_layer(model))
    optimizer, first = gralora.create_muon_optimizer(model, lr=1e-3), A.detach().clone()
    for moved in (False, True):
        optimizer.zero_grad()
        loss_of(model, case).backward()
        optimizer.step()
        assert torch.equal(A, first) != moved and B.abs().amax((1, 2)).min() > 0
        assert A.isfinite().all() and B.isfinite().all()


@riemannian
def test_optimizers_of_peft_do_not_know_grids() -> None:
    """PEFT's LoRA-FA fails at its first step; its Riemannian one finds the plain part only, and says so of none."""
    case = CASES[2]
    model = adapted(one_layer(case), case_config(case)).train()
    with pytest.raises(ValueError, match="did not find any trainable"):
        stock.create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-3)
    optimizer = stock.create_lorafa_optimizer(model, r=case.r, lora_alpha=16, lr=1e-3)
    loss_of(model, case).backward()
    with pytest.raises(RuntimeError, match="size"):
        optimizer.step()
    model = adapted(one_layer(CASES[3]), case_config(CASES[3])).train()
    optimizer = stock.create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-3)
    loss_of(model, CASES[3]).backward()
    before = [t.grad.clone() for t in factors_of(only_layer(model))]
    optimizer.step()
    same = [torch.equal(t.grad, grad) for t, grad in zip(factors_of(only_layer(model)), before, strict=True)]
    assert same == [True, True, False, False], "the docs say so"


def test_loraplus() -> None:
    """PEFT's LoRA+ gives all of B, grid and plain part and bias, its higher learning rate, and A the lower one."""
    case = Case(2, 10, 2, 20, 12)
    model = adapted(one_layer(case), case_config(case, lora_bias=True)).train()
    before = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
    optimizer = stock.create_loraplus_optimizer(model, torch.optim.SGD, lr=1e-3, loraplus_lr_ratio=16.0)
    loss_of(model, case).backward()
    optimizer.step()
    assert len(before) == 5
    for name, p in adapter_parameters(model).items():
        lr = 16e-3 if "lora_B" in name else 1e-3
        assert_close64(p.detach(), before[name] - lr * p.grad)


def test_optimizers_know_the_gain_of_the_scaling() -> None:
    """With gralora_scaling="matched" LoRA-FA divides by the scaling with its gain; convolutions are refused."""
    case = CASES[3]
    model = adapted(one_layer(case), case_config(case, gralora_scaling="matched")).train()
    factors, layer = factors_of(only_layer(model)), only_layer(model)
    gain = layer.lora_B["default"].gain
    assert gain != 1
    gradients = torch.autograd.grad(loss_of(model, case), factors.tensors())
    expected = by_blocks(factors, gradients, lambda *block: naive_lorafa(*block, scaling=3.0 * gain))
    optimizer = gralora.create_lorafa_optimizer(model, lr=1e-3)
    loss_of(model, case).backward()
    optimizer.step()
    for t, gradient in zip(factors.tensors()[1::2], expected[1::2], strict=True):
        torch.testing.assert_close(t.grad, gradient, rtol=1e-5, atol=1e-5)
    model = adapted(torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1)), gralora_config(2, target_modules=["0"]))
    with pytest.raises(ValueError, match="layer '.*0': a GraLoRA of a .*Conv2d cannot be preconditioned"):
        gralora.create_lorafa_optimizer(model, lr=1e-3)
