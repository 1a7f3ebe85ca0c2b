"""Rules for the effect of each operator on the rows of a batch; see `fastlora.routing.row_order`.

A rule is a function that returns the `Facts` about an operator's result, or None to leave them
unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload

from fastlora.routing import row_samples
from fastlora.routing.row_facts import (
    CONSTANT,
    ORDERED,
    ROWS,
    TABLE,
    TABLES,
    Facts,
    Kind,
    RowFacts,
    tensors_in,
)
from fastlora.routing.row_samples import Indices

aten = torch.ops.aten

# Tensors, numbers, and lists, as ATen operators take them.
Arguments = tuple[Any, ...]
Keywords = dict[str, Any]

Rule = Callable[[RowFacts, Arguments, Any], "Facts | None"]
# Copies of a COUNTED index that are COUNTED too.
_COPIES = {aten._to_copy, aten.clone, aten.lift_fresh, aten.lift_fresh_copy}


def facts_of_result(
    known: RowFacts, func: OpOverload, args: Arguments, kwargs: Keywords, out: object
) -> Facts | None:
    """Apply the operator's rule: return the facts about its result, or None to change nothing."""
    rule = _RULES.get(getattr(func, "overloadpacket", None))
    return _any(known, func, args, kwargs, out) if rule is None else rule(known, args, out)


def _any(
    known: RowFacts, func: OpOverload, args: Arguments, kwargs: Keywords, out: object
) -> Facts | None:
    """Apply the default rule, for operators that are not in `_RULES`."""
    operands = list(tensors_in((args, kwargs)))
    # A view shares its storage and its mark, but parameters have no mark.
    if getattr(func, "is_view", False):
        return TABLE if isinstance(operands[0], nn.Parameter) else None
    if not operands:
        return CONSTANT
    if len(operands) > 1:
        return _together(known, operands, out)
    (operand,) = operands
    facts = known.of(operand)
    kind = facts.kind
    is_copy = getattr(func, "overloadpacket", None) in _COPIES
    if kind in (Kind.COUNTED, Kind.IDENTITY) and not is_copy:
        kind = Kind.CONSTANT
    origin = facts.origin if operand.is_floating_point() else known.origin(operand)
    samples = known.carried(operand, out) if kind is Kind.CHOSEN else None
    return Facts(kind, origin, facts.inverse, samples, facts.fixed)


def _together(known: RowFacts, operands: list[torch.Tensor], out: object) -> Facts:
    """Return the facts about a result whose rows may come from any of several operands."""
    kinds = [known.of(tensor).kind for tensor in operands]
    shape = next((tensor.shape for tensor in tensors_in(out)), None)
    full = [
        kind
        for tensor, kind in zip(operands, kinds, strict=True)
        if kind in ORDERED and tensor.shape == shape and tensor.is_floating_point()
    ]
    if Kind.CHOSEN in kinds:
        chosen = operands[kinds.index(Kind.CHOSEN)]
        samples = known.carried(chosen, out)
        # Rows that the rules have lost are taken to be in order if they are added to rows of the
        # batch, as to a residual. Rows with known samples are not.
        if samples is None and full:
            return Facts(full[0])
        fixed = known.are_fixed(*operands)
        return Facts(Kind.CHOSEN, known.of(chosen).origin, None, samples, fixed)
    if all(kind in TABLES for kind in kinds):
        return TABLE if Kind.TABLE in kinds else CONSTANT
    return Facts(Kind.EVEN) if Kind.EVEN in kinds and Kind.ROWS not in full else ROWS


def _picked(known: RowFacts, source: torch.Tensor, indices: Indices) -> Facts:
    """Return the facts about the rows that indices, one per dimension, select from a source."""
    facts = known.of(source)
    index = next((index for index in indices if index is not None), None)
    if index is None or not source.numel():
        return facts
    if facts.kind in TABLES:
        return _looked_up(known, facts.kind, indices)
    own = known.of(index)
    # A first dimension of one entry is not a dimension of samples: `x[None, index]` makes one.
    first = indices[0] is not None or source.shape[0] == 1
    if not first and facts.kind is not Kind.CHOSEN:
        return facts
    if first and facts.kind in ORDERED and _counts_all(known, index, source):
        return facts
    if facts.kind is Kind.CHOSEN and own.inverse is not None and own.inverse == facts.origin:
        return ROWS  # This restores the order from before the choice.
    samples = known.samples(source, row_samples.dimensions_of(indices))
    if samples is not None:
        samples = row_samples.picked(samples, indices)
    fixed = known.are_tables(*indices) and known.are_fixed(source)
    return known.facts_of_samples(samples, known.origin(index), fixed=fixed)


