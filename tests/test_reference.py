"""Laws of the definition in `ops.reference`, in double precision."""

import pytest
import torch
from helpers import (
    BATCH_SHAPES,
    CASES,
    Case,
    Factors,
    assert_close64,
    cases,
    integer_factors,
    naive_delta,
    naive_update,
    random_factors,
    random_input,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from gralora.ops import reference

law = settings(deadline=None, max_examples=50)


@st.composite
def any_case(draw: st.DrawFn) -> Case:
    """A pure grid of any sizes that its k allows."""
    k, q, chunk_in, chunk_out = (draw(st.integers(1, 5)) for _ in range(4))
    return Case(k, k * q, 0, k * chunk_in, k * chunk_out)


@cases
@pytest.mark.parametrize("batch", BATCH_SHAPES, ids=str)
def test_output_equals_the_block_loop(case, batch):
    """`up(down(x))` is the grid written block by block, for any batch dimensions, also none and empty ones."""
    factors = random_factors(case)._replace(hybrid_A=None, hybrid_B=None)
    x = random_input(*batch, case.in_features)
    assert_close64(reference.up(reference.down(x, factors.A), factors.B), naive_update(x, factors))


@cases
def test_gradients_equal_the_block_loop(case):
    """The gradients of x, A and B are those of the block loop."""
    factors = random_factors(case)._replace(hybrid_A=None, hybrid_B=None).to(torch.float64)
    x = random_input(7, case.in_features).requires_grad_()
    dy = random_input(7, case.out_features, seed=9)
    inputs = [x, factors.A, factors.B]
    actual = torch.autograd.grad(reference.up(reference.down(x, factors.A), factors.B), inputs, dy)
    expected = torch.autograd.grad(naive_update(x, factors), inputs, dy)
    for a, e in zip(actual, expected, strict=True):
        assert_close64(a, e)


@law
@given(case=any_case(), tokens=st.integers(0, 5), seed=st.integers(0, 1000))
def test_definition_holds_for_any_sizes(case, tokens, seed):
    """For any k, ranks and features, odd ones included, output and dW are those of the block loop."""
    A, B, *_ = factors = random_factors(case, seed=seed)
    x = random_input(tokens, case.in_features, seed=seed)
    assert_close64(reference.up(reference.down(x, A), B), naive_update(x, factors))
    assert_close64(reference.delta_weight(A, B), naive_delta(factors))


@law
@given(case=any_case(), seed=st.integers(0, 1000))
def test_forward_is_the_map_of_delta_weight(case, seed):
    """`up(down(x)) == x @ dW.T`: exactly, with integers."""
    A, B, *_ = integer_factors(case, seed=seed)
    x = torch.randint(-3, 4, (3, case.in_features)).double()
    assert torch.equal(reference.up(reference.down(x, A), B), x @ reference.delta_weight(A, B).T)


@law
@given(case=any_case(), seed=st.integers(0, 1000))
def test_parameter_count_does_not_depend_on_k(case, seed):
    """A and B together have LoRA's r * (in + out) elements for every k."""
    A, B, *_ = random_factors(case, seed=seed)
    assert A.numel() + B.numel() == case.r * (case.in_features + case.out_features)


def test_one_block_is_plain_lora():
    """With k = 1 the grid is B A of a plain LoRA: exactly, with integers."""
    case = Case(1, 4, 0, 12, 20)
    A, B, *_ = integer_factors(case)
    x = torch.randint(-3, 4, (7, case.in_features)).double()
    assert torch.equal(reference.up(reference.down(x, A), B), x @ A[0] @ B[0])
    assert torch.equal(reference.delta_weight(A, B), (A[0] @ B[0]).T)


@cases
def test_exchange_reaches_every_pair_of_blocks(case):
    """Every output block depends on every input chunk: no block of dW is zero."""
    A, B, *_ = random_factors(case)
    blocks = reference.delta_weight(A, B).unflatten(0, (case.k, -1)).unflatten(2, (case.k, -1))
    assert (blocks.abs().amax(dim=(1, 3)) > 0).all()


@cases
def test_exchange_order(case):
    """Place i of the exchanged sub-ranks of output block j is the j-th part of h_i."""
    A, *_ = random_factors(case)
    x = random_input(7, case.in_features)
    q, chunk = case.r_g // case.k, case.in_features // case.k
    g = reference.down(x, A).unflatten(-1, (case.k, case.k, q))  # [T, j, i, q]
    for i in range(case.k):
        h_i = x[:, i * chunk : (i + 1) * chunk] @ A[i]
        for j in range(case.k):
            assert_close64(g[:, j, i], h_i[:, j * q : (j + 1) * q])


@cases
def test_rank_reaches_k_times_r(case):
    """The numerical rank of dW of random factors is k * r_g, or all that the features allow."""
    A, B, *_ = random_factors(case)
    rank = torch.linalg.matrix_rank(reference.delta_weight(A, B)).item()
    assert rank == min(case.k * case.r_g, case.in_features, case.out_features)


def test_zero_up_projection_changes_nothing():
    """With B = 0, as at the start of training, output and dW are zero."""
    A, B, *_ = random_factors(CASES[2])
    x = random_input(3, CASES[2].in_features)
    assert not reference.up(reference.down(x, A), torch.zeros_like(B)).any()
    assert not reference.delta_weight(A, torch.zeros_like(B)).any()


@cases
def test_scaling_of_delta_weight(case):
    """`scaling` multiplies dW."""
    A, B, *_ = random_factors(case)
    assert_close64(reference.delta_weight(A, B, -0.7), -0.7 * naive_delta(Factors(A, B, None, None)))


@cases
@pytest.mark.parametrize("batch", BATCH_SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
def test_adapted_linear_layer(case, batch, with_bias):
    """`linear` is x W^T + bias + scaling * (grid + B_s A_s x)."""
    factors, x = random_factors(case), random_input(*batch, case.in_features)
    weight = random_input(case.out_features, case.in_features, seed=5)
    bias = random_input(case.out_features, seed=6) if with_bias else None
    expected = torch.nn.functional.linear(x, weight, bias) - 0.7 * naive_update(x, factors)
    assert_close64(reference.linear(x, weight, bias, reference.Factors(*factors, -0.7)), expected)


def test_gradcheck_of_delta_weight():
    """dW can be differentiated: numerical and analytical gradients agree."""
    A, B, *_ = random_factors(Case(2, 4, 0, 4, 6)).to(torch.float64)
    assert torch.autograd.gradcheck(reference.delta_weight, (A, B, 0.5))
