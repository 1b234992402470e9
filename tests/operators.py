"""The operations of `gralora.ops` with the factors one by one, as lists of operands and of leaves have them."""

from gralora import ops
from gralora.ops import Factors, reference


def gralora_linear(x, weight, bias, A, B, hybrid_A, hybrid_B, scaling, *dropout):
    return ops.gralora_linear(x, weight, bias, Factors(A, B, hybrid_A, hybrid_B, scaling), *dropout)


def add_update(y, x, A, B, hybrid_A, hybrid_B, scaling, *dropout):
    return ops.add_update(y, x, Factors(A, B, hybrid_A, hybrid_B, scaling), *dropout)


def reference_linear(x, weight, bias, A, B, hybrid_A, hybrid_B, scaling, kept=None):
    return reference.linear(x, weight, bias, Factors(A, B, hybrid_A, hybrid_B, scaling), kept)


def reference_update(x, A, B, hybrid_A, hybrid_B, scaling=1.0):
    return reference.update(x, Factors(A, B, hybrid_A, hybrid_B, scaling))
