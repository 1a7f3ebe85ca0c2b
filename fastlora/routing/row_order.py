"""Which tensors of a forward have lost the order of the batch's rows: found by watching operators.

A mixed batch gives a layer's rows to adapters by their position. That is wrong for a tensor whose
rows the data chose, as a router chooses tokens for an expert. `RowOrder` sees every operator of a
block and marks the storage of each tensor whose rows are not those of the batch in order. Views
share their storage, so they need no mark of their own.

An index that comes from data, or that permutes, does not show by itself whether the rows stay in
order. Then its values are read once, and `fastlora.routing.row_samples` finds the sample of each
row. On a GPU that waits for the index.

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

from fastlora.routing import row_samples
from fastlora.routing.row_samples import NO_SAMPLE, Indices

aten = torch.ops.aten

# Tensors, numbers and lists, as an ATen operator takes them.
Arguments = tuple[Any, ...]
Keywords = dict[str, Any]


class Kind(enum.Enum):
    """What the rows of a tensor are.

    Attributes:
        ROWS: Rows of the batch, in its order. A tensor without a mark is of this kind.
        EVEN: Rows that the data chose, and that are in the order of the batch this time.
        CHOSEN: Rows that the data chose, or placed.
        TABLE: Made from parameters and buffers, and no data: its rows are no rows of the batch.
        CONSTANT: Made from numbers alone, as by `torch.zeros`.
        COUNTED: Made by `torch.arange`: an index that keeps the order.
        IDENTITY: Made by `torch.eye`: its rows are a choice, if data choose them.
        CHOICE: Weights in floating point, zero or not by the data: a product may choose rows by
            them.
    """

    ROWS = enum.auto()
    EVEN = enum.auto()
    CHOSEN = enum.auto()
    TABLE = enum.auto()
    CONSTANT = enum.auto()
    COUNTED = enum.auto()
    IDENTITY = enum.auto()
    CHOICE = enum.auto()


class Facts(NamedTuple):
    """What is known of the rows of a storage.

    Attributes:
        kind: What they are.
        origin: Of a chosen tensor and of an index, the key of the index that it began with.
        inverse: Of an index that inverts another one, the key of that one.
        samples: The sample of each row, where values were read: int64, one for each of as many
            equal parts of the storage. Of an even tensor, only where rows have yet to be placed.
    """

    kind: Kind
    origin: int | None = None
    inverse: int | None = None
    samples: torch.Tensor | None = None


class Mark(NamedTuple):
    """What is known of a storage; the reference keeps its key from being given to another one."""

    storage: StorageWeakRef
    facts: Facts


_ROWS, _TABLE, _CONSTANT = Facts(Kind.ROWS), Facts(Kind.TABLE), Facts(Kind.CONSTANT)
# Rows in the order of the batch; and no rows of the batch.
_ORDERED = (Kind.ROWS, Kind.EVEN)
_TABLES = (Kind.TABLE, Kind.CONSTANT, Kind.COUNTED, Kind.IDENTITY)
# Marks of storages that are gone are dropped whenever there are so many.
_MOST_MARKS = 4096


class RowOrder(TorchDispatchMode):
    """Within the mode, notes which tensors have rows that are not the batch's in order.

    Args:
        count: Number of adapter ids of the batch.
        tables: Buffers of the model.
    """

    supports_higher_order_operators = True

    def __init__(self, count: int, tables: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self._count = count
        self._marks: dict[int, Mark] = {}
        self._thread = 0
        self._rests = False
        for table in tables:
            self._put(table, _TABLE)

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

    def kind_of(self, x: torch.Tensor) -> Kind:
        """Returns what the rows of a tensor are."""
        return self._facts(x).kind

    def is_lone_table(self, x: torch.Tensor) -> bool:
        """Whether ``x [..., K]`` was made from the model alone, and not repeated for each sample.

        Of fewer than 3 dimensions, values show whether samples have the same rows.
        """
        if self._facts(x).kind is not Kind.TABLE or not x.is_floating_point():
            return False
        if x.dim() > 2 and x.shape[0] == self._count:
            return False
        rows = x.numel() // max(x.shape[-1], 1)
        if not rows or rows % self._count or not row_samples.is_readable(x):
            return bool(rows)
        parts = x.detach().reshape(self._count, -1)
        return not bool((parts == parts[:1]).all())

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
            facts = self._any(func, args, kwargs, out) if rule is None else rule(self, args, out)
            if facts is not None:
                self._put(out, facts)
        return out

    # ------------------------------------------------------------------------------------- facts

    def _facts(self, tensor: torch.Tensor) -> Facts:
        mark = self._marks.get(_key(tensor))
        if mark is not None:
            return mark.facts
        return _TABLE if isinstance(tensor, nn.Parameter) else _ROWS

    def _origin(self, tensor: torch.Tensor) -> int:
        """Returns the key of the index that an index began with: its own where it is new."""
        origin = self._facts(tensor).origin
        return _key(tensor) if origin is None else origin

    def _put(self, out: object, facts: Facts) -> None:
        """Notes what an operator returned."""
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if not isinstance(tensor, torch.Tensor):
                continue
            own = facts
            unknown = own.kind is Kind.CHOSEN and own.samples is None
            if (unknown or own.kind is Kind.CHOICE) and not tensor.is_floating_point():
                own = _ROWS  # an index or a mask, not what a layer gets
            key = _key(tensor)
            if not key:
                continue
            if own == _ROWS:
                self._marks.pop(key, None)
                continue
            if len(self._marks) >= _MOST_MARKS:
                live = {k: m for k, m in self._marks.items() if not m.storage.expired()}
                self._marks = live
            self._marks[key] = Mark(StorageWeakRef(tensor.untyped_storage()), own)

    # ----------------------------------------------------------------------------------- samples

    def _samples(self, tensor: torch.Tensor, lead: int) -> torch.Tensor | None:
        """Returns the samples of a tensor's ``lead`` first dimensions; None if not known."""
        facts, shape = self._facts(tensor), tensor.shape[:lead]
        if len(shape) < lead:
            return None
        if facts.kind in _ORDERED:
            moved = row_samples.is_moved(tensor)
            return None if moved else row_samples.in_order(shape, self._count)
        if facts.kind in _TABLES:
            return torch.full(shape, NO_SAMPLE)
        known = facts.samples
        return None if known is None else row_samples.of_view(tensor, known, lead)

    def _carried(self, source: torch.Tensor, out: object) -> torch.Tensor | None:
        """Returns the samples of what was computed row by row from a source that was chosen."""
        if not isinstance(out, torch.Tensor) or not out.dim():
            return None
        known = self._facts(source).samples
        if known is None or _key(out) == _key(source):
            return known
        lead = max(out.dim() - 1, 1)
        if source.shape[:lead] != out.shape[:lead] or not row_samples.is_whole(out):
            return None
        found = self._samples(source, lead)
        return None if found is None else found.flatten()

    def _found(self, samples: torch.Tensor | None, origin: int, by_data: bool) -> Facts:
        """Returns the facts of rows with these samples, which an index picked."""
        if samples is not None and row_samples.is_in_order(samples, self._count):
            return Facts(Kind.EVEN) if by_data else _ROWS
        return Facts(Kind.CHOSEN, origin, None, None if samples is None else samples.flatten())

    # ------------------------------------------------------------------------------------- rules

    def _any(
        self, func: OpOverload, args: Arguments, kwargs: Keywords, out: object
    ) -> Facts | None:
        """Returns the facts of what any other operator returns; None to leave them as they are."""
        operands = list(_tensors((args, kwargs)))
        if getattr(func, "is_view", False):  # shares its storage; but parameters have no mark
            return _TABLE if isinstance(operands[0], nn.Parameter) else None
        if not operands:
            return _CONSTANT
        if len(operands) > 1:
            return self._together(operands, out)
        (operand,) = operands
        facts = self._facts(operand)
        kind = facts.kind
        is_copy = getattr(func, "overloadpacket", None) in _COPIES
        if kind in (Kind.COUNTED, Kind.IDENTITY) and not is_copy:
            kind = Kind.CONSTANT
        origin = facts.origin if operand.is_floating_point() else self._origin(operand)
        samples = self._carried(operand, out) if kind is Kind.CHOSEN else None
        return Facts(kind, origin, facts.inverse, samples)

    def _together(self, operands: list[torch.Tensor], out: object) -> Facts:
        """Returns the facts of what comes of several operands, of which any may bring the rows."""
        kinds = [self._facts(tensor).kind for tensor in operands]
        shape = next((tensor.shape for tensor in _tensors(out)), None)
        full = [
            kind
            for tensor, kind in zip(operands, kinds, strict=True)
            if kind in _ORDERED and tensor.shape == shape and tensor.is_floating_point()
        ]
        if Kind.CHOSEN in kinds:
            chosen = operands[kinds.index(Kind.CHOSEN)]
            samples = self._carried(chosen, out)
            # Added to rows of the batch, as to a residual, rows that the rules have lost are taken
            # to be beside their own. Rows whose samples are known are not.
            if samples is None and full:
                return Facts(full[0])
            return Facts(Kind.CHOSEN, self._facts(chosen).origin, None, samples)
        if all(kind in _TABLES for kind in kinds):
            return _TABLE if Kind.TABLE in kinds else _CONSTANT
        return Facts(Kind.EVEN) if Kind.EVEN in kinds and Kind.ROWS not in full else _ROWS

    def _is_table(self, *indices: torch.Tensor | None) -> bool:
        return all(index is None or self._facts(index).kind in _TABLES for index in indices)

    def _picked(self, source: torch.Tensor, indices: Indices) -> Facts:
        """Returns the facts of what indices pick from a source, one for each dimension."""
        facts = self._facts(source)
        index = next((index for index in indices if index is not None), None)
        if index is None or not source.numel():
            return facts
        if facts.kind in _TABLES:
            return self._looked_up(facts.kind, indices)
        own = self._facts(index)
        # A first dimension of one entry is none of samples: `x[None, index]` makes one.
        first = indices[0] is not None or source.shape[0] == 1
        if not first and facts.kind is not Kind.CHOSEN:
            return facts
        if own.kind is Kind.COUNTED and first and index.shape[:1] == source.shape[:1]:
            return facts._replace(samples=None)
        if facts.kind is Kind.CHOSEN and own.inverse is not None and own.inverse == facts.origin:
            return _ROWS  # the order before the choice
        samples = self._samples(source, row_samples.dimensions_of(indices))
        if samples is not None:
            samples = row_samples.picked(samples, indices)
        return self._found(samples, self._origin(index), not self._is_table(*indices))

    def _looked_up(self, kind: Kind, indices: Indices) -> Facts:
        """Returns the facts of rows of a table: those of the index that picked them."""
        if self._is_table(*indices):
            return _TABLE if kind is Kind.TABLE else _CONSTANT
        if kind is Kind.IDENTITY:
            return Facts(Kind.CHOICE)
        for index in indices:
            own = _ROWS if index is None else self._facts(index)
            if own.kind is Kind.CHOSEN and index is not None:
                samples = self._samples(index, index.dim())
                return Facts(
                    own.kind, own.origin, None, None if samples is None else samples.flatten()
                )
            if own.kind is Kind.EVEN:
                return Facts(Kind.EVEN)
        return _ROWS

    def _placed(
        self, dest: torch.Tensor, indices: Indices, values: object, *, adds: bool = False
    ) -> Facts:
        """Returns the facts of a destination behind values that were put there by indices."""
        index = next((index for index in indices if index is not None), None)
        facts, brought = self._facts(dest), _CONSTANT
        if isinstance(values, torch.Tensor) and values.dim():
            brought = self._facts(values)
        first = bool(dest.dim()) and (indices[0] is not None or dest.shape[0] == 1)
        if index is None:
            return facts
        origin = self._origin(index)
        if brought.kind is Kind.COUNTED and first:
            return Facts(Kind.CONSTANT, None, origin)  # the inverse of the index
        if facts.kind not in _TABLES and facts.samples is None:
            return facts
        if brought.kind in _TABLES:
            if facts.samples is not None:
                return facts
            # Numbers at places that data chose are weights of a choice.
            return facts if self._is_table(*indices) else Facts(Kind.CHOICE)
        if not first:
            return Facts(brought.kind, brought.origin)
        if brought.kind is Kind.CHOICE:
            return brought
        if brought.kind is Kind.ROWS and self._facts(index).kind is Kind.COUNTED:
            return _ROWS
        back = brought.kind is Kind.CHOSEN and brought.origin == origin
        samples = self._samples_placed(dest, facts.samples, indices, values, adds)
        if samples is None:
            return _ROWS if back else Facts(Kind.CHOSEN, origin)
        if not row_samples.is_in_order(samples, self._count, blanks=True):
            return Facts(Kind.CHOSEN, origin, None, samples.flatten())
        if (back or self._is_table(*indices)) and row_samples.is_in_order(samples, self._count):
            return _ROWS  # every row is where it came from
        return Facts(Kind.EVEN, None, None, samples.flatten())

    def _samples_placed(
        self,
        dest: torch.Tensor,
        known: torch.Tensor | None,
        indices: Indices,
        values: object,
        adds: bool,
    ) -> torch.Tensor | None:
        """Returns the samples of a destination's indexed dimensions; None if not known."""
        lead = row_samples.dimensions_of(indices)
        if not row_samples.is_whole(dest) or not isinstance(values, torch.Tensor):
            return None
        before: torch.Tensor | None = torch.full(dest.shape[:lead], NO_SAMPLE)
        if known is not None:
            before = row_samples.of_view(dest, known, lead)
        there = None if before is None else row_samples.picked(before, indices)
        if before is None or there is None:
            return None
        samples = self._samples(values, there.dim())
        if samples is None or samples.shape != there.shape:
            return None
        return row_samples.placed(before, indices, samples, adds=adds)


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

