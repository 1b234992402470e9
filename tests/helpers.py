"""What the tests share: tables of cases, tiny models, the block loop written from the formulas, the accuracy rules."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.integrations import peft as peft_integration
from transformers.pytorch_utils import Conv1D

from gralora import LoraConfig
from gralora.seam import MERGES_DORA

torch.set_num_threads(1)  # the tensors here are so small that more threads only wait for each other

TOLERANCE_FLOAT64 = 1e-10
VOCAB = 32

dora = pytest.mark.skipif(not MERGES_DORA, reason="PEFT before 0.21 merges DoRA wrongly")


def add_by_transformers(model: nn.Module, config: peft.PeftConfig) -> nn.Module:
    """Call a model's own `add_adapter`; the test is skipped where transformers asks for a PEFT that is not there."""
    wanted = peft_integration.MIN_PEFT_VERSION
    if Version(peft.__version__) < Version(wanted):
        pytest.skip(f"add_adapter of transformers {transformers.__version__} asks for PEFT {wanted}")
    model.add_adapter(config)
    return model


# `make probe` draws from another seed, and less often than a night's run
SEED = int(os.environ.get("GRALORA_PROBE_SEED", "0"))


def times(at_night: int) -> int:
    """How often a slow test of faults repeats what it does."""
    return int(os.environ.get("GRALORA_PROBE_TIMES", at_night))


class Case(NamedTuple):
    """Sizes of one adapted layer; `r` is the total rank, as in the config."""

    k: int
    r: int
    hybrid_r: int
    in_features: int
    out_features: int

    @property
    def r_g(self) -> int:
        return self.r - self.hybrid_r

    def __str__(self) -> str:
        return f"k{self.k}-r{self.r}-hybrid{self.hybrid_r}-{self.in_features}x{self.out_features}"


CASES = [  # every k pure and hybrid; one and several ranks per block; in smaller and larger than out
    Case(1, 4, 0, 12, 20),
    Case(1, 5, 2, 20, 12),
    Case(2, 4, 0, 12, 20),
    Case(2, 7, 3, 20, 12),
    Case(4, 4, 0, 24, 16),
    Case(4, 10, 2, 16, 28),
    Case(8, 8, 0, 16, 40),
    Case(8, 17, 1, 40, 24),
]
FEW_CASES = [CASES[0], CASES[3], CASES[5]]  # k = 1, 2, 4; for tests where another dimension varies
ACCURACY_CASES = [  # with 61 tokens, so many numbers that the largest rounding error is no accident
    Case(1, 8, 0, 48, 80),
    Case(2, 11, 3, 80, 48),
    Case(4, 20, 4, 64, 112),
    Case(8, 40, 8, 64, 48),
]
KINDS = ["linear", "conv1d"]

cases = pytest.mark.parametrize("case", CASES, ids=str)
few_cases = pytest.mark.parametrize("case", FEW_CASES, ids=str)
kinds = pytest.mark.parametrize("kind", KINDS)

BATCH_SHAPES = [(), (7,), (2, 3), (2, 1, 3), (0,), (2, 0)]


class Factors(NamedTuple):
    """A `[k, I/k, r_g]`, B `[k, r_g, O/k]`, A_s `[hybrid_r, I]` and B_s `[O, hybrid_r]` (None for a pure GraLoRA)."""

    A: Tensor
    B: Tensor
    hybrid_A: Tensor | None
    hybrid_B: Tensor | None

    def to(self, dtype: torch.dtype) -> "Factors":
        """Detached copies in another dtype that require gradients."""
        return Factors(*(t if t is None else t.detach().to(dtype, copy=True).requires_grad_() for t in self))

    def tensors(self) -> list[Tensor]:
        return [t for t in self if t is not None]


# The formulas, block by block


