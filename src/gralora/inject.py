"""How GraLoRA plugs into PEFT: the registrations, and how an adapter gets into a model.

PEFT builds its own LoRA layer, of whatever class it chooses for the base layer; then that layer's class is promoted to
a subclass that knows the delta weight of a grid, and its factors are read as GraLoRA's. So an adapter never depends on
which kind of layer PEFT chose, on the order in which plain LoRA and GraLoRA adapters are added, or on who adds them.

`install` (called by `import gralora`) is all that changes in PEFT:

1. `PEFT_TYPE_TO_CONFIG_MAPPING[LORA]` is `gralora.LoraConfig`, so whatever loads a LoRA adapter can load GraLoRA;
2. `LoraModel._create_and_replace` hands configs with `use_gralora=True` to `create_and_replace` below, and new layers
   of models that are accelerated to acceleration.py;
3. hotswap's list of config fields that must agree gets GraLoRA's: it would put a grid's tensors into another layer;
4. what diffusers asks of PEFT beside that, in diffusion.py;
5. model cards say that gralora is needed, in cards.py;
6. PEFT's EVA finds and writes the components of chunks, in eva.py.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftType
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from . import acceleration, cards, diffusion, eva, parents, unsloth
from .config import SUPPORTED_VARIANTS, LoraConfig, auto_k, names
from .dora import GranularDora
from .experts import TargetParameter, param_wrapper, pefts_own_features, targeted_parameters
from .inits import Target, changes_base, check_model, check_target, find
from .kinds import base_layer, check_fields, check_kind, keep_weights_unpacked, kind_of
from .layers import ARROW
from .model import GraloraModel
from .promote import promote
from .seam import (
    CONFIG_KEYS_TO_CHECK,
    MERGES_DORA,
    PEFT_TYPE_TO_CONFIG_MAPPING,
    Conv1D,
    get_pattern_key,
    in_out_features,
    is_targeted,
    wrap_create_and_replace,
)


def install() -> None:
    """Register GraLoRA with PEFT; see the module's docstring. Calling it again changes nothing."""
    if PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] is LoraConfig:
        return
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] = LoraConfig
    wrap_create_and_replace(_with_gralora)
    compared = names(lambda facts: facts.hotswap)  # the first that differs is named
    CONFIG_KEYS_TO_CHECK[PeftType.LORA] += sorted(compared, key=lambda name: (name != "use_gralora", name))
    diffusion.install()
    eva.install()
    unsloth.install()
    cards.install()


