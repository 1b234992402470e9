"""GraLoRA of nn.MultiheadAttention: of its in-projection, one linear map E -> 3E, and of its out-projection.

The output of the in-projection is q, k and v, stacked. PEFT's `lora.MultiheadAttention` adds dW to both weights during
a forward pass, since torch reads the weights without calling a module.
"""

from typing import Any

from torch import Tensor

from .layers import GraloraLayer
from .seam import MultiheadAttention, check_adapters_to_merge


class GranularAttention(GraloraLayer):
    """Mixin over PEFT's `lora.MultiheadAttention`, whose own factors adapt the in-projection."""

    peft_class = MultiheadAttention
    not_combinable = "PEFT's plain LoRA on nn.MultiheadAttention adds the out-projection's dW twice"

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """False while adapters are active, so that nn.TransformerEncoderLayer calls this module, not its fast path."""
        return super()._qkv_same_embed_dim and (self.merged or self.disable_adapters)  # type: ignore[misc]

    def base_weight(self) -> Tensor:
        return self.get_base_layer().in_proj_weight

    def fused_call(self, x: Tensor) -> None:
        return None


class GranularOutProjection(GraloraLayer):
    """Mixin over the `lora.Linear` that PEFT puts around the out-projection of an attention module.

    `lora.MultiheadAttention` adds dW to the weight, differentiably, and then calls `merge` here. For a plain LoRA
    that adds dW a second time (PEFT 0.20 to 0.21.2). For a GraLoRA adapter `merge` therefore only records the merge.
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
    """Say in words why an attention module cannot be adapted; empty if it can."""
    if not base._qkv_same_embed_dim:
        return f"with kdim={base.kdim} and vdim={base.vdim} other than embed_dim={base.embed_dim}"
    return ""
