"""transformers' FP8 layers on a CPU, where transformers itself neither makes nor computes them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn


def fp8_linear(linear: nn.Linear, block: tuple[int, int]) -> Any:
    """A layer with one scale for each block, quantised by transformers' own operation."""
    from transformers.integrations import finegrained_fp8
    from transformers.utils.quantization_config import FineGrainedFP8Config

    config = FineGrainedFP8Config(weight_block_size=block)
    quantize = finegrained_fp8.Fp8Quantize(SimpleNamespace(quantization_config=config))
    has_bias = linear.bias is not None
    layer = finegrained_fp8.FP8Linear(linear.in_features, linear.out_features, block, has_bias=has_bias)
    weight = quantize.convert({"layer.weight": [linear.weight.detach()]})
    layer.weight, layer.weight_scale_inv = (
        nn.Parameter(weight[f"layer.{name}"], requires_grad=False) for name in ("weight", "weight_scale_inv")
    )
    if has_bias:
        layer.bias = linear.bias
    return layer.requires_grad_(False)


def fp8_dequantized(layer: Any) -> Tensor:
    """Its weight `[O, I]`, float32."""
    return _dequantized(layer.weight, layer.weight_scale_inv, layer.block_size)


def _dequantized(weight: Tensor, scales: Tensor, block: Any) -> Tensor:
    rows, columns = block or weight.shape
    n_out, n_in = weight.shape
    full = scales.float().view(-(-n_out // rows), -1).repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return weight.float() * full[:n_out, :n_in]


def run_without_hub_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers' FP8 layers call torch, with the dequantised weight, where they would call the hub's kernel."""
    finegrained_fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    if not hasattr(finegrained_fp8, "load_finegrained_fp8_kernel"):
        pytest.skip(f"FP8 layers of transformers {transformers.__version__} call the hub's kernels by other names")

    def matmul(x: Tensor, weight: Tensor, scales: Tensor, block: Any, dtype: torch.dtype, **_: Any) -> Tensor:
        return (x @ _dequantized(weight, scales, block).to(x.dtype).T).to(dtype)

    monkeypatch.setattr(finegrained_fp8, "load_finegrained_fp8_kernel", lambda: SimpleNamespace(matmul=matmul))
