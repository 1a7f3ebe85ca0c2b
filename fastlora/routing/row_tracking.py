"""`RowOriginTracker`, a dispatch mode that finds tensors with rows out of the batch's order.

A mixed batch assigns a layer's rows to adapters by their position. That is wrong for a tensor with
rows that the data chose, as when a router chooses tokens for an expert. `RowOriginTracker`
intercepts every operator in a block. It records the storage of each tensor with rows that are not
all rows of the batch in order. Views share their storage, so they need no record of their own.

If an index comes from data, or permutes, the operator alone does not show whether the rows stay in
order. In this case the values of the index are read once, and `fastlora.routing.row_samples` finds
the sample of each row. On a GPU, the host waits for the index.

The mode does not see operators in compiled code, and it does not cause compilations.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode,
    _pop_mode_temporarily,
)

from fastlora.routing import row_samples
from fastlora.routing.row_facts import TABLE, RowFactsTable, RowOriginKind
from fastlora.routing.row_rules import Arguments, Keywords, result_row_facts_if_changed


class RowOriginTracker(TorchDispatchMode):
    """Tracks where the rows of tensors come from while a model runs.

    The tracker is a `TorchDispatchMode` that records how the rows relate to the rows of the batch,
    and thus whether the rows are in the order of the batch. A layer assigns the adapter ids of the
    batch to the rows of its input in the order of the batch. With the recorded facts, a layer can
    raise an error if its input does not contain the batch's rows in order.

    Args:
        count: Number of adapter ids of the batch.
        tables: Buffers of the model.
    """

    supports_higher_order_operators = True

    def __init__(self, count: int, tables: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self._known = RowFactsTable(count)
        self._thread = 0
        self._rests = False
        for table in tables:
            self._known.put(table, TABLE)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Return whether this mode ignores the internals of `torch.compile`, which is always True.

        PyTorch calls this method. Code is compiled as if the mode were off, and the mode ignores
        the operators that are compiled.
        """
        return True

    def __enter__(self) -> RowOriginTracker:
        self._thread = threading.get_ident()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        self._thread = 0
        super().__exit__(*error)

    def invalidate_all_facts(self) -> None:
        """Invalidate all recorded information about the origin of rows.

        After this call, `has_valid_facts` is False, even while the mode is still on, and the rows
        of layers are no longer checked against the recorded information.
        """
        self._thread = 0

    @property
    def has_valid_facts(self) -> bool:
        """Whether the recorded information about the origin of rows is still valid.

        The information is valid, and may be used, if the mode is on in this thread and
        `invalidate_all_facts` has not been called.
        """
        return self._thread == threading.get_ident()

    @contextlib.contextmanager
    def pause_row_order_tracking(self) -> Iterator[None]:
        """Context manager that pauses row tracking.

        It is for code that preserves the order of the rows. The mode leaves PyTorch's stack of
        modes, so layers that share an input can run together.
        """
        if torch._C._len_torch_dispatch_stack() and _get_current_dispatch_mode() is self:
            with _pop_mode_temporarily():
                yield
            return
        before, self._rests = self._rests, True
        try:
            yield
        finally:
            self._rests = before

    def row_origin_kind(self, x: torch.Tensor) -> RowOriginKind:
        """Return how a tensor's rows relate to the rows of the batch.

        For example, a tensor may contain the rows of the batch in order, rows that the data
        selected, or rows made from parameters. See `RowOriginKind`.
        """
        return self._known.facts_of(x).kind

    def is_shared_table(self, x: torch.Tensor) -> bool:
        """Return whether ``x`` is a table that the whole batch shares.

        Such a table, for example of position embeddings, is computed from parameters and buffers
        alone and has no separate rows for each sample. The shape of ``x`` is ``[..., K]``. A tensor
        with at least 3 dimensions has separate rows if its first dimension has one entry per
        sample. Otherwise, the values show whether the rows are repeated for each sample.
        """
        if self._known.facts_of(x).kind is not RowOriginKind.TABLE or not x.is_floating_point():
            return False
        if x.dim() > 2 and x.shape[0] == self._known.count:
            return False
        rows = x.numel() // max(x.shape[-1], 1)
        if not rows or not row_samples.values_are_readable(x):
            return False
        if rows % self._known.count:
            return True
        parts = x.detach().reshape(self._known.count, -1)
        return not bool((parts == parts[:1]).all())

    def record_in_batch_order(self, tensors: Iterable[object]) -> None:
        """Record that the rows of the given tensors are in batch order.

        The tensors are, for example, a model's inputs.
        """
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor) and self.has_valid_facts:
                self._known.discard(tensor)

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: Arguments = (),
        kwargs: Keywords | None = None,
    ) -> Any:
        """Call an operator, record the origin of the rows of its result, and return the result."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self._rests:
            facts = result_row_facts_if_changed(self._known, func, args, kwargs, out)
            if facts is not None:
                self._known.put(out, facts)
        return out
