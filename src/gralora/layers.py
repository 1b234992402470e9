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
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from . import blocks
from .blocks import GranularDown, GranularUp
from .config import SUPPORTED_VARIANTS, LoraConfig, auto_k
from .dora import GranularDora
from .experts import TargetParameter, param_wrapper, targeted_parameters
from .kinds import base_layer, check_fields, check_kind, keep_bias, keep_weights_unpacked, kind_of
from .ops import add_update, dispatch, gralora_linear
from .ops.factors import hybrid_to_lora, pad_lora

ARROW = (
    "Arrow (arrow_config) routes between plain LoRA adapters by their factors, and cannot be combined with GraLoRA "
    "adapters; `gralora export` makes plain ones of them."
)


class Promoted:
    """Base of the mixins. Promoted classes are made at run time, so they pickle by their mixin and PEFT's class."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _unpickle, type(self).__bases__, self.__dict__


class GraloraLayer(Promoted):
    """Mixin over one of PEFT's LoRA layer classes; its adapters may be GraLoRA, plain LoRA, or some of each.

    What it says of factors is about linear layers; kinds of layers that differ have a mixin of their own in front.
    """

    not_combinable = ""  # why PEFT's add_weighted_adapter is refused; empty if it is not

    def is_gralora(self, adapter_name: str) -> bool:
        return adapter_name in self.lora_B and isinstance(self.lora_B[adapter_name], GranularUp)

    def read_factors(self, adapter_name: str, k: int, hybrid_r: int, gain: float) -> None:
        """Make a GraLoRA of the plain LoRA that PEFT has just added; see `GranularDown.from_linear`."""
        A, B = self.lora_A[adapter_name], self.lora_B[adapter_name]
        down, up = GranularDown.from_linear(A, k, hybrid_r, gain), GranularUp.from_linear(B, k, hybrid_r)
        self.lora_A[adapter_name] = down.requires_grad_(A.weight.requires_grad)
        self.lora_B[adapter_name] = up.requires_grad_(B.weight.requires_grad)

    def tie_factors(self, adapter: str, embedding: Any) -> None:
        """Share the memory of a GraLoRA of the embedding whose weight is this output layer's, as PEFT's LoRA does.

        The transposed grid is a grid: its A are the embedding's B transposed, and the other way round.
        """
        down, up = embedding.factors(adapter)
        for factor, source in ((self.lora_A[adapter], up), (self.lora_B[adapter], down)):
            factor.weight = nn.Parameter(source.weight.detach().mT, factor.weight.requires_grad)
            if source.hybrid_weight is not None:
                factor.hybrid_weight = nn.Parameter(source.hybrid_weight.detach().T, factor.weight.requires_grad)

    def plain_lora(self, adapter: str, rank: int | None = None) -> tuple[Tensor, Tensor]:
        """A and B, in PEFT's layout, of the plain LoRA that it equals, of rank k * r_g + hybrid_r unless told more."""
        A, B = self.lora_A[adapter], self.lora_B[adapter]
        return hybrid_to_lora(A.weight, B.weight, A.hybrid_weight, B.hybrid_weight, rank)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's forward, or fewer operations that compute the same."""
        y = self._fused_forward(*args) if len(args) == 1 and not kwargs else None
        return super().forward(*args, **kwargs) if y is None else y

    def _fused_forward(self, x: Tensor) -> Tensor | None:
        """With one active adapter: base and adapter in one operation, or the adapter added to the base's output.

        None where PEFT's forward is needed.
        """
        if self._disable_adapters or self.merged_adapters or dispatch.choice == "reference" or not x.numel():
            return None
        modules = self._modules  # nn.Module's own lookup would cost as much as the arithmetic of a small layer
        downs, ups = modules["lora_A"]._modules, modules["lora_B"]._modules
        active = [name for name in self.active_adapters if name in downs]
        if len(active) != 1 or active[0] in self.lora_variant:
            return None
        name = active[0]
        A, B, dropout = downs[name], ups[name], modules["lora_dropout"]._modules[name]
        if type(A) is not GranularDown or type(B) is not GranularUp or B._parameters["bias"] is not None:
            return None
        if type(dropout) not in (nn.Identity, nn.Dropout) or _has_hooks(A) or _has_hooks(B) or _has_hooks(dropout):
            return None
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        A_weight, B_weight = A._parameters["weight"], B._parameters["weight"]
        if x.dtype == torch.float64 if autocast else not A_weight.dtype == B_weight.dtype == dtype:
            return None
        A_hybrid, B_hybrid = A._parameters["hybrid_weight"], B._parameters["hybrid_weight"]
        scaling = self.scaling[name] if B.gralora_scaling == "lora" else self.scaling[name] * B.gain
        if isinstance(scaling, Tensor):  # prepare_model_for_compiled_hotswap: a number would be compiled in
            B_weight, B_hybrid = B_weight * scaling, None if B_hybrid is None else B_hybrid * scaling
            scaling = 1.0
        p = dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0
        adapter = A_weight, B_weight, A_hybrid, B_hybrid, scaling, p

        base = modules["base_layer"]
        plain = _plain_weights(base)
        if plain is not None and (autocast or plain[0].dtype == dtype):
            weight, bias = (t if t is None or t.dtype == dtype else t.to(dtype) for t in plain)
            return gralora_linear(x.to(dtype), weight, bias, *adapter)
        if torch.compiler.is_compiling():
            return None
        y = base(x)
        if y._is_view() or not y.is_contiguous() or _has_hooks(base):
            y = y.clone()  # what is changed below must be nobody else's
        return add_update(y, x.to(dtype), *adapter)

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
            if name in self.scaling:
                if safe_merge and self.is_gralora(name) and not self.get_delta_weight(name).isfinite().all():
                    raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
                with keep_bias(self), warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "Already following adapters were merged")  # said once, above
                    super().merge(safe_merge=safe_merge, adapter_names=[name])

    def unmerge(self) -> None:
        with keep_bias(self):
            super().unmerge()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `peft.convert_to_lora` may take dW for all that the adapter does; it would lose DoRA and aLoRA."""
        if self.is_gralora(adapter_name) and adapter_name in self.lora_variant:
            return False
        return super().supports_lora_conversion(adapter_name)

    def resolve_lora_variant(self, *, config: peft.LoraConfig, **kwargs: Any) -> Any:
        """PEFT's choice of a variant for an adapter that is added; Arrow's router reads other adapters' factors."""
        if getattr(config, "arrow_config", None) is not None:
            raise ValueError(ARROW)
        return super().resolve_lora_variant(config=config, **kwargs)


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
        for field in SUPPORTED_VARIANTS:
            variants = [name for name in granular if getattr(self.peft_config[name], field)]
            if variants:
                raise ValueError(f"adapter(s) {variants} have {field}, which their combination would lose.")
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
                A, B = plain_weights(layer, adapter_name)
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
        first: dict[tuple[int, type], tuple[str, nn.Module]] = {}
        for where, layer in self.model.named_modules():
            base = layer.get_base_layer() if isinstance(layer, lora.LoraLayer) else None
            weight = getattr(base, "weight", None)
            if weight is not None:
                other, other_base = first.setdefault((id(weight), type(base)), (where, base))
                if other_base is not base:
                    raise ValueError(
                        f"the adapters of {other!r} and {where!r} cannot be merged: these layers share one weight "
                        "(layer_replication makes such layers), and each has an update of its own."
                    )

    def delete_adapter(self, adapter_name: str) -> None:
        self._gralora_plan = None  # an adapter added under this name next is planned anew
        super().delete_adapter(adapter_name)

    def _add_as_plain_lora(self, adapter_name: str, plain_name: str) -> None:
        """Add a plain LoRA adapter with the delta weights of a GraLoRA adapter, of one rank for all layers."""
        layers = [m for m in self.model.modules() if isinstance(m, GraloraLayer) and m.is_gralora(adapter_name)]
        ranks = [layer.plain_lora(adapter_name)[0].shape[0] for layer in layers]
        self.peft_config[plain_name] = self.peft_config[adapter_name].as_plain_lora(max(ranks))
        self.inject_adapter(self.model, plain_name)
        for layer in layers:
            A, B = plain_weights(layer, plain_name)
            lora_A, lora_B = layer.plain_lora(adapter_name, max(ranks))
            gain = layer.lora_B[adapter_name].gain if adapter_name in layer.lora_B else 1.0
            A.data, B.data = lora_A.detach(), lora_B.detach() * layer.scaling[adapter_name] * gain

    def subtract_mutated_init(
        self, output_state_dict: dict[str, Tensor], adapter_name: str, kwargs: Any = None
    ) -> Any:
        if getattr(self.peft_config[adapter_name], "use_gralora", False):
            raise ValueError(
                "path_initial_model_for_weight_conversion is for PiSSA, CorDA, OLoRA and LoRA-GA adapters; GraLoRA "
                "does not change the base weights, so save it without."
            )
        return super().subtract_mutated_init(output_state_dict, adapter_name, kwargs)


