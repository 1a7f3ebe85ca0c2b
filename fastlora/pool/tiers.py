"""The storage tiers of a pool: device memory, CPU memory, and disk.

The functions in this module do not lock anything; the caller must hold the pool's lock. Each method
completes its checks before it changes anything.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path
from weakref import WeakValueDictionary

from fastlora.pool.address_tables import NO_COLUMN, PoolTables
from fastlora.pool.packed_adapter import PackedAdapter
from fastlora.pool.records import LoadedAdapter, RegisteredAdapter
from fastlora.pool.transfers import BaseTransfersToDevice
from fastlora.validation import AdapterNotFoundError, AdapterStateError, PoolFullError, near_names


class StorageTiers:
    """The storage tiers of a pool: device memory, CPU memory, and disk.

    The class keeps track of the adapters in each tier. The methods move adapters between the tiers,
    and evict the least recently used adapters.

    If the pool's device is a CPU, an image is in only one memory tier at a time, and moving it
    between tiers copies no data. If it is a GPU, the CPU tier is a cache that may contain copies of
    images on the device.

    Args:
        tables: The pool's tables. Their number of slots limits the number of adapters on the
            device. The additional columns are for replaced adapters that are still leased, and for
            a new image that is written before the image that it replaces is removed.
        transfers: Copies images to the device.
        device_bytes: Maximum size of the device tier in bytes, or None for no limit.
        cpu_bytes: Maximum size of the CPU tier in bytes, or None for no limit.

    Attributes:
        entries: Maps the name of each registered adapter to its record.
        device: Maps the name of each adapter on the device to its `LoadedAdapter`, least recently
            used first.
        retired: Adapters on the device that were replaced or removed but are still leased.
        host: Maps the name of each adapter in the CPU tier to its image, least recently used first.
        staged: Maps the name of each adapter that a thread has read, and that is not in a tier yet,
            to its image.
        evictions: Number of times that an adapter was evicted from the device.
        replaced: Number of registered adapters that were replaced or removed.
    """

    def __init__(
        self,
        tables: PoolTables,
        transfers: BaseTransfersToDevice,
        device_bytes: int | None,
        cpu_bytes: int | None,
    ) -> None:
        self.slots, self.columns = tables.column_of.numel(), tables.rank.shape[1] - 1
        self.device_bytes, self.cpu_bytes = device_bytes, cpu_bytes
        self.entries: dict[str, RegisteredAdapter] = {}
        self.device: OrderedDict[str, LoadedAdapter] = OrderedDict()
        self.retired: set[LoadedAdapter] = set()
        self.host: OrderedDict[str, PackedAdapter] = OrderedDict()
        self.staged: WeakValueDictionary[str, PackedAdapter] = WeakValueDictionary()
        self.evictions = self.replaced = 0
        self._tables, self._transfers = tables, transfers
        self._free_slots = list(reversed(range(self.slots)))
        self._free_columns = list(reversed(range(self.columns + 1)))

    # ---------------------------------------------------------------------------------- names

    def entry(self, name: str) -> RegisteredAdapter:
        """Return the record of a registered adapter.

        Raises:
            AdapterNotFoundError: No adapter has this name.
        """
        found = self.entries.get(name)
        if found is None:
            raise adapter_not_found_error(name, self.entries)
        return found

    def find_packed_adapter_in_any_tier(self, name: str) -> PackedAdapter | None:
        """Return the packed adapter with a name, or None if the adapter is not in memory.

        The packed adapter may be on the device or in the CPU tier, or a thread may have just read
        it from files.
        """
        loaded = self.device.get(name)
        if loaded is not None:
            return loaded.packed
        return self.host.get(name) or self.staged.get(name)

    def register(self, entries: Collection[RegisteredAdapter], uses_dora: bool) -> None:
        """Register adapters with the pool's storage tiers.

        Each adapter is registered under the name in its record, and can then be loaded on demand.
        This method does not read the adapters' files.

        Args:
            entries: Records of the adapters. If an error is raised, none is registered.
            uses_dora: Whether any of the adapters uses DoRA. If so, the tables for kernels include
                DoRA scales from now on.

        Raises:
            AdapterStateError: A name is already registered.
        """
        for entry in entries:
            if entry.name in self.entries:
                raise AdapterStateError(
                    f"adapter {entry.name!r} already exists; use load() to replace it"
                )
        self.entries.update({entry.name: entry for entry in entries})
        # Graphs that are compiled or captured from now on include scales.
        self._tables.uses_dora |= uses_dora

    def remove(self, name: str) -> None:
        """Remove an adapter from all tiers.

        The adapter is also unregistered. If the adapter is leased, its memory on the device is
        freed when the last lease on the adapter ends. Otherwise, the memory is freed immediately.

        Raises:
            AdapterNotFoundError: No adapter has this name.
        """
        self.entry(name)
        self._remove_from_device(name)
        self.host.pop(name, None)
        self.staged.pop(name, None)
        del self.entries[name]
        self.replaced += 1

    def register_or_replace(self, entry: RegisteredAdapter, image: PackedAdapter) -> None:
        """Register an adapter, or replace the adapter with the same name.

        The new adapter is loaded onto the device if there is room, and takes over the slot of the
        adapter that it replaces. If leased and pinned adapters leave no room on the device, the new
        adapter is stored in the CPU tier unless it is pinned. An adapter that replaces a pinned
        adapter is pinned too.

        Args:
            entry: Record of the adapter.
            image: The packed adapter, in CPU memory.

        Raises:
            PoolFullError: The adapter can never fit, or it must be pinned and does not fit now.
                Nothing has changed.
        """
        name = entry.name
        before, old = self.entries.get(name), self.device.get(name)
        pinned = entry.pinned or (before is not None and before.pinned)
        self._check_sizes(name, entry.folder, image)
        leased = old if old is not None and old.leases else None
        now = self.fits_beside_pinned_and_held({name: image}, self.leased(), leased)
        if pinned and not now:
            raise PoolFullError(
                f"adapter {name!r} ({image.nbytes} bytes) cannot be pinned: leased and pinned "
                f"adapters leave no room for it in the device tier; {self.describe_device_tier()}"
            )
        loaded = None
        if now:  # first, because it can fail: the name still has its old adapter
            self._evict_until_device_has_room({name: image})
            loaded = self._upload_to_own_or_free_slot(name, image)
        entry.pinned, self.entries[name] = pinned, entry
        self.replaced += before is not None
        self.staged.pop(name, None)
        self.host.pop(name, None)
        if loaded is None:
            self._remove_from_device(name)
        else:
            if old is not None:
                self._free_memory_when_unleased(self.device.pop(name))
            self.device[name] = loaded
        if loaded is None or not self._transfers.shares_memory:
            self._add_to_cpu_lru(name, image)

    def _check_sizes(self, name: str, folder: Path | None, image: PackedAdapter) -> None:
        if self.device_bytes is not None and image.nbytes > self.device_bytes:
            raise PoolFullError(
                f"the adapter's size is {image.nbytes} bytes, which is more than "
                f"device_bytes={self.device_bytes}"
            )
        if folder is not None or self.cpu_bytes is None:
            return
        others = [n for n, entry in self.entries.items() if entry.folder is None and n != name]
        images = [
            image,
            *(
                found
                for n in others
                if (found := self.find_packed_adapter_in_any_tier(n)) is not None
            ),
        ]
        homeless = sum(image.nbytes for image in images)
        if homeless > self.cpu_bytes:
            raise PoolFullError(
                f"adapters from state dicts must stay in CPU memory, but their {homeless} bytes "
                f"exceed cpu_bytes={self.cpu_bytes}; load the adapter from a folder instead"
            )

    # ------------------------------------------------------------------------------- the device

    @property
    def loaded_adapters(self) -> list[LoadedAdapter]:
        """The adapters that are loaded on the device.

        Adapters that were replaced or removed are included while they are leased.
        """
        return [*self.device.values(), *self.retired]

    @property
    def device_bytes_used(self) -> int:
        """Number of bytes used in the device tier.

        The value is the total size of all packed adapters on the device.
        """
        return sum(loaded.packed.nbytes for loaded in self.loaded_adapters)

    def leased(self) -> set[LoadedAdapter]:
        """Return the set of leased adapters.

        All leased adapters are on the device.
        """
        return {loaded for loaded in self.loaded_adapters if loaded.leases}

    def fits_beside_pinned_and_held(
        self,
        wanted: Mapping[str, PackedAdapter],
        held: Collection[LoadedAdapter],
        replaced_but_leased: LoadedAdapter | None = None,
    ) -> bool:
        """Return whether adapters fit on the device alongside the pinned and held adapters.

        Pinned adapters and the adapters in ``held`` stay on the device and take up room in the
        device tier. All other adapters can be evicted.

        Args:
            wanted: Maps the name of each adapter that should fit to its image.
            held: Adapters that must stay on the device because they are leased.
            replaced_but_leased: An adapter that one of the wanted adapters replaces, or None.
        """
        sizes = {name: image.nbytes for name, image in wanted.items()}
        for name, loaded in self.device.items():
            if name not in sizes and (self.entries[name].pinned or loaded in held):
                sizes[name] = loaded.packed.nbytes
        extra = [loaded.packed.nbytes for loaded in self.retired if loaded in held]
        extra += [replaced_but_leased.packed.nbytes] if replaced_but_leased is not None else []
        total = sum(sizes.values()) + sum(extra)
        return (
            len(sizes) <= self.slots
            and len(sizes) + len(extra) <= self.columns
            and (self.device_bytes is None or total <= self.device_bytes)
        )

    def bring_to_device(self, images: Mapping[str, PackedAdapter]) -> list[LoadedAdapter]:
        """Load registered adapters onto the device.

        Other adapters are evicted if necessary. The caller must have checked with
        `fits_beside_pinned_and_held` that the adapters fit.

        Args:
            images: Maps the name of each adapter to its image.

        Returns:
            The adapters on the device, in the order of ``images``.
        """
        missing = {name: image for name, image in images.items() if name not in self.device}
        shares = self._transfers.shares_memory
        if missing:
            # Remove them from the CPU tier first, so that adapters evicted now do not push them out
            # of it.
            if shares:
                for name in missing:
                    self.host.pop(name, None)
            self._evict_until_device_has_room(images)
        try:
            for name, image in missing.items():
                self.device[name] = self._upload_to_own_or_free_slot(name, image)
                self.staged.pop(name, None)
        finally:  # after a failure too (the GPU's memory is full), so that no adapter is lost
            for name, image in missing.items():
                if not shares or name not in self.device:
                    self._add_to_cpu_lru(name, image)
        for name in images:
            self.device.move_to_end(name)
        return [self.device[name] for name in images]

    def decrement_leases(
        self, loaded: LoadedAdapter, read_event: tuple[object, int] | None
    ) -> None:
        """Decrement an adapter's lease count.

        If the adapter was replaced or removed and this was its last lease, its memory is freed.

        Args:
            loaded: The adapter.
            read_event: A tuple (CUDA event after the forward passes that read the adapter, id of
                their stream), or None if no event is needed.
        """
        if read_event is not None:
            loaded.reads[read_event[1]] = read_event[0]
        loaded.leases -= 1
        if loaded in self.retired and not loaded.leases:
            self.retired.remove(loaded)
            self._free(loaded)

    def add_to_cpu_if_registered(self, name: str, image: PackedAdapter) -> None:
        """Add an adapter to the CPU tier if it is still registered.

        An adapter that is already on the device is not added.

        Args:
            name: Name of the adapter.
            image: Packed tensors of the adapter. If they have been replaced, they are not added.
        """
        known = self.host.get(name) or self.staged.get(name)
        if name in self.entries and name not in self.device and known is image:
            self._add_to_cpu_lru(name, image)

    def _upload_to_own_or_free_slot(self, name: str, image: PackedAdapter) -> LoadedAdapter:
        """Copy an adapter to its current slot, or else a free slot, and return the loaded adapter.

        If an adapter of the same name is on the device, the new adapter takes over the slot of that
        adapter. Otherwise, the new adapter gets a free slot. This method does not evict any
        adapter, so there must be room for the image. If the copy fails, for example because the GPU
        is out of memory, nothing has changed.
        """
        old, column = self.device.get(name), self._free_columns[-1]
        slot = self._free_slots[-1] if old is None else old.slot
        with self._transfers.use_write_stream():
            uploaded = self._transfers.upload(image)
            try:
                self._tables.write_column(column, uploaded)
                if old is not None:  # a captured graph that still runs may look up the slot
                    self._transfers.order_writes_after_reads(old.reads.values())
                self._tables.assign(slot, column)
            except BaseException:  # the column stays free, although the slot may refer to it
                self._tables.assign(slot, NO_COLUMN if old is None else old.column)
                self._tables.clear_adapter_column(column)
                raise
        self._free_columns.pop()
        if old is None:
            self._free_slots.pop()
        loaded = LoadedAdapter(name, slot, column, uploaded)
        loaded.written = self._transfers.record_event_after_writes()
        return loaded

    def _evict_until_device_has_room(self, wanted: Mapping[str, PackedAdapter]) -> None:
        """Evict adapters until the device has room for the given adapters.

        The least recently used adapters are evicted first. Leased and pinned adapters are not
        evicted, and neither are adapters that will be replaced. A new adapter takes over the room
        of the adapter that it replaces unless that adapter is leased.

        Args:
            wanted: Maps the name of each adapter that must fit to its image. Those that are already
                on the device are not evicted.
        """
        columns, nbytes = 0, self.device_bytes_used
        for name, image in wanted.items():
            old = self.device.get(name)
            nbytes += image.nbytes
            if old is None or (old.leases and old.packed is not image):
                columns += 1
            else:
                nbytes -= old.packed.nbytes
        slots = len(self.device.keys() | wanted.keys())
        for name, loaded in list(self.device.items()):
            bytes_ok = self.device_bytes is None or nbytes <= self.device_bytes
            if slots <= self.slots and columns < len(self._free_columns) and bytes_ok:
                return
            if loaded.leases or self.entries[name].pinned or name in wanted:
                continue
            self._remove_from_device(name)
            self.evictions += 1
            slots, nbytes = slots - 1, nbytes - loaded.packed.nbytes
            # With a GPU, only the image's copy in the CPU tier remains, if there is one.
            if self._transfers.shares_memory:
                self._add_to_cpu_lru(name, loaded.packed)
            elif name in self.host:
                self.host.move_to_end(name)

    def _remove_from_device(self, name: str) -> None:
        """Remove an adapter from the device.

        Its slot is freed. Nothing happens if the adapter is not on the device.
        """
        loaded = self.device.pop(name, None)
        if loaded is not None:
            # Retire it first: captured graphs that still run look up its slot.
            self._free_memory_when_unleased(loaded)
            with self._transfers.use_write_stream():
                self._tables.assign(loaded.slot, NO_COLUMN)
            self._free_slots.append(loaded.slot)

    def _free_memory_when_unleased(self, removed: LoadedAdapter) -> None:
        """Free a removed adapter's memory once the adapter is no longer leased.

        If the adapter is leased, its memory is freed when the last lease on it ends.
        """
        if removed.leases:
            self.retired.add(removed)
        else:
            self._free(removed)

    def _free(self, loaded: LoadedAdapter) -> None:
        # Later writes to this memory are ordered after the reads.
        self._transfers.order_writes_after_reads(loaded.reads.values())
        with self._transfers.use_write_stream():
            self._tables.clear_adapter_column(loaded.column)
        self._free_columns.append(loaded.column)

    # ------------------------------------------------------------------------------- CPU memory

    @property
    def cpu_bytes_used(self) -> int:
        """Number of bytes used in the CPU tier.

        The value is the total size of all packed adapters in the tier.
        """
        return sum(image.nbytes for image in self.host.values())

    def _add_to_cpu_lru(self, name: str, image: PackedAdapter) -> None:
        """Add an adapter's packed image to the CPU tier, which is an LRU cache.

        The adapter becomes the most recently used one. The size of the tier is kept within
        ``cpu_bytes``. The least recently used adapters that can be read again are removed to make
        room. An adapter that can be read again is not added if it still does not fit.
        """
        if name in self.host:
            self.host.move_to_end(name)
            return
        if self.cpu_bytes is not None:
            # Images that cannot be read again are never removed.
            readable = {n for n in [*self.host, name] if self.entries[n].folder is not None}
            sizes = {n: i.nbytes for n, i in self.host.items() if n in readable}
            used = self.cpu_bytes_used + image.nbytes
            if name in readable and used - sum(sizes.values()) > self.cpu_bytes:
                return
            for other, nbytes in sizes.items():
                if used <= self.cpu_bytes:
                    break
                del self.host[other]
                used -= nbytes
        self.staged.pop(name, None)
        self.host[name] = image

    def describe_device_tier(self) -> str:
        """Return a description of the device tier, for error messages.

        The description states the contents and the limits of the tier.
        """
        leased = sum(1 for loaded in self.device.values() if loaded.leases)
        pinned = sum(1 for name in self.device if self.entries[name].pinned)
        limit = "" if self.device_bytes is None else f" (device_bytes={self.device_bytes})"
        return (
            f"it holds {len(self.device)} of at most {self.slots} adapters and "
            f"{self.device_bytes_used} bytes{limit}; "
            f"{leased} are leased, {pinned} are pinned, and {len(self.retired)} were "
            "replaced but are still leased"
        )


def adapter_not_found_error(name: str, candidates: Collection[str]) -> AdapterNotFoundError:
    """Create the `AdapterNotFoundError` for an unknown adapter name.

    The error message contains the name of the adapter and the number of registered adapters. The
    message also suggests names in ``candidates`` that are similar to ``name``, if there are any.
    ``candidates`` contains the names of all registered adapters.
    """
    return AdapterNotFoundError(
        f"no adapter {name!r} among the {len(candidates)} adapters of this pool"
        f"{near_names(str(name), candidates)}"
    )
