"""Compares implementations in one process: interleaved timing, and the peak memory of a step.

Speed is a median of paired ratios. In each round, all sides run one after the other, in changing
order, and each round gives one ratio. A temporary slowdown of the machine therefore affects all
sides. `share_frozen` puts two models on one copy of the base weights. Memory is the peak of live
bytes that the allocator hands out within a step.
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
    """Run the body with ``count`` intra-op CPU threads, then restore the previous number."""
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
    """Time functions against each other, one after another in each round.

    The first function changes from round to round, and every other round runs in reverse order.

    On a CPU, the clock is the time that all threads of this process spent on a core
    (`time.process_time`). Other processes do not count, so it is the only repeatable time on a
    shared machine. Use one thread (`torch_threads`), with which it equals the undisturbed wall
    time. On a GPU, the clock is the time between two CUDA events around the call.

    Args:
        sides: The functions by name.
        rounds: Number of timed rounds, at least 1.
        warmup: Number of untimed rounds before the timed ones.
        device: Device on which the work runs.
        on_round: Called after each timed round.

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
    """Return the median over all rounds of one side's time divided by another side's."""
    pairs = zip(times[side], times[other], strict=True)
    return statistics.median(a / b for a, b in pairs)


def share_frozen(source: nn.Module, target: nn.Module) -> None:
    """Make ``target``'s frozen parameters share the memory of ``source``'s, in order.

    With two sides on the same base model, neither has an advantage from the place of its weights in
    memory.

    Raises:
        ValueError: The frozen parameters of the models differ. ``target`` is unchanged in this
            case.
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
    """Return the peak number of bytes that one call of ``fn`` adds to the memory in use.

    The function counts the bytes that tensors request, not the pages behind them. The result
    therefore repeats exactly, unlike the resident size of the process. On a CPU, it is
    reconstructed from the allocations that `torch.profiler` records. If ``fn`` frees memory that
    was allocated before the step, this does not lower the count, because the profiler does not know
    the size. On a GPU, the result is the peak of the caching allocator.

    Args:
        fn: One step. Call it once beforehand, so that caches and lazily created buffers are not
            counted.
        device: Device on which the work runs.
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
    """Yield (address, bytes) in order of time. A negative size is a release."""
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
