"""Which sample of a batch each row of a tensor comes from: int64 tensors on the CPU.

A row is an entry of a tensor's leading dimensions. Its sample is the position of its adapter id in
the batch. To index rows, `picked` and `placed` index their samples in the same way. They read the
values of indices: on a GPU that waits for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

# The sample of a row of no sample, as of a new buffer, and of a row that two samples share.
NO_SAMPLE = -1
SEVERAL_SAMPLES = -2

# Along each leading dimension an index, or None for all entries of the dimension.
Indices = Sequence["torch.Tensor | None"]


def in_order(shape: Sequence[int], count: int) -> torch.Tensor | None:
    """Returns the sample of each row, for rows in the order of the batch.

    Row r of R belongs to sample ``r * count // R``, as a layer in a mixed batch assumes. Returns
    None if R, the number of elements of ``shape``, is zero or is not a multiple of ``count``.
    """
    rows = math.prod(shape)
    if not rows or rows % count:
        return None
    return (torch.arange(rows, device="cpu") * count // rows).view(*shape)


def no_samples(shape: Sequence[int]) -> torch.Tensor:
    """Returns the samples of rows of no sample."""
    return torch.full(tuple(shape), NO_SAMPLE, device="cpu")


def is_in_order(samples: torch.Tensor, count: int, *, blanks: bool = False) -> bool:
    """Whether rows are in the order of the batch, as many of each sample.

    If ``blanks``, rows of no sample fit everywhere.
    """
    expected = in_order(samples.shape, count)
    if expected is None:
        return False
    fits = samples == expected
    return bool((fits | (samples == NO_SAMPLE) if blanks else fits).all())


def is_moved(tensor: torch.Tensor) -> bool:
    """Whether a view moved the first dimension of its memory behind another one."""
    sizes, strides = tensor.shape, tensor.stride()
    if not sizes or sizes[0] == 1:
        return False
    return any(n > 1 and step > strides[0] for n, step in zip(sizes, strides, strict=True))


def of_view(tensor: torch.Tensor, samples: torch.Tensor, lead: int) -> torch.Tensor | None:
    """Returns the samples of a tensor's ``lead`` first dimensions; None where they are not known.

    Args:
        tensor: Any view of its storage.
        samples: One for each of as many equal parts of the storage.
        lead: Number of dimensions.
    """
    total = storage_size(tensor)
    if not samples.numel() or total % samples.numel():
        return None
    part = total // samples.numel()
    at = torch.tensor(tensor.storage_offset(), device="cpu")
    dimensions = list(zip(tensor.shape, tensor.stride(), strict=True))
    for size, step in dimensions[:lead]:
        at = at.unsqueeze(-1) + torch.arange(size, device="cpu") * step
    last = sum((size - 1) * step for size, step in dimensions[lead:])
    if at.numel() and int((at % part).max()) + last >= part:
        return None
    return samples[at // part]


def storage_size(tensor: torch.Tensor) -> int:
    """Returns how many elements a tensor's storage has room for."""
    return tensor.untyped_storage().nbytes() // tensor.element_size()


def is_whole(tensor: torch.Tensor) -> bool:
    """Whether a tensor is all of its storage, in the order of the memory."""
    return tensor.is_contiguous() and tensor.numel() == storage_size(tensor)


def dimensions_of(indices: Indices) -> int:
    """Returns how many dimensions of a tensor are indexed: a mask takes as many as it has."""
    return sum(1 if i is None or not _is_mask(i) else i.dim() for i in indices)


def read(indices: Indices) -> list[torch.Tensor | None] | None:
    """Returns indices on the CPU; None where values cannot be read."""
    if not all(index is None or is_readable(index) for index in indices):
        return None
    return [None if index is None else index.cpu() for index in indices]


def is_readable(tensor: torch.Tensor) -> bool:
    """Whether a tensor has values that the host can read: not in the capture of a CUDA graph."""
    if tensor.is_meta or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def picked(samples: torch.Tensor, indices: Indices) -> torch.Tensor | None:
    """Returns the samples of rows that indices pick; None where values cannot be read."""
    values = read(indices)
    return None if values is None else torch.ops.aten.index(samples, values)


def placed(
    samples: torch.Tensor, indices: Indices, values: torch.Tensor, *, adds: bool
) -> torch.Tensor | None:
    """Returns the samples of rows after rows with samples ``values`` were put there by indices.

    If ``adds``, they are added to what is there. None where values cannot be read.
    """
    read_indices = read(indices)
    if read_indices is None:
        return None
    before = torch.ops.aten.index(samples, read_indices)
    if adds:
        several = (before != NO_SAMPLE) & (before != values)
        values = values.masked_fill(several, SEVERAL_SAMPLES)
    after = torch.ops.aten.index_put(samples, read_indices, values)
    # Rows that were put to one place: the place has one of them, and the others differ from it.
    differ = (torch.ops.aten.index(after, read_indices) != values).long()
    shared = torch.ops.aten.index_put(torch.zeros_like(after), read_indices, differ, True)
    return after.masked_fill(shared > 0, SEVERAL_SAMPLES)


def _is_mask(index: torch.Tensor) -> bool:
    return index.dtype in (torch.bool, torch.uint8)
