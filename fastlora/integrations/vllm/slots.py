"""`LayerSlots`, the adapters of one LoRA layer of vLLM, by slot.

The factors of all slots lie at fixed addresses, in blocks that start at multiples of 16 bytes.
lora_b is stored as rank rows, ``[rank, N]``. vLLM's stacked tensors are views of these blocks.
Each slot has a rank, which is the adapter's own, and a scaling in fp32, which is not part of
lora_b.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastlora.ops.slots import BatchRows, SlotLoraUpdater

_ALIGNMENT = 16  # bytes
_MOST_SLICES = 4


class LayerSlots:
    """The adapter slots of a vLLM layer, which hold the factors of the layer's adapters.

    Each slot holds one adapter or is empty.

    Args:
        stack_a: A stack of vLLM, ``[slots, 1, R, K]``. Every slice has a lora_a of this shape. None
            if vLLM keeps lora_a and computes its products, as in an embedding. R is the largest
            rank. It differs from that of lora_b if the ranks of lora_a are sharded.
        stacks_b: For each slice, vLLM's ``[slots, 1, N, R]``.

    Attributes:
        linear: The whole update, for groups of up to four slices. Empty if vLLM keeps lora_a, or if
            the ranks of lora_a are sharded.
        shrink: The product with lora_a alone, for each slice. Empty if vLLM keeps lora_a.
        expand: The product with lora_b alone, which includes the scaling, for each slice.
    """

    def __init__(self, stack_a: torch.Tensor | None, stacks_b: Sequence[torch.Tensor]) -> None:
        slots, _, _, max_rank = stacks_b[0].shape
        shapes_a = [] if stack_a is None else [stack_a.shape[2:]] * len(stacks_b)
        shapes_b = [(max_rank, stack.shape[2]) for stack in stacks_b]
        storage, blocks = _zero_blocks(slots, [*shapes_a, *shapes_b], stacks_b[0])
        self.lora_a, self.lora_b = blocks[: len(shapes_a)], blocks[len(shapes_a) :]
        rank = 0 if stack_a is None else stack_a.shape[2]
        same_a, same_b = (_expanded_identity(slots, each, storage) for each in (rank, max_rank))
        self.shrink = [SlotLoraUpdater([own], [same_a], storage) for own in self.lora_a]
        self.expand = [SlotLoraUpdater([same_b], [own], storage) for own in self.lora_b]
        self.linear: list[SlotLoraUpdater] = []
        if rank == max_rank:
            for start in range(0, len(stacks_b), _MOST_SLICES):
                group = slice(start, start + _MOST_SLICES)
                self.linear.append(SlotLoraUpdater(self.lora_a[group], self.lora_b[group], storage))

    def add_linear_(self, y: torch.Tensor, x: torch.Tensor, batch: BatchRows) -> None:
        """Add the LoRA updates of a linear layer to y in place.

        Each row of y gets the update of its own adapter. y is ``[M, N]``. The outputs of all slices
        are side by side in y, starting at the first column.
        """
        start = 0
        for products in self.linear:
            is_whole = products.width == y.shape[1]
            own = y if is_whole else y[:, start : start + products.width]
            products.add_(own, x, batch)
            start += products.width

    def stacked_factors(self) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Return the factors lora_a and lora_b of all slots as stacked tensors.

        The result is a pair of tuples, one for lora_a and one for lora_b. Each tuple contains one
        view per slice. vLLM's layer uses the views as its own stacked tensors. The shapes are
        ``[slots, 1, R, K]`` for lora_a and ``[slots, 1, N, R]`` for lora_b. The first tuple is
        empty if vLLM keeps lora_a.
        """
        with torch.inference_mode(False):
            down = tuple(own.unsqueeze(1) for own in self.lora_a)
            up = tuple(own.transpose(1, 2).unsqueeze(1) for own in self.lora_b)
        for each in (*down, *up):
            each.fastlora_slots = self  # type: ignore[attr-defined]
        return down, up

    def write(
        self,
        slot: int,
        lora_a: Sequence[torch.Tensor | None],
        lora_b: Sequence[torch.Tensor | None],
        scalings: Sequence[float],
    ) -> None:
        """Write an adapter into a slot.

        Args:
            slot: The slot.
            lora_a: For each slice, ``[rank, K]``, or None if the adapter lacks the slice.
            lora_b: For each slice, ``[N, rank]`` or None.
            scalings: For each slice, the scaling.

        Raises:
            ValueError: A factor has the wrong shape, or too high a rank. The slot is not changed.
        """
        for index, (down, up) in enumerate(zip(lora_a, lora_b, strict=True)):
            if down is not None and up is not None:
                self._check_factors(index, down, up)
        for products in (*self.linear, *self.shrink, *self.expand):
            products.drop_packs_if_outdated()
        if not self.is_empty(slot):
            # vLLM's stacks contain only loaded adapters.
            for factors in (*self.lora_a, *self.lora_b):
                factors[slot].zero_()
        ranks_a, ranks_b = [0] * len(self.lora_b), [0] * len(self.lora_b)
        for index, (down, up) in enumerate(zip(lora_a, lora_b, strict=True)):
            if down is None or up is None:
                continue
            ranks_a[index], ranks_b[index] = down.shape[0], up.shape[1]
            if self.lora_a:
                self.lora_a[index][slot, : down.shape[0]].copy_(down, non_blocking=True)
            own = self.lora_b[index][slot, : up.shape[1], : up.shape[0]]
            own.copy_(up.t(), non_blocking=True)
        self._set_ranks(slot, ranks_a, ranks_b, scalings)

    def is_empty(self, slot: int) -> bool:
        """Return whether a slot contains no adapter.

        An empty slot contains no adapter for this layer, and its rank is 0 in all slices. A slot in
        which a write failed may have ranks in some of the products only, and is not empty.
        """
        return all(each.is_empty(slot) for each in (*self.linear, *self.shrink, *self.expand))

    def clear(self, slot: int) -> None:
        """Empty a slot.

        Its factors and ranks are set to zero.
        """
        if not self.is_empty(slot):
            none = [None] * len(self.lora_b)
            self.write(slot, none, none, [1.0] * len(self.lora_b))

    def _check_factors(self, slice_index: int, lora_a: torch.Tensor, lora_b: torch.Tensor) -> None:
        """Raise `ValueError` if a slice's factors do not fit into a slot.

        The factors do not fit if they have the wrong shape or too high a rank.
        """
        width, max_rank = self.lora_b[slice_index].shape[2], self.lora_b[slice_index].shape[1]
        features, max_rank_a = None, max_rank
        if self.lora_a:
            max_rank_a, features = self.lora_a[slice_index].shape[1:]
        fits = lora_a.dim() == lora_b.dim() == 2 and lora_b.shape[0] == width
        fits = fits and features in (None, lora_a.shape[1])
        fits = fits and lora_a.shape[0] <= max_rank_a and lora_b.shape[1] <= max_rank
        # If the ranks of lora_a are sharded, a process has only some of them.
        if fits and max_rank_a == max_rank:
            fits = lora_a.shape[0] == lora_b.shape[1]
        if not fits:
            raise ValueError(
                f"slice {slice_index}: lora_A has shape {tuple(lora_a.shape)} and lora_B has shape "
                f"{tuple(lora_b.shape)}, expected [rank, {features or 'in_features'}] and "
                f"[{width}, rank] with a rank of at most {max_rank}"
            )

    def _set_ranks(
        self, slot: int, ranks_a: Sequence[int], ranks_b: Sequence[int], scalings: Sequence[float]
    ) -> None:
        ones = [1.0] * len(ranks_a)
        for products, ranks, factors in (
            (self.linear, ranks_b, scalings),
            (self.shrink, ranks_a, ones),
            (self.expand, ranks_b, scalings),
        ):
            start = 0
            for each in products:
                group = slice(start, start + len(each.widths))
                each.set_slot(slot, ranks[group], factors[group])
                start = group.stop


