"""Export to plain LoRA, which every serving engine takes: the same update, one rank for all layers, scaling folded in.

dW of a GraLoRA adapter is that of a plain LoRA of rank k * r_g + hybrid_r: blocks are copied into place, nothing is
computed, and no base model is needed. Layers are read, rewritten, written and then read back one by one.
"""

import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ops import reference
from ..ops.factors import compact_lora, hybrid_to_lora, pad_lora, truncate_lora
from . import formats
from .files import new_folder, read_adapter_folder, read_json, write_json
from .formats import Adapter

REPORT = "export_report.json"
PROBES = 8
PIECE = 1 << 18  # elements of a weight that are converted to float64 at a time


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


def check_exportable(adapter: Adapter, target: str, kept: frozenset[str]) -> dict[str, Any]:
    """The fields beside the factors that the target keeps; ValueError, with the reason, for those that it cannot."""
    neutral = formats.NOT_IN_OUTPUT - {"bias", "modules_to_save"} | {"hybrid_r", "gralora_k"}
    extra = {k: v for k, v in formats.set_fields(adapter.config).items() if k not in neutral}
    for name in sorted(extra.keys() - kept):
        mergeable = name != "alora_invocation_tokens"
        raise ValueError(
            f"{target} takes nothing but A and B of linear layers, and the adapter has {name}={extra[name]!r}; "
            + ("`gralora merge` writes it into the model." if mergeable else "use --for peft.")
        )
    if adapter.others and not kept:
        raise ValueError(
            f"{target} takes nothing but A and B of linear layers, and the adapter also has "
            f"{', '.join(map(repr, adapter.others[:3]))}; `gralora merge` writes them into the model. (If they are "
            "unchanged embeddings of the base: save_pretrained(..., save_embedding_layers=False) leaves them out.)"
        )
    return extra


# The parity report


