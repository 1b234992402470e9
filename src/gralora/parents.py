"""Modules of a model that hold several adapted layers, and compute these as one operation where they can.

`adapt` promotes such a module to an `mlp.AdaptedMlp` or a `siblings.SharingInput`, and makes it what it was once the
adapters are gone. Nothing of it is in a pickle or a file.

The environment variable GRALORA_BLOCKS=off lets all layers compute on their own.
"""

import os

from torch import nn

from .mlp import AdaptedMlp, is_mlp
from .promote import Promoted, demote, promote
from .siblings import SharingInput, shares_input

MIXINS = {AdaptedMlp: is_mlp, SharingInput: shares_input}  # the first that fits


def read_choice() -> bool:
    """Whether GRALORA_BLOCKS allows several layers as one operation; ValueError if it is neither on nor off."""
    value = os.environ.get("GRALORA_BLOCKS", "on")
    if value not in ("on", "off"):
        raise ValueError(f"GRALORA_BLOCKS={value!r} is not known; use on or off.")
    return value == "on"


allowed = read_choice()


def adapt(module: nn.Module) -> None:
    """After adapters of a module's layers came or went: let it compute them as one operation if it may be able to."""
    fitting = next((mixin for mixin, fits in MIXINS.items() if allowed and fits(module)), None)
    if isinstance(module, AdaptedMlp | SharingInput):
        if fitting is not None and isinstance(module, fitting):
            return
        demote(module)
    if fitting is not None and type(module).__call__ is nn.Module.__call__ and not isinstance(module, Promoted):
        promote(module, fitting)


def adapt_all(model: nn.Module) -> None:
    """`adapt` all modules of a model."""
    for module in model.modules():
        adapt(module)
