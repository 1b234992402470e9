"""The section `kinds`: one layer of each kind beside PEFT's LoRA on the same layer."""

import argparse
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import peft
import torch
from torch import Tensor, nn

import gralora

from . import exact
from .layers import LayerStep, compare, dtype_of, exact_outcome, size
from .methods import ACCELERATED, lora_config, randomize
from .report import Row, report
from .timing import measure


def double_outcome(step: LayerStep) -> exact.Outcome:
    """The results of a float64 copy of a layer: for kinds whose formula `ExactLinear` is not.

    On tensors of float64 no kernel runs, and the tests compare that path with each kind's formula.
    """
    module = copy.deepcopy(step.module).double()
    for part in module.modules():
        if hasattr(part, "config") and hasattr(part.config, "_experts_implementation"):
            part.config._experts_implementation = "eager"  # the others take no float64
    x = step.x.detach().double().requires_grad_() if step.x.requires_grad else step.x
    twin = LayerStep(module, x)
    twin.dy = step.dy.double()
    return twin.outcome()


@dataclass(frozen=True)
class KindCase:
    """One row of the section `kinds`.

    Attributes:
        name: in the table.
        make: arguments -> the base module, with the layer in `.layer`, and its input.
        targets: fields of the config that name the layer.
        r, k: of the adapter.
        fields: more fields of both configs.
        grid: fields of the GraLoRA config alone.
        adapters: how many are active at once.
        reference: step -> what it is compared with.
        dtype: of the products, where the base layer decides it.
        autocast: whether a GPU computes under it, as trainers do with adapters in float32.
    """

    name: str
    make: Callable[[argparse.Namespace], tuple[nn.Module, Tensor]]
    targets: dict[str, object] = field(default_factory=lambda: {"target_modules": ["layer"]})
    r: int = 64
    k: int = 4
    fields: dict[str, object] = field(default_factory=dict)
    grid: dict[str, object] = field(default_factory=dict)
    adapters: int = 1
    reference: Callable[[LayerStep], exact.Outcome] = double_outcome
    dtype: torch.dtype | None = None
    autocast: bool = False

    def steps(self, args: argparse.Namespace) -> dict[str, LayerStep]:
        """The frozen layer, and the layer with PEFT's LoRA, with the same accelerated, and with GraLoRA."""
        base, x = self.make(args)
        base.requires_grad_(False)
        autocast = self.autocast and args.device == "cuda"
        steps = {"frozen": LayerStep(copy.deepcopy(base), x, autocast)}
        for name in ("PEFT LoRA", ACCELERATED, "gralora"):
            config = lora_config(name, self.r, self.k, **self.targets, **self.fields)
            for key, value in self.grid.items() if name == "gralora" else ():
                setattr(config, key, value)
            module = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
            for number in range(1, self.adapters):
                module.add_adapter(f"{number}", copy.deepcopy(config), autocast_adapter_dtype=False)
            if self.adapters > 1:
                module.base_model.set_adapter(list(module.peft_config))
            randomize(module)
            if name == ACCELERATED:
                gralora.accelerate(module)
            steps[name] = LayerStep(module, x, autocast)
        return steps


class OneLayer(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Routed(nn.Module):
    """The experts of a mixture-of-experts block, with a routing that is given: all methods see the same."""

    def __init__(self, experts: nn.Module, index: Tensor, weights: Tensor) -> None:
        super().__init__()
        self.layer = experts
        self.register_buffer("index", index)
        self.register_buffer("weights", weights)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, self.index, self.weights.to(x.dtype))


def _linear(in_features: int, out_features: int, tokens: int = 8192):
    def make(args: argparse.Namespace) -> tuple[nn.Module, Tensor]:
        layer = nn.Linear(size(in_features, args), size(out_features, args), bias=False)
        x = torch.randn(size(tokens, args), size(in_features, args))
        return OneLayer(layer).to(args.device, dtype_of(args)), x.to(args.device, dtype_of(args)).requires_grad_()

    return make


