"""GraLoRA of embeddings, each seen as a linear map of one-hot token ids.

The input features are the `V` entries of the vocabulary, in `k` chunks of V/k consecutive ids. A token of chunk i has
h = A_i[token], `[r_g]`. The j-th sub-rank of h goes to place i of output block j, and the places of all other chunks
are zero. As in PEFT's LoRA, A starts at zero and B is drawn from the normal distribution.
"""

from typing import Any, NamedTuple

import torch
from peft.tuners import lora
from torch import Tensor, nn

from .fast_path import is_ordinary
from .layers import GraloraLayer
from .ops import Factors
from .ops.embedding import Lookup, definition, embedding_update
from .ops.torch_seam import has_hooks
from .seam import LoraVariant


class GranularEmbeddingVariant(LoraVariant):
    """One GraLoRA adapter of a `lora.Embedding`, which PEFT's class calls in place of its own arithmetic."""

    def __init__(self, hybrid_r: int) -> None:
        self.hybrid_r = hybrid_r

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        return result + module.update(active_adapter, x)

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return (orig_weight + module.get_delta_weight(active_adapter)).to(orig_weight.dtype)

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data += module.get_delta_weight(active_adapter)

    def unmerge(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return (orig_weight.data - module.get_delta_weight(active_adapter)).to(orig_weight.dtype)


class GranularEmbedding(GraloraLayer):
    """Mixin over PEFT's `lora.Embedding`, whose factors are parameters, not modules.

    `lora_embedding_A[adapter]` is `[r, k, V/k]` and `lora_embedding_B[adapter]` is `[k, O/k, r]`: PEFT's factors,
    split into blocks. The first hybrid_r of the r ranks are the plain LoRA, the others are the grid.
    """

    peft_class = lora.Embedding
    linear_factors = False
    drawn_by_fan_in = False

    def is_gralora(self, adapter_name: str) -> bool:
        return isinstance(self.lora_variant.get(adapter_name), GranularEmbeddingVariant)

    def read_factors(self, adapter_name: str, k: int, hybrid_r: int) -> None:
        """Split PEFT's factors into blocks; the elements stay where they are in memory."""
        A, B = self.lora_embedding_A[adapter_name], self.lora_embedding_B[adapter_name]
        self.lora_embedding_A[adapter_name] = nn.Parameter(A.detach().unflatten(1, (k, -1)), A.requires_grad)
        self.lora_embedding_B[adapter_name] = nn.Parameter(B.detach().unflatten(0, (k, -1)), B.requires_grad)
        self.lora_variant[adapter_name] = GranularEmbeddingVariant(hybrid_r)

    def factors(self, adapter: str) -> Factors:
        """View the factors as a linear layer's, with V input features."""
        A, B = self.lora_embedding_A[adapter], self.lora_embedding_B[adapter]
        hybrid_r = self.lora_variant[adapter].hybrid_r
        down, up = A[hybrid_r:].movedim(0, -1), B[..., hybrid_r:].mT
        hybrid = (A[:hybrid_r].flatten(1), B[..., :hybrid_r].flatten(0, 1)) if hybrid_r else (None, None)
        return Factors(down, up, hybrid[0], hybrid[1], self.scaling[adapter])

    def update(self, adapter: str, ids: Tensor) -> Tensor:
        """Compute the adapter's output `[..., O]`, scaling included, for token ids `[...]`."""
        A, B = self.lora_embedding_A[adapter], self.lora_embedding_B[adapter]
        return definition(ids, A, B, self.lookup(adapter))

    def lookup(self, adapter: str) -> Lookup:
        """What an adapter is beside its factors; Gemma's embeddings multiply by a factor in their forward."""
        base, hybrid_r = self.get_base_layer(), self.lora_variant[adapter].hybrid_r
        padding_idx = -1 if base.padding_idx is None else base.padding_idx
        return Lookup(hybrid_r, self.scaling[adapter], self._get_embed_scale(), padding_idx, base.scale_grad_by_freq)

    def as_weight(self, matrix: Tensor) -> Tensor:
        """`[O, V]` -> `[V, O]`."""
        return matrix.T

    def as_matrix(self, weight: Tensor) -> Tensor:
        """`[V, O]` -> `[O, V]`."""
        return weight.T

    @staticmethod
    def plain_weights(layer: Any, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]

    @classmethod
    def names_saved(cls, tensor: str, ndim: int) -> str:
        return "an embedding's factor" if ".lora_embedding_" in tensor else ""

    def fused_call(self, x: Tensor) -> "EmbeddingCall | None":  # type: ignore[override]
        """The operation that computes this layer for ids `[...]`, or None where PEFT's forward is needed."""
        if self.disable_adapters or self.merged or not is_ordinary(x) or torch.compiler.is_compiling():
            return None
        names = [name for name in self.active_adapters if name in self.lora_embedding_A]
        if not names or not all(map(self.is_gralora, names)):
            return None
        factors = [(self.lora_embedding_A[name], self.lora_embedding_B[name], self.lookup(name)) for name in names]
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        if any(t.dtype == torch.float64 for A, B, _ in factors for t in (A, B)):
            dtype = None  # autocast leaves it as it is
        if any(type(t) is not nn.Parameter for A, B, _ in factors for t in (A, B)):
            return None  # DTensors
        return EmbeddingCall(self.base_layer, factors, dtype)

    def mixed_output(self, x: Tensor, adapter_names: Any) -> None:
        return None

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        """Call PEFT's method, which ignores variants, and then add to the rows of GraLoRA adapters."""
        names = ["__base__" if self.is_gralora(name) else name for name in adapter_names]
        result = super()._mixed_batch_forward(x, *args, adapter_names=names, **kwargs)
        for adapter in filter(self.is_gralora, dict.fromkeys(adapter_names)):
            rows = torch.tensor([name == adapter for name in adapter_names], device=x.device)
            result[rows] += self.update(adapter, x[rows]).to(result.dtype)
        return result


class EmbeddingCall(NamedTuple):
    """One operation that computes an adapted embedding: `call(ids)` is the layer's output.

    Attributes:
        base: the base layer, which is called.
        adapters: A, B and the rest of each active adapter; each adds its output.
        dtype: what they are computed in; None for their own.
    """

    base: nn.Module
    adapters: list[tuple[Tensor, Tensor, Lookup]]
    dtype: torch.dtype | None

    @property
    def weight(self) -> None:
        """None, since the base layer is called: no operation of several layers takes this one in."""
        return None

    def __call__(self, ids: Tensor) -> Tensor:
        y = self.base(ids)
        if type(self.base).forward is not nn.Embedding.forward or has_hooks(self.base) or not y.is_contiguous():
            y = y.clone(memory_format=torch.contiguous_format)  # must be nobody else's, nor kept for the backward
        for A, B, lookup in self.adapters:
            y = embedding_update(y, ids, A, B, lookup, self.dtype)
        return y


def embedding_obstacle(base: Any) -> str:
    """Say in words why an embedding cannot be adapted; empty if it can."""
    if base.max_norm is not None:
        return f"with max_norm={base.max_norm}, which changes weights in the forward pass, so that no update is added"
    if base.sparse:
        return "with sparse=True; the gradients of its factors are not sparse"
    return ""
