"""What `gralora evaluate` can measure: one task a file, listed in `TASKS`."""

from collections.abc import Callable
from typing import Any, NamedTuple

from . import gsm8k, humaneval, loss, multiple_choice


class Task(NamedTuple):
    """How to measure something.

    Attributes:
        read: (arguments, tokenizer) -> items; what can be wrong with the arguments is found here.
        run: (arguments, model, tokenizer, items) -> one record per item: a dict whose `scores` are numbers by metric.
        max_new_tokens: default of the argument; 0: nothing is generated.
    """

    read: Callable[..., list[Any]]
    run: Callable[..., list[dict[str, Any]]]
    max_new_tokens: int = 0


TASKS = {
    "loss": Task(loss.read, loss.run),
    "gsm8k": Task(gsm8k.read, gsm8k.run, max_new_tokens=256),
    "multiple_choice": Task(multiple_choice.read, multiple_choice.run, max_new_tokens=16),
    "humaneval": Task(humaneval.read, humaneval.run, max_new_tokens=384),
}
