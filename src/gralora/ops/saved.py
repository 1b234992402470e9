"""What a backward needs of its forward, with parameters left where they are.

Gradient checkpointing and offloading hook every tensor that autograd saves; checkpointing takes the host some 12 us
for each, where all of a layer's forward takes 40. Parameters are in memory anyway. Other tensors are autograd's to
save, for hooks to drop: weights that were converted for autocast are as many as the model's.
"""

from typing import Any

from torch import Tensor
from torch.nn import Parameter


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """`ctx.save_for_backward`, but for parameters."""
    ctx.parameters = [(t, t._version) if type(t) is Parameter else None for t in tensors]
    ctx.save_for_backward(*[None if type(t) is Parameter else t for t in tensors])


def saved(ctx: Any) -> list[Any]:
    """What was given to `save`; RuntimeError, as autograd has it, if a parameter was changed since."""
    tensors = list(ctx.saved_tensors)
    for n, kept in enumerate(ctx.parameters):
        if kept is not None:
            parameter, version = kept
            if parameter._version != version:
                raise RuntimeError(
                    f"A parameter of shape {list(parameter.shape)} of an adapted layer has been modified by an "
                    f"inplace operation between forward and backward: it is at version {parameter._version}, expected "
                    f"{version}. Change it after the backward."
                )
            tensors[n] = parameter
    return tensors
