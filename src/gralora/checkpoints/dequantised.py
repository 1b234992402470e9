"""The weights of FP8 model files, dequantised while they are read: adapters are merged into floating point."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops import Float8Weight
from .files import LazyTensors, spec

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
QDATA = "_weight_qdata"  # of torchao: the layer's name before it, and its scales beside it


def is_fp8(config: Mapping[str, Any]) -> bool:
    """Whether a model's config.json says that its files hold FP8 weights of transformers' or torchao's."""
    quantization = config.get("quantization_config") or {}
    if quantization.get("quant_method") == "torchao":
        kinds = [value.get("_type", "") for value in (quantization.get("quant_type") or {}).values()]
        return bool(kinds) and all(kind.startswith("Float8") for kind in kinds)
    return quantization.get("quant_method") == "fp8"


def dequantised(files: Mapping[str, LazyTensors], config: Mapping[str, Any]) -> dict[str, LazyTensors]:
    """The files of an FP8 model as those of the same model in floating point.

    A weight that is asked for is float32, exact; its spec has the dtype of the model, in which it is to be stored.

    Args:
        files: file name -> its tensors.
        config: content of config.json.

    Raises:
        ValueError: if a weight has no scales, or what is in the files is of another kind.
    """
    where = {name: tensors for tensors in files.values() for name in tensors}
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"))
    block = config["quantization_config"].get("weight_block_size")
    found = {}
    for file, tensors in files.items():
        sources = {_plain_name(name): name for name in tensors if not _is_scale(name, where)}
        specs = {}
        for new, old in sources.items():
            own = tensors.specs[old]
            if own.dtype in FLOAT8:
                _check(old, own, where)
            specs[new] = spec(tuple(own.shape), dtype) if own.dtype in FLOAT8 else own
        found[file] = LazyTensors(specs, _Read(sources, where, block))
    return found


class _Read:
    """name of a tensor in floating point -> the tensor."""

    def __init__(self, sources: Mapping[str, str], where: Mapping[str, LazyTensors], block: Any) -> None:
        self.sources, self.where, self.block = sources, where, block

    def __call__(self, name: str) -> Tensor:
        source = self.sources[name]
        values = self.where[source][source]
        if values.dtype not in FLOAT8:
            return values
        scales = self.where[_scale_name(source)][_scale_name(source)].float()
        n_out, n_in = values.shape
        if scales.dim() != 2:
            scales = scales.reshape(1, 1)
        rows, columns = self.block or (-(-n_out // scales.shape[0]), -(-n_in // scales.shape[1]))
        return Float8Weight(values, scales, (rows, columns)).dense(torch.float32)


def _plain_name(name: str) -> str:
    return f"{name.removesuffix(QDATA)}weight" if name.endswith(QDATA) else name


def _scale_name(name: str) -> str:
    return f"{name.removesuffix('qdata')}scale" if name.endswith(QDATA) else f"{name}_scale_inv"


def _is_scale(name: str, where: Mapping[str, LazyTensors]) -> bool:
    """Whether a tensor belongs to a quantised weight: its scales, or those of its inputs."""
    if name.endswith("_weight_scale"):
        return f"{name.removesuffix('scale')}qdata" in where
    return name.endswith((".weight_scale_inv", ".activation_scale"))


def _check(name: str, weight: Tensor, where: Mapping[str, LazyTensors]) -> None:
    if weight.dim() != 2 or _scale_name(name) not in where:
        raise ValueError(
            f"tensor {name!r} is {tuple(weight.shape)} of {weight.dtype}, and its scales {_scale_name(name)!r} are "
            f"{'there' if _scale_name(name) in where else 'missing'}: only matrices with scales can be dequantised; "
            "merge into the unquantised model."
        )
