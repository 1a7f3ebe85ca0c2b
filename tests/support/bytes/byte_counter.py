"""Counts what kernels move and multiply, launch by launch, in Triton's interpreter.

``distinct`` bytes are those touched at least once: what must come from memory. ``issued`` bytes are
those of every unmasked lane, repeats included: what the L2 cache must serve. Both are attributed to
the tensor whose range they start in, whatever pointer, table of addresses or view led there.

    with ByteCounter(x=[x], lora_a=[lora_a], s=[s]) as counter:
        launch_lora_shrink(s, x, [lora_a], ...)
    counter.kernels["_lora_shrink_kernel"].loads["x"].distinct
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch

from fastlora.bench.byte_forms import ELSEWHERE, Form
from fastlora.env import triton_interpreted

# Addresses kept as they come before they are sorted: bounds the memory of one launch.
_MAX_PENDING = 1 << 22


class Traffic(NamedTuple):
    """Bytes of one tensor, in one direction."""

    distinct: int
    issued: int

    def plus(self, other: Traffic) -> Traffic:
        """Both together, as the bytes of two launches: each fetches its own."""
        return Traffic(self.distinct + other.distinct, self.issued + other.issued)


@dataclass
class KernelCount:
    """What the launches of one kernel, or of several, did. Tensors without traffic are left out."""

    grids: list[tuple[int, ...]] = field(default_factory=list)
    flops: int = 0
    loads: dict[str, Traffic] = field(default_factory=dict)
    stores: dict[str, Traffic] = field(default_factory=dict)

    @property
    def launches(self) -> int:
        """How often it was launched."""
        return len(self.grids)

    @property
    def distinct(self) -> int:
        """Distinct bytes loaded plus distinct bytes stored."""
        return sum(t.distinct for side in (self.loads, self.stores) for t in side.values())

    @property
    def issued(self) -> int:
        """Bytes of every load and store."""
        return sum(t.issued for side in (self.loads, self.stores) for t in side.values())


class _Range(NamedTuple):
    start: int
    stop: int
    name: str


class _Accesses:
    """Elements loaded, or stored, by one launch: addresses by element size, with their counts."""

    def __init__(self) -> None:
        self._pending: dict[int, list[np.ndarray]] = {}
        self._num_pending = 0
        self._sorted: list[tuple[int, np.ndarray, np.ndarray]] = []

    def add(self, ptrs: Any, mask: np.ndarray | None) -> None:
        """Takes the block behind an interpreter's pointer handle, masked lanes left out."""
        # A bool has one bit and takes a byte.
        width = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        addresses = ptrs.data.ravel()
        if mask is not None:
            addresses = addresses[np.broadcast_to(mask, ptrs.data.shape).ravel().astype(bool)]
        self._pending.setdefault(width, []).append(addresses.astype(np.int64))
        self._num_pending += addresses.size
        if self._num_pending > _MAX_PENDING:
            self.settle()

    def settle(self) -> None:
        """Sorts what is pending, so that equal addresses take one place."""
        for width, blocks in self._pending.items():
            self._sorted.append((width, *np.unique(np.concatenate(blocks), return_counts=True)))
        self._pending, self._num_pending = {}, 0

    def by_tensor(self, ranges: list[_Range]) -> dict[str, Traffic]:
        """Splits the bytes by the range, of those sorted by start, that an element starts in."""
        if not self._sorted:
            return {}
        starts = np.concatenate([addresses for _, addresses, _ in self._sorted])
        widths = np.concatenate([np.full(a.size, width) for width, a, _ in self._sorted])
        issued = np.concatenate([counts for *_, counts in self._sorted]) * widths
        order = np.argsort(starts, kind="stable")
        starts, widths, issued = starts[order], widths[order], issued[order]
        # What an element adds: its bytes past the furthest that an earlier one reached.
        ends = starts + widths
        reached = np.maximum.accumulate(np.concatenate([starts[:1], ends[:-1]]))
        distinct = np.maximum(0, ends - np.maximum(starts, reached))
        names = [ELSEWHERE, *(r.name for r in ranges)]
        index = np.searchsorted(
            np.array([r.start for r in ranges], dtype=np.int64), starts, "right"
        )
        stops = np.array([0, *(r.stop for r in ranges)], dtype=np.int64)
        index[starts >= stops[index]] = 0
        result: dict[str, Traffic] = {}
        for i in np.unique(index):
            here = index == i
            traffic = Traffic(int(distinct[here].sum()), int(issued[here].sum()))
            result[names[i]] = result.get(names[i], Traffic(0, 0)).plus(traffic)
        return result


class _Launch:
    def __init__(self, kernel: str) -> None:
        self.kernel = kernel
        self.grid: tuple[int, ...] = ()
        self.flops = 0
        self.loads, self.stores = _Accesses(), _Accesses()


def check(count: KernelCount, form: Form) -> None:
    """Each tensor's bytes are exactly these, and no other memory is touched."""
    assert count.loads == form.loads
    assert count.stores == form.stores
    assert count.flops == form.flops
    assert (count.distinct, count.issued) == (form.distinct, form.issued)


