"""The state of the current thread: its open `fastlora.adapters` blocks."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar

import torch

from fastlora.ops.execution_mode import is_being_compiled
from fastlora.routing.caches import RoutedLayerProtocol
from fastlora.routing.routing import RoutedLayerGroup, Routing


class _AsyncioTaskBlock:
    """An open `fastlora.adapters` block that belongs to an asyncio task.

    The task has entered the block.
    """

    def __init__(self, task: asyncio.Task[object]) -> None:
        self.task = task


class _ThreadRoutings(threading.local):
    """Thread-local storage for the active `Routing` objects.

    The active routings of a thread are those of its open blocks. The storage also maps each group
    of layers to the group's innermost routing, and the routings of blocks that asyncio tasks opened
    to these blocks.
    """

    def __init__(self) -> None:
        self.unchecked = False
        self.open: tuple[Routing, ...] = ()
        self.by_group: dict[RoutedLayerGroup, Routing] = {}
        self.task_blocks: dict[int, _AsyncioTaskBlock] = {}  # by the routing's id
        self.has_task_blocks = False  # Compiled graphs check this again, but not the dict.


_thread = _ThreadRoutings()
# The blocks that this task has opened, or that were open in the task that created it. All tasks of
# an event loop share a thread, but each has its own context.
_own_blocks: ContextVar[tuple[_AsyncioTaskBlock, ...]] = ContextVar("fastlora_blocks", default=())


def active_routings() -> tuple[Routing, ...]:
    """Return the routings that are currently active.

    The result is a tuple with the routings of this thread's open blocks, from outermost to
    innermost. Blocks of other threads are not included.
    """
    return _thread.open


def active_routing(layer: RoutedLayerProtocol) -> Routing | None:
    """Return the active routing of a layer.

    It is the routing of the innermost block that is open for the layer's model, or None if there is
    none.
    """
    by_group = _thread.by_group
    routing = by_group.get(layer.routing_group) if by_group else None
    if _thread.has_task_blocks and routing is not None and not is_being_compiled():
        _raise_if_opened_by_other_asyncio_task(routing)
    return routing


def is_checking_rows() -> bool:
    """Return whether the input rows of layers are currently being checked.

    The result is True if any open block of this thread checks rows. A block that checks rows may
    also track the rows, and row tracking intercepts every operator.
    """
    return any(routing.cache.row_checker is not None for routing in _thread.open)


def is_capturing_cuda_graph(tensor: torch.Tensor) -> bool:
    """Return whether a CUDA graph is being captured on the device of a tensor.

    The result is True if the tensor is on a GPU and the current CUDA stream is being captured.
    """
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _set_active(routings: tuple[Routing, ...]) -> None:
    _thread.open = routings
    _thread.by_group = {routing.group: routing for routing in routings}


def _current_task() -> asyncio.Task[object] | None:
    """Return the asyncio task that is running in this thread, or None."""
    try:
        return asyncio.current_task()
    except RuntimeError:  # No event loop is running.
        return None


def _raise_if_opened_by_other_asyncio_task(routing: Routing) -> None:
    """Raise `RuntimeError` if another asyncio task has entered the routing's ``with`` block.

    Tasks that a task creates inside its block may use the block. A task that has ended leaves its
    blocks to the thread, as an asynchronous fixture does. Compiled code cannot call this function.
    """
    block = _thread.task_blocks.get(id(routing))
    if block is None or block.task.done():
        return
    if _current_task() not in (None, block.task) and block not in _own_blocks.get():
        raise RuntimeError(
            "another asyncio task in this thread opened the adapters() block; do not await inside "
            "a block, or run the tasks in separate threads"
        )


@contextlib.contextmanager
def _record_asyncio_task(routing: Routing) -> Iterator[None]:
    """Context manager that records which asyncio task has entered a routing's ``with`` block.

    The context manager records nothing outside of an asyncio task or in compiled code.
    """
    task = None if is_being_compiled() else _current_task()
    if task is None:
        yield
        return
    block, before = _AsyncioTaskBlock(task), _own_blocks.get()
    _thread.task_blocks[id(routing)], _thread.has_task_blocks = block, True
    _own_blocks.set((*before, block))
    try:
        yield
    finally:
        _thread.task_blocks.pop(id(routing), None)  # missing in a thread other than the task's
        _thread.has_task_blocks = bool(_thread.task_blocks)
        _own_blocks.set(before)


@contextlib.contextmanager
def activate_routing(routing: Routing) -> Iterator[None]:
    """Context manager that activates a `Routing`, so that the model's layers use it.

    The routing is active only in this thread. The routings of other models stay active.

    Raises:
        RuntimeError: Another asyncio task in this thread has an open block, or blocks do not end in
            the reverse order of their beginning. In the second case, the block is closed.
    """
    if _thread.has_task_blocks and not is_being_compiled():
        for other in _thread.open:
            _raise_if_opened_by_other_asyncio_task(other)
    checks = routing.group.row_checks if routing.may_mix else None
    row_checker = routing.cache.row_checker = (
        None
        if checks is None
        else checks.row_checker_unless_all_layers_were_checked(routing.ids.numel())
    )
    routing.group.change_open_blocks(1)
    try:
        with row_checker or contextlib.nullcontext(), _record_asyncio_task(routing):
            _set_active((*_thread.open, routing))
            try:
                yield
            finally:
                innermost = bool(_thread.open) and _thread.open[-1] is routing
                _set_active(tuple(other for other in _thread.open if other is not routing))
                for other in () if innermost else _thread.open:
                    if (
                        other.cache.row_checker is not None
                    ):  # Its dispatch mode ends with this block.
                        other.cache.row_checker.stop_tracking_in_block()
    finally:
        routing.group.discard_unused_results()
        routing.group.change_open_blocks(-1)
    if not innermost:
        raise RuntimeError(
            "adapters() blocks must be exited in the reverse of the order in which they were "
            "entered; run interleaved coroutines in separate threads"
        )


@contextlib.contextmanager
def replace_active_routings(routings: tuple[Routing, ...]) -> Iterator[None]:
    """Context manager that replaces the thread's active routings with ``routings``."""
    before = _thread.open
    _set_active(routings)
    try:
        yield
    finally:
        _set_active(before)


