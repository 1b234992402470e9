"""Hotswap between GraLoRA adapters of different ranks, which PEFT cannot pad: it expects factors of two dimensions.

Names, arguments and results are those of `peft.utils.hotswap`, which does the rest of the work. `diffusion.py` puts
the padding into PEFT's own functions as well, which diffusers calls.
"""

import os
from collections.abc import Iterator
from typing import Any, Literal

import peft
from peft import PeftConfig, load_peft_weights
from torch import Tensor, nn

from . import seam
from .blocks import GranularDown, GranularUp, scaling_gain
from .factors import pad_grid, pad_lora
from .inits import changes_base
from .layers import GraloraLayer


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: peft.LoraConfig | dict[str, peft.LoraConfig] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Pad a model's adapters to `target_rank`, and make their scalings tensors, so that hotswaps need no recompiling.

    Args:
        model: with the first adapter loaded, and not compiled yet.
        target_rank: the highest total rank of the adapters to come; None leaves the ranks alone.
        config: its configs, which get the new rank.
        check_compiled: what to do if the model is compiled already.

    Raises:
        ValueError: before anything is changed, if an adapter cannot be padded to `target_rank`.
    """
    adapters = list(_adapters(model))
    if target_rank is None or not any(layer.is_gralora(name) for layer, _, name in adapters):
        seam.prepare_model_for_compiled_hotswap(
            model, target_rank=target_rank, config=config, check_compiled=check_compiled
        )
        return
    padded = [(layer, name, _padded(layer, where, name, target_rank)) for layer, where, name in adapters]
    seam.prepare_model_for_compiled_hotswap(model, check_compiled=check_compiled)
    for layer, name, (A, B) in padded:
        layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = A, B
    for lora_config in config.values() if isinstance(config, dict) else [config] if config else []:
        lora_config.r = target_rank
        lora_config.rank_pattern = dict.fromkeys(lora_config.rank_pattern, target_rank)


def _adapters(model: nn.Module) -> Iterator[tuple[Any, str, str]]:
    """Yield every GraLoRA layer with its name and the name of each of its adapters."""
    for where, layer in model.named_modules():
        if isinstance(layer, GraloraLayer):
            for name in layer.lora_A:
                yield layer, where, name


def _padded(layer: Any, where: str, name: str, rank: int) -> tuple[Tensor, Tensor]:
    A, B = layer.lora_A[name], layer.lora_B[name]
    if layer.r[name] == rank:
        return A.weight.data, B.weight.data
    if not layer.is_gralora(name):
        if A.weight.shape[0] > rank:
            raise ValueError(f"target_rank={rank} is less than the rank {A.weight.shape[0]} of {where!r}.")
        return pad_lora(A.weight.data, B.weight.data, rank)
    _check_linear(where, layer, name)
    k, r_g, hybrid_r = A.k, A.r_g, A.hybrid_r
    if rank < r_g + hybrid_r or (rank - hybrid_r) % k:
        fitting = max(r_g, -(-(rank - hybrid_r) // k) * k) + hybrid_r
        raise ValueError(
            f"target_rank={rank} does not fit layer {where!r}, adapter {name!r}: it must be at least "
            f"{r_g + hybrid_r}, and less hybrid_r={hybrid_r} divisible by gralora_k={k}, for example {fitting}."
        )
    _check_gain(where, B, r_g, rank - hybrid_r)
    return pad_grid(A.weight.data, B.weight.data, rank - hybrid_r)


def _check_linear(where: str, layer: GraloraLayer, adapter: str) -> None:
    if not layer.linear_factors:
        kind = type(layer.lora_A[adapter]).__name__
        raise ValueError(f"layer {where!r}: ranks of a {kind} cannot be padded, only of linear layers.")


def _check_gain(where: str, up: GranularUp, r_g: int, padded: int) -> None:
    """Raise ValueError if padding the grid's rank changes the gain of `gralora_scaling`."""
    hybrid_r = up.hybrid_r
    gains = [scaling_gain(up.gralora_scaling, up.k, r, hybrid_r) for r in (r_g, padded)]
    if abs(gains[0] - gains[1]) > 1e-12:  # without hybrid_r the two differ by a rounding at most
        raise ValueError(
            f"layer {where!r}: gralora_scaling={up.gralora_scaling!r} with hybrid_r={hybrid_r} depends on the rank: "
            f"a grid rank of {r_g} cannot be padded to {padded}; hotswap between adapters of one rank."
        )


