"""The fields of TRL's SFTConfig, and so of transformers' TrainingArguments, as flags of `gralora finetune`."""

import dataclasses
import json
from typing import Any, get_type_hints

from trl import SFTConfig

# fields that have another name in FinetuneArguments
OURS = {"per_device_train_batch_size": "micro_batch_size", "max_length": "max_seq_length"}
OURS |= {"activation_checkpointing": "gradient_checkpointing"}
CHECKPOINTING = "activation_checkpointing"  # its name in newer transformers
if CHECKPOINTING not in {field.name for field in dataclasses.fields(SFTConfig)}:
    CHECKPOINTING = "gradient_checkpointing"
CHECKPOINTING_OPTIONS = {"activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"}
# fields that only a GPU can do -> what to do without
NEEDS_GPU = {"fp16": "use bf16 or neither", "activation_offloading": "a CPU's activations are in its memory already"}
NEEDS_GPU |= {"use_liger_kernel": "leave it out, since Liger's kernels are written in Triton"}
# fields that say how data become tokens, and which model is trained: both are done before the trainer gets them
OF_DATA = {"truncation_mode", "completion_only_loss", "assistant_only_loss", "chat_template_path"}
OF_DATA |= {"dataset_text_field", "model_init_kwargs", "trust_remote_code"}
SPLITTING = ("bfd_split", "wrapped")  # packing strategies that do not need texts cut beforehand


def same_names(arguments: type) -> set[str]:
    """The fields of SFTConfig that a dataclass of arguments has under the same name."""
    ours = {field.name for field in dataclasses.fields(arguments)}
    return {field.name for field in dataclasses.fields(SFTConfig)} & ours


def other_fields(arguments: type) -> dict[str, tuple[Any, dataclasses.Field[Any]]]:
    """Type and dataclass field of what SFTConfig has and a dataclass of arguments has not, by name."""
    hints, left_out = get_type_hints(SFTConfig), same_names(arguments) | set(OURS)
    fields = (field for field in dataclasses.fields(SFTConfig) if field.init and field.name not in left_out)
    return {field.name: (hints[field.name], field) for field in fields}


def other_flags(arguments: type) -> type:
    """A dataclass of the `other_fields`, for a parser of flags."""
    rows = []
    for name, (hint, field) in other_fields(arguments).items():
        default: dict[str, Any] = {"default": field.default}
        if field.default_factory is not dataclasses.MISSING:
            default = {"default_factory": field.default_factory}
        rows.append((name, hint, dataclasses.field(**default, metadata=field.metadata)))
    group = "fields of TRL's SFTConfig and transformers' TrainingArguments, under their own names"
    return dataclasses.make_dataclass("TrainerFlags", rows, namespace={"_argument_group_name": group})


def checkpointing_options(given: dict[str, Any], is_on: bool) -> dict[str, Any] | None:
    """What is asked for of gradient checkpointing, by either of its names; None where it is off.

    The reentrant kind, torch's default, needs an input with gradients, and a frozen model's has none.

    Args:
        given: fields of SFTConfig; those with options hold a dictionary, or one as JSON text.
        is_on: whether activations are checkpointed.

    Raises:
        ValueError: for options without checkpointing, and for selective checkpointing where TRL does not hand it on.
    """
    options: Any = next((given[name] for name in CHECKPOINTING_OPTIONS if given.get(name)), {})
    options = json.loads(options) if isinstance(options, str) else options
    if options and not is_on:
        raise ValueError(f"gradient_checkpointing_kwargs={options!r} needs gradient_checkpointing.")
    if options.get("selective") and CHECKPOINTING == "activation_checkpointing":
        raise ValueError(
            "gradient_checkpointing_kwargs={'selective': True}: this version of TRL does not hand it on to this "
            "version of transformers, which calls it activation checkpointing; leave it out."
        )
    return {"use_reentrant": False} | options if is_on else None
