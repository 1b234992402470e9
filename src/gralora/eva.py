"""EVA (arXiv 2410.07170) for grids, through PEFT's `initialize_lora_eva_weights`.

EVA gives A the principal components of a layer's inputs. Block (j, i) of dW sees chunk i of them, so the rows of its A
are the first q principal components of chunk i, the same for all j. PEFT finds those of one chunk of every layer at a
time, in as many passes over the data as the layer with most blocks per side has chunks.
"""

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import blocks_of_A
from .layers import GraloraLayer
from .seam import wrap_eva


def install() -> None:
    """Put our functions around the two of PEFT's that find components, and that write them into a model."""
    wrap_eva(_with_chunks, _with_blocks)


def _with_chunks(stock: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    @functools.wraps(stock)
    def get_eva_state_dict(model: Any, *args: Any, adapter_name: str = "default", **kwargs: Any) -> dict[str, Tensor]:
        layers = grids(model, adapter_name)
        if not layers:
            return stock(model, *args, adapter_name=adapter_name, **kwargs)
        shapes = {name: blocks_of_A(layer.factors(adapter_name).A).shape for name, layer in layers.items()}
        most = max(shape[2] for shape in shapes.values())
        narrow = next((name for name, shape in shapes.items() if shape[3] < most), None)
        if narrow is not None:
            raise ValueError(
                f"EVA takes the same number of components of all layers, here {most}, and the chunks of {narrow!r} "
                f"have {shapes[narrow][3]} features; use a smaller rank, or a smaller gralora_k for this layer."
            )
        config = copy.copy(model.peft_config[adapter_name])
        config.r, config.rank_pattern = most, {}
        prepare = kwargs.pop("prepare_layer_inputs_fn", None)
        passes = []
        for chunk in range(max(shape[1] for shape in shapes.values())):
            of_chunk: dict[str, Any] = dict(prepare) if isinstance(prepare, Mapping) else {}
            for name, shape in shapes.items():
                own = prepare.get(name) if isinstance(prepare, Mapping) else prepare
                of_chunk[name] = functools.partial(_chunk_of, own or _rows, shape[1], min(chunk, shape[1] - 1))
            kwargs |= {"prepare_layer_inputs_fn": of_chunk, "peft_config": config}
            passes.append(stock(model, *args, adapter_name=adapter_name, **kwargs))
        return {
            name: torch.stack([passes[chunk][name][: shape[2]] for chunk in range(shape[1])])
            for name, shape in shapes.items()
        }

    return get_eva_state_dict


def _chunk_of(prepare: Callable[..., Tensor], k: int, chunk: int, inputs: Any, model_input: Any, name: str) -> Tensor:
    """One chunk of what PEFT, or the user, takes of a layer's inputs, `[N, I]` -> `[N, I/k]`."""
    return prepare(inputs, model_input, name).chunk(k, dim=-1)[chunk].contiguous()


def _rows(inputs: Any, model_input: Any, name: str) -> Tensor:
    x = inputs if isinstance(inputs, Tensor) else inputs[0]
    return x.reshape(-1, x.shape[-1])


def _with_blocks(stock: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(stock)
    def _load_eva_state_dict(model: Any, eva_state_dict: dict[str, Tensor], adapter_name: str) -> None:
        layers = grids(model, adapter_name)
        if not layers:
            stock(model, eva_state_dict, adapter_name)
            return
        for name, layer in layers.items():
            expected = tuple(blocks_of_A(layer.factors(adapter_name).A).shape[1:])
            found = tuple(eva_state_dict[name].shape) if name in eva_state_dict else None
            if found != expected:
                raise ValueError(
                    f"eva_state_dict has no components of shape {expected}, [gralora_k, q, in / gralora_k], for "
                    f"{name!r}, but {found}; give initialize_lora_eva_weights the dataloader, not an eva_state_dict "
                    "that was made for a plain LoRA."
                )
        for name, layer in layers.items():
            A = layer.factors(adapter_name).A
            if A.is_meta:
                _materialise(layer, adapter_name)
                A = layer.factors(adapter_name).A
            blocks_of_A(A).copy_(eva_state_dict[name])

    return _load_eva_state_dict


def _materialise(layer: Any, adapter: str) -> None:
    """Give factors that PEFT's `low_cpu_mem_usage` has left without values those that they would have started with."""
    device = layer.base_weight().device
    down, up = layer.lora_A[adapter].to_empty(device=device), layer.lora_B[adapter].to_empty(device=device)
    for factor in up.parameters():
        nn.init.zeros_(factor)
    if down.hybrid_weight is not None:
        nn.init.kaiming_uniform_(down.hybrid_weight, a=5**0.5)  # as PEFT draws A


def grids(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """Name of each layer in which an adapter is a GraLoRA -> the layer."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, GraloraLayer)}
    return {name: layer for name, layer in layers.items() if layer.is_gralora(adapter_name)}
