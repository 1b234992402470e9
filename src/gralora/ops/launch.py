"""Launching Triton kernels with little work on the host: launches must not cost more than a layer's arithmetic."""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor


class Launcher:
    """A JIT kernel whose compiled versions are looked up by the caller's key instead of by inspecting every argument.

    The key must determine whatever Triton would specialise on: dtypes, constants, alignment of addresses; integers
    that are not in the key are to be declared `do_not_specialize`.
    """

    def __init__(self, kernel: Any, **options: Any) -> None:
        self.kernel, self.options = kernel, options
        self.compiled: dict[Hashable, Any] = {}

    def __call__(self, key: Hashable, grid: tuple[int, int, int], tensor: Tensor, *args: Any) -> None:
        """Launch on the device and current stream of `tensor`; `args` are all of the kernel's, constants included."""
        if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
            with torch.cuda.device(tensor.device):
                return self(key, grid, tensor, *args)
        key = key, tensor.device.index
        compiled = self.compiled.get(key)
        if compiled is None:
            self.compiled[key] = self.kernel[grid](*args, **self.options)  # None in Triton's interpreter
        else:
            compiled[grid](*args)