def _int8(args: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    import bitsandbytes as bnb

    plain, x = _linear(4096, 4096, 2048)(args)
    weight = plain.layer.weight
    layer = bnb.nn.Linear8bitLt(weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
    model = OneLayer(layer).to(args.device)
    model.is_loaded_in_8bit = True  # as transformers says, and PEFT asks
    return model, x


def _conv(args: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    side = size(64, args)
    layer = nn.Conv2d(320, 320, 3, padding=1) if args.shrink == 1 else nn.Conv2d(32, 32, 3, padding=1)
    x = torch.randn(4, layer.in_channels, side, side)
    return OneLayer(layer).to(args.device, dtype_of(args)), x.to(args.device, dtype_of(args)).requires_grad_()


def _embedding(args: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    layer = nn.Embedding(size(128256, args), size(2048, args))
    ids = torch.randint(0, layer.num_embeddings, (1, size(8192, args)), device=args.device)
    return OneLayer(layer).to(args.device, dtype_of(args)), ids


def _experts(experts: int, hidden: int, intermediate: int, active: int, tokens: int = 8192):
    def make(args: argparse.Namespace) -> tuple[nn.Module, Tensor]:
        from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts

        sizes = {"hidden_size": size(hidden, args), "intermediate_size": size(intermediate, args)}
        config = MixtralConfig(num_local_experts=experts, num_experts_per_tok=active, **sizes)
        config._experts_implementation = "grouped_mm" if args.device == "cuda" else "eager"
        with torch.device(args.device):
            layer = MixtralExperts(config)
            for parameter in layer.parameters():
                nn.init.normal_(parameter, std=0.02)
            rows = size(tokens, args)
            weights, index = torch.randn(rows, experts).softmax(-1).topk(active)
            x = torch.randn(rows, sizes["hidden_size"]).to(dtype_of(args)).requires_grad_()
        return Routed(layer.to(dtype_of(args)), index, weights), x

    return make


EXPERTS = {"target_modules": [], "target_parameters": ["layer.gate_up_proj", "layer.down_proj"]}
KINDS = [
    KindCase("linear 4096->14336", _linear(4096, 14336), reference=exact_outcome),
    KindCase("linear 4096->4096", _linear(4096, 4096), reference=exact_outcome),
    KindCase("512 tokens, 4096->14336", _linear(4096, 14336, 512), reference=exact_outcome),
    KindCase("r=512, k=8, 4096->4096", _linear(4096, 4096), r=512, k=8, reference=exact_outcome),
    KindCase("hybrid, r=80 with 16 plain, 4096->14336", _linear(4096, 14336), r=80, grid={"hybrid_r": 16}),
    KindCase("dropout 0.1, 4096->14336", _linear(4096, 14336), fields={"lora_dropout": 0.1}),
    KindCase("DoRA, 4096->14336", _linear(4096, 14336), fields={"use_dora": True}),
    KindCase("two active adapters, 4096->4096", _linear(4096, 4096), adapters=2, reference=exact_outcome),
    KindCase(
        "bitsandbytes int8, 4096->4096, 2048 tokens",
        _int8,
        reference=exact_outcome,
        dtype=torch.float16,
        autocast=True,  # PEFT's adapters are float32 there
    ),
    KindCase("Conv2d 320->320 3x3, r=16, k=2, 4 x 64 x 64", _conv, r=16, k=2),
    KindCase("Embedding 128256 x 2048, 8192 ids", _embedding),
    KindCase("experts 8 of 4096->14336, 2 active, r=16", _experts(8, 4096, 14336, 2), EXPERTS, r=16),
    KindCase("experts 64 of 2048->1024, 8 active, r=16", _experts(64, 2048, 1024, 8), EXPERTS, r=16),
    KindCase("experts 128 of 2048->768, 8 active, r=16", _experts(128, 2048, 768, 8), EXPERTS, r=16),
    KindCase("experts 128 of 2048->768, 8 active, r=16, 16 tokens", _experts(128, 2048, 768, 8, 16), EXPERTS, r=16),
]


def kinds(args: argparse.Namespace) -> Iterator[Row]:
    """One layer of each kind, as a multiple of PEFT LoRA's time for it; sizes are those named, on a CPU smaller."""
    for case in KINDS:
        if args.only not in case.name:
            continue
        steps = case.steps(args)
        if "lora_dropout" in case.fields:  # masks differ from method to method: compared without one
            for step in steps.values():
                step.module.eval()
            errors = {name: exact.errors_of(step.outcome(), case.reference(step)) for name, step in steps.items()}
            exact.check(errors, case.dtype or dtype_of(args))
            for step in steps.values():
                step.module.train()
            timed = measure(steps, args.device, 3 * args.rounds, 10 if args.device == "cuda" else 1)
            found = report("kinds", case.name, timed, "frozen", kind=case.name)
        else:
            found = compare("kinds", case.name, steps, case.reference, args, case.dtype, kind=case.name)
        times = {row["method"]: row["time_ms"] for row in found}
        for name in (ACCELERATED, "gralora"):
            print(f"  {name}: {times[name] / times['PEFT LoRA']:.3f}x of PEFT LoRA's time", flush=True)
        yield from found
