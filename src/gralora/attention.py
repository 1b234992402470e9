"""GraLoRA of nn.MultiheadAttention: its in-projection, one linear map E -> 3E to stacked q, k, v, and out-projection.

PEFT's `lora.MultiheadAttention` adds dW to both weights for the time of a forward pass, since torch reads the weights
and calls no module.
"""

from typing import Any

from torch import Tensor

from .layers import GraloraLayer
from .seam import MultiheadAttention, check_adapters_to_merge


class GranularAttention(GraloraLayer):
    """Mixin over PEFT's `lora.MultiheadAttention`, whose factors are those of the in-projection."""

    peft_class = MultiheadAttention
    not_combinable = "PEFT's plain LoRA on nn.MultiheadAttention adds the out-projection's dW twice"

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """False where adapters are to be added: nn.TransformerEncoderLayer else reads the weights, without calling."""
        return super()._qkv_same_embed_dim and (self.merged or self.disable_adapters)  # type: ignore[misc]

    def base_weight(self) -> Tensor:
        return self.get_base_layer().in_proj_weight

    def fused_call(self, x: Tensor) -> None:
        return None


class GranularOutProjection(GraloraLayer):
    """Mixin over the `lora.Linear` that PEFT puts around the out-projection of an attention module.

    `lora.MultiheadAttention` adds dW to the weight, differentiably, and then calls `merge` here, by which plain LoRA
    adds it a second time (PEFT 0.20 to 0.21.2). So for a GraLoRA adapter this only notes that it is merged.
    """

    @classmethod
    def names_saved(cls, tensor: str, ndim: int) -> str:
        return "a factor inside of an attention module" if ".base_layer.out_proj.lora_" in tensor else ""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        for name in check_adapters_to_merge(self, adapter_names):
            if self.is_gralora(name):
                self.merged_adapters.append(name)
            else:
                super().merge(safe_merge=safe_merge, adapter_names=[name])

    def unmerge(self) -> None:
        self.merged_adapters = [name for name in self.merged_adapters if not self.is_gralora(name)]
        if self.merged_adapters:
            super().unmerge()


def attention_obstacle(base: Any) -> str:
    """What keeps an attention module from being adapted, in words; empty if nothing does."""
    if not base._qkv_same_embed_dim:
        return f"with kdim={base.kdim} and vdim={base.vdim} other than embed_dim={base.embed_dim}"
    return ""
