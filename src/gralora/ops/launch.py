"""Launching Triton kernels at little cost to the host, which would otherwise take longer than a layer's arithmetic.

Triton's own launch, the JIT launch, inspects every argument and encodes every TMA descriptor each time. The cheap
launch looks the compiled kernel up by a key that the caller gives, keeps descriptors, and calls Triton's C launcher
itself. What this takes depends on Triton's release: one that is not in RELEASES launches every kernel by itself.
"""

import functools
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from types import BuiltinFunctionType
from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton
from triton import knobs
from triton.runtime.errors import OutOfResources

from .interface import KernelUnavailable
from .torch_seam import current_device, is_traced

Grid = tuple[int, int, int]
Ints = tuple[int, ...]
RELEASES = ("3.6", "3.7", "3.8", "3.9")  # of Triton, with which the cheap launch is tested
MOST_TILINGS = 1024  # that are kept: a few for each shape of layers and number of tokens
MOST_ENCODED = 4096  # launches whose descriptors are kept, 2 KB each: the steps of a training repeat their addresses


@dataclass(frozen=True, eq=False)
class Tiling:
    """The blocks in which TMA copies tensors: for each descriptor a tensor's index, a block, a shape and strides.

    Compared by identity, since it is looked up at every launch.
    """

    tiles: tuple[tuple[int, Ints, Ints, Ints], ...]


Tiled = tuple[Tiling, tuple[Tensor, ...]]
UNTILED: Tiled = Tiling(()), ()
CheapLaunch = Callable[[Grid, int, Tiled, Sequence[Any]], None]
UNKNOWN: Any = object()


