"""Functional torch: torch.func, forward-mode derivatives, batched gradients and tracers, as they do with plain LoRA.

What each gives is compared with the same transform of the definition, written block by block as a pure function.
"""

import io
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from helpers import (
    Case,
    adapted,
    adapter_parameters,
    assert_close64,
    case_config,
    dora,
    factors_of,
    few_cases,
    naive_update,
    one_layer,
    only_layer,
    random_input,
)
from kinds_table import FEW, Kind
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from gralora.ops import torch_seam

TOKENS = (3, 2)
Function = Callable[[dict[str, Tensor], Tensor], Tensor]


class OwnForward(nn.Linear):
    """A base layer whose product is not gralora's to compute: the adapter's update is added to its output."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def model_of(case: Case, base: str) -> nn.Module:
    model = one_layer(case)
    if base == "own_forward":
        model.layer.__class__ = OwnForward
    return adapted(model, case_config(case))


def functions(case: Case, base: str) -> tuple[nn.Module, Function, Function, dict[str, Tensor]]:
    """The model; the model and the definition as functions of the factors and x; and the factors by name."""
    model = model_of(case, base)
    layer = only_layer(model)
    factors, linear, scaling = factors_of(layer), layer.get_base_layer(), layer.scaling["default"]
    names = {id(p): name for name, p in adapter_parameters(model).items()}

    def ours(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, params, (x,))

    def definition(params: dict[str, Tensor], x: Tensor) -> Tensor:
        values = type(factors)(*(None if t is None else params[names[id(t)]] for t in factors))
        return x @ linear.weight.mT + linear.bias + scaling * naive_update(x, values)

    return model, ours, definition, {name: p.detach() for name, p in adapter_parameters(model).items()}


def loss_of(f: Function) -> Function:
    return lambda params, x: f(params, x).tanh().sum()


def dual(f: Function, params: dict[str, Tensor], x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(params, forward_ad.make_dual(x, x.flip(0)))).tangent


def batched(f: Function, params: dict[str, Tensor], x: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """Gradients for several dy at once."""
    leaves = {name: t.clone().requires_grad_() for name, t in params.items()}
    x = x.clone().requires_grad_()
    y = f(leaves, x).tanh()
    dy = random_input(4, *y.shape, dtype=x.dtype)
    return torch.autograd.grad(y, [x, *leaves.values()], dy, is_grads_batched=True, **options)


def ensemble(f: Function, params: dict[str, Tensor], x: Tensor) -> Tensor:
    return vmap(f, (0, None))({name: torch.stack([t, 2 * t, -t]) for name, t in params.items()}, x)


TRANSFORMS: dict[str, Callable[[Function, dict[str, Tensor], Tensor], Any]] = {
    "grad": lambda f, params, x: grad(loss_of(f))(params, x),
    "grad of x": lambda f, params, x: grad(loss_of(f), argnums=1)(params, x),
    "vmap": lambda f, params, x: vmap(f, (None, 0))(params, x),
    "ensemble": ensemble,
    "gradients per sample": lambda f, params, x: vmap(grad(loss_of(f)), (None, 0))(params, x),
    "vjp": lambda f, params, x: (lambda y, pull: pull(y))(*vjp(f, params, x)),
    "jvp": lambda f, params, x: jvp(f, (params, x), (params, x)),
    "linearize": lambda f, params, x: linearize(f, params, x)[1](params, x),
    "jacrev": lambda f, params, x: jacrev(f)(params, x),
    "jacfwd": lambda f, params, x: jacfwd(f)(params, x),
    "hessian": lambda f, params, x: hessian(loss_of(f), argnums=1)(params, x),
    "dual level": dual,
    "batched gradients": batched,
    "batched gradients, differentiable": lambda f, params, x: batched(f, params, x, create_graph=True),
    "jacobian, vectorised": lambda f, params, x: torch.autograd.functional.jacobian(
        lambda x: f(params, x), x, vectorize=True
    ),
    "jacobian, forward mode": lambda f, params, x: torch.autograd.functional.jacobian(
        lambda x: f(params, x), x, vectorize=True, strategy="forward-mode"
    ),
    "make_fx": lambda f, params, x: make_fx(grad(loss_of(f)))(params, x)(params, x),
}


def assert_same(actual: Any, expected: Any) -> None:
    actual, expected = (torch.utils._pytree.tree_leaves(result) for result in (actual, expected))
    assert len(actual) == len(expected) > 0
    for one, other in zip(actual, expected, strict=True):
        assert other.abs().max() > 1e-3, "nothing to compare"
        assert_close64(one, other)


@pytest.mark.parametrize("base", ["linear", "own_forward"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@few_cases
def test_transforms(case, transform, base):
    _, ours, definition, params = functions(case, base)
    x = random_input(*TOKENS, case.in_features)
    assert_same(transform(ours, params, x), transform(definition, params, x))


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_plain_lora_has_the_same_transforms(transform):
    """That they work at all is PEFT's doing: what of torch plain LoRA cannot have is not asked of GraLoRA either."""
    case = Case(1, 4, 0, 12, 20)
    model = adapted(one_layer(case), peft.LoraConfig(r=4, target_modules=["layer"]))
    params = {name: p.detach() for name, p in adapter_parameters(model).items()}
    transform(lambda p, x: functional_call(model, p, (x,)), params, random_input(*TOKENS, case.in_features))


