"""Load a saved adapter into a model strictly, with an error if a tensor is missing or left over, where PEFT warns.

An adapter with NaN values, or with all B zero, is an error, too. After an error the model is as it was.
"""

import copy
import itertools
import os
import re
import reprlib
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any

import peft
import torch
from peft import PeftModel
from peft.utils.save_and_load import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig

from .. import inject
from ..config import LoraConfig, is_set
from ..kinds import base_layer, check_kind
from ..seam import Conv1D
from . import formats
from .adapter import FACTOR, PREFIX, Adapter
from .files import read_adapter_folder
from .untrusted import check_finite, check_matching_time, listed

MOST_REPLICATED = 16  # copies of a layer, on average
SAME_ROW = 0.05  # of the standard deviation: above rounding, and the noise that transformers adds to new rows


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    source: str | None = None,
    is_trainable: bool = False,
) -> PeftModel:
    """Add a saved adapter to a model, strictly; any GraLoRA format or a plain LoRA will do.

    Args:
        model: the base model, or a PeftModel that has other adapters already.
        path: folder of the adapter.
        adapter_name: the name to give the adapter in the model.
        source: format of the adapter, needed only if its config leaves that open.
        is_trainable: whether its tensors require gradients; if not, the model is put into evaluation mode.

    Returns:
        The PEFT model, with the new adapter active. After an error the model is as it was.

    Raises:
        OSError: if a file is missing.
        ValueError: if the file is damaged, its format or scale is unclear, tensors have NaN or infinite values, if
            B is zero in all layers, if the model lacks layers of the adapter or has others that its config selects,
            or if tensors are missing, left over or of a wrong shape.
    """
    config, saved = read_adapter_folder(path)
    is_plain = source is None and formats.is_plain_lora(config)
    adapter = formats.read_plain(config, saved) if is_plain else formats.read(config, saved, source, any_kind=True)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(model, PeftModel) and adapter_name in model.peft_config:
        raise ValueError(f"adapter_name={adapter_name!r} is taken; the model has {sorted(model.peft_config)}.")
    if size := added_tokens(base, adapter.tensors.specs):
        raise ValueError(
            f"the adapter's file has embeddings of {size} tokens, and the base model has another number: call "
            f"model.resize_token_embeddings({size}) before the adapter is loaded, or let `gralora merge` write a "
            "model that has them."
        )
    check_layers(adapter, base)
    tensors = dict(adapter.tensors)
    check_finite(tensors)
    check_base_embeddings(base, tensors)
    check_not_zero(adapter)
    adapter.config.inference_mode = not is_trainable
    with unchanged_after_error(model), faults_as_value_errors():
        loaded = _with_adapter(model, adapter, adapter_name)
        expected = expected_tensors(loaded, adapter_name)
        check_tensors(tensors, expected | base_weights(loaded, tensors.keys() - expected.keys(), adapter_name))
        set_peft_model_state_dict(loaded, tensors, adapter_name)
        loaded.set_adapter(adapter_name, inference_mode=not is_trainable)
        if not is_trainable:
            loaded.eval()
    return loaded


def check_layers(adapter: Adapter, base: nn.Module) -> None:
    """Raise ValueError, with names, if the base model lacks layers of the adapter or they have other features."""
    modules = dict(base.named_modules())
    if is_set("layer_replication", adapter.config.layer_replication):
        check_replication(adapter.config, base)
        check_matching_time(adapter.config.to_dict(), modules)
        return  # PEFT makes the adapted layers: `check_tensors` compares them
    places = {layer: layer.replace(".base_layer", "") for layer in adapter.layers}  # PEFT's wrappers add this
    missing = [layer for layer, place in places.items() if place not in modules]
    if missing:
        raise ValueError(
            f"the base model {type(base).__name__} lacks {len(missing)} of the {len(adapter.layers)} layers that the "
            f"adapter has: {listed(missing)}. It was trained on {adapter.config.base_model_name_or_path!r}."
        )
    is_gralora = adapter.config.use_gralora
    for layer, place in places.items():
        if layer in adapter.not_linear or (is_gralora and layer != place):
            continue  # `check_tensors` compares shapes
        if is_gralora:
            check_kind(layer, modules[place], base)
        elif adapter.config.target_parameters or not isinstance(base_layer(modules[place]), nn.Linear | Conv1D):
            continue
        if inject.features(modules[place]) != adapter.features(layer):
            raise ValueError(
                f"layer {layer!r} has (in, out) features {inject.features(modules[place])} in the base model and "
                f"{adapter.features(layer)} in the adapter, which was trained on "
                f"{adapter.config.base_model_name_or_path!r}."
            )

    check_matching_time(adapter.config.to_dict(), modules)
    if adapter.config.target_parameters or places != {n: n for n in places}:
        return  # the names are not those of modules: `check_tensors` compares them
    # checked before PEFT allocates the adapter, whose size the config sets
    selected = [name for name, _ in inject.targeted_layers(base, adapter.config)]
    here = {*adapter.layers, *(name.split(".lora_embedding_")[0].removeprefix(PREFIX) for name in adapter.others)}
    without = [name for name in selected if name not in here]
    if without:
        raise ValueError(
            f"the config selects {len(without)} layers of the base model that the file has no tensors of: "
            f"{listed(without)}."
        )


