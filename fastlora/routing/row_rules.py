"""Rules for each operator's effect on the rows of a batch; see `fastlora.routing.row_tracking`.

A rule is a function that returns the `RowOriginFacts` for an operator's result, or None to leave
them unchanged.
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
    RowFactsTable,
    RowOriginFacts,
    RowOriginKind,
    tensors_in,
)
from fastlora.routing.row_samples import Indices

aten = torch.ops.aten

# Tensors, numbers, and lists, as ATen operators take them.
Arguments = tuple[Any, ...]
Keywords = dict[str, Any]

Rule = Callable[[RowFactsTable, Arguments, Any], "RowOriginFacts | None"]
# Copies of a COUNTED index that are COUNTED too.
_COPIES = {aten._to_copy, aten.clone, aten.lift_fresh, aten.lift_fresh_copy}


def result_row_facts_if_changed(
    known: RowFactsTable, func: OpOverload, args: Arguments, kwargs: Keywords, out: object
) -> RowOriginFacts | None:
    """Return the `RowOriginFacts` of an operator's result, or None if they need no update.

    The function applies the operator's rule. Facts are recorded per storage, so the result may
    already have facts, which need no update if they remain valid.
    """
    rule = _RULES.get(getattr(func, "overloadpacket", None))
    return _default_rule(known, func, args, kwargs, out) if rule is None else rule(known, args, out)


def _default_rule(
    known: RowFactsTable, func: OpOverload, args: Arguments, kwargs: Keywords, out: object
) -> RowOriginFacts | None:
    """Apply the default rule to an operator.

    It is the rule for operators that are not in `_RULES`.
    """
    operands = list(tensors_in((args, kwargs)))
    # A view shares its storage and its facts, but parameters have no entry.
    if getattr(func, "is_view", False):
        return TABLE if isinstance(operands[0], nn.Parameter) else None
    if not operands:
        return CONSTANT
    if len(operands) > 1:
        return _combined_facts(known, operands, out)
    (operand,) = operands
    facts = known.facts_of(operand)
    kind = facts.kind
    is_copy = getattr(func, "overloadpacket", None) in _COPIES
    if kind in (RowOriginKind.COUNTED, RowOriginKind.IDENTITY) and not is_copy:
        kind = RowOriginKind.CONSTANT
    origin = facts.origin if operand.is_floating_point() else known.key_of_original_index(operand)
    samples = known.samples_of_result(operand, out) if kind is RowOriginKind.CHOSEN else None
    return RowOriginFacts(kind, origin, facts.inverse, samples, facts.fixed)


def _combined_facts(
    known: RowFactsTable, operands: list[torch.Tensor], out: object
) -> RowOriginFacts:
    """Combine the `RowOriginFacts` of several operands into those of the result.

    The combined facts are returned even if the facts of the operands conflict.
    """
    kinds = [known.facts_of(tensor).kind for tensor in operands]
    shape = next((tensor.shape for tensor in tensors_in(out)), None)
    full = [
        kind
        for tensor, kind in zip(operands, kinds, strict=True)
        if kind in ORDERED and tensor.shape == shape and tensor.is_floating_point()
    ]
    if RowOriginKind.CHOSEN in kinds:
        chosen = operands[kinds.index(RowOriginKind.CHOSEN)]
        samples = known.samples_of_result(chosen, out)
        # Rows that the rules have lost are taken to be in order if they are added to rows of the
        # batch, as to a residual. Rows with known samples are not.
        if samples is None and full:
            return RowOriginFacts(full[0])
        fixed = known.rows_have_fixed_sample_indices(*operands)
        return RowOriginFacts(
            RowOriginKind.CHOSEN, known.facts_of(chosen).origin, None, samples, fixed
        )
    if all(kind in TABLES for kind in kinds):
        return TABLE if RowOriginKind.TABLE in kinds else CONSTANT
    return (
        RowOriginFacts(RowOriginKind.EVEN)
        if RowOriginKind.EVEN in kinds and RowOriginKind.ROWS not in full
        else ROWS
    )


def _selected_facts(known: RowFactsTable, source: torch.Tensor, indices: Indices) -> RowOriginFacts:
    """Return the known facts about the rows that ``indices`` select from ``source``.

    There is one index, or None, for each leading dimension.
    """
    facts = known.facts_of(source)
    index = next((index for index in indices if index is not None), None)
    if index is None or not source.numel():
        return facts
    if facts.kind in TABLES:
        return _table_lookup_facts(known, facts.kind, indices)
    own = known.facts_of(index)
    # A first dimension of one entry is not a dimension of samples: `x[None, index]` makes one.
    first = indices[0] is not None or source.shape[0] == 1
    if not first and facts.kind is not RowOriginKind.CHOSEN:
        return facts
    if first and facts.kind in ORDERED and _counts_up_through_all_rows(known, index, source):
        return facts
    if (
        facts.kind is RowOriginKind.CHOSEN
        and own.inverse is not None
        and own.inverse == facts.origin
    ):
        return ROWS  # This restores the order from before the choice.
    samples = known.samples_of_rows(source, row_samples.indexed_dimensions(indices))
    if samples is not None:
        samples = row_samples.selected_samples(samples, indices)
    fixed = known.are_independent_of_input_data(*indices) and known.rows_have_fixed_sample_indices(
        source
    )
    return known.facts_from_samples(samples, known.key_of_original_index(index), fixed=fixed)


def _counts_up_through_all_rows(
    known: RowFactsTable, index: torch.Tensor, rows: torch.Tensor
) -> bool:
    """Return whether an index selects all rows of a tensor in ascending order.

    ``index`` then contains all indices of the first dimension of ``rows`` in order.
    """
    if known.facts_of(index).kind is not RowOriginKind.COUNTED or index.shape[:1] != rows.shape[:1]:
        return False
    return not row_samples.values_are_readable(index) or bool((index.flatten().diff() >= 0).all())


def _table_lookup_facts(
    known: RowFactsTable, table_kind: RowOriginKind, indices: Indices
) -> RowOriginFacts:
    """Return the known facts about the rows that ``indices`` select from a table.

    The result is derived from the kind of the table and from the facts about the indices.
    """
    if known.are_independent_of_input_data(*indices):
        return TABLE if table_kind is RowOriginKind.TABLE else CONSTANT
    if table_kind is RowOriginKind.IDENTITY:
        return RowOriginFacts(RowOriginKind.CHOICE)
    for index in indices:
        own = ROWS if index is None else known.facts_of(index)
        if own.kind is RowOriginKind.CHOSEN and index is not None:
            samples = known.samples_of_rows(index, index.dim())
            found = None if samples is None else samples.flatten()
            return RowOriginFacts(own.kind, own.origin, None, found, own.fixed)
        if own.kind is RowOriginKind.EVEN:
            return RowOriginFacts(RowOriginKind.EVEN)
    return ROWS


def _facts_after_write(
    known: RowFactsTable,
    dest: torch.Tensor,
    indices: Indices,
    values: object,
    *,
    adds: bool = False,
) -> RowOriginFacts:
    """Return the known facts about the rows of ``dest`` after a write.

    ``values`` are written to ``dest`` at ``indices``.
    """
    index = next((index for index in indices if index is not None), None)
    facts, brought = known.facts_of(dest), CONSTANT
    if isinstance(values, torch.Tensor) and values.dim():
        brought = known.facts_of(values)
    first = bool(dest.dim()) and (indices[0] is not None or dest.shape[0] == 1)
    if index is None:
        return facts
    origin = known.key_of_original_index(index)
    if brought.kind is RowOriginKind.COUNTED and first:
        # The result is the inverse of the index.
        return RowOriginFacts(RowOriginKind.CONSTANT, None, origin)
    if facts.kind not in TABLES and facts.samples is None:
        return facts
    if brought.kind in TABLES:
        if facts.samples is not None:
            return facts
        # Numbers at places that data chose are the weights of a choice.
        return (
            facts
            if known.are_independent_of_input_data(*indices)
            else RowOriginFacts(RowOriginKind.CHOICE)
        )
    if not first:
        return RowOriginFacts(brought.kind, brought.origin)
    if brought.kind is RowOriginKind.CHOICE:
        return brought
    if brought.kind is RowOriginKind.ROWS and _counts_up_through_all_rows(known, index, dest):
        return ROWS
    back = brought.kind is RowOriginKind.CHOSEN and brought.origin == origin
    samples = _samples_after_write(known, dest, facts.samples, indices, values, adds)
    if samples is None:
        return ROWS if back else RowOriginFacts(RowOriginKind.CHOSEN, origin)
    fixed = known.rows_have_fixed_sample_indices(dest) and (
        back
        or (
            known.are_independent_of_input_data(*indices)
            and known.rows_have_fixed_sample_indices(*tensors_in(values))
        )
    )
    if not row_samples.are_samples_in_batch_order(samples, known.count, allow_no_sample=True):
        return RowOriginFacts(RowOriginKind.CHOSEN, origin, None, samples.flatten(), fixed)
    if fixed and row_samples.are_samples_in_batch_order(samples, known.count):
        return ROWS  # Every row is back where it came from.
    return RowOriginFacts(RowOriginKind.EVEN, None, None, samples.flatten(), fixed)


def _samples_after_write(
    known: RowFactsTable,
    dest: torch.Tensor,
    held: torch.Tensor | None,
    indices: Indices,
    values: object,
    adds: bool,
) -> torch.Tensor | None:
    """For each row of ``dest``, return the index of the sample that it belongs to after a write.

    Returns None if the samples are unknown.
    """
    lead = row_samples.indexed_dimensions(indices)
    if not row_samples.is_contiguous_and_covers_storage(dest) or not isinstance(
        values, torch.Tensor
    ):
        return None
    before: torch.Tensor | None = row_samples.no_samples(dest.shape[:lead])
    if held is not None:
        before = row_samples.batch_sample_of_each_row(dest, held, lead)
    there = None if before is None else row_samples.selected_samples(before, indices)
    if before is None or there is None:
        return None
    samples = known.samples_of_rows(values, there.dim())
    if samples is None or samples.shape != there.shape:
        return None
    return row_samples.samples_after_write(before, indices, samples, adds=adds)


def _rows_from_argument_rule(which: int) -> Rule:
    """Return the rule for operators that take their rows from the argument at index ``which``.

    `mm` is an example.
    """

    def rule(known: RowFactsTable, args: Arguments, out: object) -> RowOriginFacts | None:
        source = args[which]
        facts = known.facts_of(source)
        others = [tensor for tensor in tensors_in(args) if tensor is not source]
        if facts.kind in TABLES:
            return _combined_facts(known, others or [source], out)
        if facts.kind is RowOriginKind.CHOICE:
            # One product for the whole batch chooses rows; a product for each sample does not.
            whole = source.dim() == 2 or source.shape[0] == 1
            rows = any(known.facts_of(tensor).kind in ORDERED for tensor in others)
            return RowOriginFacts(RowOriginKind.CHOSEN) if whole and rows else ROWS
        return RowOriginFacts(
            facts.kind, facts.origin, None, known.samples_of_result(source, out), facts.fixed
        )

    return rule


def _convert_dtype(known: RowFactsTable, args: Arguments, out: object) -> RowOriginFacts | None:
    """Apply the rule for dtype conversions, whose results usually have the row facts of the input.

    The result of a conversion has the `RowOriginFacts` of the input, with two exceptions. The
    samples are kept only for the kind `CHOSEN`, if they are known for the result. If integers or
    bools of the batch are converted to floats, the result counts as a `CHOICE` instead.
    """
    source = args[0]
    facts = known.facts_of(source)
    whole = not (source.is_floating_point() or source.is_complex())
    is_float = isinstance(out, torch.Tensor) and out.is_floating_point()
    if whole and is_float and facts.kind in ORDERED:
        return RowOriginFacts(RowOriginKind.CHOICE)
    samples = known.samples_of_result(source, out) if facts.kind is RowOriginKind.CHOSEN else None
    return facts._replace(samples=samples)


def _index(known: RowFactsTable, args: Arguments, out: object) -> RowOriginFacts | None:
    return _selected_facts(known, args[0], args[1])


def _copy_into(known: RowFactsTable, args: Arguments, out: object) -> RowOriginFacts | None:
    """Apply the rule for in-place copies: the row facts of the source are copied to the target.

    The rule is for `copy_`. If `copy_` fills only a part of a tensor, the facts change only if the
    tensor contains no rows of the batch.
    """
    dest, source = args[:2]
    kind = known.facts_of(dest).kind
    whole = dest.numel() == row_samples.storage_numel(dest)
    if not whole and kind not in TABLES:
        return None
    facts = known.facts_of(source)
    return facts._replace(samples=known.samples_of_result(source, dest) if whole else None)


def _index_put(known: RowFactsTable, args: Arguments, out: object) -> RowOriginFacts | None:
    dest, indices, values, *adds = args
    return _facts_after_write(known, dest, indices, values, adds=bool(adds and adds[0]))


def _index_select(known: RowFactsTable, args: Arguments, out: object) -> RowOriginFacts | None:
    """Apply the rule for `index_select`."""
    source, dim, index = args[:3]
    if not source.dim():
        return None
    return _selected_facts(known, source, [None] * (dim % source.dim()) + [index])


def _gather(known: RowFactsTable, args: Arguments, out: object) -> RowOriginFacts | None:
    """Apply the rule for `gather`.

    The operator selects whole rows only along the first dimension.
    """
    source, dim, index = args[:3]
    facts = known.facts_of(source)
    if not source.dim() or (dim % source.dim() and facts.kind not in TABLES):
        return RowOriginFacts(
            facts.kind, facts.origin, None, known.samples_of_result(source, out), facts.fixed
        )
    return _selected_facts(known, source, [_unexpanded_row_index(index)])


def _write_along_rule(adds: bool) -> Rule:
    """Return the rule for operators that write values at given indices along a dimension.

    These are the `index_add`, `index_copy`, and `scatter` operators.
    """

    def rule(known: RowFactsTable, args: Arguments, out: object) -> RowOriginFacts | None:
        dest, dim, index, values = args[:4]
        if not dest.dim():
            return None
        indices = [None] * (dim % dest.dim()) + [_unexpanded_row_index(index)]
        return _facts_after_write(known, dest, indices, values, adds=adds)

    return rule


def _unexpanded_row_index(index: torch.Tensor) -> torch.Tensor:
    """Return the original row index from which an expanded row index was made.

    The original row index has one entry per row. `gather` requires a row index to be expanded to
    all elements of the rows, with one entry per element. This function undoes the expansion. An
    index that was not expanded is returned unchanged, as an index of elements.
    """
    while index.dim() > 1 and (index.stride(-1) == 0 or index.shape[-1] == 1):
        index = index.select(-1, 0)
    return index


def _take_or_masked_select(
    known: RowFactsTable, args: Arguments, out: object
) -> RowOriginFacts | None:
    """Apply the rule for `take` and `masked_select`.

    These operators select elements rather than rows.
    """
    source, index = args[:2]
    facts = known.facts_of(source)
    return (
        facts
        if facts.kind in TABLES
        else RowOriginFacts(RowOriginKind.CHOSEN, known.key_of_original_index(index))
    )


def _masked_scatter(known: RowFactsTable, args: Arguments, out: object) -> RowOriginFacts | None:
    dest, mask, values = args[:3]
    return _facts_after_write(known, dest, [mask.expand(dest.shape)], values)


def _embedding(known: RowFactsTable, args: Arguments, out: object) -> RowOriginFacts | None:
    return _selected_facts(known, args[0], [args[1]])


def _nonzero(known: RowFactsTable, args: Arguments, out: object) -> RowOriginFacts | None:
    """Apply the rule for `nonzero`.

    The operator returns the positions that a mask selects.
    """
    (mask,) = args
    if known.are_independent_of_input_data(mask):
        return CONSTANT
    samples = known.samples_of_rows(mask, mask.dim()) if mask.dim() else None
    if samples is not None:
        samples = row_samples.selected_samples(samples, [mask.bool()])
    return known.facts_from_samples(samples, known.key_of_original_index(mask), fixed=False)


def _sort(
    known: RowFactsTable, args: Arguments, out: Sequence[torch.Tensor]
) -> RowOriginFacts | None:
    """Apply the rule for `sort`, and record where the rows of the operator's outputs come from.

    The permutation that sorts an index is the inverse of the index. Otherwise, the rule is the same
    as for `topk`.
    """
    source = next(tensors_in(args))
    _topk(known, args, out)
    if not source.is_floating_point():
        known.put(
            out[1], known.facts_of(out[1])._replace(inverse=known.key_of_original_index(source))
        )
    return None


def _topk(
    known: RowFactsTable, args: Arguments, out: Sequence[torch.Tensor]
) -> RowOriginFacts | None:
    """Apply the rule for `topk`, and record where the rows of the operator's outputs come from.

    For a vector that depends on the input data, the returned indices select the returned values.
    All other results count as rows of the batch in order.
    """
    source = next(tensors_in(args))
    facts = ROWS
    if out[0].dim() == 1 and not known.are_independent_of_input_data(source):
        samples = known.samples_of_rows(source, 1)
        if samples is not None:
            samples = row_samples.selected_samples(samples, [out[1]])
        facts = known.facts_from_samples(samples, known.key_of_original_index(out[1]), fixed=False)
    known.put(out[0], facts)
    known.put(out[1], facts._replace(origin=None))
    return None


def _cat_or_stack_rule(stacks: bool) -> Rule:
    """Return the rule for `cat` or `stack`.

    The rule is for `stack` if ``stacks`` is True, and otherwise for `cat`. Joining selected rows
    may restore the batch order.
    """

    def rule(known: RowFactsTable, args: Arguments, out: object) -> RowOriginFacts | None:
        parts = [part for part in args[0] if part.numel()] or list(args[0])
        facts = _combined_facts(known, parts, out)
        dim = args[1] if len(args) > 1 else 0
        if (
            facts.kind is not RowOriginKind.CHOSEN
            or not isinstance(out, torch.Tensor)
            or dim % out.dim()
        ):
            return facts
        lead = max(out.dim() - 1, 1) - stacks
        found = [known.samples_of_rows(part, lead) for part in parts]
        samples = [each for each in found if each is not None]
        if len(samples) < len(parts):
            return facts._replace(samples=None)
        joined = torch.stack(samples) if stacks else torch.cat(samples)
        return known.facts_from_samples(joined, facts.origin, fixed=False)

    return rule


def _mul(known: RowFactsTable, args: Arguments, out: object) -> RowOriginFacts | None:
    """Apply the rule for `mul`, the elementwise product.

    The rule combines the row facts of the operands. A `CHOICE` times weights is still a `CHOICE`.
    """
    operands = list(tensors_in(args))
    kinds = [known.facts_of(tensor).kind for tensor in operands]
    if RowOriginKind.CHOICE in kinds and RowOriginKind.CHOSEN not in kinds:
        return RowOriginFacts(RowOriginKind.CHOICE)
    return _combined_facts(known, operands, out)


def _where(known: RowFactsTable, args: Arguments, out: object) -> RowOriginFacts | None:
    """Apply the rule for `where`.

    A condition that selects between constants yields a `CHOICE`.
    """
    condition, *branches = args
    if known.facts_of(condition).kind in ORDERED and known.are_independent_of_input_data(
        *tensors_in(branches)
    ):
        return RowOriginFacts(RowOriginKind.CHOICE)
    return _combined_facts(known, list(tensors_in(args)), out)


def _constant_rule(kind: RowOriginKind) -> Rule:
    """Return a rule whose result is always the same.

    It is the rule for operators that always return rows of the given kind.
    """
    return lambda known, args, out: RowOriginFacts(kind)


_RULES: dict[Any, Rule] = {
    aten.arange: _constant_rule(RowOriginKind.COUNTED),
    aten.eye: _constant_rule(RowOriginKind.IDENTITY),
    **dict.fromkeys(
        (aten.zeros_like, aten.ones_like, aten.empty_like, aten.full_like),
        _constant_rule(RowOriginKind.CONSTANT),
    ),
    **dict.fromkeys(
        (aten.rand_like, aten.randn_like, aten.new_zeros, aten.new_ones),
        _constant_rule(RowOriginKind.CONSTANT),
    ),
    **dict.fromkeys(
        (aten.new_empty, aten.new_full, aten.new_empty_strided),
        _constant_rule(RowOriginKind.CONSTANT),
    ),
    aten.copy_: _copy_into,
    aten.index: _index,
    aten._unsafe_index: _index,
    aten.index_select: _index_select,
    aten.gather: _gather,
    **dict.fromkeys((aten.take, aten.masked_select), _take_or_masked_select),
    aten.embedding: _embedding,
    **dict.fromkeys((aten.index_put, aten.index_put_, aten._index_put_impl_), _index_put),
    **dict.fromkeys((aten.index_add, aten.index_add_), _write_along_rule(True)),
    **dict.fromkeys((aten.index_copy, aten.index_copy_), _write_along_rule(False)),
    **dict.fromkeys((aten.scatter, aten.scatter_), _write_along_rule(False)),
    **dict.fromkeys((aten.scatter_add, aten.scatter_add_), _write_along_rule(True)),
    **dict.fromkeys((aten.scatter_reduce, aten.scatter_reduce_), _write_along_rule(True)),
    **dict.fromkeys((aten.masked_scatter, aten.masked_scatter_), _masked_scatter),
    aten.nonzero: _nonzero,
    aten.cat: _cat_or_stack_rule(stacks=False),
    aten.stack: _cat_or_stack_rule(stacks=True),
    aten.sort: _sort,
    aten.topk: _topk,
    **dict.fromkeys((aten.mul, aten.mul_), _mul),
    aten.where: _where,
    aten._to_copy: _convert_dtype,
    **dict.fromkeys(
        (aten.mm, aten.bmm, aten.matmul, aten.linear, aten._grouped_mm), _rows_from_argument_rule(0)
    ),
    **dict.fromkeys((aten.mv, aten.convolution), _rows_from_argument_rule(0)),
    **dict.fromkeys((aten.addmm, aten.baddbmm, aten.addmv), _rows_from_argument_rule(1)),
    aten._scaled_dot_product_flash_attention_for_cpu: _rows_from_argument_rule(0),
    aten._scaled_dot_product_flash_attention: _rows_from_argument_rule(0),
    aten._scaled_dot_product_efficient_attention: _rows_from_argument_rule(0),
    aten._scaled_dot_product_cudnn_attention: _rows_from_argument_rule(0),
    aten._scaled_dot_product_fused_attention_overrideable: _rows_from_argument_rule(0),
    aten._scaled_dot_product_attention_math: _rows_from_argument_rule(0),
}
