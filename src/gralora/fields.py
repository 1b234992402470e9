"""What gralora has to know of each field of `LoraConfig`, said once, and whether a field is set.

The facts of gralora's own fields are in their metadata, in config.py; those of PEFT's fields are in the table here.
Every list of fields elsewhere is derived from them with `names`.
"""

import dataclasses
import functools
import textwrap
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import peft


@dataclass(frozen=True)
class Facts:
    """What readers, writers and commands have to know of one field; the defaults are the cautious answers.

    Attributes:
        beside_factors: Whether the field changes what a saved adapter computes in a way that its factors, their
            scaling and the names of their layers do not show. A tool that reads nothing else must refuse it.
        mergeable: Whether `gralora merge` writes what such a field stands for into the base model.
        in_lora: Whether the config of a plain LoRA says the same with this field.
        in_peft_tuner: Whether the config of PEFT's GRALORA tuner says the same under the same name.
        hotswap: Whether two adapters must agree in it to be swapped.
        resume: Whether a run must agree in it with the checkpoint that it resumes from.
        flag: The flag of `gralora finetune` that sets it, or None.
        json_type: The type of its values in adapter_config.json, where PEFT's annotation differs from what its code
            takes or from how JSON holds it.
        pattern: The field that gives single layers another value, or None.
        needs: The fields of which one must be set for this one to have an effect; empty if it has one by itself.
        saved_as: What a saved GraLoRA adapter must have there: a "rank", which is bounded, or a finite "number". None:
            it may leave the field out.
    """

    beside_factors: bool = True
    mergeable: bool = False
    in_lora: bool = False
    in_peft_tuner: bool = False
    hotswap: bool = False
    resume: bool = False
    flag: str | None = None
    json_type: Any = None
    pattern: str | None = None
    needs: tuple[str, ...] = ()
    saved_as: Literal["rank", "number"] | None = None


_LABEL = Facts(beside_factors=False, in_peft_tuner=True)  # of the file, without effect on the output
_LAYERS = Facts(beside_factors=False, in_peft_tuner=True)  # selects layers, or says how their weights are stored
_BESIDE = Facts(mergeable=True, in_lora=True)
_START = Facts(beside_factors=False, json_type=dict[str, Any] | None)  # of an initialisation, over once it is done

PEFT_FACTS = {
    "task_type": _LABEL,
    "auto_mapping": _LABEL,
    "peft_version": _LABEL,
    "base_model_name_or_path": _LABEL,
    "revision": _LABEL,
    "inference_mode": _LABEL,
    "peft_type": Facts(beside_factors=False),
    "r": Facts(beside_factors=False, resume=True, flag="lora_r", pattern="rank_pattern", saved_as="rank"),
    "lora_alpha": Facts(
        beside_factors=False,
        resume=True,
        flag="lora_alpha",
        json_type=int | float,
        pattern="alpha_pattern",
        saved_as="number",
    ),
    "rank_pattern": Facts(beside_factors=False, json_type=dict[str, int]),
    "alpha_pattern": Facts(beside_factors=False, json_type=dict[str, int | float]),
    "use_rslora": Facts(beside_factors=False, resume=True, flag="use_rslora"),
    "lora_dropout": Facts(beside_factors=False, resume=True, flag="lora_dropout", json_type=int | float),
    "init_lora_weights": Facts(beside_factors=False, json_type=bool | str),  # but see inits.changes_base
    "loftq_config": _START,
    "eva_config": _START,
    "corda_config": _START,
    "lora_ga_config": _START,
    "target_modules": dataclasses.replace(_LAYERS, resume=True, flag="lora_target_modules"),
    "exclude_modules": Facts(beside_factors=False),
    "layers_to_transform": _LAYERS,
    "layers_pattern": _LAYERS,
    "fan_in_fan_out": _LAYERS,
    "modules_to_save": dataclasses.replace(_BESIDE, in_peft_tuner=True),
    "bias": _BESIDE,
    "lora_bias": _BESIDE,
    "trainable_token_indices": _BESIDE,
    # of a tied embedding that is adapted, both have factors in the file
    "ensure_weight_tying": dataclasses.replace(_BESIDE, needs=("modules_to_save", "trainable_token_indices")),
    "megatron_core": Facts(needs=("megatron_config",)),
    "qalora_group_size": Facts(needs=("use_qalora",)),
    "use_dora": _BESIDE,
    "alora_invocation_tokens": Facts(in_lora=True),
    "layer_replication": Facts(in_lora=True, json_type=list[list[int]] | None),
}


def facts(field: dataclasses.Field[Any]) -> Facts:
    """The facts of one field of `LoraConfig`; the cautious ones of a field that is in no table, as of a newer PEFT."""
    return field.metadata.get("facts") or PEFT_FACTS.get(field.name) or Facts()


