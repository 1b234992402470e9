"""Every GraLoRA checkpoint format, both ways, through one table: FORMATS.

All formats hold the same tensors in the same layout under other names, and configs that count ranks differently. So a
format is a table of names and a pair of functions between its config (a dict) and `gralora.LoraConfig`; tensors are
renamed, never computed, and a round trip is bit-exact. docs/formats.md describes the formats.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from peft import PeftType
from torch import Tensor

from ..blocks import scaling_gain
from ..config import FORMAT, SUPPORTED_VARIANTS, LoraConfig
from .files import LazyTensors
from .untrusted import check_fields, check_matching_time, check_rank

PREFIX = "base_model.model."  # PEFT's, before the name of the layer in the base model
A, HYBRID_A = ".lora_A.weight", ".lora_A.hybrid_weight"
B, HYBRID_B, BIAS = ".lora_B.weight", ".lora_B.hybrid_weight", ".lora_B.bias"
MAGNITUDE = ".lora_magnitude_vector"  # as PEFT saves it, without ".weight"
SUFFIXES = (A, B, HYBRID_A, HYBRID_B, BIAS, MAGNITUDE)  # in the order of Factors
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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
    """A saved GraLoRA adapter, of whatever format it was.

    Attributes:
        config: its config, as gralora's.
        tensors: named as gralora saves them, with PEFT's prefix.
        format: the format it was read from.
        notices: what was dropped or assumed in reading it; for the user.
    """

    config: LoraConfig
    tensors: LazyTensors
    format: str = "gralora"
    notices: tuple[str, ...] = field(default=())

    @cached_property
    def layers(self) -> list[str]:
        """Names of the adapted layers in the base model, in the order of the file's names."""
        names = [layer_and_suffix(name)[0] for name in self.tensors if layer_and_suffix(name)[1]]
        return list(dict.fromkeys(names))

    @cached_property
    def others(self) -> list[str]:
        """Tensors that are no factors: modules_to_save, biases of the base, embeddings; as named in the file."""
        return [name for name in self.tensors if not layer_and_suffix(name)[1]]

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
        return f.A.shape[0] * f.A.shape[1], f.B.shape[0] * f.B.shape[2]

    def rank(self, layer: str) -> int:
        """Total rank by the config: its rank_pattern, else its r."""
        return self.config.of_layer("r", layer)

    def alpha(self, layer: str) -> float:
        return self.config.of_layer("lora_alpha", layer)

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


# Reading and writing


def recognise(config: Mapping[str, Any], source: str | None = None) -> str:
    """The name of the format that a config is of, by its fields. Never a guess.

    Args:
        config: content of adapter_config.json.
        source: the format's name if the user knows it; must not contradict the fields.

    Raises:
        ValueError: if it is no GraLoRA adapter, or its fields leave open which scale it has.
    """
    if source is not None and source not in FORMATS:
        raise ValueError(f"format {source!r} is not known; use one of {', '.join(FORMATS)}.")
    possible = [name for name, known in FORMATS.items() if known.fits(config)]
    if source in possible:
        return source
    peft_type = config.get("peft_type")
    if not possible and peft_type == PeftType.LORA:
        raise ValueError("this is a plain LoRA adapter (peft_type LORA without use_gralora): nothing to convert.")
    if not possible and {"alpha", "gralora_alpha"} <= config.keys():
        raise ValueError(
            f"the config has both alpha={config['alpha']!r} (PEFT, on top of which comes hybrid_r) and "
            f"gralora_alpha={config['gralora_alpha']!r} (SqueezeBits, where r includes hybrid_r), so its scale is "
            "ambiguous; remove the one that was not trained with."
        )
    if not possible:
        raise ValueError(f"peft_type={peft_type!r} is no GraLoRA adapter; gralora reads {', '.join(FORMATS)}.")
    if source is not None:
        raise ValueError(f"the fields of the config are those of the format {possible[0]!r}, not {source!r}.")
    if len(possible) > 1:
        raise ValueError(
            "the config has neither alpha nor gralora_alpha, so its scale and what its r counts are ambiguous; say "
            f"which program wrote it: --from {' or --from '.join(possible)} (Python: source=...), whose default "
            "alpha is then taken."
        )
    return possible[0]


