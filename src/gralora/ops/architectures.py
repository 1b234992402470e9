"""The table of the kinds of devices: which modules of `gralora.ops` run there, and from which sizes on."""

from dataclasses import dataclass

import torch

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Architecture:
    """A kind of device: which modules of `gralora.ops` run there, and from which sizes on.

    Compared by identity, since it is looked up at every call.

    Attributes:
        name: of the kind, in words.
        capability: the least CUDA compute capability; the first row that a GPU reaches is its own.
        kernels: module that implements `interface.Kernels`, used for tensors of `dtypes`.
        product: module that implements `interface.Product`; empty if torch's product is all there is.
        fp8_product: module that implements `interface.Product` for FP8 weights; empty if the hardware multiplies none.
        dtypes: of x, that the two compute with.
        large: elements of x and y together from which the adapter's output is added inside of the layer's product,
            since a pass over y costs more than that saves.
        few_tokens: up to which one kernel computes the factors' gradients, since it costs the host one launch.
        most_kept: size of g, as a share of the size of x, from which a large layer's backward projects x down again
            instead of keeping g.
        called_features: input or output features from which a compiled layer is an operator that the graph calls,
            since its product then takes longer than the call.
    """

    name: str
    capability: tuple[int, int]
    kernels: str
    product: str = ""
    fp8_product: str = ""
    dtypes: tuple[torch.dtype, ...] = HALF
    large: float = 2**23
    few_tokens: int = 2048
    most_kept: float = 1 / 8
    called_features: float = 2048


# The sizes were measured on H100 and H200, also those of the other rows.
ARCHITECTURES = (
    Architecture("Blackwell or later", (10, 0), "kernels", fp8_product="fp8"),
    Architecture("Hopper", (9, 0), "kernels", product="hopper", fp8_product="fp8_hopper"),
    Architecture("Ada", (8, 9), "kernels", fp8_product="fp8"),
    Architecture("Ampere", (8, 0), "kernels"),
    Architecture("a GPU without kernels", (0, 0), "batched"),
)
NEVER = float("inf")
CPU = Architecture("no GPU", (0, 0), "batched", large=NEVER, called_features=NEVER)
