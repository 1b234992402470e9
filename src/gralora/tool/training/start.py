"""What is trained: layers that are named or that PEFT knows, and an adapter whose folder is given as base model."""

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import PreTrainedModel

from ...checkpoints import formats
from ...checkpoints.files import CONFIG, read_adapter_folder
from ...config import FLAGS, LoraConfig
from ...fields import plain
from ..arguments import FinetuneArguments


def continued(args: FinetuneArguments) -> tuple[FinetuneArguments, Path | None]:
    """The arguments as they are, or, where `base_model` is an adapter's folder, those of the adapter, and its folder.

    transformers would load the base model and the adapter, and a new adapter would be trained in its place.

    Raises:
        ValueError: if the adapter does not name its base model, or an argument says something else than the adapter.
    """
    folder = Path(args.base_model)
    if not (folder / CONFIG).is_file():
        return args, None
    files = read_adapter_folder(folder)
    saved = (formats.read_plain if formats.is_plain_lora(files[0]) else formats.read)(*files).config
    base = saved.base_model_name_or_path
    if not base:
        raise ValueError(
            f"base_model={args.base_model!r} is an adapter that does not name its base model; write it into "
            f"{folder / CONFIG}, as base_model_name_or_path."
        )
    changes: dict[str, Any] = {"base_model": base}
    defaults = {field.name: field.default for field in dataclasses.fields(FinetuneArguments)}
    for theirs, ours in FLAGS.items():
        value = plain(getattr(saved, theirs, defaults[ours]))
        asked = getattr(args, ours)
        asked = sorted(asked) if isinstance(asked, list) else asked
        if asked != defaults[ours] and asked != (sorted(value) if isinstance(value, list) else value):
            raise ValueError(
                f"base_model={args.base_model!r} is an adapter with {theirs}={value!r}, and training goes on with it, "
                f"so {ours}={asked!r} cannot be: leave it out, or train a new adapter with --base_model {base}."
            )
        changes[ours] = [value] if ours == "lora_target_modules" and isinstance(value, str) else value
    return dataclasses.replace(args, trainer=args.trainer, **changes), folder


def choose_layers(config: LoraConfig, base_model: str, model: PreTrainedModel) -> None:
    """Complete an adapter's config: PEFT's choice of layers if it names none, and none outside the text model.

    Only text is trained on, so that an adapter on what reads pictures would never learn.

    Raises:
        ValueError: if no layers are named, and PEFT has no choice for the model.
    """
    known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    kind, text_kind = model.config.model_type, model.config.get_text_config().model_type
    if config.target_modules is None and kind not in known:
        if text_kind not in known:
            raise ValueError(
                f"lora_target_modules: PEFT has no choice of layers for base_model={base_model!r}, "
                f"model_type={kind!r}; give --lora_target_modules all-linear, or names of layers."
            )
        config.target_modules = known[text_kind] if isinstance(known[text_kind], str) else set(known[text_kind])
    beside = beside_text(model)
    if beside:
        print(f"only text is trained on, so {', '.join(beside)} get no adapter")
        config.exclude_modules = rf"({'|'.join(map(re.escape, beside))})(\..*)?"


def beside_text(model: PreTrainedModel) -> list[str]:
    """Names of the parts of a model that stand beside its text model, such as those that read pictures."""
    text = model.config.get_text_config()
    inner = (name for name, module in model.named_modules() if type(getattr(module, "config", None)) is type(text))
    name = next(inner, "")  # of a model of text alone: itself
    above = ["", *itertools.accumulate(name.split("."), "{}.{}".format)] if name else []
    output = model.get_output_embeddings()
    return [
        f"{parent}.{child}".lstrip(".")
        for parent, path in itertools.pairwise(above)
        for child, module in model.get_submodule(parent).named_children()
        if f"{parent}.{child}".lstrip(".") != path and module is not output
    ]