def read(config: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str | None = None) -> Adapter:
    """Read an adapter of any format in FORMATS. Nothing is computed, and nothing loaded from LazyTensors.

    Raises:
        ValueError: if the format is unclear, or tensors and config do not fit together.
    """
    name = recognise(config, source)
    known = FORMATS[name]
    notices = []
    lazy = LazyTensors.of(tensors)
    unused = [t for t in lazy if t.endswith(known.unused)] if known.unused else []
    if unused:
        notices.append(f"dropped {len(unused)} tensors that this format saves and never uses: {unused[0]}, ...")
    sources = {known.to_ours(t): t for t in lazy if t not in unused}
    if len(sources) < len(lazy) - len(unused):
        twice = next(t for t in lazy if t not in unused and sources[known.to_ours(t)] != t)
        raise ValueError(f"tensor {twice!r} is in the file twice, under the names of two formats.")
    ours, more_notices = known.read_config(dict(config))
    notices += more_notices
    adapter = Adapter(_config(ours), lazy.renamed(sources), name, tuple(notices))
    check_matching_time(ours, adapter.layers)
    if not adapter.config.target_modules or adapter.config.target_modules == "all-linear":
        adapter.config.target_modules = set(adapter.layers)  # type: ignore[assignment]  # PEFT keeps a set; what the words stood for is no longer known
    check(adapter)
    return adapter


def _config(fields: dict[str, Any]) -> LoraConfig:
    known = {f.name for f in dataclasses.fields(LoraConfig)}
    unknown = sorted(fields.keys() - known)
    if any(fields[name] for name in unknown):
        warnings.warn(
            f"the config has the fields {', '.join(map(repr, unknown))}, which this version of PEFT does not know and "
            "which are ignored; if they change the adapter's output, update PEFT.",
            stacklevel=4,
        )
    fields = {name: value for name, value in fields.items() if name in known}
    check_fields(fields)
    return LoraConfig(**fields)


def write(adapter: Adapter, target: str) -> tuple[dict[str, Any], LazyTensors]:
    """The config and tensors of an adapter in another format.

    Raises:
        ValueError: if the format cannot express something in it; the message names the field and what would work.
    """
    known = FORMATS.get(target)
    if known is None or known.write_config is None:
        names = [name for name, one in FORMATS.items() if one.write_config is not None]
        raise ValueError(f"format {target!r} cannot be written; use one of {', '.join(names)}.")
    return known.write_config(adapter), adapter.tensors.renamed({known.to_theirs(t): t for t in adapter.tensors})


def check(adapter: Adapter) -> None:
    """Raise ValueError, naming layer, field and value, if the tensors are not what the config says."""
    config = adapter.config
    if not isinstance(config.gralora_k, int):
        raise ValueError(f"gralora_k={config.gralora_k!r} must be a number in a saved adapter.")
    _check_linear(adapter)
    if not adapter.layers:
        raise ValueError("the file has no GraLoRA tensors; the adapter is empty or of another method.")
    names = [layer_and_suffix(name) for name in adapter.tensors]
    if len(set(names)) < len(names):
        twice = next(layer for layer, suffix in names if names.count((layer, suffix)) > 1)
        raise ValueError(f"layer {twice!r} has a factor twice, with and without the prefix {PREFIX!r}.")
    for layer in adapter.layers:
        f = adapter.specs(layer)
        _check_present(layer, f, config)
        _check_shapes(layer, f, adapter)


