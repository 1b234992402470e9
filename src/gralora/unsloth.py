"""What Unsloth needs to train and decode with GraLoRA: its fused functions take lora_A and lora_B for matrices.

They leave layers with DoRA to PEFT's own forward, so they are told that GraLoRA layers are such; then the result is
exactly that of PEFT. The forwards that Unsloth writes in place of PEFT's call the factors of a grid, which are
modules. What reads the factors all the same, as merging does, is refused. `install` is called by `import gralora` and
imports nothing of Unsloth.
"""

import functools
import sys
from types import ModuleType
from typing import Any

from peft.tuners import lora
from torch import Tensor

from . import seam
from .after_import import after_import
from .blocks import GranularDown
from .layers import GraloraLayer


def install() -> None:
    after_import(seam.UNSLOTH, install_in_kernels)
    after_import(seam.UNSLOTH_COMPILER, install_in_compiler)


def install_in_kernels(module: ModuleType) -> None:
    """Wrap the functions by which Unsloth chooses, and reads, the layers that it fuses."""
    for name, wrap in ((seam.UNSLOTH_LEAVES, left_to_peft), *((name, refused) for name in seam.UNSLOTH_READS)):
        stock = getattr(module, name, None)
        if stock is not None:
            replace(stock, name, wrap(stock))


def install_in_compiler(module: ModuleType) -> None:
    """Mend the forwards that Unsloth has written, and those that it writes from now on."""
    write = getattr(module, seam.UNSLOTH_WRITES, None)
    if write is None:
        return

    @functools.wraps(write)
    def write_and_mend(*args: Any, **kwargs: Any) -> Any:
        written = write(*args, **kwargs)
        mend_forwards()
        return written

    setattr(module, seam.UNSLOTH_WRITES, write_and_mend)
    mend_forwards()


def mend_forwards() -> None:
    """Let written forwards compute a grid's update as PEFT's own do: by calling its factors."""
    for cls in (value for value in vars(lora).values() if isinstance(value, type)):
        names = getattr(getattr(cls, "forward", None), "__globals__", {})
        stock = names.get(seam.UNSLOTH_UPDATE)
        if stock is not None and not hasattr(stock, "__wrapped__"):
            names[seam.UNSLOTH_UPDATE] = of_matrices(stock)


def of_matrices(stock: Any) -> Any:
    @functools.wraps(stock)
    def lora_forward(result: Tensor, lora_A: Any, lora_B: Any, dropout: Any, x: Tensor, scaling: float) -> Tensor:
        if isinstance(lora_A, GranularDown):
            return result + lora_B(lora_A(dropout(x))) * scaling
        return stock(result, lora_A, lora_B, dropout, x, scaling)

    return lora_forward


def replace(stock: Any, name: str, wrapped: Any) -> None:
    """Put a function in the place of another, in all modules of Unsloth that have imported it."""
    for path, module in list(sys.modules.items()):
        if path.partition(".")[0] == "unsloth" and vars(module).get(name) is stock:
            setattr(module, name, wrapped)


def active_gralora(layer: Any) -> list[str]:
    """The GraLoRA adapters that a layer applies now."""
    if not isinstance(layer, GraloraLayer) or layer.disable_adapters or layer.merged:
        return []
    return [name for name in layer.active_adapters if layer.is_gralora(name)]


def left_to_peft(stock: Any) -> Any:
    @functools.wraps(stock)
    def is_left_to_peft(layer: Any, *args: Any, **kwargs: Any) -> Any:
        return bool(active_gralora(layer)) or stock(layer, *args, **kwargs)

    return is_left_to_peft


def refused(stock: Any) -> Any:
    @functools.wraps(stock)
    def get_parameters(layer: Any, *args: Any, **kwargs: Any) -> Any:
        names = active_gralora(layer)
        if names:
            raise ValueError(
                f"adapter {names[0]!r} is GraLoRA, whose factors Unsloth cannot compute with. To merge it, save it "
                "with model.save_pretrained(FOLDER) and run `gralora merge FOLDER OUT`; to train it, update Unsloth "
                "to 2026.10.9 or later, which then leaves these layers to PEFT."
            )
        return stock(layer, *args, **kwargs)

    return get_parameters