def plain_weights(layer: Any, adapter_name: str) -> tuple[nn.Parameter, nn.Parameter]:
    """A and B of a plain LoRA adapter."""
    if adapter_name in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
    return layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight


def _plain_weights(base: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight `[O, I]` and bias of a frozen nn.Linear or Conv1D without hooks; None for any other base layer."""
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    if type(weight) is not nn.Parameter or weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    if _has_hooks(base):
        return None
    if type(base).forward is nn.Linear.forward:
        return weight, bias
    return (weight.t(), bias) if type(base).forward is Conv1D.forward else None


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


@functools.cache
def promoted_class(*bases: type) -> type:
    """The subclass of PEFT's class, the last of `bases`, with mixins in front, the same object at every call."""
    name = bases[-1].__name__
    if name != "ParamWrapper":  # PEFT knows this one by its class's name
        name = f"Gralora{name}"
    return type(name, bases, {"__module__": __name__})


def promote(obj: Any, *mixins: type) -> None:
    """Make `obj` an instance of the mixins as well. Its state, and the behaviour of adapters it had, stay."""
    if not isinstance(obj, mixins):
        obj.__class__ = promoted_class(*mixins, type(obj))


def _unpickle(*bases: type) -> Any:
    promoted = promoted_class(*bases)
    return promoted.__new__(promoted)


def install() -> None:
    """Register GraLoRA with PEFT; see the module's docstring. Calling it again changes nothing."""
    if PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] is LoraConfig:
        return
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] = LoraConfig
    lora.LoraModel._create_and_replace = _with_gralora(lora.LoraModel._create_and_replace)
    CONFIG_KEYS_TO_CHECK[PeftType.LORA] += [
        "use_gralora",
        "gralora_k",
        "gralora_k_pattern",
        "hybrid_r",
        "gralora_scaling",
    ]


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
    config = plan(tuner, adapter_name, config)
    base = base_layer(target)
    if kwargs.get("parameter_name"):
        base = TargetParameter(base, kwargs["parameter_name"])
    else:  # with a state_dict, PEFT adapts layers that the config does not name
        check_layer(config, current_key, target, tuner.model)
    if isinstance(tuner, lora.LoraModel):
        promote(tuner, GraloraModel)
    tied = getattr(config, "target_modules_to_tie", None) or ()
    if target_name in tied:
        config.target_modules_to_tie = None  # PEFT would share the embedding's factors as those of a plain LoRA
    try:
        stock(tuner, config, adapter_name, target, target_name, parent, current_key=current_key, **kwargs)
    finally:
        if tied:
            config.target_modules_to_tie = tied

    layer = getattr(parent, target_name)
    if isinstance(base, TargetParameter):
        layer = param_wrapper(target, base.name) or param_wrapper(layer, base.name)  # had an adapter, or is new
    else:
        check_kind(current_key, layer, tuner.model)  # that PEFT chose the class that it was expected to
    k, hybrid_r = config.of_layer("gralora_k", current_key), config.hybrid_r
    gain = blocks.kaiming_gain(k, config.init_lora_weights)
    kind = kind_of(base)
    for part, mixin in [(layer, kind.mixin), *((getattr(layer.base_layer, n), m) for n, m in kind.inner.items())]:
        promote(part, *filter(None, [mixin]), GraloraLayer)
        part.read_factors(adapter_name, k, hybrid_r, gain)
        if adapter_name in part.lora_B:
            part.lora_B[adapter_name].gralora_scaling = config.gralora_scaling
    if config.use_dora:
        factors = layer.lora_A[adapter_name], layer.lora_B[adapter_name], layer.scaling[adapter_name]
        stock_dora = layer.lora_magnitude_vector[adapter_name]
        layer.lora_magnitude_vector[adapter_name] = GranularDora.from_linear(stock_dora, base, *factors)
    if target_name in tied:
        layer.tie_factors(adapter_name, tuner.model.get_input_embeddings())


