"""The plain LoRA that a GraLoRA adapter equals: its factors layer by layer, its rank, and its config.

dW of a GraLoRA adapter is that of a plain LoRA of rank k * r_g + hybrid_r: blocks are copied into place, and nothing
is computed. How programs store such a LoRA is in targets.py.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..config import is_set
from ..factors import compact_lora, hybrid_to_lora, pad_lora, truncate_lora
from ..fields import plain
from .adapter import Adapter


@dataclass
class PlainLora:
    """A GraLoRA adapter seen as a plain LoRA of one rank, with scaling 1.

    Attributes:
        adapter: the GraLoRA adapter.
        rank: R, of every layer.
        dtype: of the factors.
        truncate: whether layers of a higher rank are approximated; else they are copied, or compacted exactly.
        errors: layer -> relative error of dW by truncation, filled as layers are computed.
    """

    adapter: Adapter
    rank: int
    dtype: torch.dtype
    truncate: bool = False
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def layers(self) -> list[str]:
        return self.adapter.layers

    @functools.cached_property
    def factors(self) -> Callable[[str], tuple[Tensor, Tensor]]:
        """layer -> A `[R, I]` and B `[O, R]` with the scaling folded in; the last result is kept."""
        return functools.lru_cache(maxsize=1)(self._factors)

    def _factors(self, layer: str) -> tuple[Tensor, Tensor]:
        f, scaling = self.adapter.factors(layer), self.adapter.scaling(layer)
        is_copied = self.adapter.lora_rank(layer) <= self.rank
        dtype = self.dtype if is_copied else torch.promote_types(self.dtype, torch.float32)
        hybrid_A = None if f.hybrid_A is None else f.hybrid_A.to(dtype)
        hybrid_B = None if f.hybrid_B is None else fold(f.hybrid_B, scaling, dtype)
        rank = self.rank if is_copied else None
        A, B = hybrid_to_lora(f.A.to(dtype), fold(f.B, scaling, dtype), hybrid_A, hybrid_B, rank)
        if is_copied:
            return A, B
        if self.truncate and min(self.adapter.features(layer)) > self.rank:
            A, B, values = truncate_lora(A, B, self.rank)
            self.errors[layer] = (values[self.rank :].norm() / values.norm()).item()
        else:
            A, B = compact_lora(A, B)
        A, B = pad_lora(A, B, self.rank)
        return A.to(self.dtype), B.to(self.dtype)

    @property
    def method(self) -> str:
        if self.truncate:
            return "truncated"
        return "copied" if max(map(self.adapter.lora_rank, self.layers)) <= self.rank else "compacted"


def fold(B: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """`scaling * B` in `dtype`, rounded once."""
    return (B.to(torch.promote_types(dtype, torch.float64)) * scaling).to(dtype)


def plain_lora(
    adapter: Adapter,
    limit: int | None = None,
    max_rank: int | None = None,
    lossy: bool = False,
    dtype: torch.dtype | None = None,
) -> PlainLora:
    """Decide rank, method and dtype of the plain LoRA that stands for `adapter`. Reads no tensor.

    Args:
        adapter: the adapter.
        limit: highest rank that the target takes, or None.
        max_rank: highest rank that the user wants, or None.
        lossy: allow an approximation where an exact form has a higher rank.
        dtype: of the result. By default that of the adapter, or float32 if it is half precision and the scaling is not
            a power of two, since folding it in would then round in half precision.

    Raises:
        ValueError: if the rank cannot be kept within the limits exactly and `lossy` is not set.
    """
    if max_rank is not None and max_rank < 1:
        raise ValueError(f"max_rank={max_rank} must be at least 1.")
    ranks = {layer: adapter.lora_rank(layer) for layer in adapter.layers}
    copied, compact = max(ranks.values()), max(min(r, *adapter.features(layer)) for layer, r in ranks.items())
    bound = min([copied, *(n for n in (limit, max_rank) if n is not None)])
    if bound < compact and not lossy:
        whose = f"max_rank={max_rank}" if max_rank is not None and max_rank == bound else f"the target's limit {limit}"
        raise ValueError(
            f"the exact plain LoRA has rank {compact} (k * r_g + hybrid_r, or the layer's features if fewer), more "
            f"than {whose}. Merge the adapter into the model (`gralora merge`), which is exact, or allow an "
            f"approximation: --max-rank {bound} --lossy."
        )
    rank = copied if bound == copied else min(bound, compact)
    return PlainLora(adapter, rank, dtype or folded_dtype(adapter), truncate=bound < compact)


def folded_dtype(adapter: Adapter) -> torch.dtype:
    """The narrowest dtype that holds factors with the scaling folded in as exactly as the adapter's own holds them."""
    dtypes = [t.dtype for layer in adapter.layers for t in adapter.specs(layer) if t is not None]
    dtype = functools.reduce(torch.promote_types, dtypes)
    powers_of_two = all(math.frexp(adapter.scaling(layer))[0] in (0.0, 0.5) for layer in adapter.layers)
    return dtype if powers_of_two else torch.promote_types(dtype, torch.float32)


def plain_config(lora: PlainLora, extra: dict[str, Any]) -> dict[str, Any]:
    """PEFT LoRA config: only keys that all engines know, r = lora_alpha = R, `extra` fields that the target keeps."""
    config = lora.adapter.config
    return {
        "peft_type": "LORA",
        "task_type": plain(config.task_type),
        "base_model_name_or_path": config.base_model_name_or_path,
        "revision": config.revision,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.rank,
        "lora_dropout": 0.0,
        "target_modules": target_modules(lora.adapter),
        "bias": "none",
        "fan_in_fan_out": config.fan_in_fan_out,
        "modules_to_save": None,
        "init_lora_weights": True,
    } | extra


def target_modules(adapter: Adapter) -> list[str]:
    """A list that selects the adapter's modules: the config's own if it is a plain one, else their full names."""
    config = adapter.config
    restricted = any(is_set(name, getattr(config, name)) for name in ("layers_to_transform", "exclude_modules"))
    if isinstance(config.target_modules, str) or not config.target_modules or restricted:
        return sorted(adapter.modules)
    return sorted(config.target_modules)
