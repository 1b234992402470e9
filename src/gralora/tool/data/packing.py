"""Check that a model keeps the texts apart that TRL packs into one row.

Positions start anew with each text of a row. Without an attention mask, transformers
(`masking_utils.find_packed_sequence_indices`) and flash attention tell the texts apart by these positions. TRL assumes
that every model does.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel


def check_packing(model: PreTrainedModel, base_model: str) -> None:
    """Raise ValueError if the first of two packed texts changes the model's logits for the second.

    The change is compared with what the same tokens cause in an unpacked text, so no tolerance has to be chosen.
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