def check_replication(config: LoraConfig, base: nn.Module) -> None:
    """Raise ValueError if layer_replication names layers that the base model lacks, or makes far too many."""
    count = getattr(getattr(base, "config", None), "num_hidden_layers", None)
    ranges = config.layer_replication or []
    if not isinstance(count, int):
        raise ValueError(f"layer_replication needs a model with layers, and {type(base).__name__}'s config has none.")
    if not all(len(pair) == 2 and 0 <= pair[0] < pair[1] <= count for pair in ranges):
        raise ValueError(
            f"layer_replication={reprlib.repr(ranges)} must be pairs of a first layer and the one after the last, and "
            f"the base model has {count} layers."
        )
    total = sum(last - first for first, last in ranges)
    if total > MOST_REPLICATED * count:
        raise ValueError(
            f"layer_replication={reprlib.repr(ranges)} makes {total} layers of {count}, more than {MOST_REPLICATED} "
            "of each."
        )


def check_not_zero(adapter: Adapter) -> None:
    """Raise ValueError if every B is zero: such an adapter was never trained, or was read under wrong names."""
    for name in adapter.tensors:
        if any(part in name for part in (".lora_B.", ".lora_embedding_B")) and adapter.tensors[name].count_nonzero():
            return
    raise ValueError("all B factors of the adapter are zero: it was not trained, and does nothing.")


def expected_tensors(model: Any, adapter_name: str) -> dict[str, Tensor]:
    """What PEFT saves of one adapter of a model.

    Raises:
        ValueError: if PEFT would leave out layers, or add tensors of another adapter: it takes every tensor with
            ".NAME." in its name for one of the adapter NAME, also where that is part of a layer's name.
    """
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    factor = re.compile(rf"\.lora_\w+\.{re.escape(adapter_name)}(\.|$)")
    own = [name for name, _ in model.named_parameters() if factor.search(name)]
    if len(own) != sum(bool(FACTOR.search(name)) for name in tensors):
        raise ValueError(
            f"PEFT saves other tensors for the adapter {adapter_name!r} than it has, {own[0]} for one: the name of an "
            f"adapter ({', '.join(map(repr, model.peft_config))}) is also part of the names of layers. Give that one "
            "another name, or delete it first."
        )
    return tensors


def base_weights(model: PeftModel, names: Set[str], adapter_name: str) -> dict[str, Tensor]:
    """Return what the base's embedding and output layer have, wrapped or not, if the names are among `names`.

    PEFT saves both with an adapter that adapts one of them, or if the number of tokens was changed, and of modules
    that it wraps everything that is inside. Loading the adapter then sets them.
    """
    own = re.compile(rf"\.{re.escape(adapter_name)}(?=\.|$)")  # which saved names lack
    found = {}
    for place in embeddings(model.get_base_model()):
        for name, parameter in model.get_submodule(f"{PREFIX}{place}").named_parameters(remove_duplicate=False):
            found[f"{PREFIX}{place}.{own.sub('', name)}"] = parameter
    return {name: found[name] for name in names if name in found}


def embeddings(model: nn.Module) -> list[str]:
    """Names of the model's embedding of tokens and of its output layer, as far as it has them."""
    found = []
    for get in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, get, lambda: None)()
        except NotImplementedError:
            continue
        found += [name for name, other in model.named_modules() if other is module and module is not None]
    return found


def added_tokens(model: nn.Module, saved: Mapping[str, Tensor]) -> int | None:
    """How many embeddings an adapter has saved, if the model has another number; else None.

    Args:
        model: the base model, which may have other adapters.
        saved: name in the file -> the tensor, or its spec.

    Raises:
        ValueError: if it has saved the embedding or the output layer alone, and the other is not the same weight.
    """
    weights, sizes = whole_weights(model), {}
    for place in weights:
        rows = {t.shape[0] for name, t in saved.items() if is_whole_weight(place, name.removeprefix(PREFIX))}
        if rows:
            sizes[place] = max(rows)
    size = max(sizes.values(), default=None)
    if size is None or all((w := weights[place]) is None or len(w) == size for place in sizes):
        return None
    for place in not_in_file(weights, sizes.keys()):
        raise ValueError(
            f"the adapter was trained with {size} tokens, which the base model does not have, and its file lacks "
            f"the weights of {place!r} for them. Save the base model as it was trained on, with {size} tokens, "
            "and give that as the base."
        )
    return size


