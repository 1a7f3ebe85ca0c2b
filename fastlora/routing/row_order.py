"""Which tensors of a forward have lost the order of the batch's rows: found by watching operators.

A mixed batch gives a layer's rows to adapters by their position. That is wrong for a tensor whose
rows the data chose, as a router chooses tokens for an expert. `RowOrder` sees every operator of a
block and marks the storage of each tensor whose first dimension was chosen by data. Views share
their storage, so they need no mark of their own. No value of a tensor is read, so nothing waits for
a GPU.

Operators inside code of `torch.compile` are not seen, and the mode causes no compilation.
"""

from __future__ import annotations

import contextlib
import enum
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode,
    _pop_mode_temporarily,
)

aten = torch.ops.aten

# Tensors, numbers and lists, as an ATen operator takes them.
Arguments = tuple[Any, ...]
Keywords = dict[str, Any]
# The fields of a `Mark` after its storage.
MarkFields = tuple[Any, ...]


class Kind(enum.Enum):
    """What the rows of a tensor are.

    Attributes:
        ROWS: Rows of the batch, in its order. A tensor without a mark is of this kind.
        CHOSEN: Rows that the data chose, or placed.
        TABLE: Made from parameters and constants alone: its rows are no rows of the batch.
        COUNTED: A table that `torch.arange` counted: an index that keeps the order.
        CHOICE: Weights in floating point, zero or not by the data: a product may choose rows by
            them.
    """

    ROWS = enum.auto()
    CHOSEN = enum.auto()
    TABLE = enum.auto()
    COUNTED = enum.auto()
    CHOICE = enum.auto()


class Mark(NamedTuple):
    """What is known of a storage.

    Attributes:
        storage: The storage. A reference keeps its key from being given to another one.
        kind: What its rows are.
        origin: Of a chosen tensor and of an index, the key of the index that it began with.
        inverse: Of an index that inverts another one, the key of that one.
    """

    storage: StorageWeakRef
    kind: Kind
    origin: int | None = None
    inverse: int | None = None


_TABLES = (Kind.TABLE, Kind.COUNTED)
# Marks of storages that are gone are dropped whenever there are so many.
_MOST_MARKS = 4096