def _check_linear(adapter: Adapter) -> None:
    """Raise ValueError, naming field or layer, if the adapter has factors that are not those of a linear layer."""
    problem = ""
    if adapter.config.target_parameters:
        problem = f"target_parameters={plain(adapter.config.target_parameters)!r} in its config"
    for name in adapter.others:
        if ".lora_embedding_" in name:
            problem = problem or f"an embedding's factor {name!r}"
    for layer in adapter.layers:
        A = adapter.specs(layer).A
        if A is not None and A.ndim > 3:
            problem = problem or f"a convolution's factors {tuple(A.shape)} in layer {layer!r}"
        if ".base_layer." in layer:
            problem = problem or f"layer {layer!r} inside of an attention module"
    if problem:
        raise ValueError(
            f"the adapter has {problem}, and gralora's tools for saved adapters read those of linear layers only. "
            "Load it with peft.PeftModel.from_pretrained; merge_and_unload() there merges it into the model."
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
    k, hybrid_r = config.of_layer("gralora_k", layer), config.hybrid_r
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


# Configs. The fields that every PEFT config has, and those that two tuners call the same:
SHARED: tuple[str, ...] = (
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
)
SHARED += ("target_modules", "fan_in_fan_out", "modules_to_save", "layers_to_transform", "layers_pattern")
SHARED += ("gralora_k", "hybrid_r")


def plain(value: Any) -> Any:
    """A config's value as JSON has it: sets sorted, enumerations as their values."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    return getattr(value, "value", value)


def json_config(config: LoraConfig) -> dict[str, Any]:
    return {name: plain(value) for name, value in config.to_dict().items()}


def set_fields(config: LoraConfig) -> dict[str, Any]:
    """The fields of a config that differ from their defaults, as JSON has them."""
    defaults = json_config(LoraConfig())
    return {name: value for name, value in json_config(config).items() if value != defaults.get(name)}


def _gralora_to_gralora(config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    return config, []


def _fork_to_gralora(config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The HaohanTsao/peft fork: PEFT's LoRA config with the same meanings as ours."""
    notices = []
    if config.get("lora_bias"):
        notices.append("lora_bias=True set to False: the fork's forward does not use the bias.")
    for name in SUPPORTED_VARIANTS:  # what the fork makes of them together with a grid is not known
        _refuse_if_set(name, config.get(name))
    known = {f.name for f in dataclasses.fields(LoraConfig)}
    for name in sorted(config.keys() - known):
        _refuse_if_set(name, config.pop(name))
    return config | {"lora_bias": False, "gralora_format": FORMAT}, notices


def _peft_to_gralora(config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """PEFT's GRALORA: r is the rank of the grid, alpha its scale times (r + hybrid_r), 64 by default."""
    return _tuner_to_gralora(config, "alpha", 64, includes_hybrid=False)


def _squeezebits_to_gralora(config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The original repository: r is the total rank, gralora_alpha its scale times r, 8 by default."""
    return _tuner_to_gralora(config, "gralora_alpha", 8, includes_hybrid=True)


def _tuner_to_gralora(
    config: dict[str, Any], alpha_name: str, default_alpha: int, includes_hybrid: bool
) -> tuple[dict[str, Any], list[str]]:
    notices = []
    if alpha_name not in config:
        notices.append(f"{alpha_name} is not in the config: took its default, {default_alpha}.")
        config[alpha_name] = default_alpha
    for name in ("r", "hybrid_r"):
        check_rank(name, config.get(name))
    r, hybrid_r = config["r"], config["hybrid_r"]
    ours = {name: config.pop(name) for name in SHARED if name in config}
    ours |= {
        "peft_type": PeftType.LORA,
        "use_gralora": True,
        "gralora_format": FORMAT,
        "r": r if includes_hybrid else r + hybrid_r,
        "lora_alpha": config[alpha_name],
        "lora_dropout": config.pop("gralora_dropout", 0.0),
        "bias": str(config.pop("bias", "none")).replace("gralora_only", "lora_only"),
        "init_lora_weights": config.pop("init_weights", True),
    }
    for name in sorted(config.keys() - {"peft_type", "r", alpha_name}):
        _refuse_if_set(name, config[name])
    return ours, notices


def _refuse_if_set(name: str, value: Any) -> None:
    if value:
        raise ValueError(
            f"the config has {name}={value!r}, which gralora does not know and so cannot keep; if it does not change "
            "the adapter's output, remove it from adapter_config.json."
        )


def _gralora_from_gralora(adapter: Adapter) -> dict[str, Any]:
    return json_config(adapter.config)


NOT_IN_OUTPUT = {  # fields that a trained adapter's output does not depend on, or that are written under another name
    "use_gralora",
    "gralora_format",
    "gralora_scaling",
    "r",
    "lora_alpha",
    "lora_dropout",
    "bias",
    "peft_type",
    "init_lora_weights",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "gralora_k_pattern",
    "exclude_modules",
    *SHARED,
}


def _gralora_to_peft(adapter: Adapter) -> dict[str, Any]:
    """PEFT's GRALORA config, in which the rank and scale of all layers are the same two numbers."""
    config = adapter.config
    for name in sorted(set_fields(config).keys() - NOT_IN_OUTPUT):
        raise ValueError(
            f"{name}={getattr(config, name)!r} cannot be expressed in PEFT's GRALORA format; "
            "`gralora export --for peft` (a plain LoRA) or `gralora merge` may take it."
        )
    values: dict[str, set[Any]] = {}
    for name, value in (
        ("rank_pattern", adapter.rank),
        ("alpha_pattern", lambda layer: adapter.alpha(layer) * adapter.gain(layer)),
        ("gralora_k_pattern", adapter.k),
    ):
        values[name] = {value(layer) for layer in adapter.layers}
        if len(values[name]) > 1:
            raise ValueError(
                f"{name}={getattr(config, name)!r} gives layers different values, which PEFT's GRALORA format does "
                "not have; `gralora export --for peft` writes a plain LoRA that equals it."
            )
    (r,), (alpha,), (k,) = values.values()
    if config.use_rslora:
        if math.isqrt(r) ** 2 != r:
            raise ValueError(
                f"use_rslora=True with r={r}: the scale {alpha}/sqrt({r}) is no alpha/{r} with a number that floating "
                "point holds exactly (it is when r is a square, as 4, 16 or 64), and PEFT's GRALORA format has no "
                "rsLoRA; `gralora export --for peft` writes a plain LoRA that equals it."
            )
        alpha *= math.isqrt(r)
    shared = {name: plain(getattr(config, name)) for name in SHARED}
    if config.exclude_modules:
        shared["target_modules"] = sorted(adapter.layers)
    return shared | {
        "peft_type": "GRALORA",
        "gralora_k": k,
        "r": r - config.hybrid_r,
        "alpha": alpha,
        "gralora_dropout": config.lora_dropout,
        "bias": config.bias.replace("lora_only", "gralora_only"),
        "init_weights": bool(config.init_lora_weights),
    }


# The table


@dataclass(frozen=True)
class Format:
    """How one program saves GraLoRA adapters.

    Attributes:
        what: one line for people.
        fits: whether a config may be of this format.
        read_config: its config -> `gralora.LoraConfig`'s fields, and notices.
        write_config: the inverse, or None if gralora does not write the format.
        suffixes: our suffixes of tensor names -> its.
        unused: suffixes of tensors that it saves and never uses.
    """

    what: str
    fits: Callable[[Mapping[str, Any]], bool]
    read_config: Callable[[dict[str, Any]], tuple[dict[str, Any], list[str]]]
    write_config: Callable[[Adapter], dict[str, Any]] | None
    suffixes: Mapping[str, str]
    unused: tuple[str, ...] = ()

    def to_ours(self, name: str) -> str:
        return _replace_suffix(name, {theirs: ours for ours, theirs in self.suffixes.items()})

    def to_theirs(self, name: str) -> str:
        return _replace_suffix(name, self.suffixes)


def _replace_suffix(name: str, suffixes: Mapping[str, str]) -> str:
    for old, new in suffixes.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


GRALORA_NAMES = {
    A: ".gralora_A",
    B: ".gralora_B",
    HYBRID_A: ".gralora_A_general.weight",
    HYBRID_B: ".gralora_B_general.weight",
}


def _is_gralora_tuner(config: Mapping[str, Any]) -> bool:
    return config.get("peft_type") == PeftType.GRALORA


def _is_gralora_variant(config: Mapping[str, Any]) -> bool:
    return config.get("peft_type") == PeftType.LORA and bool(config.get("use_gralora"))


FORMATS = {
    "gralora": Format(
        what="this library: a PEFT LoRA config with use_gralora and gralora_format",
        fits=lambda c: _is_gralora_variant(c) and c.get("gralora_format") is not None,
        read_config=_gralora_to_gralora,
        write_config=_gralora_from_gralora,
        suffixes={},
    ),
    "peft": Format(
        what="PEFT's GRALORA tuner, 0.19 and later",
        fits=lambda c: _is_gralora_tuner(c) and "gralora_alpha" not in c,
        read_config=_peft_to_gralora,
        write_config=_gralora_to_peft,
        suffixes=GRALORA_NAMES,
    ),
    "squeezebits": Format(
        what="the paper's repository, SqueezeBits/GraLoRA",
        fits=lambda c: _is_gralora_tuner(c) and "alpha" not in c,
        read_config=_squeezebits_to_gralora,
        write_config=None,
        suffixes=GRALORA_NAMES,
    ),
    "fork": Format(
        what="the HaohanTsao/peft fork: a PEFT LoRA config with use_gralora only",
        fits=lambda c: _is_gralora_variant(c) and c.get("gralora_format") is None,
        read_config=_fork_to_gralora,
        write_config=None,
        suffixes=GRALORA_NAMES,
        unused=(".lora_A.weight", ".lora_B.weight", ".lora_B.bias"),
    ),
}
