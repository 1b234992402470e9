"""The parts of Gluon that Triton renamed or added between 3.6 and 3.9, under names of ours.

Each is a function of Gluon itself, so kernels can call it by the name that their module imports.
"""

from typing import Any

from triton._C.libtriton import ir
from triton.experimental.gluon.language import shared_memory_descriptor
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import tma

if hasattr(tma, "async_load"):  # Triton 3.8 has both names, 3.9 these
    async_load, async_store = tma.async_load, tma.async_store
else:
    async_load, async_store = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global

# Add a tile of shared memory to one in global memory: async_add(descriptor, coordinates, tile).
if hasattr(tma, "async_atomic_add"):  # Triton 3.8 and later
    async_add = tma.async_atomic_add
else:

    @builtin
    def async_add(descriptor: Any, coordinates: Any, tile: Any, _semantic: Any = None) -> None:
        at = _semantic._convert_to_ir_values(coordinates, require_i64=False)
        add = ir.DESCRIPTOR_REDUCE_KIND.ADD
        _semantic.builder.create_async_tma_reduce(add, descriptor.handle, at, tile.handle)


# A method that kernels call as a function: reinterpret(buffer, dtype, shape, layout).
if hasattr(shared_memory_descriptor, "reinterpret"):
    reinterpret = shared_memory_descriptor.reinterpret
else:
    reinterpret = shared_memory_descriptor._reinterpret
