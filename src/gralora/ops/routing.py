"""From tokens to rows and back, where each token goes to several experts: rows are sorted by expert.

Letters: `T` tokens, `n` experts of each, `S = T * n` rows, `E` experts.
"""

import functools
import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Groups:
    """Where each expert's rows lie.

    Attributes:
        ends: the row after each expert's last, int32 `[E]`, on the device of the rows.
    """

    def __init__(self, ends: Tensor) -> None:
        self.ends = ends

    @functools.cached_property
    def spans(self) -> list[tuple[int, slice]]:
        """The experts that have rows, and these rows; waits for the device."""
        ends = [0, *self.ends.tolist()]
        return [(e, slice(*span)) for e, span in enumerate(itertools.pairwise(ends)) if span[0] < span[1]]


class Routing(NamedTuple):
    """Which token each row is of, if every token goes to several experts.

    Attributes:
        groups: the rows of each expert.
        order: `[S]`, row -> its place in the router's choices, counted token by token.
        rows: `[T, n]`, token and place among its n choices -> row; the inverse of `order`.
        tokens: `[S]`, row -> token.
    """

    groups: Groups
    order: Tensor
    rows: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, chosen: Tensor, experts: int) -> "Routing":
        """Sort the rows of a router's choices, `[T, n]`, which are numbers below `experts`."""
        of_row, order = chosen.flatten().sort(stable=True)
        numbers = torch.arange(max(len(order), experts), device=chosen.device)
        ends = torch.searchsorted(of_row, numbers[:experts].to(of_row.dtype), right=True, out_int32=True)
        rows = torch.empty_like(order).scatter_(0, order, numbers[: len(order)]).view(chosen.shape)
        return cls(Groups(ends), order, rows, order // chosen.shape[1])


def gather(x: Tensor, routing: Routing) -> Tensor:
    """Copy tokens `[T, n]` to the rows of their experts, `[S, n]`."""
    return _Gather.apply(x, routing)


def combine(y: Tensor, routing: Routing) -> Tensor:
    """Sum up the rows of each token: the transpose of `gather`, `[S, n]` -> `[T, n]`."""
    return _Combine.apply(y, routing)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, routing: Routing) -> Tensor:
        ctx.routing = routing
        return x.index_select(0, routing.tokens)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return combine(dy, ctx.routing), None


class _Combine(torch.autograd.Function):
    """Summed token by token, which gives the same bits every time, where adding row by row does not on a GPU."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, routing: Routing) -> Tensor:
        ctx.routing = routing
        return torch.nn.functional.embedding_bag(routing.rows, y, mode="sum")  # without a copy of y in their order

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return gather(dy, ctx.routing), None
