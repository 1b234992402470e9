"""Export to plain LoRA, which every serving engine takes: the same update, one rank for all layers, scaling folded in.

dW of a GraLoRA adapter is that of a plain LoRA of rank k * r_g + hybrid_r: blocks are copied into place, nothing is
computed, and no base model is needed. Layers are read, rewritten, written and then read back one by one.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config import names
from ..ops import reference
from ..strings import check_printable, printable
from . import formats, prompting
from .adapter import PREFIX, Adapter, check_base, set_fields
from .base import BaseModel, base_folder
from .files import WEIGHTS, new_folder, read_adapter_folder, read_json, write_json
from .in_memory import config_of, model_class
from .load import expected_tensors, load_adapter
from .pipelines import export_pipeline
from .plain import PlainLora, plain_lora
from .prompting import Prompting
from .targets import TARGETS, Target
from .untrusted import listed

REPORT = "export_report.json"
DIFFUSERS = "diffusers"  # the target that takes several adapters of a pipeline, and convolutions
# options of `to_lora`, with the command's flags, that a target does not use -> why it has none
NOT_FOR_DIFFUSERS = {
    "max_rank (--max-rank)": "each layer keeps its exact rank, which diffusers takes",
    "lossy (--lossy)": "each layer keeps its exact rank, which diffusers takes",
    "source (--from)": "adapters of other programs are first converted, with `gralora convert ADAPTER OUT --from ...`",
    "base (--base)": "the base model is not read, and no logits are compared",
    "base_config (--arch, --heads, --kv-heads)": "the base model's config is not needed",
}
PROBES = 8
PIECE = 1 << 18  # elements of a weight that are converted to float64 at a time


def without_base_weights(adapter: Adapter, base: str | os.PathLike[str] | None) -> Adapter:
    """The adapter without weights that are the base model's own, which PEFT saves with adapters of embeddings.

    Args:
        adapter: the adapter.
        base: folder of the base model, by default what the adapter names; without it, nothing is left out.
    """
    try:
        model = BaseModel(base_folder(base or adapter.config.base_model_name_or_path))
    except (OSError, ValueError):
        return adapter
    own = {name for name in adapter.others if is_of_base(adapter.tensors[name], name, model)}
    if not own:
        return adapter
    kept = adapter.tensors.renamed({name: name for name in adapter.tensors if name not in own})
    notice = f"left out {len(own)} tensors that are the base model's own: {listed(sorted(own))}."
    return dataclasses.replace(adapter, tensors=kept, notices=(*adapter.notices, notice))


def is_of_base(tensor: Tensor, name: str, model: BaseModel) -> bool:
    """Whether a tensor is in the base's files; an output layer without one of its own has the embedding's."""
    name = name.removeprefix(PREFIX).replace(".base_layer.", ".")
    names = [name] if name in model else [other for other in model.file_of if model.spec(other).ndim == 2]
    names = [other for other in names if model.spec(other).shape == tensor.shape]
    return any(torch.equal(model[other].to(tensor), tensor) for other in names)


def check_exportable(adapter: Adapter, target: str, kept: frozenset[str], holds: frozenset[str]) -> dict[str, Any]:
    """The fields beside the factors that the target keeps; ValueError, with the reason, for what it cannot hold.

    Args:
        adapter: the adapter, its layers seen as linear ones.
        target: for messages.
        kept: names of fields that the target keeps.
        holds: the kinds of layers, beside linear ones, that it holds.
    """
    for layer, place in adapter.places.items():
        if place.kind not in holds:
            raise ValueError(
                f"{target} takes no adapters of {place.kind}, and the adapter has one of {layer!r}; `gralora merge` "
                "writes it into the model."
            )
    check_base(adapter.config)
    held = {"target_parameters"} if adapter.places else set()
    beside = names(lambda facts: facts.beside_factors)
    extra = {name: value for name, value in set_fields(adapter.config).items() if name in beside}
    for name in sorted(extra.keys() - kept - held):
        mergeable = name != "alora_invocation_tokens"
        raise ValueError(
            f"{target} takes nothing but A and B of linear layers, and the adapter has {name}={extra[name]!r}; "
            + ("`gralora merge` writes it into the model." if mergeable else "use --for peft.")
        )
    if adapter.others and not kept:
        raise ValueError(
            f"{target} takes nothing but A and B of linear layers, and the adapter also has "
            f"{', '.join(map(repr, adapter.others[:3]))}; `gralora merge` writes them into the model. (If they are "
            "unchanged embeddings of the base: --base MODEL shows that and leaves them out, and so does "
            "save_pretrained(..., save_embedding_layers=False).)"
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
        expected = reference.update(x, reference.Factors(*factors, plain.adapter.scaling(layer)))
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


def is_comparable(adapter: Adapter, to: Target, base: Path) -> bool:
    """Whether PEFT loads what was written, and the base's weights are there."""
    one_by_one = adapter.places and to is not TARGETS["peft"]
    return to.is_peft and not one_by_one and any(base.glob("*.safetensors"))


