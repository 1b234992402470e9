"""What a merged weight loses when it is rounded to the dtype that it is stored in."""

import warnings

from torch import Tensor

LOST = 0.1  # share of a layer's update lost by rounding, above which a merge warns


def loss(base: Tensor, exact: Tensor, stored: Tensor) -> dict[str, float]:
    """Measure |stored - exact| in the Frobenius norm, relative to the merged weight and to its update.

    Args:
        base: the weight before the merge, of the same shape.
        exact: the merged weight, unrounded. It is overwritten, unless it is `stored` itself.
        stored: the merged weight in the dtype that it is stored in.

    Returns:
        `of_weight` and `of_update`; 0 for a weight, or an update, that is zero: it has nothing to lose.
    """
    if stored is exact:
        return {"of_weight": 0.0, "of_update": 0.0}
    lost, weight = stored.to(exact).sub_(exact).norm().item(), exact.norm().item()
    update = exact.sub_(base.to(exact)).norm().item()
    return {"of_weight": lost / weight if weight else 0.0, "of_update": lost / update if update else 0.0}


def warn_of_losses(rounding: dict[str, dict[str, float]]) -> None:
    """Warn, once, if rounding lost more than the share LOST of a layer's update.

    Args:
        rounding: name of the layer -> its `loss`.
    """
    lost = {layer: error["of_update"] for layer, error in rounding.items() if error["of_update"] > LOST}
    if lost:
        worst = max(lost, key=lost.__getitem__)
        warnings.warn(
            f"rounding the merged weights lost more than {LOST:.0%} of the update in {len(lost)} of {len(rounding)} "
            f"layers, the most in {worst!r}: {lost[worst]:.0%}. The update is small beside the weights' precision; "
            "merge into float32 (--dtype float32), or serve the adapter unmerged.",
            stacklevel=3,
        )
