"""The table of the kinds of layers that GraLoRA adapts. To support another kind, add a row.

Classes are written "package.Class". No quantisation library has to be installed or imported for that, and it does not
matter which module of the package defines a class.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .attention import GranularAttention, GranularOutProjection, attention_obstacle
from .conv import GranularConv, conv_obstacle
from .embedding import GranularEmbedding, embedding_obstacle
from .experts import FusedExperts, GranularExperts, TargetParameter
from .fast_path import FusedLayer
from .fp8 import GranularFloat8
from .layers import GraloraLayer
from .ops.torch_seam import NonDynamicallyQuantizableLinear
from .promote import Promoted
from .seam import stock_class, writes_quantised_weights


def _none(base: nn.Module) -> str:
    return ""


def _in_attention(base: nn.Module) -> str:
    never_called = isinstance(base, NonDynamicallyQuantizableLinear)
    return "which nn.MultiheadAttention reads the weight of, but never calls" if never_called else ""


def _packed_for_cpu(base: Any) -> str:
    if not hasattr(getattr(base.weight, "quant_state", None), "packing_format_for_cpu"):  # only packing sets it
        return ""
    return (
        "which bitsandbytes has repacked for inference, since it ran in evaluation mode on the CPU: now it passes no "
        "gradient on, and merging would spoil it. Load the model anew, and add the adapter before running it"
    )


def _quantizes_activations(base: Any) -> str:
    if base.weight.act_quant_kwargs is None:
        return ""
    return "which quantises activations too, so that no gradient passes through it"


def _no_fp8_matrix(base: Any) -> str:
    if type(base).__name__ != "FP8Linear":
        return "which is a grouped product, no linear layer"
    return "" if base.weight.is_floating_point() else "which holds 4-bit floats"


def _never(base: Any) -> bool:
    return False


def _hqq_is_coarse(base: Any) -> bool:
    settings = (getattr(base, "quant_config", None) or {}).get("weight_quant_params", {})
    return bool(settings.get("nbits", 8) <= 4)


LINEAR_ONLY = {name: "with GraLoRA it is for linear layers" for name in ("use_dora", "alora_invocation_tokens")}


class Kind(NamedTuple):
    """A kind of base layer, and how GraLoRA adapts it.

    Attributes:
        name: the kind, in words.
        base: class of the base layer, or one that it inherits from.
        weight: the exact class of the layer's `weight`, no subclass; empty if any will do.
        quantised: whether the weight is quantised. A quantised kind belongs here if PEFT's LoRA layer for it adds
            `lora_B(lora_A(dropout(x))) * scaling` to the base layer's output, and its merge either goes through
            `get_delta_weight` or raises.
        coarse: whether the weight of a given layer has 4 bits or fewer, so that merging rounds most of an update away.
        flag: attribute of the model without which PEFT takes the layer for an ordinary one; empty if none is needed.
        obstacle: says in words why a given layer of this kind cannot be adapted; empty if it can.
        mixin: our class in front of PEFT's LoRA layer, which reads and applies the factors of a grid.
        inner: attribute of the base layer -> the mixin for the LoRA layer that PEFT makes there.
        fused: our class in front of PEFT's LoRA layer, which computes plain LoRA adapters faster; None if none does.
        refuses: fields of the config that PEFT's class refuses or ignores, and why.
    """

    name: str
    base: str
    weight: str = ""
    quantised: bool = False
    coarse: Callable[[Any], bool] = _never
    flag: str = ""
    obstacle: Callable[[Any], str] = _none
    mixin: type[GraloraLayer] = GraloraLayer
    inner: Mapping[str, type[GraloraLayer]] = MappingProxyType({})
    fused: type[FusedLayer] | None = FusedLayer
    refuses: Mapping[str, str] = MappingProxyType({})


KINDS = (
    Kind(
        "transformers' FP8Linear",  # an nn.Linear, too
        "transformers.FP8Linear",
        "torch.Parameter",
        quantised=True,
        obstacle=_no_fp8_matrix,
        mixin=GranularFloat8,
        refuses={
            "lora_bias": "merging would lose it",
            "use_dora": "PEFT would take its norms from the weight without its scales",
        },
    ),
    Kind("nn.Linear", "torch.Linear", "torch.Parameter", obstacle=_in_attention),
    Kind("transformers' Conv1D", "transformers.Conv1D", "torch.Parameter"),
    Kind(
        "bitsandbytes 4-bit",
        "bitsandbytes.Linear4bit",
        "bitsandbytes.Params4bit",
        quantised=True,
        coarse=lambda base: True,
        flag="is_loaded_in_4bit",
        obstacle=_packed_for_cpu,
    ),
    Kind(
        "bitsandbytes 8-bit",
        "bitsandbytes.Linear8bitLt",
        "bitsandbytes.Int8Params",
        quantised=True,
        flag="is_loaded_in_8bit",
    ),
    Kind(
        "torchao int8 weight-only",
        "torch.Linear",
        "torchao.Int8Tensor",
        quantised=True,
        obstacle=_quantizes_activations,
    ),
    Kind(
        "torchao FP8",
        "torch.Linear",
        "torchao.Float8Tensor",
        quantised=True,
        mixin=GranularFloat8,
    ),
    Kind("HQQ", "hqq.HQQLinear", quantised=True, coarse=_hqq_is_coarse),
    Kind(
        "nn.Embedding",
        "torch.Embedding",
        "torch.Parameter",
        obstacle=embedding_obstacle,
        mixin=GranularEmbedding,
        fused=None,
        refuses={
            "lora_bias": "embeddings have no bias",
            "gralora_scaling": "it is derived for sums over all input features, which one-hot vectors have not",
        }
        | LINEAR_ONLY,
    ),
    *(
        Kind(
            f"nn.Conv{n}d",
            f"torch.Conv{n}d",
            "torch.Parameter",
            obstacle=conv_obstacle,
            mixin=GranularConv,
            fused=None,
            refuses=LINEAR_ONLY,
        )
        for n in (1, 2, 3)
    ),
    Kind(
        "nn.MultiheadAttention",
        "torch.MultiheadAttention",
        obstacle=attention_obstacle,
        mixin=GranularAttention,
        inner={"out_proj": GranularOutProjection},
        fused=None,
        refuses={
            "lora_bias": "PEFT would ignore it, since it adds dW to the weights",
            "lora_dropout": "PEFT would ignore it, since it adds dW to the weights",
        }
        | LINEAR_ONLY,
    ),
    Kind(
        "a parameter of target_parameters",
        "gralora.TargetParameter",
        obstacle=TargetParameter.obstacle,
        mixin=GranularExperts,
        fused=FusedExperts,
        refuses={
            "lora_bias": "a parameter has no bias",
            "lora_dropout": "dW is added to the parameter, so that nothing can be dropped",
            "fan_in_fan_out": "the parameter's layout is known",
            "gralora_scaling": "it is not implemented for parameters",
        }
        | LINEAR_ONLY,
    ),
    # tested without the library: PEFT's classes over a stand-in for the base layer
    Kind("GPTQ, AWQ", "gptqmodel.BaseQuantLinear", quantised=True),
    Kind("AQLM", "aqlm.QuantizedLinear", quantised=True),
    Kind("EETQ", "eetq.EetqLinear", quantised=True),
    Kind("EETQ", "transformers.EetqLinear", quantised=True),
    Kind("Intel Neural Compressor", "neural_compressor.PatchedLinear", quantised=True),
)


def base_layer(layer: Any) -> Any:
    """Return the layer without PEFT's wrappers; a `TargetParameter` has none."""
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