def is_causal(base_config: dict[str, Any] | None) -> bool:
    """Whether a base's config.json names a class of causal language models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return not set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()).isdisjoint(
        (base_config or {}).get("architectures") or ()
    )


def logits_parity(adapter: Path, exported: Path, base: Path) -> dict[str, float]:
    """Logits of the base model with the GraLoRA adapter and with the exported one, both in float32.

    Args:
        adapter, exported, base: folders.

    Returns:
        The greatest difference, and the greatest logit for scale.
    """
    import peft
    from transformers import AutoModelForCausalLM

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
    adapter: str | os.PathLike[str] | nn.Module | Any,
    out: str | os.PathLike[str],
    target: str = "peft",
    *,
    base: str | os.PathLike[str] | None = None,
    base_config: dict[str, Any] | None = None,
    source: str | None = None,
    max_rank: int | None = None,
    lossy: bool = False,
    dtype: torch.dtype | None = None,
    adapter_name: str = "default",
) -> dict[str, Any]:
    """Write a GraLoRA adapter as the plain LoRA that it equals, in the form one serving program takes.

    Args:
        adapter: folder of the adapter, in any format of `gralora.checkpoints.formats.FORMATS`; for diffusers also a
            file that it saved. Or a model in memory that has the adapter, or a pipeline of diffusers.
        out: folder to make.
        target: a name in `gralora.checkpoints.targets.TARGETS`, or diffusers.
        base: folder of the base model. Its config.json is read for GGUF files. Its weights, if there, are loaded to
            compare logits if PEFT can load what is written. Not for diffusers.
        base_config: instead of `base`'s config.json: `model_type`, `num_attention_heads`, `num_key_value_heads`. For
            GGUF files only.
        source: format of `adapter`, needed only if its config leaves that open. Not for diffusers, nor for models in
            memory.
        max_rank, lossy: see `plain_lora`. Not for diffusers, which takes any rank.
        dtype: see `plain_lora`. Not for GGUF files, which are in float32.
        adapter_name: of the adapter, in a model that is in memory.

    Returns:
        The report, also written to `out`, with rank, method, parity (see `parity`), truncation errors by layer,
        logits, and `command`, the line that serves it.

    Raises:
        OSError, ValueError: if the input is not there, is not valid, or the target cannot take it. `out` is then not
            made.
    """
    given = {
        "max_rank (--max-rank)": max_rank,
        "lossy (--lossy)": lossy or None,
        "source (--from)": source,
        "base (--base)": None if base is None else str(base),
        "base_config (--arch, --heads, --kv-heads)": base_config,
        "dtype (--dtype)": None if dtype is None else str(dtype).removeprefix("torch."),
    }
    if target == DIFFUSERS:
        check_used(given, NOT_FOR_DIFFUSERS, "target 'diffusers'")
        return export_pipeline(adapter, out, dtype, adapter_name)
    if target not in TARGETS:
        raise ValueError(f"target {target!r} is not known; use one of {', '.join([*TARGETS, DIFFUSERS])}.")
    check_used(given, TARGETS[target].ignores, f"target {target!r}")
    if not isinstance(adapter, str | os.PathLike):
        check_used(given, {"source (--from)": "it has an adapter of gralora's own"}, "a model in memory")
        options: dict[str, Any] = {"base": base, "base_config": base_config, "max_rank": max_rank, "lossy": lossy}
        with TemporaryDirectory() as folder:
            save_adapter(adapter, Path(folder), adapter_name)
            written = to_lora(folder, out, target, dtype=dtype, **options)
        written["source"]["adapter"] = f"{type(adapter).__name__} in memory"
        write_json(Path(out) / REPORT, written)
        return written
    if adapter_name != "default":
        raise ValueError(
            f"adapter_name is {adapter_name!r}, but the folder {str(adapter)!r} holds one adapter, which needs no "
            "name; leave it out."
        )
    to, out = TARGETS[target], Path(out)
    source_adapter = formats.read(*read_adapter_folder(adapter), source=source, as_linear=True)
    base_name = str(base or source_adapter.config.base_model_name_or_path or "BASE_MODEL")
    check_printable("base_model_name_or_path" if base is None else "base", base_name)
    check_printable("out", str(out))
    if source_adapter.others and not to.keeps:
        source_adapter = without_base_weights(source_adapter, base)
    extra = check_exportable(source_adapter, target, to.keeps, to.holds)
    if base_config is None:
        base_config = config_of_base(base or source_adapter.config.base_model_name_or_path)
    elif base is not None and (Path(base) / "config.json").is_file():
        raise ValueError(
            f"base_config (--arch, --heads, --kv-heads) is {base_config!r}, and base (--base) has a config.json, "
            f"{str(Path(base) / 'config.json')!r}; give one of the two."
        )
    plain = plain_lora(source_adapter, to.max_rank, max_rank, lossy, to.dtype or dtype)
    with new_folder(out) as folder:
        # of what is read back nothing stays open: Windows would not rename the folder
        compared = parity(plain, to.write(plain, folder, base_config, extra))
        report: dict[str, Any] = {
            "target": target,
            "source": {"adapter": str(adapter), "format": source_adapter.format},
            "rank": plain.rank,
            "dtype": str(plain.dtype).removeprefix("torch."),
            "method": plain.method,
            "notices": [
                *source_adapter.notices,
                *to.notices(base_config),
                *lacking(target, source_adapter, base_config),
            ],
            "parity": compared,
            "truncation_errors": plain.errors,
            "logits": None,
        }
        if not math.isfinite(report["parity"]["relative_difference"]):
            raise ValueError(f"adapter {str(adapter)!r} has NaN or infinite tensors; see `gralora inspect`.")
        if base is not None and is_comparable(source_adapter, to, Path(base)):
            if is_causal(base_config):
                report["logits"] = logits_parity(Path(adapter), folder, Path(base))
            else:
                report["notices"].append("no logits are compared, since the base is no causal language model.")
        to.finish(folder, base_name)
        words = to.carry(Prompting.of(adapter), folder, out)
        report["command"] = prompting.command(to.command(base_name, out, plain), words)
        write_json(folder / REPORT, report)
    return report


def config_of_base(base: str | os.PathLike[str] | None) -> dict[str, Any] | None:
    """The content of a base model's config.json; None if the model is not on this machine."""
    try:
        return read_json(base_folder(base) / "config.json")
    except OSError:
        return None


