"""The measurements that speed and memory claims rest on, against steps whose cost is known."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastlora.bench import measure

MIB = 2**20


def _hold(*sizes: int) -> None:
    """Allocates blocks of ``sizes`` bytes and holds all of them at once."""
    blocks = [torch.empty(size, dtype=torch.uint8) for size in sizes]
    del blocks


def test_peak_is_what_is_live_at_once() -> None:
    def step() -> None:
        _hold(3 * MIB, 4 * MIB)  # 7 MiB at once
        _hold(5 * MIB)  # later, alone
        _hold(MIB, MIB)

    assert measure.peak_step_bytes(step) == 7 * MIB


def test_peak_counts_what_stays_allocated() -> None:
    kept: list[torch.Tensor] = []

    def step() -> None:
        kept.append(torch.empty(2 * MIB, dtype=torch.uint8))
        _hold(3 * MIB)

    assert measure.peak_step_bytes(step) == 5 * MIB


def test_memory_from_before_the_step_makes_no_room() -> None:
    # Freed while nobody records, its address stays in the profiler's table with the old size.
    measure.peak_step_bytes(lambda: None)
    kept: list[torch.Tensor] = []
    measure.peak_step_bytes(lambda: kept.append(torch.empty(2 * MIB, dtype=torch.uint8)))
    kept.clear()
    kept.append(torch.empty(4 * MIB, dtype=torch.uint8))

    def step() -> None:
        kept.clear()
        _hold(5 * MIB)

    assert measure.peak_step_bytes(step) == 5 * MIB


def test_peak_sees_the_backward_pass() -> None:
    x = torch.ones(MIB // 4, requires_grad=True)  # 1 MiB

    def step() -> None:
        (x.exp() * 2.0).sum().backward()
        x.grad = None

    # exp's result is saved while its gradient and x's gradient are made: 3 MiB, or 2 where one of
    # them is reused; the forward alone holds 2 and the gradient alone would be 1.
    forward_only = measure.peak_step_bytes(lambda: x.exp())
    assert forward_only == MIB
    assert measure.peak_step_bytes(step) >= 2 * MIB
    assert x.grad is None


def _burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_frozen_parameters_are_shared() -> None:
    """The second model computes from the first one's memory; what trains stays its own."""
    source, target = (
        torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2)) for _ in "ab"
    )
    target.load_state_dict(source.state_dict())
    for model in (source, target):
        model[0].requires_grad_(False)
    measure.share_frozen(source, target)
    assert target[0].weight.data_ptr() == source[0].weight.data_ptr()
    assert target[1].weight.data_ptr() != source[1].weight.data_ptr()
    with torch.no_grad():
        source[0].bias += 1.0
    assert torch.equal(target[0].bias, source[0].bias)


@pytest.mark.parametrize("what", ["values", "count", "dtype"])
def test_other_frozen_parameters_are_not_shared(what: str) -> None:
    """Models that differ raise, and stay as they were."""
    source, target = (torch.nn.Linear(3, 2).requires_grad_(False) for _ in "ab")
    if what != "values":
        target.load_state_dict(source.state_dict())
    if what == "count":
        target.bias.requires_grad_(True)
    if what == "dtype":
        target.to(torch.float64)
    before = target.weight.data_ptr()
    with pytest.raises(ValueError, match="differ"):
        measure.share_frozen(source, target)
    assert target.weight.data_ptr() == before


def _timed(a: Callable[[], object], b: Callable[[], object], rounds: int, **options: Any) -> Any:
    times = measure.interleaved_seconds({"a": a, "b": b}, rounds, **options)
    return measure.median_ratio(times, "a", "b"), times["a"], times["b"]


def test_the_ratio_is_that_of_the_work() -> None:
    ratio, times_a, times_b = _timed(lambda: _burn(0.03), lambda: _burn(0.01), 5)
    assert len(times_a) == len(times_b) == 5
    assert ratio == pytest.approx(3.0, rel=0.15)
    assert min(times_a) >= 0.03
    assert min(times_b) >= 0.01


def test_time_spent_waiting_does_not_count() -> None:
    ratio, *_ = _timed(lambda: (_burn(0.01), time.sleep(0.05)), lambda: _burn(0.01), 3)
    assert ratio == pytest.approx(1.0, rel=0.3)


def test_sides_take_turns_and_warm_up_is_not_timed() -> None:
    calls: list[str] = []
    sides = {name: functools.partial(calls.append, name) for name in "abc"}
    times = measure.interleaved_seconds(sides, 4, warmup=2, on_round=lambda: calls.append(" "))
    assert "".join(calls) == "abcabc" + "abc cba bca acb "
    assert all(len(seconds) == 4 for seconds in times.values())
    del sides["c"]
    calls.clear()
    measure.interleaved_seconds(sides, 4)
    assert "".join(calls) == "ab" + "ba" + "ba" + "ab"


def test_the_ratio_is_the_median_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    # Round 2 has a side that is 100 times slower than in the others: the median doesn't see it.
    clock = iter([2.0, 1.0, 1.0, 300.0, 2.0, 4.0])
    monkeypatch.setattr(measure, "_cpu_seconds", lambda fn: next(clock))
    assert _timed(lambda: None, lambda: None, 3) == (2.0, [2.0, 300.0, 4.0], [1.0, 1.0, 2.0])


@pytest.mark.parametrize(("kwargs", "value"), [({"rounds": 0}, "0"), ({"warmup": -1}, "-1")])
def test_bad_counts_are_rejected(kwargs: dict[str, int], value: str) -> None:
    with pytest.raises(ValueError, match=f"at least [01], got {value}"):
        _timed(lambda: None, lambda: None, **{"rounds": 1, **kwargs})


def test_threads_are_restored_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="inside"), measure.torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise RuntimeError("inside")
    assert torch.get_num_threads() == before