def check_kind(name: str, layer: nn.Module | TargetParameter, model: nn.Module) -> None:
    """Raise ValueError, naming the layer, if GraLoRA cannot adapt it.

    Args:
        name: name of the layer or parameter, for the message.
        layer: a layer of the model, which may carry adapters already, or a parameter of a layer.
        model: the base model.
    """
    base = base_layer(layer)
    problem = _problem(base, layer, model)
    if problem:
        if isinstance(base, TargetParameter):
            raise ValueError(
                f"target parameter {name!r} is a {type(base.value).__name__} of {type(base.module).__name__}, "
                f"{problem}. Take it out of target_parameters, or set use_gralora=False."
            )
        raise ValueError(
            f"target module {name!r} is a {type(base).__name__} with a weight of type "
            f"{type(getattr(base, 'weight', None)).__name__}, {problem}. GraLoRA adapts layers of these kinds: "
            f"{', '.join(dict.fromkeys(kind.name for kind in KINDS))}. Take the module out of target_modules, or set "
            "use_gralora=False."
        )


def check_fields(name: str, layer: nn.Module | TargetParameter, config: Any) -> None:
    """Raise ValueError, naming field and layer, if the config sets a field that this kind of layer refuses."""
    kind = kind_of(base_layer(layer))
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for field, why in kind.refuses.items():
        if getattr(config, field, None) not in (None, defaults.get(field)):
            raise ValueError(
                f"{field}={getattr(config, field)!r} cannot be combined with the target {name!r}, {kind.name}: {why}; "
                f"leave {field} at its default, or take this out of the targets."
            )


