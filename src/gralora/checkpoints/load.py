"""Load a saved GraLoRA adapter into a model; raise where PEFT warns: nothing missing, left over, or all zero."""

import os
from typing import Any

import peft
from peft import PeftModel
from peft.utils.save_and_load import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from .. import layers
from . import formats
from .files import read_adapter_folder
from .formats import PREFIX, Adapter

SHOWN = 5  # names in an error message


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    source: str | None = None,
    is_trainable: bool = False,
) -> PeftModel:
    """Add an adapter of any GraLoRA format to a model, strictly.

    Args:
        model: the base model, or a PeftModel that has other adapters already.
        path: folder of the adapter.
        adapter_name: name it gets.
        source: its format, needed only if its config leaves that open.
        is_trainable: whether its tensors require gradients; if not, the model is put into evaluation mode.

    Returns:
        The PEFT model, with the new adapter active. After an error the model is as it was.

    Raises:
        OSError: if a file is missing.
        ValueError: if the file is damaged or of an unclear format or scale, if its B is zero in all layers, if the
            model lacks layers of the adapter or has others that its config selects, or if tensors are missing, left
            over or of a wrong shape.
    """
    adapter = formats.read(*read_adapter_folder(path), source=source)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(model, PeftModel) and adapter_name in model.peft_config:
        raise ValueError(f"adapter_name={adapter_name!r} is taken; the model has {sorted(model.peft_config)}.")
    check_layers(adapter, base)
    check_not_zero(adapter)
    adapter.config.inference_mode = not is_trainable
    loaded = _with_adapter(model, adapter, adapter_name)
    try:
        tensors = dict(adapter.tensors)
        check_names(set(tensors), expected_names(loaded, adapter_name))
        set_peft_model_state_dict(loaded, tensors, adapter_name)
    except Exception as error:
        _remove(model, loaded, adapter_name)
        if isinstance(error, RuntimeError):  # torch's, about shapes
            raise ValueError(f"the adapter does not fit the model: {error}") from error
        raise
    loaded.set_adapter(adapter_name, inference_mode=not is_trainable)
    if not is_trainable:
        loaded.eval()
    return loaded


def check_layers(adapter: Adapter, base: nn.Module) -> None:
    """Raise ValueError, with names, if the base model lacks layers of the adapter or they have other features."""
    modules = dict(base.named_modules())
    missing = [layer for layer in adapter.layers if layer not in modules]
    if missing:
        raise ValueError(
            f"the base model {type(base).__name__} lacks {len(missing)} of the {len(adapter.layers)} layers that the "
            f"adapter has: {listed(missing)}. It was trained on {adapter.config.base_model_name_or_path!r}."
        )
    for layer in adapter.layers:
        layers.check_kind(layer, modules[layer], base)
        if layers.features(modules[layer]) != adapter.features(layer):
            raise ValueError(
                f"layer {layer!r} has (in, out) features {layers.features(modules[layer])} in the base model and "
                f"{adapter.features(layer)} in the adapter, which was trained on "
                f"{adapter.config.base_model_name_or_path!r}."
            )


def check_not_zero(adapter: Adapter) -> None:
    """Raise ValueError if every B is zero: such an adapter was never trained, or was read under wrong names."""
    for layer in adapter.layers:
        f = adapter.factors(layer)
        if any(t is not None and t.count_nonzero() for t in (f.B, f.hybrid_B, f.bias)):
            return
    raise ValueError("all B factors of the adapter are zero: it was not trained, and does nothing.")


def expected_names(model: PeftModel, adapter_name: str) -> set[str]:
    return set(get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False))


def check_names(found: set[str], expected: set[str]) -> None:
    """Raise ValueError if tensors are missing from the file or would not be used."""
    missing, unexpected = sorted(expected - found), sorted(found - expected)
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors are missing from the file: {listed(missing)}")
    if unexpected:
        problems.append(f"{len(unexpected)} tensors of the file have no place in the model: {listed(unexpected)}")
    if problems:
        raise ValueError("the adapter does not fit what its config makes of the model: " + "; ".join(problems) + ".")


def listed(names: list[str]) -> str:
    names = [name.removeprefix(PREFIX) for name in names]
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _with_adapter(model: nn.Module, adapter: Adapter, adapter_name: str) -> PeftModel:
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, adapter.config)
        return model
    return peft.get_peft_model(model, adapter.config, adapter_name)


def _remove(model: nn.Module, loaded: Any, adapter_name: str) -> None:
    """Undo `_with_adapter`."""
    if isinstance(model, PeftModel):
        model.delete_adapter(adapter_name)
    else:
        loaded.unload()
