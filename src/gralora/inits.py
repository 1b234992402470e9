"""How the factors of a new adapter start: one table, INITS, with a row for each value of `init_lora_weights`.

PEFT first draws a plain LoRA's numbers, which become the grid's; then the row's function may change them, and the base
weight. It gets the layer, whose methods give it all that an initialisation takes:

    layer.factors(adapter)    A, B, the plain LoRA part, and the scaling; what is written into them stays
    blocks.blocks_of_A(A)     A, and with blocks_of_B B, as views of k x k LoRAs, one for each block of dW
    layer.base_matrix()       the base weight `[O, I]`
    config                    the adapter's, for fields that belong to the initialisation
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn

from .decompositions import (
    by_block,
    corda,
    is_bitsandbytes,
    keep,
    loftq,
    lora_ga,
    minor_components,
    olora,
    orthogonal,
    pissa,
    pissa_by_iteration,
    widen_by_fan_in,
)
from .seam import COVARIANCE, GRADIENT, Conv1D


class Target(NamedTuple):
    """A layer that is to be adapted, for the check before anything is changed.

    Attributes:
        config: the adapter's.
        base: the base layer; of a parameter of `target_parameters`, the `TargetParameter`.
        quantised: whether its weight is.
        k, r: blocks per side, and total rank.
        smaller: of the numbers of its input and output features.
        alpha: its lora_alpha.
    """

    config: Any
    base: Any
    quantised: bool
    k: int
    r: int
    smaller: int
    alpha: float

    @property
    def q(self) -> int:
        """The rank of a block."""
        return (self.r - self.config.hybrid_r) // self.k


class Init(NamedTuple):
    """One way to start.

    Attributes:
        drawn: what PEFT is asked for first, as `init_lora_weights`.
        fill: changes the factors in place, and the base weight if need be; called once for each adapted layer, with
            the `GraloraLayer`, the adapter's name and its config.
        changes_base: whether the base weight becomes another one, without which the adapter means nothing.
        refuses: functions that say in words why a layer cannot start so, and what would work; empty if it can.
    """

    drawn: bool | str
    fill: Callable[[Any, str, Any], None]
    changes_base: bool = False
    refuses: tuple[Callable[[Target], str], ...] = ()


# What a layer may lack

ORIGINAL = (
    "a saved adapter is loaded without if it was saved with path_initial_model_for_weight_conversion, by which it is "
    "one for the original weights"
)


def _quantised(target: Target) -> str:
    return "its weight is quantised; load the model without quantisation" if target.quantised else ""


def _quantised_otherwise(target: Target) -> str:
    return "" if is_bitsandbytes(target.base) else _quantised(target)


def _no_scaling(target: Target) -> str:
    return "" if target.alpha > 0 else f"its lora_alpha={target.alpha!r} must be positive"


def _more_ranks_than(count: int) -> Callable[[Target], str]:
    def refuse(target: Target) -> str:
        most = target.smaller // target.k // count
        if target.q <= most:
            return ""
        return (
            f"each of its blocks needs {count * target.q} singular vectors and has {target.smaller // target.k}; "
            f"r - hybrid_r may be {most * target.k} at most, and is {target.q * target.k}"
        )

    return refuse


def _more_ranks_than_features(target: Target) -> str:
    if target.r <= target.smaller:
        return ""
    return f"r={target.r} must not be more than its {target.smaller} features on the smaller side"


def _odd(target: Target) -> str:
    return f"the rank of a block, (r - hybrid_r) / gralora_k = {target.q}, must be even" if target.q % 2 else ""


def _not_linear(target: Target) -> str:
    if isinstance(target.base, nn.Linear | Conv1D):
        return ""
    return "PEFT has this for nn.Linear and transformers' Conv1D alone"


def _no_gradient(target: Target) -> str:
    if hasattr(target.base, GRADIENT):
        return ""
    return f"it has no gradient: call peft.tuners.lora.loraga.preprocess_loraga before get_peft_model ({ORIGINAL})"


def _no_covariance(target: Target) -> str:
    if hasattr(target.base, COVARIANCE):
        return ""
    return (
        "it has no covariance of its inputs: call peft.tuners.lora.corda.preprocess_corda before get_peft_model, with "
        f"prune_temporary_fields=False, and no cache_file that exists: those hold no covariances ({ORIGINAL})"
    )


NITER = "pissa_niter_[number of iters]"
_DECOMPOSES = (_quantised, _more_ranks_than(1), _no_scaling)

INITS: dict[Any, Init] = {
    True: Init(True, widen_by_fan_in),
    False: Init(False, widen_by_fan_in),
    "gaussian": Init("gaussian", keep),  # its standard deviation, 1/r, does not depend on the fan-in
    "orthogonal": Init(True, orthogonal, refuses=(_odd,)),
    "eva": Init(True, widen_by_fan_in, refuses=(_not_linear, _more_ranks_than(1))),  # until eva.py sets A
    "mica": Init("mica", minor_components, refuses=(_not_linear, _quantised, _more_ranks_than_features)),
    "pissa": Init(True, by_block(pissa), True, _DECOMPOSES),
    NITER: Init(True, by_block(pissa_by_iteration), True, _DECOMPOSES),
    "olora": Init(True, by_block(olora), True, (_quantised_otherwise, _more_ranks_than(1))),
    "corda": Init(True, by_block(corda), True, (_not_linear, *_DECOMPOSES, _no_covariance)),
    "lora_ga": Init(True, by_block(lora_ga), True, (_not_linear, *_DECOMPOSES, _more_ranks_than(2), _no_gradient)),
    "loftq": Init(True, loftq, True, (_not_linear, *_DECOMPOSES)),
}


def find(value: Any) -> Init | None:
    """The row of a value of `init_lora_weights`, in whatever case; None if there is none."""
    if isinstance(value, str):
        value = value.lower()
        return INITS.get(NITER if re.fullmatch(r"pissa_niter_\d+", value) else value)
    return INITS[value] if isinstance(value, bool) else None


def changes_base(config: Any) -> bool:
    """Whether a GraLoRA adapter with this config belongs to base weights that its initialisation has changed."""
    row = find(config.init_lora_weights) if getattr(config, "use_gralora", False) else None
    return row is not None and row.changes_base


def check_target(name: str, target: Target) -> None:
    """Raise ValueError, naming the layer and what would work, if it cannot start as the config says."""
    row = find(target.config.init_lora_weights)
    why = next(filter(None, (refuse(target) for refuse in (row.refuses if row else ()))), "")
    if why:
        raise ValueError(
            f"init_lora_weights={target.config.init_lora_weights!r} cannot be combined with the target {name!r}: "
            f"{why}. Or use init_lora_weights=True, or take the layer out of the targets."
        )


def check_model(model: nn.Module, config: Any, weights: Mapping[str, Any], others: Iterable[str]) -> None:
    """Raise ValueError if other layers or adapters than those of `config` would see the base weights change.

    Args:
        model: the base model.
        config: of the adapter.
        weights: name of each targeted layer -> its weight.
        others: names of the other adapters that the model has.
    """
    if not changes_base(config):
        return
    changing = f"init_lora_weights={config.init_lora_weights!r} changes the base weights"
    if others := sorted(others):
        raise ValueError(
            f"{changing}, which the model's adapters {others} were made for. Add the adapter to a model without "
            "others; a saved one can be loaded beside others if it was saved with "
            "path_initial_model_for_weight_conversion, by which it is one for the original weights."
        )
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    for name, weight in weights.items():
        if getattr(weight, "is_meta", False):
            raise ValueError(f"{changing}, and that of {name!r} has no values (meta device); load them first.")
        if owners[id(weight)] > 1:
            raise ValueError(
                f"{changing}, and {name!r} shares its weight with another layer, which would change, too. Take "
                f"{name!r} out of the targets, or use init_lora_weights=True."
            )
