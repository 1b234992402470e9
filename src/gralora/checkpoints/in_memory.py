"""Merge an adapter in memory: load the base model, load the adapter, merge, save, and read back what was saved.

`merge.py` goes file by file and needs no more than one layer. That works where a tensor of the base's files is one
weight of one linear layer. Where it is not, this module takes over, and the report says why: transformers renames,
joins or splits weights while it loads many models; a weight may be shared by several layers; and the adapter may
change experts, embeddings or convolutions.
"""

import hashlib
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..ops.torch_seam import parameters_of
from ..warned import without
from .adapter import PREFIX
from .base import WEIGHT_ENDINGS
from .convert import convert_adapter
from .files import LazyTensors, new_folder
from .load import added_tokens, base_weights, check_base_embeddings, expected_tensors
from .prompting import copy_prompting
from .rounding import loss
from .untrusted import check_finite, is_finite, listed


def config_of(fields: Mapping[str, Any]) -> Any:
    """The config of a model that transformers knows, by the content of its config.json.

    Raises:
        ValueError: if transformers does not know the model.
    """
    import transformers

    others = {name: value for name, value in fields.items() if name != "model_type"}
    return transformers.AutoConfig.for_model(str(fields.get("model_type")), **others)


def model_class(config: Any, layers: list[str]) -> Any:
    """The class of transformers that has an adapter's layers: what the base's config names, or its model without head.

    Args:
        config: of the base model.
        layers: full names of modules.

    Raises:
        ValueError: if none has them.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    named = [getattr(transformers, name, None) for name in config.architectures or []]
    candidates = [*filter(None, named), *([MODEL_MAPPING[type(config)]] if type(config) in MODEL_MAPPING else [])]
    for cls in candidates:
        with torch.device("meta"):
            modules = dict(cls(config).named_modules())
        if all(layer in modules for layer in layers):
            return cls
    raise ValueError(
        f"the base model ({', '.join(cls.__name__ for cls in candidates) or config.model_type}) lacks layers that the "
        f"adapter has, as {listed(layers)}; was it trained on another model?"
    )


def adapted_modules(tensors: LazyTensors) -> list[str]:
    """Full names of the modules that have factors in an adapter's file."""
    found = (re.match(r"(.*?)\.(?:lora_|gralora_)", name.removeprefix(PREFIX)) for name in tensors)
    return list(dict.fromkeys(match[1].replace(".base_layer", "") for match in found if match))


def skeleton(config: Any, layers: list[str]) -> nn.Module:
    """The base model on the meta device, with its weights tied.

    Args:
        config: of the base model.
        layers: full names of modules that it must have.

    Raises:
        ValueError: if it lacks some.
    """
    cls = model_class(config, layers)
    with torch.device("meta"):
        model = cls(config)
        model.tie_weights()
    return model


def shared_parameters(model: nn.Module) -> dict[str, list[str]]:
    """Name of each parameter that several modules have -> all of its names."""
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return {name: sharing for sharing in names.values() if len(sharing) > 1 for name in sharing}


@torch.no_grad()
def merge_in_memory(
    adapter: Path,
    out: Path,
    folder: Path,
    tensors: LazyTensors,
    *,
    dtype: torch.dtype | None,
    device: str,
    source: str | None,
) -> dict[str, Any]:
    """Write the base model with an adapter of any kind merged in; see `merge.merge_adapter`, which calls this.

    Args:
        adapter, out: folders.
        folder: of the base model.
        tensors: of the adapter, as they are in its file.
        dtype: of what is written; by default the base's.
        device: where.
        source: format of `adapter`, needed only if its config leaves that open.

    Returns:
        `layers`, `replaced` and `rounding`, as `merge_adapter`; `verified` counts the tensors that were read back.

    Raises:
        ValueError: if adapter and base do not fit together, or a merged weight would have NaN or infinite values.
    """
    import transformers

    check_finite(tensors)
    with TemporaryDirectory() as converted:
        if any(".gralora_A" in name for name in tensors):
            convert_adapter(adapter, Path(converted) / "adapter", source=source)
            adapter = Path(converted) / "adapter"
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        cls = model_class(config, adapted_modules(tensors))
        base = cls.from_pretrained(folder, dtype="auto", trust_remote_code=False).to(device)
        if size := added_tokens(base, tensors.specs):
            base.resize_token_embeddings(size, mean_resizing=False)  # which the adapter's own then overwrite
        else:
            check_base_embeddings(base, tensors)
        try:
            loaded = PeftModel.from_pretrained(base, str(adapter))
        except (RuntimeError, IndexError) as error:  # of torch, if shapes differ, or tokens are beyond the vocabulary
            raise ValueError(f"the adapter does not fit the base model: {error}") from error
    check_loaded(loaded, tensors)
    untied = untie(loaded)
    layers = [module for module in loaded.modules() if isinstance(module, BaseTunerLayer)]
    rounding = merge_layers(loaded, dtype)
    with without("All adapters are already merged"):  # by `merge_layers`
        merged = loaded.merge_and_unload(safe_merge=True)
    if dtype is not None:
        convert_weights(merged, dtype)
    said = None
    if untied or not still_tied(merged):
        said = outputs(merged)
        for config in (merged.config, merged.config.get_text_config()):
            config.tie_word_embeddings = False
    with new_folder(out) as written:
        merged.save_pretrained(written)
        for path in sorted(folder.iterdir()):
            if path.is_file() and not path.name.endswith(WEIGHT_ENDINGS) and not (written / path.name).exists():
                shutil.copyfile(path, written / path.name)
        copy_prompting(adapter, written)
        verified = check_written(merged, cls, written, said)
    replaced = sorted(name for name in tensors if ".lora_" not in name)
    return {"layers": len(layers), "replaced": replaced, "verified": verified, "rounding": rounding}


