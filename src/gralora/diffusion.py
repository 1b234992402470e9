"""What diffusers needs to read the GraLoRA adapters that it saves, beside what PEFT needs.

It saves an adapter's config as metadata of the file, and builds `peft.LoraConfig` from that; its Flux pipelines look
at the shapes of factors before PEFT does. `install` is called by `import gralora` and imports nothing of diffusers.
"""

import functools
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import peft
from torch import Tensor

from . import seam
from .after_import import after_import
from .config import LoraConfig
from .hotswap import padded_to, prepare_model_for_compiled_hotswap


def install() -> None:
    peft.LoraConfig.__new__ = _new_config  # type: ignore[method-assign, assignment]
    seam.wrap_hotswap(_fitting, prepare_model_for_compiled_hotswap)
    after_import(seam.FLUX, install_in_flux)
    after_import(seam.GUESSES_CONFIG[0], install_in_guesses)


def _new_config(cls: type, *args: Any, **kwargs: Any) -> Any:
    """`peft.LoraConfig(use_gralora=True, ...)` is a gralora.LoraConfig: so diffusers calls it, from a file."""
    return object.__new__(LoraConfig if cls is peft.LoraConfig and kwargs.get("use_gralora") else cls)


def _fitting(stock: Any) -> Any:
    """PEFT's hotswap, for grids of lower ranks, and hybrid factors, in which diffusers does not name the adapter."""

    @functools.wraps(stock)
    def hotswap_adapter_from_state_dict(
        model: Any, state_dict: dict[str, Tensor], adapter_name: str, *args: Any, **kwargs: Any
    ) -> Any:
        for factor in ("lora_A", "lora_B"):
            unnamed, named = f".{factor}.hybrid_weight", f".{factor}.{adapter_name}.hybrid_weight"
            state_dict = {name.replace(unnamed, named): t for name, t in state_dict.items()}
        return stock(model, padded_to(model, state_dict, adapter_name), adapter_name, *args, **kwargs)

    return hotswap_adapter_from_state_dict


def install_in_flux(module: ModuleType) -> None:
    """Keep grids from the two functions that make room for, or fill up, LoRAs of other input features.

    They take the second dimension of A for the input features, which of a grid is those of one block.
    """

    def without_grids(expand: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(expand)
        def expand_model(cls: Any, transformer: Any, lora_state_dict: Any = None, *args: Any, **kwargs: Any) -> Any:
            return expand(cls, transformer, _split(lora_state_dict or {})[0], *args, **kwargs)

        return expand_model

    def beside_grids(expand: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(expand)
        def expand_state_dict(cls: Any, transformer: Any, lora_state_dict: Mapping[str, Tensor]) -> Any:
            others, grids = _split(lora_state_dict)
            return {**expand(cls, transformer=transformer, lora_state_dict=others), **grids}

        return expand_state_dict

    seam.wrap_flux_expansions(module, without_grids, beside_grids)


def install_in_guesses(module: ModuleType) -> None:
    """Refuse grids in files without a config, from whose shapes diffusers would make one of plain LoRA.

    They have no scaling, and diffusers saves them so if `save_lora_weights` is not given a config.
    """
    name = seam.GUESSES_CONFIG[1]
    guess = getattr(module, name)

    @functools.wraps(guess)
    def get_peft_kwargs(
        rank_dict: Any, network_alpha_dict: Any, peft_state_dict: Any, *args: Any, **kwargs: Any
    ) -> Any:
        for layer, B in peft_state_dict.items():
            if layer.endswith("lora_B.weight") and B.ndim == 3 and B.shape[-1] > 1:
                raise ValueError(
                    f"the file has a GraLoRA adapter, whose {layer} is {list(B.shape)}, and no config, so its scaling "
                    "is not known. Save it with one: save_lora_adapter writes it, and save_lora_weights if given "
                    "unet_lora_adapter_metadata or the like. If this file is all there is: model.add_adapter(config), "
                    "given the training's config, and peft.set_peft_model_state_dict(model, tensors)."
                )
        return guess(rank_dict, network_alpha_dict, peft_state_dict, *args, **kwargs)

    setattr(module, name, get_peft_kwargs)


def _split(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of layers without a grid, and of those with one: factors of three dimensions of a linear layer."""
    layers = {name.split(".lora_")[0] for name, t in state_dict.items() if ".lora_" in name and t.ndim == 3}
    parts: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for name, t in state_dict.items():
        parts[name.split(".lora_")[0] in layers][name] = t
    return parts
