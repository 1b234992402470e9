"""`compiled.linear` with bodies that torch.compile traces. Importing it imports Triton.

Of a large layer it sees what is projected down, which it launches, and that the backward needs this, and not the
product: gradient checkpointing does not compute the product of a block's last layer anew.
"""

import functools
import hashlib
from pathlib import Path

from torch.library import triton_op

from . import compiled, dispatch, fused


@functools.wraps(fused.forward)  # the operator's signature
def _forward(x, weight, bias, A, B, hybrid_A, hybrid_B, scaling, p, seed):
    g, B = fused.sub_ranks(x, A, B, hybrid_A, hybrid_B, scaling, p, seed)
    adapted = compiled.adapted if dispatch.is_called(x, weight, p) else fused.adapted
    return adapted(x, weight, bias, g, B), g


@functools.wraps(compiled.gradients)
def _backward(dy, x, weight, A, B, hybrid_A, hybrid_B, g, scaling, p, seed, needs):
    backward = compiled.linear_backward if dispatch.is_called(x, weight, p) else compiled.gradients
    return backward(dy, x, weight, A, B, hybrid_A, hybrid_B, g, scaling, p, seed, needs)


# The compiler's cache on disk knows what an operator does by its name alone: another body must have another name.
_sources = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
_digest = hashlib.sha256(_sources).hexdigest()[:8]
linear, _ = compiled.operators(f"linear_traced_{_digest}", triton_op, _forward, _backward)