def naive_update(x: Tensor, factors: Factors) -> Tensor:
    """The adapter's output without scaling: h_i = x_i A_i, g_j = concat_i h_i[j], y_j = g_j B_j, and B_s A_s x."""
    A, B, hybrid_A, hybrid_B = factors
    k, chunk, r_g = A.shape
    q = r_g // k
    h = [x[..., i * chunk : (i + 1) * chunk] @ A[i] for i in range(k)]
    y = []
    for j in range(k):
        g_j = torch.cat([h[i][..., j * q : (j + 1) * q] for i in range(k)], dim=-1)
        y.append(g_j @ B[j])
    update = torch.cat(y, dim=-1)
    return update if hybrid_A is None else update + (x @ hybrid_A.T) @ hybrid_B.T


def naive_delta(factors: Factors) -> Tensor:
    """dW without scaling, `[O, I]`: block (j, i) is (A_i[:, j] B_j[i])^T, plus B_s A_s."""
    A, B, hybrid_A, hybrid_B = factors
    k, _, r_g = A.shape
    q = r_g // k
    rows = []
    for j in range(k):
        blocks = [(A[i][:, j * q : (j + 1) * q] @ B[j][i * q : (i + 1) * q]).T for i in range(k)]
        rows.append(torch.cat(blocks, dim=1))
    dW = torch.cat(rows)
    return dW if hybrid_A is None else dW + hybrid_B @ hybrid_A