@contextlib.contextmanager
def skip_batch_size_check() -> Iterator[None]:
    """Context manager that skips the check that the batch size matches the number of adapter ids.

    The check is `check_batch_matches_ids`. The check is skipped in this thread only.
    """
    before, _thread.unchecked = _thread.unchecked, True
    try:
        yield
    finally:
        _thread.unchecked = before


def discard_unused_results(group: RoutedLayerGroup) -> None:
    """Discard a group's results that were computed in advance but not used.

    These are results for layers that the model's forward pass did not call. The record of whether
    this forward pass has one id per sample is discarded too. Compiled code discards nothing.
    """
    if is_being_compiled():
        return
    if group.unfinished:
        group.discard_unused_results()
    routing = _thread.by_group.get(group)
    if routing is not None:
        routing.cache.ids_are_per_sample = False


def check_batch_matches_ids(
    group: RoutedLayerGroup,
    args: Sequence[object],
    kwargs: Mapping[str, object],
    *,
    per_sample: bool = False,
) -> None:
    """Raise `ValueError` unless the number of adapter ids matches the model's batch size.

    The batch size is read from the model's arguments. The ids are those of the active routing of
    ``group``. If ``per_sample`` is set, one id per token is an error too, because the model will
    process further tokens later, as in ``generate()``.

    Raises:
        ValueError: The number of ids is neither the number of samples nor the number of tokens, or
            ``per_sample`` is set and the number of ids is not the number of samples.
        RuntimeError: Another asyncio task in this thread opened the block.
    """
    routing = _thread.by_group.get(group)
    if routing is None:
        return
    if _thread.has_task_blocks and not is_being_compiled():
        _raise_if_opened_by_other_asyncio_task(routing)
    if _thread.unchecked:
        return
    named = [kwargs[name] for name in ("input_ids", "inputs_embeds", "inputs") if name in kwargs]
    compiling = is_being_compiled()
    if not compiling and routing.cache.row_checker is not None:
        routing.cache.row_checker.mark_inputs_as_batch_ordered((*args, *kwargs.values()))
    x = next((v for v in (*named, *args, *kwargs.values()) if isinstance(v, torch.Tensor)), None)
    if x is None or not x.dim():
        return
    features = x.shape[-1] if x.dtype.is_floating_point and x.dim() > 1 else 1
    samples, tokens = x.shape[0], x.numel() // max(features, 1)
    count = routing.ids.numel()
    # Dynamo evaluates `in` wrongly for sizes that it does not know.
    if count != samples and count != tokens:
        raise ValueError(
            f"the batch has {samples} samples ({tokens} tokens) and {count} adapter ids; expected "
            "one id per sample or per token"
        )
    if per_sample and count != samples:
        raise ValueError(
            f"the batch has {samples} samples and {count} adapter ids; generate() expects one id "
            "per sample"
        )
    if not compiling:
        routing.cache.ids_are_per_sample = count != tokens