def hotswap_adapter(
    model: Any,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str,
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Replace a loaded adapter by a saved one, whose ranks may be smaller.

    Args:
        model: the PEFT model, which may be compiled.
        model_name_or_path: the saved adapter. Its k, hybrid_r and the layers' kinds must be those of the loaded one.
        adapter_name: the loaded adapter.
        torch_device: the device to load the file to; PEFT's default if None.
        **kwargs: passed on to the PEFT functions that load config and weights.

    Raises:
        ValueError: before anything is changed, if the adapters do not fit together.
        RuntimeError: before anything is changed, if the new adapter has layers that the loaded one lacks.
    """
    config = PeftConfig.from_pretrained(model_name_or_path, **kwargs)
    loaded = model.peft_config[adapter_name]
    seam.check_hotswap_configs_compatible(loaded, config)
    if config.use_dora:
        raise ValueError("use_dora=True: PEFT does not hotswap DoRA's magnitudes; load the adapter beside the other.")
    if loaded.alora_invocation_tokens != config.alora_invocation_tokens:
        raise ValueError(
            f"alora_invocation_tokens={config.alora_invocation_tokens!r} are not those of adapter {adapter_name!r}, "
            f"{loaded.alora_invocation_tokens!r}, which would go on to be used."
        )
    for one in filter(changes_base, (loaded, config)):
        raise ValueError(
            f"init_lora_weights={one.init_lora_weights!r}: such adapters belong to other base weights than the next; "
            "hotswap those that were saved with path_initial_model_for_weight_conversion."
        )
    tensors = load_peft_weights(model_name_or_path, device=torch_device, **kwargs)
    named = {
        name.replace(".lora_A.", f".lora_A.{adapter_name}.").replace(".lora_B.", f".lora_B.{adapter_name}."): t
        for name, t in tensors.items()
    }
    seam.hotswap_adapter_from_state_dict(model, padded_to(model, named, adapter_name), adapter_name, config)


def padded_to(model: nn.Module, tensors: dict[str, Tensor], adapter_name: str) -> dict[str, Tensor]:
    """The tensors of an adapter, with its name in theirs, padded to the ranks of the loaded one where they are lower.

    Raises:
        ValueError: if shapes differ in more than the rank, or padding would change the scale.
    """
    tensors = dict(tensors)
    layers = {where.removeprefix("_orig_mod."): m for where, m in model.named_modules() if isinstance(m, GraloraLayer)}
    for where, layer in layers.items():
        A, B = (f"{where}.{factor}.{adapter_name}.weight" for factor in ("lora_A", "lora_B"))
        if A in tensors and B in tensors and layer.is_gralora(adapter_name):
            if tensors[A].shape == layer.lora_A[adapter_name].weight.shape:
                continue
            _check_linear(where, layer, adapter_name)
            _check_features(where, tensors[A], tensors[B], layer.lora_A[adapter_name], layer.lora_B[adapter_name])
            rank = max(tensors[A].shape[2], layer.lora_A[adapter_name].weight.shape[2])
            _check_gain(where, layer.lora_B[adapter_name], tensors[A].shape[2], rank)
            tensors[A], tensors[B] = pad_grid(tensors[A], tensors[B], rank)
    return tensors


def _check_features(where: str, new_A: Tensor, new_B: Tensor, down: GranularDown, up: GranularUp) -> None:
    """Raise ValueError, naming the layer, if a saved grid was made for other numbers of features."""
    found, expected = (new_A.shape[:2], new_B.shape[::2]), (down.weight.shape[:2], up.weight.shape[::2])
    if found != expected:
        raise ValueError(
            f"layer {where!r}: the saved factors have shapes {tuple(new_A.shape)} and {tuple(new_B.shape)}, those of "
            f"the loaded adapter {tuple(down.weight.shape)} and {tuple(up.weight.shape)}; only their rank may differ."
        )