class RowOrder(TorchDispatchMode):
    """Within the mode, notes which tensors have rows that the data chose."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self._marks: dict[int, Mark] = {}
        self._thread = 0
        self._rests = False
        # The last tensor with a new first dimension: `x[None, index]` makes one and indexes it.
        self._unsqueezed: tuple[int, torch.Size] | None = None

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Has `torch.compile` compile as it does outside of the mode."""
        return True

    def __enter__(self) -> RowOrder:
        self._thread = threading.get_ident()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        self._thread = 0
        super().__exit__(*error)

    def blind(self) -> None:
        """Has `sees` be false from now on, where the mode may be on or not."""
        self._thread = 0

    @property
    def sees(self) -> bool:
        """Whether the mode is on in this thread."""
        return self._thread == threading.get_ident()

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Within the block nothing is noted: what it returns has the order of what it was given.

        The mode leaves PyTorch's stack of modes, so layers that share an input stay together.
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

    def is_chosen(self, x: torch.Tensor) -> bool:
        """Whether the data chose the rows of a tensor."""
        return self._kind(x) is Kind.CHOSEN

    def in_order(self, tensors: Iterable[object]) -> None:
        """Takes tensors to be rows of the batch in its order, as a model's own input is."""
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor) and self.sees:
                self._marks.pop(_key(tensor), None)

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: Arguments = (),
        kwargs: Keywords | None = None,
    ) -> Any:
        """Calls an operator and notes what its result is."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self._rests:
            rule = _RULES.get(getattr(func, "overloadpacket", None))
            mark = self._any(func, args, kwargs, out) if rule is None else rule(self, args, out)
            if mark is not None:
                self._put(out, *mark)
        return out

    # ------------------------------------------------------------------------------------- marks

    def _mark(self, tensor: torch.Tensor) -> Mark | None:
        return self._marks.get(_key(tensor))

    def _kind(self, tensor: torch.Tensor) -> Kind:
        mark = self._mark(tensor)
        if mark is not None:
            return mark.kind
        return Kind.TABLE if isinstance(tensor, nn.Parameter) else Kind.ROWS

    def _origin(self, tensor: torch.Tensor) -> int:
        """Returns the key of the index that an index began with: its own where it is new."""
        mark = self._mark(tensor)
        return _key(tensor) if mark is None or mark.origin is None else mark.origin

    def _put(
        self, out: object, kind: Kind, origin: int | None = None, inverse: int | None = None
    ) -> None:
        """Marks what an operator returned."""
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if not isinstance(tensor, torch.Tensor):
                continue
            own = kind
            if kind in (Kind.CHOSEN, Kind.CHOICE) and not tensor.is_floating_point():
                own = Kind.ROWS  # an index or a mask, not what a layer gets
                origin = None
            key = _key(tensor)
            if not key:
                continue
            if own is Kind.ROWS and origin is None and inverse is None:
                self._marks.pop(key, None)
                continue
            if len(self._marks) >= _MOST_MARKS:
                live = {k: m for k, m in self._marks.items() if not m.storage.expired()}
                self._marks = live
            storage = StorageWeakRef(tensor.untyped_storage())
            self._marks[key] = Mark(storage, own, origin, inverse)

    # ------------------------------------------------------------------------------------- rules

    def _any(
        self, func: OpOverload, args: Arguments, kwargs: Keywords, out: object
    ) -> MarkFields | None:
        """Returns the mark of what any other operator returns; None to leave it as it is."""
        operands = list(_tensors((args, kwargs)))
        if getattr(func, "is_view", False):  # shares its storage; but parameters have no mark
            return (Kind.TABLE,) if isinstance(operands[0], nn.Parameter) else None
        if not operands:
            return (Kind.TABLE,)
        if len(operands) == 1:
            (operand,) = operands
            kind = self._kind(operand)
            if kind is Kind.COUNTED and getattr(func, "overloadpacket", None) not in _COPIES:
                kind = Kind.TABLE
            mark = self._mark(operand)
            if mark is not None:
                return kind, mark.origin, mark.inverse
            return kind, None if operand.is_floating_point() else _key(operand)
        return self._together(operands, out)

    def _together(self, operands: list[torch.Tensor], out: object) -> MarkFields:
        """Returns the mark of what comes of several operands, of which any may bring the rows."""
        kinds = [self._kind(tensor) for tensor in operands]
        if Kind.CHOSEN in kinds:
            shape = next((tensor.shape for tensor in _tensors(out)), None)
            for tensor, kind in zip(operands, kinds, strict=True):
                # Added to rows of the batch, as to a residual, chosen rows are beside their own.
                if kind is Kind.ROWS and tensor.shape == shape and tensor.is_floating_point():
                    return (Kind.ROWS,)
            mark = self._mark(operands[kinds.index(Kind.CHOSEN)])
            return Kind.CHOSEN, None if mark is None else mark.origin
        return (Kind.TABLE if all(kind in _TABLES for kind in kinds) else Kind.ROWS,)

    def _taken(self, source: torch.Tensor, index: torch.Tensor | None, first: bool) -> MarkFields:
        """Returns the mark of elements of a source, by an index along its first dimension or not.

        An index that is no tensor of numbers (a mask) is one that the data chose.
        """
        mark, kind = self._mark(source), self._kind(source)
        if kind in _TABLES:
            tables = index is None or self._kind(index) in _TABLES
            return (Kind.TABLE if tables else Kind.ROWS,)
        counted = index is not None and self._kind(index) is Kind.COUNTED
        if not first or index is None or (counted and index.shape[:1] == source.shape[:1]):
            return kind, None if mark is None else mark.origin
        own = self._mark(index)
        chosen = mark.origin if mark is not None and kind is Kind.CHOSEN else None
        if chosen is not None and own is not None and own.inverse == chosen:
            return (Kind.ROWS,)  # the order before the choice
        return Kind.CHOSEN, self._origin(index)

    def _placed(
        self,
        dest: torch.Tensor,
        indices: list[torch.Tensor],
        values: object,
        first: bool,
    ) -> MarkFields:
        """Returns the mark of a destination behind values that were put there by indices."""
        index = next(iter(indices), None)
        mark, kind = self._mark(dest), self._kind(dest)
        brought = Kind.TABLE
        if isinstance(values, torch.Tensor) and values.dim():
            brought = self._kind(values)
        if brought is Kind.COUNTED and index is not None and first:
            return Kind.TABLE, None, self._origin(index)  # the inverse of the index
        if kind not in _TABLES:
            return kind, *(() if mark is None else mark[2:])
        if brought in _TABLES:
            tables = all(self._kind(index) in _TABLES for index in indices)
            return (kind if tables else Kind.CHOICE,)  # as ones at the places of a choice
        if brought is Kind.CHOSEN or not first or index is None:
            return (Kind.ROWS,)  # put back where they came from
        counted = self._kind(index) is Kind.COUNTED
        return (Kind.ROWS,) if counted else (Kind.CHOSEN, self._origin(index))


def _key(tensor: torch.Tensor) -> int:
    """Returns what names a tensor's storage; 0 for a tensor without one, as a sparse tensor."""
    try:
        return tensor.untyped_storage()._cdata
    except NotImplementedError:
        return 0


