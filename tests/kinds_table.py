"""The kinds of layers that GraLoRA adapts, in one table: base layer, input, and dW by the loop over blocks.

`test_laws.py` runs the laws that all kinds share over it. A new kind is a row here, and tests of what only it does.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import peft
import torch
from helpers import (
    Factors,
    OneLayer,
    adapter_layers,
    factors_of,
    gralora_config,
    naive_delta,
    random_input,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

IN, OUT, EXPERTS, WIDTH, TOKENS = 12, 8, 3, 8, 7
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
GEOMETRIES = {
    "1x1": {"kernel_size": 1},
    "padded": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilated": {"kernel_size": 2, "dilation": 2},
    "same": {"kernel_size": 3, "padding": "same", "dilation": 2},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "reflected": {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    "circular": {"kernel_size": 3, "padding": "same", "padding_mode": "circular"},
}
# Of 9 in a row stride 2 leaves 5, where torch's own gradient of a 1x1 convolution in bfloat16 is wrong on CPUs with
# AVX-512 but without its bfloat16 instructions (torch 2.13 and 2.14.1, more than 64 channels)
IMAGES = {1: (11,), 2: (7, 6), 3: (5, 6, 5)}


# dW of one layer and adapter by the loop over blocks, without scaling, in the layout of the base weight


def naive_linear(layer: Any, adapter: str = "default") -> Tensor:
    """`[O, I]`."""
    return naive_delta(factors_of(layer, adapter))


def naive_conv1d(layer: Any, adapter: str = "default") -> Tensor:
    """`[I, O]`, of transformers' Conv1D."""
    return naive_delta(factors_of(layer, adapter)).T


def naive_kernel(layer: Any, adapter: str = "default") -> Tensor:
    """`[O, I, *kernel]`: block (j, i) at each position of the kernel, plus B_s A_s."""
    A, B, hybrid_A, hybrid_B = factors_of(layer, adapter)
    k, chunk_in, *kernel, r_g = A.shape
    chunk_out, q = B.shape[2], r_g // k
    dW = A.new_zeros(k * chunk_out, k * chunk_in, *kernel)
    for position in itertools.product(*map(range, kernel)):
        for i, j in itertools.product(range(k), repeat=2):
            down = A[(i, slice(None), *position)][:, j * q : (j + 1) * q]  # [I/k, q]
            block = (down @ B[j, i * q : (i + 1) * q]).T
            rows, columns = slice(j * chunk_out, (j + 1) * chunk_out), slice(i * chunk_in, (i + 1) * chunk_in)
            dW[(rows, columns, *position)] = block
        if hybrid_A is not None:
            dW[(..., *position)] += hybrid_B @ hybrid_A[(..., *position)]
    return dW


def embedding_factors(layer: Any, hybrid_r: int, adapter: str = "default") -> Factors:
    """The linear factors that an embedding's parameters hold: of r ranks, the first hybrid_r are the plain LoRA."""
    A, B = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]  # [r, k, V/k], [k, O/k, r]
    k = len(B)
    grid_A = torch.stack([A[hybrid_r:, i].T for i in range(k)])
    grid_B = torch.stack([B[j, :, hybrid_r:].T for j in range(k)])
    if not hybrid_r:
        return Factors(grid_A, grid_B, None, None)
    hybrid_A = torch.cat([A[:hybrid_r, i] for i in range(k)], dim=1)
    hybrid_B = torch.cat([B[j, :, :hybrid_r] for j in range(k)])
    return Factors(grid_A, grid_B, hybrid_A, hybrid_B)


def naive_embedding(layer: Any, adapter: str = "default") -> Tensor:
    """`[V, O]`; hybrid_r is that of `ADAPTERS`, since the parameters do not tell."""
    return naive_delta(embedding_factors(layer, ADAPTERS[adapter][2], adapter)).T


def each_expert(layer: Any, adapter: str = "default") -> list[Factors]:
    """The factors of every expert."""
    stacked = factors_of(layer, adapter)
    return [Factors(*(None if t is None else t[e] for t in stacked)) for e in range(layer.num_experts)]


def naive_experts(layer: Any, adapter: str = "default") -> Tensor:
    """`[E, O, I]` or `[E, I, O]`."""
    dW = torch.stack([naive_delta(factors) for factors in each_expert(layer, adapter)])
    param = layer.get_param()
    transposed = param.ndim == 3 and getattr(layer.get_base_layer(), "is_transposed", False)
    return (dW.mT if transposed else dW).reshape(param.shape)


# Base models, the same at every call


class Experts(nn.Module):
    """Routed experts as one parameter, `[E, O, I]` or transposed `[E, I, O]`; token t goes to expert t % E."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.weight = nn.Parameter(random_input(EXPERTS, *((IN, OUT) if transposed else (OUT, IN)), seed=5))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.is_transposed else self.weight.mT
        return torch.stack([torch.tanh(x[t] @ weight[t % EXPERTS]) for t in range(len(x))])


class Attention(nn.Module):
    """An attention module, given query, key and value as one tensor `[3, ...]`."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True, **options).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(query=x[0], key=x[1], value=x[2], need_weights=False)[0]


def random_layer(make: Callable[[], nn.Module]) -> OneLayer:
    torch.manual_seed(2)
    return OneLayer(make().double())