def kind_of(base: nn.Module | TargetParameter) -> Kind:
    """Return the table's row for a base layer that `check_kind` accepts."""
    return _kinds(base)[0]


def mixin_of(layer: Any) -> type[GraloraLayer]:
    """Return our mixin for a LoRA layer of PEFT's class or ours; the one for linear layers if the kind is unknown."""
    kinds = _kinds(base_layer(layer))
    return kinds[0].mixin if kinds else GraloraLayer


def is_coarse(layer: Any) -> bool:
    """Whether merging into the base layer rounds most of an update away, as its weight has 4 bits or fewer."""
    base = base_layer(layer)
    kinds = _kinds(base)
    return bool(kinds) and kinds[0].coarse(base)


def fused_class(layer: Any) -> type[FusedLayer] | None:
    """The class in front of PEFT's LoRA layer that computes its plain LoRA adapters faster; None if there is none."""
    is_parameter = isinstance(layer, lora.ParamWrapper)
    base = TargetParameter(base_layer(layer), layer.parameter_name) if is_parameter else base_layer(layer)
    kinds = _kinds(base)
    return None if not kinds or _unfit(layer, kinds[0]) or kinds[0].obstacle(base) else kinds[0].fused


def not_linear(tensor: str, ndim: int) -> str:
    """Say in words what a saved tensor of this name is; empty if it is a factor of a linear layer."""
    mixins = dict.fromkeys(mixin for kind in KINDS for mixin in (kind.mixin, *kind.inner.values()))
    return next(filter(None, (mixin.names_saved(tensor, ndim) for mixin in mixins)), "")


def _kinds(base: nn.Module | TargetParameter) -> list[Kind]:
    weight = getattr(base, "weight", None)
    return [k for k in KINDS if _inherits(base, k.base) and k.weight in ("", _name(type(weight)))]


def _problem(base: nn.Module | TargetParameter, layer: nn.Module | TargetParameter, model: nn.Module) -> str:
    kinds = _kinds(base)
    if not kinds:
        return "which is not supported"
    if isinstance(layer, lora.LoraLayer):
        return _unfit(layer, kinds[0]) or kinds[0].obstacle(base)
    if kinds[0].flag and not getattr(model, kinds[0].flag, False):
        return (
            f"but {type(model).__name__}.{kinds[0].flag} is not True, and PEFT would take it for an ordinary layer. "
            "Load the model with a quantization_config, or set this attribute"
        )
    return kinds[0].obstacle(base)


def _unfit(layer: lora.LoraLayer, kind: Kind) -> str:
    """Say what is wrong with the LoRA layer that PEFT, or a user's custom module, has put around a base layer.

    A quantised base layer needs no particular class: any of PEFT's that knows how to write quantised weights will do.
    """
    stock = stock_class(layer, Promoted)
    wrapped = f"which PEFT has wrapped as {stock.__name__}"
    if not kind.quantised:
        expected = kind.mixin.peft_class if isinstance(kind.mixin.peft_class, tuple) else (kind.mixin.peft_class,)
        if not issubclass(stock, expected):
            return f"{wrapped}, not as {' or '.join(cls.__name__ for cls in expected)}"
    elif not stock.__module__.startswith("peft."):
        return f"{wrapped}, which is no class of PEFT's"
    elif not kind.mixin.merges_quantised and not writes_quantised_weights(layer, stock):
        return f"{wrapped}, not as a quantised layer: merging would add to the packed weight"
    return ""


def _name(cls: type) -> str:
    return f"{cls.__module__.partition('.')[0]}.{cls.__name__}"


def _inherits(obj: object, name: str) -> bool:
    return any(_name(cls) == name for cls in type(obj).__mro__)


def keep_weights_unpacked(model: nn.Module) -> None:
    """Keep bitsandbytes' 4-bit layers from repacking their weights when they run in evaluation mode on a CPU.

    On CPUs with AVX512-BF16 these layers repack the weights. From then on they pass no gradient, even when trained
    again, and PEFT reads the packed weights as if they were not packed.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