Rule = Callable[[RowOrder, Arguments, Any], "Facts | None"]


def _rows_from(which: int) -> Rule:
    """Returns the rule of operators that take their rows from one argument, as a product does."""

    def rule(order: RowOrder, args: Arguments, out: object) -> Facts | None:
        source = args[which]
        facts = order._facts(source)
        others = [tensor for tensor in _tensors(args) if tensor is not source]
        if facts.kind in _TABLES:
            return order._together(others or [source], out)
        if facts.kind is Kind.CHOICE:
            # One product for the whole batch chooses rows; one for each sample does not.
            whole = source.dim() == 2 or source.shape[0] == 1
            rows = any(order._facts(tensor).kind in _ORDERED for tensor in others)
            return Facts(Kind.CHOSEN) if whole and rows else _ROWS
        return Facts(facts.kind, facts.origin, None, order._carried(source, out))

    return rule


def _copied(order: RowOrder, args: Arguments, out: object) -> Facts | None:
    """The rule of a change of dtype: numbers that were whole or true may choose rows."""
    source = args[0]
    facts = order._facts(source)
    whole = not (source.is_floating_point() or source.is_complex())
    is_float = isinstance(out, torch.Tensor) and out.is_floating_point()
    if whole and is_float and facts.kind in _ORDERED:
        return Facts(Kind.CHOICE)
    samples = order._carried(source, out) if facts.kind is Kind.CHOSEN else None
    return facts._replace(samples=samples)


