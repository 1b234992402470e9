"""Other programs that benchmarks run beside gralora: bitsandbytes' weights, Liger's kernels, Unsloth's functions.

Liger and Unsloth are no dependencies: a wheel of each is given by its path, unpacked for the run, and used as it is.
"""

import copy
import importlib
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from packaging.version import Version
from torch import Tensor, nn


def quantize_nf4(model: nn.Module, storage: torch.dtype = torch.uint8) -> nn.Module:
    """A copy of a model with the weights of its decoder's linears in 4 bits: nf4, with nested statistics.

    Args:
        storage: the dtype that packed weights are tensors of; FSDP shards those of floats only.
    """
    import bitsandbytes as bnb

    quantized = copy.deepcopy(model)
    dtype = next(model.parameters()).dtype
    for name, layer in list(quantized.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            packed = bnb.nn.Linear4bit(
                *(layer.in_features, layer.out_features, layer.bias is not None, dtype),
                **{"quant_type": "nf4", "quant_storage": storage},
            )
            packed.weight = bnb.nn.Params4bit(
                layer.weight.data.cpu(),
                **{"requires_grad": False, "quant_type": "nf4", "compress_statistics": True},
                **{"quant_storage": storage, "module": packed},  # which keeps the state that FSDP takes off the weight
            )
            quantized.set_submodule(name, packed.to(layer.weight.device))
    quantized.is_loaded_in_4bit = True  # as transformers says, and PEFT asks
    return quantized


@cache
def _unpacked(wheel: Path) -> Path:
    """The wheel's files, in a folder that stays until the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="benchmark-")
    _KEPT.append(folder)
    zipfile.ZipFile(wheel).extractall(folder.name)
    return Path(folder.name)


_KEPT: list[tempfile.TemporaryDirectory] = []


@contextmanager
def liger(wheel: Path) -> Iterator[Callable[[nn.Module], nn.Module]]:
    """A function that makes a copy of a Llama with Liger's kernels.

    Liger also replaces names in transformers, for all models. These are put back at the end, and until then its rotary
    embedding leaves the float64 reference to transformers' own.
    """
    from transformers.models.llama import modeling_llama

    sys.path.insert(0, str(_unpacked(wheel)))
    before = dict(vars(modeling_llama))
    try:
        apply = importlib.import_module("liger_kernel.transformers").apply_liger_kernel_to_llama

        def prepare(model: nn.Module) -> nn.Module:
            patched = copy.deepcopy(model)
            apply(model=patched)
            own, rotary = modeling_llama.apply_rotary_pos_emb, before["apply_rotary_pos_emb"]
            modeling_llama.apply_rotary_pos_emb = lambda q, k, *args, **options: (
                rotary if q.dtype is torch.float64 else own
            )(q, k, *args, **options)
            return patched

        yield prepare
    finally:
        vars(modeling_llama).update(before)
        sys.path.pop(0)


def unsloth(wheel: Path) -> Callable[[nn.Module], None]:
    """What makes a Llama with PEFT's LoRA layers compute them by Unsloth's functions.

    A block's gate, up and down become one function, its q, k and v another, and o a third; the rest of the model is
    left as it is, so that times differ by these alone. Seen with release 2026.10.9.
    """
    functions = _unsloth_functions(_unpacked(wheel))

    def patch(model: nn.Module) -> None:
        for module in model.modules():
            if all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj")):
                module.forward = lambda x, mlp=module: functions.apply_lora_mlp_swiglu(mlp, x)
            elif all(hasattr(module, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")):
                _patch_attention(module, functions)

    return patch


def _patch_attention(attention: nn.Module, functions: ModuleType) -> None:
    """q_proj computes the three at once, and the other two, called after it, hand out what it has left for them."""
    left: list[Tensor] = []

    def q_forward(x: Tensor) -> Tensor:
        q, k, v = functions.apply_lora_qkv(attention, x)
        left[:] = [v, k]
        return q

    attention.q_proj.forward = q_forward
    attention.k_proj.forward = lambda x: left.pop()
    attention.v_proj.forward = lambda x: left.pop()
    attention.o_proj.forward = lambda x: functions.apply_lora_o(attention, x)


class _Absent(ModuleType):
    """A module of which any name can be imported, and nothing is true: parts that these functions ask about only."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {}) if name[0].isupper() else lambda *args, **kwargs: False


def _unsloth_functions(folder: Path) -> ModuleType:
    """Unsloth's module of LoRA functions, without running the start of the package, which patches other libraries.

    Its packages are entered as empty ones with the right folder; what they would have decided about the machine, and
    formats that are not measured, are stand-ins.
    """
    name = "unsloth.kernels.fast_lora"
    if name in sys.modules:
        return sys.modules[name]

    def enter(name: str, module: ModuleType | None = None, **contents: object) -> None:
        module = module or ModuleType(name)
        vars(module).update(contents)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)

    enter("unsloth_zoo", __path__=[])
    enter("unsloth_zoo.utils", Version=lambda text: Version(str(text).partition("+")[0]))
    enter("unsloth", __path__=[str(folder / "unsloth")])
    enter("unsloth.kernels", __path__=[str(folder / "unsloth" / "kernels")])
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    facts = {"DEVICE_TYPE": kind, "DEVICE_TYPE_TORCH": kind, "DEVICE_COUNT": torch.cuda.device_count()}
    facts |= {"ALLOW_PREQUANTIZED_MODELS": True, "ALLOW_BITSANDBYTES": True}
    enter("unsloth.device_type", is_hip=lambda: False, get_device_type=lambda: kind, **facts)
    for part in ("fp8", "nvfp4", "int4_packed"):
        enter(f"unsloth.kernels.{part}", _Absent(f"unsloth.kernels.{part}"))
    enter("unsloth.kernels.rms_layernorm", _Absent("unsloth.kernels.rms_layernorm"), _SAVE_OUTPUT=False)
    return importlib.import_module(name)