def _counts_all(known: RowFacts, index: torch.Tensor, rows: torch.Tensor) -> bool:
    """Return whether ``index`` counts up through all entries of the first dimension of ``rows``."""
    if known.of(index).kind is not Kind.COUNTED or index.shape[:1] != rows.shape[:1]:
        return False
    return not row_samples.is_readable(index) or bool((index.flatten().diff() >= 0).all())


def _looked_up(known: RowFacts, kind: Kind, indices: Indices) -> Facts:
    """Return the facts about rows looked up in a table, which depend on those about the indices."""
    if known.are_tables(*indices):
        return TABLE if kind is Kind.TABLE else CONSTANT
    if kind is Kind.IDENTITY:
        return Facts(Kind.CHOICE)
    for index in indices:
        own = ROWS if index is None else known.of(index)
        if own.kind is Kind.CHOSEN and index is not None:
            samples = known.samples(index, index.dim())
            found = None if samples is None else samples.flatten()
            return Facts(own.kind, own.origin, None, found, own.fixed)
        if own.kind is Kind.EVEN:
            return Facts(Kind.EVEN)
    return ROWS


def _placed(
    known: RowFacts, dest: torch.Tensor, indices: Indices, values: object, *, adds: bool = False
) -> Facts:
    """Return the facts about ``dest`` after ``values`` have been written to it at ``indices``."""
    index = next((index for index in indices if index is not None), None)
    facts, brought = known.of(dest), CONSTANT
    if isinstance(values, torch.Tensor) and values.dim():
        brought = known.of(values)
    first = bool(dest.dim()) and (indices[0] is not None or dest.shape[0] == 1)
    if index is None:
        return facts
    origin = known.origin(index)
    if brought.kind is Kind.COUNTED and first:
        return Facts(Kind.CONSTANT, None, origin)  # The result is the inverse of the index.
    if facts.kind not in TABLES and facts.samples is None:
        return facts
    if brought.kind in TABLES:
        if facts.samples is not None:
            return facts
        # Numbers at places that data chose are the weights of a choice.
        return facts if known.are_tables(*indices) else Facts(Kind.CHOICE)
    if not first:
        return Facts(brought.kind, brought.origin)
    if brought.kind is Kind.CHOICE:
        return brought
    if brought.kind is Kind.ROWS and _counts_all(known, index, dest):
        return ROWS
    back = brought.kind is Kind.CHOSEN and brought.origin == origin
    samples = _samples_placed(known, dest, facts.samples, indices, values, adds)
    if samples is None:
        return ROWS if back else Facts(Kind.CHOSEN, origin)
    fixed = known.are_fixed(dest) and (
        back or (known.are_tables(*indices) and known.are_fixed(*tensors_in(values)))
    )
    if not row_samples.is_in_order(samples, known.count, blanks=True):
        return Facts(Kind.CHOSEN, origin, None, samples.flatten(), fixed)
    if fixed and row_samples.is_in_order(samples, known.count):
        return ROWS  # Every row is back where it came from.
    return Facts(Kind.EVEN, None, None, samples.flatten(), fixed)


def _samples_placed(
    known: RowFacts,
    dest: torch.Tensor,
    held: torch.Tensor | None,
    indices: Indices,
    values: object,
    adds: bool,
) -> torch.Tensor | None:
    """Return the sample of each row of ``dest`` after the write, or None if unknown."""
    lead = row_samples.dimensions_of(indices)
    if not row_samples.is_whole(dest) or not isinstance(values, torch.Tensor):
        return None
    before: torch.Tensor | None = row_samples.no_samples(dest.shape[:lead])
    if held is not None:
        before = row_samples.of_view(dest, held, lead)
    there = None if before is None else row_samples.picked(before, indices)
    if before is None or there is None:
        return None
    samples = known.samples(values, there.dim())
    if samples is None or samples.shape != there.shape:
        return None
    return row_samples.placed(before, indices, samples, adds=adds)


