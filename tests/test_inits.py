"""Initialisations: a row of INITS reaches every kind of layer, its factors block by block, and the base weight.

What each does to one block is compared with PEFT's own LoRA of a layer that has the block's weight.
"""

import inspect
import re
import warnings
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

import helpers
import peft
import pytest
import torch
from helpers import CASES, Case, OneLayer, case_config, cases, naive_delta, one_layer, only_layer, random_factors
from kinds_table import FEW, Kind
from peft import LoraGAConfig, get_peft_model
from peft.tuners import lora
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gralora import inits
from gralora.blocks import Factors, blocks_of_A, blocks_of_B, join_blocks, split_blocks, transposed
from gralora.inits import INITS, NITER, Init

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
    with pytest.raises(ValueError, match="init_lora_weights='other'"):
        kind.config(2, 6, 0, init_lora_weights="other")


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


# The rows of PEFT's names

CASE = Case(2, 11, 3, 16, 24)  # q = 4
SAMPLES = torch.randn(64, CASE.in_features, generator=torch.Generator().manual_seed(5))
CHANGING = ["pissa", "pissa_niter_8", "olora", "corda", "lora_ga", "loftq"]
FIELDS: dict[str, dict[str, Any]] = {
    "loftq": {"loftq_config": {"loftq_bits": 4, "loftq_iter": 3}},
    "corda": {"corda_config": CordaConfig(prune_temporary_fields=False)},
    "lora_ga": {"lora_ga_config": LoraGAConfig()},
}


def prepared(base: nn.Module, config: peft.LoraConfig, x: Tensor = SAMPLES) -> nn.Module:
    """The base model after what PEFT wants to have been done with it."""
    x = x.to(next(base.parameters()).dtype)
    if config.init_lora_weights == "corda":
        preprocess_corda(base, config, lambda: base(x))
    if config.init_lora_weights == "lora_ga":
        preprocess_loraga(base, config, lambda: base(x.clone().requires_grad_()).square().sum().backward())
    return base


def started(
    init: str | bool, kind: str = "linear", dtype: torch.dtype = torch.float64, **fields: Any
) -> tuple[Any, Tensor]:
    """The adapter layer of an initialised model, and the base weight before, `[O, I]`."""
    base = one_layer(CASE, kind, dtype)
    weight = base.layer.weight.detach().clone()
    config = case_config(CASE, init_lora_weights=init, **FIELDS.get(str(init), {}) | fields)
    torch.manual_seed(1)
    model = get_peft_model(prepared(base, config), config, autocast_adapter_dtype=False)
    return only_layer(model), weight.T if kind == "conv1d" else weight


def peft_of_block(init: str | bool, weight: Tensor, x: Tensor, **fields: Any) -> tuple[Tensor, Tensor]:
    """dW of PEFT's LoRA, with the scaling of `CASE`, of a layer with the block's weight, and what is left of it."""
    base = OneLayer(nn.Linear(*weight.T.shape, bias=False)).float()
    base.layer.weight.data = weight.float().clone()
    q, fields = CASE.r_g // CASE.k, FIELDS.get(str(init), {}) | fields
    config = peft.LoraConfig(r=q, lora_alpha=3 * q, target_modules=["layer"], init_lora_weights=init, **fields)
    layer = only_layer(get_peft_model(prepared(base, config, x.float()), config))
    return layer.get_delta_weight("default").detach(), layer.get_base_layer().weight.detach()


def blocks_of_peft(init: str, weight: Tensor, **fields: Any) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    for j, row in enumerate(split_blocks(weight, CASE.k)):
        for i, block in enumerate(row):
            yield j, i, *peft_of_block(init, block, SAMPLES.chunk(CASE.k, -1)[i], **fields)


