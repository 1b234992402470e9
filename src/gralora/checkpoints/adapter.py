"""A saved adapter as an object: its config, its factors layer by layer, and whether the two fit together.

Whatever format an adapter was saved in (see formats.py), its tensors have gralora's names here and its config is a
`gralora.LoraConfig`. Tensors are read when they are asked for. A plain LoRA is one, too: its factors are matrices.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import peft
import torch
from torch import Tensor

from ..blocks import scaling_gain
from ..config import LoraConfig, has_effect, is_set
from ..fields import plain
from ..inits import changes_base
from ..kinds import not_linear
from ..seam import is_targeted
from .files import LazyTensors
from .untrusted import listed
from .views import HYBRID_A, HYBRID_B, A, B, Place

PREFIX = "base_model.model."  # PEFT's, before the name of the layer in the base model
BIAS = ".lora_B.bias"
MAGNITUDE = ".lora_magnitude_vector"  # as PEFT saves it, without ".weight"
SUFFIXES = (A, B, HYBRID_A, HYBRID_B, BIAS, MAGNITUDE)  # in the order of Factors
FACTOR = re.compile(r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\b")  # in what PEFT names of any LoRA
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class NotByFiles(ValueError):
    """What an adapter has cannot be merged into a base model's files one by one.

    Attributes:
        reason: why, without a full stop.
    """

    def __init__(self, reason: str, advice: str = "") -> None:
        """Take the reason, and what else to do, in sentences of their own."""
        super().__init__(f"{reason}. {advice}".strip())
        self.reason = reason


def check_base(config: Any) -> None:
    """Raise ValueError if an adapter's factors belong to base weights that its initialisation has changed."""
    if changes_base(config):
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} changed the base weights that the adapter belongs to, "
            "so that its factors mean nothing for the original ones. `gralora merge` changes and merges them; or save "
            "the adapter with save_pretrained(..., path_initial_model_for_weight_conversion=FOLDER), FOLDER holding "
            "it as it was before training: what this writes can be exported."
        )