def parity(plain: PlainLora, read_back: Callable[[str], tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Compare what was written with GraLoRA's definition, through random inputs, in float64.

    Args:
        plain: what was meant to be written.
        read_back: layer -> A `[R, I]` and B `[O, R]` from the written file.

    Returns:
        Per layer, and over all layers, an estimate of |dW_written - dW| / |dW| in the Frobenius norm. 0 or about
        1e-16 if all entries were copied; about 1e-8 if folding the scaling rounded in float32.
    """
    layers, squares = {}, [0.0, 0.0]
    generator = torch.Generator().manual_seed(0)
    for layer in plain.layers:
        x = torch.randn(PROBES, plain.adapter.features(layer)[0], generator=generator, dtype=torch.float64)
        factors = plain.adapter.factors(layer).moved(Tensor.double)
        expected = plain.adapter.scaling(layer) * reference.update(x, *factors)
        A, B = read_back(layer)
        difference = times(times(x, A), B) - expected
        parts = [difference.square().sum().item(), expected.square().sum().item()]
        layers[layer] = relative(*parts)
        squares = [a + b for a, b in zip(squares, parts, strict=True)]
    return {"relative_difference": relative(*squares), "layers": layers}


def times(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` in float64, without a copy of all of `weight` in float64."""
    rows = max(1, PIECE // weight.shape[1])
    return torch.cat([x @ piece.double().T for piece in weight.split(rows)], dim=-1)


def relative(difference: float, expected: float) -> float:
    """sqrt(difference / expected); 0 if both are, and a NaN stays one."""
    return math.sqrt(difference / expected) if expected else (0.0 if difference == 0 else math.inf)


def logits_parity(adapter: Path, exported: Path, base: Path) -> dict[str, float]:
    """Logits of the base model with the GraLoRA adapter and with the exported one, both in float32.

    Returns:
        The greatest difference, and the greatest logit for scale.
    """
    import peft
    from transformers import AutoModelForCausalLM

    from .load import load_adapter

    # False, since the default asks people whether to run the code of a base that has some
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False)
    tokens = torch.randint(model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    both = load_adapter(model, adapter, adapter_name="gralora")
    both.add_adapter("exported", peft.PeftConfig.from_pretrained(str(exported)))
    both.load_adapter(str(exported), "exported")
    logits = []
    for name in ("gralora", "exported"):
        both.set_adapter(name)
        with torch.no_grad():
            logits.append(both.eval()(tokens).logits)
    return {"max_difference": (logits[0] - logits[1]).abs().max().item(), "max_logit": logits[0].abs().max().item()}


# The whole


def to_lora(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    target: str = "peft",
    *,
    base: str | os.PathLike[str] | None = None,
    base_config: dict[str, Any] | None = None,
    source: str | None = None,
    max_rank: int | None = None,
    lossy: bool = False,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Write a GraLoRA adapter as the plain LoRA that it equals, in the form one serving program takes.

    Args:
        adapter: folder of the adapter, in any format of `gralora.checkpoints.formats.FORMATS`.
        out: folder to make.
        target: a name in `gralora.checkpoints.targets.TARGETS`: peft, vllm, sglang, llamacpp, ollama or mlx.
        base: folder of the base model. llamacpp and ollama read its config.json; for the others its weights, if there,
            are loaded to compare logits.
        base_config: instead of `base`'s config.json: `model_type`, `num_attention_heads`, `num_key_value_heads`.
        source: format of `adapter`, needed only if its config leaves that open.
        max_rank, lossy, dtype: see `plain_lora`.

    Returns:
        The report, which is also written to `out`: rank, method, parity (see `parity`), truncation errors by layer,
        logits, and `command`, the line that serves it.

    Raises:
        OSError, ValueError: if the input is not there, is not valid, or the target cannot take it. `out` is then not
            made.
    """
    from .targets import TARGETS

    if target not in TARGETS:
        raise ValueError(f"target {target!r} is not known; use one of {', '.join(TARGETS)}.")
    to, out = TARGETS[target], Path(out)
    source_adapter = formats.read(*read_adapter_folder(adapter), source=source)
    extra = check_exportable(source_adapter, target, to.keeps)
    if base is not None and base_config is None and (Path(base) / "config.json").is_file():
        base_config = read_json(Path(base) / "config.json")
    plain = plain_lora(source_adapter, to.max_rank, max_rank, lossy, to.dtype or dtype)
    with new_folder(out) as folder:
        read_back = to.write(plain, folder, base_config, extra)
        report: dict[str, Any] = {
            "target": target,
            "source": {"adapter": str(adapter), "format": source_adapter.format},
            "rank": plain.rank,
            "dtype": str(plain.dtype).removeprefix("torch."),
            "method": plain.method,
            "notices": list(source_adapter.notices),
            "parity": parity(plain, read_back),
            "truncation_errors": plain.errors,
            "logits": None,
        }
        if not math.isfinite(report["parity"]["relative_difference"]):
            raise ValueError(f"adapter {str(adapter)!r} has NaN or infinite tensors; see `gralora inspect`.")
        if to.is_peft and base is not None and any(Path(base).glob("*.safetensors")):
            report["logits"] = logits_parity(Path(adapter), folder, Path(base))
        base_name = str(base or source_adapter.config.base_model_name_or_path or "BASE_MODEL")
        report["command"] = to.command(base_name, out, plain.rank)
        to.finish(folder, base_name)
        write_json(folder / REPORT, report)
    return report


def summary(report: dict[str, Any]) -> str:
    """The report in a few lines, for people."""
    difference = report["parity"]["relative_difference"]
    lines = [*report["notices"]]
    what = f"rank {report['rank']}, {report['dtype']}, {report['method']}"
    lines += [f"{what}: dW differs by {difference:.1e} (relative)"]
    if report["truncation_errors"]:
        worst = max(report["truncation_errors"], key=report["truncation_errors"].__getitem__)
        lines += [f"approximated {len(report['truncation_errors'])} layers; relative error of dW by layer:"]
        lines += [f"  {error:.3f}  {layer}" for layer, error in report["truncation_errors"].items()]
        lines += [f"worst: {report['truncation_errors'][worst]:.3f} at {worst}; over all layers {difference:.3f}"]
    if report["logits"]:
        lines += ["logits differ by {max_difference:.1e}, the greatest is {max_logit:.1f}".format(**report["logits"])]
    return "\n".join([*lines, "serve it with:", report["command"]])


def plain_config(plain: PlainLora, extra: dict[str, Any]) -> dict[str, Any]:
    """PEFT LoRA config: only keys that all engines know, r = lora_alpha = R, `extra` fields that the target keeps."""
    config = plain.adapter.config
    return {
        "peft_type": "LORA",
        "task_type": formats.plain(config.task_type),
        "base_model_name_or_path": config.base_model_name_or_path,
        "revision": config.revision,
        "inference_mode": True,
        "r": plain.rank,
        "lora_alpha": plain.rank,
        "lora_dropout": 0.0,
        "target_modules": target_modules(plain.adapter),
        "bias": "none",
        "fan_in_fan_out": config.fan_in_fan_out,
        "modules_to_save": None,
        "init_lora_weights": True,
    } | extra


def target_modules(adapter: Adapter) -> list[str]:
    """A list that selects the adapter's layers: the config's own if it is a plain one, else their full names."""
    config = adapter.config
    restricted = config.layers_to_transform is not None or config.exclude_modules
    if isinstance(config.target_modules, str) or not config.target_modules or restricted:
        return sorted(adapter.layers)
    return sorted(config.target_modules)
