"""Write a saved adapter in another GraLoRA format."""

import os

from . import formats
from .adapter import Adapter
from .files import CONFIG, WEIGHTS, new_folder, read_adapter_folder, write_json, write_safetensors
from .prompting import copy_prompting


def convert_adapter(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str = "gralora",
    source: str | None = None,
) -> Adapter:
    """Write an adapter in another GraLoRA format: tensors are renamed, byte for byte, and the config is rewritten.

    Args:
        adapter: folder of the adapter, in any format of `gralora.checkpoints.formats.FORMATS`.
        out: folder to make.
        to: "gralora", or "peft" for PEFT's GRALORA, which stock PEFT loads from 0.19 on.
        source: format of `adapter`, needed only if its config leaves that open.

    Returns:
        The adapter as it was read, with notices of what was dropped.

    Raises:
        OSError, ValueError: if the input is missing, damaged or unclear, or `to` cannot express it.
    """
    read = formats.read(*read_adapter_folder(adapter), source=source)
    config, tensors = formats.write(read, to)
    with new_folder(out) as folder:
        write_safetensors(folder / WEIGHTS, tensors)
        write_json(folder / CONFIG, config)
        copy_prompting(adapter, folder)
    return read
