"""Every name of PEFT, transformers, diffusers and Unsloth that is private, or may change, and that gralora relies on.

They are named here and nowhere else. A comment or docstring says what each must do; where it names no version, it
does so in PEFT 0.20 to 0.21.2, transformers 5.6 to 5.23, diffusers 0.42 and Unsloth 2026.10. tests/test_seam.py checks
each of them, its signature and its effect, and fails by name when one has moved. torch's are in `ops/torch_seam.py`:
`ops` is used without PEFT.
"""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import peft
from packaging.version import Version
from peft.mapping import (
    # the class of a config by peft_type: PeftConfig.from_pretrained and all that loads adapters build what is in it
    PEFT_TYPE_TO_CONFIG_MAPPING,
)
from peft.tuners import lora
from peft.tuners.lora import (
    # ENABLE_DORA_CACHING, which `peft.helpers.DoraCaching` sets: norms are kept in evaluation mode
    dora,
    # what `initialize_lora_eva_weights` calls
    eva,
)
from peft.tuners.lora.config import (
    # how PEFT's preprocessing for CorDA is done, which PEFT documents and exports from nowhere else
    CordaConfig,
)
from peft.tuners.lora.dora import (
    # DoRA's magnitude module: DoraLinearVariant calls it with lora_A, lora_B, scaling and base_layer, without dropout
    # also base_result, and reads `weight`, the magnitudes `[O]`
    DoraLinearLayer,
)
from peft.tuners.lora.layer import (
    # two of PEFT's LoRA layers, which `peft.tuners.lora` does not export
    Conv1d,
    # what `lora.Embedding` asks, through its dictionary `lora_variant`, in place of its own arithmetic
    LoraVariant,
    MultiheadAttention,
)
from peft.tuners.lora.variants import (
    # the variant of linear layers with DoRA: an instance is in their dictionary `lora_variant`
    DoraLinearVariant,
)
from peft.tuners.tuners_utils import (
    # what check_target_module_exists returns for a layer that exclude_modules names; it is true like a match
    _ExcludedModule,
    # input and output features of a base layer of any class that PEFT knows, quantised ones among them
    _get_in_out_features,
    # the names of the adapters to merge: those given, or the active ones, without those that are merged already
    check_adapters_to_merge,
    # what a config's target_modules, exclude_modules and layers_to_transform make of a layer's name
    check_target_module_exists,
)
from peft.utils import hotswap
from peft.utils.hotswap import (
    # the fields, by peft_type, in which two configs must agree so that one adapter can be swapped for the other
    CONFIG_KEYS_TO_CHECK,
    # raises ValueError if two configs differ in one of those fields
    check_hotswap_configs_compatible,
    # copies tensors, named as in a model's state dict, into the adapter that is loaded
    hotswap_adapter_from_state_dict,
    # makes all scalings tensors, and pads the ranks of plain LoRAs to `target_rank` unless that is None
    prepare_model_for_compiled_hotswap,
)
from peft.utils.integrations import (
    # the weight of a layer that bitsandbytes has quantised, or of any other, as a tensor of floats
    dequantize_module_weight,
    # while the context lasts, a parameter that DeepSpeed ZeRO-3 has distributed is whole, and written to on all ranks
    gather_params_ctx,
)
from peft.utils.other import (
    # the first of some patterns that a layer's name matches, whole or after a dot; else the name itself
    get_pattern_key,
)
from torch import Tensor, nn
from transformers.pytorch_utils import (
    # the linear layer of GPT-2 and its like: weight `[in, out]`, forward is addmm(bias, x, weight)
    Conv1D,
)

if TYPE_CHECKING:
    from huggingface_hub.dataclasses import type_validator
    from transformers.hf_argparser import HfArg, string_to_bool
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

