"""The factors of several adapters of one layer side by side, as the factors of one adapter that computes their sum."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .reference import Factors


def joined(adapters: Sequence[Factors]) -> list[Factors]:
    """As few adapters as can compute the sum of these: one for all that are plain or have the same number of blocks.

    Grids of the same k are one grid, whose sub-ranks are those of all of them. Plain LoRAs, plain parts and grids of
    one block are the plain part of the first grid. Gradients pass through to the adapters' own tensors.

    Args:
        adapters: of one layer, each with a number as its scaling.
    """
    if len(adapters) < 2:
        return list(adapters)
    scaling = adapters[0].scaling
    is_common = all(adapter.scaling == scaling for adapter in adapters)
    grids: dict[int, list[tuple[Tensor, Tensor]]] = {}
    plain: list[tuple[Tensor, Tensor]] = []
    for A, B, hybrid_A, hybrid_B, own in adapters:
        if not is_common:
            B, hybrid_B = B * own, None if hybrid_B is None else hybrid_B * own
        if A.dim() == 2:
            plain.append((A, B))
        elif A.shape[0] == 1:
            plain.append((A.squeeze(0).mT, B.squeeze(0).mT))
        else:
            grids.setdefault(A.shape[0], []).append((A, B))
        if hybrid_A is not None and hybrid_B is not None:
            plain.append((hybrid_A, hybrid_B))
    scaling = scaling if is_common else 1.0
    plain_A, plain_B = (_cat([pair[n] for pair in plain], n) if plain else None for n in (0, 1))
    if not grids:
        assert plain_A is not None and plain_B is not None
        return [Factors(plain_A, plain_B, scaling=scaling)]
    found = []
    for k, pairs in grids.items():
        A = _cat([A.unflatten(2, (k, -1)) for A, _ in pairs], 3).flatten(2)
        B = _cat([B.unflatten(1, (k, -1)) for _, B in pairs], 2).flatten(1, 2)
        found.append(Factors(A, B, plain_A, plain_B, scaling))
        plain_A = plain_B = None
    return found


def _cat(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)
