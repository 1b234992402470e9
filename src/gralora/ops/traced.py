"""`compiled.linear` with bodies that torch.compile traces, so that it launches their kernels. This imports Triton.

The body of a large layer is its projection, which the compiler launches, and an operator for its product. So gradient
checkpointing, which computes a block again only as far as the backward needs it, leaves out the product of the block's
last layer.
"""

import functools
import os
from importlib.metadata import PackageNotFoundError, version

from torch.library import triton_op

from . import compiled, fused, plans
from .layout import contiguous_or_rows
from .reference import Factors


@functools.wraps(compiled.linear_op)  # the operator's signature
def _linear(x, weight, bias, A, B, hybrid_A, hybrid_B, scaling, p, seed):  # type: ignore[no-untyped-def]
    if not compiled.is_called(x, weight, p):
        return compiled.linear_op(x, weight, bias, A, B, hybrid_A, hybrid_B, scaling, p, seed)
    packed, seen = fused.pack(Factors(A, B, hybrid_A, hybrid_B, scaling)), contiguous_or_rows(x)
    how = plans.plan(seen, weight, packed.A, packed.B, packed.h, p)
    g, B = fused.linear_down(seen, packed, p, seed, how)
    return compiled.adapted(x, weight, bias, g, B), g


@functools.wraps(compiled.linear_backward_op)
def _linear_backward(dy, x, weight, A, B, hybrid_A, hybrid_B, scaling, g, p, seed, needs):  # type: ignore[no-untyped-def]
    backward = compiled.linear_backward if compiled.is_called(x, weight, p) else compiled.linear_backward_op
    return backward(dy, x, weight, A, B, hybrid_A, hybrid_B, scaling, g, p, seed, needs)


# The compiler's cache on disk knows what an operator does by its name alone: another body must have another name.
# A release has its version's; whoever changes `ops` sets GRALORA_OPS_VERSION to another word, or clears the cache.
def _operator_name() -> str:
    try:
        body = os.environ.get("GRALORA_OPS_VERSION") or version("gralora")
    except PackageNotFoundError:  # a source tree on the path
        body = "source"
    return "linear_traced_" + "".join(c if c.isalnum() else "_" for c in body)


linear, _ = compiled.operators(_operator_name(), triton_op, _linear, _linear_backward)
