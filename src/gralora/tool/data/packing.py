"""Several examples in one row of tokens, without padding, where no example sees another.

Positions start anew with each example. That is how transformers knows the examples apart where there is no attention
mask (`masking_utils.find_packed_sequence_indices`), and flash attention likewise; `check_packing` tries it.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening, PreTrainedModel

Row = dict[str, Any]  # `input_ids` and `labels` of one example
WINDOW = 1000  # examples that are packed at a time: enough that rows get full, few enough for a stream


def pack(rows: list[Row], length: int) -> list[dict[str, list[Row]]]:
    """Distribute examples over rows of at most `length` tokens: longest first, each into the fullest row it fits.

    Returns:
        Rows `{"documents": examples}`, in the order of their earliest examples; every example is in exactly one of
        them, and none is cut.
    """
    return [
        {"documents": row} for start in range(0, len(rows), WINDOW) for row in _pack(rows[start:][:WINDOW], length)
    ]


def _pack(rows: list[Row], length: int) -> list[list[Row]]:
    packs: list[list[int]] = []  # indices into rows
    room: list[int] = []
    sizes = [len(row["input_ids"]) for row in rows]
    for i in sorted(range(len(rows)), key=lambda i: -sizes[i]):
        fitting = [place for place, left in enumerate(room) if left >= sizes[i]]
        if not fitting:
            packs.append([])
            room.append(length)
            fitting = [len(packs) - 1]
        best = min(fitting, key=room.__getitem__)
        packs[best].append(i)
        room[best] -= sizes[i]
    return [[rows[i] for i in pack] for pack in sorted(packs, key=min)]


class PackingCollator(DataCollatorWithFlattening):
    """One row of tokens `[1, T]` of what `pack` yields, or of examples, with `labels` and `position_ids`."""

    def __call__(self, features: list[dict[str, Any]], **options: Any) -> dict[str, Tensor]:
        return super().__call__([row for one in features for row in one.get("documents", [one])], **options)


def check_packing(model: PreTrainedModel, base_model: str) -> None:
    """Raise ValueError if the first of two packed texts changes the model's logits for the second.

    Compared with how much it changes them in a text that is not packed, so that there is no tolerance to choose.
    """
    size = 8
    first, other, second = (
        torch.arange(size * i, size * (i + 1)) % model.get_input_embeddings().num_embeddings for i in (1, 2, 3)
    )
    packed, whole = torch.arange(size).repeat(2), torch.arange(2 * size)

    def logits(before: Tensor, positions: Tensor) -> Tensor:
        ids = torch.cat([before, second])[None].to(model.device)
        output = model(input_ids=ids, position_ids=positions[None].to(model.device), use_cache=False)
        return output.logits[0, size:].float()

    model.eval()
    with torch.no_grad():
        effect = {p: (logits(first, p) - logits(other, p)).norm() for p in (packed, whole)}
    if effect[packed] > 0.1 * effect[whole]:
        raise ValueError(
            f"packing=True: base_model={base_model!r} does not keep packed texts apart (of the effect that one text "
            f"has on the next, {effect[packed] / effect[whole]:.0%} remain); train without packing, or with another "
            "attn_implementation."
        )