def lacking(target: str, adapter: Adapter, base_config: dict[str, Any] | None) -> list[str]:
    """Warn of layers that the base model does not have, where the program would serve the base without a word."""
    if target not in ("vllm", "sglang") or base_config is None:
        return []
    try:
        config = config_of(base_config)
    except (ValueError, TypeError):  # no model of transformers' own
        return []
    try:
        model_class(config, adapter.modules)
    except ValueError as error:
        return [f"{error} {target} ignores layers that the base does not have, and then serves the base alone."]
    return []


def check_used(given: Mapping[str, Any], ignored: Mapping[str, str], what: str) -> None:
    """Raise ValueError, by name, if an option is given that would be ignored.

    Args:
        given: option -> its value, None if it is not given.
        ignored: option -> why it is not used.
        what: what does not use it.
    """
    for option, reason in ignored.items():
        if given[option] is not None:
            raise ValueError(f"{option} is {given[option]!r}, but {what} does not use it: {reason}; leave it out.")


def save_adapter(model: Any, folder: Path, adapter_name: str) -> None:
    """Write the adapter of a model in memory as PEFT does, also of a model that is no PeftModel."""
    if adapter_name not in (getattr(model, "peft_config", None) or {}):
        raise ValueError(f"{type(model).__name__} has no adapter {adapter_name!r}.")
    tensors = expected_tensors(model, adapter_name)
    tensors = {f"{PREFIX}{name.removeprefix(PREFIX)}": t.detach().cpu().contiguous() for name, t in tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    model.peft_config[adapter_name].save_pretrained(str(folder))


def summary(report: dict[str, Any]) -> str:
    """The report in a few lines, for people."""
    difference = report["parity"]["relative_difference"]
    lines = [*report["notices"]]
    what = f"rank {report['rank']}, {report['dtype']}, {report['method']}"
    lines += [f"{what}: dW differs by {difference:.1e} (relative)"]
    if report["truncation_errors"]:
        worst = max(report["truncation_errors"], key=report["truncation_errors"].__getitem__)
        lines += [f"approximated {len(report['truncation_errors'])} layers; relative error of dW by layer:"]
        lines += [f"  {error:.3f}  {printable(layer)}" for layer, error in report["truncation_errors"].items()]
        lines += [
            f"worst: {report['truncation_errors'][worst]:.3f} at {printable(worst)}; over all layers {difference:.3f}"
        ]
    if report["logits"]:
        lines += ["logits differ by {max_difference:.1e}, the greatest is {max_logit:.1f}".format(**report["logits"])]
    return "\n".join([*lines, "serve it with:", report["command"]])