class ByteCounter:
    """Context manager that counts the launches inside it.

    It hooks the interpreter where all memory operations meet (masked loads and stores, which plain
    and descriptor ones become, and atomics, which count as both) and at `tl.dot`, whose FLOPs are
    ``2 M N K`` of the tile, masked or not. `tl.dot_scaled` is unsupported. What an entered counter
    replaced is put back on exit.

    Args:
        tensors: Name of each range of addresses, and the tensors whose memory it is; the tensors
            stay alive with the counter. More can be added by `register`, before or after.
    """

    def __init__(self, **tensors: Iterable[torch.Tensor]) -> None:
        self._ranges: list[_Range] = []
        self._kept: list[torch.Tensor] = []
        self._launches: list[_Launch] = []
        self._hooks = ExitStack()
        for name, group in tensors.items():
            self.register(name, *group)

    def register(self, name: str, *tensors: torch.Tensor) -> None:
        """Gives the memory from a tensor's first to its last element a name, for each tensor.

        Raises:
            ValueError: A tensor is not on the CPU, or shares addresses with another one.
        """
        added = []
        for tensor in tensors:
            if tensor.device.type != "cpu":
                raise ValueError(f"{name} is on {tensor.device}, expected a CPU tensor")
            if not tensor.numel():
                continue
            last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            start = tensor.data_ptr()
            added.append(_Range(start, start + (last + 1) * tensor.element_size(), name))
        ranges = sorted([*self._ranges, *added])
        for low, high in zip(ranges, ranges[1:], strict=False):
            if high.start < low.stop:
                raise ValueError(f"{low.name} and {high.name} share memory: ranges may not overlap")
        self._ranges = ranges
        self._kept += tensors

    @property
    def kernels(self) -> dict[str, KernelCount]:
        """The count of each kernel, by its name, in the order of their first launches."""
        names = dict.fromkeys(launch.kernel for launch in self._launches)
        return {
            name: self._sum(launch for launch in self._launches if launch.kernel == name)
            for name in names
        }

    @property
    def total(self) -> KernelCount:
        """The count of all launches together; what two of them touch counts twice."""
        return self._sum(self._launches)

    def _sum(self, launches: Iterable[_Launch]) -> KernelCount:
        count = KernelCount()
        for launch in launches:
            count.grids.append(launch.grid)
            count.flops += launch.flops
            for side, accesses in ((count.loads, launch.loads), (count.stores, launch.stores)):
                for name, traffic in accesses.by_tensor(self._ranges).items():
                    side[name] = side.get(name, Traffic(0, 0)).plus(traffic)
        return count

    def __enter__(self) -> ByteCounter:
        if not triton_interpreted():
            raise RuntimeError("ByteCounter counts in Triton's interpreter: set TRITON_INTERPRET=1")
        from triton.runtime import interpreter

        builder = interpreter.interpreter_builder
        with ExitStack() as hooks:
            for name, hook in self._builder_hooks().items():
                inner = getattr(builder, name, None)
                if inner is not None:  # triton 3.6 has no dot_scaled
                    # On the instance: the class, and what another counter put there, stay.
                    hooks.enter_context(mock.patch.object(builder, name, _before(hook, inner)))
            run = _counted_run(self._launches, interpreter.InterpretedFunction.run)
            hooks.enter_context(mock.patch.object(interpreter.InterpretedFunction, "run", run))
            self._hooks.enter_context(hooks.pop_all())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._hooks.close()

    def _builder_hooks(self) -> dict[str, Callable[..., None]]:
        """Returns what to do before each of the builder's methods.

        Arguments past the named ones differ between Triton's versions.
        """

        def grid(x: int, y: int, z: int) -> None:
            self._launches[-1].grid = (x, y, z)

        def load(ptrs: Any, mask: Any, *_: Any, **__: Any) -> None:
            self._launches[-1].loads.add(ptrs, mask.data)

        def store(ptrs: Any, value: Any, mask: Any, *_: Any, **__: Any) -> None:
            self._launches[-1].stores.add(ptrs, mask.data)

        def atomic_rmw(op: Any, ptrs: Any, value: Any, mask: Any, *_: Any, **__: Any) -> None:
            self._launches[-1].loads.add(ptrs, mask.data)
            self._launches[-1].stores.add(ptrs, mask.data)

        def atomic_cas(ptrs: Any, *_: Any, **__: Any) -> None:
            self._launches[-1].loads.add(ptrs, None)
            self._launches[-1].stores.add(ptrs, None)

        def dot(a: Any, b: Any, *_: Any, **__: Any) -> None:
            self._launches[-1].flops += 2 * a.data.size * b.data.shape[-1]

        def dot_scaled(*_: Any, **__: Any) -> None:
            raise NotImplementedError("ByteCounter does not count the FLOPs of tl.dot_scaled")

        return {
            "set_grid_dim": grid,
            "create_masked_load": load,
            "create_masked_store": store,
            "create_atomic_rmw": atomic_rmw,
            "create_atomic_cas": atomic_cas,
            "create_dot": dot,
            "create_dot_scaled": dot_scaled,
        }


def _before(hook: Callable[..., None], inner: Callable[..., Any]) -> Callable[..., Any]:
    def both(*args: Any, **options: Any) -> Any:
        hook(*args, **options)
        return inner(*args, **options)

    return both


def _counted_run(launches: list[_Launch], inner: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `InterpretedFunction.run`, through which every launch goes."""

    def run(self: Any, *args: Any, warmup: bool, **options: Any) -> Any:
        if warmup:
            return inner(self, *args, warmup=warmup, **options)
        launch = _Launch(self.fn.__name__)
        launches.append(launch)
        try:
            return inner(self, *args, warmup=warmup, **options)
        finally:
            launch.loads.settle()
            launch.stores.settle()

    return run