@pytest.mark.parametrize("base", ["linear", "own_forward"])
def test_gradcheck(base):
    """torch's own: batched gradients, forward mode, both at once, second derivatives, undefined gradients."""
    _, ours, _, params = functions(Case(2, 3, 1, 6, 4), base)
    inputs = [t.requires_grad_() for t in (random_input(2, 6), *params.values())]

    def f(x: Tensor, *factors: Tensor) -> Tensor:
        return ours(dict(zip(params, factors, strict=True)), x)

    modes = {"check_batched_grad": True, "check_forward_ad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(f, inputs, **modes)
    assert torch.autograd.gradgradcheck(f, inputs, check_batched_grad=True, check_fwd_over_rev=True)


@pytest.mark.parametrize("base", ["linear", "own_forward"])
@pytest.mark.parametrize("gradients", [True, False])
@few_cases
def test_jit_trace(case, gradients, base):
    """Traced with three dimensions, run with other sizes of the first two."""
    model = model_of(case, base)
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(model, random_input(2, 3, case.in_features))
        x = random_input(4, 5, case.in_features)
        assert_close64(traced(x), model(x))


# Every kind of layer, whose input may be one that has no derivatives


class Definition(nn.Module):
    """The base model with W + dW by the loop over blocks, from the factors of an adapted model."""

    def __init__(self, kind: Kind, model: nn.Module) -> None:
        super().__init__()
        self.kind, self.model, self.base = kind, model, kind.build()

    def forward(self, x: Tensor) -> Tensor:
        deltas = self.kind.deltas(self.model)
        return functional_call(self.base, {name: self.base.get_parameter(name) + dW for name, dW in deltas.items()}, x)


def dual_of_factors(f: Function, params: dict[str, Tensor], x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(t, t.flip(0)) for name, t in params.items()}
        return forward_ad.unpack_dual(f(duals, x)).tangent


def batched_of_factors(f: Function, params: dict[str, Tensor], x: Tensor) -> tuple[Tensor, ...]:
    leaves = {name: t.clone().requires_grad_() for name, t in params.items()}
    y = f(leaves, x)
    return torch.autograd.grad(y, list(leaves.values()), random_input(4, *y.shape), is_grads_batched=True)


OF_FACTORS: dict[str, Callable[[Function, dict[str, Tensor], Tensor], Any]] = {
    "grad": TRANSFORMS["grad"],
    "ensemble": ensemble,
    "jvp": lambda f, params, x: jvp(lambda p: f(p, x), (params,), (params,)),
    "jacrev": lambda f, params, x: jacrev(loss_of(f))(params, x),
    "dual level": dual_of_factors,
    "batched gradients": batched_of_factors,
}


@pytest.mark.filterwarnings("ignore:Could not identify embedding layer")
@pytest.mark.parametrize("kind", [kind for kind in FEW if kind.mixes], ids=str)  # of others PEFT caches W + dW
def test_transforms_of_every_kind(kind):
    """All that plain LoRA takes, with the results of the definition."""
    model = adapted(kind.build(), kind.config(2, 7, 3)).eval()
    definition, plain = Definition(kind, model), adapted(kind.build(), kind.plain_config()).eval()
    params = {name: p.detach() for name, p in adapter_parameters(model).items()}
    plain_params = {name: p.detach() for name, p in adapter_parameters(plain).items()}
    for transform in OF_FACTORS.values():
        transform(lambda p, x: functional_call(plain, p, (x,)), plain_params, kind.x())
        found = transform(lambda p, x: functional_call(model, p, (x,)), params, kind.x())
        of_model = {f"model.{name}": t for name, t in params.items()}
        assert_same(found, transform(lambda p, x: functional_call(definition, p, (x,)), of_model, kind.x()))
    assert_close64(torch.jit.trace(model, kind.x())(kind.x()), definition(kind.x()))


def onnx_result(model: nn.Module, x: Tensor, dynamo: bool) -> Tensor:
    """Of the exported model, run by ONNX's own interpreter."""
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    from onnx.reference import ReferenceEvaluator

    file = io.BytesIO()
    torch.onnx.export(model, (x,), file, dynamo=dynamo, input_names=["x"])
    (y,) = ReferenceEvaluator(file.getvalue()).run(None, {"x": x.numpy()})
    return torch.from_numpy(y)


@pytest.mark.filterwarnings("ignore")  # of the exporters, of themselves
@pytest.mark.parametrize("dynamo", [False, True], ids=["TorchScript", "torch.export"])
@pytest.mark.parametrize("kind", [kind for kind in FEW if kind.mixes], ids=str)
def test_onnx(kind, dynamo):
    """In float32."""
    model = adapted(kind.build(), kind.config(2, 7, 3)).eval().float()
    x = kind.x()
    x = x.float() if x.is_floating_point() else x
    torch.testing.assert_close(onnx_result(model, x, dynamo), model(x).detach(), rtol=1e-5, atol=1e-4)


@dora
def test_transforms_with_dora():
    """As in a batch of gradients computed one by one, and run by ONNX's interpreter."""
    case = Case(2, 7, 3, 20, 12)
    model = adapted(one_layer(case), case_config(case, use_dora=True)).eval()
    params = {name: p.detach() for name, p in adapter_parameters(model).items()}
    x = random_input(3, case.in_features)
    leaves = [t.requires_grad_() for t in params.values()]
    y = functional_call(model, params, (x,))
    dy = random_input(4, *y.shape)
    batch = torch.autograd.grad(y, leaves, dy, is_grads_batched=True, retain_graph=True)
    for i, one in enumerate(dy):
        assert_same([t[i] for t in batch], torch.autograd.grad(y, leaves, one, retain_graph=True))
    model, x = model.float(), x.float()
    for dynamo in (False, True):
        torch.testing.assert_close(onnx_result(model, x, dynamo), model(x).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["grad of x", "jvp", "jacrev", "vmap"])
def test_compiled_transforms_with_dropout(name):
    """Compiled, a layer with dropout is an operator; inside of a transform it must not be one."""
    case = Case(2, 7, 3, 20, 12)
    model = adapted(one_layer(case), case_config(case, lora_dropout=1e-12)).train()
    params = {name: p.detach() for name, p in adapter_parameters(model).items()}

    def ours(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, params, (x,))

    def transformed(params: dict[str, Tensor], x: Tensor) -> Any:
        if name == "vmap":
            return vmap(ours, (None, 0), randomness="different")(params, x)
        return TRANSFORMS[name](ours, params, x)

    x = random_input(*TOKENS, case.in_features)
    assert_same(torch.compile(transformed, backend="aot_eager")(params, x), transformed(params, x))


def test_levels_are_left_again():
    """After a transform, also one that failed, the layer computes in one operation again."""
    case = Case(2, 4, 0, 12, 20)
    model = model_of(case, "linear")
    x = random_input(3, case.in_features)

    def fails(x: Tensor) -> Tensor:
        assert torch_seam.is_transformed()
        raise ZeroDivisionError

    for enter in (grad, vmap, lambda f: lambda x: jvp(f, (x,), (x,)), lambda f: lambda x: torch.jit.trace(f, x)):
        with pytest.raises(ZeroDivisionError):
            enter(fails)(x)
        assert not torch_seam.is_transformed()
        assert type(model(x).grad_fn).__name__ == "GraloraLinearFunctionBackward"
