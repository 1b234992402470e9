"""How GraLoRA plugs into PEFT. The only file on PEFT's private seams.

PEFT builds its own LoRA layer, of whatever class it chooses for the base layer; then that layer's class is promoted to
a subclass that knows the delta weight of a grid, and its factors are read as GraLoRA's. So an adapter never depends on
which kind of layer PEFT chose, on the order in which plain LoRA and GraLoRA adapters are added, or on who adds them.

`install` (called by `import gralora`) is all that changes in PEFT:

1. `PEFT_TYPE_TO_CONFIG_MAPPING[LORA]` is `gralora.LoraConfig`, so whatever loads a LoRA adapter can load GraLoRA;
2. `LoraModel._create_and_replace` hands configs with `use_gralora=True` to `create_and_replace` below;
3. hotswap's list of config fields that must agree gets GraLoRA's: it would put a grid's tensors into another layer.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from math import gcd
from typing import Any

import peft
import torch
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners import lora
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _ExcludedModule,
    _get_in_out_features,
    check_adapters_to_merge,
)
from peft.utils.hotswap import CONFIG_KEYS_TO_CHECK
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from . import blocks
from .blocks import GranularDown, GranularUp
from .config import LoraConfig, auto_k, divisors
from .kinds import base_layer, check_kind, keep_bias, keep_weights_unpacked
from .ops import dispatch, gralora_linear
from .ops.factors import hybrid_to_lora, pad_lora


class Promoted:
    """Base of the mixins. Promoted classes are made at run time, so they pickle by their mixin and PEFT's class."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _unpickle, type(self).__bases__, self.__dict__