def check_base_embeddings(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a model has other embeddings than the adapter was trained on, and the file not all of them.

    The file has the base's embedding with an adapter of it, or its output layer. Where the model's is another one, as
    of tokens that were added to both again, so is what the file lacks. New rows that start as the mean of the others
    are close enough.

    Args:
        model: the base model, which may have other adapters.
        saved: name in the file -> the tensor.
    """
    weights = whole_weights(model)
    names = {place: [n for n in saved if is_whole_weight(place, n.removeprefix(PREFIX))] for place in weights}
    missing = not_in_file(weights, {place for place in weights if names[place]})
    for place, other in itertools.product(weights, missing):
        weight = weights[place]
        for name in names[place]:
            is_base = ".base_layer." in name  # else it is trained
            if is_base and weight is not None and weight.shape == saved[name].shape and weight.is_floating_point():
                off = other_rows(weight.detach(), saved[name])
                if off:
                    raise ValueError(
                        f"{place!r} of the base model is not what the adapter was trained on, in {len(off)} rows from "
                        f"{off[0]} on, and its file lacks the weights of {other!r} that belong to it. Save the base "
                        "model as it was trained on, and give that as the base."
                    )


def other_rows(own: Tensor, theirs: Tensor) -> list[int]:
    """Numbers of the rows in which two weights differ by more than rounding."""
    own, theirs = own.float(), theirs.to(own.device, torch.float32)
    return ((own - theirs).abs() > SAME_ROW * theirs.std()).any(1).nonzero().flatten().tolist()


def whole_weights(model: nn.Module) -> dict[str, Any]:
    """Name of the embedding of tokens and of the output layer -> its weight, or None of a module without one."""
    return {
        place: next(
            (p for n, p in model.get_submodule(place).named_parameters(prefix=place) if is_whole_weight(place, n)),
            None,
        )
        for place in embeddings(model)
    }


def not_in_file(weights: Mapping[str, Any], places: Set[str]) -> list[str]:
    """Which of the weights are none of those at `places`, which a file has, if it has any."""
    return [
        name for name, w in weights.items() if places and w is not None and all(w is not weights[p] for p in places)
    ]


def is_whole_weight(place: str, name: str) -> bool:
    """Whether a tensor is the whole weight of a module, in whatever PEFT wraps it in."""
    return name.startswith(f"{place}.") and name.endswith("weight") and ".lora_" not in name


def check_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise ValueError if tensors are missing from the file, would not be used, or have a wrong shape."""
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors are missing from the file: {listed(missing)}")
    if unexpected:
        problems.append(f"{len(unexpected)} tensors of the file have no place in the model: {listed(unexpected)}")
    for name in sorted(expected.keys() & found.keys()):
        if found[name].shape != expected[name].shape:
            shapes = f"{tuple(found[name].shape)} in the file and {tuple(expected[name].shape)} in the model"
            problems.append(f"{listed([name])} has shape {shapes}")
    if problems:
        raise ValueError("the adapter does not fit what its config makes of the model: " + "; ".join(problems) + ".")


@contextmanager
def unchanged_after_error(model: nn.Module) -> Iterator[None]:
    """Restore the model's modules, classes, attributes, configs and parameters after an error in the block.

    PEFT changes a model layer by layer, so an error in the middle would leave it half changed. What is in a tensor is
    not restored: adding an adapter changes none, but for a parameter that gets another one (PiSSA and its like).
    """
    modules, parameters = list(model.modules()), [(p, p.requires_grad, p.data) for p in model.parameters()]
    classes = [type(module) for module in modules]
    attributes = [vars(module) for module in modules]
    values = [value for a in attributes for value in a.values()]
    configs = [vars(value) for value in values if isinstance(value, PreTrainedConfig | GenerationConfig)]
    containers = [*attributes, *configs, *(value for value in values if isinstance(value, dict | list | set))]
    copies = [copy.copy(container) for container in containers]
    try:
        yield
    except BaseException:
        for module, cls in zip(modules, classes, strict=True):
            module.__class__ = cls
        for container, before in zip(containers, copies, strict=True):
            container.clear()
            container.extend(before) if isinstance(container, list) else container.update(before)
        for p, requires_grad, data in parameters:
            p.data = data
            p.requires_grad = requires_grad
        raise


@contextmanager
def faults_as_value_errors() -> Iterator[None]:
    """Turn the errors that PEFT and torch raise for values that PEFT does not check into a ValueError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"PEFT cannot add an adapter with this config to the model: {type(error).__name__}: {error}"
        ) from error


def _with_adapter(model: nn.Module, adapter: Adapter, adapter_name: str) -> PeftModel:
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, adapter.config)
        return model
    return peft.get_peft_model(model, adapter.config, adapter_name)
