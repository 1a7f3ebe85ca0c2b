"""Checks that every layer gets all rows of a mixed batch, in the same order as in the batch.

A mixed batch gives a layer's rows to adapters by their position. That is wrong for an expert of a
mixture, for any other layer with rows that the data chose, and for a layer over a table that all
samples share. Therefore the rows of the first mixed batch in which a layer runs are tracked
(`fastlora.routing.row_tracking`): if they do not reach the layer in order, the layer raises
before it computes. Rows of later batches are not tracked for this layer.

A mask can happen to select equally many rows of each sample, in order. A layer that looks like an
expert raises in this case too. Any other layer, such as a head on the last token of each sample,
runs, and its rows are tracked in the first 8 mixed batches.

Training and evaluation are checked separately. Rows cannot be tracked in compiled code: a layer
that looks like an expert raises there until a batch without compilation has shown that the layer
gets all rows.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Collection, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from fastlora.routing.row_facts import RowOriginKind
from fastlora.routing.row_tracking import RowOriginTracker
from fastlora.user_warnings import warn
from fastlora.validation import UnsupportedLayerError

if TYPE_CHECKING:
    from fastlora.routing.caches import RoutedLayerProtocol

# After this number of tracked blocks, layers that have not run, such as those in an unused part of
# the model, no longer cause blocks to be tracked. Tracking costs 8 us per operator.
_MOST_BLOCKS = 8


# Reasons why a layer raises, to be inserted after its name.
_SELECTED = (
    "gets rows that the model selected with a mask or an index, as for an expert in a mixture of "
    "experts: the position of a row does not tell which adapter it belongs to"
)
_LONE_TABLE = (
    "gets values computed from the model's parameters alone, such as a table of relative "
    "positions: all samples share them, so no single adapter of the batch applies"
)
_SEQUENCE_FIRST = (
    "is inside a {}, which puts the sequence dimension before the samples: the position of a row "
    "does not tell which adapter it belongs to"
)
# Modules of transformers that compute in the layout [T, B, K].
_SEQUENCE_FIRST_MODULES = {
    "XLNetModel",
    "FSMTModel",
    "LongformerSelfAttention",
    "LEDEncoderSelfAttention",
}


class ModelRowOrderChecks:
    """Checks that a model passes the rows of a batch to its layers in batch order.

    Each layer that runs in mixed batches must get all rows of a batch. The object also keeps the
    results of earlier checks.

    Args:
        root: The model.
        layers: The layers that run in mixed batches, with their names in the model.
    """

    def __init__(self, root: nn.Module, layers: Iterable[tuple[str, RoutedLayerProtocol]]) -> None:
        layers = list(layers)
        experts = _ExpertLayerDetector()
        self._first = layers[0][1] if layers else None
        self._names = {layer.routing_index: name for name, layer in layers}
        # By mode (training or not): the layers that got all rows in a tracked block, and the
        # number of tracked blocks.
        self._shown: dict[bool, set[int]] = {False: set(), True: set()}
        self._blocks = {False: 0, True: 0}
        # Layers that raise, with the reason.
        self._unsupported: dict[int, str] = {}
        self._root = weakref.ref(root)
        for name, layer in layers:
            parent = _outermost_sequence_first_class_name(root, name)
            if parent is not None:
                self._unsupported[layer.routing_index] = _SEQUENCE_FIRST.format(parent)
            layer.may_see_partial_rows = parent is not None or experts.looks_like_expert(
                root, name, layer
            )

    def row_checker_unless_all_layers_were_checked(self, num_ids: int) -> RowOrderChecker | None:
        """Return a row-order checker for a batch, or None if all layers have been checked.

        The checker is a context manager for the block of the batch. A layer has been checked if it
        has been shown to get all rows in the model's current mode (training or evaluation), or if
        it is known to be unsupported.

        Args:
            num_ids: Number of adapter ids of the block.
        """
        if self._first is None:
            return None
        mode = bool(self._first.training)
        if len(self._shown[mode] | self._unsupported.keys()) == len(self._names):
            return None
        root = self._root()
        if root is None or self._blocks[mode] >= _MOST_BLOCKS:
            return RowOrderChecker(self, mode, None)
        return RowOrderChecker(self, mode, RowOriginTracker(num_ids, root.buffers()))

    def name_of(self, layer: RoutedLayerProtocol) -> str:
        """Return the name of a layer in the model."""
        return self._names.get(layer.routing_index, type(layer).__name__)

    def mixed_batches_unsupported_reason(self, layer: RoutedLayerProtocol) -> str | None:
        """Return the reason why a layer does not support mixed batches, or None.

        For example, the rows of the layer's input might not be in batch order. The result is None
        if no reason is known.
        """
        return self._unsupported.get(layer.routing_index)

    def record_tracked_block(
        self,
        training: bool,
        ran: Iterable[RoutedLayerProtocol],
        track_again: Collection[int] = (),
    ) -> None:
        """Record which layers ran in a block with row tracking.

        The layers in ``ran`` received all rows of the batch.

        Args:
            training: Whether the model is in training mode.
            ran: The layers that ran in the block.
            track_again: Numbers of the layers whose rows were selected by the data and were
                in order in this block. Their rows are tracked again in the next blocks, up to the
                limit of 8 blocks.
        """
        self._blocks[training] += 1
        for layer in ran:
            if layer.routing_index in track_again and self._blocks[training] < _MOST_BLOCKS:
                continue
            if layer.routing_index not in self._unsupported:
                self._shown[bool(layer.training)].add(layer.routing_index)
                layer.may_see_partial_rows = False

    def raise_now_and_at_later_checks(self, layer: RoutedLayerProtocol, reason: str) -> None:
        """Raise an error for a layer now, and have later checks of the layer raise it again.

        Even if the caller catches the first error, the layer raises an error in all later mixed
        batches, including in compiled code. The error message contains ``reason``, which says why
        the layer's rows cannot be assigned to adapters.

        Raises:
            UnsupportedLayerError: Always.
        """
        layer.may_see_partial_rows = True
        self._unsupported[layer.routing_index] = reason
        raise_partial_batch(layer)

    def resume_tracking_for_late_layer(self, layer: RoutedLayerProtocol) -> bool:
        """Resume row tracking in the next block if a layer runs for the first time only now.

        Rows are not tracked after the limit of 8 tracked blocks, so the rows of such a layer cannot
        be checked in the current block. Returns False, without resuming, if the limit has not been
        reached or if the layer has been shown to get all rows.
        """
        mode = bool(layer.training)
        if layer.routing_index in self._shown[mode] or self._blocks[mode] < _MOST_BLOCKS:
            return False
        self._blocks[mode] = 0
        return True


class RowOrderChecker:
    """Checks that a model keeps the rows of a batch in order.

    Each layer must get all rows of the batch, in batch order. The checker is a context manager that
    checks the inputs of the layers that run in its ``with`` block.

    Args:
        checks: The model's checks.
        mode: Whether the model is in training mode.
        order: Tracks the rows. If it is None, the block only warns about a layer that has not been
            checked, and the next block tracks its rows.
    """

    def __init__(
        self, checks: ModelRowOrderChecks, mode: bool, order: RowOriginTracker | None
    ) -> None:
        self._checks, self._mode = checks, mode
        self.order = order
        self._ran: dict[int, RoutedLayerProtocol] = {}
        self._even: set[int] = set()

    def __enter__(self) -> RowOrderChecker:
        if self.order is not None:
            self.order.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.order is not None:
            self.order.__exit__(kind, error, trace)
            if kind is None:
                self._checks.record_tracked_block(self._mode, self._ran.values(), self._even)

    def mark_inputs_as_batch_ordered(self, inputs: Iterable[object]) -> None:
        """Mark the inputs of a model as being in batch order.

        The rows of the input tensors are in the same order as in the batch.
        """
        if self.order is not None:
            self.order.record_in_batch_order(inputs)

    def stop_tracking_in_block(self) -> None:
        """Stop tracking the rows of tensors.

        In the rest of this block, the inputs of layers are not checked against the tracked rows.
        The record of the layers that ran is discarded.
        """
        self._ran.clear()
        if self.order is not None:
            self.order.invalidate_all_facts()

    def check_gets_all_rows_in_order(self, layer: RoutedLayerProtocol, x: torch.Tensor) -> None:
        """Raise `UnsupportedLayerError` unless a layer's input contains all rows in batch order."""
        if self._checks.mixed_batches_unsupported_reason(layer) is not None:
            raise_partial_batch(layer)
        if self.order is not None and self.order.has_valid_facts:
            kind = self.order.row_origin_kind(x)
            # For an expert, a selection that fits this batch is a coincidence.
            if kind is RowOriginKind.CHOSEN or (
                kind is RowOriginKind.EVEN and layer.may_see_partial_rows
            ):
                self._checks.raise_now_and_at_later_checks(layer, _SELECTED)
            if self.order.is_shared_table(x):
                self._checks.raise_now_and_at_later_checks(layer, _LONE_TABLE)
            if kind is RowOriginKind.EVEN:
                self._even.add(layer.routing_index)
            self._ran[layer.routing_index] = layer
        # A checkpoint may run the layer again in another thread.
        elif layer.routing_index not in self._ran:
            is_late = self._checks.resume_tracking_for_late_layer(layer)
            if layer.may_see_partial_rows:
                raise_partial_batch(layer)
            if is_late:
                warn(
                    f"layer {self._checks.name_of(layer)!r} runs in a mixed batch for the first "
                    f"time, after {_MOST_BLOCKS} mixed batches without it. From the next mixed "
                    "batch on, fastlora checks whether the layer gets every row of the batch in "
                    "order"
                )