class GraloraLayer(Promoted):
    """Mixin over one of PEFT's LoRA layer classes; its adapters may be GraLoRA, plain LoRA, or some of each."""

    def is_gralora(self, adapter_name: str) -> bool:
        return adapter_name in self.lora_B and isinstance(self.lora_B[adapter_name], GranularUp)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's forward, or base and adapter in one operation where that computes the same."""
        operands = None if args or kwargs else self._fusible_operands(x)
        return super().forward(x, *args, **kwargs) if operands is None else gralora_linear(*operands)

    def _fusible_operands(self, x: Tensor) -> tuple[Any, ...] | None:
        """The arguments of `gralora_linear` if that is all there is to do, else None.

        That is: one active adapter, a plain frozen base layer without hooks, and one dtype for base and adapter.
        """
        if self._disable_adapters or self.merged_adapters or dispatch.choice == "reference" or not x.numel():
            return None
        modules = self._modules  # nn.Module's own lookup would cost as much as the arithmetic of a small layer
        downs, ups = modules["lora_A"]._modules, modules["lora_B"]._modules
        active = [name for name in self.active_adapters if name in downs]
        if len(active) != 1:
            return None
        name, base = active[0], modules["base_layer"]
        A, B, dropout = downs[name], ups[name], modules["lora_dropout"]._modules[name]
        if type(A) is not GranularDown or type(B) is not GranularUp or B._parameters["bias"] is not None:
            return None
        if type(dropout) not in (nn.Identity, nn.Dropout):
            return None
        if _has_hooks(base) or _has_hooks(A) or _has_hooks(B) or _has_hooks(dropout):
            return None
        weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
        if type(weight) is not nn.Parameter or weight.requires_grad or (bias is not None and bias.requires_grad):
            return None
        transposed = type(base).forward is Conv1D.forward
        if not transposed and type(base).forward is not nn.Linear.forward:
            return None
        A_weight, B_weight = A._parameters["weight"], B._parameters["weight"]
        A_hybrid, B_hybrid = A._parameters["hybrid_weight"], B._parameters["hybrid_weight"]

        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            if dtype == torch.float64:
                return None
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        elif not weight.dtype == A_weight.dtype == B_weight.dtype == dtype:
            return None
        scaling = self.scaling[name]
        if isinstance(scaling, Tensor):  # prepare_model_for_compiled_hotswap: a number would be compiled in
            B_weight, B_hybrid = B_weight * scaling, None if B_hybrid is None else B_hybrid * scaling
            scaling = 1.0
        weight = weight.t() if transposed else weight
        dropped = dropout(x) if dropout.training and type(dropout) is nn.Dropout else None
        return x, weight, bias, A_weight, B_weight, A_hybrid, B_hybrid, scaling, dropped

    def get_delta_weight(self, adapter: str) -> Tensor:
        """dW of one adapter, scaling included, in the layout of the base weight (`[out, in]`, Conv1D: `[in, out]`).

        A GraLoRA adapter of half precision gives float32, so that adding it to a weight rounds once.
        """
        if not self.is_gralora(adapter):
            return super().get_delta_weight(adapter)
        dW = blocks.delta_weight(self.lora_A[adapter], self.lora_B[adapter], self.scaling[adapter])
        return dW.T if getattr(self, "fan_in_fan_out", False) else dW  # not all of PEFT's classes have it

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """PEFT's, one adapter at a time: some of its classes fail on a second one, or on one that a layer lacks.

        Raises:
            ValueError: with safe_merge, if the result would not be finite; not all of PEFT's classes look.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.lora_A:
                if safe_merge and self.is_gralora(name) and not self.get_delta_weight(name).isfinite().all():
                    raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
                with keep_bias(self), warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "Already following adapters were merged")  # said once, above
                    super().merge(safe_merge=safe_merge, adapter_names=[name])

    def unmerge(self) -> None:
        with keep_bias(self):
            super().unmerge()


class GraloraModel(Promoted):
    """Mixin over PEFT's LoraModel, once it holds a GraLoRA adapter: operations on factors that assume plain LoRA."""

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
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
        biased = [name for name in granular if self.peft_config[name].lora_bias]
        if biased:
            raise ValueError(f"adapter(s) {biased} have lora_bias=True; the combination would lose their biases.")
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
            if isinstance(layer, lora.LoraLayer) and adapter_name in layer.lora_A:
                # where PEFT's SVD gave a lower rank: it cannot give more than a layer has features
                A, B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
                A.data, B.data = pad_lora(A.data, B.data, self.peft_config[adapter_name].r)

    def delete_adapter(self, adapter_name: str) -> None:
        self._gralora_plan = None  # an adapter added under this name next is planned anew
        super().delete_adapter(adapter_name)

    def _add_as_plain_lora(self, adapter_name: str, plain_name: str) -> None:
        """Add a plain LoRA adapter with the delta weights of a GraLoRA adapter, of one rank for all layers."""
        layers = [m for m in self.model.modules() if isinstance(m, GraloraLayer) and m.is_gralora(adapter_name)]
        ranks = [layer.lora_A[adapter_name].lora_rank for layer in layers]
        self.peft_config[plain_name] = self.peft_config[adapter_name].as_plain_lora(max(ranks))
        self.inject_adapter(self.model, plain_name)
        for layer in layers:
            A, B = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
            A_lora, B_lora = hybrid_to_lora(A.weight, B.weight, A.hybrid_weight, B.hybrid_weight, max(ranks))
            layer.lora_A[plain_name].weight.data = A_lora.detach()
            layer.lora_B[plain_name].weight.data = B_lora.detach() * layer.scaling[adapter_name]

    def subtract_mutated_init(
        self, output_state_dict: dict[str, Tensor], adapter_name: str, kwargs: Any = None
    ) -> Any:
        if getattr(self.peft_config[adapter_name], "use_gralora", False):
            raise ValueError(
                "path_initial_model_for_weight_conversion is for PiSSA, CorDA, OLoRA and LoRA-GA adapters; GraLoRA "
                "does not change the base weights, so save it without."
            )
        return super().subtract_mutated_init(output_state_dict, adapter_name, kwargs)


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


@functools.cache
def promoted_class(mixin: type[Promoted], cls: type) -> type:
    """The subclass of `cls` with `mixin` in front, the same object at every call."""
    return type(f"Gralora{cls.__name__}", (mixin, cls), {"__module__": __name__})


def promote(obj: Any, mixin: type[Promoted]) -> None:
    """Make `obj` an instance of `mixin` as well. Its state, and the behaviour of adapters it had, stay."""
    if not isinstance(obj, mixin):
        obj.__class__ = promoted_class(mixin, type(obj))


def _unpickle(mixin: type[Promoted], cls: type) -> Any:
    promoted = promoted_class(mixin, cls)
    return promoted.__new__(promoted)


def install() -> None:
    """Register GraLoRA with PEFT; see the module's docstring. Calling it again changes nothing."""
    if PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] is LoraConfig:
        return
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] = LoraConfig
    lora.LoraModel._create_and_replace = _with_gralora(lora.LoraModel._create_and_replace)
    CONFIG_KEYS_TO_CHECK[PeftType.LORA] += ["use_gralora", "gralora_k", "hybrid_r"]


