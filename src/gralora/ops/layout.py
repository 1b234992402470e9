"""How tensors lie in memory, as matrix products and kernels need to know it."""

from typing import NamedTuple

from torch import Tensor

Ints = tuple[int, ...]


class Layout(NamedTuple):
    """All that a plan depends on of where a tensor lies; equal for tensors that the same launch can take.

    Attributes:
        shape: sizes.
        strides: elements from one index to the next, for each dimension.
        aligned: whether the address is a multiple of 16 bytes, which TMA (Hopper's copy engine) needs.
    """

    shape: Ints
    strides: Ints
    aligned: bool = True


def layout(t: Tensor) -> Layout:
    return Layout(t.shape, t.stride(), not t.data_ptr() % 16)


def rows(x: Tensor) -> Tensor:
    """View (or copy) `[..., n]` as `[T, n]`."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def contiguous_or_rows(x: Tensor) -> Tensor:
    """x itself if it is contiguous, else `[T, n]` with unit stride along n: the two forms that kernels take.

    A contiguous `[..., n]` is left as it is because a view costs the host as much as launching a kernel.
    """
    if x.is_contiguous():
        return x
    x = rows(x)
    return x if x.stride()[1] == 1 else x.contiguous()


def row_stride(shape: Ints, strides: Ints) -> int:
    """Elements from one row to the next of `[T, n]`, or of a contiguous `[..., n]`."""
    return strides[0] if len(shape) == 2 else shape[-1]


def chunks(x: Tensor, k: int) -> Tensor:
    """View `[T, n]` as `[k, T, n/k]`: a batch of k matrices that share memory with x."""
    n, (stride_t, stride_n) = x.shape[1] // k, x.stride()
    return x.as_strided((k, x.shape[0], n), (n * stride_n, stride_t, stride_n))
