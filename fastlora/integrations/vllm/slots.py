"""`LayerSlots`, the adapters of one LoRA layer of vLLM, by slot.

The factors of all slots lie at fixed addresses, in blocks that start at multiples of 16 bytes.
lora_b is stored as rank rows, ``[rank, N]``. vLLM's stacked tensors are views of these blocks.
Each slot has a rank, which is the adapter's own, and a scaling in fp32, which is not part of
lora_b.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from fastlora.integrations.vllm.batch import BatchRows, SortedRowsAndPlans
from fastlora.ops.execution_mode import is_being_compiled
from fastlora.ops.factors import Factors
from fastlora.ops.torch import packed_forward
from fastlora.ops.torch.packed import PackedLayerFactors
from fastlora.ops.torch.packed_plans import Plan, cached_plan
from fastlora.ops.torch.packed_slots import PackedSlots

_ALIGNMENT = 16  # bytes
_MOST_SLICES = 4


class _PackedFactorsAndPlan(NamedTuple):
    """The packed factors for one batch, and the plan of their products.

    Attributes:
        batch: The rows of the batch.
        version: The version of the factors' storage when the batch was prepared.
        dtype: Dtype of the packed factors.
        factors: The packed factors, or None if no slot has an adapter.
        plan: The plan. It is None if ``factors`` is None.
    """

    batch: SortedRowsAndPlans
    version: int
    dtype: torch.dtype
    factors: PackedLayerFactors | None
    plan: Plan | None


class SlotProducts:
    """Applies adapters to up to four slices: ``y += scaling * (x @ lora_a.T) @ lora_b``.

    All slices have the same input x. Their outputs are adjacent columns of y.

    Args:
        lora_a: For each slice, ``[slots, R, K]``.
        lora_b: For each slice, ``[slots, R, N]``.
        storage: The tensor that the factors are views of, except for identity matrices. Its
            version shows whether other code has written the factors.

    Attributes:
        width: The number of columns of y.
        tables: The ``tables`` argument of operators: addresses, ranks, and scalings, as described
            in `fastlora.ops.factors.AddressTables`. The tables lie at fixed addresses.
    """

    def __init__(
        self,
        lora_a: Sequence[torch.Tensor],
        lora_b: Sequence[torch.Tensor],
        storage: torch.Tensor,
    ) -> None:
        self.lora_a, self.lora_b, self._storage = list(lora_a), list(lora_b), storage
        self.widths = [each.shape[2] for each in lora_b]
        self.width = sum(self.widths)
        slots, device = lora_b[0].shape[0], lora_b[0].device
        self.max_rank, self.dtype = lora_b[0].shape[1], lora_b[0].dtype
        self._factors: list[list[Factors | None]] = [[None] * len(lora_b) for _ in range(slots)]
        with torch.inference_mode(False):
            addresses = [
                torch.tensor([[own.data_ptr() for own in each] for each in factors], device=device)
                for factors in (lora_a, lora_b)
            ]
            rank = torch.zeros(len(lora_b), slots, dtype=torch.int32, device=device)
            scaling = torch.ones(len(lora_b), slots, dtype=torch.float32, device=device)
        self.tables = [*addresses, rank, scaling]
        self._packs: dict[torch.dtype, PackedSlots] = {}
        self._version = storage._version
        self._prepared: _PackedFactorsAndPlan | None = None

    def set_slot(self, slot: int, ranks: Sequence[int], scalings: Sequence[float]) -> None:
        """Set a slot's ranks and scalings for each slice, after its factors have been written."""
        own: list[Factors | None] = [None] * len(ranks)
        for index, (rank, scaling) in enumerate(zip(ranks, scalings, strict=True)):
            if rank:
                lora_a, lora_b = self.lora_a[index][slot], self.lora_b[index][slot]
                own[index] = Factors(lora_a[:rank], lora_b[:rank].t(), scaling)
        self._factors[slot] = own
        for table, values in zip(self.tables[2:], (ranks, scalings), strict=True):
            table[:, slot] = torch.tensor(values, dtype=table.dtype)
        self._prepared = None
        for pack in self._packs.values():
            pack.set_slot(slot, own)
        self._version = self._storage._version

    def is_empty(self, slot: int) -> bool:
        """Return whether a slot has rank 0 in all slices."""
        return all(factors is None for factors in self._factors[slot])

    def add_(self, y: torch.Tensor, x: torch.Tensor, batch: BatchRows) -> None:
        """Add each row's update to y in place.

        In traced code and on a GPU, an operator reads the tables.

        Args:
            y: ``[M, width]``. It may consist of columns of a larger tensor.
            x: ``[M, K]``, in any dtype. The products are computed in the dtype of y.
            batch: The slots of the rows.
        """
        add = _chosen_implementation(x, batch)
        if add is not None:
            add(self, y, x, batch)

    @property
    def num_full_packings(self) -> int:
        """Number of times that one of the current packs was allocated and filled with all slots."""
        return sum(pack.num_full_packings for pack in self._packs.values())

    def add_from_pack_(self, y: torch.Tensor, x: torch.Tensor, batch: BatchRows) -> None:
        """Do what `add_` does, with packed factors."""
        rows, found = batch.first(x.shape[0]), self._prepared
        if (
            found is None
            or found.batch is not rows
            or found.version != self._storage._version
            or found.dtype != y.dtype
        ):
            found = self._prepared = self._prepare(rows, y.dtype)
        if found.factors is not None and found.plan is not None:
            x = x if x.dtype == y.dtype else x.to(y.dtype)
            packed_forward.add_(y, x, rows.rows.slot_index, found.factors, found.plan)

    def _prepare(self, batch: SortedRowsAndPlans, dtype: torch.dtype) -> _PackedFactorsAndPlan:
        factors, plan = self._packed_slots(dtype).factors, None
        if factors is not None:
            plan = cached_plan(batch.rows, batch.rows.slot_index, factors, batch.plans)
        return _PackedFactorsAndPlan(batch, self._storage._version, dtype, factors, plan)

    def add_from_tables_(self, y: torch.Tensor, x: torch.Tensor, batch: BatchRows) -> None:
        """Do what `add_` does, with an operator that reads the tables."""
        x, rows = x.to(y.dtype), batch.operator_arguments(x.shape[0])
        impl = "eager" if x.device.type == "cpu" else "triton"
        for index, part in enumerate(y.split(self.widths, 1)):
            torch.ops.fastlora.lora_add_at_(
                part, x, rows, self.tables, index, self.max_rank, self.dtype, impl
            )

    def _packed_slots(self, dtype: torch.dtype) -> PackedSlots:
        """Return the packed factors in a dtype.

        If there is no valid pack in this dtype, all slots are packed into a new one.
        """
        self.drop_packs_if_outdated()
        pack = self._packs.get(dtype)
        if pack is None:
            with torch.inference_mode(False):
                pack = PackedSlots(len(self._factors), self.lora_a[0].shape[2], self.widths, dtype)
                self._packs[dtype] = pack
                self._pack_all(pack)
        return pack

    def drop_packs_if_outdated(self) -> None:
        """Drop all packs if other code has written the factors. vLLM's stacks are views of them."""
        if self._version != self._storage._version:
            self._packs.clear()
            self._prepared = None
            self._version = self._storage._version

    def _pack_all(self, pack: PackedSlots) -> None:
        # The first slot has the largest rank, so the pack is allocated only once.
        ranks = self.tables[2].max(0).values
        for slot in ranks.argsort(descending=True).tolist():
            pack.set_slot(slot, self._factors[slot])


