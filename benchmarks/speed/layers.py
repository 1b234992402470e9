"""Sections that measure one adapted linear layer: forward and backward, and dW."""

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from . import exact
from .methods import ACCELERATED, UNSLOTH, methods_of
from .report import Row, report
from .timing import interleave, measure, on_gpu

BF16, FP32 = torch.bfloat16, torch.float32
LLAMA_8B_LINEARS = [(4096, 4096), (4096, 14336), (14336, 4096)]


class LayerStep:
    """Forward and backward of one layer for one input and one gradient of its output."""

    def __init__(self, module: nn.Module, x: Tensor, autocast: bool = False) -> None:
        self.module, self.x, self.autocast = module, x, autocast
        self.inputs = [t for t in (x, *module.parameters()) if t.requires_grad]
        with torch.no_grad():
            y = self._forward()
        self.dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)

    def _forward(self) -> Tensor:
        with torch.autocast(self.x.device.type, BF16) if self.autocast else nullcontext():
            return self.module(self.x)

    def __call__(self) -> None:
        if self.inputs:
            torch.autograd.grad(self._forward(), self.inputs, self.dy)
        else:  # a frozen embedding has no gradients
            self._forward()

    def outcome(self) -> exact.Outcome:
        """The output and all gradients."""
        y = self._forward()
        if not self.inputs:
            return {"y": [y]}
        y.backward(self.dy)
        found = {"y": [y.detach()], "x": [self.x.grad] if self.x.requires_grad else []}
        found |= exact.named_gradients(self.module)
        for t in self.inputs:
            t.grad = None
        return found


def exact_outcome(step: LayerStep) -> exact.Outcome:
    """The reference of a linear layer, quantised or not, by its formula in float64."""
    (layer,) = [m for m in step.module.modules() if hasattr(m, "base_layer")] or list(step.module.children())
    reference = exact.ExactLinear(layer)
    x = step.x.detach().double().requires_grad_()
    y = reference(x)
    y.backward(step.dy.double())
    grads = {kind: [p.grad for p in getattr(reference, kind)] for kind in ("A", "B")}
    return {"y": [y.detach()], "x": [x.grad]} | grads


def compare(
    section: str,
    setting: str,
    steps: dict[str, LayerStep],
    reference: Callable[[LayerStep], exact.Outcome],
    args: argparse.Namespace,
    dtype: torch.dtype | None = None,
    **facts: object,
) -> list[Row]:
    """Compare steps with their references, whose products are of a dtype [of `dtype_of`], then with each other."""
    errors = {name: exact.errors_of(step.outcome(), reference(step)) for name, step in steps.items()}
    exact.check(errors, dtype or dtype_of(args))
    timed = measure(steps, args.device, 3 * args.rounds, 10 if args.device == "cuda" else 1)
    for name, row in timed.items():
        row |= {f"error_{kind}": error for kind, error in errors[name].items()}
        row["error"] = max(errors[name].values())
    return report(section, setting, timed, "frozen", **facts)


def linear(args: argparse.Namespace) -> Iterator[Row]:
    """One adapted linear of an 8B Llama, 8192 tokens, beside the frozen linear alone."""
    rows: list[Row] = []
    dtype = dtype_of(args)
    for in_features, out_features in [(size(n, args), size(m, args)) for n, m in LLAMA_8B_LINEARS]:
        base = nn.Sequential(nn.Linear(in_features, out_features, bias=False)).to(args.device, dtype)
        x = torch.randn(size(8192, args), in_features, device=args.device, dtype=dtype, requires_grad=True)
        for r in args.ranks:
            for words, fp32 in (("bf16 adapters", False), ("fp32 adapters + autocast", True))[: 1 + (dtype is BF16)]:
                names = [name for name in args.methods if name != UNSLOTH]
                methods = methods_of(names, r, 4, ["0"])
                steps = {m.name: LayerStep(m.adapt(base, fp32), x, fp32) for m in methods}
                words = words if dtype is BF16 else "fp32"
                setting = f"{in_features}->{out_features}, r={r}, k=4, {words}"
                found = compare("linear", setting, steps, exact_outcome, args, r=r, fp32=fp32)
                yield from found
                rows += found
    for fp32, method in itertools.product((False, True), ("gralora", ACCELERATED)):
        ours = [row for row in rows if row["method"] == method and row["fp32"] == fp32]
        if ours:
            mean = statistics.mean(row["ratio_to_frozen"] for row in ours)
            print(f"\nlinear: {method}, {'fp32 adapters + autocast' if fp32 else 'one dtype'}: {mean:.3f}x on average")


def dtype_of(args: argparse.Namespace) -> torch.dtype:
    """Of the products: bfloat16 on a GPU."""
    return BF16 if args.device == "cuda" else FP32


def size(n: int, args: argparse.Namespace) -> int:
    """A number of features or tokens: n on a GPU, less on a CPU and in tests, and always a multiple of 16."""
    return max(n // args.shrink // 16, 1) * 16


def merge(args: argparse.Namespace) -> list[Row]:
    """The delta weight of one 4096 -> 14336 layer, r = 64, k = 4, in float32; compared with its formula in float64."""
    base = nn.Sequential(nn.Linear(size(4096, args), size(14336, args), bias=False, device=args.device))
    names = [name for name in args.methods if name not in ("frozen", ACCELERATED, UNSLOTH)]
    layers = {m.name: m.adapt(base, True).base_model.model[0] for m in methods_of(names, 64, 4, ["0"])}
    steps = {name: (lambda layer=layer: layer.get_delta_weight("default")) for name, layer in layers.items()}
    with torch.no_grad():
        eye = torch.eye(base[0].in_features, device=args.device, dtype=torch.float64)
        errors = {}
        for name, layer in layers.items():
            reference = exact.ExactLinear(layer)
            wanted = (reference(eye) - eye @ reference.weight.T).T
            errors[name] = exact.errors_of({"y": [steps[name]()]}, {"y": [wanted]})
        exact.check(errors, FP32)
        timed = interleave(steps, args.device, 5, 1 if args.device == "cpu" else 10, warmup=1)
        for name, step in steps.items() if args.device == "cuda" else ():
            timed[name] |= on_gpu(step)
    return report("merge", f"get_delta_weight, 4096->14336, r=64, k=4, {args.device}", timed, names[0])
