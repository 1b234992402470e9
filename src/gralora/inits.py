"""How the factors of a new adapter start: one table, INITS, with a row for each value of `init_lora_weights`.

PEFT first draws a plain LoRA's numbers, which become the grid's; then the row's function may change them. It gets the
layer, whose methods give it all that an initialisation takes:

    layer.factors(adapter)    A, B, the plain LoRA part, and the scaling; what is written into them stays
    blocks.blocks_of_A(A)     A, and with blocks_of_B B, as views of k x k LoRAs, one for each block of dW
    layer.base_matrix()       the base weight `[O, I]`, a view that may be written to as well
    config                    the adapter's, for fields that belong to the initialisation
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Init(NamedTuple):
    """One way to start.

    Attributes:
        drawn: what PEFT is asked for first, as `init_lora_weights`: True, False or "gaussian".
        fill: changes the factors in place, and the base weight if need be; called once for each adapted layer, with
            the `GraloraLayer`, the adapter's name and its config.
    """

    drawn: bool | str
    fill: Callable[[Any, str, Any], None]


@torch.no_grad()
def widen_by_fan_in(layer: Any, adapter: str, config: Any) -> None:
    """Multiply A by sqrt(k): Kaiming's bound is 1/sqrt(fan-in), and the fan-in of a block is I/k where LoRA's is I."""
    if layer.drawn_by_fan_in:
        A = layer.factors(adapter).A
        A.mul_(math.sqrt(A.shape[-3]))


def keep(layer: Any, adapter: str, config: Any) -> None:
    """Leave the factors as PEFT has drawn them."""


INITS: dict[Any, Init] = {
    True: Init(True, widen_by_fan_in),
    False: Init(False, widen_by_fan_in),
    "gaussian": Init("gaussian", keep),  # its standard deviation, 1/r, does not depend on the fan-in
}