def merge_layers(model: PeftModel, dtype: torch.dtype | None) -> dict[str, dict[str, float]]:
    """Merge the adapter of every layer, one after the other: W + dW is computed in float32 and rounded once.

    Args:
        model: with the adapter, active.
        dtype: of the merged weights; None for the dtype that each has.

    Returns:
        Name of each merged weight, without ".weight" -> its `rounding.loss`.

    Raises:
        ValueError: if an adapter cannot be merged, or a merged weight would have NaN or infinite values.
    """
    base_model: Any = model.base_model
    base_model._check_merge_allowed()
    losses = {}
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, BaseTunerLayer) or layer.merged:
            continue
        base = layer.get_base_layer()
        before = {own: p.data for own, p in base.named_parameters() if p.is_floating_point()}
        for own, p in base.named_parameters():
            if own in before:
                p.data = p.data.to(torch.promote_types(p.dtype, torch.float32), copy=True)
        layer.merge(safe_merge=True)  # type: ignore[operator]
        for own, weight in before.items():
            merged = attrgetter(own)(base)  # not always the parameter that it was
            exact = merged.data
            is_changed = not torch.equal(exact, weight.to(exact))
            stored = exact.to(dtype if is_changed and dtype is not None else weight.dtype)
            merged.data = stored
            if is_changed and not is_finite(stored):
                raise ValueError(f"merged {name!r} would have NaN or infinite values in {stored.dtype}.")
            if is_changed and weight.ndim > 1:
                full = f"{name}.{own}".replace(".base_layer", "").removesuffix(".weight")
                losses[full] = loss(weight, exact, stored)
    return losses


def convert_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert all floating-point tensors that the model saves."""
    saved = model.state_dict().keys()
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if name in saved and t.is_floating_point():
            t.data = t.data.to(dtype)


def check_loaded(model: PeftModel, tensors: LazyTensors) -> None:
    """Raise ValueError, with names, if PEFT did not load every tensor of the file, or lacks some."""
    found = {f"{PREFIX}{name}": t for name, t in model.get_base_model().state_dict().items()}
    expected = expected_tensors(model, "default")
    found |= base_weights(model, set(tensors), "default")
    missing = sorted(expected.keys() - set(tensors))
    different = [name for name in tensors if not _equal(tensors[name], expected.get(name, found.get(name)))]
    if missing or different:
        parts = [f"the file lacks {len(missing)} tensors: {listed(missing)}"] if missing else []
        if different:
            parts.append(f"{len(different)} tensors of the file have no place in the model: {listed(different)}")
        raise ValueError(f"the adapter does not fit the base model: {'; '.join(parts)}.")


def _equal(saved: Tensor, loaded: Tensor | None) -> bool:
    return loaded is not None and saved.shape == loaded.shape and torch.equal(saved.to(loaded), loaded)


def untie(model: PeftModel) -> list[str]:
    """Give every adapted layer that shares its weight with another module a copy of its own; returns their names.

    A merge adds to the weight in place, and so would change the other module, too.
    """
    shared = shared_parameters(model)
    untied = []
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            base = module.get_base_layer()
            prefix = next(n for n, m in model.named_modules() if m is base)
            for own, parameter in list(base.named_parameters(recurse=False)):
                if f"{prefix}.{own}" in shared:
                    parameters_of(base)[own] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                    untied.append(name)
    return untied


def still_tied(model: Any) -> bool:
    """Whether the output layer has the embedding's weight, or need not have it."""
    if not any(getattr(c, "tie_word_embeddings", False) for c in (model.config, model.config.get_text_config())):
        return True
    embedding, output = input_embedding(model), model.get_output_embeddings()
    return embedding is None or output is None or output.weight is embedding.weight


def input_embedding(model: Any) -> Any:
    """The embedding of tokens, or None where a model has not one."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


def outputs(model: Any) -> Tensor:
    """Logits for a few tokens, for a model of text."""
    ids = torch.arange(1, 9, device=model.device)[None]
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    return model.eval()(**inputs).logits


def check_written(model: Any, cls: Any, folder: Path, said: Tensor | None) -> int:
    """Read the model back and compare it with what was merged.

    Args:
        model: the merged one.
        cls: its class.
        folder: that it was written to.
        said: its `outputs` before its config was changed, or None if it was not.

    Returns:
        The number of tensors compared.

    Raises:
        ValueError: with names, if a tensor is not what was to be written; or if the outputs differ, as those of a
            model that computes something else where weights are not tied.
    """
    expected = {name: _digest(t) for name, t in model.state_dict().items()}
    read = cls.from_pretrained(folder, dtype="auto", trust_remote_code=False)
    found = {name: _digest(t) for name, t in read.state_dict().items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if said is not None and (wrong or not torch.allclose(outputs(read.to(said.device)), said, rtol=1e-3, atol=1e-4)):
        raise ValueError(
            f"{cls.__name__} is another model where its output layer does not share the embedding's weight, and the "
            "adapter changes one of the two, so it cannot be merged; use it unmerged."
        )
    if wrong:
        raise ValueError(f"{len(wrong)} tensors are read back other than they were written: {listed(wrong)}.")
    return len(expected)


def _digest(t: Tensor) -> str:
    data = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(data.data).hexdigest() + str((tuple(t.shape), t.dtype))
