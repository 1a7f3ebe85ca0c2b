"""`AdapterPool`, which keeps thousands of adapters for one model.

A batch may use any of the adapters.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastlora.model.adapter_files import CONFIG_NAME
from fastlora.pool.image import Image, Packer
from fastlora.pool.layers import PoolLayers
from fastlora.pool.leases import Lease, Request, Residency
from fastlora.pool.reader import AdapterReader
from fastlora.pool.resident import Entry, PoolStats
from fastlora.pool.router import pool_routing
from fastlora.pool.scales import ScaleMaker
from fastlora.pool.tables import PoolTables
from fastlora.pool.tiers import Tiers
from fastlora.pool.transfers import make_transfers
from fastlora.routing.block import adapters
from fastlora.routing.ids import BASE
from fastlora.routing.routers import register_router
from fastlora.routing.routing import Routing
from fastlora.validation import AdapterStateError, CheckpointError, ConfigError, check_rank

_ATTRIBUTE = "_fastlora_pool"


class AdapterPool:
    """Keeps adapters for a model in three tiers: the device, CPU memory, and the adapters' folders.

    Every method may be called from any thread while forwards run. A forward takes a lease on the
    adapters of its batch. The lease brings them to the device, evicts the least recently used
    adapters if there is no room, and keeps the batch's adapters unchanged until it ends. Files are
    read and packed outside the pool's lock.

    The budgets do not include all memory. A thread holds the adapters that it is reading, which
    belong to no tier yet; `prefetch` uses four threads. The pool also holds packed factors for
    plain PyTorch (`fastlora.ops.torch.packed`), for the last two sets of adapters that were used
    repeatedly. With a GPU, the CPU tier is page-locked memory, which PyTorch rounds up to powers of
    two.

    Args:
        model: Any module without LoRA layers. LoRA layers without adapters replace its target
            modules, and `close` restores them.
        target_modules: The modules that adapters may adapt, as in `LoraConfig`.
        max_adapters: Number of adapters that the device holds at once, which is the number of
            slots.
        device_bytes: Limit in bytes for factors on the device, excluding DoRA's scales, or None.
        cpu_bytes: Limit in bytes for factors in CPU memory, or None.
        dtype: Dtype of the stored factors, or None for the base weights' dtype.
        max_rank: Largest accepted rank, or None for any rank. CUDA graphs require it.
        max_adapter_bytes: Largest accepted adapter, as the size of its tensor file in bytes, or
            None for any size. This limit and ``max_rank`` are checked before any tensor is read.
        device: Device of the factors, or None for the base weights' device.
        root: Folder that must contain every adapter's files after links are resolved. A file
            outside it raises `CheckpointError`. With None, links may lead anywhere.

    Attributes:
        modules: Name, K, and N of each target module, in the order of the layers' ``table_row``.
        group: Identifies the layers as this pool's.
        tables: The tables of addresses, ranks, and scalings that kernels read.
        max_rank: As given.

    Raises:
        AdapterStateError: The model already has LoRA layers.
        TargetNotFoundError, UnsupportedLayerError, ConfigError: ``target_modules`` or a limit is
            wrong. The model is unchanged.
    """

    @torch.inference_mode(False)  # these tensors outlive the mode
    def __init__(
        self,
        model: nn.Module,
        *,
        target_modules: str | Iterable[str] = "all-linear",
        max_adapters: int = 64,
        device_bytes: int | None = None,
        cpu_bytes: int | None = None,
        dtype: torch.dtype | None = None,
        max_rank: int | None = None,
        max_adapter_bytes: int | None = None,
        device: torch.device | str | None = None,
        root: str | os.PathLike[str] | None = None,
    ) -> None:
        _check_limit("max_adapters", max_adapters, 1)
        for limit, value in (
            ("device_bytes", device_bytes),
            ("cpu_bytes", cpu_bytes),
            ("max_adapter_bytes", max_adapter_bytes),
        ):
            if value is not None:
                _check_limit(limit, value, 0)
        if max_rank is not None:
            check_rank(max_rank)
        if dtype is not None and not (dtype.is_floating_point and dtype.itemsize >= 2):
            raise ConfigError(
                f"dtype is {dtype}, expected a 16-, 32-, or 64-bit floating-point dtype"
            )
        within = None if root is None else Path(root).resolve()
        targets = target_modules if isinstance(target_modules, str) else list(target_modules)
        self._layers = PoolLayers(model, targets, functools.partial(adapters, self))
        try:
            base_device, base_dtype = self._layers.like()
            self.device = torch.device(device) if device is not None else base_device
            transfers = make_transfers(self.device)
            packer = Packer(
                self._layers.targets, dtype or base_dtype, pin_memory=self.device.type == "cuda"
            )
            # There are more columns than slots, for replaced images that leases still hold. One
            # more is for a new image, which is written before the old one is removed, so that a
            # failure loses neither.
            columns = max_adapters + max(4, max_adapters // 8) + 1
            with transfers.ordered():
                self.tables = PoolTables(
                    len(self._layers.targets), columns, max_adapters, self.device
                )
        except BaseException:
            self._layers.remove()
            raise
        self.modules, self.group = list(self._layers.targets), self._layers.group
        self.dtype, self.max_rank, self.max_adapters = packer.dtype, max_rank, max_adapters
        self._reader = AdapterReader(
            model, packer, max_rank=max_rank, max_bytes=max_adapter_bytes, root=within
        )
        self._tiers = Tiers(self.tables, transfers, device_bytes, cpu_bytes)
        scales = ScaleMaker(self._layers.layers, self.tables, transfers)
        self._residency = Residency(self._reader, self._tiers, transfers, scales)
        self._changed = self._residency.changed
        self._model = model
        model.__dict__[_ATTRIBUTE] = self

    # ------------------------------------------------------------------------ adapters by name

    @torch.inference_mode(False)
    def load(
        self,
        name: str,
        source: str | os.PathLike[str] | Mapping[str, torch.Tensor],
        *,
        config: Any = None,
        pin: bool = False,
    ) -> None:
        """Read an adapter and bring it to the device. An adapter of the same name is replaced.

        The replaced adapter stays active in forwards that hold a lease on it, and the new adapter
        takes over its slot. If leases and pins leave no room on the device, the adapter waits in
        the CPU tier. It then gets a slot with the next lease on it.

        Args:
            name: Name of the adapter.
            source: A PEFT folder, or a state dict with PEFT's keys. A folder must stay where it is,
                because an evicted adapter is read from it again. An adapter from a state dict never
                leaves CPU memory and counts toward ``cpu_bytes``.
            config: For a state dict, a `fastlora.LoraConfig`, PEFT's config, or a mapping of its
                fields.
            pin: Whether to keep the adapter on the device; see `pin`.

        Raises:
            CheckpointError: The adapter is damaged, does not match the model, or has contents that
                a pool does not support.
            ConfigError: The name or the config is wrong.
            PoolFullError: The adapter can never fit, or it should be pinned and does not fit now.
                After any of these errors, the pool is unchanged.
            torch.OutOfMemoryError: There is no memory for the scales of a pinned DoRA adapter. The
                adapter is in the pool, and the next lease computes the scales.
        """
        _check_name(name)
        if isinstance(source, Mapping):
            self._put(Entry(name, None, pin), self._reader.read_state(name, source, config))
        elif config is not None:
            raise ConfigError(
                "config= is only for state dicts; an adapter folder has its own config"
            )
        else:
            self.load_entry(Entry(name, Path(source).absolute(), pin))

    @torch.inference_mode(False)
    def load_entry(self, entry: Entry) -> None:
        """Load an adapter as `load` does, from a record that the caller has created.

        Args:
            entry: The record, with the adapter's name and folder. The pool uses it from now on.

        Raises:
            ConfigError: The name is wrong, or the record has no folder.
            CheckpointError, PoolFullError, torch.OutOfMemoryError: As in `load`.
        """
        self._put(entry, self._reader.read_folder(_folder_of(entry)))

    def _put(self, entry: Entry, image: Image) -> None:
        with self._changed:
            self._residency.check_open()
            self._tiers.put(entry, image)
            self._residency.loads += 1
            self._changed.notify_all()
        self._residency.settle(entry.name)

    def register(self, name: str, folder: str | os.PathLike[str]) -> None:
        """Register the folder of an adapter. The adapter is read when it is first used.

        Args:
            name: A new name.
            folder: A PEFT folder, which must stay where it is. Its config is checked now, and its
                tensors are checked when they are read.

        Raises:
            CheckpointError: The folder has no adapter that this pool supports.
            AdapterStateError: The name is already registered.
            ConfigError: The name is wrong.
        """
        self.register_entry(Entry(name, Path(folder).absolute()))

    def register_entry(self, entry: Entry) -> None:
        """Register an adapter as `register` does, from a record that the caller has created.

        Args:
            entry: The record, with the adapter's name and folder. The pool uses it from now on.

        Raises:
            CheckpointError, AdapterStateError, ConfigError: As in `register`.
        """
        self._register([entry])

    def register_folder(self, root: str | os.PathLike[str]) -> list[str]:
        """Register every adapter folder inside a folder, under the name of the adapter folder.

        If the folder is an adapter folder itself, it is registered too, under its own name. PEFT
        writes the adapter ``"default"`` in this way, beside subfolders for other adapters.

        Args:
            root: The folder.

        Returns:
            The registered names, sorted.

        Raises:
            CheckpointError: There are no adapters, or one of them is not supported by this pool.
            AdapterStateError: A name is already registered.
            ConfigError: A name is wrong. After any of these errors, nothing is registered.
        """
        path = Path(root).absolute()
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such folder, expected a folder of adapters")
        folders = [p for p in (path, *path.iterdir()) if (p / CONFIG_NAME).is_file()]
        found = {folder.name: folder for folder in folders}
        if not found:
            raise CheckpointError(f"{path}: no {CONFIG_NAME} in this folder or in its subfolders")
        if len(found) < len(folders):
            raise AdapterStateError(
                f"{path}: the adapter in this folder and the one in a subfolder would both be "
                f"named {path.name!r}; rename one of the folders"
            )
        self._register([Entry(name, folder) for name, folder in found.items()])
        return sorted(found)

    def _register(self, entries: Sequence[Entry]) -> None:
        folders = [_folder_of(entry) for entry in entries]
        uses_dora = [self._reader.check_folder(folder).use_dora for folder in folders]
        with self._changed:
            self._residency.check_open()
            self._tiers.add(entries, any(uses_dora))

    def unload(self, name: str) -> None:
        """Remove an adapter from the pool.

        Leases on the adapter remain valid, and its memory is free after they have ended.

        Raises:
            AdapterNotFoundError: No adapter has this name.
        """
        with self._changed:
            self._residency.check_open()
            self._tiers.remove(name)
            self._changed.notify_all()
        self.group.packs.clear()

    def pin(self, name: str) -> None:
        """Bring an adapter to the device and keep it there until `unpin`.

        Raises:
            AdapterNotFoundError: No adapter has this name.
            CheckpointError: The adapter's folder can no longer be read.
            PoolFullError: The adapter does not fit.
        """
        with self.lease([name]), self._changed:
            self._tiers.entry(name).pinned = True

    def unpin(self, name: str) -> None:
        """Allow an adapter to be evicted again.

        Raises:
            AdapterNotFoundError: No adapter has this name.
        """
        with self._changed:
            self._residency.check_open()
            self._tiers.entry(name).pinned = False
            self._changed.notify_all()

    def prefetch(self, names: Sequence[str]) -> Future[None]:
        """Bring adapters to the device in the background, as far as there is room without waiting.

        Args:
            names: Registered names.

        Returns:
            A future, which may be ignored. Its ``result()`` raises if an adapter could not be read.
            The next lease on that adapter will raise too.

        Raises:
            AdapterNotFoundError: One of the names is not registered.
        """
        return self._residency.prefetch(self._known(names))

    @property
    def names(self) -> list[str]:
        """Names of all adapters, in order of registration."""
        with self._changed:
            return list(self._tiers.entries)

    @property
    def resident(self) -> list[str]:
        """Names of the adapters on the device, least recently used first."""
        with self._changed:
            return list(self._tiers.device)

    @property
    def replaced(self) -> int:
        """Number of times that `load` replaced an adapter or `unload` removed one.

        While the number does not change, each name in an open block still refers to the same
        adapter.
        """
        return self._tiers.replaced

    def slot_of(self, name: str) -> int | None:
        """Return an adapter's slot, or None if it is not on the device.

        The slot is guaranteed only while a lease or a pin keeps the adapter on the device.

        Raises:
            AdapterNotFoundError: No adapter has this name.
        """
        with self._changed:
            self._tiers.entry(name)
            resident = self._tiers.device.get(name)
            return None if resident is None else resident.slot

    def plan(self, names: Sequence[str | None]) -> list[list[int]]:
        """Split a batch into batches that the device can hold.

        Args:
            names: The adapter of each sample, as for `fastlora.adapters`; None for the base model.

        Returns:
            Indices into ``names`` for each batch, in order. No batch uses more than
            ``max_adapters`` different adapters. Samples without an adapter go into the first batch.
            Pins, leases of other threads, and ``device_bytes`` are not considered. They can still
            make a batch wait or raise.

        Raises:
            AdapterNotFoundError: One of the names is not registered.
        """
        self._known([name for name in names if name is not None])
        at: dict[str | None, int] = {None: 0}
        for name in names:
            at.setdefault(name, (len(at) - 1) // self.max_adapters)
        batches: list[list[int]] = [[] for _ in range(max(at.values()) + 1)]
        for index, name in enumerate(names):
            batches[at[name]].append(index)
        return [batch for batch in batches if batch]

    def __repr__(self) -> str:
        with self._changed:
            held, known = len(self._tiers.device), len(self._tiers.entries)
        return (
            f"AdapterPool({type(self._model).__name__}: {known} adapters, {held} of at most "
            f"{self.max_adapters} on {self.device}, {self.dtype})"
        )

    def __contains__(self, name: object) -> bool:
        with self._changed:
            return name in self._tiers.entries

    def __len__(self) -> int:
        with self._changed:
            return len(self._tiers.entries)

    def stats(self) -> PoolStats:
        """Return the pool's statistics."""
        with self._changed:
            return self._residency.stats()

    # -------------------------------------------------------------------------------- leases

    @torch.inference_mode(False)
    def lease(self, names: Sequence[str], *, timeout: float | None = None) -> Lease:
        """Bring adapters to the device and keep them there, unchanged, until the lease ends.

        A lease gets all of its adapters or none. While leases of other threads take room that it
        needs, it waits and holds nothing. A thread's own leases never end while it waits.

        Args:
            names: Registered names, which may repeat.
            timeout: Seconds to wait for room, or None for no limit. Waiting for a file that is
                being read is not limited.

        Returns:
            The active lease. End it with ``with`` or `Lease.release`.

        Raises:
            AdapterNotFoundError: One of the names is not registered.
            CheckpointError: An adapter cannot be read, or does not match the model.
            PoolFullError: The adapters can never fit next to the pinned adapters and those that
                waiting threads hold, or the time is up. Nothing has changed.
            PoolClosedError: The pool is closed or closing.
            AdapterStateError: A CUDA graph is being captured while adapters are being copied to the
                GPU.
        """
        return self._residency.acquire(Request(self._known(names)), timeout)

    def lease_resident(self) -> Lease:
        """Return a lease on every adapter that is on the device now, for row ids that are slots.

        Raises:
            PoolClosedError, AdapterStateError: As in `lease`.
        """
        return self._residency.acquire_resident()

    def remake_scales(self) -> None:
        """Recompute the DoRA scales of all adapters on the device. `fastlora.refresh` calls it."""
        self._residency.remake_scales()

    # -------------------------------------------------------------------------------- closing

    def close(self, wait: float | None = None) -> None:
        """Restore the base layers of the model and remove every adapter.

        With ``wait``, new leases and blocks raise `PoolClosedError` from now on in every thread,
        and other threads have that many seconds to end their leases. Without ``wait``, `close` does
        not wait for leases. In both cases, a prefetch thread ends after the adapter that it is
        reading. On a closed pool, `close` does nothing.

        Args:
            wait: Seconds to wait for leases to end, or None to raise if any lease is held.

        Raises:
            AdapterStateError: Leases are held. Without ``wait``, nothing has changed. With
                ``wait``, the time is up: the pool continues to reject new leases, and a later
                `close` can finish.
            ConfigError: ``wait`` is not a finite number of at least 0.
        """
        number = isinstance(wait, (int, float)) and not isinstance(wait, bool)
        if wait is not None and not (number and 0 <= wait < math.inf):
            raise ConfigError(f"wait must be a non-negative number of seconds, got {wait!r}")
        self._residency.close(wait)
        with self._changed:
            if self._residency.closed:
                return
            self._residency.closed = True
            for name in list(self._tiers.entries):
                self._tiers.remove(name)
            self._layers.remove()
            if self._model.__dict__.get(_ATTRIBUTE) is self:
                del self._model.__dict__[_ATTRIBUTE]
            self._changed.notify_all()

    def __enter__(self) -> AdapterPool:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.close()
        except AdapterStateError:
            if kind is None:  # else keep the exception that ended the block
                raise

    def routing(
        self,
        ids: Sequence[str | None] | torch.Tensor,
        seeds: Mapping[str, int] | None,
        validate: bool,
        held: contextlib.ExitStack,
    ) -> Routing:
        """Return the routing of a `fastlora.adapters` block, and add its lease to ``held``."""
        return pool_routing(self, ids, seeds, validate, held)

    def _known(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the names as a tuple, after checking that all of them are registered.

        Raises:
            TypeError: ``names`` is a single string or not a sequence.
            AdapterNotFoundError: One of the names is not registered.
        """
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise TypeError(f"names is {names!r}, expected a list of names")
        self._residency.check_known(names)
        return tuple(names)

    def __reduce__(self) -> Any:
        raise TypeError("an AdapterPool cannot be copied or pickled; close() it first")


def pool_of(model: nn.Module) -> AdapterPool | None:
    """Return the pool that was created for a model, or None."""
    found: AdapterPool | None = model.__dict__.get(_ATTRIBUTE)
    return found


def _check_name(name: object) -> None:
    """Raise `ConfigError` unless ``name`` is a valid adapter name."""
    if not isinstance(name, str) or not name or name == BASE:
        raise ConfigError(
            f"an adapter's name must be a non-empty string other than {BASE!r}, got {name!r}"
        )


def _folder_of(entry: Entry) -> Path:
    """Return the folder of a record. Raise `ConfigError` if its name or folder is wrong."""
    _check_name(entry.name)
    if entry.folder is None:
        raise ConfigError(f"the adapter entry {entry.name!r} has no folder")
    return entry.folder


def _check_limit(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")


@register_router
def _router(model: Any) -> AdapterPool | None:
    if isinstance(model, nn.Module):
        return pool_of(model)
    return model if isinstance(model, AdapterPool) else None
