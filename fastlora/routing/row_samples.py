"""Functions that find the sample of the batch to which each row of a tensor belongs.

Samples are int64 tensors on the CPU.

A row is an entry of a tensor's leading dimensions. Its sample is the position of its adapter id in
the batch. When an operator indexes rows, `selected_samples` and `samples_after_write` index
the rows' samples in the same way. They read the values of indices, for which the host waits if they
are on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

# Values for a row without a sample, as in a new buffer, and for a row that several samples share.
NO_SAMPLE = -1
SEVERAL_SAMPLES = -2

# For each leading dimension an index, or None for all entries of the dimension.
Indices = Sequence["torch.Tensor | None"]


def samples_in_batch_order(leading_shape: Sequence[int], num_samples: int) -> torch.Tensor | None:
    """For rows in batch order, return the index of the sample that each row belongs to.

    Row r of R rows belongs to sample ``r * num_samples // R``, as a layer in a mixed batch assumes.
    R is the product of the sizes in ``leading_shape``. Returns None if R is zero or is not a
    multiple of ``num_samples``.
    """
    rows = math.prod(leading_shape)
    if not rows or rows % num_samples:
        return None
    return (torch.arange(rows, device="cpu") * num_samples // rows).view(*leading_shape)


def no_samples(leading_shape: Sequence[int]) -> torch.Tensor:
    """Return a tensor that marks each row as belonging to no sample.

    The tensor has the shape ``leading_shape`` and is filled with `NO_SAMPLE`.
    """
    return torch.full(tuple(leading_shape), NO_SAMPLE, device="cpu")


def are_samples_in_batch_order(
    samples: torch.Tensor, num_samples: int, *, allow_no_sample: bool = False
) -> bool:
    """Return whether rows are in batch order, given the sample that each row belongs to.

    ``samples`` contains the sample of each row. Each sample must have the same number of rows. If
    ``allow_no_sample`` is set, rows without a sample are accepted at any position.
    """
    expected = samples_in_batch_order(samples.shape, num_samples)
    if expected is None:
        return False
    fits = samples == expected
    return bool((fits | (samples == NO_SAMPLE) if allow_no_sample else fits).all())


def has_stride_larger_than_first(tensor: torch.Tensor) -> bool:
    """Return whether any later dimension has a larger stride than the first dimension.

    This is the case after a permute, for example.
    """
    sizes, strides = tensor.shape, tensor.stride()
    if not sizes or sizes[0] == 1:
        return False
    return any(n > 1 and step > strides[0] for n, step in zip(sizes, strides, strict=True))


def batch_sample_of_each_row(
    view: torch.Tensor, samples_of_storage_parts: torch.Tensor, num_row_dims: int
) -> torch.Tensor | None:
    """For each row of a view, return the index of the sample that the row belongs to.

    The index is the position of the sample in the batch, or `NO_SAMPLE` for a row that belongs to
    no sample. The function returns None if the samples are unknown, for example because a row may
    span several parts of the storage.

    Args:
        view: The tensor, which may be any view of its storage.
        samples_of_storage_parts: The sample of each part of the storage. The storage is divided
            into ``samples_of_storage_parts.numel()`` equal parts.
        num_row_dims: Number of leading dimensions. Each of their entries is a row.
    """
    total = storage_numel(view)
    if not samples_of_storage_parts.numel() or total % samples_of_storage_parts.numel():
        return None
    part = total // samples_of_storage_parts.numel()
    at = torch.tensor(view.storage_offset(), device="cpu")
    dimensions = list(zip(view.shape, view.stride(), strict=True))
    for size, step in dimensions[:num_row_dims]:
        at = at.unsqueeze(-1) + torch.arange(size, device="cpu") * step
    last = sum((size - 1) * step for size, step in dimensions[num_row_dims:])
    if at.numel() and int((at % part).max()) + last >= part:
        return None
    return samples_of_storage_parts[at // part]


def storage_numel(tensor: torch.Tensor) -> int:
    """Return the number of elements in a tensor's storage.

    The elements have the dtype of the tensor.
    """
    return tensor.untyped_storage().nbytes() // tensor.element_size()


def is_contiguous_and_covers_storage(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is contiguous and covers its whole storage."""
    return tensor.is_contiguous() and tensor.numel() == storage_numel(tensor)


def indexed_dimensions(indices: Indices) -> int:
    """Return the number of tensor dimensions that the indices consume.

    The dimensions are the leading dimensions of the indexed tensor. A k-dimensional mask applies to
    k dimensions.
    """
    return sum(1 if i is None or not _is_mask(i) else i.dim() for i in indices)


def copy_indices_to_cpu(indices: Indices) -> list[torch.Tensor | None] | None:
    """Copy the indices to the CPU, and return the copies as a list.

    Returns None if the host cannot read the values of an index.
    """
    if not all(index is None or values_are_readable(index) for index in indices):
        return None
    return [None if index is None else index.cpu() for index in indices]


def values_are_readable(tensor: torch.Tensor) -> bool:
    """Return whether a tensor's values can be read on the host.

    Reading the values of a GPU tensor makes the host wait for the GPU. The result is False for meta
    tensors, for tensor subclasses other than `torch.nn.Parameter`, and, during the capture of a
    CUDA graph, for CUDA tensors.
    """
    if tensor.is_meta or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def selected_samples(samples: torch.Tensor, indices: Indices) -> torch.Tensor | None:
    """Return the samples of the rows that indices select, or None if the indices cannot be read.

    For each selected row, the result contains the sample that the row belongs to.
    """
    values = copy_indices_to_cpu(indices)
    return None if values is None else torch.ops.aten.index(samples, values)


def samples_after_write(
    samples_before: torch.Tensor, indices: Indices, written_samples: torch.Tensor, *, adds: bool
) -> torch.Tensor | None:
    """Return the sample that each row belongs to after an indexed write, or None if it is unknown.

    The write changes the rows of a tensor at ``indices``. ``samples_before`` are the samples of the
    rows before the write, and ``written_samples`` are the samples of the written rows. If ``adds``
    is set, the written rows are added to the existing rows. A row is marked with `SEVERAL_SAMPLES`
    if it may belong to more than one sample after the write.

    The result is None if the values of the indices cannot be read on the host.
    """
    values_of_indices = copy_indices_to_cpu(indices)
    if values_of_indices is None:
        return None
    before = torch.ops.aten.index(samples_before, values_of_indices)
    if adds:
        several = (before != NO_SAMPLE) & (before != written_samples)
        written_samples = written_samples.masked_fill(several, SEVERAL_SAMPLES)
    after = torch.ops.aten.index_put(samples_before, values_of_indices, written_samples)
    # If several rows were put in one place, the place has one of them, and the others differ.
    differ = (torch.ops.aten.index(after, values_of_indices) != written_samples).long()
    shared = torch.ops.aten.index_put(torch.zeros_like(after), values_of_indices, differ, True)
    return after.masked_fill(shared > 0, SEVERAL_SAMPLES)


def _is_mask(index: torch.Tensor) -> bool:
    return index.dtype in (torch.bool, torch.uint8)