def _indexed(order: RowOrder, args: Arguments, out: object) -> Facts | None:
    return order._picked(args[0], args[1])


def _copied_into(order: RowOrder, args: Arguments, out: object) -> Facts | None:
    """The rule of `copy_`, which fills a tensor, or a part of one."""
    dest, source = args[:2]
    kind = order._facts(dest).kind
    whole = dest.numel() == row_samples.storage_size(dest)
    if not whole and kind not in _TABLES:
        return None
    facts = order._facts(source)
    return facts._replace(samples=order._carried(source, dest) if whole else None)


def _index_put(order: RowOrder, args: Arguments, out: object) -> Facts | None:
    dest, indices, values, *adds = args
    return order._placed(dest, indices, values, adds=bool(adds and adds[0]))


def _along(order: RowOrder, args: Arguments, out: object) -> Facts | None:
    """The rule of `index_select` and `gather`."""
    source, dim, index = args[:3]
    if not source.dim():
        return None
    return order._picked(source, [None] * (dim % source.dim()) + [_row_index(index)])


def _put_along(adds: bool) -> Rule:
    """Returns the rule of `index_add`, `index_copy` and `scatter`."""

    def rule(order: RowOrder, args: Arguments, out: object) -> Facts | None:
        dest, dim, index, values = args[:4]
        if not dest.dim():
            return None
        indices = [None] * (dim % dest.dim()) + [_row_index(index)]
        return order._placed(dest, indices, values, adds=adds)

    return rule


