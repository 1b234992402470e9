"""Keep what a backward needs of its forward, without giving parameters to autograd to save.

Gradient checkpointing and offloading hook every tensor that autograd saves; checkpointing takes the host some 12 us
for each, where all of a layer's forward takes 40. Parameters are in memory anyway. All other tensors are saved by
autograd, so that hooks can drop them: weights that were converted for autocast would take as much as the model.
"""

from typing import Any

from torch import Tensor
from torch.nn import Parameter

from .torch_seam import version_of


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """Save tensors for the backward: parameters beside `ctx.save_for_backward`, all others with it."""
    ctx.parameters = [(t, version_of(t)) if type(t) is Parameter else None for t in tensors]
    ctx.save_for_backward(*[None if type(t) is Parameter else t for t in tensors])


def saved(ctx: Any) -> list[Any]:
    """Return what was given to `save`; RuntimeError, as autograd raises it, if a parameter was changed since."""
    tensors = list(ctx.saved_tensors)
    for n, kept in enumerate(ctx.parameters):
        if kept is not None:
            parameter, version = kept
            now = version_of(parameter)
            if now != version:
                raise RuntimeError(
                    f"A parameter of shape {list(parameter.shape)} of an adapted layer has been modified by an "
                    f"inplace operation between forward and backward: it is at version {now}, expected "
                    f"{version}. Change it after the backward."
                )
            tensors[n] = parameter
    return tensors
