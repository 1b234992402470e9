"""Merge an adapter into its base model on disk, file by file (shard by shard), without loading the model.

Every sum W + dW is computed in float32 and rounded once. Finished files stay in a hidden folder beside the output, so
an interrupted merge resumes where it stopped. The output folder appears once all is written and checked.
"""

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import blocks
from ..config import names
from ..factors import hybrid_to_lora
from ..inits import changes_base
from ..ops import Factors
from . import formats
from .adapter import PREFIX, Adapter, NotByFiles, set_fields
from .base import BaseModel, base_folder, copy_other_files
from .files import (
    CONFIG,
    WEIGHTS,
    LazyTensors,
    check_absent,
    check_space,
    locked,
    publish,
    read_adapter_folder,
    read_json,
    spec,
    write_json,
    write_safetensors,
)
from .in_memory import config_of, merge_in_memory, shared_parameters, skeleton
from .load import other_rows
from .rounding import loss, warn_of_losses
from .untrusted import check_finite, is_finite, listed

STATE = "merge_state.json"
VERIFIED = 8  # number of layers that are checked after writing
MERGEABLE = names(lambda facts: facts.mergeable or not facts.beside_factors)


def merge_adapter(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    source: str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Write the base model with the adapter merged in, as a folder that needs neither gralora nor PEFT.

    Peak memory is one layer: its weight and its update in float32. After an interruption, a second call resumes the
    merge. If a merge by files is not possible (see in_memory.py), the whole model is loaded, merged and saved, and a
    notice says so; such a merge writes nothing before it is complete, so an interrupted one starts anew.

    Args:
        adapter: folder of the adapter, in any GraLoRA format.
        out: folder to make.
        base: folder of the base model; by default the one that the adapter's config names, if it is on this machine.
        dtype: dtype of all floating-point weights; by default each keeps its own.
        device: the device on which updates are computed.
        source: format of `adapter`, needed only if its config leaves that open.
        progress: show a progress bar.

    Returns:
        `layers` merged, `replaced` tensors (modules_to_save), `verified` layers, `resumed` files, `notices`, and
        `rounding`: for each layer the loss by storing the merged weight in its dtype (see rounding.py). A warning is
        given if one is large.

    Raises:
        OSError: if a file is missing, if `out` exists, cannot be made or has no space, or if another process is
            writing it.
        ValueError: if adapter and base do not fit together, or a merged weight would have NaN or infinite values.
    """
    adapter, out = Path(adapter), Path(out).resolve()
    fields, saved = read_adapter_folder(adapter)
    folder = base_folder(base or fields.get("base_model_name_or_path"))
    model = BaseModel(folder)
    check_device(device)
    lock = out.with_name(f".{out.name}.lock")
    try:
        read = formats.read(fields, saved, source=source)
        merges = Merges(read, model, device)
        merges.check_shared()
    except NotByFiles as reason:
        if model.is_fp8:
            raise ValueError(
                f"base model {str(folder)!r} is FP8, and is merged into file by file only: {reason.reason}. Load it "
                "with transformers, convert it by gralora.dequantize_fp8, save that, and merge into what was saved."
            ) from reason
        with locked(lock, out):
            check_absent(out)
            try:
                report = merge_in_memory(adapter, out, folder, saved, dtype=dtype, device=device, source=source)
            except ValueError as error:
                raise ValueError(f"{error} (Not merged file by file either: {reason.reason}.)") from error
        warn_of_losses(report["rounding"])
        notice = f"merged in memory, not file by file: {reason.reason}."
        return report | {"resumed": [], "notices": [notice]}
    check_finite(read.tensors)
    fingerprint = fingerprint_of(adapter, model, dtype)
    with locked(lock, out):
        check_absent(out)
        return write_merged(merges, adapter, out, dtype, fingerprint, progress)


def write_merged(
    merges: "Merges",
    adapter: Path,
    out: Path,
    dtype: torch.dtype | None,
    fingerprint: dict[str, Any],
    progress: bool,
) -> dict[str, Any]:
    """Write the merged model to `out`, resuming an interrupted merge; the caller keeps other processes out.

    Args:
        merges: the base model and its changes.
        adapter: folder of the adapter, whose tokenizer and generation config go into `out`.
        out: folder to make.
        dtype: dtype of all floating-point weights, or None to keep each one's own.
        fingerprint: fingerprint of the inputs; only a merge with the same one is resumed.
        progress: show a progress bar.

    Returns:
        As `merge_adapter`.
    """
    read, model = merges.adapter, merges.model
    partial = out.with_name(f".{out.name}.partial")
    state = {"of": fingerprint, "rounding": {}}
    if partial.exists():
        if (partial / STATE).exists() and read_json(partial / STATE).get("of") == fingerprint:
            state = read_json(partial / STATE)
        else:
            shutil.rmtree(partial)  # left by a merge of another adapter, base or dtype
    resumed = [name for name in model.files if name in state["rounding"] and (partial / name).exists()]
    to_write = [t for name in model.files if name not in resumed for t in model.files[name].specs.values()]
    check_space(out, sum(t.numel() * stored_dtype(t, dtype).itemsize for t in to_write))
    partial.mkdir(parents=True, exist_ok=True)
    for path in partial.iterdir():
        if path.name not in (STATE, *resumed):
            path.unlink()  # half written when a merge was killed

    try:
        with _progress_bar(model, resumed, progress) as bar:
            for name in model.files:
                if name not in resumed:
                    state["rounding"][name] = {}
                    tensors = merges.merged(model.files[name], dtype, state["rounding"][name])
                    write_safetensors(partial / f"{name}.tmp", tensors, done=bar.update)
                    write_json(partial / STATE, state)
                    os.replace(partial / f"{name}.tmp", partial / name)
    except ValueError:  # no merge of these inputs can succeed, so there is nothing to resume
        shutil.rmtree(partial)
        raise
    copy_other_files(model, partial, dtype, adapter)
    verified = merges.verify(BaseModel(partial), VERIFIED)
    (partial / STATE).unlink()
    publish(partial, out)
    rounding = {layer: error for layers in state["rounding"].values() for layer, error in layers.items()}
    warn_of_losses(rounding)
    return {
        "layers": len(read.layers),
        "replaced": sorted(merges.replaced),
        "verified": verified,
        "resumed": resumed,
        "rounding": rounding,
        "notices": list(read.notices),
    }


def check_device(device: str) -> None:
    """Raise ValueError if torch cannot compute on a device."""
    try:
        torch.ones(1, device=device).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device={device!r} cannot be used: {str(error).splitlines()[0]}") from error


def stored_dtype(t: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype in which a tensor of the base is stored: the given one if it has floats, else its own."""
    return dtype if dtype is not None and t.dtype.is_floating_point else t.dtype


def _progress_bar(model: "BaseModel", resumed: list[str], show: bool) -> Any:
    from tqdm import tqdm

    done = sum(len(model.files[name]) for name in resumed)
    off: dict[str, Any] = {} if show else {"disable": True}  # False would go before TQDM_DISABLE
    return tqdm(total=len(model.file_of), initial=done, desc="merge", unit=" tensors", **off)


class Merges:
    """The changes of an adapter to a base model: updates to add and tensors to replace, by the base's names."""

    def __init__(self, adapter: Adapter, model: BaseModel, device: str) -> None:
        self.adapter, self.model, self.device = adapter, model, device
        if changes_base(adapter.config):
            raise NotByFiles(f"init_lora_weights={adapter.config.init_lora_weights!r} changes the base weights first")
        for name in sorted(set_fields(adapter.config).keys() - MERGEABLE):
            raise ValueError(f"{name}={getattr(adapter.config, name)!r} cannot be merged into the base's files.")
        strip = self._prefix_to_strip()
        self.weights = {f"{layer.removeprefix(strip)}.weight": layer for layer in adapter.layers}
        biased = adapter.layers if adapter.config.lora_bias else []
        self.biases = {f"{layer.removeprefix(strip)}.bias": layer for layer in biased}
        self.replaced = {self._base_name(name, strip): name for name in adapter.others}
        self.changed = {*self.weights, *self.biases, *self.replaced}
        missing = [name for name in [*self.weights, *self.biases, *self.replaced] if name not in model]
        if missing:
            raise NotByFiles(
                f"the base model's files do not have {len(missing)} of the tensors that the adapter changes, or have "
                f"them under other names: {listed(missing)}"
            )
        self.transposed = {name: self._is_transposed(name) for name in self.weights}
        for name, source in self.replaced.items():
            if model.spec(name).shape != adapter.tensors.specs[source].shape:
                raise NotByFiles(
                    f"tensor {name!r} is {tuple(adapter.tensors.specs[source].shape)} in the adapter and "
                    f"{tuple(model.spec(name).shape)} in the base"
                )
            if source.endswith(".base_layer.weight") and other_rows(model[name], adapter.tensors[source]):
                raise NotByFiles(f"tensor {name!r} of the base is not what the adapter was trained on")

    def check_shared(self) -> None:
        """Raise NotByFiles if the adapter changes a tensor whose memory another layer shares once it is loaded."""
        try:
            model = skeleton(config_of(self.model.config), self.adapter.layers)
        except (ValueError, KeyError, OSError):  # no model of transformers' own
            return
        shared = shared_parameters(model)
        names = [name for name in shared if any(name == c or name.endswith(f".{c}") for c in self.changed)]
        if names:
            raise NotByFiles(f"{names[0]!r} shares its memory with {sorted({*shared[names[0]]} - {names[0]})}")

    def _prefix_to_strip(self) -> str:
        """Return the prefix of the layers' names that the names in the files lack, e.g. GPT-2's "transformer."."""
        first = self.adapter.layers[0]
        parts = first.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) + ".weight" in self.model:
                return first.removesuffix(".".join(parts[i:]))
        return ""

    def _base_name(self, name: str, strip: str) -> str:
        name = name.removeprefix(PREFIX).replace(".base_layer.", ".")
        return name if name in self.model else name.removeprefix(strip)

    def _is_transposed(self, name: str) -> bool:
        """Tell by shape, or if square by the config, whether a weight is stored `[in, out]`, as by Conv1D."""
        features = self.adapter.features(self.weights[name])
        shape = tuple(self.model.spec(name).shape)
        if shape not in (features, features[::-1]):
            raise NotByFiles(
                f"weight {name!r} is {shape} in the base model; the adapter has (in, out) features {features}"
            )
        if features[0] != features[1]:
            return shape == features
        if any(
            self._is_transposed(other) != self.adapter.config.fan_in_fan_out
            for other, layer in self.weights.items()
            if len(set(self.adapter.features(layer))) == 2
        ):
            raise NotByFiles(
                f"weight {name!r} is square and the base model's weights are not all stored as the adapter's "
                f"fan_in_fan_out={self.adapter.config.fan_in_fan_out} says, so the file does not show its orientation"
            )
        return self.adapter.config.fan_in_fan_out

    def merged(
        self, tensors: LazyTensors, dtype: torch.dtype | None, rounding: dict[str, dict[str, float]]
    ) -> LazyTensors:
        """Return the merged tensors of one of the base's files, each computed when it is asked for.

        Args:
            tensors: the tensors of the file.
            dtype: dtype of all floating-point tensors, or None to keep each one's own.
            rounding: receives the loss by storing each merged layer; see `merge_adapter`.
        """

        def load(name: str) -> Tensor:
            exact = self.merged_tensor(name, tensors)
            stored = exact.to(stored_dtype(tensors.specs[name], dtype))
            if name in self.changed and not is_finite(stored):
                raise ValueError(
                    f"the merged tensor {name!r} would have NaN or infinite values in {stored.dtype}; `gralora "
                    "inspect` shows whether the adapter has."
                )
            if name in self.weights:
                rounding[self.weights[name]] = loss(self._base(name, tensors), exact, stored)
            return stored.cpu()

        specs = {name: spec(tuple(t.shape), stored_dtype(t, dtype)) for name, t in tensors.specs.items()}
        return LazyTensors(specs, load)

    def _base(self, name: str, tensors: "Mapping[str, Tensor] | BaseModel") -> Tensor:
        return self.adapter.tensors[self.replaced[name]] if name in self.replaced else tensors[name]

    @torch.no_grad()
    def merged_tensor(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        base = self._base(name, tensors)
        if name in self.weights:
            dW = self._update(self.weights[name])
            # summed in dW, since a tensor read from a file shares memory with later reads
            dW.add_((base.T if self.transposed[name] else base).to(dW))
            self._rescale(dW, self.weights[name])
            return dW.T if self.transposed[name] else dW
        if name in self.biases:
            layer = self.biases[name]
            bias = self.adapter.factors(layer).bias
            assert bias is not None  # `biases` names only layers that have one
            bias = bias.to(self.device, torch.float32)
            return base.to(bias) + self.adapter.peft_scaling(layer) * bias
        return base

    def _rescale(self, weight: Tensor, layer: str) -> None:
        """Give the rows of W + dW, `[O, I]`, the magnitudes of a DoRA."""
        magnitude = self.adapter.factors(layer).magnitude
        if magnitude is not None:
            norms = weight.norm(dim=1, dtype=torch.float64)
            weight.mul_((magnitude.to(norms) / norms)[:, None])

    def _update(self, layer: str) -> Tensor:
        A, B, hybrid_A, hybrid_B = self.adapter.factors(layer).moved(lambda t: t.to(self.device))
        return blocks.delta_weight(Factors(A, B, hybrid_A, hybrid_B, self.adapter.scaling(layer)))

    def verify(self, written: BaseModel, count: int) -> int:
        """Compare a sample of written weights with base + dW in float64, with dW from the equivalent plain LoRA.

        Returns:
            The number of layers compared.

        Raises:
            ValueError: if a weight is off by more than a rounding of its dtype; its file is then deleted.
        """
        weights = list(self.weights)
        sample = weights[:: max(1, len(weights) // count)] if len(weights) > count else weights
        for name in sample:
            layer = self.weights[name]
            A, B = hybrid_to_lora(*self.adapter.factors(layer).moved(Tensor.double))
            dW = self.adapter.scaling(layer) * (B @ A)
            exact = self._base(name, self.model).double()
            exact = (exact.T if self.transposed[name] else exact) + dW
            self._rescale(exact, layer)
            weight, precision = written[name], torch.finfo(written.spec(name).dtype)
            weight = weight.T if self.transposed[name] else weight
            # one rounding to the stored dtype (DoRA has two factors more), and those of the float32 sums
            roundings = 4 if self.adapter.config.use_dora else 1
            rounding = roundings * precision.eps * exact.abs() + 1e-5 * dW.abs().max() + precision.tiny
            if not ((weight.double() - exact).abs() <= rounding).all():
                file = written.folder / written.file_of[name]
                file.unlink()
                raise ValueError(
                    f"weight {name!r} is not base + dW after writing, which a bad disk or bad memory does: "
                    f"{file.name} is deleted, and the same command writes it again and keeps the rest."
                )
        return len(sample)


def fingerprint_of(adapter: Path, model: BaseModel, dtype: torch.dtype | None) -> dict[str, Any]:
    """Return the facts that must be unchanged for an interrupted merge to resume."""
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        with (adapter / name).open("rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    stats = {name: (model.folder / name).stat() for name in model.files}
    return {
        "adapter": digest.hexdigest(),
        "base": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
        "dtype": str(dtype),
    }
