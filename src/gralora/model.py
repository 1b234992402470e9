"""The mixin over PEFT's LoraModel: operations on whole adapters that assume plain LoRA."""

import warnings
from typing import TYPE_CHECKING, Any

from peft.tuners import lora
from torch import Tensor

from . import parents
from .config import SUPPORTED_VARIANTS
from .conversion import less_initial
from .factors import pad_lora
from .fp8 import telling_losses
from .inits import changes_base
from .kinds import is_coarse, mixin_of
from .layers import GraloraLayer
from .ops.torch_seam import parameters_of
from .promote import Promoted
from .seam import MERGES_4_BITS
from .warned import without

# measured with nf4 and double quantisation: docs/quantized.md
COARSE = (
    "merging into weights of 4 bits rounds most of what was trained away (measured: a loss that training took from "
    "6.10 to 0.32 was 5.92 after it). Keep the adapter apart; or merge it into the original model, with `gralora "
    "merge ADAPTER OUT --base MODEL`."
)

if TYPE_CHECKING:

    class Stock(lora.LoraModel):
        """PEFT's class behind ours, as a type checker is to see it."""

        peft_config: dict[str, Any]
else:
    Stock = object


class GraloraModel(Promoted, Stock):
    """Mixin over PEFT's LoraModel, once it holds a GraLoRA adapter: operations on factors that assume plain LoRA."""

    def add_weighted_adapter(  # type: ignore[override]
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: Any = "svd",
        **kwargs: Any,
    ) -> None:
        """As PEFT's, with GraLoRA adapters taken as the plain LoRA of rank k * r_g + hybrid_r that they equal.

        The new adapter is a plain LoRA: "cat" is exact, the "svd" kinds combine the exact delta weights.

        Raises:
            ValueError: for combinations of factors element by element: their densities and signs would count the
                zeros of a grid, and factors of different grids do not correspond.
        """
        granular = [name for name in adapters if getattr(self.peft_config.get(name), "use_gralora", False)]
        if not granular:
            return super().add_weighted_adapter(adapters, weights, adapter_name, combination_type, **kwargs)
        if combination_type != "cat" and not combination_type.endswith("svd"):
            raise ValueError(
                f"combination_type={combination_type!r} combines factors element by element, which is not defined for "
                f"the GraLoRA adapter(s) {granular}; use 'cat' (exact), 'svd', or a kind that ends in '_svd'."
            )
        for field in SUPPORTED_VARIANTS:
            variants = [name for name in granular if getattr(self.peft_config[name], field)]
            if variants:
                raise ValueError(f"adapter(s) {variants} have {field}, which their combination would lose.")
        changed = [name for name in granular if changes_base(self.peft_config[name])]
        if changed:
            raise ValueError(
                f"adapter(s) {changed} belong to base weights that their initialisation has changed, and their "
                "combination would not; combine what save_pretrained writes of them with "
                "path_initial_model_for_weight_conversion."
            )
        biased = [name for name in granular if self.peft_config[name].lora_bias]
        if biased:
            raise ValueError(f"adapter(s) {biased} have lora_bias=True; the combination would lose their biases.")
        for name, layer in self.model.named_modules():
            if isinstance(layer, GraloraLayer) and layer.not_combinable and any(map(layer.is_gralora, granular)):
                raise ValueError(f"adapters of {name!r} cannot be combined: {layer.not_combinable}.")
        kwargs["svd_full_matrices"] = False  # the same leading vectors, and ranks above a layer's features work
        plain = {name: f"{name}_as_plain_lora" for name in granular}
        try:
            for name, plain_name in plain.items():
                self._add_as_plain_lora(name, plain_name)
            # PEFT copies the first one's config, and that of a plain rsLoRA adapter, or one with patterns, rescales
            order = sorted(range(len(adapters)), key=lambda i: adapters[i] not in plain)
            adapters, weights = [plain.get(adapters[i], adapters[i]) for i in order], [weights[i] for i in order]
            super().add_weighted_adapter(adapters, weights, adapter_name, combination_type, **kwargs)
        finally:
            for plain_name in plain.values():
                if plain_name in self.peft_config:
                    self.delete_adapter(plain_name)
        for layer in self.model.modules():
            if isinstance(layer, lora.LoraLayer) and adapter_name in layer.scaling:
                # where PEFT's SVD gave a lower rank: it cannot give more than a layer has features
                A, B = mixin_of(layer).plain_weights(layer, adapter_name)
                A.data, B.data = pad_lora(A.data, B.data, self.peft_config[adapter_name].r)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's.

        Raises:
            ValueError: if a function that knows only plain LoRA has written into the adapter's factors.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        for where, layer in self.model.named_modules():
            for name in names if isinstance(layer, GraloraLayer) else []:
                if layer.is_gralora(name) and name in layer.lora_A and layer.lora_A[name].weight.ndim == 2:
                    raise ValueError(
                        f"adapter {name!r} is GraLoRA, and its lora_A in {where!r} was overwritten by one of shape "
                        f"{tuple(layer.lora_A[name].weight.shape)}, a plain LoRA's (reduce_intruder_dimension does "
                        "this). Delete it, and work on a plain copy of the adapter that it was made of: "
                        "add_weighted_adapter([ADAPTER], [1.0], NEW, combination_type='cat')."
                    )
        super().set_adapter(adapter_name, inference_mode)

    def _check_merge_allowed(self) -> None:
        """As PEFT's; its own check of layer_replication looks for the field among the adapters' names.

        An output layer may share its weight with the embedding: what happens then is as with plain LoRA.
        """
        super()._check_merge_allowed()
        first: dict[tuple[int, type], tuple[str, Any]] = {}
        for where, layer in self.model.named_modules():
            base = layer.get_base_layer() if isinstance(layer, lora.LoraLayer) else None
            weight = None if base is None else parameters_of(base).get("weight")  # no property: HQQ's makes one anew
            if weight is not None:
                other, other_base = first.setdefault((id(weight), type(base)), (where, base))
                if other_base is not base:
                    raise ValueError(
                        f"the adapters of {other!r} and {where!r} cannot be merged: these layers share one weight "
                        "(layer_replication makes such layers), and each has an update of its own; use them unmerged."
                    )
        if any(isinstance(layer, GraloraLayer) and is_coarse(layer) for layer in self.model.modules()):
            warnings.warn(COARSE, stacklevel=3)  # at the caller of merge_adapter

    def delete_adapter(self, adapter_name: str) -> None:
        self._gralora_plan = None  # an adapter added under this name next is planned anew
        super().delete_adapter(adapter_name)
        parents.adapt_all(self.model)

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        with telling_losses(self.model), without(MERGES_4_BITS):
            super().merge_adapter(*args, **kwargs)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> Any:
        with telling_losses(self.model), without(MERGES_4_BITS):
            model = super().merge_and_unload(*args, **kwargs)
        parents.adapt_all(model)
        return model

    def unload(self) -> Any:
        model = super().unload()
        parents.adapt_all(model)
        return model

    def _add_as_plain_lora(self, adapter_name: str, plain_name: str) -> None:
        """Add a plain LoRA adapter with the delta weights of a GraLoRA adapter, of one rank for all layers."""
        layers = [m for m in self.model.modules() if isinstance(m, GraloraLayer) and m.is_gralora(adapter_name)]
        ranks = [layer.plain_lora(adapter_name)[0].shape[0] for layer in layers]
        self.peft_config[plain_name] = self.peft_config[adapter_name].as_plain_lora(max(ranks))
        self.inject_adapter(self.model, plain_name)
        for layer in layers:
            A, B = layer.plain_weights(layer, plain_name)
            lora_A, lora_B = layer.plain_lora(adapter_name, max(ranks))
            A.data, B.data = lora_A.detach(), lora_B.detach() * layer.factors(adapter_name).scaling

    def subtract_mutated_init(
        self, output_state_dict: dict[str, Tensor], adapter_name: str, kwargs: Any = None
    ) -> Any:
        """As PEFT's: the difference of an adapter to what it was before training, for the original base weights."""
        config = self.peft_config[adapter_name]
        if not getattr(config, "use_gralora", False):
            return super().subtract_mutated_init(output_state_dict, adapter_name, kwargs)
        if any(str(other.init_lora_weights).lower() == "loftq" for other in self.peft_config.values()):
            raise ValueError(
                "path_initial_model_for_weight_conversion gives an adapter for the original base weights, and what "
                "init_lora_weights='loftq' took from them in quantising is in no adapter; save it without."
            )
        layers = {
            f"base_model.model.{where}": layer
            for where, layer in self.model.named_modules()
            if isinstance(layer, GraloraLayer) and layer.is_gralora(adapter_name)
        }
        return less_initial(config, layers, output_state_dict, adapter_name)
