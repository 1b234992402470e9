"""LoraConfig: `peft.LoraConfig` with GraLoRA's fields, and every check that needs no model."""

import copy
import dataclasses
import functools
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import gcd
from typing import Any, Literal, get_args, get_type_hints

import peft
from peft import EvaConfig, LoraGAConfig

from . import fields
from .fields import Facts
from .inits import INITS, changes_base, find
from .seam import CordaConfig, get_pattern_key, is_from_file
from .settings import HELP

FORMAT = 1  # of the saved tensors; rises when an older gralora could misread them
FORMAT_MATCHED = 2  # the same tensors with gralora_scaling="matched", which an older gralora would not know
SUPPORTED_VARIANTS = ("use_dora", "alora_invocation_tokens")
OWN = Facts(beside_factors=False, hotswap=True, resume=True)  # a GraLoRA field that says how factors are read


def divisors(n: int) -> list[int]:
    """The positive divisors of `n`, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


def auto_k(r: int, *sizes: int) -> int:
    """The paper's choice of k for a total rank: 2 below rank 64, 4 from there on, or the nearest smaller divisor.

    Args:
        r: total rank.
        sizes: all numbers that k must divide: a layer's grid rank, its input and its output features.
    """
    target = 4 if r >= 64 else 2
    return max(d for d in divisors(gcd(*sizes)) if d <= target)


def shortest_patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """A pattern that gives each layer its value, beside a default.

    A key is the shortest end of a layer's name that no layer with another value shares, so the order of the keys,
    which PEFT does not save, does not matter.
    """
    sharing = defaultdict(set)
    for name, value in values.items():
        for end in _ends(name):
            sharing[end].add(value)
    pattern = {}
    for name, value in values.items():
        if value != default:
            shared_by_none = [re.escape(end) for end in _ends(name) if sharing[end] == {value}]
            pattern[shared_by_none[0] if shared_by_none else "^" + re.escape(name)] = value
    return pattern


def _ends(name: str) -> list[str]:
    """ "a.b.c" -> ["c", "b.c", "a.b.c"]"""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in reversed(range(len(parts)))]


@dataclass
class LoraConfig(peft.LoraConfig):
    """`peft.LoraConfig` plus GraLoRA (arXiv 2505.20355). With `use_gralora=False` it is PEFT's, also when saved.

    `r` is the total rank: `hybrid_r` of it is plain LoRA, the other `r - hybrid_r` a k x k grid of small adapters
    (PEFT's own `GraloraConfig` counts `hybrid_r` on top of `r`). A layer has r * (in + out) trainable parameters,
    as many as LoRA at `r`; its update has rank up to `k * (r - hybrid_r) + hybrid_r`.

    Raises:
        ValueError: if a field does not fit the others; the message names field, value and what would work.
    """

    use_gralora: bool = field(
        default=False,
        metadata={
            "help": HELP["use_gralora"],
            "facts": dataclasses.replace(OWN, flag="use_gralora"),
        },
    )
    gralora_k: int | Literal["auto"] = field(
        default="auto",
        metadata={
            "help": HELP["gralora_k"],
            "facts": dataclasses.replace(
                OWN, in_peft_tuner=True, flag="gralora_k", pattern="gralora_k_pattern", saved_as="rank"
            ),
        },
    )
    gralora_k_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={
            "help": (
                "Layers with another gralora_k: regular expressions that end a layer's name, as in rank_pattern, "
                "and their k, e.g. {'down_proj': 4}."
            ),
            "facts": OWN,
        },
    )
    hybrid_r: int = field(
        default=0,
        metadata={
            "help": HELP["hybrid_r"],
            "facts": dataclasses.replace(OWN, in_peft_tuner=True, flag="hybrid_r", saved_as="rank"),
        },
    )
    gralora_scaling: Literal["lora", "matched"] = field(
        default="lora",
        metadata={
            "help": HELP["gralora_scaling"],
            "facts": dataclasses.replace(OWN, flag="gralora_scaling"),
        },
    )
    gralora_format: int | None = field(
        default=None,
        metadata={
            "help": "Format of the saved tensors; set by gralora, leave it empty.",
            "facts": Facts(beside_factors=False),
        },
    )

    accelerate: bool = field(
        default=False,
        metadata={
            "help": (
                "Compute plain LoRA adapters of the model by gralora's operations, as `gralora.accelerate` does. Says "
                "nothing about the adapter, and is not saved."
            ),
            "facts": Facts(beside_factors=False),
        },
    )

    def __post_init__(self) -> None:
        from_file = is_from_file(self)  # before it is set for all
        for own in OWN_FIELDS:
            if not is_set(own.name, getattr(self, own.name)):  # programs hand None or [] on for what was not given
                setattr(self, own.name, fields.default(own))
        if self.use_gralora:
            self._set_initialisation_fields()
        super().__post_init__()
        if self.use_gralora and from_file:
            self._check_format()
        self.gralora_format = FORMAT
        if not self.use_gralora:
            self._warn_about_unused_fields()
            return
        self.check()

    def _set_initialisation_fields(self) -> None:
        """Make objects of dictionaries, as a file has them, and fill in where PEFT's defaults do not fit a grid."""
        kinds = {"eva_config": EvaConfig, "corda_config": CordaConfig, "lora_ga_config": LoraGAConfig}
        for name, kind in kinds.items():
            if isinstance(value := getattr(self, name), dict):  # PEFT 0.20 leaves them
                try:
                    setattr(self, name, kind(**value))
                except TypeError as error:
                    raise ValueError(f"{name}={value!r}: {error}.") from None
        if self.init_lora_weights == "eva" and self.eva_config is None:
            self.eva_config = EvaConfig(rho=1.0)
        if self.init_lora_weights == "corda" and self.corda_config is None:
            self.corda_config = CordaConfig(prune_temporary_fields=False)

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's; a plain LoRA's dictionary has none of gralora's keys, so it is saved as PEFT would save it."""
        config = super().to_dict()
        del config["accelerate"]
        if not self.use_gralora:
            for name in GRALORA_FIELDS:
                config.pop(name, None)
        elif self.gralora_scaling == "matched":
            config["gralora_format"] = FORMAT_MATCHED
        return config

    def check(self) -> None:
        """Raise ValueError if use_gralora=True does not fit the other fields."""
        self._check_compatible_fields()
        self._check_ranks()
        if self.gralora_scaling not in SCALINGS:
            raise ValueError(f"gralora_scaling={self.gralora_scaling!r} must be one of {', '.join(SCALINGS)}.")

    def ranks(self) -> dict[str, int]:
        """The total ranks that layers can get, by the name of what sets them: `r` and the rank_pattern entries."""
        return {"r": self.r} | {f"rank_pattern[{key!r}]": rank for key, rank in (self.rank_pattern or {}).items()}

    def of_layer(self, field: str, layer: str) -> Any:
        """The `r`, `lora_alpha` or `gralora_k` of one layer: what its pattern says, else the field."""
        return self._source(field, layer)[1]

    def _source(self, field: str, layer: str) -> tuple[str, Any]:
        """What sets a field for one layer, for messages, and the value. Matches as PEFT does in LoraModel."""
        pattern = getattr(self, PATTERNS[field])
        key = get_pattern_key(pattern, layer)
        return (f"{PATTERNS[field]}[{key!r}]", pattern[key]) if key in pattern else (field, getattr(self, field))

    def check_layer(self, layer: str, in_features: int, out_features: int, what: str) -> None:
        """Raise ValueError, naming the layer and the ks that work, if its k does not divide its rank and features.

        Args:
            layer: its name.
            in_features, out_features: its sizes.
            what: its kind, in words.
        """
        (k_name, k), (r_name, r) = self._source("gralora_k", layer), self._source("r", layer)
        fitting = f"{k_name}={divisors(gcd(r - self.hybrid_r, in_features, out_features))}"
        if (r - self.hybrid_r) % k:
            raise ValueError(
                f"target {layer!r}: {r_name}={r} less hybrid_r={self.hybrid_r} must be divisible by "
                f"{k_name}={k}; use another rank, or one of {fitting}."
            )
        if in_features % k or out_features % k:
            raise ValueError(
                f"{k_name}={k} must divide the features of target {layer!r}, {what}, which has "
                f"in_features={in_features} and out_features={out_features}; use one of {fitting} (for this layer "
                "alone: gralora_k_pattern), gralora_k='auto', or leave it out of the targets."
            )

    def settled(self, ks: Mapping[str, int]) -> "LoraConfig":
        """A config in which `gralora_k` is a number and layers keep their k, r and alpha when it is saved and read.

        PEFT sorts the keys of patterns when it saves them; where this would change what a layer gets, the pattern is
        another one. It is this config itself if nothing has to change, else a copy.

        Args:
            ks: name of each targeted layer -> its k.
        """
        config, changed = copy.copy(self), False
        for name, pattern in PATTERNS.items():
            values = ks if name == "gralora_k" else {layer: self.of_layer(name, layer) for layer in ks}
            auto = getattr(self, name) == "auto"
            setattr(config, pattern, dict(sorted(getattr(self, pattern).items())))
            if auto or any(config.of_layer(name, layer) != value for layer, value in values.items()):
                default = Counter(values.values()).most_common(1)[0][0] if auto else getattr(self, name)
                setattr(config, name, default)
                setattr(config, pattern, shortest_patterns(values, default))
                changed = True
        return config if changed else self

    def as_plain_lora(self, r: int) -> "LoraConfig":
        """The config of a plain LoRA of rank `r` and scaling 1 on the same modules."""
        default = LoraConfig()
        plain = {name: getattr(default, name) for name in GRALORA_FIELDS}
        return dataclasses.replace(
            self,
            r=r,
            lora_alpha=r,
            use_rslora=False,
            rank_pattern={},
            alpha_pattern={},
            init_lora_weights=True,
            loftq_config={},
            eva_config=None,
            corda_config=None,
            lora_ga_config=None,
            **plain,
        )

    def _warn_about_unused_fields(self) -> None:
        settable = [name for name in GRALORA_FIELDS if name not in ("gralora_format", "accelerate")]
        given = {name: value for name in settable if is_set(name, value := getattr(self, name))}
        if given:
            names = ", ".join(f"{name}={value!r}" for name, value in given.items())
            warnings.warn(f"{names} has no effect without use_gralora=True: this is a plain LoRA.", stacklevel=5)

    def _check_format(self) -> None:
        if self.gralora_format is None:
            raise ValueError(
                "this adapter's config has use_gralora=True but no gralora_format, so gralora did not write it; "
                "the HaohanTsao/peft fork saves the same keys with other tensors, which would load as an adapter that "
                "does nothing. Convert it first: `gralora convert ADAPTER OUT` (or gralora.convert_adapter)."
            )
        if self.gralora_format not in (FORMAT, FORMAT_MATCHED):
            raise ValueError(
                f"gralora_format={self.gralora_format!r} is not known to this version of gralora, which reads "
                f"{FORMAT} and {FORMAT_MATCHED}; update gralora."
            )

    def _check_compatible_fields(self) -> None:
        variants = [f.name for f in dataclasses.fields(self) if f.metadata.get("is_lora_variant")]
        for name in [*variants, "use_qalora", "megatron_config"]:
            if name in SUPPORTED_VARIANTS:
                continue
            value = getattr(self, name, None)
            if is_set(name, value):
                raise ValueError(
                    f"{name}={value!r} cannot be combined with GraLoRA (use_gralora=True); "
                    f"leave {name} at its default, or set use_gralora=False."
                )
        if self.use_dora and self.alora_invocation_tokens:
            raise ValueError(
                f"use_dora=True cannot be combined with alora_invocation_tokens={self.alora_invocation_tokens!r}: "
                "PEFT takes one variant of LoRA; leave one of them at its default."
            )
        self._check_initialisation()

    def _check_initialisation(self) -> None:
        init = self.init_lora_weights
        if find(init) is None:
            raise ValueError(
                f"init_lora_weights={init!r} cannot be combined with use_gralora=True; use one of "
                f"{', '.join(map(repr, INITS))}."
            )
        name = str(init).lower()
        if name == "eva" and self.eva_config is not None and self.eva_config.rho != 1:
            raise ValueError(
                f"eva_config.rho={self.eva_config.rho!r} with init_lora_weights='eva' lets EVA give layers other "
                "ranks, which gralora_k need not divide; use EvaConfig(rho=1.0), and rank_pattern for ranks by layer."
            )
        if name == "corda" and self.corda_config is not None and self.corda_config.prune_temporary_fields:
            raise ValueError(
                "corda_config.prune_temporary_fields=True with init_lora_weights='corda' throws the covariances away, "
                "by which each block is decomposed; use CordaConfig(prune_temporary_fields=False)."
            )
        if name == "lora_ga" and self.lora_ga_config is None:
            raise ValueError("init_lora_weights='lora_ga' needs lora_ga_config, e.g. LoraGAConfig().")
        if name == "loftq":
            self._check_loftq()
        if changes_base(self) and self.alora_invocation_tokens:
            raise ValueError(
                f"init_lora_weights={init!r} changes the base weights, which alora_invocation_tokens="
                f"{self.alora_invocation_tokens!r} needs as they are: the adapter acts on some tokens alone. Use "
                "init_lora_weights=True."
            )

    def _check_loftq(self) -> None:
        given: Any = self.loftq_config  # a dictionary, which PEFT has made of a LoftQConfig
        bits, iterations = (given.get(name) for name in ("loftq_bits", "loftq_iter"))
        if bits not in (4, 8) or not _is_positive(iterations):
            raise ValueError(
                f"loftq_config={self.loftq_config!r} must have loftq_bits 4 or 8, and a positive loftq_iter; use "
                "LoftQConfig(loftq_bits=4)."
            )

    def _check_ranks(self) -> None:
        k, hybrid_r = self.gralora_k, self.hybrid_r
        if k != "auto" and not _is_positive(k):
            raise ValueError(f"gralora_k={k!r} must be a positive integer or 'auto'.")
        if not isinstance(self.gralora_k_pattern, dict):
            raise ValueError(f"gralora_k_pattern={self.gralora_k_pattern!r} must be a dict, e.g. {{'down_proj': 4}}.")
        for key, value in self.gralora_k_pattern.items():
            if not _is_positive(value):
                raise ValueError(f"gralora_k_pattern[{key!r}]={value!r} must be a positive integer.")
        if not isinstance(hybrid_r, int) or isinstance(hybrid_r, bool) or hybrid_r < 0:
            raise ValueError(f"hybrid_r={hybrid_r!r} must be an integer from 0 (pure GraLoRA) to r - 1.")
        for name, r in self.ranks().items():
            if hybrid_r >= r:
                raise ValueError(
                    f"hybrid_r={hybrid_r} must be smaller than {name}={r}: r is the total rank and hybrid_r the part "
                    "of it that is plain LoRA; for plain LoRA alone set use_gralora=False."
                )
            if k != "auto" and not self.gralora_k_pattern and (r - hybrid_r) % k:  # else `check_layer` knows which k
                below = (r - hybrid_r) // k * k + hybrid_r
                fitting = f"{below + k}" if below <= hybrid_r else f"{below} or {below + k}"
                raise ValueError(
                    f"{name}={r} less hybrid_r={hybrid_r} must be divisible by gralora_k={k}, since every block gets "
                    f"(r - hybrid_r) / k ranks; use {name}={fitting}, or one of gralora_k={divisors(r - hybrid_r)}."
                )


def _is_positive(k: Any) -> bool:
    return isinstance(k, int) and not isinstance(k, bool) and k > 0


_PEFT_FIELDS = {f.name for f in dataclasses.fields(peft.LoraConfig)}
OWN_FIELDS = tuple(f for f in dataclasses.fields(LoraConfig) if f.name not in _PEFT_FIELDS)
GRALORA_FIELDS = tuple(f.name for f in OWN_FIELDS)
SCALINGS = get_args(get_type_hints(LoraConfig)["gralora_scaling"])
# field -> the field that gives single layers another value
PATTERNS = {f.name: found for f in dataclasses.fields(LoraConfig) if (found := fields.facts(f).pattern)}

# the functions of fields.py, of this class
names = functools.partial(fields.names, LoraConfig)
is_set = functools.partial(fields.is_set, LoraConfig)
same = functools.partial(fields.same, LoraConfig)
has_effect = functools.partial(fields.has_effect, LoraConfig)
parse = functools.partial(fields.parse, LoraConfig)
# field -> the flag of `gralora finetune` that sets it
FLAGS = {f.name: found for f in dataclasses.fields(LoraConfig) if (found := fields.facts(f).flag)}
# GraLoRA's fields that are flags, and settings in other programs
SETTINGS = {f.name: f for f in dataclasses.fields(LoraConfig) if f.name in FLAGS and f.name in GRALORA_FIELDS}

fields.document(LoraConfig, GRALORA_FIELDS)
fields.suggest_names(LoraConfig)
