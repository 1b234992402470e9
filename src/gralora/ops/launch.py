"""Launching Triton kernels with little work on the host: launches must not cost more than a layer's arithmetic."""

from collections.abc import Callable, Hashable
from types import BuiltinFunctionType
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs

Grid = tuple[int, int, int]
Launch = Callable[[Grid, int, tuple[Any, ...]], None]


class Launcher:
    """A JIT kernel whose compiled versions are looked up by the caller's key instead of by inspecting every argument.

    The key must determine whatever Triton would specialise on: dtypes, constants, alignment of addresses; integers
    that are not in the key are to be declared `do_not_specialize`.
    """

    def __init__(self, kernel: Any, **options: Any) -> None:
        self.kernel, self.options = kernel, options
        self.launches: dict[Hashable, Launch] = {}

    def __call__(self, key: Hashable, grid: Grid, tensor: Tensor, *args: Any) -> None:
        """Launch on the device and current stream of `tensor`; `args` are all of the kernel's, constants included."""
        device = tensor.device.index  # None on a CPU, in Triton's interpreter
        if device is not None and device != torch._C._cuda_getDevice():
            with torch.cuda.device(device):
                return self(key, grid, tensor, *args)
        launch = self.launches.get((key, device))
        if launch is not None:
            return launch(grid, device, args)
        compiled = self.kernel[grid](*args, **self.options)
        if compiled is not None:  # None in the interpreter
            self.launches[key, device] = _launch_of(compiled)

    def launch(
        self, grid: Grid, tensors: tuple[Tensor, ...], numbers: tuple[Any, ...], constants: tuple[Any, ...]
    ) -> None:
        """Launch a kernel that takes pointers, then numbers that are not specialised on, then constants.

        On the device and current stream of the tensors. Addresses are passed as integers, which spares Triton's C
        function asking every tensor and the driver for them.
        """
        device = tensors[0].get_device()  # -1 on a CPU, in Triton's interpreter
        if device >= 0 and device != torch._C._cuda_getDevice():
            with torch.cuda.device(device):
                return self.launch(grid, tensors, numbers, constants)
        addresses = [t.data_ptr() for t in tensors]
        key = (device, constants, *[t.dtype for t in tensors], *[address % 16 for address in addresses])
        launch = self.launches.get(key)
        if launch is not None:
            return launch(grid, device, (*addresses, *numbers, *constants))
        compiled = self.kernel[grid](*tensors, *numbers, *constants, **self.options)
        if compiled is not None:  # None in the interpreter
            self.launches[key] = _launch_of(compiled)


def _launch_of(compiled: Any) -> Launch:
    """How to launch a compiled kernel: by Triton's C function, at an eighth of the cost of the Python around it.

    What Python does there: hooks for profilers, scratch memory, tensor descriptors. Where one of the first two is
    used, or Triton is not the version whose C function is known here, the kernel is launched as Triton does.
    """
    c_launch = _c_launch(compiled.run)
    if c_launch is None:
        return lambda grid, device, args: compiled[grid](*args)
    from triton.backends.nvidia.driver import make_tensordesc_arg
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    function, metadata = compiled.function, compiled.packed_metadata
    flags = compiled.run.launch_cooperative_grid, compiled.run.launch_pdl
    descriptors = compiled.metadata.tensordesc_meta or ()
    stream_of = torch._C._cuda_getCurrentRawStream

    def launch(grid: Grid, device: int, args: tuple[Any, ...]) -> None:
        if knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls:
            compiled[grid](*args)
            return
        if descriptors:
            metas, expanded = iter(descriptors), []
            for arg in args:
                if type(arg) is TensorDescriptor:
                    expanded += make_tensordesc_arg(arg, next(metas))
                else:
                    expanded.append(arg)
            args = expanded
        c_launch(*grid, stream_of(device), function, *flags, None, None, metadata, None, None, None, *args)

    return launch


def _c_launch(run: Any) -> Any:
    """Triton 3.6's C function that launches a kernel, or None."""
    if not triton.__version__.startswith("3.6.") or run.global_scratch_size or run.profile_scratch_size:
        return None
    found = [run.launch, *(cell.cell_contents for cell in getattr(run.launch, "__closure__", None) or ())]
    return next((f for f in found if isinstance(f, BuiltinFunctionType)), None)
