"""Every GraLoRA checkpoint format, both ways, through one table: FORMATS.

All formats hold the same tensors in the same layout under other names, and configs that count ranks differently. So a
format is a table of names and a pair of functions between its config (a dict) and `gralora.LoraConfig`; tensors are
renamed, never computed, and a round trip is bit-exact. docs/formats.md describes the formats.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from peft import PeftType
from torch import Tensor

from ..config import FORMAT, SUPPORTED_VARIANTS, LoraConfig, is_set, names
from ..fields import plain
from ..strings import printable
from .adapter import PREFIX, Adapter, check, check_base, check_plain, json_config, set_fields
from .files import LazyTensors
from .untrusted import check_fields, check_matching_time, check_rank
from .views import HYBRID_A, HYBRID_B, A, B, Place, linear_maps

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
        raise ValueError(
            "this is a plain LoRA adapter (peft_type LORA without use_gralora): programs that serve LoRA take it as "
            "it is, and PEFT merges it, by AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload()."
        )
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


def read(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    source: str | None = None,
    *,
    as_linear: bool = False,
    any_kind: bool = False,
) -> Adapter:
    """Read an adapter of any format in FORMATS. Nothing is computed, and nothing loaded from LazyTensors.

    Args:
        config: content of adapter_config.json.
        tensors: of the adapter, by their names in its file.
        source: the format's name if the user knows it; see `recognise`.
        as_linear: see convolutions and experts as linear layers (views.py), instead of refusing them.
        any_kind: take layers that are not linear as they are in the file; of these only shapes are checked, roughly.

    Raises:
        ValueError: if the format is unclear, or tensors and config do not fit together.
    """
    name = recognise(config, source)
    known = FORMATS[name]
    notices = []
    lazy = LazyTensors.of(tensors)
    unused = [t for t in lazy if t.endswith(known.unused)] if known.unused else []
    if unused:
        notices.append(
            f"dropped {len(unused)} tensors that this format saves and never uses: {printable(unused[0])}, ..."
        )
    sources = {known.to_ours(t): t for t in lazy if t not in unused}
    if len(sources) < len(lazy) - len(unused):
        twice = next(t for t in lazy if t not in unused and sources[known.to_ours(t)] != t)
        raise ValueError(f"tensor {twice!r} is in the file twice, under the names of two formats.")
    ours, more_notices = known.read_config(dict(config))
    notices += more_notices
    lora_config, renamed = _config(ours), lazy.renamed(sources)
    places: Mapping[str, Place] = {}
    if as_linear:
        renamed, places = linear_maps(renamed, lora_config, PREFIX)
    adapter = Adapter(lora_config, renamed, name, tuple(notices), places)
    check_matching_time(ours, adapter.layers)
    words = adapter.config.target_modules
    if words == "all-linear" or not (words or adapter.config.target_parameters):
        # PEFT keeps a set; what the words stood for is no longer known
        adapter.config.target_modules = set(adapter.modules)  # type: ignore[assignment]
    check(adapter, any_kind)
    return adapter


def is_plain_lora(config: Mapping[str, Any]) -> bool:
    """Whether a config is that of a LoRA that is no GraLoRA."""
    return config.get("peft_type") == PeftType.LORA and not config.get("use_gralora")


def read_plain(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Adapter:
    """Read a plain LoRA as PEFT saves it.

    Raises:
        ValueError: if values of the config have wrong types, its patterns take too long, or tensors do not fit it.
    """
    adapter = Adapter(_config(dict(config)), LazyTensors.of(tensors), "lora")
    check_matching_time(config, adapter.layers)
    check_plain(adapter)
    return adapter


def _config(fields: dict[str, Any]) -> LoraConfig:
    known = {f.name for f in dataclasses.fields(LoraConfig)}
    unknown = sorted(name for name in fields.keys() - known if is_set(name, fields[name]))
    if unknown:
        warnings.warn(
            f"the config has the fields {', '.join(map(repr, unknown))}, which this version of PEFT does not know and "
            "which are ignored; if they change the adapter's output, update PEFT.",
            stacklevel=4,
        )
    # what is empty and not set is left out: not every field of PEFT's takes None, and some take [] for set
    empty = [n for n, value in fields.items() if value in (None, [], {}, "") and not is_set(n, value)]
    left_out = {*unknown, *empty} - {"target_modules"}  # where [] and None mean different things
    fields = {name: value for name, value in fields.items() if name in known and name not in left_out}
    check_fields(fields)
    try:
        return LoraConfig(**fields)
    except (TypeError, AttributeError) as error:  # of a class in PEFT's that a field's dict is given to
        raise ValueError(f"the config cannot be read by this version of PEFT: {error}.") from error


def write(adapter: Adapter, target: str) -> tuple[dict[str, Any], LazyTensors]:
    """The config and tensors of an adapter in another format.

    Raises:
        ValueError: if the format cannot express something in it; the message names the field and what would work.
    """
    known = FORMATS.get(target)
    if known is None or known.write_config is None:
        writable = [name for name, one in FORMATS.items() if one.write_config is not None]
        raise ValueError(f"format {target!r} cannot be written; use one of {', '.join(writable)}.")
    return known.write_config(adapter), adapter.tensors.renamed({known.to_theirs(t): t for t in adapter.tensors})


# Configs

IN_PEFT_TUNER = names(lambda facts: facts.in_peft_tuner)
IN_LORA = names(lambda facts: facts.in_lora)
MERGEABLE = names(lambda facts: facts.mergeable)


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
    ours = {name: config.pop(name) for name in IN_PEFT_TUNER if name in config}
    ours |= {
        "peft_type": PeftType.LORA,
        "use_gralora": True,
        "gralora_format": FORMAT,
        "r": r if includes_hybrid else r + hybrid_r,
        "lora_alpha": config[alpha_name],
        "lora_dropout": config.pop("gralora_dropout", 0.0),
        "bias": "lora_only" if (bias := config.pop("bias", "none")) == "gralora_only" else bias,
        "init_lora_weights": config.pop("init_weights", True),
    }
    for name in sorted(config.keys() - {"peft_type", "r", alpha_name}):
        _refuse_if_set(name, config[name])
    return ours, notices


def _refuse_if_set(name: str, value: Any) -> None:
    if is_set(name, value):
        raise ValueError(
            f"the config has {name}={value!r}, which gralora does not know and so cannot keep; if it does not change "
            "the adapter's output, remove it from adapter_config.json."
        )


def _gralora_from_gralora(adapter: Adapter) -> dict[str, Any]:
    return json_config(adapter.config)


def _gralora_to_peft(adapter: Adapter) -> dict[str, Any]:
    """PEFT's GRALORA config, in which the rank and scale of all layers are the same two numbers."""
    config = adapter.config
    check_base(config)
    expressible = names(lambda facts: facts.in_peft_tuner or not facts.beside_factors) | {"bias"}
    for name in sorted(set_fields(config).keys() - expressible):
        others = ["`gralora export --for peft` writes a plain LoRA that has it"] if name in IN_LORA else []
        others += ["`gralora merge` writes it into the model"] if name in MERGEABLE else []
        raise ValueError(
            f"{name}={getattr(config, name)!r} cannot be expressed in PEFT's GRALORA format"
            + (f"; {', and '.join(others)}." if others else ".")
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
    shared = {name: plain(getattr(config, name)) for name in IN_PEFT_TUNER}
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