class Factors(NamedTuple):
    """One layer: A `[k, I/k, r_g]`, B `[k, r_g, O/k]`, A_s `[hybrid_r, I]`, B_s `[O, hybrid_r]`, bias and m `[O]`."""

    A: Tensor
    B: Tensor
    hybrid_A: Tensor | None = None
    hybrid_B: Tensor | None = None
    bias: Tensor | None = None
    magnitude: Tensor | None = None

    def moved(self, move: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """A, B, A_s and B_s, each after `move`, which gives another dtype or device."""
        hybrid_A, hybrid_B = (None if t is None else move(t) for t in (self.hybrid_A, self.hybrid_B))
        return move(self.A), move(self.B), hybrid_A, hybrid_B


@dataclass(frozen=True)
class Adapter:
    """A saved adapter: GraLoRA of whatever format it was, or a plain LoRA, which load_adapter alone takes.

    Attributes:
        config: its config, as gralora's.
        tensors: named as gralora saves them, with PEFT's prefix.
        format: the format it was read from.
        notices: what was dropped or assumed in reading it; for the user.
        places: of the layers that are convolutions or experts, seen as linear layers; see views.py.
    """

    config: LoraConfig
    tensors: LazyTensors
    format: str = "gralora"
    notices: tuple[str, ...] = field(default=())
    places: Mapping[str, Place] = field(default_factory=dict)

    @cached_property
    def layers(self) -> list[str]:
        """Names of the adapted layers in the base model, in the order of the file's names."""
        names = [layer_and_suffix(name)[0] for name in self.tensors if layer_and_suffix(name)[1]]
        return list(dict.fromkeys(names))

    @cached_property
    def others(self) -> list[str]:
        """Tensors that are no factors: modules_to_save, biases of the base, embeddings; as named in the file."""
        return [name for name in self.tensors if not layer_and_suffix(name)[1]]

    @cached_property
    def modules(self) -> list[str]:
        """The layers that are modules of the base model, and no experts."""
        return [layer for layer in self.layers if self.name_in_config(layer) == layer]

    @cached_property
    def not_linear(self) -> dict[str, str]:
        """The layers that have factors of other shapes than linear ones, and the name of such a factor of each."""
        return {_layer_of(name): name for name, t in self.tensors.specs.items() if not_linear(name, t.ndim)}

    def factors(self, layer: str) -> Factors:
        return self._factors(self.tensors, layer)

    def specs(self, layer: str) -> Factors:
        """As `factors`, without values."""
        return self._factors(self.tensors.specs, layer)

    def _factors(self, tensors: Mapping[str, Tensor], layer: str) -> Factors:
        names = (self._names.get((layer, suffix)) for suffix in SUFFIXES)
        return Factors(*(None if name is None else tensors[name] for name in names))  # type: ignore[arg-type]

    @cached_property
    def _names(self) -> dict[tuple[str, str], str]:
        return {layer_and_suffix(name): name for name in self.tensors}

    def features(self, layer: str) -> tuple[int, int]:
        """Input and output features."""
        f = self.specs(layer)
        if f.A.ndim == 2:  # of a plain LoRA
            return f.A.shape[1], f.B.shape[0]
        return f.A.shape[0] * f.A.shape[1], f.B.shape[0] * f.B.shape[2]

    def rank(self, layer: str) -> int:
        """Total rank by the config: its rank_pattern, else its r."""
        return self.config.of_layer("r", self.name_in_config(layer))

    def alpha(self, layer: str) -> float:
        return self.config.of_layer("lora_alpha", self.name_in_config(layer))

    def name_in_config(self, layer: str) -> str:
        """The name that the config's patterns are matched with: of an expert, its parameter's."""
        return layer if layer not in self.places else self.places[layer].parameter or layer

    def gain(self, layer: str) -> float:
        """Factor of the config's gralora_scaling."""
        k, _, r_g = self.specs(layer).A.shape
        return scaling_gain(self.config.gralora_scaling, k, r_g, self.config.hybrid_r)

    def peft_scaling(self, layer: str) -> float:
        """PEFT's scaling, without the gain: the factor on an adapter's bias."""
        rank = self.rank(layer)
        return self.alpha(layer) / (math.sqrt(rank) if self.config.use_rslora else rank)

    def scaling(self, layer: str) -> float:
        """Factor on dW: PEFT's scaling times the gain."""
        return self.peft_scaling(layer) * self.gain(layer)

    def k(self, layer: str) -> int:
        """Blocks per side, by the tensors."""
        return self.specs(layer).A.shape[0]

    def lora_rank(self, layer: str) -> int:
        """Rank of the plain LoRA that equals the layer's adapter: k * r_g + hybrid_r."""
        k, _, r_g = self.specs(layer).A.shape
        return k * r_g + self.config.hybrid_r


def layer_and_suffix(name: str) -> tuple[str, str]:
    """Split a tensor's name into the base model's layer and which factor it is; `(name, "")` if it is none."""
    for suffix in SUFFIXES:
        if name.endswith(suffix):
            return name.removesuffix(suffix).removeprefix(PREFIX), suffix
    return name, ""


def json_config(config: peft.LoraConfig) -> dict[str, Any]:
    """A config as adapter_config.json has it."""
    return {name: plain(value) for name, value in config.to_dict().items()}


def set_fields(config: peft.LoraConfig) -> dict[str, Any]:
    """The fields of a config that ask for anything but their defaults, and have an effect, as JSON has them."""
    found = {name: value for name, value in json_config(config).items() if is_set(name, value)}
    return {name: value for name, value in found.items() if has_effect(name, found)}


# Whether tensors and config fit together


def check(adapter: Adapter, any_kind: bool = False) -> None:
    """Raise ValueError, naming layer, field and value, if the tensors are not what the config says.

    Args:
        adapter: the adapter.
        any_kind: whether layers may be others than linear ones.
    """
    config = adapter.config
    if not isinstance(config.gralora_k, int):
        raise ValueError(f"gralora_k={config.gralora_k!r} must be a number in a saved adapter.")
    if not any_kind:
        _check_linear(adapter)
    others = adapter.not_linear
    if not adapter.layers and not others:
        raise ValueError("the file has no GraLoRA tensors; the adapter is empty or of another method.")
    (layer, _), count = Counter(map(layer_and_suffix, adapter.tensors)).most_common(1)[0]
    if count > 1:
        raise ValueError(f"layer {layer!r} has a factor twice, with and without the prefix {PREFIX!r}.")
    for layer in adapter.layers:
        if layer not in others:
            f = adapter.specs(layer)
            _check_present(layer, f, config)
            _check_shapes(layer, f, adapter)
    for layer, name in others.items():
        _check_ranks(layer, adapter.tensors.specs[name], adapter)
    strange = [name for name in adapter.others if FACTOR.search(name) and _layer_of(name) not in others]
    if strange:
        raise ValueError(
            f"{len(strange)} tensors of the file are named like factors, and are none of this adapter: "
            f"{listed(strange)}. PEFT saves such where a model has an adapter whose name is part of layers' names."
        )
    check_selected(adapter)


def _layer_of(name: str) -> str:
    """The layer that a factor of any kind belongs to."""
    return FACTOR.split(name.removeprefix(PREFIX))[0]


def _check_ranks(layer: str, factor: Tensor, adapter: Adapter) -> None:
    """Raise ValueError if a factor of any kind lacks the k and rank of the config, for which PEFT makes room."""
    config = adapter.config
    k, r = config.of_layer("gralora_k", layer), config.of_layer("r", layer)
    ranks = {r, r - config.hybrid_r}  # an embedding's has the plain part within
    shape = tuple(factor.shape)
    if factor.dtype not in FLOATS or factor.numel() == 0 or k not in shape or ranks.isdisjoint(shape):
        raise ValueError(
            f"layer {layer!r}: a factor is {shape} {factor.dtype}; with gralora_k={k}, r={r} and hybrid_r="
            f"{config.hybrid_r} in the config it must be floating point, not empty, and have sizes of k and of the "
            "rank."
        )


def _check_linear(adapter: Adapter) -> None:
    """Raise ValueError, naming field or layer, if the adapter has factors that are not those of a linear layer."""
    problem = ""
    if adapter.config.target_parameters and not adapter.places:
        problem = f"target_parameters={plain(adapter.config.target_parameters)!r} in its config"
    for name, t in adapter.tensors.specs.items():
        words = not_linear(name, t.ndim)
        if words:
            problem = problem or f"{words} in layer {layer_and_suffix(name)[0]!r}"
    if problem:
        raise NotByFiles(
            f"the adapter has {problem}, and gralora's tools for saved adapters read those of linear layers only",
            "`gralora merge` merges it into a base model that transformers can load; gralora.load_adapter loads it "
            "into any model.",
        )


def _check_present(layer: str, f: Factors, config: LoraConfig) -> None:
    wanted = {"A": True, "B": True, "hybrid_A": config.hybrid_r > 0, "hybrid_B": config.hybrid_r > 0}
    wanted |= {"bias": config.lora_bias, "magnitude": config.use_dora}
    for factor, needed in wanted.items():
        if (getattr(f, factor) is not None) != needed:
            problem = "is missing" if needed else "is there"
            raise ValueError(
                f"layer {layer!r}: factor {factor} {problem}, with hybrid_r={config.hybrid_r}, "
                f"lora_bias={config.lora_bias} and use_dora={config.use_dora} in the config."
            )


def _check_shapes(layer: str, f: Factors, adapter: Adapter) -> None:
    config, rank = adapter.config, adapter.rank(layer)
    k, hybrid_r = config.of_layer("gralora_k", adapter.name_in_config(layer)), config.hybrid_r
    for factor, t in zip(f._fields, f, strict=True):
        if t is not None and (t.dtype not in FLOATS or t.numel() == 0):
            raise ValueError(
                f"layer {layer!r}: factor {factor} is {tuple(t.shape)} {t.dtype}; it must be floating point and not "
                "empty (an empty one was saved from a sharded model without gathering it)."
            )
    shapes = f"A {tuple(f.A.shape)}, B {tuple(f.B.shape)}"
    if f.A.ndim != 3 or f.B.ndim != 3 or f.A.shape[0] != k or f.B.shape[0] != k or f.A.shape[2] != f.B.shape[1]:
        raise ValueError(
            f"layer {layer!r}: factors have shapes {shapes}; with gralora_k={k} they must be (k, I/k, r_g) and "
            "(k, r_g, O/k)."
        )
    if f.A.shape[2] != rank - hybrid_r:
        raise ValueError(
            f"layer {layer!r}: factors have shapes {shapes}, so a grid rank of {f.A.shape[2]}, but the config, read "
            f"as {adapter.format}, gives r={rank} in total less hybrid_r={hybrid_r}, {rank - hybrid_r}. (A "
            "SqueezeBits adapter that PEFT has read and saved again has lost its gralora_alpha, so its scale.)"
        )
    in_features, out_features = adapter.features(layer)
    expected = {"hybrid_A": (hybrid_r, in_features), "hybrid_B": (out_features, hybrid_r), "bias": (out_features,)}
    expected["magnitude"] = (out_features,)
    for factor, shape in expected.items():
        t = getattr(f, factor)
        if t is not None and tuple(t.shape) != shape:
            raise ValueError(f"layer {layer!r}: factor {factor} has shape {tuple(t.shape)}, expected {shape}.")


CHOOSING = ("target_modules", "exclude_modules", "layers_to_transform")  # fields by which PEFT chooses layers


def check_selected(adapter: Adapter) -> None:
    """Raise ValueError, with names, if the file has layers that its config does not select: PEFT would ignore them."""
    if adapter.config.ensure_weight_tying and adapter.not_linear:
        return  # PEFT adapts what is tied to an embedding as well, without saying so in the config
    by_name = [layer for layer in adapter.modules if ".base_layer" not in layer]  # inside of a wrapper of PEFT's
    if adapter.config.target_parameters:  # whose wrappers have names of their own
        by_name = [layer for layer in by_name if layer not in adapter.not_linear]
    unselected = [layer for layer in by_name if not is_targeted(adapter.config, layer)]
    if unselected:
        choosing = {name: plain(getattr(adapter.config, name)) for name in CHOOSING}
        said = ", ".join(f"{name}={value!r}" for name, value in choosing.items() if value is not None)
        raise ValueError(
            f"the config does not select {len(unselected)} layers of the file: {listed(unselected)}. It has {said}; "
            "either the config or the file is of another adapter."
        )


def check_plain(adapter: Adapter) -> None:
    """Raise ValueError, naming layer and factor, if the matrices of a plain LoRA are not what its config says.

    PEFT makes room for them by the config's ranks before it reads them, so these are checked first.
    """
    for layer in adapter.layers:
        A, B = adapter.specs(layer)[:2]
        if A is None or B is None:
            raise ValueError(f"layer {layer!r}: factor {'A' if A is None else 'B'} is missing.")
        for factor, t in (("A", A), ("B", B)):
            if t.dtype not in FLOATS or t.numel() == 0:
                raise ValueError(
                    f"layer {layer!r}: factor {factor} is {tuple(t.shape)} {t.dtype}; it must be floating point and "
                    "not empty."
                )
        rank = adapter.rank(layer)
        if not adapter.config.target_parameters and (A.shape[0] != rank or B.shape[1] != rank):
            raise ValueError(
                f"layer {layer!r}: factors have shapes A {tuple(A.shape)}, B {tuple(B.shape)}; the config gives it "
                f"rank {rank}."
            )
    if not adapter.config.target_parameters and not any(".base_layer" in layer for layer in adapter.layers):
        check_selected(adapter)