__all__ = [
    "ASKS_GIT",
    "ATTRIBUTES",
    "CONFIG_KEYS_TO_CHECK",
    "COVARIANCE",
    "FLUX",
    "GRADIENT",
    "GUESSES_CONFIG",
    "INTEGRATION_TO_CALLBACK",
    "LAZY",
    "LORA_METADATA",
    "MERGES_4_BITS",
    "MERGES_DORA",
    "OVERRIDES",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "TRL_TRAINER",
    "TRL_TRAINER_CLASS",
    "UNSLOTH",
    "UNSLOTH_COMPILER",
    "UNSLOTH_LEAVES",
    "UNSLOTH_READS",
    "UNSLOTH_UPDATE",
    "UNSLOTH_WRITES",
    "Conv1D",
    "Conv1d",
    "CordaConfig",
    "DoraLinearLayer",
    "DoraLinearVariant",
    "HfArg",
    "LoraVariant",
    "MultiheadAttention",
    "OptimizerNames",
    "SchedulerType",
    "check_adapters_to_merge",
    "check_hotswap_configs_compatible",
    "corda_decomposition",
    "dequantize_module_weight",
    "dora_is_cached",
    "experts_implementation",
    "forget_preprocessing",
    "gather_params_ctx",
    "get_pattern_key",
    "has_default_gate",
    "hotswap_adapter_from_state_dict",
    "in_out_features",
    "is_from_file",
    "is_targeted",
    "prepare_model_for_compiled_hotswap",
    "stock_class",
    "string_to_bool",
    "type_validator",
    "wrap_create_and_replace",
    "wrap_eva",
    "wrap_flux_expansions",
    "wrap_hotswap",
    "wrap_model_card",
    "writes_quantised_weights",
]


def is_from_file(config: peft.PeftConfig) -> bool:
    """Whether PEFT builds this config from a file's fields, or from another config's, before its `__post_init__`.

    PEFT passes peft_type then, which a user never does; afterwards it is set in all configs.
    """
    return config.peft_type is not None


def is_targeted(config: peft.LoraConfig, name: str) -> bool:
    """Whether the config's target_modules, exclude_modules and layers_to_transform choose the layer of this name."""
    match = check_target_module_exists(config, name)
    return bool(match) and not isinstance(match, _ExcludedModule)


in_out_features: Callable[[nn.Module], Any] = _get_in_out_features


def wrap_create_and_replace(wrap: Callable[[Callable[..., None]], Callable[..., None]]) -> None:
    """Put a function around `LoraModel._create_and_replace`, through which every adapter gets into every layer.

    PEFT calls it for each targeted layer, or parameter of target_parameters, in the order of the model's modules, with
    `(config, adapter_name, target, target_name, parent, current_key=...)` and for a parameter `parameter_name`.
    Afterwards the parent has the LoRA layer under `target_name`.
    """
    lora.LoraModel._create_and_replace = wrap(lora.LoraModel._create_and_replace)  # type: ignore[method-assign]


def wrap_hotswap(wrap: Callable[[Callable[..., Any]], Callable[..., Any]], prepare: Callable[..., None]) -> None:
    """Put a function around `hotswap_adapter_from_state_dict` in `peft.utils.hotswap`, and `prepare` beside it.

    diffusers imports both from there. It names tensors as the model's state dict does, but for those it knows not.
    """
    hotswap.hotswap_adapter_from_state_dict = wrap(hotswap_adapter_from_state_dict)
    hotswap.prepare_model_for_compiled_hotswap = prepare