def random_factors(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0) -> Factors:
    """Random, non-zero factors of one layer, scaled by 1/sqrt(fan_in)."""
    k, r, hybrid_r, in_features, out_features = case
    shapes = [(k, in_features // k, case.r_g), (k, case.r_g, out_features // k)]
    hybrid_shapes = [(hybrid_r, in_features), (out_features, hybrid_r)] if hybrid_r else []
    generator = torch.Generator().manual_seed(seed)
    tensors = [_normal(shape, generator).to(dtype) for shape in shapes + hybrid_shapes]
    return Factors(*tensors, *[None] * (4 - len(tensors)))


def integer_factors(case: Case, seed: int = 0) -> Factors:
    """Factors of small integers: sums of their products are exact in floating point, in whatever order."""
    generator = torch.Generator().manual_seed(seed)
    return Factors(
        *(
            None if t is None else torch.randint(1, 4, t.shape, generator=generator).double() * t.sign()
            for t in random_factors(case, seed=seed)
        )
    )


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    fan_in = shape[-2] if len(shape) == 3 else shape[-1]
    return torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(fan_in)


def random_input(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# Tiny models


class OneLayer(nn.Module):
    """A model of one layer, which is all that numerics need."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def one_layer(case: Case, kind: str = "linear", dtype: torch.dtype = torch.float64, bias: bool = True) -> OneLayer:
    """A Linear or Conv1D of the case's features with random weight and bias, the same at every call."""
    _, _, _, in_features, out_features = case
    layer = Conv1D(out_features, in_features) if kind == "conv1d" else nn.Linear(in_features, out_features, bias)
    generator = torch.Generator().manual_seed(2)
    for p in layer.parameters():
        fan_in = in_features if p.ndim == 2 else 1
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) / math.sqrt(fan_in)
    return OneLayer(layer.to(dtype))


def tiny_llama(dtype: torch.dtype = torch.float32, **config: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    options = {"vocab_size": VOCAB, "num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.3}
    tokens = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**sizes | options | tokens | config)).to(dtype)


def tiny_gpt2(dtype: torch.dtype = torch.float32, **config: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": VOCAB}
    options = {"initializer_range": 0.3, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    tokens = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes | options | tokens | config)).to(dtype)


MODELS: dict[str, Callable[..., nn.Module]] = {"llama": tiny_llama, "gpt2": tiny_gpt2}
models = pytest.mark.parametrize("model_name", MODELS)
TARGETS = {"llama": ["q_proj", "k_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}  # in != out in some of each


def token_ids(*shape: int, seed: int = 3) -> Tensor:
    return torch.randint(2, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def case_config(case: Case, **fields: Any) -> LoraConfig:
    """The config of a case, on `OneLayer`'s layer unless told otherwise; lora_alpha differs from r."""
    fields = {"target_modules": ["layer"], "lora_alpha": 3 * case.r} | fields
    return LoraConfig(r=case.r, use_gralora=True, gralora_k=case.k, hybrid_r=case.hybrid_r, **fields)


def gralora_config(k: int = 2, r: int = 8, hybrid_r: int = 0, **fields: Any) -> LoraConfig:
    """A GraLoRA config that fits the tiny models; lora_alpha differs from r."""
    fields = {"lora_alpha": 2 * r} | fields
    return LoraConfig(r=r, use_gralora=True, gralora_k=k, hybrid_r=hybrid_r, **fields)


def adapted(model: nn.Module, config: peft.LoraConfig, seed: int = 0, **options: Any) -> peft.PeftModel:
    """A PEFT model in evaluation mode with random, non-zero adapter weights."""
    return randomize(peft.get_peft_model(model, config, **options), seed=seed).eval()


def adapter_parameters(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    """The parameters of one adapter by name; of the LoRA layers only, not of modules_to_save."""
    found = {}
    for name, p in model.named_parameters():
        parts = name.split(".")
        if adapter in parts and any(part.startswith("lora_") for part in parts):
            found[name] = p
    assert found, f"no parameters of adapter {adapter!r}"
    return found


@torch.no_grad()
def randomize(model: nn.Module, adapter: str = "default", seed: int = 0) -> Any:
    """Fill an adapter's tensors, A and B, with random non-zero numbers; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    for p in adapter_parameters(model, adapter).values():
        p.copy_(_normal(p.shape, generator))
    return model


def adapter_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def only_layer(model: nn.Module) -> Any:
    """The adapter layer of a `OneLayer` model."""
    (layer,) = adapter_layers(model)
    return layer


def factors_of(layer: Any, adapter: str = "default") -> Factors:
    A, B = layer.lora_A[adapter], layer.lora_B[adapter]
    return Factors(A.weight, B.weight, A.hybrid_weight, B.hybrid_weight)


@torch.no_grad()
def set_factors(layer: Any, factors: Factors, adapter: str = "default") -> None:
    for target, value in zip(factors_of(layer, adapter), factors, strict=True):
        if value is not None:
            target.copy_(value)


# Accuracy rules


def assert_close64(actual: Tensor, expected: Tensor) -> None:
    """Equal up to rounding in float64; shapes and dtypes must agree too."""
    assert expected.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE_FLOAT64)


def assert_accurate(actual: Tensor, exact: Tensor, plain: Tensor) -> None:
    """At most twice as far from the float64 result as plain torch in the same dtype is, plus 1e-6.

    Args:
        actual: what is tested.
        exact: the result in float64, computed from the same numbers.
        plain: the result of plain torch in the dtype of `actual`.
    """
    assert exact.dtype == torch.float64 and actual.dtype == plain.dtype and actual.shape == exact.shape == plain.shape
    error, plain_error = ((t.double() - exact).abs().max().item() for t in (actual, plain))
    bound = 2 * plain_error + 1e-6
    assert error <= bound, f"error {error:.3g} exceeds {bound:.3g}; plain torch's is {plain_error:.3g}"


@contextmanager
def assert_unchanged(model: nn.Module, *inputs: Tensor) -> Iterator[None]:
    """The model has the same modules, weights, trainable parameters and output after the block as before."""

    def state() -> tuple[Any, ...]:
        modules = [(name, id(module), type(module)) for name, module in model.named_modules()]
        trainable = [(name, p.requires_grad) for name, p in model.named_parameters()]
        return modules, trainable, sorted(vars(model))

    def output() -> Tensor:
        with torch.no_grad():
            out = model(*inputs)
        return (out if isinstance(out, Tensor) else out.logits).clone()

    out, before, weights = output(), state(), {name: t.clone() for name, t in model.state_dict().items()}
    yield
    assert state() == before
    for name, t in model.state_dict().items():
        assert torch.equal(t, weights[name]), name
    assert torch.equal(output(), out)