def names(config_class: type[peft.LoraConfig], has: Callable[[Facts], Any]) -> frozenset[str]:
    """The names of a config's fields whose facts satisfy `has`."""
    return frozenset(field.name for field in dataclasses.fields(config_class) if has(facts(field)))


def default(field: dataclasses.Field[Any]) -> Any:
    """The value of a field that is not given; None where a field must be given."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def is_set(config_class: type[peft.LoraConfig], name: str, value: Any) -> bool:
    """Whether a value of a config's field asks for anything but the field's default.

    None, False and what is empty mean the same where the default is one of them: programs write `fan_in_fan_out: null`
    and `target_parameters: []` for fields that they leave alone. Where the default is another word, number or object,
    None and what is empty still mean the default, unless a saved adapter must have the field; False and 0 do not.

    Args:
        config_class: `gralora.LoraConfig`.
        name: of the field; of a field that the class does not have, the default is None.
        value: as in the config or as in JSON.
    """
    field = next((field for field in dataclasses.fields(config_class) if field.name == name), None)
    usual = None if field is None else plain(default(field))
    value = plain(value)
    if usual:
        left_out = value in (None, "", [], {}) and field is not None and facts(field).saved_as is None
        return value != usual and not left_out
    if value is None or isinstance(value, bool):
        return bool(value)
    if isinstance(value, int | float):  # layers_to_transform=0 is the first layer
        return value != usual
    if isinstance(value, dict) and field is not None and field.metadata.get("is_lora_variant"):
        return True  # {} asks for the variant with its defaults
    return bool(value)


def has_effect(config_class: type[peft.LoraConfig], name: str, found: Container[str]) -> bool:
    """Whether a field that is set has an effect, where `found` has the names of all fields that are set."""
    needs = next((facts(field).needs for field in dataclasses.fields(config_class) if field.name == name), ())
    return not needs or any(one in found for one in needs)


def same(config_class: type[peft.LoraConfig], name: str, one: Any, other: Any) -> bool:
    """Whether two values of a field mean the same: they are equal, or neither is set."""
    return plain(one) == plain(other) or not (is_set(config_class, name, one) or is_set(config_class, name, other))


def plain(value: Any) -> Any:
    """A config's value as JSON has it: sets sorted, enumerations as their values, and objects as their fields."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return getattr(value, "value", value)


def parse(config_class: type[peft.LoraConfig], name: str, text: str) -> Any:
    """The value of a field that is given as text, as in a flag or an environment variable.

    Raises:
        ValueError: if the field does not take it; the message names the field and what it takes.
    """
    kind = get_type_hints(config_class)[name]
    kinds = get_args(kind) if get_origin(kind) is UnionType or get_origin(kind) is Union else (kind,)
    words = [word for one in kinds if get_origin(one) is Literal for word in get_args(one)]
    if text in words:
        return text
    if bool in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if int in kinds:
        try:
            return int(text)
        except ValueError:
            also = "".join(f" or {word!r}" for word in words)
            raise ValueError(f"{name}={text!r} must be a whole number{also}.") from None
    raise ValueError(f"{name}={text!r} must be one of {', '.join(words or ['true', 'false'])}.")


def document(config_class: type[peft.LoraConfig], own: Iterable[str]) -> None:
    """Add the fields `own`, and the help in their metadata, to a config's docstring, before what it raises."""
    helps = {f.name: f.metadata["help"] for f in dataclasses.fields(config_class) if f.name in own}
    indents: Any = {"width": 112, "initial_indent": 8 * " ", "subsequent_indent": 12 * " "}
    listed = "\n".join(textwrap.fill(f"{name}: {text}", **indents) for name, text in helps.items())
    text, raises, raised = (config_class.__doc__ or "").partition("    Raises:")
    config_class.__doc__ = f"{text}    Attributes, besides PEFT's:\n{listed}\n\n{raises}{raised}"


# Words of other programs, and of speech, that are spelt like none of the fields that they mean
OTHER_WORDS = {"k": "gralora_k", "rank": "r", "lora_rank": "r", "lora_r": "r"}


def suggest_names(config_class: type[peft.LoraConfig]) -> None:
    """Have a config's constructor suggest a field where it is given a name that it does not know."""
    construct, known = config_class.__init__, [f.name for f in dataclasses.fields(config_class)]

    @functools.wraps(construct)
    def __init__(self: peft.LoraConfig, *args: Any, **values: Any) -> None:
        for name in values.keys() - known:
            near = [OTHER_WORDS[name]] if name in OTHER_WORDS else get_close_matches(name.lower(), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            # in Python's words, by which PEFT knows a config that a newer version has written
            raise TypeError(f"{config_class.__name__}.__init__() got an unexpected keyword argument {name!r}{hint}")
        construct(self, *args, **values)

    config_class.__init__ = __init__  # type: ignore[method-assign]
