"""The tiers: adapters on the device, behind them those in CPU memory, behind them the disk.

Nothing here locks; the pool calls it under its lock. Every check of a method comes before its first
change.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path

from fastlora.pool.entries import Entry, unknown
from fastlora.pool.image import Image
from fastlora.pool.resident import DeviceCopy, Resident
from fastlora.pool.tables import NO_COLUMN, PoolTables
from fastlora.pool.transfers import Transfers
from fastlora.validation import AdapterStateError, PoolFullError


class Tiers:
    """Adapters by name, and where each is.

    On a CPU an image is in one tier at a time and moves by reference. In front of a GPU the CPU
    tier is a cache of its own: it may hold copies of what the device holds.

    Args:
        slots: How many adapters the device tier holds.
        spare: How many images beside these it holds while leases keep replaced ones.
        device_bytes: Bytes of the device tier, or None for no limit.
        cpu_bytes: Bytes of the CPU tier, or None for no limit.
        tables: Filled for each image on the device.
        transfers: How images get there.
    """

    def __init__(
        self,
        *,
        slots: int,
        spare: int,
        device_bytes: int | None,
        cpu_bytes: int | None,
        tables: PoolTables,
        transfers: Transfers,
    ) -> None:
        self.slots, self.columns = slots, slots + spare
        self.device_bytes, self.cpu_bytes = device_bytes, cpu_bytes
        self.entries: dict[str, Entry] = {}
        self.device: OrderedDict[str, Entry] = OrderedDict()  # the least recently used first
        self.host: OrderedDict[str, Entry] = OrderedDict()
        self.retired: set[DeviceCopy] = set()
        self.device_used = self.host_used = self.homeless_used = 0
        self.evictions = 0
        self._tables, self._transfers = tables, transfers
        self._free_slots = list(reversed(range(slots)))
        self._free_columns = list(reversed(range(slots + spare)))

    # ---------------------------------------------------------------------------------- names

    def entry(self, name: str) -> Entry:
        """Returns what is known about a name.

        Raises:
            AdapterNotFoundError: Nothing is.
        """
        found = self.entries.get(name)
        if found is None:
            raise unknown(name, self.entries)
        return found

    def add(self, name: str, folder: Path, uses_dora: bool) -> None:
        """Registers a name whose adapter is on disk, and uses DoRA or does not.

        Raises:
            AdapterStateError: The name is taken.
        """
        if name in self.entries:
            raise AdapterStateError(f"adapter {name!r} exists already; load() replaces it")
        self.entries[name] = Entry(name, folder)
        # Graphs that are compiled or captured from now on have its scales.
        self._tables.uses_dora |= uses_dora

    def remove(self, name: str) -> None:
        """Forgets a name; its memory goes at once, or with the last lease on it."""
        entry = self.entry(name)
        self._count_homeless(entry, None)
        self._leave_device(entry)
        self._leave_host(entry)
        entry.generation += 1
        del self.entries[name]

    def put(self, name: str, folder: Path | None, image: Image, *, pin: bool) -> None:
        """Registers or replaces an adapter and brings it to the device where that is possible.

        A name keeps its slot. Where the device has no room beside what leases and pins hold, an
        adapter that need not be there goes to the CPU tier.

        Args:
            name: The adapter's name.
            folder: Where it can be read again, or None.
            image: The packed adapter.
            pin: It must be on the device, and stay there.

        Raises:
            PoolFullError: It never fits, or not now though it must; nothing has changed.
        """
        entry = self.entries.get(name)
        old = entry.copy if entry is not None else None
        pin = pin or (entry is not None and entry.pinned)
        self._check_sizes(entry, folder, image)
        leased = old if old is not None and old.leases else None
        now = self.fits({name: image}, self.leased(), leased)
        if pin and not now:
            raise PoolFullError(
                f"adapter {name!r} ({image.nbytes} bytes) is to be pinned and the device tier has "
                f"no room beside what leases and pins hold; {self.describe()}"
            )
        is_new = entry is None
        if entry is None:
            entry = self.entries[name] = Entry(name, folder)
        try:
            ready = self._prepare(entry, image) if now else None
        except BaseException:  # the GPU's memory is full
            if is_new:
                del self.entries[name]
            raise
        self._count_homeless(entry, image if folder is None else None)
        entry.folder, entry.pinned = folder, pin
        entry.generation += 1
        entry.staged = None
        slot = self._leave_device(entry, keep_slot=now)
        self._leave_host(entry)
        if not now or not self._transfers.shares_memory:
            self._to_host(entry, image)
        if ready is not None:
            try:
                self._to_device(entry, *ready, slot)
            except BaseException:
                self._to_host(entry, image)
                raise

    def _prepare(self, entry: Entry, image: Image) -> tuple[Image, int | None]:
        """Does what can fail while a name still has its old adapter, beside which there is room.

        Returns:
            The image in device memory, and the column that it was written to; None for no column
            where all are taken until the old adapter leaves.
        """
        self._make_room({entry.name: image})
        with self._transfers.ordered():
            uploaded = self._transfers.upload(image)
            column = self._free_columns.pop() if self._free_columns else None
            if column is not None:
                try:
                    self._tables.write(column, uploaded)
                except BaseException:
                    self._free_columns.append(column)
                    raise
        return uploaded, column

    def _check_sizes(self, entry: Entry | None, folder: Path | None, image: Image) -> None:
        if self.device_bytes is not None and image.nbytes > self.device_bytes:
            raise PoolFullError(
                f"the adapter has {image.nbytes} bytes, more than device_bytes={self.device_bytes}"
            )
        own = entry.image() if entry is not None and entry.folder is None else None
        homeless = self.homeless_used - (own.nbytes if own is not None else 0) + image.nbytes
        if folder is None and self.cpu_bytes is not None and homeless > self.cpu_bytes:
            raise PoolFullError(
                f"adapters from state dicts cannot be read again, so CPU memory must hold them: "
                f"{homeless} bytes, more than cpu_bytes={self.cpu_bytes}; load it from a folder"
            )

    def _count_homeless(self, entry: Entry, image: Image | None) -> None:
        own = entry.image() if entry.folder is None else None
        self.homeless_used += (image.nbytes if image else 0) - (own.nbytes if own else 0)

    # ------------------------------------------------------------------------------- the device

    def leased(self) -> set[DeviceCopy]:
        """Returns the copies that leases hold."""
        current = {e.copy for e in self.device.values() if e.copy is not None and e.copy.leases}
        return current | self.retired

    def fits(
        self,
        wanted: Mapping[str, Image],
        held: Collection[DeviceCopy],
        replaced: DeviceCopy | None = None,
    ) -> bool:
        """Returns whether adapters fit on the device together with pinned ones and held copies.

        Args:
            wanted: Name -> image.
            held: Copies that leases hold.
            replaced: A held copy that one of the wanted takes the name of.
        """
        sizes = {name: image.nbytes for name, image in wanted.items()}
        for name, entry in self.device.items():
            if name not in sizes and entry.copy and (entry.pinned or entry.copy in held):
                sizes[name] = entry.copy.nbytes
        extra = [copy.nbytes for copy in self.retired if copy in held]
        extra += [replaced.nbytes] if replaced is not None else []
        total = sum(sizes.values()) + sum(extra)
        return (
            len(sizes) <= self.slots
            and len(sizes) + len(extra) <= self.columns
            and (self.device_bytes is None or total <= self.device_bytes)
        )

    def bring(self, images: Mapping[str, Image]) -> list[DeviceCopy]:
        """Makes adapters resident, after `fits` has said that they fit; returns their copies.

        Args:
            images: Name -> image, of registered adapters, wherever it is.
        """
        missing = {n: image for n, image in images.items() if self.entries[n].copy is None}
        if missing:
            # Out of the CPU tier first: what is evicted now must not push them out of it.
            if self._transfers.shares_memory:
                for name in missing:
                    self._leave_host(self.entries[name])
            self._make_room(images)
        waiting = dict(missing)
        try:
            for name, image in missing.items():
                with self._transfers.ordered():
                    uploaded = self._transfers.upload(image)
                self._to_device(self.entries[name], uploaded, None, None)
                del waiting[name]
        finally:  # whatever stopped it (the GPU's memory is full), no adapter gets lost
            for name in missing if not self._transfers.shares_memory else waiting:
                self._to_host(self.entries[name], missing[name])
        copies = []
        for name in images:
            self.device.move_to_end(name)
            copy = self.entries[name].copy
            if copy is not None:
                copies.append(copy)
        return copies

    def release(self, copy: DeviceCopy, mark: tuple[object, int] | None) -> None:
        """Takes one lease from a copy.

        Args:
            copy: The copy.
            mark: A mark behind the forwards that read it, and their stream; or None.
        """
        if mark is not None:
            copy.reads[mark[1]] = mark[0]
        copy.leases -= 1
        if copy.retired and not copy.leases:
            self.retired.discard(copy)
            self._free(copy)

    def keep(self, name: str, image: Image) -> None:
        """Keeps an adapter that was read in the CPU tier, unless a tier holds it."""
        entry = self.entries.get(name)
        if entry is not None and entry.copy is None and entry.image() is image:
            self._to_host(entry, image)

    def _to_device(
        self, entry: Entry, uploaded: Image, column: int | None, slot: int | None
    ) -> None:
        """Makes an image in device memory its name's adapter.

        Args:
            entry: Of the name.
            uploaded: The image.
            column: That it was written to, or None for a free one.
            slot: That the name has already, or None for a free one.
        """
        written = column is not None
        column = self._free_columns.pop() if column is None else column
        slot = self._free_slots.pop() if slot is None else slot
        try:
            with self._transfers.ordered():
                if not written:
                    self._tables.write(column, uploaded)
                self._tables.assign(slot, column)
        except BaseException:
            self._free_columns.append(column)
            self._free_slots.append(slot)
            with self._transfers.ordered():
                self._tables.assign(slot, NO_COLUMN)  # it may still mean a column that is free
            raise
        resident = Resident(entry.name, slot, column, uploaded)
        entry.copy = DeviceCopy(resident, uploaded, self._transfers.written())
        entry.staged = None
        self.device[entry.name] = entry
        self.device_used += uploaded.nbytes

    def _make_room(self, wanted: Mapping[str, Image]) -> None:
        """Evicts the least recently used adapters until what is wanted has room.

        A name's old adapter is not evicted, and leaves its room to the new one unless it is leased.
        """
        nbytes = columns = 0
        for name, image in wanted.items():
            copy = self.entries[name].copy
            if copy is None or (copy.leases and copy.image is not image):
                columns += 1
                nbytes += image.nbytes
            else:
                nbytes += image.nbytes - copy.nbytes
        new_slots = sum(1 for n in wanted if n not in self.device)
        for entry in list(self.device.values()):
            copy = entry.copy
            slots_ok = len(self.device) + new_slots <= self.slots
            columns_ok = columns <= len(self._free_columns)
            bytes_ok = self.device_bytes is None or self.device_used + nbytes <= self.device_bytes
            if slots_ok and columns_ok and bytes_ok:
                return
            if copy and not copy.leases and not entry.pinned and entry.name not in wanted:
                self._leave_device(entry)
                self.evictions += 1
                # In front of a GPU its host copy, where it has one, is all that is kept.
                if self._transfers.shares_memory:
                    self._to_host(entry, copy.image)
                elif entry.name in self.host:
                    self.host.move_to_end(entry.name)

    def _leave_device(self, entry: Entry, *, keep_slot: bool = False) -> int | None:
        """Takes a name off the device; returns its slot if it is to keep it."""
        copy = entry.copy
        if copy is None:
            return None
        entry.copy = None
        del self.device[entry.name]
        if copy.leases:
            copy.retired = True
            self.retired.add(copy)
        else:
            self._free(copy)
        if keep_slot:
            return copy.resident.slot
        with self._transfers.ordered():
            self._tables.assign(copy.resident.slot, NO_COLUMN)
        self._free_slots.append(copy.resident.slot)
        return None

    def _free(self, copy: DeviceCopy) -> None:
        # The memory is reused in the order of these writes, behind the reads.
        self._transfers.wait_for_reads(copy.reads.values())
        with self._transfers.ordered():
            self._tables.clear(copy.resident.column)
        self._free_columns.append(copy.resident.column)
        self.device_used -= copy.nbytes

    # ------------------------------------------------------------------------------- CPU memory

    def _to_host(self, entry: Entry, image: Image) -> None:
        """Keeps an image in the CPU tier as the most recent, where the budget allows it at all."""
        if entry.host is not None:
            self.host.move_to_end(entry.name)
            return
        if self.cpu_bytes is not None:
            fixed = sum(
                e.host.nbytes for e in self.host.values() if e.folder is None and e.host is not None
            )
            if entry.folder is not None and fixed + image.nbytes > self.cpu_bytes:
                return
            for other in list(self.host.values()):
                if self.host_used + image.nbytes <= self.cpu_bytes:
                    break
                if other.folder is not None:
                    self._leave_host(other)
        entry.host, entry.staged = image, None
        self.host[entry.name] = entry
        self.host_used += image.nbytes

    def _leave_host(self, entry: Entry) -> None:
        if entry.host is not None:
            self.host_used -= entry.host.nbytes
            entry.host = None
            del self.host[entry.name]

    def describe(self) -> str:
        """Returns the device tier's contents in numbers, for messages."""
        copies = [e.copy for e in self.device.values() if e.copy is not None]
        leased = sum(1 for copy in copies if copy.leases)
        pinned = sum(1 for e in self.device.values() if e.pinned)
        limit = "no limit" if self.device_bytes is None else f"device_bytes={self.device_bytes}"
        return (
            f"it holds {len(copies)} adapters of at most {self.slots} and {self.device_used} bytes "
            f"({limit}); {leased} are leased, {pinned} pinned, {len(self.retired)} replaced and "
            "still leased"
        )