def _row_index(index: torch.Tensor) -> torch.Tensor:
    """Returns the index of rows in one that was expanded to their elements, as `gather` takes it.

    One that was not expanded is returned as it is: it fits no rows, so nothing is read.
    """
    while index.dim() > 1 and (index.stride(-1) == 0 or index.shape[-1] == 1):
        index = index.select(-1, 0)
    return index


def _flat(order: RowOrder, args: Arguments, out: object) -> Facts | None:
    """The rule of `take` and `masked_select`, which pick elements and no rows."""
    source, index = args[:2]
    facts = order._facts(source)
    return facts if facts.kind in _TABLES else Facts(Kind.CHOSEN, order._origin(index))


def _mask_put(order: RowOrder, args: Arguments, out: object) -> Facts | None:
    dest, mask, values = args[:3]
    return order._placed(dest, [mask], values)


def _embedded(order: RowOrder, args: Arguments, out: object) -> Facts | None:
    return order._picked(args[0], [args[1]])


def _nonzero(order: RowOrder, args: Arguments, out: object) -> Facts | None:
    """The rule of `nonzero`, which numbers the rows that a mask picks."""
    (mask,) = args
    if order._is_table(mask):
        return _CONSTANT
    samples = order._samples(mask, mask.dim()) if mask.dim() else None
    if samples is not None:
        samples = row_samples.picked(samples, [mask.bool()])
    return order._found(samples, order._origin(mask), True)


