"""Adapters of diffusers' models: read as diffusers saves them, and written as the plain LoRA that they equal.

A file of diffusers holds the adapters of several models of a pipeline; names begin with the model's place in it, as
`unet.`, and each one's config is in the file's metadata. Two layouts are written: diffusers' own, which ComfyUI reads,
too, and for UNets also that of kohya's scripts. Neither needs gralora to be read.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..blocks import scaling_gain
from ..config import LoraConfig, names
from ..factors import hybrid_to_lora
from ..ops import reference
from ..seam import LORA_METADATA
from .adapter import PREFIX, check_base, set_fields
from .files import CONFIG, WEIGHTS, new_folder, write_json
from .load import expected_tensors
from .plain import fold
from .untrusted import check_finite

FILE, KOHYA = "pytorch_lora_weights.safetensors", "kohya.safetensors"
KOHYA_PLACES = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
OLD_NAMES = {  # of diffusers' own layers, which it still writes for UNets and text encoders
    ".lora_linear_layer.down.": ".lora_A.",
    ".lora_linear_layer.up.": ".lora_B.",
    ".lora.down.": ".lora_A.",
    ".lora.up.": ".lora_B.",
}
PROBES = 8


class Component(NamedTuple):
    """The adapter of one model of a pipeline; its place, as "unet", is empty where a file does not say."""

    place: str
    config: peft.LoraConfig
    tensors: dict[str, Tensor]

    @property
    def layers(self) -> list[str]:
        return list(dict.fromkeys(name.split(".lora_")[0] for name in self.tensors))


class Layer(NamedTuple):
    """One layer's factors as those of the linear map of patches, and the kernel of its convolution, () of none."""

    A: Tensor
    B: Tensor
    hybrid_A: Tensor | None
    hybrid_B: Tensor | None
    kernel: tuple[int, ...]
    scaling: float


def components(source: Any, adapter_name: str = "default") -> list[Component]:
    """The adapters in a file or folder of diffusers, or of PEFT; or of a model or pipeline in memory.

    Raises:
        OSError: if there is no such file.
        ValueError: if there is no adapter, or no config for it.
    """
    if isinstance(source, str | os.PathLike):
        return _saved(Path(source))
    models = getattr(source, "components", None) or {"": source}
    found = []
    for place, model in models.items():
        if adapter_name in (getattr(model, "peft_config", None) or {}):
            tensors = expected_tensors(model, adapter_name)
            tensors = {name.removeprefix(PREFIX): t.detach().cpu() for name, t in tensors.items()}
            found.append(Component(place or _place(tensors), model.peft_config[adapter_name], tensors))
    if not found:
        raise ValueError(f"{type(source).__name__} has no adapter {adapter_name!r}.")
    return found


def _saved(path: Path) -> list[Component]:
    if (path / CONFIG).is_file():
        tensors = {name.removeprefix(PREFIX): t for name, t in load_file(path / WEIGHTS).items()}
        return [Component(_place(tensors), LoraConfig.from_pretrained(str(path)), tensors)]
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{str(path)!r} has neither {CONFIG} (PEFT) nor {FILE} (diffusers).")
    with safe_open(str(file), framework="pt") as opened:
        fields = json.loads((opened.metadata() or {}).get(LORA_METADATA, "{}"))
    if not fields:
        raise ValueError(
            f"{str(file)!r} has no config in its metadata ({LORA_METADATA}), so the adapter's scale is not known; "
            "save it with diffusers 0.34 or later, with unet_lora_adapter_metadata or the like."
        )
    tensors = load_file(file)
    for old, new in OLD_NAMES.items():
        tensors = {name.replace(old, new): t for name, t in tensors.items()}
    if "r" in fields:  # of one model, by save_lora_adapter
        return [Component(_place(tensors), LoraConfig(**fields), tensors)]
    places = list(dict.fromkeys(name.partition(".")[0] for name in fields))
    return [Component(p, LoraConfig(**_inside(p, fields)), _inside(p, tensors)) for p in places]


def _inside(place: str, named: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(f"{place}."): value for name, value in named.items() if name.startswith(f"{place}.")}


def _place(tensors: dict[str, Tensor]) -> str:
    """Where the model is in a pipeline, by the names of its layers."""
    return (
        "unet"
        if any(name.startswith(("down_blocks.", "mid_block.", "up_blocks.")) for name in tensors)
        else "transformer"
    )


def read_layer(component: Component, name: str) -> Layer:
    """The factors of a layer; those of a plain LoRA are a grid of one block."""
    config, tensors = component.config, component.tensors
    A, B = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
    hybrid_A, hybrid_B = (tensors.get(f"{name}.lora_{factor}.hybrid_weight") for factor in "AB")
    settings = config if isinstance(config, LoraConfig) else LoraConfig(**config.to_dict())
    r, alpha = settings.of_layer("r", name), settings.of_layer("lora_alpha", name)
    scaling = alpha / (r**0.5 if settings.use_rslora else r)
    if not getattr(config, "use_gralora", False):
        kernel = tuple(A.shape[2:])
        return Layer(A.flatten(1).T[None], B.flatten(1).T[None], None, None, kernel, scaling)
    kernel = tuple(A.shape[2:-1])
    hybrid_r = 0 if hybrid_A is None else hybrid_A.shape[0]
    scaling *= scaling_gain(settings.gralora_scaling, A.shape[0], A.shape[-1], hybrid_r)
    hybrid_A = None if hybrid_A is None else hybrid_A.flatten(1)
    return Layer(A.flatten(1, -2), B, hybrid_A, hybrid_B, kernel, scaling)


