"""Products of an FP8 weight with the adapter in them, beside the frozen bf16 product, on one GPU.

    python -m benchmarks.fp8_products --out fp8-products.json

For each shape the output, and the gradient of x: what a layer's launches besides the projection down take.

    bf16            torch's product with the bf16 weight: what a frozen base takes
    gralora bf16    the Hopper product with the adapter in it
    torch           x quantised by torch's operations, `scaled_mm`, and the adapter added to its result
    fused           x quantised by one launch, and the product with the adapter in it
    scaled_mm       alone, of operands that are quantised already; "fast" with sums of fewer bits, as in `fused`
    fused product   alone
    quantise        one launch of ours

and for the gradient of x, with the factors' gradients computed in the same launch ("grads in it") or after it ("grads
after"), which is what a layer's backward takes besides its projections.

`exact` is how far a result is from the float64 product of the rounded operands, as a share of its norm.
"""

import argparse
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, scaled_mm

from gralora.ops import Float8Weight, batched, fp8, fp8_hopper, fp8_kernels, hopper, reference
from gralora.ops.interface import FactorGradients

from .speed.timing import interleave

SHAPES = [(2048, 2048), (2048, 8192), (8192, 2048), (4096, 4096), (4096, 14336), (14336, 4096)]


Steps = dict[str, Callable[[], Tensor]]


def cases(T: int, n_in: int, n_out: int, k: int, r: int, backward: bool) -> tuple[Steps, Tensor, Tensor]:
    """Functions that compute one product each, and the float64 product without the adapter and with it."""

    def draw(*size: int, fan_in: int = 1) -> Tensor:
        return torch.randn(*size, device="cuda", dtype=torch.bfloat16) / fan_in**0.5

    w = draw(n_out, n_in, fan_in=n_in)
    weight = Float8Weight(*fp8.quantize_rows(w), (1, n_in))
    if backward:  # the gradient of x is the product of dy with W^T
        n_in, n_out, w, weight = n_out, n_in, w.t(), weight.t()
    x, g, B, y = draw(T, n_in), draw(k, T, r), draw(k, r, n_out // k, fan_in=r), draw(T, n_out)
    factors = weight.scales if backward else None
    values, rows = fp8_kernels.quantize_rows(x, factors)
    stored = fp8_hopper._transposed(weight.transpose_of) if weight.transpose_of is not None else weight.values
    columns = torch.ones(1, n_out, device="cuda") if backward else weight.scales.t().contiguous()
    pointers = rows, rows if backward else weight.scales

    def product(function: Callable[..., None], *args: Any) -> Callable[[], Tensor]:
        def run() -> Tensor:
            function(y, x, *args)
            return y

        return run

    def alone(fast: bool) -> Callable[[], Tensor]:
        row_wise = ScalingType.RowWise
        return lambda: scaled_mm(values, stored.t(), rows, row_wise, columns, row_wise, use_fast_accum=fast)

    def fused_product() -> Tensor:
        hopper.launch(
            fp8_hopper._scaled_linear, y, x, values, stored, None, g, B, None, False, pointers, (not backward,)
        )
        return y

    def then(run: Callable[[], Tensor], gradients: FactorGradients) -> Callable[[], Tensor]:
        def both() -> Tensor:
            batched.product_gradients(x, g, gradients)
            return run()

        return both

    exact = (values.double() * rows.double()) @ (stored.double().t() * columns.double())
    found = {
        "bf16": lambda: x @ w.t(),
        "gralora bf16": product(hopper.linear, w, None, g, B),
        "torch": product(fp8.linear, weight, None, g, B),
        "fused": product(fp8_hopper.linear, weight, None, g, B),
        "scaled_mm": alone(False),
        "scaled_mm, fast": alone(True),
        "fused product": fused_product,
        "quantise": lambda: fp8_kernels.quantize_rows(x, factors)[0],
    }
    if backward:
        z, h = draw(T, n_out), draw(k, T, r)
        grads = FactorGradients(z, h, w.new_empty(k, n_out // k, r), w.new_empty(k, r, n_in // k).mT)
        found["gralora bf16, grads in it"] = product(hopper.linear, w, None, g, B, grads)
        found["torch, grads after"] = then(found["torch"], grads)
        found["fused, grads after"] = then(found["fused"], grads)
        found["fused, grads in it"] = product(fp8_hopper.linear, weight, None, g, B, grads)
    return found, exact, exact + reference.up(g.double().transpose(0, 1).flatten(1), B.double())


def run(T: int, n_in: int, n_out: int, k: int, r: int, backward: bool, rounds: int) -> dict[str, Any]:
    steps, product, with_adapter = cases(T, n_in, n_out, k, r, backward)
    errors: dict[str, float] = {}
    for name, step in list(steps.items()):
        try:
            result = step()
            torch.cuda.synchronize()
        except Exception:
            traceback.print_exc(limit=4)
            del steps[name]
            continue
        if name != "quantise" and "bf16" not in name:
            exact = product if name.startswith("scaled_mm") else with_adapter
            errors[name] = ((result.double() - exact).norm() / exact.norm()).item()
    del product, with_adapter
    timed = interleave(steps, "cuda", rounds, 5)
    what = "gradient of x" if backward else "output"
    print(f"\n{n_in} -> {n_out}, {T} tokens, {what}")
    base = timed["bf16"]["time_ms"]
    for name, row in timed.items():
        error = f"exact {errors[name]:.2e}" if name in errors else ""
        print(f"  {row['time_ms'] / base:.3f}x {row['time_ms'] * 1e3:8.1f} us  {name:26} {error}", flush=True)
    row = {name: times["time_ms"] for name, times in timed.items()}
    return {"tokens": T, "in": n_in, "out": n_out, "k": k, "r": r, "what": what, "time_ms": row, "errors": errors}


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tokens", type=int, default=8192)
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--r", type=int, default=64)
    p.add_argument("--k", type=int, default=4)
    p.add_argument("--out", type=Path)
    args = p.parse_args(argv)
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    found = []
    for n_in, n_out in SHAPES:
        for backward in (False, True):
            try:
                found.append(run(args.tokens, n_in, n_out, args.k, args.r, backward, args.rounds))
            except Exception:
                traceback.print_exc()
            if args.out:
                args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
