"""The parts of Gluon that Triton renamed between 3.6 and 3.9, under the names of 3.9.

Each is a function of Gluon itself, so kernels can call it by the name that their module imports.
"""

from triton.experimental.gluon.language import shared_memory_descriptor
from triton.experimental.gluon.language.nvidia.hopper import tma

if hasattr(tma, "async_load"):  # Triton 3.8 has both names, 3.9 these
    async_load, async_store = tma.async_load, tma.async_store
else:
    async_load, async_store = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global

# A method that kernels call as a function: reinterpret(buffer, dtype, shape, layout).
if hasattr(shared_memory_descriptor, "reinterpret"):
    reinterpret = shared_memory_descriptor.reinterpret
else:
    reinterpret = shared_memory_descriptor._reinterpret