def test_every_name_that_peft_knows_has_a_row() -> None:
    """In its annotation, and in the code that asks for names; a name that a new PEFT brings fails here."""
    kinds_of_value = get_args(get_type_hints(peft.LoraConfig)["init_lora_weights"])
    names = {word for kind in kinds_of_value if get_origin(kind) is Literal for word in get_args(kind)}
    source = inspect.getsource(lora.LoraLayer.update_layer) + inspect.getsource(lora.LoraLayer.reset_lora_parameters)
    asked = r'init_lora_weights(?:\.lower\(\))? == "(\w+)"|init_lora_weights\.startswith\("(\w+)"\)'
    names |= {one or other for one, other in re.findall(asked, source)}
    assert len(names) > 8 and names <= INITS.keys() and {True, False} <= INITS.keys()
    assert inits.find("pissa_niter_16") is INITS[NITER] and inits.find("OLoRA") is INITS["olora"]


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("init", [*CHANGING, "orthogonal"])
def test_base_and_update_are_the_weight_at_the_start(init: str, kind: str) -> None:
    """W' + dW = W; LoftQ's sum is closer to W than the quantised weight alone."""
    layer, W = started(init, kind)
    left, dW = layer.base_matrix(), layer.as_matrix(layer.get_delta_weight("default"))
    assert blocks_of_B(layer.factors("default").B).abs().amax((-2, -1)).min() > 0, "a block is empty"
    if init == "loftq":
        assert (left + dW - W).norm() < 0.6 * (left - W).norm() and 0.03 < (left - W).norm() / W.norm() < 0.2
        return
    torch.testing.assert_close(left + dW, W, rtol=0, atol=1e-12)
    assert torch.equal(left, W) == (init == "orthogonal")
    assert not hasattr(layer.get_base_layer(), "covariance_matrix")


@pytest.mark.parametrize("init", ["pissa", "olora", "corda"])
def test_each_block_is_what_peft_makes_of_a_layer_with_its_weight(init: str) -> None:
    """The same dW and the same weight is left, with the scaling of the grid."""
    layer, W = started(init)
    scaling = float(layer.factors("default").scaling)
    dW, left = split_blocks(layer.get_delta_weight("default"), CASE.k), split_blocks(layer.base_matrix(), CASE.k)
    for j, i, expected, expected_left in blocks_of_peft(init, W):
        if init == "corda":  # PEFT divides inputs by their largest before it takes the covariance, and then damps it
            assert (dW[j, i] - expected).norm() < 0.02 * expected.norm()
            continue
        torch.testing.assert_close(dW[j, i], expected.double(), rtol=0, atol=1e-5)
        torch.testing.assert_close(left[j, i], expected_left.double(), rtol=0, atol=1e-5)
    assert scaling == 3


@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r"])
def test_lora_ga_of_each_block_is_peft_s(direction: str, scale: str) -> None:
    """Of the gradient's block, up to the signs of singular vectors, which are nobody's choice."""
    options = LoraGAConfig(direction=direction, scale=scale)  # type: ignore[arg-type]
    layer, W = started("lora_ga", lora_ga_config=options)
    gradients, factors = split_blocks(gradient(), CASE.k), layer.factors("default")
    fields = {"target_modules": ["layer"], "init_lora_weights": "lora_ga", "lora_ga_config": options}
    for j, row in enumerate(split_blocks(W, CASE.k)):
        for i, block in enumerate(row):
            plain = OneLayer(nn.Linear(*block.T.shape, bias=False))
            plain.layer.weight.data = block.float().clone()
            plain.layer._peft_loraga_grad = gradients[j, i].float()
            expected = only_layer(get_peft_model(plain, peft.LoraConfig(r=4, lora_alpha=12, **fields)))
            for ours, theirs in [(blocks_of_A(factors.A), expected.lora_A), (blocks_of_B(factors.B), expected.lora_B)]:
                size = theirs["default"].weight.abs().double()
                torch.testing.assert_close(ours[j, i].abs(), size, rtol=0, atol=1e-3 * size.max().item())


def gradient() -> Tensor:
    """Of the loss in `prepared`, `[O, I]`."""
    base = one_layer(CASE)
    base(SAMPLES.double()).square().sum().backward()
    assert base.layer.weight.grad is not None
    return base.layer.weight.grad