def _tensors(value: object) -> Iterator[torch.Tensor]:
    """Yields the tensors of arguments: nested in tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


# Copies of a counted index that are counted too.
_COPIES = {aten._to_copy, aten.clone, aten.lift_fresh, aten.lift_fresh_copy}

Rule = Callable[[RowOrder, Arguments, Any], "MarkFields | None"]


def _rows_from(which: int) -> Rule:
    """Returns the rule of operators that take their rows from one argument, as a product does."""

    def rule(order: RowOrder, args: Arguments, out: object) -> MarkFields | None:
        source = args[which]
        mark, kind = order._mark(source), order._kind(source)
        others = [tensor for tensor in _tensors(args) if tensor is not source]
        if kind in _TABLES:
            return order._together(others or [source], out)
        if kind is Kind.CHOICE:
            # One product for the whole batch chooses rows; one for each sample does not.
            whole = source.dim() == 2 or source.shape[0] == 1
            rows = any(order._kind(tensor) is Kind.ROWS for tensor in others)
            return (Kind.CHOSEN if whole and rows else Kind.ROWS,)
        return kind, None if mark is None else mark.origin

    return rule


def _copied(order: RowOrder, args: Arguments, out: object) -> MarkFields | None:
    """The rule of a change of dtype: numbers that were whole or true may choose rows."""
    source = args[0]
    mark, kind = order._mark(source), order._kind(source)
    whole = not (source.is_floating_point() or source.is_complex())
    if whole and kind is Kind.ROWS and isinstance(out, torch.Tensor) and out.is_floating_point():
        return (Kind.CHOICE,)
    return kind, *(() if mark is None else mark[2:])


def _indexed(order: RowOrder, args: Arguments, out: object) -> MarkFields | None:
    source, indices = args[0], args[1]
    first = indices[0] is not None or order._unsqueezed == (_key(source), source.shape)
    order._unsqueezed = None
    index = next((index for index in indices if index is not None), None)
    return order._taken(source, index, first)


def _unsqueeze(order: RowOrder, args: Arguments, out: object) -> MarkFields | None:
    source, dim = args[:2]
    if isinstance(out, torch.Tensor) and dim in (0, -source.dim() - 1):
        order._unsqueezed = _key(out), out.shape
    return (Kind.TABLE,) if isinstance(source, nn.Parameter) else None


def _copied_into(order: RowOrder, args: Arguments, out: object) -> MarkFields | None:
    """The rule of `copy_`, which fills a tensor, or a part of one."""
    dest, source = args[:2]
    kind = order._kind(dest)
    whole = dest.numel() * dest.element_size() == dest.untyped_storage().nbytes()
    if not whole and kind not in _TABLES:
        return None
    mark = order._mark(source)
    return order._kind(source), *(() if mark is None else mark[2:])


def _index_put(order: RowOrder, args: Arguments, out: object) -> MarkFields | None:
    dest, indices, values = args[:3]
    return order._placed(dest, list(_tensors(indices)), values, indices[0] is not None)


def _along(order: RowOrder, args: Arguments, out: object) -> MarkFields | None:
    """The rule of `index_select` and `gather`."""
    source, dim, index = args[:3]
    return order._taken(source, index, dim in (0, -source.dim()))


def _put_along(order: RowOrder, args: Arguments, out: object) -> MarkFields | None:
    """The rule of `index_add`, `index_copy` and `scatter`."""
    dest, dim, index, values = args[:4]
    return order._placed(dest, [index], values, dim in (0, -dest.dim()))


def _flat(order: RowOrder, args: Arguments, out: object) -> MarkFields | None:
    """The rule of `take` and `masked_select`."""
    return order._taken(args[0], args[1], True)


def _mask_put(order: RowOrder, args: Arguments, out: object) -> MarkFields | None:
    dest, mask, values = args[:3]
    return order._placed(dest, [mask], values, True)


def _embedded(order: RowOrder, args: Arguments, out: object) -> MarkFields | None:
    weight, ids = args[:2]
    return order._taken(weight, ids, True)


def _sorted(order: RowOrder, args: Arguments, out: Sequence[torch.Tensor]) -> MarkFields | None:
    """The rule of `sort`: sorting an index gives its inverse."""
    source = next(_tensors(args))
    _largest(order, args, out)
    if not source.is_floating_point():
        order._put(out[1], Kind.ROWS, None, order._origin(source))
    return None


def _largest(order: RowOrder, args: Arguments, out: Sequence[torch.Tensor]) -> MarkFields | None:
    """The rule of `topk`: a vector's values are chosen by the indices beside them."""
    order._put(out, Kind.ROWS)
    if out[0].dim() == 1:
        order._put(out[0], Kind.CHOSEN, order._origin(out[1]))
    return None


