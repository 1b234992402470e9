"""Initialisations: a row of INITS reaches every kind of layer, its factors block by block, and the base weight."""

from typing import Any

import helpers
import pytest
import torch
from helpers import CASES, case_config, cases, naive_delta, one_layer, only_layer, random_factors
from kinds_table import FEW, Kind
from peft import get_peft_model
from peft.tuners import lora
from torch import nn

from gralora import config as configs
from gralora.blocks import Factors, blocks_of_A, blocks_of_B, transposed
from gralora.inits import INITS, Init

kinds = pytest.mark.parametrize("kind", FEW, ids=str)


@torch.no_grad()
def spectral(layer: Any, adapter: str, config: Any) -> None:
    """The largest singular values of every block of the base weight become the adapter's, as PiSSA does with all."""
    A, B, hybrid_A, hybrid_B, scaling = layer.factors(adapter)
    W, k = layer.base_matrix(), A.shape[-3]
    by_block = W.unflatten(-1, (k, -1)).unflatten(-3, (k, -1)).transpose(-2, -3)  # [..., k_j, k_i, O/k, I/k]
    U, S, V = torch.linalg.svd(by_block, full_matrices=False)
    root = (S[..., : A.shape[-1] // k] / scaling).sqrt()
    rank = root.shape[-1]
    blocks_of_A(A).zero_()[..., :rank, :] = root[..., None] * V[..., :rank, :]
    blocks_of_B(B).zero_()[..., :rank] = U[..., :rank] * root[..., None, :]
    if hybrid_A is not None and hybrid_B is not None:
        hybrid_B.zero_()
    W -= layer.as_matrix(layer.get_delta_weight(adapter))


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(INITS, "spectral", Init(True, spectral))
    monkeypatch.setattr(configs, "SUPPORTED_INITS", tuple(INITS))


@kinds
def test_initialisation_by_block_that_changes_the_base(kind: Kind, row: None) -> None:
    """W + dW stays what W was, dW has the largest singular values of every block, and the output is the base's."""
    base, x = kind.build(), kind.x()
    expected, weights = base(x), {name: base.get_parameter(name).detach().clone() for name in kind.weights}
    model = get_peft_model(base, kind.config(2, 7, 3, init_lora_weights="spectral"), autocast_adapter_dtype=False)
    for name, layer in kind.layers(model).items():
        dW, W = layer.get_delta_weight("default"), layer.base_weight().detach()
        torch.testing.assert_close(W + dW, weights[name], rtol=0, atol=1e-10)
        assert dW.norm() > 0.1 * weights[name].norm() and not torch.allclose(W, weights[name])
    torch.testing.assert_close(model.eval()(x), expected, rtol=0, atol=1e-10)


@kinds
def test_peft_draws_what_the_row_says(kind: Kind, row: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT gets the row's `drawn`, never a name that it would decompose the weight for; the config keeps the name."""
    asked, seen = [], []
    stock = lora.LoraModel._create_new_module

    def watched(lora_config, *args, **kwargs):
        asked.append(lora_config.init_lora_weights)
        return stock(lora_config, *args, **kwargs)

    monkeypatch.setattr(lora.LoraModel, "_create_new_module", staticmethod(watched))
    monkeypatch.setitem(INITS, "spectral", Init(False, lambda layer, adapter, config: seen.append((layer, adapter))))
    model = get_peft_model(kind.build(), kind.config(2, 6, 0, init_lora_weights="spectral"))
    assert asked == [False] and model.peft_config["default"].init_lora_weights == "spectral"
    assert [(id(layer), name) for layer, name in seen] == [(id(m), "default") for m in kind.layers(model).values()]


def test_config_takes_the_names_of_the_rows(row: None) -> None:
    """A name is accepted if it is a row's."""
    kind = FEW[0]
    assert kind.config(2, 6, 0, init_lora_weights="spectral").init_lora_weights == "spectral"
    with pytest.raises(ValueError, match="init_lora_weights='pissa'"):
        kind.config(2, 6, 0, init_lora_weights="pissa")


@kinds
def test_matrix_and_weight_are_inverse(kind: Kind) -> None:
    """`as_weight` lays out what `as_matrix` has read, `base_matrix` is a view, and dW is `as_weight` of a matrix."""
    model = get_peft_model(kind.build(), kind.config(2, 6, 0, init_lora_weights=False))
    for layer in kind.layers(model).values():
        weight = layer.base_weight().detach()
        assert torch.equal(layer.as_weight(layer.as_matrix(weight)), weight)
        dW = layer.get_delta_weight("default")
        assert dW.norm() > 0 and torch.equal(layer.as_weight(layer.as_matrix(dW)), dW)
        before = weight.clone()
        layer.base_matrix().add_(1)
        assert torch.equal(weight, before + 1)


@cases
def test_blocks_and_transpose(case: Any) -> None:
    """Block (j, i) of dW is blocks_of_B[j, i] @ blocks_of_A[j, i]; the transposed factors' dW is the transpose."""
    A, B, hybrid_A, hybrid_B = random_factors(case)
    grid = naive_delta(random_factors(case)._replace(hybrid_A=None, hybrid_B=None))
    k = case.k
    expected = grid.unflatten(1, (k, -1)).unflatten(0, (k, -1)).transpose(1, 2)  # [k_j, k_i, O/k, I/k]
    torch.testing.assert_close(blocks_of_B(B) @ blocks_of_A(A), expected)
    stacked = blocks_of_B(torch.stack([B, 2 * B])) @ blocks_of_A(torch.stack([A, A]))
    torch.testing.assert_close(stacked, torch.stack([expected, 2 * expected]))
    swapped = transposed(Factors(A, B, hybrid_A, hybrid_B, 3.0))
    torch.testing.assert_close(naive_delta(helpers.Factors(*swapped[:4])).T, naive_delta(random_factors(case)))
    assert swapped.scaling == 3.0


def test_matrix_of_a_quantised_weight_is_refused() -> None:
    """A weight that holds no matrix is not given out as one."""
    model = get_peft_model(one_layer(CASES[0]), case_config(CASES[0]))
    layer = only_layer(model)
    layer.get_base_layer().weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="int8.*without quantisation"):
        layer.base_matrix()
