"""FP8 base models: layers of a model converted to FP8 and back, and adapters merged into such layers.

The weights are torchao's: it writes and reads them with transformers, and PEFT knows them. What is here is what it
lacks: converting a loaded model in place and back, and merging that rounds once and says what it loses.
"""

import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from . import seam
from .layers import GraloraLayer
from .ops import Float8Weight
from .quantized import fine_grained_float8, torchao_float8

FP8_LINEAR = "FP8Linear"  # transformers' class of layers with scales per block


def float8_weight(base: Any) -> Float8Weight | None:
    """The weight `[O, I]` of an FP8 layer, which shares its memory; None of any other layer."""
    weight = _torchao(base)
    if weight is not None:
        return torchao_float8(weight)
    return fine_grained_float8(base) if type(base).__name__ == FP8_LINEAR else None


def quantize_fp8(model: nn.Module, modules_to_not_convert: Sequence[str] | None = None) -> nn.Module:
    """Convert the linear layers of a model to FP8 in place: E4M3 with one scale a row, one byte a weight.

    Embeddings, norms and the output layer stay. A model of transformers is then as one that was loaded with
    `TorchAoConfig(Float8WeightOnlyConfig())`: `save_pretrained` writes it in FP8, and `from_pretrained` reads that.
    torchao's layers that have FP8 weights and quantise their inputs keep their numbers, and become differentiable.

    Args:
        model: without adapters.
        modules_to_not_convert: what else stays: names of modules, or parts of names from dot to dot, as "mlp".

    Returns:
        The model.

    Raises:
        ImportError: without torchao.
        ValueError: if the model has adapters, or no layer to convert.
    """
    if importlib.util.find_spec("torchao") is None:
        from gralora_command import install

        raise ImportError(f"quantize_fp8 needs torchao: {install('quantized')}")
    from torchao.quantization import Float8WeightOnlyConfig, quantize_
    from transformers import PreTrainedModel, TorchAoConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    _check_no_adapters(model, "quantize_fp8")
    how = Float8WeightOnlyConfig(set_inductor_config=False)  # else it would set options of torch.compile for all
    skipped = list(modules_to_not_convert or ())
    if isinstance(model, PreTrainedModel):
        quantizer: Any = AutoHfQuantizer.from_config(TorchAoConfig(how), pre_quantized=False)
        skipped += quantizer.get_modules_to_not_convert(model)

    def wanted(module: nn.Module, name: str) -> bool:
        if type(module) is not nn.Linear or any(f".{part}." in f".{name}." for part in skipped):
            return False
        return type(module.weight) is nn.Parameter and module.weight.dtype.is_floating_point

    inputs_quantised: list[Any] = [
        module for module in model.modules() if (weight := _torchao(module)) is not None and weight.act_quant_kwargs
    ]
    if not inputs_quantised and not any(wanted(module, name) for name, module in model.named_modules()):
        raise ValueError(
            f"{type(model).__name__} has no linear layer to convert to FP8: none is an nn.Linear with weights in "
            f"floating point and outside of {sorted(skipped)}."
        )
    for module in inputs_quantised:
        module.weight = _remade(module.weight, act_quant_kwargs=None)
    quantize_(model, how, wanted)
    if isinstance(model, PreTrainedModel):
        linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        stay = [name for name, module in linears if _torchao(module) is None]
        quantizer.quantization_config.modules_to_not_convert = stay
        quantizer.preprocess_model(model)
        quantizer.postprocess_model(model)
        model.hf_quantizer = quantizer
    return model