def _product(order: RowOrder, args: Arguments, out: object) -> MarkFields | None:
    """The rule of an elementwise product: a weighted choice is one too."""
    operands = list(_tensors(args))
    kinds = [order._kind(tensor) for tensor in operands]
    if Kind.CHOICE in kinds and Kind.CHOSEN not in kinds:
        return (Kind.CHOICE,)
    return order._together(operands, out)


def _where(order: RowOrder, args: Arguments, out: object) -> MarkFields | None:
    """The rule of `where`: between constants, a condition makes a choice."""
    condition, *branches = args
    if order._kind(condition) is Kind.ROWS and all(
        order._kind(tensor) in _TABLES for tensor in branches
    ):
        return (Kind.CHOICE,)
    return order._together(list(_tensors(args)), out)


def _fresh(order: RowOrder, args: Arguments, out: object) -> MarkFields | None:
    return (Kind.TABLE,)


def _counted(order: RowOrder, args: Arguments, out: object) -> MarkFields | None:
    return (Kind.COUNTED,)


_RULES: dict[Any, Rule] = {
    aten.arange: _counted,
    **dict.fromkeys((aten.zeros_like, aten.ones_like, aten.empty_like, aten.full_like), _fresh),
    **dict.fromkeys((aten.rand_like, aten.randn_like, aten.new_zeros, aten.new_ones), _fresh),
    **dict.fromkeys((aten.new_empty, aten.new_full, aten.new_empty_strided), _fresh),
    aten.unsqueeze: _unsqueeze,
    aten.copy_: _copied_into,
    aten.index: _indexed,
    aten._unsafe_index: _indexed,
    **dict.fromkeys((aten.index_select, aten.gather), _along),
    **dict.fromkeys((aten.take, aten.masked_select), _flat),
    aten.embedding: _embedded,
    **dict.fromkeys((aten.index_put, aten.index_put_, aten._index_put_impl_), _index_put),
    **dict.fromkeys((aten.index_add, aten.index_add_), _put_along),
    **dict.fromkeys((aten.index_copy, aten.index_copy_), _put_along),
    **dict.fromkeys((aten.scatter, aten.scatter_, aten.scatter_add, aten.scatter_add_), _put_along),
    **dict.fromkeys((aten.scatter_reduce, aten.scatter_reduce_), _put_along),
    **dict.fromkeys((aten.masked_scatter, aten.masked_scatter_), _mask_put),
    aten.sort: _sorted,
    aten.topk: _largest,
    **dict.fromkeys((aten.mul, aten.mul_), _product),
    aten.where: _where,
    aten._to_copy: _copied,
    **dict.fromkeys((aten.mm, aten.bmm, aten.matmul, aten.linear, aten._grouped_mm), _rows_from(0)),
    **dict.fromkeys((aten.mv, aten.convolution), _rows_from(0)),
    **dict.fromkeys((aten.addmm, aten.baddbmm, aten.addmv), _rows_from(1)),
    aten._scaled_dot_product_flash_attention_for_cpu: _rows_from(0),
    aten._scaled_dot_product_flash_attention: _rows_from(0),
    aten._scaled_dot_product_efficient_attention: _rows_from(0),
    aten._scaled_dot_product_cudnn_attention: _rows_from(0),
    aten._scaled_dot_product_fused_attention_overrideable: _rows_from(0),
    aten._scaled_dot_product_attention_math: _rows_from(0),
}
