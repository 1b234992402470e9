"""How a layer is planned: rows of architectures, sizes, and what remains where a kernel cannot be compiled."""

import pytest
import torch
from operators import gralora_linear

from gralora.ops import fused, plans
from gralora.ops.interface import KernelUnavailable


@pytest.fixture
def hopper_gpu(monkeypatch):
    """A Hopper GPU, as far as planning asks torch about one."""
    pytest.importorskip("triton.experimental.gluon")
    monkeypatch.setattr(plans, "choice", "auto")
    monkeypatch.setattr(plans, "_failed", set())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    plans.architecture.cache_clear()
    yield
    plans.architecture.cache_clear()


@pytest.mark.parametrize(
    "capability, kernels, product",
    [
        ((12, 0), "kernels", ""),
        ((10, 3), "kernels", ""),
        ((9, 0), "kernels", "hopper"),
        ((8, 9), "kernels", ""),
        ((8, 0), "kernels", ""),
        ((7, 5), "batched", ""),
    ],
)
def test_row_of_a_gpu(hopper_gpu, monkeypatch, capability, kernels, product):
    """The first row whose compute capability it reaches."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    row = plans.architecture(0)
    assert (row.kernels, row.product) == (kernels, product)


def test_product_of_another_gpu(hopper_gpu, monkeypatch):
    """A row is all that names it: it is picked and described, and where it fails, the portable kernels compute."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    row = plans.Architecture("Blackwell", (10, 0), "kernels", product="batched")
    monkeypatch.setattr(plans, "ARCHITECTURES", (row, *plans.ARCHITECTURES))
    assert plans.architecture(0) is row
    assert plans.describe("cuda:0").startswith("fused torch + Triton + Blackwell matmul (")
    with pytest.warns(RuntimeWarning, match="the portable kernels compute instead"):
        plans.give_up(KernelUnavailable("cannot run", "batched"))
    assert plans.architecture(0).kernels == "kernels" and not plans.architecture(0).product


def test_kernels_of_another_gpu(hopper_gpu, monkeypatch):
    """Where they fail, torch computes, whatever their module is called."""
    row = plans.Architecture("a GPU", (0, 0), "reference")
    monkeypatch.setattr(plans, "ARCHITECTURES", (row, *plans.ARCHITECTURES))
    assert plans.architecture(0).kernels == "reference"
    with pytest.warns(RuntimeWarning, match="torch computes instead"):
        plans.give_up(KernelUnavailable("cannot run", "reference"))
    assert plans.architecture(0).kernels == "batched"


@pytest.mark.parametrize(
    "choice, kernels, product",
    [
        ("auto", "kernels", "hopper"),
        ("triton", "kernels", "hopper"),
        ("portable", "kernels", ""),
        ("torch", "batched", ""),
    ],
)
def test_choice_restricts_the_row(hopper_gpu, monkeypatch, choice, kernels, product):
    monkeypatch.setattr(plans, "choice", choice)
    row = plans.architecture(0)
    assert (row.kernels, row.product) == (kernels, product)
    assert ("Hopper" in plans.describe("cuda:0")) == (product == "hopper")


def test_kernels_that_cannot_run_are_given_up(hopper_gpu):
    """One after the other, each with one warning that says what failed and what computes instead."""
    broken = {"hopper": "linear_kernel cannot run with Triton 9.9: no such name", "kernels": "_down_kernel cannot run"}
    calls = []

    @plans.falls_back
    def compute(x):
        row = plans.architecture(0)
        calls.append((row.kernels, row.product))
        for module in (row.product, row.kernels):
            if module in broken:
                raise KernelUnavailable(broken[module], module)
        return x + 1

    with pytest.warns(RuntimeWarning) as warned:
        assert compute(1) == 2
    assert calls == [("kernels", "hopper"), ("kernels", ""), ("batched", "")]
    assert [str(w.message) for w in warned] == [
        f"{broken['hopper']}. From now on the portable kernels compute instead, more slowly.",
        f"{broken['kernels']}. From now on torch computes instead, more slowly.",
    ]
    assert compute(2) == 3 and len(calls) == 4
    with pytest.raises(KernelUnavailable):
        plans.give_up(KernelUnavailable("again", "hopper"))


def test_kernels_that_were_asked_for_are_not_given_up(hopper_gpu, monkeypatch):
    monkeypatch.setattr(plans, "choice", "triton")
    with pytest.raises(KernelUnavailable, match="no such name"):
        plans.give_up(KernelUnavailable("no such name", "hopper"))
    assert plans.architecture(0).product == "hopper"


class Broken:
    """A product that takes everything and cannot be compiled."""

    def takes(self, x, weight, B, device, z=None):
        return True

    def reads(self, x):
        return True

    def linear(self, *operands):
        raise KernelUnavailable("linear cannot run", "hopper")


@pytest.mark.parametrize("fails", ["forward", "backward"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_layer_whose_product_fails_is_computed_otherwise(monkeypatch, fails, grad):
    """In the forward after autograd has its part, and in the backward: the numbers of a layer that was never tried."""
    if fails == "backward" and not grad:
        pytest.skip("there is no backward")
    row = plans.Architecture("a GPU", (0, 0), "batched", dtypes=(torch.float64,), large=0)
    monkeypatch.setattr(plans, "CPU", row)
    monkeypatch.setattr(plans, "choice", "auto")
    monkeypatch.setattr(plans, "_failed", set())
    make = plans.plan

    def plan(*operands):
        how = make(*operands)
        if "hopper" in plans._failed:
            return how
        part = {"forward": Broken()} if fails == "forward" else {"backward": Broken(), "gradients_in_product": True}
        return plans.replace(how, **part)

    generator = torch.Generator().manual_seed(0)
    sizes = (5, 12), (8, 12), (2, 6, 4), (2, 4, 4)
    x, weight, A, B = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    trained = [t.requires_grad_(grad) for t in (x, A, B)]

    def run():
        y = gralora_linear(x, weight, None, A, B, None, None, 0.5)
        return [y, *(torch.autograd.grad(y.square().sum(), trained) if grad else ())]

    expected = run()
    monkeypatch.setattr(plans, "plan", plan)
    monkeypatch.setattr(fused, "plan", plan)
    with torch.set_grad_enabled(grad), pytest.warns(RuntimeWarning, match="linear cannot run") as warned:
        ours = run()
    assert len(warned) == 1
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