# The table


@dataclass(frozen=True)
class Kind:
    """A kind of layer, for the laws.

    Attributes:
        name: of the test.
        build: () -> a base model in float64, the same at every call.
        x: () -> its input.
        delta: dW by the loop over blocks, without scaling; (layer, name of the adapter) -> tensor.
        targets: fields of a config that name the layer.
        weights: names of the adapted weights in the base model, in the order of the model's adapter layers.
        mixes: whether PEFT takes a batch whose rows have adapters of their own.
        adds_up: whether PEFT makes weighted sums of adapters.
        exact_base: whether the base weight stays bit for bit what it was; else dW is added and subtracted again.
    """

    name: str
    build: Callable[[], nn.Module]
    x: Callable[[], Tensor]
    delta: Callable[..., Tensor]
    targets: dict[str, Any]
    weights: Sequence[str] = ("layer.weight",)
    mixes: bool = True
    adds_up: bool = True
    exact_base: bool = True

    def __str__(self) -> str:
        return self.name

    def config(self, k: int, r: int, hybrid_r: int, **fields: Any) -> Any:
        """A GraLoRA config; its scaling is 2."""
        return gralora_config(k, r, hybrid_r, **self.targets, **fields)

    def plain_config(self, r: int = 4, **fields: Any) -> peft.LoraConfig:
        """A plain LoRA for the same layers; its scaling is 2."""
        return peft.LoraConfig(r=r, lora_alpha=2 * r, **self.targets, **fields)

    def layers(self, model: nn.Module) -> dict[str, Any]:
        """Name of the adapted weight -> its adapter layer."""
        return dict(zip(self.weights, adapter_layers(model), strict=True))

    def deltas(self, model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
        """Name of the adapted weight -> dW of one adapter, scaled; of plain LoRA by PEFT's own code."""
        return {
            name: layer.get_delta_weight(adapter)
            if adapter == "plain"
            else layer.scaling[adapter] * self.delta(layer, adapter)
            for name, layer in self.layers(model).items()
        }

    def expected(self, model: nn.Module, x: Tensor, *adapters: str) -> Tensor:
        """The base model's output with W + dW of these adapters in place of W, differentiable by their factors."""
        base = self.build()
        weights = {name: base.get_parameter(name).detach() for name in self.weights}
        for adapter in adapters:
            for name, dW in self.deltas(model, adapter).items():
                weights[name] = weights[name] + dW
        return torch.func.functional_call(base, weights, (x,))


ADAPTERS = {"default": (2, 7, 3), "other": (4, 8, 0), "one": (1, 4, 0), "four": (4, 12, 4)}
"""Name of an adapter -> its k, r and hybrid_r."""

LAYER = {"target_modules": ["layer"]}
PARAMETER: dict[str, Any] = {"target_modules": [], "target_parameters": ["layer.weight"]}


def _images(dims: int) -> Tensor:
    return random_input(4, IN, *IMAGES[dims], seed=1)


def _convolution(dims: int, geometry: str) -> OneLayer:
    return random_layer(partial(CONVOLUTIONS[dims], IN, OUT, **GEOMETRIES[geometry]))


def _ids() -> Tensor:
    return torch.randint(IN, (4, TOKENS), generator=torch.Generator().manual_seed(3))


KINDS = [
    Kind(
        "linear", partial(random_layer, partial(nn.Linear, IN, OUT)), partial(random_input, 4, IN), naive_linear, LAYER
    ),
    Kind(
        "linear-without-bias",
        partial(random_layer, partial(nn.Linear, IN, OUT, bias=False)),
        partial(random_input, 4, 3, IN),
        naive_linear,
        LAYER,
    ),
    Kind("conv1d", partial(random_layer, partial(Conv1D, OUT, IN)), partial(random_input, 4, IN), naive_conv1d, LAYER),
    Kind("embedding", partial(random_layer, partial(nn.Embedding, IN, OUT)), _ids, naive_embedding, LAYER),
    *(
        Kind(
            f"convolution-{dims}d-{geometry}",
            partial(_convolution, dims, geometry),
            partial(_images, dims),
            naive_kernel,
            LAYER,
        )
        for dims in CONVOLUTIONS
        for geometry in GEOMETRIES
    ),
    *(
        Kind(
            f"experts-{'EIO' if transposed else 'EOI'}",
            lambda transposed=transposed: OneLayer(Experts(transposed)),
            partial(random_input, TOKENS, IN),
            naive_experts,
            PARAMETER,
            mixes=False,
            adds_up=False,
        )
        for transposed in (False, True)
    ),
    Kind(
        "attention",
        Attention,
        partial(random_input, 3, 2, 5, WIDTH),
        naive_linear,
        {"target_modules": ["attention"]},
        ("attention.in_proj_weight", "attention.out_proj.weight"),
        mixes=False,
        adds_up=False,
        exact_base=False,
    ),
]
ONCE = ("1d-padded", "2d-strided", "3d-strided")  # PEFT's plain LoRA knows no dilation, and zeros alone as padding
FEW = [kind for kind in KINDS if "convolution" not in kind.name or kind.name.endswith(ONCE)]
"""One or two kinds of each class, for laws that a convolution's geometry does not enter."""
