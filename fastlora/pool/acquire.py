"""How a thread gets its lease: what is missing is read, room is waited for, then all is granted."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from weakref import ref

from fastlora.pool.entries import Entry, unknown
from fastlora.pool.image import Image
from fastlora.pool.leases import Lease, LeaseBook, Request
from fastlora.pool.reader import AdapterReader
from fastlora.pool.resident import DeviceCopy
from fastlora.pool.scales import ScaleMaker
from fastlora.pool.stats import PoolStats
from fastlora.pool.tiers import Tiers
from fastlora.pool.transfers import Transfers
from fastlora.validation import AdapterStateError, PoolFullError


class Residency:
    """The tiers' lock, and what happens under it and around it on the way to a lease.

    Args:
        reader: Reads adapters, outside the lock.
        tiers: Guarded by the lock.
        transfers: Orders the device's work.
        scales: Makes those of DoRA adapters, outside the lock.

    Attributes:
        changed: The lock, and the condition that leases have ended, room has come or reads are
            done. Whoever changes the tiers notifies all.
        book: Leases and who waits for one.
        closed: The pool is.
        hits, misses, loads: See `PoolStats`.
    """

    def __init__(
        self, reader: AdapterReader, tiers: Tiers, transfers: Transfers, scales: ScaleMaker
    ) -> None:
        self._reader, self._tiers, self._transfers = reader, tiers, transfers
        self._scales = scales
        self.changed = threading.Condition(threading.RLock())
        self.book = LeaseBook()
        self.closed = False
        self.hits = self.misses = self.loads = 0
        self._worker: ThreadPoolExecutor | None = None
        self._worker_thread: int | None = None

    def check_open(self) -> None:
        """Raises `AdapterStateError` once the pool is closed."""
        if self.closed:
            raise AdapterStateError("the pool is closed")

    def check_known(self, names: Iterable[str]) -> None:
        """Raises `AdapterNotFoundError` unless all names are, `AdapterStateError` once closed."""
        with self.changed:
            self.check_open()
            known = self._tiers.entries
            lost = next((name for name in names if name not in known), None)
            if lost is None:
                return
            known = dict(known)
        raise unknown(lost, known)  # looking for close names takes its time

    def check_unleased(self) -> None:
        """Raises `AdapterStateError` while leases are held, but for those of the background."""
        held = sum(len(n) for owner, n in self.book.held.items() if owner != self._worker_thread)
        if held:
            raise AdapterStateError(f"{held} leases are held; end them before close()")

    def acquire_resident(self) -> Lease:
        """Leases what is on the device now, which takes no room."""
        with self.changed:
            self.check_open()
            request = Request(tuple(self._tiers.device))
            self._look_up(request)
            lease = self._grant(request)
        return self._ready(lease)

    def acquire_named(self, names: Sequence[str], timeout: float | None) -> Lease:
        """`acquire` of names that may repeat, with a resident for each."""
        lease = self.acquire(Request(tuple(dict.fromkeys(names))), timeout)
        if len(lease.residents) != len(names):
            by_name = {resident.name: resident for resident in lease.residents}
            lease.residents = tuple(by_name[name] for name in names)
        return lease

    def acquire(self, request: Request, timeout: float | None) -> Lease:
        """Waits for a lease; see `AdapterPool.lease`.

        Args:
            request: Names that are registered.
            timeout: Seconds to wait for room, or None for as long as it takes.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            while True:
                with self.changed:
                    step = self._step(request, deadline)
                if isinstance(step, Lease):
                    return self._ready(step)
                self._read(step, request)
        finally:
            with self.changed:
                if request in self.book.queue:
                    self.book.queue.remove(request)
                    self.changed.notify_all()

    def settle(self, name: str) -> None:
        """Makes the scales of a new adapter that is pinned, which may not be leased again."""
        with self.changed:
            entry = self._tiers.entries.get(name)
            copy = None if entry is None or not entry.pinned else entry.copy
            if copy is None or not copy.resident.uses_dora:
                return
            lease = self._hold((copy,))  # it is there: nobody's room is waited for
        self._ready(lease).release()

    def remake_scales(self) -> None:
        """Makes scales anew of all that is on the device, replaced adapters in use included."""
        with self.changed:
            self.check_open()
            current = [entry.copy for entry in self._tiers.device.values()]
            copies = [copy for copy in (*current, *self._tiers.retired) if copy is not None]
            lease = self._hold(tuple(copies))
        self._ready(lease).release()

    def _hold(self, copies: tuple[DeviceCopy, ...]) -> Lease:
        """Leases copies that are on the device, for the calling thread."""
        for copy in copies:
            copy.leases += 1
        lease = Lease(tuple(copy.resident for copy in copies), copies, self._release)
        self.book.add(threading.get_ident(), lease)
        return lease

    def _step(self, request: Request, deadline: float | None) -> Lease | list[Entry]:
        """Waits until a request is granted, or adapters must be read for it, which it returns."""
        while True:
            self.check_open()
            missing = self._look_up(request)
            mine = [entry for entry in missing if not entry.reading]
            if mine:
                for entry in mine:
                    entry.reading = True
                return mine
            if missing:  # another thread is reading the rest
                self.changed.wait()
                continue
            tiers, book = self._tiers, self.book
            resident = all(name in tiers.device for name in request.names)
            my_turn = book.may_go(request) or not request.names
            if my_turn and (resident or tiers.fits(request.wanted, tiers.leased())):
                return self._grant(request)
            left = None if deadline is None else deadline - time.monotonic()
            if not book.could_fit(request, tiers.fits) or (left is not None and left <= 0):
                raise self._full(request)
            if request not in book.queue:
                book.queue.append(request)
            self.changed.wait(left)

    def _look_up(self, request: Request) -> list[Entry]:
        """Notes where a request's adapters are; returns those that are in no memory."""
        missing = []
        request.wanted = {}
        for name in request.names:
            entry = self._tiers.entry(name)
            image = entry.image()
            if image is None:
                missing.append(entry)
            else:
                request.wanted[name] = image
        return missing

    def _read(self, entries: list[Entry], request: Request) -> None:
        found: dict[str, tuple[int, Image]] = {}
        try:
            for entry in entries:
                generation, folder = entry.generation, entry.folder
                if folder is not None:  # else it was replaced meanwhile, and is in memory
                    found[entry.name] = generation, self._reader.read_folder(folder)
        finally:
            with self.changed:
                for entry in entries:
                    entry.reading = False
                    generation, image = found.get(entry.name, (-1, None))
                    if image is not None and entry.generation == generation:
                        # The request keeps it alive; others that want it find it here.
                        entry.staged = ref(image)
                        request.kept.append(image)
                        self.loads += 1
                self.changed.notify_all()

    def _grant(self, request: Request) -> Lease:
        tiers = self._tiers
        misses = sum(1 for name in request.names if name not in tiers.device)
        copies = tuple(tiers.bring(request.wanted))
        if request.counts:
            self.misses += misses
            self.hits += len(copies) - misses
        return self._hold(copies)

    def _ready(self, lease: Lease) -> Lease:
        """Lets the calling thread's work on the device come after the copies of its adapters."""
        try:
            self._scales.prepare(lease.copies, self.changed)
            marks = []
            for copy in lease.copies:
                scales = copy.resident.scales
                for mark in (copy.written, None if scales is None else scales.written):
                    if mark is not None and not self._transfers.is_done(mark):
                        marks.append(mark)
                    elif mark is not None and mark is copy.written:
                        copy.written = None  # for good: it was copied once
            self._transfers.wait_for_writes(marks)
        except BaseException:
            lease.release()
            raise
        return lease

    def _release(self, lease: Lease) -> None:
        mark = self._transfers.read()
        with self.changed:
            if self.book.remove(lease):
                for copy in lease.copies:
                    self._tiers.release(copy, mark)
                self.changed.notify_all()

    def _full(self, request: Request) -> PoolFullError:
        nbytes = sum(image.nbytes for image in request.wanted.values())
        return PoolFullError(
            f"a batch needs {len(request.names)} adapters of {nbytes} bytes on the device at once, "
            f"and the pool has no room for them: {self._tiers.describe()}"
        )

    # ---------------------------------------------------------------------------- background

    def prefetch(self, names: tuple[str, ...]) -> Future[None]:
        """Brings adapters to the device in a thread of its own, as far as there is room now."""
        with self.changed:
            self.check_open()
            if self._worker is None:
                self._worker = ThreadPoolExecutor(1, thread_name_prefix="fastlora-prefetch")
            return self._worker.submit(self._prefetch, names)

    def _prefetch(self, names: tuple[str, ...]) -> None:
        self._worker_thread = threading.get_ident()
        for name in names:
            request = Request((name,), counts=False)
            try:
                self.acquire(request, 0.0).release()
            except PoolFullError:
                with self.changed:
                    self._tiers.keep(name, request.wanted[name])

    def stop_prefetching(self) -> None:
        """Ends the background thread, after the adapter that it is at."""
        with self.changed:
            worker, self._worker = self._worker, None
        if worker is not None:
            worker.shutdown(cancel_futures=True)
            self._worker_thread = None  # another thread may have its number by now

    def stats(self) -> PoolStats:
        """Returns what the pool holds and has done; call it under the lock."""
        tiers = self._tiers
        return PoolStats(
            registered=len(tiers.entries),
            on_device=len(tiers.device),
            in_cpu=len(tiers.host),
            device_bytes=tiers.device_used,
            cpu_bytes=tiers.host_used,
            leases=self.book.count,
            hits=self.hits,
            misses=self.misses,
            loads=self.loads,
            evictions=tiers.evictions,
        )