def _rows_from(which: int) -> Rule:
    """Return the rule of operators whose rows come from argument ``which``, such as `mm`."""

    def rule(known: RowFacts, args: Arguments, out: object) -> Facts | None:
        source = args[which]
        facts = known.of(source)
        others = [tensor for tensor in tensors_in(args) if tensor is not source]
        if facts.kind in TABLES:
            return _together(known, others or [source], out)
        if facts.kind is Kind.CHOICE:
            # One product for the whole batch chooses rows; a product for each sample does not.
            whole = source.dim() == 2 or source.shape[0] == 1
            rows = any(known.of(tensor).kind in ORDERED for tensor in others)
            return Facts(Kind.CHOSEN) if whole and rows else ROWS
        return Facts(facts.kind, facts.origin, None, known.carried(source, out), facts.fixed)

    return rule


def _copied(known: RowFacts, args: Arguments, out: object) -> Facts | None:
    """Apply the rule of dtype conversions: floats converted from integers or bools are a choice."""
    source = args[0]
    facts = known.of(source)
    whole = not (source.is_floating_point() or source.is_complex())
    is_float = isinstance(out, torch.Tensor) and out.is_floating_point()
    if whole and is_float and facts.kind in ORDERED:
        return Facts(Kind.CHOICE)
    samples = known.carried(source, out) if facts.kind is Kind.CHOSEN else None
    return facts._replace(samples=samples)


def _indexed(known: RowFacts, args: Arguments, out: object) -> Facts | None:
    return _picked(known, args[0], args[1])


def _copied_into(known: RowFacts, args: Arguments, out: object) -> Facts | None:
    """Apply the rule of `copy_`, which fills a tensor or a part of one."""
    dest, source = args[:2]
    kind = known.of(dest).kind
    whole = dest.numel() == row_samples.storage_size(dest)
    if not whole and kind not in TABLES:
        return None
    facts = known.of(source)
    return facts._replace(samples=known.carried(source, dest) if whole else None)


def _index_put(known: RowFacts, args: Arguments, out: object) -> Facts | None:
    dest, indices, values, *adds = args
    return _placed(known, dest, indices, values, adds=bool(adds and adds[0]))


def _selected(known: RowFacts, args: Arguments, out: object) -> Facts | None:
    """Apply the rule of `index_select`."""
    source, dim, index = args[:3]
    if not source.dim():
        return None
    return _picked(known, source, [None] * (dim % source.dim()) + [index])


def _gathered(known: RowFacts, args: Arguments, out: object) -> Facts | None:
    """Apply the rule of `gather`, which selects whole rows only along the first dimension."""
    source, dim, index = args[:3]
    facts = known.of(source)
    if not source.dim() or (dim % source.dim() and facts.kind not in TABLES):
        return Facts(facts.kind, facts.origin, None, known.carried(source, out), facts.fixed)
    return _picked(known, source, [_row_index(index)])


def _put_along(adds: bool) -> Rule:
    """Return the rule of `index_add`, `index_copy`, and `scatter`."""

    def rule(known: RowFacts, args: Arguments, out: object) -> Facts | None:
        dest, dim, index, values = args[:4]
        if not dest.dim():
            return None
        indices = [None] * (dim % dest.dim()) + [_row_index(index)]
        return _placed(known, dest, indices, values, adds=adds)

    return rule


def _row_index(index: torch.Tensor) -> torch.Tensor:
    """Undo the expansion of a row index to the elements of each row, as `gather` requires it.

    An index that was not expanded is returned unchanged, as an index of elements.
    """
    while index.dim() > 1 and (index.stride(-1) == 0 or index.shape[-1] == 1):
        index = index.select(-1, 0)
    return index


