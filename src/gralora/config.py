"""LoraConfig: `peft.LoraConfig` with GraLoRA's fields, and every check that needs no model."""

import dataclasses
import warnings
from dataclasses import dataclass, field
from math import gcd
from typing import Any, Literal

import peft

FORMAT = 1  # of the saved tensors; rises when an older gralora could misread them
FORMAT_MATCHED = 2  # the same tensors with gralora_scaling="matched", which an older gralora would not know
SCALINGS = ("lora", "matched")
SUPPORTED_INITS = (True, False, "gaussian")


def divisors(n: int) -> list[int]:
    """The positive divisors of `n`, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


def auto_k(r: int, *sizes: int) -> int:
    """The paper's choice of k for a total rank: 2 below rank 64, 4 from there on, or the nearest smaller divisor.

    Args:
        r: total rank.
        sizes: all numbers that k must divide: grid ranks, and input and output features of the targeted layers.
    """
    target = 4 if r >= 64 else 2
    return max(d for d in divisors(gcd(*sizes)) if d <= target)


@dataclass
class LoraConfig(peft.LoraConfig):
    """`peft.LoraConfig` plus GraLoRA (arXiv 2505.20355). With `use_gralora=False` it is PEFT's, also when saved.

    `r` is the total rank: `hybrid_r` of it is plain LoRA, the other `r - hybrid_r` a k x k grid of small adapters
    (PEFT's own `GraloraConfig` counts `hybrid_r` on top of `r`). A layer has r * (in + out) trainable parameters,
    as many as LoRA at `r`; its update has rank up to `k * (r - hybrid_r) + hybrid_r`.

    Raises:
        ValueError: if a field does not fit the others; the message names field, value and what would work.
    """

    use_gralora: bool = field(default=False, metadata={"help": "Train GraLoRA instead of plain LoRA."})
    gralora_k: int | Literal["auto"] = field(
        default="auto",
        metadata={
            "help": (
                "Blocks per side of the grid; must divide r - hybrid_r and the input and output features of every "
                "targeted layer. 'auto': 2 below rank 64, 4 from there on, or the nearest smaller number that "
                "divides; the number chosen is what gets saved."
            )
        },
    )
    hybrid_r: int = field(
        default=0, metadata={"help": "Part of the rank r that is plain LoRA, 0 <= hybrid_r < r (Hybrid GraLoRA)."}
    )
    gralora_scaling: Literal["lora", "matched"] = field(
        default="lora",
        metadata={
            "help": (
                "Factor on the update. 'lora': lora_alpha / r, as in LoRA (lora_alpha / sqrt(r) with use_rslora). "
                "'matched': that times sqrt(r / (hybrid_r + (r - hybrid_r) / gralora_k)), since fewer ranks meet in "
                "one entry of the update than in LoRA's; docs/scaling.md derives it."
            )
        },
    )
    gralora_format: int | None = field(
        default=None, metadata={"help": "Format of the saved tensors; set by gralora, leave it empty."}
    )

    def __post_init__(self) -> None:
        # PEFT passes peft_type when it builds a config from a file (or copies one), a user never does
        from_file = self.peft_type is not None
        super().__post_init__()
        if self.use_gralora and from_file:
            self._check_format()
        self.gralora_format = FORMAT
        if not self.use_gralora:
            self._warn_about_unused_fields()
            return
        self.check()

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's; a plain LoRA's dictionary has none of gralora's keys, so it is saved as PEFT would save it."""
        config = super().to_dict()
        if not self.use_gralora:
            for name in GRALORA_FIELDS:
                del config[name]
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
        return {"r": self.r} | {f"rank_pattern[{key!r}]": rank for key, rank in self.rank_pattern.items()}

    def as_plain_lora(self, r: int) -> "LoraConfig":
        """The config of a plain LoRA of rank `r` and scaling 1 on the same modules."""
        plain = {f.name: f.default for f in dataclasses.fields(self) if f.name in GRALORA_FIELDS}
        return dataclasses.replace(
            self, r=r, lora_alpha=r, use_rslora=False, rank_pattern={}, alpha_pattern={}, **plain
        )

    def _warn_about_unused_fields(self) -> None:
        given = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name in ("gralora_k", "hybrid_r", "gralora_scaling") and getattr(self, f.name) != f.default
        }
        if given:
            names = ", ".join(f"{name}={value!r}" for name, value in given.items())
            warnings.warn(f"{names} has no effect without use_gralora=True: this is a plain LoRA.", stacklevel=4)

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
        for name in [*variants, "use_qalora", "target_parameters", "megatron_config"]:
            value = getattr(self, name, None)
            if value or isinstance(value, dict):  # {} asks for a variant with its defaults
                raise ValueError(
                    f"{name}={value!r} cannot be combined with GraLoRA (use_gralora=True); "
                    f"leave {name} at its default, or set use_gralora=False."
                )
        if self.init_lora_weights not in SUPPORTED_INITS:
            raise ValueError(
                f"init_lora_weights={self.init_lora_weights!r} cannot be combined with use_gralora=True: it "
                "decomposes the weight as one product B A, which a grid of blocks is not; use True, False or "
                "'gaussian'."
            )

    def _check_ranks(self) -> None:
        k, hybrid_r = self.gralora_k, self.hybrid_r
        if k != "auto" and (not isinstance(k, int) or isinstance(k, bool) or k < 1):
            raise ValueError(f"gralora_k={k!r} must be a positive integer or 'auto'.")
        if not isinstance(hybrid_r, int) or isinstance(hybrid_r, bool) or hybrid_r < 0:
            raise ValueError(f"hybrid_r={hybrid_r!r} must be an integer from 0 (pure GraLoRA) to r - 1.")
        for name, r in self.ranks().items():
            if hybrid_r >= r:
                raise ValueError(
                    f"hybrid_r={hybrid_r} must be smaller than {name}={r}: r is the total rank and hybrid_r the part "
                    "of it that is plain LoRA; for plain LoRA alone set use_gralora=False."
                )
            if k != "auto" and (r - hybrid_r) % k:
                below = (r - hybrid_r) // k * k + hybrid_r
                fitting = f"{below + k}" if below <= hybrid_r else f"{below} or {below + k}"
                raise ValueError(
                    f"{name}={r} less hybrid_r={hybrid_r} must be divisible by gralora_k={k}, since every block gets "
                    f"(r - hybrid_r) / k ranks; use {name}={fitting}, or one of gralora_k={divisors(r - hybrid_r)}."
                )


_PEFT_FIELDS = {f.name for f in dataclasses.fields(peft.LoraConfig)}
GRALORA_FIELDS = tuple(f.name for f in dataclasses.fields(LoraConfig) if f.name not in _PEFT_FIELDS)
