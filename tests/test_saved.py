"""What autograd is given to save of an adapted layer, and that parameters are noticed to change as it would notice."""

import peft
import pytest
import torch
from operators import add_update, gralora_linear
from torch import nn
from torch.nn import Parameter

from gralora import LoraConfig
from gralora.ops import plans

T, IN, OUT, K, R = 6, 8, 12, 2, 4


@pytest.fixture(params=["small", "large", "added"])
def layer(request, monkeypatch):
    """A function of x and of parameters by name: the fused layer, as small and large ones are computed, and the other
    path, which adds to a result and reads no weight."""
    if request.param == "large":
        monkeypatch.setattr(plans, "CPU", plans.Architecture("a GPU without kernels", (0, 0), "batched", large=0))

    def forward(x, weight, A, B, hybrid_A, hybrid_B):
        if request.param == "added":
            return add_update(torch.zeros(T, OUT), x, A, B, hybrid_A, hybrid_B, 0.5)
        return gralora_linear(x, weight, None, A, B, hybrid_A, hybrid_B, 0.5)

    forward.reads_weight = request.param != "added"
    return forward


@pytest.fixture
def parameters():
    torch.manual_seed(0)
    sizes = dict(weight=(OUT, IN), A=(K, IN // K, R), B=(K, R, OUT // K), hybrid_A=(3, IN), hybrid_B=(OUT, 3))
    return {name: Parameter(torch.randn(size), requires_grad=name != "weight") for name, size in sizes.items()}


def saved_by_autograd(forward):
    """The tensors that hooks on saved tensors get to see."""
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        forward()
    return seen


def test_hooks_see_no_parameters(layer, parameters):
    """Checkpointing and offloading get x and the sub-ranks of every block, nothing else."""
    x = torch.randn(T, IN)
    seen = saved_by_autograd(lambda: layer(x, **parameters))
    assert [tuple(t.shape) for t in seen] == [(T, IN), (K, T, R + 3)]
    assert seen[0].data_ptr() == x.data_ptr()


def test_other_tensors_are_saved_by_autograd(layer, parameters):
    """A weight that was converted for autocast, or factors computed from others, may be as many as the model's."""
    made = {name: parameter * 1.5 for name, parameter in parameters.items()}
    seen = saved_by_autograd(lambda: layer(torch.randn(T, IN), **made))
    shapes = {tuple(t.shape) for t in seen}
    assert {tuple(t.shape) for name, t in made.items() if name != "weight" or layer.reads_weight} <= shapes


def test_converted_weight_is_not_kept(parameters):
    """Under autocast a float32 base's weight is converted by each layer: checkpointing can free it."""
    base = nn.Sequential(nn.Linear(IN, OUT, bias=False))
    model = peft.get_peft_model(base, LoraConfig(use_gralora=True, gralora_k=K, r=R, target_modules=["0"]))

    def forward():
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.randn(T, IN))

    assert (OUT, IN) in {tuple(t.shape) for t in saved_by_autograd(forward) if t.dtype == torch.bfloat16}


@pytest.mark.parametrize("order", [1, 2])
def test_gradients_of_parameters(layer, parameters, order):
    """The same, of first and second order, as of tensors that autograd saves."""
    x, dy = torch.randn(T, IN, requires_grad=True), torch.randn(T, OUT)

    def gradients(tensors):
        inputs = [x, *(t for name, t in tensors.items() if name != "weight")]
        grads = torch.autograd.grad(layer(x, **tensors), inputs, dy, create_graph=order == 2)
        return grads if order == 1 else torch.autograd.grad(sum(g.pow(2).sum() for g in grads), inputs)

    plain = {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in parameters.items()}
    for ours, exact in zip(gradients(parameters), gradients(plain), strict=True):
        assert torch.equal(ours, exact)
        assert ours.count_nonzero() > 0


@pytest.mark.parametrize("name", ["weight", "A", "B", "hybrid_A", "hybrid_B"])
def test_parameter_changed_before_backward(layer, parameters, name):
    """As for tensors that autograd saves: an error, no gradient of another function."""
    y = layer(torch.randn(T, IN, requires_grad=True), **parameters)
    with torch.no_grad():
        parameters[name].mul_(2)
    if name == "weight" and not layer.reads_weight:
        y.sum().backward()
        return
    shape = list(parameters[name].shape)
    with pytest.raises(RuntimeError, match="modified by an inplace operation") as error:
        y.sum().backward()
    assert str(shape) in str(error.value)
    assert all(p.grad is None for p in parameters.values())


def test_graph_is_freed_once(layer, parameters):
    """A second backward needs retain_graph, as everywhere."""
    y = layer(torch.randn(T, IN, requires_grad=True), **parameters).sum()
    y.backward(retain_graph=True)
    first = parameters["A"].grad.clone()
    y.backward()
    torch.testing.assert_close(parameters["A"].grad, 2 * first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()