def dequantize_fp8(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Convert a model's FP8 layers to nn.Linear in place, to merge adapters into the very weights of their training.

    Args:
        model: without adapters: `peft_model.unload()` takes them off.
        dtype: of the weights; by default what torchao converted them from, or else the model's.

    Returns:
        The model.

    Raises:
        ValueError: if the model has adapters, or no FP8 layer.
    """
    _check_no_adapters(model, "dequantize_fp8")
    found = [(name, module) for name, module in model.named_modules() if float8_weight(module) is not None]
    if not found:
        raise ValueError(f"{type(model).__name__} has no FP8 layer: nothing to dequantise.")
    for name, module in found:
        weight: Any = float8_weight(module)
        own = module.weight.dtype if type(module).__name__ != FP8_LINEAR else getattr(model, "dtype", torch.bfloat16)
        n_out, n_in = weight.shape
        plain = nn.Linear(n_in, n_out, module.bias is not None, device="meta")
        plain.weight = nn.Parameter(weight.dense(dtype or own), requires_grad=False)
        if module.bias is not None:
            plain.bias = nn.Parameter(module.bias.detach().to(dtype or own), requires_grad=False)
        model.set_submodule(name, plain.train(module.training))
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
        vars(model)["_weight_conversions"] = None  # save_pretrained would try to undo how FP8 files were read
    return model


def _torchao(module: nn.Module) -> Any:
    """A layer's weight if it is one of torchao's in FP8, else None."""
    weight = getattr(module, "weight", None)
    return weight if type(weight).__name__ == "Float8Tensor" else None


def _check_no_adapters(model: nn.Module, function: str) -> None:
    names = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if names:
        raise ValueError(
            f"{function} takes a model without adapters, and {names[0]!r} has one: convert the base model first, and "
            "add or load the adapter then; peft_model.unload() takes adapters off."
        )


def compute_in_own_dtype(model: Any) -> None:
    """Let torchao's FP8 layers of a model of transformers take inputs of the model's dtype.

    Read from files, in whatever dtype, they compute in the one that they were converted from, and fail with another.
    """
    for module in model.modules():
        weight = _torchao(module)
        if weight is not None and weight.dtype != model.dtype:
            module.weight = _remade(weight, dtype=model.dtype)


def _remade(weight: Any, **changes: Any) -> nn.Parameter:
    """torchao's FP8 weight, sharing its memory, with other attributes."""
    names = "block_size", "mm_config", "act_quant_kwargs", "kernel_preference", "dtype"
    same = {name: getattr(weight, name) for name in names}
    return nn.Parameter(type(weight)(weight.qdata, weight.scale, **same | changes), requires_grad=False)


def quantize_blocks(w: Tensor, block: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round a weight to 8-bit floats, the largest value of a block becoming the largest of the format.

    Args:
        w: `[O, I]`, float32.
        block: `(a, b)`, rows and columns that share a scale; those of the last blocks may be fewer.
        dtype: of the values.

    Returns:
        Values `[O, I]` and scales `[ceil(O/a), ceil(I/b)]`, float32.
    """
    (n_out, n_in), (a, b) = w.shape, block
    padded = nn.functional.pad(w, (0, -n_in % b, 0, -n_out % a))
    blocks = padded.view(padded.shape[0] // a, a, padded.shape[1] // b, b)
    scales = (blocks.abs().amax((1, 3)) / torch.finfo(dtype).max).clamp(min=torch.finfo(torch.float32).tiny)
    values = (blocks / scales[:, None, :, None]).to(dtype)
    return values.view(padded.shape)[:n_out, :n_in].contiguous(), scales


def _write(base: Any, before: Float8Weight, w: Tensor) -> Tensor:
    """Round w `[O, I]`, float32, into the weight of an FP8 layer; return what it holds then, in float32."""
    target = base.weight_scale_inv if type(base).__name__ == FP8_LINEAR else base.weight.scale
    values, scales = quantize_blocks(w, before.block, before.values.dtype)
    if target.dtype.itemsize == 1:  # E8M0: powers of two
        scales = scales.log2().ceil().exp2()
        full = Float8Weight(torch.ones_like(values), scales, before.block).dense(torch.float32)
        values = (w / full).to(values.dtype)
    before.values.copy_(values)
    target.data.copy_(scales.view_as(target))
    return Float8Weight(values, scales, before.block).dense(torch.float32)


class GranularFloat8(GraloraLayer):
    """Mixin in front of PEFT's LoRA layers over FP8 base layers: merging rounds the sum to FP8, once.

    PEFT's own merge fails on transformers' layers, whose scales it does not know, and rounds once for each adapter in
    torchao's.
    """

    merges_quantised = True

    merge_loss: tuple[float, float, float] | None = None
    """Squares of the norms of what the last merge lost, of the merged weight, and of the update."""

    def draw_again(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        """In the bias's dtype, or else bfloat16, where PEFT has taken the weight's 8 bits, which cannot be trained."""
        A, B = self.lora_A[adapter_name], self.lora_B[adapter_name]
        if A.weight.dtype.itemsize == 1:
            bias = self.get_base_layer().bias
            for factor in (A, B):
                factor.to(torch.bfloat16 if bias is None else bias.dtype)
            self.reset_lora_parameters(adapter_name, init_lora_weights)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' dW to the dequantised weight, and round the sum to FP8; otherwise as PEFT's."""
        base = self.get_base_layer()
        before = float8_weight(base)
        if before is None:
            return super().merge(safe_merge, adapter_names)
        names = [name for name in seam.check_adapters_to_merge(self, adapter_names) if name in self.scaling]
        if not names:
            return
        update = self._update(names, safe_merge)
        exact = before.dense(torch.float32).add_(update)
        stored = _write(base, before, exact)
        norms = stored.sub_(exact).norm(), exact.norm(), update.norm()
        self.merge_loss = tuple(norm.square().item() for norm in norms)  # type: ignore[assignment]
        self.merged_adapters += names

    @torch.no_grad()
    def unmerge(self) -> None:
        base = self.get_base_layer()
        before = float8_weight(base)
        names = [name for name in self.merged_adapters if name in self.scaling]
        if before is None or not names:
            return super().unmerge()
        _write(base, before, before.dense(torch.float32).sub_(self._update(names, False)))
        self.merged_adapters.clear()

    def _update(self, names: list[str], safe: bool) -> Tensor:
        """The sum of the adapters' dW, `[O, I]`, float32."""
        for name in names:
            if name in self.lora_variant:
                raise NotImplementedError(
                    f"adapter {name!r} is a {type(self.lora_variant[name]).__name__}, which cannot be merged into an "
                    "FP8 weight: unload() it, convert the base model by gralora.dequantize_fp8, load it again, and "
                    "merge."
                )
        self._safe_merge = safe
        try:
            updates = [self.get_delta_weight(name).float() for name in names]
        finally:
            self._safe_merge = False
        update = sum(updates[1:], updates[0].clone())
        if safe and not update.isfinite().all():
            raise ValueError(f"NaNs detected in the merged weights. The adapters {names} seem to be broken")
        return update


@contextmanager
def telling_losses(model: nn.Module) -> Iterator[None]:
    """Warn at the end, once, of what merging into a model's FP8 layers has lost, as measured."""
    layers = [module for module in model.modules() if isinstance(module, GranularFloat8)]
    for layer in layers:
        layer.merge_loss = None
    yield
    losses = [layer.merge_loss for layer in layers if layer.merge_loss is not None]
    lost, weight, update = (sum(squares) for squares in zip(*losses, strict=True)) if losses else (0.0, 0.0, 0.0)
    if lost and update:
        warnings.warn(
            f"merging into the FP8 weights of {len(losses)} layers rounded the sums to FP8: measured, that changed "
            f"the merged weights by {(lost / weight) ** 0.5:.1%}, which is "
            f"{(lost / update) ** 0.5:.0%} of the update. To lose nothing, merge into bfloat16: "
            "gralora.dequantize_fp8(peft_model.unload()), load the adapter again, and merge_and_unload; or "
            "`gralora merge ADAPTER OUT --base MODEL`.",
            stacklevel=4,
        )
