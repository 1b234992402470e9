"""The linear maps in a saved adapter: convolutions and experts, seen as the linear layers that they are.

A convolution's factors are those of the linear map of its patches, with the patch's positions kept apart. A parameter
of `target_parameters` has one grid for each of its experts. Tools that read linear layers read both through here.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from ..config import LoraConfig
from .files import LazyTensors, spec

A, HYBRID_A = ".lora_A.weight", ".lora_A.hybrid_weight"
B, HYBRID_B = ".lora_B.weight", ".lora_B.hybrid_weight"
FACTORS = (A, HYBRID_A, B, HYBRID_B)
KINDS = CONVOLUTION, EXPERT, PARAMETER = "convolutions", "experts", "single parameters"
IN_ORDER = ("gate_up_proj", "down_proj")  # as modules of experts define them, and so as PEFT wraps them


class Place(NamedTuple):
    """Where one linear map is in the file.

    Attributes:
        layer: what the file calls its layer.
        kernel: size of the convolution's kernel, or () if it is none.
        parameter: full name of the parameter that it is an expert of, or "".
        expert: which one, of how many `experts`.
    """

    layer: str
    kernel: tuple[int, ...] = ()
    parameter: str = ""
    expert: int = 0
    experts: int = 0

    @property
    def kind(self) -> str:
        if not self.parameter:
            return CONVOLUTION
        module, _, name = self.parameter.rpartition(".")
        return EXPERT if name in IN_ORDER and module.endswith(".experts") else PARAMETER


def linear_maps(tensors: LazyTensors, config: LoraConfig, prefix: str) -> tuple[LazyTensors, dict[str, Place]]:
    """See every factor as one of a linear layer: expert e of the parameter "mlp.p" becomes the layer "mlp.p[e]".

    Args:
        tensors: of an adapter, named as gralora saves them.
        config: its config.
        prefix: PEFT's, before the names of layers.

    Returns:
        The tensors, of which a convolution's A is `[k, I/k * P, r_g]` for P positions of the kernel; and the place of
        each layer that is a convolution or an expert.

    Raises:
        ValueError: if the file does not show which of several parameters a factor belongs to.
    """
    specs = dict(tensors.specs)
    sources = {name: (name, -1) for name in specs}  # name -> name in the file, and which expert
    places: dict[str, Place] = {}
    layers = [name.removesuffix(B) for name in specs if name.endswith(B) and name.removesuffix(B) + A in specs]
    parameters = _parameters([layer.removeprefix(prefix) for layer in layers], config)
    for layer in layers:
        name, first, last = layer.removeprefix(prefix), specs[layer + A], specs[layer + B]
        parts = [layer + suffix for suffix in FACTORS if layer + suffix in specs]
        if name in parameters and first.ndim == last.ndim == 4:
            full = [specs.pop(part) for part in parts]
            for part in parts:
                del sources[part]
            for e in range(len(last)):
                one = f"{parameters[name]}[{e}]"
                places[one] = Place(name, parameter=parameters[name], expert=e, experts=len(last))
                for part, t in zip(parts, full, strict=True):
                    new = prefix + one + part.removeprefix(layer)
                    specs[new], sources[new] = spec(tuple(t.shape[1:]), t.dtype), (part, e)
        elif first.ndim > 3 and last.ndim == 3:
            places[name] = Place(name, kernel=tuple(first.shape[2:-1]))
            for part in parts[: -1 if layer + HYBRID_B not in specs else -2]:
                specs[part] = spec(tuple(_flat(specs[part], part).shape), specs[part].dtype)
    load = functools.lru_cache(maxsize=1)(tensors.__getitem__)  # experts are asked for one after the other

    def read(name: str) -> Tensor:
        source, expert = sources[name]
        return _flat(tensors[source], source) if expert < 0 else load(source)[expert]

    return LazyTensors(specs, read), places


def _flat(t: Tensor, name: str) -> Tensor:
    """Join channels and positions in the A of a convolution; any other tensor is returned as it is."""
    if name.endswith(A) and t.ndim > 3:
        return t.flatten(1, -2)
    return t.flatten(1) if name.endswith(HYBRID_A) and t.ndim > 2 else t


def _parameters(layers: list[str], config: LoraConfig) -> dict[str, str]:
    """Name of each wrapper of parameters in the file -> the parameter's full name.

    PEFT nests one wrapper for each parameter of a module, the first one innermost, as "experts.base_layer".
    """
    wrapped: dict[str, list[str]] = {}
    for layer in layers:
        wrapped.setdefault(layer.replace(".base_layer", ""), []).append(layer)
    found: dict[str, str] = {}
    for module, wrappers in wrapped.items():
        names = [t.rpartition(".")[2] for t in config.target_parameters or [] if holds(module, t)]
        names = list(dict.fromkeys(names))
        if len(names) == len(wrappers) > 1:
            if not set(names) <= set(IN_ORDER):
                raise ValueError(
                    f"target_parameters={config.target_parameters!r}: which of the factors in {module!r} belong to "
                    f"which parameter shows only for {' and '.join(IN_ORDER)}. `gralora merge` merges the adapter."
                )
            names.sort(key=IN_ORDER.index)
        if len(names) == len(wrappers):
            innermost_first = sorted(wrappers, key=lambda layer: -layer.count(".base_layer"))
            found |= {layer: f"{module}.{name}" for layer, name in zip(innermost_first, names, strict=True)}
    return found


def holds(module: str, target: str) -> bool:
    """Whether an entry of target_parameters, as "experts.down_proj", names a parameter of a module."""
    return f".{module}".endswith(f".{target.rpartition('.')[0]}")


def by_parameter(places: Mapping[str, Place]) -> dict[str, list[str]]:
    """Full name of each parameter -> its experts' layers, in order."""
    grouped: dict[str, list[str]] = {}
    for layer, place in places.items():
        if place.parameter:
            grouped.setdefault(place.parameter, []).append(layer)
    return grouped