class Launcher:
    """Launches a JIT kernel, whose compiled versions it looks up by the caller's key.

    The kernel's parameters are descriptors of tiled tensors, then pointers, then numbers that it does not specialise
    on (`do_not_specialize`), then constants. `descriptor` makes Triton's descriptor from a tensor, a block, a shape
    and strides. `module` is the `__name__` of the module that launches.
    """

    def __init__(self, module: str, kernel: Any, descriptor: Any = None, **options: Any) -> None:
        self.module, self.kernel, self.descriptor, self.options = module, kernel, descriptor, options
        self.launches: dict[Hashable, CheapLaunch | None] = {}
        self.loaded: list[Any] = []  # compiled kernels, which Triton unloads from the GPU once nobody holds them

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

        Raises:
            KernelUnavailable: at the first call with a key, if Triton cannot compile the kernel or the GPU cannot hold
                it. Nothing is launched then.
        """
        if is_traced(tensors[0]):  # the compiler is to launch the kernel
            wrap_triton(self.kernel)[grid](*tensors, *numbers, *constants, **self.options)
            return
        device = tensors[0].get_device()  # -1 on a CPU, in Triton's interpreter
        if device >= 0 and device != current_device():
            with torch.cuda.device(device):
                return self(key, grid, tensors, numbers, constants, tiled)
        addresses = [t.data_ptr() for t in tensors]
        key = (device, key, *[t.dtype for t in tensors], *[address % 16 for address in addresses])
        launch = self.launches.get(key, UNKNOWN)
        if launch is UNKNOWN:
            launch = self.launches[key] = self._prepare(grid, tensors, numbers, constants, tiled)
        if launch is None or knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls:
            self.kernel[grid](*self.described(tiled), *tensors, *numbers, *constants, **self.options)
        else:
            # as integers, which spares Triton's C function asking every tensor and the driver for its address
            launch(grid, device, tiled, (*addresses, *numbers, *constants))

    def described(self, tiled: Tiled) -> list[Any]:
        """Triton's descriptors of the tiled tensors."""
        tiling, tensors = tiled
        return [self.descriptor(tensors[index], *others) for index, *others in tiling.tiles]

    def compile(
        self,
        grid: Grid,
        tensors: tuple[Tensor, ...],
        numbers: tuple[Any, ...],
        constants: tuple[Any, ...],
        tiled: Tiled = UNTILED,
    ) -> Any:
        """The kernel that Triton compiles for these arguments; None in its interpreter."""
        return self.kernel.warmup(*self.described(tiled), *tensors, *numbers, *constants, grid=grid, **self.options)

    def _prepare(self, grid: Grid, *arguments: Any) -> CheapLaunch | None:
        """Compile the kernel, load it onto the GPU, and see how to launch it: None for the JIT launch."""
        try:
            compiled = self.compile(grid, *arguments)
        except (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as error:
            raise self._unavailable(error) from error
        if compiled is None:
            return None
        try:
            compiled[grid]  # loads it
        except OutOfResources as error:
            raise self._unavailable(error) from error
        self.loaded.append(compiled)
        if _release() not in RELEASES:
            _warn_of_jit_launch("its release is not among those that this is tested with")
            return None
        try:
            return _cheap_launch(compiled)
        except Exception as error:  # whatever it lacks
            _warn_of_jit_launch(f"its launcher is not as in other versions of {_release()}: {error}")
            return None

    def _unavailable(self, error: BaseException) -> KernelUnavailable:
        while error.__cause__ is not None:
            error = error.__cause__
        cause = f"{type(error).__name__}: {error}".strip().splitlines()[-1]  # Triton's own begin with the source
        message = f"{self.kernel.__name__} cannot run with Triton {triton.__version__}: {cause}"
        return KernelUnavailable(message, self.module.rpartition(".")[2])


_no_cheap_launch: str | None = None  # why, where it was tried


def _warn_of_jit_launch(why: str) -> None:
    """Warn once that launches cost the host more than they could."""
    global _no_cheap_launch
    if _no_cheap_launch is None:
        _no_cheap_launch = why
        known = f"{RELEASES[0]} to {RELEASES[-1]}"
        warnings.warn(
            f"Triton {triton.__version__} launches gralora's kernels itself, not by the cheap launch: {why}. "
            f"Results are the same, but the host takes longer. The cheap launch is for Triton {known}.",
            RuntimeWarning,
            stacklevel=2,
        )


def describe() -> str:
    """How kernels are launched, and by which Triton: "cheap launch, Triton 3.6.0"."""
    is_cheap = _release() in RELEASES and _no_cheap_launch is None
    return f"{'cheap' if is_cheap else 'JIT'} launch, Triton {triton.__version__}"


def _release() -> str:
    return ".".join(triton.__version__.split(".")[:2])


def _cheap_launch(compiled: Any) -> CheapLaunch | None:
    """The cheap launch of a compiled kernel, or None if it has none."""
    c_launch = _c_launcher(compiled)
    if c_launch is None:
        return None
    encode = _encoder(compiled)
    stream_of = triton.runtime.driver.active.get_current_stream

    def launch(grid: Grid, device: int, tiled: Tiled, arguments: Sequence[Any]) -> None:
        tiling, tensors = tiled
        maps = encode(tiling, tuple([t.data_ptr() for t in tensors])) if tensors else ()
        c_launch(grid, stream_of(device), maps, arguments)

    return launch


def _c_launcher(compiled: Any) -> Callable[[Grid, int, Sequence[Any], Sequence[Any]], None] | None:
    """Triton's C function, as a function of grid, stream, what `_encoder` returns, and the other arguments.

    None if the kernel takes scratch memory, which Triton allocates at each launch.
    """
    run = compiled.run
    if run.global_scratch_size or run.profile_scratch_size or getattr(run, "gsan_enabled", False):
        return None
    flags = compiled.function, run.launch_cooperative_grid, run.launch_pdl
    # None is for scratch memory, and for hooks and what is passed to them
    if _release() == "3.6":  # a function of each kernel's own, within one that encodes descriptors
        cells = getattr(run.launch, "__closure__", None) or ()
        function = next(f for f in (run.launch, *[c.cell_contents for c in cells]) if type(f) is BuiltinFunctionType)
        fixed = *flags, None, None, compiled.packed_metadata, None, None, None
        return lambda grid, stream, maps, arguments: function(*grid, stream, *fixed, *maps, *arguments)
    function = triton.runtime.driver.active.utils.launch
    fixed = *flags, compiled.packed_metadata, *[None] * 5, run.arg_annotations, run.kernel_signature
    return lambda grid, stream, maps, arguments: function(*grid, stream, *fixed, (*maps, *arguments))


def _encoder(compiled: Any) -> Callable[[Tiling, Ints], list[Any]]:
    """What passes a kernel its tiled tensors, of a tiling and the tensors' addresses.

    Returns:
        Arguments of the C function: for each descriptor its 128 bytes as TMA reads them, shape and strides.
    """
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    utils = triton.runtime.driver.active.utils
    fill = utils.fill_tma_descriptor if _release() == "3.6" else utils.fill_tma_descriptor_tiled
    formats = [
        (meta["swizzle"], meta["elem_size"], TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]], meta["block_size"])
        for meta in compiled.metadata.tensordesc_meta or ()
    ]

    @functools.lru_cache(MOST_TILINGS)
    def with_gaps(tiling: Tiling) -> tuple[list[Any], list[tuple[Any, ...]]]:
        """The arguments without the descriptors, and for each of these its gaps, its tensor, and how it is encoded."""
        arguments: list[Any] = []
        gaps: dict[Any, tuple[Any, ...]] = {}  # what is passed twice is encoded once
        for tile, format in zip(tiling.tiles, formats, strict=True):
            index, _, shape, strides = tile
            gaps.setdefault(tile, ([], index, *format, shape, strides))[0].append(len(arguments))
            arguments += None, *shape, *strides
        return arguments, list(gaps.values())

    @functools.lru_cache(MOST_ENCODED)
    def encoded(tiling: Tiling, addresses: Ints) -> list[Any]:
        arguments, descriptors = with_gaps(tiling)
        arguments = arguments.copy()
        for gaps, index, swizzle, size, dtype, block, shape, strides in descriptors:
            descriptor = fill(addresses[index], swizzle, size, dtype, block, shape, strides, 0)
            for gap in gaps:
                arguments[gap] = descriptor
        return arguments

    return encoded