def raise_partial_batch(layer: RoutedLayerProtocol) -> None:
    """Raise `UnsupportedLayerError` for a layer that receives only some of the rows of a batch.

    The layer may also be one that might receive only some rows.

    Raises:
        UnsupportedLayerError: Always.
    """
    checks: ModelRowOrderChecks = layer.routing_group.row_checks
    name = checks.name_of(layer)
    advice = (
        "remove it from target_modules, or use one adapter at a time: activate it with "
        "set_adapter() and do not use fastlora.adapters or adapter_names; with an AdapterPool, run "
        "one sample per block"
    )
    reason = checks.mixed_batches_unsupported_reason(layer)
    if reason is not None:
        raise UnsupportedLayerError(f"layer {name!r} {reason}; {advice}")
    raise UnsupportedLayerError(
        f"layer {name!r} looks like an expert in a mixture of experts, and may receive only some "
        "rows of a batch. Run one mixed batch without torch.compile, so that fastlora can check "
        f"whether the layer receives all rows. If the layer does not receive all rows, {advice}"
    )


# --------------------------------------------------------------------------------------- structure


def _outermost_sequence_first_class_name(root: nn.Module, name: str) -> str | None:
    """Return the class name of the outermost sequence-first module that contains a layer.

    A sequence-first module computes in the layout ``[T, B, K]``. Returns None if no such module
    contains the layer. ``name`` is the name of the layer in ``root``.
    """
    module: nn.Module | None = root
    for part in name.split("."):
        if module is None:
            break
        if type(module).__name__ in _SEQUENCE_FIRST_MODULES:
            return type(module).__name__
        module = module._modules.get(part)
    return None