def owning_layer_slots(stack_view: torch.Tensor) -> LayerSlots:
    """Return the `LayerSlots` that owns a stacked tensor of a vLLM layer.

    ``stack_view`` is the stacked tensor, which is a view that `LayerSlots.stacked_factors` created.
    Each such view has its `LayerSlots` as an attribute.
    """
    found: LayerSlots = stack_view.fastlora_slots  # type: ignore[attr-defined]
    return found


def _zero_blocks(
    slots: int, shapes: Sequence[Sequence[int]], like: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Allocate zero-filled blocks in a shared storage tensor.

    Returns a tuple (storage, list of blocks). For each shape (rows, columns), the list contains a
    view ``[slots, rows, columns]`` of the storage. The storage has the dtype and device of
    ``like``. In each view, the matrix ``[rows, columns]`` of a slot is contiguous and starts at a
    multiple of 16 bytes.
    """
    unit = _ALIGNMENT // like.dtype.itemsize
    sizes = [-(-rows * columns // unit) * unit for rows, columns in shapes]
    # A tensor that is created in inference mode has no version. The version shows whether other
    # code has modified the tensor.
    with torch.inference_mode(False):
        storage = torch.zeros(slots, sum(sizes), dtype=like.dtype, device=like.device)
        blocks = [
            part[:, : rows * columns].unflatten(1, (rows, columns))
            for part, (rows, columns) in zip(storage.split(sizes, 1), shapes, strict=True)
        ]
    return storage, blocks


def _expanded_identity(slots: int, rank: int, like: torch.Tensor) -> torch.Tensor:
    """Return an identity matrix expanded to ``[slots, rank, rank]``.

    All slots share the memory of one matrix, which has the dtype and device of ``like``.
    """
    with torch.inference_mode(False):
        same = torch.eye(rank, dtype=like.dtype, device=like.device)
        return same.expand(slots, rank, rank)
