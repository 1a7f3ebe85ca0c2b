"""Implementations compared in one process: step times in turn, and peak memory of a step.

Speed is a median of paired ratios: all sides run one right after the other, the order changes
every round, and each round gives one ratio, so that whatever slows the machine down for a while
slows all; `share_frozen` has two models stand on one copy of the base's weights. Memory is the
peak of live bytes that the allocator hands out within a step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Runs the body with ``count`` intra-op CPU threads, then restores the number before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interleaved_seconds(
    sides: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warmup: int = 0,
    device: torch.device | str = "cpu",
    on_round: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Times functions against each other, one after another in each round.

    Each round starts with another side, and every other one goes backwards.

    On a CPU the clock is the time that this process spent on a core (`time.process_time`, all its
    threads together): other processes don't count, which on a shared machine is the only number
    that repeats. Run it on one thread (`torch_threads`), where it equals the undisturbed wall time.
    On a GPU it is the time between two CUDA events around the call.

    Args:
        sides: By name.
        rounds: How many are timed, at least 1.
        warmup: How many untimed rounds go before.
        device: Where the work runs.
        on_round: Called behind each timed round.

    Returns:
        Seconds of each side in each round; see `median_ratio`.

    Raises:
        ValueError: ``rounds`` is below 1 or ``warmup`` below 0.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds!r}")
    if warmup < 0:
        raise ValueError(f"warmup must be at least 0, got {warmup!r}")
    timed = _cuda_seconds if torch.device(device).type == "cuda" else _cpu_seconds
    names = list(sides)
    for name in names * warmup:
        sides[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        start = index // 2 % len(names)
        order = names[start:] + names[:start]
        for name in reversed(order) if index % 2 else order:
            times[name].append(timed(sides[name]))
        on_round()
    return times


def median_ratio(times: Mapping[str, Sequence[float]], side: str, other: str) -> float:
    """Returns the median over the rounds of one side's time over another's."""
    pairs = zip(times[side], times[other], strict=True)
    return statistics.median(a / b for a, b in pairs)


def share_frozen(source: nn.Module, target: nn.Module) -> None:
    """Puts the memory of ``source``'s frozen parameters under those of ``target``, in their order.

    For two sides that stand on the same base model: where in memory a copy of the weights happens
    to lie is then no advantage of either.

    Raises:
        ValueError: They have not the same frozen parameters; ``target`` is then as it was.
    """
    frozen = [
        [parameter for parameter in side.parameters() if not parameter.requires_grad]
        for side in (source, target)
    ]
    shapes = [[(p.shape, p.dtype, p.device) for p in parameters] for parameters in frozen]
    if shapes[0] != shapes[1] or not all(map(torch.equal, *frozen)):
        raise ValueError("the two models' frozen parameters differ")
    for own, other in zip(*frozen, strict=True):
        other.data = own.data


def peak_step_bytes(fn: Callable[[], object], *, device: torch.device | str = "cpu") -> int:
    """Returns the peak of bytes that one call of ``fn`` holds on top of what was there before.

    Counts the bytes that tensors ask for, not the pages behind them, so the number repeats exactly
    where the resident size of the process does not. On a CPU it is rebuilt from the allocations
    that `torch.profiler` records; memory from before the step that ``fn`` frees makes no room
    there, since the profiler doesn't know its size. On a GPU it is the caching allocator's peak.

    Args:
        fn: One step; call it once before, so that caches and lazily made buffers are not counted.
        device: Where the work runs.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        fn()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        fn()
    live: dict[int, int] = {}
    held = peak = 0
    for pointer, size in _allocations(recorded):
        if size > 0:
            live[pointer] = size
            held += size
            peak = max(peak, held)
        else:
            held -= live.pop(pointer, 0)
    return peak


def _allocations(recorded: profile) -> Iterator[tuple[int, int]]:
    """Yields (address, bytes) in order of time; a negative size is a release."""
    results = getattr(recorded.profiler, "kineto_results", None)
    if results is None:
        raise RuntimeError("torch.profiler recorded nothing; is another profiler running?")
    stack = list(reversed(results.experimental_event_tree()))
    found = []
    while stack:
        event = stack.pop()
        stack.extend(reversed(event.children))
        if event.tag == _EventType.Allocation:
            fields = event.extra_fields
            found.append((event.start_time_ns, fields.ptr, fields.alloc_size))
    for _, pointer, size in sorted(found, key=lambda item: item[0]):
        yield pointer, size


def _cpu_seconds(fn: Callable[[], object]) -> float:
    start = time.process_time()
    fn()
    return time.process_time() - start


def _cuda_seconds(fn: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    fn()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