def wrap_eva(
    wrap_find: Callable[[Callable[..., Any]], Callable[..., Any]],
    wrap_write: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> None:
    """Put functions around the two that `initialize_lora_eva_weights` calls in its module, `peft.tuners.lora.eva`.

    Args:
        wrap_find: around `get_eva_state_dict`, called with `(model=, dataloader=, forward_fn=, adapter_name=,
            prepare_layer_inputs_fn=, ...)`; it takes the config as `peft_config=` as well.
        wrap_write: around the one that writes what it returned, called with `(model, eva_state_dict, adapter_name)`.
    """
    eva.get_eva_state_dict = wrap_find(eva.get_eva_state_dict)
    eva._load_eva_state_dict = wrap_write(eva._load_eva_state_dict)


# The module of diffusers' pipelines that load LoRAs, the key of an adapter's config in the metadata of its files, and
# the module and function that make a config of a file without: (rank_dict, network_alpha_dict, peft_state_dict, ...).
FLUX, LORA_METADATA = "diffusers.loaders.lora_pipeline", "lora_adapter_metadata"
GUESSES_CONFIG = ("diffusers.utils.peft_utils", "get_peft_kwargs")


def wrap_flux_expansions(
    pipelines: ModuleType,
    wrap_model: Callable[[Callable[..., Any]], Callable[..., Any]],
    wrap_state_dict: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> None:
    """Put functions around the two class methods of Flux pipelines that fit model and LoRA to each other's features.

    Args:
        pipelines: the module FLUX.
        wrap_model: around the one that may widen layers of the transformer, called with `(transformer,
            lora_state_dict, norm_state_dict, prefix=...)`.
        wrap_state_dict: around the one that may fill up factors of a LoRA, called with `(transformer=...,
            lora_state_dict=...)`; it returns the state dict to load.
    """
    flux = pipelines.FluxLoraLoaderMixin
    for name, wrap in (
        ("_maybe_expand_transformer_param_shape_or_error_", wrap_model),
        ("_maybe_expand_lora_state_dict", wrap_state_dict),
    ):
        setattr(flux, name, classmethod(wrap(getattr(flux, name).__func__)))


def wrap_model_card(wrap: Callable[[Callable[..., None]], Callable[..., None]]) -> None:
    """Put a function around `PeftModel.create_or_update_model_card(output_dir)`, which writes README.md there.

    `save_pretrained` calls it, and transformers' Trainer after it has written a card of its own.
    """
    model_class: Any = peft.PeftModel
    model_class.create_or_update_model_card = wrap(model_class.create_or_update_model_card)


# The module and the class whose `create_model_card` writes `args.output_dir`/README.md for all of TRL's trainers, in
# the first process, when a checkpoint is saved and before a push to the hub (TRL 1.14 to 1.16).
TRL_TRAINER, TRL_TRAINER_CLASS = "trl.trainer.base_trainer", "_BaseTrainer"

# lm-evaluation-harness's module, and the function in it that runs `git` in the working directory (0.4.13).
ASKS_GIT = ("lm_eval.evaluator", "get_git_commit_hash")

# Unsloth's module of kernels; the function in it by which fused functions leave a layer to PEFT, called with the layer
# before each of their passes, and the two that read a layer's weight and factors, which they call afterwards.
UNSLOTH = "unsloth.kernels.utils"
UNSLOTH_LEAVES = "_has_active_dora_adapter"
UNSLOTH_READS = ("get_lora_parameters", "get_lora_parameters_bias")
# The module that writes new forwards for PEFT's LoRA layers, its function that does, and the function in their globals
# that adds the update: (result, lora_A, lora_B, dropout, x, scaling) -> result + update.
UNSLOTH_COMPILER, UNSLOTH_WRITES, UNSLOTH_UPDATE = "unsloth_zoo.compiler", "patch_lora_forwards", "lora_forward"


def stock_class(layer: Any, ours: type) -> type:
    """PEFT's class of a LoRA layer, also if it is promoted: the first of its classes that is no subclass of `ours`."""
    return next(cls for cls in type(layer).__mro__ if not issubclass(cls, ours))


def writes_quantised_weights(layer: Any, stock: type) -> bool:
    """Whether merging a LoRA layer of PEFT's class `stock` minds that its base layer's weight is quantised, or raises.

    It does if PEFT made a class for such base layers, with a `merge` of its own, or if the layer has what PEFT calls
    a quantisation backend (0.21 and later, for other methods than LoRA so far), through which any class's `merge`
    reads and writes. `lora.Linear.merge` without one would add to the packed numbers.
    """
    has_backend = getattr(layer, "quantization_backend", None) is not None
    return has_backend or getattr(stock, "merge", None) is not lora.Linear.merge


def dora_is_cached(magnitude: nn.Module) -> bool:
    """Whether PEFT keeps the norms of a DoRA adapter, given its magnitude module, from one call to the next."""
    return dora.ENABLE_DORA_CACHING and not magnitude.training


def experts_implementation(experts: Any) -> str | None:
    """Which of transformers' own functions computes a module of experts: eager, batched_mm or grouped_mm; else None.

    Modules whose class was given to `use_experts_implementation` ask ALL_EXPERTS_FUNCTIONS for a function of `(module,
    hidden, chosen experts, their weights)` at each call. The three compute the same, and read of the module
    `has_gate`, `has_bias`, `is_transposed`, since 5.18 or later `has_post_expert_norm`, and the parameters that these
    say it has. None also if the experts are spread over devices, where some of a token's experts are elsewhere.
    """
    forward = type(experts).forward
    cells = dict(zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True))
    if "experts_interface" not in cells or "original_forward" not in cells:
        return None
    from transformers.integrations import moe

    interface, eager = (cells[name].cell_contents for name in ("experts_interface", "original_forward"))
    # a module says whether it is spread over devices since 5.18 or later; before, it had its devices' mesh then
    is_spread = getattr(experts, "_is_expert_parallel", False) or "_hf_device_mesh" in vars(experts)
    if interface is not moe.ALL_EXPERTS_FUNCTIONS or is_spread:
        return None
    name = experts.config._experts_implementation or "eager"
    functions = {"eager": eager} | {n: getattr(moe, f"{n}_experts_forward") for n in ("batched_mm", "grouped_mm")}
    return name if name in functions and interface.get_interface(name, eager) is functions[name] else None


def has_default_gate(experts: Any) -> bool:
    """Whether `_apply_gate` of a module of experts is transformers' own: act_fn(e) * u of e and u side by side."""
    from transformers.integrations import moe

    return experts.has_gate and type(experts)._apply_gate is moe._default_apply_gate


# Where PEFT's preprocessing leaves the gradient of a layer's weight for LoRA-GA, in the weight's layout, and the
# covariance of its inputs for CorDA, `[I, I]`, if prune_temporary_fields=False. CORDA: what it leaves beside that.
GRADIENT = "_peft_loraga_grad"
COVARIANCE = "covariance_matrix"
CORDA = ("eigens", "sample_count", "corda_method", "rank")


def corda_decomposition(W: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """PEFT's decomposition for CorDA: U `[O, m]`, S `[m]`, V `[I, m]` with W = U S V^T, and m the smaller of O and I.

    Args:
        W: `[O, I]`.
        covariance: of the inputs, `[I, I]`.
    """
    # its module needs attrs, which PEFT does not ask for: only who has called its preprocessing has imported it
    from peft.tuners.lora.corda import collect_eigens_for_layer

    layer: Any = nn.Linear(1, 1, bias=False)
    layer.weight = nn.Parameter(W, requires_grad=False)
    setattr(layer, COVARIANCE, covariance)
    eigens = collect_eigens_for_layer(layer, peft.LoraConfig())
    return eigens.U_WC, eigens.S_WC, eigens.V_WC


def forget_preprocessing(base: nn.Module) -> None:
    """Delete what PEFT's preprocessing has left in a layer for its initialisation."""
    left = [GRADIENT] if hasattr(base, GRADIENT) else []
    left += [COVARIANCE, *CORDA] if hasattr(base, COVARIANCE) else []
    for name in left:
        vars(base).pop(name, None)


# Whether PEFT merges DoRA rightly into Conv1D layers, and beside other adapters: since 0.21.
MERGES_DORA = Version(peft.__version__) >= Version("0.21.0.dev0")

# What PEFT's warning begins with, which each merge into a layer of bitsandbytes' 4 bits gives; it names no loss.
MERGES_4_BITS = "Merge lora module to 4-bit linear"

# PEFT's methods that ours take the place of, or the property. Each must be what PEFT calls for this purpose.
OVERRIDES: dict[str, str] = {
    "_activate_lora": "ParamWrapper: the parameter is W + dW while the context lasts, for the adapters named",
    "_check_merge_allowed": "LoraModel: called before any merging, to raise if it is not possible",
    "_mixed_batch_forward": "Embedding: a batch whose rows name their adapters; it ignores variants",
    "_qkv_same_embed_dim": "MultiheadAttention: read by nn.TransformerEncoderLayer, which calls the layer if False",
    "add_weighted_adapter": "LoraModel: combine adapters",
    "delete_adapter": "LoraModel: delete an adapter",
    "forward": "the layer's output; adapter_names and aLoRA's offsets are keywords",
    "get_delta_weight": "dW of one adapter in the layout of the base weight; all merging asks it",
    "merge": "add the named adapters' dW to the base weight",
    "merge_adapter": "LoraModel: merge adapters, which stay; PeftModel's attribute",
    "merge_and_unload": "LoraModel: the base model with the adapters merged",
    "resolve_lora_variant": "choose an adapter's variant by its config; called by update_layer",
    "set_adapter": "LoraModel: choose the active adapters",
    "subtract_mutated_init": "LoraModel: called by save_pretrained with path_initial_model_for_weight_conversion",
    "supports_lora_conversion": "whether convert_to_lora may take dW for all that an adapter does",
    "unload": "LoraModel: the base model without the adapters",
    "unmerge": "subtract the merged adapters' dW from the base weight",
}

# Attributes, beside the documented ones, of PEFT's layers, transformers' models and Trainer, and optuna's trials.
ATTRIBUTES: dict[str, str] = {
    "_apply_gate": "modules of experts with `has_gate`: what the first product gives -> what the last one sees",
    "_did_swap_in_out_features": "ParamWrapper: whether the parameter is `[E, O, I]`, not `[E, I, O]`",
    "_disable_adapters": "LoraLayer: in the instance's dictionary, as merged_adapters, scaling and lora_variant are",
    "_embed": "Embedding: token ids and a weight `[V, r]` -> `[..., r]`, as the base layer looks its own up",
    "_get_embed_scale": "Embedding: what Gemma's embeddings multiply by, a tensor of one element, or None",
    "_prepare_inputs": "Trainer: a batch on the device, as compute_loss takes it",
    "_remove_parametrizations": "ParamWrapper: undo what a parametrization of its parameter did",
    "_trial_id": "FrozenTrial: what `optuna.Trial(study, id)` takes, to report to a trial that another process began",
    "_weight_conversions": "PreTrainedModel: what save_pretrained undoes; if None, what its type asks for by itself",
    "quantization_backend": "BaseTunerLayer: how weights are read and written, or None; since PEFT 0.21",
}

# The command's, imported when they are asked for: transformers' Trainer is not needed to use an adapter.
LAZY = {
    # HfArg(help=..., aliases=...): a dataclass field with the metadata that HfArgumentParser reads.
    "HfArg": "transformers.hf_argparser",
    # "yes", "true", "t", "1" and their opposites, in any case, to bool; argparse's error for others.
    "string_to_bool": "transformers.hf_argparser",
    # The names that `report_to` takes.
    "INTEGRATION_TO_CALLBACK": "transformers.integrations.integration_utils",
    # Enumerations of the values of `lr_scheduler_type` and `optim`.
    "SchedulerType": "transformers.trainer_utils",
    "OptimizerNames": "transformers.training_args",
    # type_validator(name, value, type): huggingface_hub's error if a value is not of an annotated type.
    "type_validator": "huggingface_hub.dataclasses",
}


def __getattr__(name: str) -> Any:
    if name in LAZY:
        return getattr(importlib.import_module(LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
