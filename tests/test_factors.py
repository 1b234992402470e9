"""The same update in another layout: `grid_to_lora` and `hybrid_to_lora` copy entries and compute none."""

import pytest
import torch
from helpers import CASES, Case, Factors, cases, integer_factors, naive_delta, naive_update, random_factors
from hypothesis import given, settings
from hypothesis import strategies as st

from gralora.factors import grid_to_lora, hybrid_to_lora
from gralora.ops import reference

dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
law = settings(deadline=None, max_examples=50)


@st.composite
def any_case(draw: st.DrawFn) -> Case:
    k, q, chunk_in, chunk_out = (draw(st.integers(1, 4)) for _ in range(4))
    hybrid_r = draw(st.integers(0, 3))
    return Case(k, k * q + hybrid_r, hybrid_r, k * chunk_in, k * chunk_out)


def sorted_bits(t):
    """The non-zero entries of a tensor as numbers of its own dtype, in ascending order."""
    return t[t != 0].flatten().sort().values


@law
@given(case=any_case(), seed=st.integers(0, 1000))
def test_lora_factors_give_the_same_delta_weight(case, seed):
    """`B_lora @ A_lora` is dW, bit for bit with integers, for any k, ranks and features."""
    factors = integer_factors(case, seed=seed)
    A_lora, B_lora = hybrid_to_lora(*factors)
    assert A_lora.shape == (case.k * case.r_g + case.hybrid_r, case.in_features)
    assert B_lora.shape == (case.out_features, case.k * case.r_g + case.hybrid_r)
    assert torch.equal(B_lora @ A_lora, naive_delta(factors))
    A_grid, B_grid = grid_to_lora(factors.A, factors.B)
    assert torch.equal(B_grid @ A_grid, reference.delta_weight(factors.A, factors.B))


@law
@given(case=any_case(), seed=st.integers(0, 1000))
def test_lora_factors_give_the_same_output(case, seed):
    """A plain LoRA with these factors has the adapter's output, bit for bit with integers."""
    factors = integer_factors(case, seed=seed)
    x = torch.randint(-3, 4, (5, case.in_features)).double()
    A_lora, B_lora = hybrid_to_lora(*factors)
    assert torch.equal(x @ A_lora.T @ B_lora.T, naive_update(x, factors))


@cases
@dtypes
def test_entries_are_copied(case, dtype):
    """Every entry of the factors is found again, bit for bit and once for A and B each; the others are zero."""
    factors = random_factors(case, dtype)
    for lora, parts in zip(hybrid_to_lora(*factors), [factors[0::2], factors[1::2]], strict=True):
        entries = torch.cat([t.flatten() for t in parts if t is not None])
        assert lora.dtype == dtype and lora.is_contiguous()
        assert torch.equal(sorted_bits(lora), sorted_bits(entries))


@cases
def test_share_of_zeros(case):
    """1/k of the grid's entries in each LoRA factor is not zero."""
    A, B, *_ = random_factors(case)
    for lora in grid_to_lora(A, B):
        assert (lora != 0).sum() * case.k == lora.numel()


@cases
def test_grid_rows_are_the_exchanged_sub_ranks(case):
    """`x @ A_lora.T` is the exchanged g of the definition, so the rank dimension is ordered as documented."""
    A, B, *_ = integer_factors(case)
    x = torch.randint(-3, 4, (5, case.in_features)).double()
    A_lora, B_lora = grid_to_lora(A, B)
    g = reference.down(x, A)
    assert torch.equal(x @ A_lora.T, g)
    assert torch.equal(g @ B_lora.T, reference.up(g, B))


def test_one_block_is_a_transposition():
    """With k = 1 the LoRA factors are the transposed grid factors."""
    A, B, *_ = random_factors(CASES[0])
    A_lora, B_lora = grid_to_lora(A, B)
    assert torch.equal(A_lora, A[0].T) and torch.equal(B_lora, B[0].T)


@cases
@pytest.mark.parametrize("extra", [0, 1, 5])
def test_padding_to_a_rank(case, extra):
    """A given rank is reached with zeros behind the factors, which changes nothing."""
    factors = random_factors(case)
    A_lora, B_lora = hybrid_to_lora(*factors)
    rank = A_lora.shape[0]
    A_padded, B_padded = hybrid_to_lora(*factors, rank=rank + extra)
    assert A_padded.shape == (rank + extra, case.in_features) and B_padded.shape == (case.out_features, rank + extra)
    assert torch.equal(A_padded[:rank], A_lora) and not A_padded[rank:].any()
    assert torch.equal(B_padded[:, :rank], B_lora) and not B_padded[:, rank:].any()


def test_result_does_not_share_memory():
    """The result is a copy: writing to it leaves the adapter as it was."""
    factors = random_factors(CASES[0])
    before = Factors(*(t if t is None else t.clone() for t in factors))
    for lora in hybrid_to_lora(*factors):
        lora.fill_(7)
    assert torch.equal(factors.A, before.A) and torch.equal(factors.B, before.B)