def _chosen_implementation(
    x: torch.Tensor, batch: BatchRows
) -> Callable[[SlotProducts, torch.Tensor, torch.Tensor, BatchRows], None] | None:
    """Return the method that adds updates, or None if no row has an adapter.

    Traced code and captured graphs serve every batch, so they read tables.
    """
    if is_being_compiled() or not x.is_cpu:
        return SlotProducts.add_from_tables_
    return SlotProducts.add_from_pack_ if batch.used_slots else None


class LayerSlots:
    """The adapters of one layer, by slot.

    Args:
        slots: Number of slots.
        rank: Largest rank of lora_a. It differs from that of lora_b if the ranks of lora_a are
            sharded.
        features: K, or None if vLLM keeps lora_a and computes its products, as in an embedding.
        max_rank: Largest rank of lora_b.
        outputs: N of each slice.
        dtype: Dtype of the factors.
        device: Device of the factors.

    Attributes:
        linear: The whole update, for groups of up to four slices. Empty if vLLM keeps lora_a, or if
            the ranks of lora_a are sharded.
        shrink: The product with lora_a alone, for each slice. Empty if vLLM keeps lora_a.
        expand: The product with lora_b alone, which includes the scaling, for each slice.
    """

    def __init__(
        self,
        slots: int,
        rank: int,
        features: int | None,
        max_rank: int,
        outputs: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shapes_a = [] if features is None else [(rank, features)] * len(outputs)
        shapes_b = [(max_rank, n) for n in outputs]
        storage, blocks = _zero_blocks(slots, [*shapes_a, *shapes_b], dtype, device)
        self.lora_a, self.lora_b = blocks[: len(shapes_a)], blocks[len(shapes_a) :]
        same_a, same_b = (_identity(slots, each, dtype, device) for each in (rank, max_rank))
        self.shrink = [SlotProducts([own], [same_a], storage) for own in self.lora_a]
        self.expand = [SlotProducts([same_b], [own], storage) for own in self.lora_b]
        self.linear: list[SlotProducts] = []
        for start in range(0, len(self.lora_a), _MOST_SLICES) if rank == max_rank else ():
            group = slice(start, start + _MOST_SLICES)
            self.linear.append(SlotProducts(self.lora_a[group], self.lora_b[group], storage))

    def add_linear_(self, y: torch.Tensor, x: torch.Tensor, batch: BatchRows) -> None:
        """Add each row's update of all slices to y ``[M, N]``, from the first column on."""
        add, start = _chosen_implementation(x, batch), 0
        if add is None:
            return
        for products in self.linear:
            is_whole = products.width == y.shape[1]
            own = y if is_whole else y[:, start : start + products.width]
            add(products, own, x, batch)
            start += products.width

    def stacked(self) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Return vLLM's stacks: lora_a ``[slots, 1, R, K]`` and lora_b ``[slots, 1, N, R]``.

        Both are tuples with one view per slice. The first one is empty if vLLM keeps lora_a.
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
                self._check_shapes(index, down, up)
        self._drop_packs_if_outdated()
        self._erase(slot)
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
        """Return whether a slot has rank 0 in all slices."""
        return all(each.is_empty(slot) for each in self.expand)

    def clear(self, slot: int) -> None:
        """Set a slot's ranks to 0."""
        if not self.is_empty(slot):
            self._drop_packs_if_outdated()
            self._erase(slot)
            zeros = [0] * len(self.lora_b)
            self._set_ranks(slot, zeros, zeros, [1.0] * len(self.lora_b))

    def _check_shapes(self, slice_index: int, lora_a: torch.Tensor, lora_b: torch.Tensor) -> None:
        """Raise `ValueError` if a slice's factors have the wrong shape or too high a rank."""
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
                f"slice {slice_index}: lora_A has shape {tuple(lora_a.shape)} and lora_B "
                f"{tuple(lora_b.shape)}, expected [rank, {features or 'in_features'}] and "
                f"[{width}, rank] with a rank of at most {max_rank}"
            )

    def _drop_packs_if_outdated(self) -> None:
        for each in (*self.linear, *self.shrink, *self.expand):
            each.drop_packs_if_outdated()

    def _erase(self, slot: int) -> None:
        """Set a slot's factors to zero, so that vLLM's stacks contain only loaded adapters."""
        if not self.is_empty(slot):
            for factors in (*self.lora_a, *self.lora_b):
                factors[slot].zero_()

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


def slots_of_stack(stack: torch.Tensor) -> LayerSlots:
    """Return the `LayerSlots` that one of vLLM's stacked tensors is a view of."""
    found: LayerSlots = stack.fastlora_slots  # type: ignore[attr-defined]
    return found


def _zero_blocks(
    slots: int, shapes: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return a tuple (storage, zeros ``[slots, rows, columns]`` for each shape (rows, columns)).

    The zeros are views of the storage. Each block ``[rows, columns]`` is contiguous and starts at a
    multiple of 16 bytes.
    """
    unit = _ALIGNMENT // dtype.itemsize
    sizes = [-(-rows * columns // unit) * unit for rows, columns in shapes]
    # A tensor that is created in inference mode has no version. The version shows whether other
    # code has written the tensor.
    with torch.inference_mode(False):
        storage = torch.zeros(slots, sum(sizes), dtype=dtype, device=device)
        blocks = [
            part[:, : rows * columns].unflatten(1, (rows, columns))
            for part, (rows, columns) in zip(storage.split(sizes, 1), shapes, strict=True)
        ]
    return storage, blocks


def _identity(slots: int, rank: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.eye(rank, dtype=dtype, device=device).expand(slots, rank, rank)