def plan(tuner: BaseTuner, adapter_name: str, config: LoraConfig) -> LoraConfig:
    """Before the first layer is changed: check every targeted layer, and settle `gralora_k="auto"`.

    Returns:
        The config that the tuner has from now on: `config`, or a copy in which every layer's k is a number. The
        user's own keeps "auto", so that it can be used for other models.
    """
    config.check()  # fields may have been set since it was made
    if getattr(tuner, "_gralora_plan", (None, None))[:2] == (adapter_name, id(config)):
        return tuner.peft_config[adapter_name]
    if (getattr(tuner.model, "_tp_size", None) or 1) > 1:
        raise ValueError("GraLoRA does not support tensor-parallel base models (tp_plan); load the model without.")
    if any(getattr(other, "arrow_config", None) is not None for other in tuner.peft_config.values()):
        raise ValueError(ARROW)
    layers = dict(targeted_layers(tuner, config))
    for name, layer in layers.items():
        check_kind(name, layer, tuner.model)
    settled = settle_ks(config, {name: features(layer) for name, layer in layers.items()})
    for name, layer in layers.items():
        check_layer(settled, name, layer, tuner.model)
    keep_weights_unpacked(tuner.model)
    tuner.peft_config[adapter_name] = settled
    tuner._gralora_plan = (adapter_name, id(config))
    return settled