def _sorted(order: RowOrder, args: Arguments, out: Sequence[torch.Tensor]) -> Facts | None:
    """The rule of `sort`: sorting an index gives its inverse."""
    source = next(_tensors(args))
    _largest(order, args, out)
    if not source.is_floating_point():
        order._put(out[1], order._facts(out[1])._replace(inverse=order._origin(source)))
    return None


def _largest(order: RowOrder, args: Arguments, out: Sequence[torch.Tensor]) -> Facts | None:
    """The rule of `topk`: a vector's values are chosen by the indices beside them."""
    source = next(_tensors(args))
    facts = _ROWS
    if out[0].dim() == 1 and not order._is_table(source):
        samples = order._samples(source, 1)
        if samples is not None:
            samples = row_samples.picked(samples, [out[1]])
        facts = order._found(samples, order._origin(out[1]), True)
    order._put(out[0], facts)
    order._put(out[1], facts._replace(origin=None))
    return None


def _joined(order: RowOrder, args: Arguments, out: object) -> Facts | None:
    """The rule of `cat`: chosen rows that are joined in order are the batch's again."""
    parts = [part for part in args[0] if part.numel()] or list(args[0])
    facts = order._together(parts, out)
    dim = args[1] if len(args) > 1 else 0
    if facts.kind is not Kind.CHOSEN or not isinstance(out, torch.Tensor) or dim % out.dim():
        return facts
    found = [order._samples(part, max(out.dim() - 1, 1)) for part in parts]
    known = [samples for samples in found if samples is not None]
    if len(known) < len(parts):
        return facts._replace(samples=None)
    return order._found(torch.cat(known), facts.origin or 0, True)