def _with_gralora(stock: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(stock)
    def _create_and_replace(self: BaseTuner, lora_config: peft.LoraConfig, *args: Any, **kwargs: Any) -> None:
        if getattr(lora_config, "use_gralora", False):
            create_and_replace(stock, self, lora_config, *args, **kwargs)
        else:
            stock(self, lora_config, *args, **kwargs)

    return _create_and_replace


def create_and_replace(
    stock: Callable[..., None],
    tuner: BaseTuner,
    config: LoraConfig,
    adapter_name: str,
    target: nn.Module,
    target_name: str,
    parent: nn.Module,
    current_key: str,
    **kwargs: Any,
) -> None:
    """Add a GraLoRA adapter to one layer: PEFT adds a plain LoRA, whose factors then become a grid's.

    Args:
        stock: PEFT's own `LoraModel._create_and_replace`; the other arguments are its.

    Raises:
        ValueError: before anything is changed, if a targeted layer does not fit the config.
    """
    plan(tuner, adapter_name, config)
    check_kind(current_key, target, tuner.model)  # with a state_dict, PEFT adapts layers that the config does not name
    check_features(config, current_key, target)
    if isinstance(tuner, lora.LoraModel):
        promote(tuner, GraloraModel)
    stock(tuner, config, adapter_name, target, target_name, parent, current_key=current_key, **kwargs)

    layer = getattr(parent, target_name)
    check_kind(current_key, layer, tuner.model)  # that PEFT chose the class that it was expected to
    promote(layer, GraloraLayer)
    A, B = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    k, hybrid_r = config.gralora_k, config.hybrid_r
    gain = blocks.kaiming_gain(k, config.init_lora_weights)
    layer.lora_A[adapter_name] = GranularDown.from_linear(A, k, hybrid_r, gain).requires_grad_(A.weight.requires_grad)
    layer.lora_B[adapter_name] = GranularUp.from_linear(B, k, hybrid_r).requires_grad_(B.weight.requires_grad)


def plan(tuner: BaseTuner, adapter_name: str, config: LoraConfig) -> None:
    """Before the first layer is changed: check every targeted layer, and settle `gralora_k="auto"` for all of them."""
    config.check()  # fields may have been set since it was made
    if getattr(tuner, "_gralora_plan", None) == (adapter_name, id(config)):
        return
    if (getattr(tuner.model, "_tp_size", None) or 1) > 1:
        raise ValueError("GraLoRA does not support tensor-parallel base models (tp_plan); load the model without.")
    layers = dict(targeted_layers(tuner, config))
    for name, layer in layers.items():
        check_kind(name, layer, tuner.model)
    if config.gralora_k == "auto":
        sizes = [size for layer in layers.values() for size in features(layer)]
        config.gralora_k = auto_k(config.r, *sizes, *(r - config.hybrid_r for r in config.ranks().values()))
        if config.gralora_k == 1:
            warnings.warn(
                f"gralora_k='auto' found no k > 1 that divides r - hybrid_r={config.r - config.hybrid_r} and the "
                f"features of all {len(layers)} targeted layers: with k=1 this is plain LoRA.",
                stacklevel=2,
            )
    for name, layer in layers.items():
        check_features(config, name, layer)
    keep_weights_unpacked(tuner.model)
    tuner._gralora_plan = (adapter_name, id(config))


def targeted_layers(tuner: BaseTuner, config: LoraConfig) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of what PEFT will adapt, in its order; the inside of layers that have an adapter is skipped."""
    adapted: tuple[str, ...] = ()
    for name, module in tuner.model.named_modules():
        if not name or name.startswith(adapted):
            continue
        if isinstance(module, BaseTunerLayer):
            adapted += (f"{name}.",)
        match = tuner._check_target_module_exists(config, name)
        if match and not isinstance(match, _ExcludedModule):
            yield name, module


def features(layer: nn.Module) -> tuple[int, int]:
    """Input and output features of a supported layer, which may carry adapters already."""
    return _get_in_out_features(base_layer(layer))


def check_features(config: LoraConfig, name: str, layer: nn.Module) -> None:
    """Raise ValueError, naming the layer and the ks that work, if k does not divide its features."""
    k, (in_features, out_features) = config.gralora_k, features(layer)
    if in_features % k or out_features % k:
        raise ValueError(
            f"gralora_k={k} must divide the features of target module {name!r}, which has in_features={in_features} "
            f"and out_features={out_features}; use one of gralora_k={divisors(gcd(in_features, out_features))}, "
            "'auto', or leave the module out of target_modules."
        )