def check_layer(config: LoraConfig, name: str, layer: nn.Module | TargetParameter, model: nn.Module) -> None:
    """Raise ValueError, naming layer and field, if a layer cannot have such an adapter."""
    check_kind(name, layer, model)
    check_fields(name, layer, config)
    check_variant(config, name, layer)
    config.check_layer(name, *features(layer), what=kind_of(base_layer(layer)).name)


def check_variant(config: LoraConfig, name: str, layer: nn.Module | TargetParameter) -> None:
    """Raise ValueError, naming the layer, if it is not of a kind on which DoRA and aLoRA are tested with GraLoRA."""
    if config.use_dora and not hasattr(lora.LoraLayer, "_unmerged_base_weight"):  # which came with the right merging
        raise ValueError(
            "use_dora=True with use_gralora=True needs PEFT 0.21 or later: older ones merge DoRA wrongly into Conv1D "
            "layers, and beside other adapters."
        )
    base = base_layer(layer)
    plain = isinstance(base, nn.Linear | Conv1D) and type(base.weight) is nn.Parameter
    for field in SUPPORTED_VARIANTS:
        if getattr(config, field) and not plain:
            raise ValueError(
                f"{field}={getattr(config, field)!r} with use_gralora=True needs an nn.Linear or transformers' Conv1D "
                f"with an ordinary weight, and target module {name!r} is a {type(base).__name__} with a weight of "
                f"type {type(getattr(base, 'weight', None)).__name__}; leave {field} at its default, or take the "
                "module out of target_modules."
            )


def settle_ks(config: LoraConfig, layers: dict[str, tuple[int, int]]) -> LoraConfig:
    """The config with a number for every layer's k: with "auto" the best for its rank and features.

    Args:
        config: the user's.
        layers: name of each targeted layer -> its input and output features.

    Raises:
        ValueError: if there are none to choose "auto" for: PEFT takes the names of the layers from a state_dict.
    """
    if config.gralora_k == "auto" and not layers:
        raise ValueError(
            f"gralora_k='auto' depends on layers' features, and target_modules={config.target_modules!r} matches no "
            "layer of the model; give gralora_k as a number."
        )
    ks = {name: config.of_layer("gralora_k", name) for name in layers}
    chosen = [name for name, k in ks.items() if k == "auto"]
    for name in chosen:
        r = config.of_layer("r", name)
        ks[name] = auto_k(r, r - config.hybrid_r, *layers[name])
    plain = [name for name in chosen if ks[name] == 1]
    if plain:
        warnings.warn(
            f"gralora_k='auto' found no k > 1 that divides r - hybrid_r and the features of {len(plain)} of the "
            f"{len(layers)} targeted layers, e.g. {plain[0]!r} with in_features, out_features={layers[plain[0]]}: "
            "with k=1 they are plain LoRA.",
            stacklevel=2,
        )
    unused = {key for key in config.gralora_k_pattern if not any(get_pattern_key([key], n) == key for n in layers)}
    if unused:
        warnings.warn(f"gralora_k_pattern keys that match no targeted layer: {sorted(unused)}.", stacklevel=2)
    return config.settled(ks)


def targeted_layers(tuner: BaseTuner, config: LoraConfig) -> Iterator[tuple[str, nn.Module | TargetParameter]]:
    """Name and place of what PEFT will adapt, in its order; the inside of layers that have an adapter is skipped."""
    adapted: tuple[str, ...] = ()
    modules = []
    for name, module in tuner.model.named_modules():
        if not name or name.startswith(adapted):
            continue
        if isinstance(module, BaseTunerLayer):
            adapted += (f"{name}.",)
            if not isinstance(module, lora.ParamWrapper):
                modules.append(base_layer(module))
        match = tuner._check_target_module_exists(config, name)
        if match and not isinstance(match, _ExcludedModule):
            modules.append(base_layer(module))
            yield name, module
    for name, parameter in targeted_parameters(tuner.model, config.target_parameters):
        if any(parameter.module is module for module in modules):
            raise ValueError(
                f"target parameter {name!r} is of a {type(parameter.module).__name__} that is adapted as a module; "
                "take one of them out of target_parameters or target_modules ([] for none)."
            )
        yield name, parameter


def features(layer: nn.Module | TargetParameter) -> tuple[int, int]:
    """Input and output features of a supported layer, which may carry adapters already."""
    base = base_layer(layer)
    return base.features() if isinstance(base, TargetParameter) else _get_in_out_features(base)