def plain_layers(component: Component, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """Name, A and B of each layer as a plain LoRA of scale 1, and how far its dW is off, relative to dW.

    A is `[R, I, *kernel]` and B `[O, R, 1, ...]`, in `dtype`, or by default in the adapter's own; in float32 if that
    has half precision and the scaling is no power of two.
    """
    generator = torch.Generator().manual_seed(0)
    for name in component.layers:
        layer = read_layer(component, name)
        exact = abs(torch.frexp(torch.tensor(layer.scaling, dtype=torch.float64))[0].item()) in (0.0, 0.5)
        kept = layer.B.dtype if exact else torch.promote_types(layer.B.dtype, torch.float32)
        to = dtype or kept
        hybrid = (
            (None, None)
            if layer.hybrid_A is None or layer.hybrid_B is None
            else (layer.hybrid_A.to(to), fold(layer.hybrid_B, layer.scaling, to))
        )
        A, B = hybrid_to_lora(layer.A.to(to), fold(layer.B, layer.scaling, to), *hybrid)
        x = torch.randn(PROBES, A.shape[1], generator=generator, dtype=torch.float64)
        factors = (None if t is None else t.double() for t in (layer.A, layer.B, layer.hybrid_A, layer.hybrid_B))
        expected = reference.update(x, reference.Factors(*factors, layer.scaling))  # type: ignore[arg-type, call-arg]
        off = (x @ A.double().T @ B.double().T - expected).norm() / expected.norm().clamp_min(1e-300)
        if layer.kernel:
            A, B = A.unflatten(1, (-1, *layer.kernel)), B.unflatten(1, (-1, *[1] * len(layer.kernel)))
        yield name, A.contiguous(), B.contiguous(), off.item()


def check(component: Component) -> None:
    """Raise ValueError, naming field or tensor, for what a plain LoRA in these layouts cannot have."""
    check_base(component.config)
    beside = names(lambda facts: facts.beside_factors)
    for name, value in sorted(set_fields(component.config).items()):
        if name in beside:
            raise ValueError(f"{name}={value!r} ({component.place}) cannot be kept: the layouts hold A and B alone.")
    for name, t in component.tensors.items():
        if not name.endswith((".lora_A.weight", ".lora_B.weight", ".hybrid_weight")) or t.ndim < 2:
            raise ValueError(f"tensor {name!r} ({component.place}) cannot be kept: the layouts hold A and B alone.")
    check_finite(component.tensors)


def export_pipeline(
    source: Any, out: str | os.PathLike[str], dtype: torch.dtype | None = None, adapter_name: str = "default"
) -> dict[str, Any]:
    """Write the adapters of a pipeline's models as the plain LoRAs that they equal; see `export.to_lora`.

    Returns:
        The report: `rank` (the highest), `parity`, `files`, and `command`, the line that loads what was written.
    """
    found = components(source, adapter_name)
    diffusers: dict[str, Tensor] = {}
    kohya: dict[str, Tensor] = {}
    layers: dict[str, float] = {}
    two_encoders = any(component.place == "text_encoder_2" for component in found)
    for component in found:
        check(component)
        place = KOHYA_PLACES.get(component.place)
        place = "lora_te1" if place == "lora_te" and two_encoders else place
        for name, A, B, off in plain_layers(component, dtype):
            full = f"{component.place}.{name}"
            layers[full] = off
            diffusers[f"{full}.lora_A.weight"], diffusers[f"{full}.lora_B.weight"] = A, B
            if place is not None:
                inner = name if place == "lora_unet" or name.startswith("text_model.") else f"text_model.{name}"
                key = f"{place}_{inner.replace('.', '_')}"
                kohya[f"{key}.lora_down.weight"], kohya[f"{key}.lora_up.weight"] = A, B
                kohya[f"{key}.alpha"] = torch.tensor(float(A.shape[0]), dtype=A.dtype)
    files = {FILE: diffusers} | ({KOHYA: kohya} if "unet" in {component.place for component in found} else {})
    report = {
        "target": "diffusers",
        "rank": max(t.shape[0] for name, t in diffusers.items() if name.endswith("lora_A.weight")),
        "dtype": str(next(iter(diffusers.values())).dtype).removeprefix("torch."),
        "method": "copied",
        "notices": [],
        "parity": {"relative_difference": max(layers.values()), "layers": layers},
        "truncation_errors": {},
        "logits": None,
        "files": list(files),
        "command": f"pipeline.load_lora_weights({str(out)!r}, weight_name={FILE!r})",
    }
    with new_folder(out) as folder:
        for name, tensors in files.items():
            save_file(tensors, folder / name, metadata={"format": "pt"})
        write_json(folder / "export_report.json", report)
    return report
