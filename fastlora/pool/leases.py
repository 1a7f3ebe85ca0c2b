"""Leases: who keeps which adapters on the device, and who waits for room."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import TracebackType

from fastlora.pool.image import Image
from fastlora.pool.resident import DeviceCopy, Resident


class Lease:
    """Adapters that stay on the device, as they are, until the lease ends.

    A context manager; leave it in the thread, and on the stream, that ran the forward.

    Attributes:
        residents: In the order of the names that were asked for.
        max_rank: The largest rank among them, 0 for none.
    """

    def __init__(
        self,
        residents: tuple[Resident, ...],
        copies: tuple[DeviceCopy, ...],
        release: Callable[[Lease], None],
    ) -> None:
        self.residents = residents
        self.max_rank = max((r.max_rank for r in residents), default=0)
        self.copies = copies
        self._release = release

    def release(self) -> None:
        """Ends the lease; a second call does nothing."""
        self._release(self)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


@dataclass(eq=False)
class Request:
    """A lease that a thread asks for.

    Attributes:
        names: Adapters, each once.
        owner: The thread.
        wanted: Name -> image, as last looked up.
        kept: Images that the thread has read and no tier may hold yet.
        counts: Whether it shows in the statistics.
    """

    names: tuple[str, ...]
    owner: int = field(default_factory=threading.get_ident)
    wanted: dict[str, Image] = field(default_factory=dict)
    kept: list[Image] = field(default_factory=list)
    counts: bool = True


class LeaseBook:
    """Leases by thread, and the queue of threads that wait; guarded by the pool's lock."""

    def __init__(self) -> None:
        self.held: dict[int, list[Lease]] = {}
        self.queue: list[Request] = []

    @property
    def count(self) -> int:
        """How many leases are held."""
        return sum(map(len, self.held.values()))

    def add(self, owner: int, lease: Lease) -> None:
        """Notes a thread's lease."""
        self.held.setdefault(owner, []).append(lease)

    def remove(self, lease: Lease) -> bool:
        """Forgets a lease; returns whether it was known. Any thread may end it."""
        for owner, leases in self.held.items():
            if lease in leases:
                leases.remove(lease)
                if not leases:
                    del self.held[owner]
                return True
        return False

    def may_go(self, request: Request) -> bool:
        """Returns whether it is a request's turn.

        First come, first served, so that a large request is not passed by small ones for ever. A
        thread that holds leases goes first: others wait for it.
        """
        return request.owner in self.held or not self.queue or self.queue[0] is request

    def could_fit(
        self,
        request: Request,
        fits: Callable[[Mapping[str, Image], Collection[DeviceCopy]], bool],
    ) -> bool:
        """Returns whether a request will fit once others have ended their leases.

        Threads that run will; of those that wait, the ones whose own requests can be met. Where
        two wait for each other, the one that comes last is told so here.

        Method: Dijkstra's banker's algorithm.
        """
        waiting = [other for other in self.queue if other is not request]
        stuck = {other.owner for other in waiting} | {request.owner}
        held = {owner: leases for owner, leases in self.held.items() if owner in stuck}
        while True:
            copies = {copy for leases in held.values() for one in leases for copy in one.copies}
            if fits(request.wanted, copies):
                return True
            served = [other for other in waiting if fits(other.wanted, copies)]
            if not served:
                return False
            for other in served:
                held.pop(other.owner, None)
                waiting.remove(other)