_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


class _ExpertModuleEvidence(NamedTuple):
    """Evidence for or against a module being an expert in a mixture of experts.

    An expert receives only the rows that a router selects for it. The order of these rows may
    differ from that of the batch. The evidence comes from the structure and the names of the
    model's modules.

    Attributes:
        alike: Number of children of the parent module that have the same structure as this module,
            including the module itself.
        is_named: Whether a module name or a class name contains "expert".
        beside: Shapes of the parameters next to this module and its parent. The weight of a router
            would be one of these parameters.
    """

    alike: int
    is_named: bool
    beside: set[tuple[int, ...]]


class _ExpertLayerDetector:
    """Detects layers that belong to the experts of a mixture of experts.

    Such a layer is an expert or a part of an expert. It may receive only some rows of a batch, and
    the order of these rows may differ from that of the batch. The detector compares the structure
    and the names of the model's modules, so the model does not need to run (see
    `looks_like_expert`). The detector looks for modules with the same structure, and caches the
    results.
    """

    def __init__(self) -> None:
        self._known: dict[int, int] = {}
        self._numbers: dict[Any, int] = {}
        self._counts: dict[int, dict[str, int]] = {}
        self._shapes: dict[int, set[tuple[int, ...]]] = {}
        self._evidence: dict[tuple[str, bool], _ExpertModuleEvidence] = {}

    def looks_like_expert(self, root: nn.Module, name: str, layer: RoutedLayerProtocol) -> bool:
        """Return whether a layer appears to be an expert in a mixture of experts.

        A part of an expert counts as an expert. The result is True if the layer is in one of
        several modules of the same structure, and either a name says that they are experts or a
        router is next to them. A router is a matrix with one row per module and one column per
        input feature.
        """
        width = getattr(layer, "in_features", 0)
        modules, names, at = [root], [""], ""
        for part in name.split("."):
            child = modules[-1]._modules.get(part)
            if child is None:
                break
            modules.append(child)
            names.append(part)
            at = f"{at}.{part}"
            key = at, child is layer
            evidence = self._evidence.get(key)
            if evidence is None:
                evidence = self._evidence[key] = self._evidence_that_last_module_is_expert(
                    modules, names, child is layer
                )
            if evidence.alike > 1 and (
                evidence.is_named or (evidence.alike, width) in evidence.beside
            ):
                return True
        return False

    def _evidence_that_last_module_is_expert(
        self, path_modules: list[nn.Module], path_names: list[str], ends_at_layer: bool
    ) -> _ExpertModuleEvidence:
        """Return the evidence for or against the last module in a path being an expert.

        Args:
            path_modules: The path, starting at the model.
            path_names: The name of each module on the path.
            ends_at_layer: Whether the path ends at a layer.
        """
        parent, child = path_modules[-2:]
        alike = self._same_structure_counts_by_child(parent)[path_names[-1]]
        if alike == 1:
            return _ExpertModuleEvidence(alike, False, set())
        words = [path_names[-1], _class_name(child)]
        if not ends_at_layer or isinstance(parent, _LISTS):
            words += [path_names[-2], _class_name(parent)]
        beside = set[tuple[int, ...]]().union(*map(self._parameter_shapes, path_modules[-3:-1]))
        return _ExpertModuleEvidence(alike, "expert" in " ".join(words).lower(), beside)

    def _same_structure_counts_by_child(self, parent: nn.Module) -> dict[str, int]:
        """For each child of a module, count the children that have the same structure.

        The child itself is counted too. The result is a dict that maps the names of the children of
        ``parent`` to the counts.
        """
        known = self._counts.get(id(parent))
        if known is None:
            numbers: dict[str, int] = {}
            for name, child in parent._modules.items():
                if child is not None:
                    numbers[name] = self._structure_id_without_adapters(child)
            counts = Counter(numbers.values())
            known = {name: counts[number] for name, number in numbers.items()}
            self._counts[id(parent)] = known
        return known

    def _structure_id_without_adapters(self, module: nn.Module) -> int:
        """Return an id that identifies the structure of a module, ignoring its adapters.

        The id is the same for all modules with the same structure, even if their adapters differ.
        Two modules have the same structure if they have the same class, parameters of the same
        names and shapes, and children of the same names and structures.
        """
        known = self._known.get(id(module))
        if known is None:
            base = _base_layer_of(module)
            kind = nn.Linear if base is module and hasattr(module, "lora_A") else type(base)
            structure: list[object] = [kind]
            for name, parameter in base._parameters.items():
                if parameter is not None:
                    structure.append((name, tuple(parameter.shape)))
            for name, child in base._modules.items():
                if child is not None and not name.startswith("lora_"):
                    structure.append((name, self._structure_id_without_adapters(child)))
            known = self._numbers.setdefault(tuple(structure), len(self._numbers))
            self._known[id(module)] = known
        return known

    def _parameter_shapes(self, module: nn.Module) -> set[tuple[int, ...]]:
        """Return the shapes of a module's parameters, including the parameters of its children.

        The result is a set of shapes. Adapters are excluded.
        """
        known = self._shapes.get(id(module))
        if known is None:
            known = self._shapes[id(module)] = set()
            for part in (module, *module._modules.values()):
                parameters = () if part is None else _base_layer_of(part)._parameters.values()
                for parameter in parameters:
                    if parameter is not None:
                        known.add(tuple(parameter.shape))
        return known


def _base_layer_of(module: nn.Module) -> nn.Module:
    """Return the base layer of a module.

    If the module has no adapters, the module itself is returned.
    """
    find: Any = getattr(module, "get_base_layer", None)
    return module if find is None else find()


def _class_name(module: nn.Module) -> str:
    return type(_base_layer_of(module)).__name__
