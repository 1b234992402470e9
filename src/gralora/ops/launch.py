"""Launching Triton kernels with little work on the host: launches must not cost more than a layer's arithmetic."""

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from types import BuiltinFunctionType
from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton
from triton import knobs

from . import dispatch

Grid = tuple[int, int, int]
Ints = tuple[int, ...]
MOST_TILINGS = 1024  # that are kept: a few for each shape of layers and number of tokens
MOST_ENCODED = 4096  # launches whose descriptors are kept, 2 KB each: the steps of a training repeat their addresses


@dataclass(frozen=True, eq=False)
class Tiling:
    """What TMA copies in blocks: each time the place of a tensor among those given, a block, its shape and strides.

    Compared by identity, since it is looked up at every launch.
    """

    tiles: tuple[tuple[int, Ints, Ints, Ints], ...]


Tiled = tuple[Tiling, tuple[Tensor, ...]]
UNTILED: Tiled = Tiling(()), ()
Launch = Callable[[Grid, int, Tiled, tuple[Any, ...]], None]


class Launcher:
    """A JIT kernel whose compiled versions are looked up by the caller's key instead of by inspecting every argument.

    Its parameters are descriptors of tiled tensors, then pointers, then numbers that it does not specialise on
    (`do_not_specialize`), then constants. `describe` makes Triton's descriptor of a tensor, a block, a shape and
    strides.
    """

    def __init__(self, kernel: Any, describe: Any = None, **options: Any) -> None:
        self.kernel, self.describe, self.options = kernel, describe, options
        self.launches: dict[Hashable, Launch] = {}

    def __call__(
        self,
        key: Hashable,
        grid: Grid,
        tensors: tuple[Tensor, ...],
        numbers: tuple[Any, ...],
        constants: tuple[Any, ...],
        tiled: Tiled = UNTILED,
    ) -> None:
        """Launch on the device and current stream of the tensors, all of one device.

        Args:
            key: determines the constants, and the dtypes and blocks of what is passed as descriptors.
            grid: of programs.
            tensors: passed as pointers; their dtypes and the alignment of their addresses need not be in the key.
            numbers, constants: passed as they are.
            tiled: passed as descriptors: how, and of which tensors.
        """
        if dispatch.is_traced(tensors[0]):  # the compiler is to launch the kernel
            wrap_triton(self.kernel)[grid](*tensors, *numbers, *constants, **self.options)
            return
        device = tensors[0].get_device()  # -1 on a CPU, in Triton's interpreter
        if device >= 0 and device != torch._C._cuda_getDevice():
            with torch.cuda.device(device):
                return self(key, grid, tensors, numbers, constants, tiled)
        addresses = [t.data_ptr() for t in tensors]
        key = (device, key, *[t.dtype for t in tensors], *[address % 16 for address in addresses])
        launch = self.launches.get(key)
        if launch is not None:
            # as integers, which spares Triton's C function asking every tensor and the driver for its address
            return launch(grid, device, tiled, (*addresses, *numbers, *constants))
        descriptors = _described(self.describe, tiled)
        compiled = self.kernel[grid](*descriptors, *tensors, *numbers, *constants, **self.options)
        if compiled is not None:  # None in the interpreter
            self.launches[key] = _launch_of(compiled, self.describe)


def _launch_of(compiled: Any, describe: Any) -> Launch:
    """How to launch a compiled kernel: by Triton's C function, at an eighth of the cost of the Python around it.

    What Python does there: hooks for profilers, scratch memory, tensor descriptors. Where one of the first two is
    used, or Triton is not the version whose C function is known here, the kernel is launched as Triton does.
    """

    def launch_by_triton(grid: Grid, device: int, tiled: Tiled, args: tuple[Any, ...]) -> None:
        compiled[grid](*_described(describe, tiled), *args)

    c_launch = _c_launch(compiled.run)
    if c_launch is None:
        return launch_by_triton
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    encode = triton.runtime.driver.active.utils.fill_tma_descriptor
    encodings = [
        (meta["swizzle"], meta["elem_size"], TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]], meta["block_size"])
        for meta in compiled.metadata.tensordesc_meta or ()
    ]
    function, metadata = compiled.function, compiled.packed_metadata
    flags = compiled.run.launch_cooperative_grid, compiled.run.launch_pdl
    stream_of = torch._C._cuda_getCurrentRawStream

    @functools.lru_cache(MOST_TILINGS)
    def with_gaps(tiling: Tiling) -> tuple[list[Any], list[tuple[Any, ...]]]:
        """Arguments but for the descriptors, and of each of these its gaps, its tensor, and how it is encoded."""
        arguments: list[Any] = []
        gaps: dict[Any, tuple[Any, ...]] = {}  # what is passed twice is encoded once
        for tile, encoding in zip(tiling.tiles, encodings, strict=True):
            place, _, shape, strides = tile
            gaps.setdefault(tile, ([], place, *encoding, shape, strides))[0].append(len(arguments))
            arguments += None, *shape, *strides
        return arguments, list(gaps.values())

    @functools.lru_cache(MOST_ENCODED)
    def encoded(tiling: Tiling, addresses: Ints) -> list[Any]:
        arguments, descriptors = with_gaps(tiling)
        arguments = arguments.copy()
        for gaps, place, swizzle, size, dtype, block, shape, strides in descriptors:
            descriptor = encode(addresses[place], swizzle, size, dtype, block, shape, strides, 0)
            for gap in gaps:
                arguments[gap] = descriptor
        return arguments

    def launch(grid: Grid, device: int, tiled: Tiled, args: tuple[Any, ...]) -> None:
        if knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls:
            return launch_by_triton(grid, device, tiled, args)
        tiling, tensors = tiled
        maps = encoded(tiling, tuple([t.data_ptr() for t in tensors])) if tensors else ()
        c_launch(*grid, stream_of(device), function, *flags, None, None, metadata, None, None, None, *maps, *args)

    return launch


def _described(describe: Any, tiled: Tiled) -> list[Any]:
    tiling, tensors = tiled
    return [describe(tensors[place], *others) for place, *others in tiling.tiles]


def _c_launch(run: Any) -> Any:
    """Triton 3.6's C function that launches a kernel, or None."""
    if not triton.__version__.startswith("3.6.") or run.global_scratch_size or run.profile_scratch_size:
        return None
    found = [run.launch, *(cell.cell_contents for cell in getattr(run.launch, "__closure__", None) or ())]
    return next((f for f in found if isinstance(f, BuiltinFunctionType)), None)