def _with_gralora(stock: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(stock)
    def _create_and_replace(
        self: BaseTuner,
        lora_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        **kwargs: Any,
    ) -> None:
        place = target, target_name, parent
        if getattr(lora_config, "use_gralora", False):
            create_and_replace(stock, self, lora_config, adapter_name, *place, **kwargs)
        else:
            stock(self, lora_config, adapter_name, *place, **kwargs)
        acceleration.cover(self.model, lora_config, getattr(parent, target_name))
        parents.adapt(parent)

    return _create_and_replace


def create_and_replace(
    stock: Callable[..., None],
    tuner: Any,
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
    init = find(config.init_lora_weights)
    assert init is not None  # by config.check()
    tied = target_name in (getattr(config, "target_modules_to_tie", None) or ())
    # PEFT would share a tied embedding's factors as those of a plain LoRA
    for_peft = {"init_lora_weights": init.drawn} | ({"target_modules_to_tie": None} if tied else {})
    try:
        with _fields(config, for_peft), pefts_own_features():
            stock(tuner, config, adapter_name, target, target_name, parent, current_key=current_key, **kwargs)
    except BaseException:
        tuner._gralora_plan = None  # the next attempt is planned anew: model and config may be others by then
        raise

    layer = getattr(parent, target_name)
    if isinstance(base, TargetParameter):
        layer = param_wrapper(target, base.name) or param_wrapper(layer, base.name)  # had an adapter, or is new
    else:
        check_kind(current_key, layer, tuner.model)  # that PEFT chose the class that it was expected to
    k, kind = config.of_layer("gralora_k", current_key), kind_of(base)
    for part, mixin in [(layer, kind.mixin), *((getattr(layer.base_layer, n), m) for n, m in kind.inner.items())]:
        promote(part, mixin)
        part.draw_again(adapter_name, init.drawn)
        part.read_factors(adapter_name, k, config.hybrid_r)
        if adapter_name in part.lora_B:
            part.lora_B[adapter_name].gralora_scaling = config.gralora_scaling
        init.fill(part, adapter_name, config)
        part.changed_for = part.changed_for - {adapter_name} | ({adapter_name} if init.changes_base else set())
    if config.use_dora:
        factors = layer.lora_A[adapter_name], layer.lora_B[adapter_name], layer.scaling[adapter_name]
        stock_dora = layer.lora_magnitude_vector[adapter_name]
        layer.lora_magnitude_vector[adapter_name] = GranularDora.from_linear(stock_dora, base, *factors)
    if tied:
        layer.tie_factors(adapter_name, tuner.model.get_input_embeddings())


@contextmanager
def _fields(config: LoraConfig, values: dict[str, Any]) -> Iterator[None]:
    """Give fields of a config other values for a while."""
    before = {name: getattr(config, name) for name in values}
    vars(config).update(values)
    try:
        yield
    finally:
        vars(config).update(before)


def plan(tuner: Any, adapter_name: str, config: LoraConfig) -> LoraConfig:
    """Before the first layer is changed: check every targeted layer, and settle `gralora_k="auto"`.

    Returns:
        The config that the tuner has from now on: `config`, or a copy in which every layer's k is a number. The
        user's own keeps "auto", so that it can be used for other models.
    """
    config.check()  # fields may have been set since it was made
    planned = getattr(tuner, "_gralora_plan", None)  # held, so that no other config can be taken for it
    if planned is not None and planned[0] == adapter_name and planned[1] is config:
        return tuner.peft_config[adapter_name]
    if (getattr(tuner.model, "_tp_size", None) or 1) > 1:
        raise ValueError("GraLoRA does not support tensor-parallel base models (tp_plan); load the model without.")
    if any(getattr(other, "arrow_config", None) is not None for other in tuner.peft_config.values()):
        raise ValueError(ARROW)
    layers = dict(targeted_layers(tuner.model, config))
    for name, layer in layers.items():
        check_kind(name, layer, tuner.model)
    settled = settle_ks(config, {name: features(layer) for name, layer in layers.items()})
    for name, layer in layers.items():
        check_layer(settled, name, layer, tuner.model)
    weights = {} if not changes_base(config) else {name: weight_of(layer) for name, layer in layers.items()}
    check_model(tuner.model, settled, weights, tuner.peft_config.keys() - {adapter_name})
    keep_weights_unpacked(tuner.model)
    tuner.peft_config[adapter_name] = settled
    tuner._gralora_plan = (adapter_name, config)
    return settled


def check_layer(config: LoraConfig, name: str, layer: nn.Module | TargetParameter, model: nn.Module) -> None:
    """Raise ValueError, naming layer and field, if a layer cannot have such an adapter."""
    check_kind(name, layer, model)
    check_fields(name, layer, config)
    check_variant(config, name, layer)
    base, sizes = base_layer(layer), features(layer)
    config.check_layer(name, *sizes, what=kind_of(base).name)
    k, r, alpha = (config.of_layer(field, name) for field in ("gralora_k", "r", "lora_alpha"))
    check_target(name, Target(config, base, kind_of(base).quantised, k, r, min(sizes), alpha))


def check_variant(config: LoraConfig, name: str, layer: nn.Module | TargetParameter) -> None:
    """Raise ValueError, naming the layer, if it is not of a kind on which DoRA and aLoRA are tested with GraLoRA."""
    if config.use_dora and not MERGES_DORA:
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


def targeted_layers(model: nn.Module, config: LoraConfig) -> Iterator[tuple[str, nn.Module | TargetParameter]]:
    """Name and place of what PEFT will adapt, in its order; the inside of layers that have an adapter is skipped."""
    adapted: tuple[str, ...] = ()
    modules = []
    for name, module in model.named_modules():
        if not name or name.startswith(adapted):
            continue
        if isinstance(module, BaseTunerLayer):
            adapted += (f"{name}.",)
            if not isinstance(module, lora.ParamWrapper):
                modules.append(base_layer(module))
        if is_targeted(config, name):
            modules.append(base_layer(module))
            yield name, module
    for name, parameter in targeted_parameters(model, config.target_parameters):
        if any(parameter.module is module for module in modules):
            raise ValueError(
                f"target parameter {name!r} is of a {type(parameter.module).__name__} that is adapted as a module; "
                "take one of them out of target_parameters or target_modules ([] for none)."
            )
        yield name, parameter


def weight_of(layer: nn.Module | TargetParameter) -> Any:
    """The parameter that an adapter of a supported layer adds to; of attention, that of the in-projection."""
    base = base_layer(layer)
    if isinstance(base, TargetParameter):
        return base.value
    return base.in_proj_weight if isinstance(base, nn.MultiheadAttention) else base.weight


def features(layer: nn.Module | TargetParameter) -> tuple[int, int]:
    """Input and output features of a supported layer, which may carry adapters already."""
    base = base_layer(layer)
    return base.features() if isinstance(base, TargetParameter) else in_out_features(base)