def test_lora_ga_of_random_directions_starts_in_the_gradient() -> None:
    """Each block's dW lies in the spans of the first 2 q singular vectors of the gradient's block, and is not zero."""
    options = LoraGAConfig(direction="random")
    layer, _ = started("lora_ga", lora_ga_config=options)
    U, _, Vh = torch.linalg.svd(split_blocks(gradient(), CASE.k), full_matrices=False)
    U, Vh, dW = U[..., :8], Vh[..., :8, :], split_blocks(layer.get_delta_weight("default"), CASE.k)
    torch.testing.assert_close(U @ (U.mT @ dW @ Vh.mT) @ Vh, dW, rtol=0, atol=1e-6 * dW.abs().max().item())
    assert (torch.linalg.matrix_rank(dW) == 4).all()


@cases
def test_pissa_has_the_best_approximation_of_each_block(case: Case) -> None:
    """Whatever the grid; a randomised SVD comes close, and leaves the same weight whatever was drawn before."""
    weight = one_layer(case).layer.weight.detach()
    for init in ("pissa", "pissa_niter_20"):
        config = case_config(case, init_lora_weights=init)
        first, second = (
            only_layer(get_peft_model(one_layer(case), config, autocast_adapter_dtype=False)) for _ in range(2)
        )
        q = case.r_g // case.k
        U, S, Vh = torch.linalg.svd(split_blocks(weight, case.k), full_matrices=False)
        best = join_blocks(U[..., :q] * S[..., None, :q] @ Vh[..., :q, :])
        dW = first.get_delta_weight("default")
        if init == "pissa":
            torch.testing.assert_close(dW, best, rtol=0, atol=1e-10)
        assert (weight - best).norm() * (1 - 1e-9) <= (weight - dW).norm() <= (weight - best).norm() * 1.01
        assert torch.equal(first.base_layer.weight, second.base_layer.weight)


def test_orthogonal_factors() -> None:
    """In each block B A = 0 while both are not, of PEFT's size."""
    layer, _ = started("orthogonal")
    factors = layer.factors("default")
    A, B = blocks_of_A(factors.A), blocks_of_B(factors.B)
    torch.testing.assert_close(B @ A, torch.zeros_like(B @ A), rtol=0, atol=1e-12)
    assert 0.03 < A.std() < 0.12 and 0.03 < B.std() < 0.12
    with pytest.raises(ValueError, match="'orthogonal'.*'layer'.*gralora_k = 3, must be even"):
        get_peft_model(one_layer(CASE), case_config(CASE._replace(r=9), init_lora_weights="orthogonal"))


def test_mica_takes_the_last_left_singular_vectors_of_each_block() -> None:
    """B stays frozen, also after the adapter was chosen anew, and A starts at zero."""
    layer, W = started("mica", dtype=torch.float32)
    A, B, hybrid_A, hybrid_B, _ = layer.factors("default")
    U, _, _ = torch.linalg.svd(split_blocks(W, CASE.k), full_matrices=False)
    torch.testing.assert_close(blocks_of_B(B) @ blocks_of_B(B).mT, U[..., -4:] @ U[..., -4:].mT)
    assert hybrid_A is not None and hybrid_B is not None and not A.count_nonzero() and not hybrid_A.count_nonzero()
    torch.testing.assert_close(hybrid_B.T @ hybrid_B, torch.eye(3))
    layer.set_adapter("default")
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"lora_A.default.weight", "lora_A.default.hybrid_weight"}


