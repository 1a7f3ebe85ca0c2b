"""Leases, which keep adapters on the device, and the queue of threads that wait for a lease.

A thread that requests a lease first reads the adapters that are not in memory. It then waits until
the device has room for all of the requested adapters, and leases them together.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from fastlora.deprecation import RenamedAttribute, renamed_arguments, without_old_names
from fastlora.pool.packed_adapter import PackedAdapter
from fastlora.pool.reader import AdapterReader
from fastlora.pool.records import LoadedAdapter, PoolStats, RegisteredAdapter
from fastlora.pool.scales import DoraScaleUpdater
from fastlora.pool.tiers import StorageTiers, adapter_not_found_error
from fastlora.pool.transfers import BaseTransfersToDevice
from fastlora.validation import AdapterStateError, PoolClosedError, PoolFullError

# Number of prefetch threads. With several, an adapter that is slow to read does not delay others.
_THREADS = 4


class Lease:
    """A lease that keeps a pool's adapters loaded while they are in use.

    A lease can cover any number of adapters. The adapters stay on the device and do not change
    until the lease ends.

    Use the lease as a context manager. Exit the context in the thread, and on the CUDA stream, that
    ran the forward pass.

    Attributes:
        loaded_adapters: The adapters, in the order of the requested names.
        max_rank: Largest rank of the adapters, or 0 if the lease has no adapters.
    """

    @renamed_arguments(residents="loaded_adapters")
    def __init__(
        self, loaded_adapters: tuple[LoadedAdapter, ...], release: Callable[[Lease], None]
    ) -> None:
        self.loaded_adapters = loaded_adapters
        self.max_rank = max((r.max_rank for r in loaded_adapters), default=0)
        self._release = release

    residents = RenamedAttribute("loaded_adapters")

    def __dir__(self) -> list[str]:
        return without_old_names(self, super().__dir__())

    def release(self) -> None:
        """End the lease.

        Later calls do nothing.
        """
        self._release(self)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


@dataclass(eq=False)
class LeaseRequest:
    """A request for a lease on adapters in a pool.

    The request belongs to one thread, which may have to wait until the request is granted.

    Attributes:
        names: Names of the requested adapters, which may repeat.
        owner: Identifier of the thread that makes the request.
        in_memory: Maps the name of each requested adapter that is in memory to its image, as of the
            last lookup.
        read_adapters: Adapters that the thread has read from files. The reference keeps them
            alive until a storage tier stores them.
        counts_in_stats: Whether the pool's statistics include the request.
    """

    names: tuple[str, ...]
    owner: int = field(default_factory=threading.get_ident)
    in_memory: dict[str, PackedAdapter] = field(default_factory=dict)
    read_adapters: list[PackedAdapter] = field(default_factory=list)
    counts_in_stats: bool = True


class LeaseManager:
    """Grants leases on a pool's adapters.

    The manager owns the pool's lock and its queue of requests.

    Args:
        reader: Reads adapters from files, without holding the lock.
        tiers: The storage tiers of the pool, which the lock protects.
        transfers: Copies images to the device and orders the copies with forward passes.
        scales: Computes the scales of DoRA adapters, without holding the lock.

    Attributes:
        changed: Condition variable whose lock is the pool's lock. Threads wait on it for leases to
            end, for room on the device, and for reads to finish. Code that changes the tiers must
            notify all waiting threads.
        held: Maps each thread identifier to the leases that the thread holds.
        queue: Requests that wait for room on the device, in order of arrival.
        closing: Whether the pool rejects new leases and new adapters.
        closed: Whether the pool is closed.
        hits, misses, loads: Counters, as in `PoolStats`.
    """

    def __init__(
        self,
        reader: AdapterReader,
        tiers: StorageTiers,
        transfers: BaseTransfersToDevice,
        scales: DoraScaleUpdater,
    ) -> None:
        self._reader, self._tiers, self._transfers = reader, tiers, transfers
        self._scales = scales
        self.changed = threading.Condition(threading.RLock())
        self.held: dict[int, list[Lease]] = {}
        self.queue: list[LeaseRequest] = []
        self.closing = self.closed = False
        self.hits = self.misses = self.loads = 0
        self._workers: ThreadPoolExecutor | None = None
        self._prefetching: set[int] = set()  # thread ids

    def check_pool_open(self) -> None:
        """Raise `PoolClosedError` if the pool is closed.

        A pool that is closing also counts as closed, because a closing pool accepts no new leases.
        """
        if self.closed:
            raise PoolClosedError("the pool is closed")
        if self.closing:
            raise PoolClosedError("the pool is closing and accepts no new leases")

    def check_registered(self, names: Iterable[str]) -> None:
        """Raise an error unless every name belongs to a registered adapter.

        Raises:
            AdapterNotFoundError: One of the names is not registered.
            PoolClosedError: The pool is closed or closing.
        """
        with self.changed:
            self.check_pool_open()
            known = self._tiers.entries
            lost = next((name for name in names if name not in known), None)
            if lost is None:
                return
            known = dict(known)
        raise adapter_not_found_error(lost, known)  # outside the lock: finding close names is slow

    def reject_new_leases_and_drain(self, wait: float | None) -> None:
        """Reject new leases from now on, and wait until all leases have ended.

        This method raises an error if the leases do not end in time. If ``wait`` is None and a
        lease is held, the method raises an error immediately and does not reject new leases.

        Args:
            wait: Seconds to wait if a lease is held, or None to raise an error instead; see
                `AdapterPool.close`.

        Raises:
            AdapterStateError: Leases are active, or have not ended in time.
        """
        with self.changed:
            held = sum(len(n) for owner, n in self.held.items() if owner not in self._prefetching)
            if wait is None and held:
                raise AdapterStateError(
                    f"the pool has active leases ({held}); release them before calling close(), or "
                    "pass wait= to wait for them"
                )
            self.closing = True
            workers, self._workers = self._workers, None
            self.changed.notify_all()
        if workers is not None:  # without the lock: callbacks of canceled futures run here
            workers.shutdown(wait=False, cancel_futures=True)
        with self.changed:
            # A prefetch thread ends after the adapter that it is reading.
            if not self.changed.wait_for(lambda: not (self.held or self._prefetching), wait):
                held = sum(map(len, self.held.values()))
                raise AdapterStateError(
                    f"after {wait} seconds, the pool is still in use (active leases: {held}; "
                    f"threads currently reading adapters: {len(self._prefetching)}). The pool "
                    "accepts no new leases; call close() again to finish closing it"
                )

    def acquire_all_loaded(self) -> Lease:
        """Return a lease on all adapters that are currently loaded.

        The loaded adapters are those on the device. This method therefore never waits for space on
        the device.
        """
        with self.changed:
            self.check_pool_open()
            self.hits += len(self._tiers.device)
            lease = self._create_lease(tuple(self._tiers.device.values()))
        return self._make_stream_wait_until_ready(lease)

    def acquire(self, request: LeaseRequest, timeout: float | None) -> Lease:
        """Return a lease on the requested adapters.

        This method first waits for room on the device if necessary.

        Args:
            request: The request, with the names of the adapters.
            timeout: Seconds to wait for room, or None for no limit.

        Raises:
            PoolFullError: The adapters can never fit, or the time is up. For other errors, see
                `AdapterPool.lease`.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            while True:
                with self.changed:
                    step = self._wait_for_lease_or_reads(request, deadline)
                if isinstance(step, Lease):
                    return self._make_stream_wait_until_ready(step)
                self._read(step, request)
        finally:
            with self.changed:
                if request in self.queue:
                    self.queue.remove(request)
                    self.changed.notify_all()

    def compute_dora_scales_if_pinned(self, name: str) -> None:
        """Compute an adapter's DoRA scales if the adapter is pinned.

        The adapter has just been loaded. A captured CUDA graph can use a pinned adapter without a
        lease, so its scales must be available. For other DoRA adapters, the first lease computes
        the scales.
        """
        with self.changed:
            entry, loaded = self._tiers.entries.get(name), self._tiers.device.get(name)
            if entry is None or not entry.pinned or loaded is None or not loaded.uses_dora:
                return
            lease = self._create_lease((loaded,))  # it is on the device and needs no more room
        self._make_stream_wait_until_ready(lease).release()

    def recompute_stale_dora_scales_of_pool(self) -> None:
        """Recompute the stale DoRA scales of the pool.

        DoRA scales are stale if the base weights have changed since the scales were computed. Only
        adapters on the device have DoRA scales, whether or not the adapters are leased.

        Missing scales of these adapters are computed too. Adapters that were replaced or removed
        are included while they are leased.
        """
        with self.changed:
            self.check_pool_open()
            lease = self._create_lease(tuple(self._tiers.loaded_adapters))
        self._make_stream_wait_until_ready(lease).release()

    def _create_lease(self, loaded_adapters: tuple[LoadedAdapter, ...]) -> Lease:
        """Create a lease on adapters that are already on the device.

        The calling thread holds the lease.
        """
        for loaded in set(loaded_adapters):
            loaded.leases += 1
        lease = Lease(loaded_adapters, self._release)
        self.held.setdefault(threading.get_ident(), []).append(lease)
        return lease

    def _wait_for_lease_or_reads(
        self, request: LeaseRequest, deadline: float | None
    ) -> Lease | list[RegisteredAdapter]:
        """Wait until a lease is granted or until adapters must be read for the lease.

        The calling thread must read the requested adapters that are not in memory and that no other
        thread is reading. The method returns as soon as there are such adapters.

        Returns:
            The lease if the request was granted. Otherwise the records of the adapters that the
            calling thread must read before it calls this method again.

        Raises:
            PoolFullError: The adapters can never fit, or the deadline has passed.
        """
        tiers = self._tiers
        while True:
            self.check_pool_open()
            missing = self._find_entries_to_read(request)
            mine = [entry for entry in missing if not entry.reading]
            if mine:
                for entry in mine:
                    entry.reading = True
                return mine
            if missing:  # another thread is reading the rest
                self.changed.wait()
                continue
            loaded = all(name in tiers.device for name in request.in_memory)
            if self._may_precede_queue(request) and (
                loaded or tiers.fits_beside_pinned_and_held(request.in_memory, tiers.leased())
            ):
                return self._grant(request)
            left = None if deadline is None else deadline - time.monotonic()
            if not self._can_grant_after_other_leases_end(request) or (
                left is not None and left <= 0
            ):
                nbytes = sum(image.nbytes for image in request.in_memory.values())
                raise PoolFullError(
                    f"a batch needs {len(request.in_memory)} adapters ({nbytes} bytes in total) "
                    "on the device at once, but the pool has no room for them: "
                    f"{tiers.describe_device_tier()}; "
                    "split the batch with AdapterPool.plan, or increase max_adapters or "
                    "device_bytes"
                )
            if request not in self.queue:
                self.queue.append(request)
            self.changed.wait(left)

    def _find_entries_to_read(self, request: LeaseRequest) -> list[RegisteredAdapter]:
        """Find the requested adapters that are not in memory and must be read from files.

        The result is a list of the records of these adapters.
        ``request.in_memory`` is updated: it then contains the images of the requested adapters that
        are in memory.
        """
        entries = {name: self._tiers.entry(name) for name in request.names}
        images = {name: self._tiers.find_packed_adapter_in_any_tier(name) for name in entries}
        request.in_memory = {name: image for name, image in images.items() if image is not None}
        return [entry for name, entry in entries.items() if name not in request.in_memory]

    def _read(self, entries: list[RegisteredAdapter], request: LeaseRequest) -> None:
        found: dict[str, PackedAdapter] = {}
        try:
            for entry in entries:
                if entry.folder is not None:
                    found[entry.name] = self._reader.read_folder(entry.folder)
        finally:
            with self.changed:
                for entry in entries:
                    entry.reading = False
                    image = found.get(entry.name)
                    # If the name has a new adapter by now, the new one is in memory.
                    if image is not None and self._tiers.entries.get(entry.name) is entry:
                        # The request keeps the image alive, and other requests find it in
                        # ``staged``.
                        self._tiers.staged[entry.name] = image
                        request.read_adapters.append(image)
                        self.loads += 1
                self.changed.notify_all()

    def _grant(self, request: LeaseRequest) -> Lease:
        misses = sum(1 for name in request.in_memory if name not in self._tiers.device)
        loaded_adapters = {
            loaded.name: loaded for loaded in self._tiers.bring_to_device(request.in_memory)
        }
        if request.counts_in_stats:
            self.misses += misses
            self.hits += len(loaded_adapters) - misses
        return self._create_lease(tuple(loaded_adapters[name] for name in request.names))

    def _make_stream_wait_until_ready(self, lease: Lease) -> Lease:
        """Make the current stream wait until a lease's adapters are ready to use.

        The adapters are ready when their transfer to the device is complete. For DoRA adapters, the
        stream also waits for the computation of the scales, which this method starts if necessary.

        Returns:
            ``lease``. If this method raises an error, it releases the lease first.
        """
        try:
            loaded_adapters = list(dict.fromkeys(lease.loaded_adapters))
            self._scales.update_stale_dora_scales(loaded_adapters, self.changed)
            events = []
            for loaded in loaded_adapters:
                scales = loaded.scales
                for event in (loaded.written, None if scales is None else scales.written):
                    if event is not None and not self._transfers.is_event_done(event):
                        events.append(event)
                    elif event is not None and event is loaded.written:
                        loaded.written = None  # permanently, because it is copied only once
            self._transfers.make_stream_wait_for_writes(events)
        except BaseException:
            lease.release()
            raise
        return lease

    def _release(self, lease: Lease) -> None:
        event = self._transfers.record_read_event_and_stream_id()
        with self.changed:
            # Any thread may end the lease. On a second call, no thread holds it.
            owner = next((owner for owner, leases in self.held.items() if lease in leases), None)
            if owner is None:
                return
            self.held[owner].remove(lease)
            if not self.held[owner]:
                del self.held[owner]
            for loaded in set(lease.loaded_adapters):
                self._tiers.decrement_leases(loaded, event)
            self.changed.notify_all()

    def _may_precede_queue(self, request: LeaseRequest) -> bool:
        """Return whether a request may be granted ahead of the other requests in the queue.

        Requests are granted in order of arrival, so that small requests cannot delay a large
        request forever. A thread that already holds leases takes precedence, because other threads
        may be waiting for its leases to end. A request without names is always granted.
        """
        first = not self.queue or self.queue[0] is request
        return first or request.owner in self.held or not request.names

    def _can_grant_after_other_leases_end(self, request: LeaseRequest) -> bool:
        """Return whether a request could be granted once other threads end their leases.

        If the result is False, waiting for room is futile. The method implements Dijkstra's
        banker's algorithm. The algorithm assumes that running threads will end their leases, and
        that a waiting thread will end its leases only if its own request can be granted. If two
        threads wait for each other, the result is False for the request that arrived last.
        """
        waiting = [other for other in self.queue if other is not request]
        stuck = {other.owner for other in waiting} | {request.owner}
        held = {owner: leases for owner, leases in self.held.items() if owner in stuck}
        while True:
            remaining = {
                r for leases in held.values() for lease in leases for r in lease.loaded_adapters
            }
            if self._tiers.fits_beside_pinned_and_held(request.in_memory, remaining):
                return True
            served = [
                other
                for other in waiting
                if self._tiers.fits_beside_pinned_and_held(other.in_memory, remaining)
            ]
            if not served:
                return False
            for other in served:
                held.pop(other.owner, None)
                waiting.remove(other)

    # ---------------------------------------------------------------------------- background

    def prefetch(self, names: tuple[str, ...]) -> Future[None]:
        """Start loading adapters in the background before they are used, and return a future.

        A background thread loads the adapters one after another. Each adapter is brought to the
        device if there is currently room for it. Otherwise, it is only read into CPU memory.

        Returns:
            A future that is done when the thread has processed all of the adapters, or when an
            adapter could not be read. In that case, the adapters after it are not loaded.
        """
        with self.changed:
            self.check_pool_open()
            if self._workers is None:
                self._workers = ThreadPoolExecutor(_THREADS, thread_name_prefix="fastlora-prefetch")
            return self._workers.submit(self._prefetch, names)

    def _prefetch(self, names: tuple[str, ...]) -> None:
        owner = threading.get_ident()
        with self.changed:
            self._prefetching.add(owner)
        try:
            for name in names:
                request = LeaseRequest((name,), counts_in_stats=False)
                try:
                    self.acquire(request, 0.0).release()
                except PoolFullError:
                    with self.changed:
                        self._tiers.add_to_cpu_if_registered(name, request.in_memory[name])
        finally:
            with self.changed:
                self._prefetching.remove(owner)
                self.changed.notify_all()

    def stats(self) -> PoolStats:
        """Return the pool's statistics.

        The caller must hold the pool's lock.
        """
        tiers = self._tiers
        return PoolStats(
            registered=len(tiers.entries),
            on_device=len(tiers.device),
            in_cpu=len(tiers.host),
            device_bytes=tiers.device_bytes_used,
            cpu_bytes=tiers.cpu_bytes_used,
            leases=sum(map(len, self.held.values())),
            hits=self.hits,
            misses=self.misses,
            loads=self.loads,
            evictions=tiers.evictions,
        )
