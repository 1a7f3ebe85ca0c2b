"""Packed adapters. The image of an adapter is a 1-D tensor that contains all its tensors.

An image is copied to the device in one transfer. It contains up to four blocks for each weight that
the adapter adapts, in the order of the pool's modules. A block is one tensor: ``lora_a [r, K]``,
``lora_b`` as rank rows ``[r, N]`` (the transpose of PEFT's ``[N, r]``), the optional
``lora_bias [N]``, and DoRA's optional magnitude ``[N]``. For a stack of E weights, lora_a and the
rank rows have E * r rows, in PEFT's order. The magnitude is in fp32 even in a 16-bit image, because
it scales whole rows. Ranks are not padded, and a module without factors takes no space. Each block
starts at a multiple of 16 bytes, for vector loads.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch

from fastlora.validation import CheckpointError

ALIGNMENT = 16
# The tensors (blocks) that an adapter can have for a module, in their order in the image.
BLOCK_KINDS = ("lora_a", "lora_b", "lora_bias", "magnitude")
MISSING = -1
_MAGNITUDE = BLOCK_KINDS.index("magnitude")
_MAGNITUDE_BYTES = 4


class TargetableBaseWeight(NamedTuple):
    """A base weight that a pool's adapters can target, described by its name and its shape.

    The base weight is a linear layer's weight or a parameter.

    Attributes:
        name: Name of the linear layer or of the parameter in the base model.
        in_features: Number of input features, K.
        out_features: Number of output features, N.
        num_matrices: Number of matrices that the weight consists of, E; 1 unless it is a stack.
    """

    name: str
    in_features: int
    out_features: int
    num_matrices: int = 1

    def tensor_shape(self, kind: str, rank: int) -> tuple[int, ...]:
        """Return the shape of a tensor of the given kind for the given LoRA rank.

        The tensor is one of an adapter's tensors for this weight. The views of a packed adapter's
        tensors have this shape, which is also the shape in PEFT's layout.

        Args:
            kind: Name of the tensor, an entry of `BLOCK_KINDS`.
            rank: Rank of the adapter for this weight.
        """
        rank *= self.num_matrices
        if kind == "lora_a":
            return rank, self.in_features
        return (self.out_features, rank) if kind == "lora_b" else (self.out_features,)


@dataclass(frozen=True, eq=False)
class AdapterLayout:
    """The layout of an adapter's tensors in the packed tensor.

    The layout consists of the rank and the tensor offsets of each module. The offsets are positions
    within the packed 1-D tensor, which is also called the image. Adapters whose tensors have the
    same shapes share a layout.

    Attributes:
        targets: The G modules of the pool.
        blocks: For each module, a tuple (rank, offsets). The rank is 0 if the adapter does not
            adapt the module. The offsets are in elements, in the order of `BLOCK_KINDS`, and -1 for
            a block that the image does not contain.
        numel: Number of elements in the image.
    """

    targets: Sequence[TargetableBaseWeight]
    blocks: Sequence[tuple[int, Sequence[int]]]
    numel: int

    @functools.cached_property
    def module_ranks(self) -> torch.Tensor:
        """The adapter's rank for each module.

        The result is an int32 CPU tensor of shape ``[G]``.
        """
        return torch.tensor([rank for rank, _ in self.blocks], dtype=torch.int32, device="cpu")

    @functools.cached_property
    def tensor_offsets(self) -> torch.Tensor:
        """Offset of each tensor in the packed tensor.

        The offsets are in elements. The result is an int64 CPU tensor of shape
        ``[len(BLOCK_KINDS), G]``.
        """
        by_kind = list(zip(*(offsets for _, offsets in self.blocks), strict=True))
        return torch.tensor(by_kind, dtype=torch.int64, device="cpu")

    @functools.cached_property
    def dora_modules(self) -> tuple[int, ...]:
        """Indices of the modules for which the adapter has a DoRA magnitude."""
        return tuple(i for i, (_, at) in enumerate(self.blocks) if at[_MAGNITUDE] != MISSING)

    def module_tensor_views(self, data: torch.Tensor, index: int) -> dict[str, torch.Tensor]:
        """Return views of the adapter's tensors for one module.

        The result is a dict with keys like "lora_a". The tensors are views of the image in PEFT's
        layout: lora_b is ``[N, r]``, a transposed view of its rank rows. The dict is empty if the
        adapter does not adapt the module.

        Args:
            data: The image, a 1-D tensor with this layout.
            index: Index of the module in ``targets``.
        """
        rank, offsets = self.blocks[index]
        views = {}
        for kind, start in zip(BLOCK_KINDS, offsets, strict=True):
            if start != MISSING:
                shape = self.targets[index].tensor_shape(kind, rank)
                strides: tuple[int, ...] = (1,)
                if kind == "lora_a":
                    strides = (shape[1], 1)
                elif kind == "lora_b":
                    strides = (1, shape[0])
                # as_strided() needs one call, whereas slicing and view() need two. A batch creates
                # thousands of views.
                if kind == "magnitude":
                    shape = (shape[0] * _elements_per_fp32(data.dtype),)
                views[kind] = data.as_strided(shape, strides, data.storage_offset() + start)
                if kind == "magnitude" and data.dtype.itemsize < _MAGNITUDE_BYTES:
                    views[kind] = views[kind].view(torch.float32)
        return views


def _elements_per_fp32(dtype: torch.dtype) -> int:
    """Return the number of ``dtype`` elements that one fp32 value occupies."""
    return max(_MAGNITUDE_BYTES // dtype.itemsize, 1)


@dataclass(frozen=True, eq=False)
class PackedAdapter:
    """An adapter whose tensors are packed into one contiguous tensor.

    The contiguous tensor is a 1-D tensor in CPU or GPU memory. A single transfer can therefore copy
    the whole adapter to a GPU.

    Attributes:
        data: The packed tensors, a 1-D tensor in the pool's dtype.
        layout: The position of each tensor in ``data``.
        scaling: LoRA scaling of each of the G modules, or 0 if the adapter does not adapt it.
        version: A number that is unique among the images that the pool has packed.
    """

    data: torch.Tensor
    layout: AdapterLayout
    scaling: tuple[float, ...]
    version: int

    @property
    def nbytes(self) -> int:
        """Size of the packed adapter in bytes."""
        return self.data.nbytes


class AdapterPacker:
    """Packs an adapter's tensors into the form in which a pool stores them.

    Each adapter becomes a `PackedAdapter`, in which one 1-D tensor contains all of the adapter's
    tensors.

    Args:
        targets: The modules that adapters may adapt.
        dtype: Dtype of the images.
        pin_memory: Whether to allocate the images in page-locked memory, from which a GPU can copy
            asynchronously.
    """

    def __init__(
        self, targets: Sequence[TargetableBaseWeight], dtype: torch.dtype, *, pin_memory: bool
    ) -> None:
        self.targets, self.dtype, self._pin_memory = tuple(targets), dtype, pin_memory
        self._layouts: WeakValueDictionary[tuple[tuple[int, tuple[str, ...]], ...], AdapterLayout]
        self._layouts = WeakValueDictionary()
        self._versions = itertools.count(1)

    def pack(
        self,
        tensors: Mapping[int, Mapping[str, torch.Tensor]],
        scaling: Mapping[int, float],
        source: str,
    ) -> PackedAdapter:
        """Pack an adapter's tensors into a `PackedAdapter`.

        The `PackedAdapter` holds them in a single 1-D tensor of the pool's dtype.

        Args:
            tensors: Maps each module index to a dict of tensors, keyed by `BLOCK_KINDS`, in PEFT's
                layout (``lora_b [N, r]``). The caller must have checked their shapes.
            scaling: Maps each module index to the LoRA scaling of the module.
            source: Description of the adapter, for error messages.

        Returns:
            The packed adapter, in CPU memory.

        Raises:
            CheckpointError: A finite value is too large for the pool's dtype.
        """
        shape = []
        for index, target in enumerate(self.targets):
            blocks = tensors.get(index, {})
            kinds = tuple(kind for kind in BLOCK_KINDS if kind in blocks)
            rows = blocks["lora_a"].shape[0] if blocks else 0
            shape.append((rows // target.num_matrices, kinds))
        layout = self._layout(tuple(shape))
        data = torch.empty(
            layout.numel, dtype=self.dtype, device="cpu", pin_memory=self._pin_memory
        )
        for index, blocks in tensors.items():
            views = layout.module_tensor_views(data, index)
            for kind, tensor in blocks.items():
                views[kind].copy_(tensor)
        self._check_overflow(data, tensors, source)
        numbers = tuple(float(scaling.get(index, 0.0)) for index in range(len(self.targets)))
        return PackedAdapter(data, layout, numbers, next(self._versions))

    def _check_overflow(
        self, data: torch.Tensor, tensors: Mapping[int, Mapping[str, torch.Tensor]], source: str
    ) -> None:
        largest = torch.finfo(self.dtype).max
        dtypes = {tensor.dtype for blocks in tensors.values() for tensor in blocks.values()}
        if all(torch.finfo(dtype).max <= largest for dtype in dtypes) or not data.isinf().any():
            return
        # The gaps between blocks are uninitialized, and a file may contain infinities itself.
        for index, blocks in tensors.items():
            for kind, tensor in blocks.items():
                if kind == "magnitude":
                    continue
                peak = tensor[tensor.isfinite()].abs().max() if tensor.isfinite().any() else 0.0
                if float(peak) > largest:
                    raise CheckpointError(
                        f"{source}: {kind} of {self.targets[index].name!r} has a value of "
                        f"magnitude {float(peak):.3g}, which is too large for the pool's "
                        f"dtype {self.dtype}"
                    )

    def _layout(self, shape: tuple[tuple[int, tuple[str, ...]], ...]) -> AdapterLayout:
        known = self._layouts.get(shape)
        if known is not None:
            return known
        step = ALIGNMENT // self.dtype.itemsize
        position = 0
        blocks = []
        for target, (rank, kinds) in zip(self.targets, shape, strict=True):
            starts = []
            for kind in BLOCK_KINDS:
                starts.append(position if kind in kinds else MISSING)
                if kind in kinds:
                    numel = math.prod(target.tensor_shape(kind, rank))
                    numel *= _elements_per_fp32(self.dtype) if kind == "magnitude" else 1
                    position += -(-numel // step) * step
            blocks.append((rank, starts))
        return self._layouts.setdefault(shape, AdapterLayout(self.targets, blocks, position))