@pytest.mark.parametrize("init", ["pissa", "olora", "lora_ga", "orthogonal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_start_in_lower_precision(init: str, dtype: torch.dtype) -> None:
    """W' + dW is W within one rounding of W' to its dtype."""
    layer, W = started(init, dtype=dtype)
    total = layer.base_matrix().double() + layer.get_delta_weight("default").double()
    assert (total - W.double()).abs().max() < torch.finfo(dtype).eps * max(1, layer.base_matrix().abs().max().item())


@kinds
@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_rows_that_need_the_weight_alone_are_for_all_kinds(kind: Kind, init: str) -> None:
    """The model's output is the base model's at the start."""
    base, x = kind.build(), kind.x()
    expected = base(x)
    model = get_peft_model(base, kind.config(2, 7, 3, init_lora_weights=init), autocast_adapter_dtype=False).eval()
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-10)
    assert all(layer.factors("default").A.count_nonzero() for layer in kind.layers(model).values())


# What cannot start

TOO_MANY = Case(2, 36, 0, 16, 40)
REFUSED = {
    "ranks": ("pissa", {}, TOO_MANY, "needs 18 singular vectors and has 8; .* may be 16 at most, and is 36"),
    "twice the ranks": ("lora_ga", {}, Case(2, 12, 0, 16, 16), "needs 12 singular vectors and has 8; .* 8 at most"),
    "mica": ("mica", {}, TOO_MANY, "r=36 must not be more than its 16 features"),
    "gradient": ("lora_ga", FIELDS["lora_ga"], CASE, "preprocess_loraga before get_peft_model.*original weights"),
    "covariance": ("corda", FIELDS["corda"], CASE, "preprocess_corda before get_peft_model.*original weights"),
    "scaling": ("pissa", {"lora_alpha": 0}, CASE, "lora_alpha=0 must be positive"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_layer_lacks_is_said_before_anything_is_changed(name: str) -> None:
    """By the layer, the reason and the way out."""
    init, fields, case, message = REFUSED[name]
    base = one_layer(case)
    before = base.layer.weight.detach().clone()
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}'.*'layer'.*{message}"):
        get_peft_model(base, case_config(case, init_lora_weights=init, **FIELDS.get(init, {}) | fields))
    assert type(base.layer) is nn.Linear and torch.equal(base.layer.weight, before)


@kinds
@pytest.mark.parametrize("init", ["eva", "mica", "corda", "lora_ga", "loftq"])
def test_rows_of_linear_layers_refuse_others(kind: Kind, init: str) -> None:
    """As PEFT, which has them for two classes, but with an error where PEFT starts another way or fails."""
    base = kind.build()
    if isinstance(getattr(base, "layer", None), nn.Linear | Conv1D):
        return
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}'.*for nn.Linear and transformers' Conv1D alone"):
        get_peft_model(base, kind.config(2, 6, 0, init_lora_weights=init, **FIELDS.get(init, {})))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
        self.layer.weight = self.embedding.weight


def test_a_weight_that_others_use_is_not_changed() -> None:
    """Neither one that another layer shares, nor one for which the model has another adapter."""
    config = case_config(Case(2, 4, 0, 8, 12), init_lora_weights="pissa")
    with pytest.raises(ValueError, match="'layer' shares its weight with another layer.*out of the targets"):
        get_peft_model(Tied(), config)
    model = get_peft_model(one_layer(CASE), case_config(CASE))
    before = only_layer(model).base_layer.weight.detach().clone()
    with pytest.raises(ValueError, match=r"the model's adapters \['default'\].*path_initial_model_for"):
        model.add_adapter("other", case_config(CASE, init_lora_weights="olora"))
    assert torch.equal(only_layer(model).base_layer.weight, before)
    with torch.device("meta"):
        empty = OneLayer(nn.Linear(16, 24))
    with pytest.raises(ValueError, match="'layer' has no values"):
        get_peft_model(empty, case_config(CASE, init_lora_weights="pissa"))


def test_nothing_is_drawn_from_the_program_s_sequence() -> None:
    """A randomised SVD, here and of the gradient, draws from a generator of its own; PEFT's draws stay."""
    states = []
    for init in ("pissa", "pissa_niter_2", "lora_ga"):
        started(init)
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


def test_initial_settings_of_unused_warnings() -> None:
    """What gralora fills in for EVA and CorDA raises none of PEFT's warnings about a missing config."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for init in ("eva", "corda"):
            case_config(CASE, init_lora_weights=init)
