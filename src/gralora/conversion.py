"""An adapter less what it was before training, for the original base weights: W_changed + dW = W + (dW - dW_0).

PiSSA, OLoRA, CorDA and LoRA-GA change the base weights, so their adapters belong to the changed ones. PEFT's
`save_pretrained(..., path_initial_model_for_weight_conversion=...)` writes the difference to the untrained adapter as
an adapter of twice the rank r. Here its grid gets the ranks of both, block by block, and its hybrid part stays as it
is, since that starts at zero.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .blocks import scaling_gain
from .embedding import GranularEmbedding


def less_initial(
    config: Any, layers: Mapping[str, Any], trained: Mapping[str, Tensor], initial: str
) -> dict[str, Tensor]:
    """The tensors of the difference: of grids that are joined, and all others as they are.

    Args:
        config: of both adapters.
        layers: the `GraloraLayer`s that have the untrained adapter, by the start of their tensors' names in `trained`.
        trained: what PEFT saves of the trained adapter.
        initial: name of the untrained adapter.

    Raises:
        ValueError: naming the layer, if the two adapters do not fit together, or PEFT's rank leaves none for the grid.
    """
    result = dict(trained)
    for where, layer in layers.items():
        A, _, _, _, _ = layer.factors(initial)
        k, r_g, h = A.shape[-3], A.shape[-1], config.hybrid_r
        if h % k:
            raise ValueError(
                f"path_initial_model_for_weight_conversion doubles r, and for {where!r} the rank that is left to the "
                f"grid, 2 * {r_g + h} - {h}, is not divisible by gralora_k={k}; save the adapter without. (It "
                "needs a hybrid_r that gralora_k divides.)"
            )
        gains = [scaling_gain(config.gralora_scaling, k, r, h) for r in (r_g, 2 * r_g + h)]
        is_embedding = isinstance(layer, GranularEmbedding)
        for name, rank_dim, sign in [("A", 0 if is_embedding else -1, 1), ("B", -1 if is_embedding else -2, -1)]:
            full = f"{where}.lora_embedding_{name}" if is_embedding else f"{where}.lora_{name}.weight"
            first = _of(layer, name, initial)
            if full not in trained or trained[full].shape != first.shape:
                raise ValueError(
                    f"the trained adapter has no {full!r} of shape {tuple(first.shape)}, as the initial has."
                )
            gain = gains[0] / gains[1] if name == "B" else 1.0
            first = (sign * first.detach()).to(trained[full])
            result[full] = _joined(trained[full], first, rank_dim, k, h if is_embedding else 0, h // k) * gain
            hybrid = f"{where}.lora_B.hybrid_weight"
            if name == "B" and hybrid in trained:
                result[hybrid] = trained[hybrid] * gain
    left = [name for name in trained if ".lora_A." in name and name.rpartition(".lora_A.")[0] not in layers]
    if left:
        raise ValueError(f"the initial adapter lacks {left[0]!r}, which the trained one has.")
    return result


def _of(layer: Any, name: str, adapter: str) -> Tensor:
    if isinstance(layer, GranularEmbedding):
        return getattr(layer, f"lora_embedding_{name}")[adapter]
    return getattr(layer, f"lora_{name}")[adapter].weight


def _joined(trained: Tensor, first: Tensor, dim: int, k: int, before: int, padding: int) -> Tensor:
    """A factor with the ranks of both in each of the k groups of its rank dimension, and zeros.

    Args:
        trained, first: the factors.
        dim: the rank dimension.
        k: blocks per side.
        before: how many ranks at the start of `trained` belong to no group, and stay.
        padding: number of ranks with zeros, in each group.
    """
    kept, grid = trained.split([before, trained.shape[dim] - before], dim)
    first = first.narrow(dim, before, grid.shape[dim])
    dim %= trained.ndim
    groups, firsts = grid.unflatten(dim, (k, -1)), first.unflatten(dim, (k, -1))
    zeros = groups.new_zeros(()).expand(*groups.shape[: dim + 1], padding, *groups.shape[dim + 2 :])
    return torch.cat([kept, torch.cat([groups, firsts, zeros], dim + 1).flatten(dim, dim + 1)], dim)