def _flat(known: RowFacts, args: Arguments, out: object) -> Facts | None:
    """Apply the rule of `take` and `masked_select`, which select elements, not rows."""
    source, index = args[:2]
    facts = known.of(source)
    return facts if facts.kind in TABLES else Facts(Kind.CHOSEN, known.origin(index))


def _mask_put(known: RowFacts, args: Arguments, out: object) -> Facts | None:
    dest, mask, values = args[:3]
    return _placed(known, dest, [mask.expand(dest.shape)], values)


def _embedded(known: RowFacts, args: Arguments, out: object) -> Facts | None:
    return _picked(known, args[0], [args[1]])


def _nonzero(known: RowFacts, args: Arguments, out: object) -> Facts | None:
    """Apply the rule of `nonzero`, which returns the positions that a mask selects."""
    (mask,) = args
    if known.are_tables(mask):
        return CONSTANT
    samples = known.samples(mask, mask.dim()) if mask.dim() else None
    if samples is not None:
        samples = row_samples.picked(samples, [mask.bool()])
    return known.facts_of_samples(samples, known.origin(mask), fixed=False)


def _sorted(known: RowFacts, args: Arguments, out: Sequence[torch.Tensor]) -> Facts | None:
    """Apply the rule of `sort`: the permutation that sorts an index is the index's inverse."""
    source = next(tensors_in(args))
    _largest(known, args, out)
    if not source.is_floating_point():
        known.put(out[1], known.of(out[1])._replace(inverse=known.origin(source)))
    return None


def _largest(known: RowFacts, args: Arguments, out: Sequence[torch.Tensor]) -> Facts | None:
    """Apply the rule of `topk`: a vector's values are those that the returned indices select."""
    source = next(tensors_in(args))
    facts = ROWS
    if out[0].dim() == 1 and not known.are_tables(source):
        samples = known.samples(source, 1)
        if samples is not None:
            samples = row_samples.picked(samples, [out[1]])
        facts = known.facts_of_samples(samples, known.origin(out[1]), fixed=False)
    known.put(out[0], facts)
    known.put(out[1], facts._replace(origin=None))
    return None


def _joined(stacks: bool) -> Rule:
    """Return the rule of `cat` and `stack`: joined parts of chosen rows may be in order again."""

    def rule(known: RowFacts, args: Arguments, out: object) -> Facts | None:
        parts = [part for part in args[0] if part.numel()] or list(args[0])
        facts = _together(known, parts, out)
        dim = args[1] if len(args) > 1 else 0
        if facts.kind is not Kind.CHOSEN or not isinstance(out, torch.Tensor) or dim % out.dim():
            return facts
        lead = max(out.dim() - 1, 1) - stacks
        found = [known.samples(part, lead) for part in parts]
        samples = [each for each in found if each is not None]
        if len(samples) < len(parts):
            return facts._replace(samples=None)
        joined = torch.stack(samples) if stacks else torch.cat(samples)
        return known.facts_of_samples(joined, facts.origin, fixed=False)

    return rule


def _product(known: RowFacts, args: Arguments, out: object) -> Facts | None:
    """Apply the rule of elementwise products: a choice multiplied by weights is still a choice."""
    operands = list(tensors_in(args))
    kinds = [known.of(tensor).kind for tensor in operands]
    if Kind.CHOICE in kinds and Kind.CHOSEN not in kinds:
        return Facts(Kind.CHOICE)
    return _together(known, operands, out)


def _where(known: RowFacts, args: Arguments, out: object) -> Facts | None:
    """Apply the rule of `where`: a condition that selects between constants yields a choice."""
    condition, *branches = args
    if known.of(condition).kind in ORDERED and known.are_tables(*tensors_in(branches)):
        return Facts(Kind.CHOICE)
    return _together(known, list(tensors_in(args)), out)


def _always(kind: Kind) -> Rule:
    """Return the rule of operators whose result is always of the kind ``kind``."""
    return lambda known, args, out: Facts(kind)


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
    aten.index_select: _selected,
    aten.gather: _gathered,
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
    aten.cat: _joined(stacks=False),
    aten.stack: _joined(stacks=True),
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