def _stacked(order: RowOrder, args: Arguments, out: object) -> Facts | None:
    """The rule of `stack`: as of `cat`."""
    facts = order._together(args[0], out)
    dim = args[1] if len(args) > 1 else 0
    if facts.kind is not Kind.CHOSEN or not isinstance(out, torch.Tensor) or dim % out.dim():
        return facts
    lead = max(out.dim() - 2, 0)
    known = [s for part in args[0] if (s := order._samples(part, lead)) is not None]
    if len(known) < len(args[0]):
        return facts._replace(samples=None)
    return order._found(torch.stack(known), facts.origin or 0, True)


def _product(order: RowOrder, args: Arguments, out: object) -> Facts | None:
    """The rule of an elementwise product: a weighted choice is one too."""
    operands = list(_tensors(args))
    kinds = [order._facts(tensor).kind for tensor in operands]
    if Kind.CHOICE in kinds and Kind.CHOSEN not in kinds:
        return Facts(Kind.CHOICE)
    return order._together(operands, out)


def _where(order: RowOrder, args: Arguments, out: object) -> Facts | None:
    """The rule of `where`: between constants, a condition makes a choice."""
    condition, *branches = args
    if order._facts(condition).kind in _ORDERED and order._is_table(*_tensors(branches)):
        return Facts(Kind.CHOICE)
    return order._together(list(_tensors(args)), out)


def _always(kind: Kind) -> Rule:
    """Returns the rule of operators that make a tensor of one kind."""
    return lambda order, args, out: Facts(kind)


_RULES: dict[Any, Rule] = {
    aten.arange: _always(Kind.COUNTED),
    aten.eye: _always(Kind.IDENTITY),
    **dict.fromkeys(
        (aten.zeros_like, aten.ones_like, aten.empty_like, aten.full_like), _always(Kind.CONSTANT)
    ),
    **dict.fromkeys(
        (aten.rand_like, aten.randn_like, aten.new_zeros, aten.new_ones), _always(Kind.CONSTANT)
    ),
    **dict.fromkeys(
        (aten.new_empty, aten.new_full, aten.new_empty_strided), _always(Kind.CONSTANT)
    ),
    aten.copy_: _copied_into,
    aten.index: _indexed,
    aten._unsafe_index: _indexed,
    **dict.fromkeys((aten.index_select, aten.gather), _along),
    **dict.fromkeys((aten.take, aten.masked_select), _flat),
    aten.embedding: _embedded,
    **dict.fromkeys((aten.index_put, aten.index_put_, aten._index_put_impl_), _index_put),
    **dict.fromkeys((aten.index_add, aten.index_add_), _put_along(True)),
    **dict.fromkeys((aten.index_copy, aten.index_copy_), _put_along(False)),
    **dict.fromkeys((aten.scatter, aten.scatter_), _put_along(False)),
    **dict.fromkeys((aten.scatter_add, aten.scatter_add_), _put_along(True)),
    **dict.fromkeys((aten.scatter_reduce, aten.scatter_reduce_), _put_along(True)),
    **dict.fromkeys((aten.masked_scatter, aten.masked_scatter_), _mask_put),
    aten.nonzero: _nonzero,
    aten.cat: _joined,
    aten.stack: _stacked,
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
