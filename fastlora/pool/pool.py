"""`AdapterPool`: thousands of adapters for one model, of which a batch may use any."""

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
    """Keeps adapters for a model in three tiers: its device, CPU memory, and their folders.

    Every method may be called from any thread while forwards run. A forward takes a lease on the
    adapters of its batch, which brings them to the device, evicting the least recently used ones,
    and keeps them as they are until it ends. Files are read and packed outside the pool's lock.

    A file that is being read belongs to no tier yet: beyond the budgets, a thread holds the
    adapters that it is reading. `prefetch` has four threads. The packed factors of the last two
    sets of adapters that came again and ran in plain PyTorch (`fastlora.ops.torch.packed`) come
    on top, too. In front of a GPU the CPU tier is page-locked, and PyTorch rounds such memory up to
    powers of two.

    Args:
        model: Any module. LoRA layers without adapters take the place of its target modules, and
            `close` puts these back; the model must not have LoRA layers.
        target_modules: Which modules adapters may adapt, as in `LoraConfig`.
        max_adapters: How many adapters the device holds at once, the number of slots.
        device_bytes: Bytes of factors on the device, without DoRA's scales; None for no limit.
        cpu_bytes: Bytes of factors in CPU memory behind it, or None for no limit.
        dtype: Of the stored factors; None for that of the base weights.
        max_rank: Largest rank that is accepted, or None for any. CUDA graphs need it.
        max_adapter_bytes: Largest adapter that is accepted, in bytes of its file of tensors, or
            None for any. This limit and ``max_rank`` are checked before a tensor is read.
        device: Where the factors go; None for the base weights' device.
        root: Folder that every adapter's files must be in after links are resolved; a file outside
            raises `CheckpointError`. None follows links anywhere.

    Attributes:
        modules: Name, K and N of each target module; a layer's ``table_row`` counts here.
        group: What marks the layers as this pool's.
        tables: What kernels read about the adapters on the device.
        max_rank: As given.

    Raises:
        AdapterStateError: The model has LoRA layers already.
        TargetNotFoundError, UnsupportedLayerError, ConfigError: ``target_modules`` or a limit is
            wrong. The model is unchanged.
    """

    @torch.inference_mode(False)  # what is made here outlives the mode
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
            raise ConfigError(f"dtype is {dtype}, expected a float of 16, 32 or 64 bits")
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
            # More columns than slots, for images that were replaced while leases hold them; and one
            # for an image that is to replace another, which is there until nothing can fail.
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
        """Read an adapter and brings it to the device; an adapter of that name is replaced.

        The replaced one keeps acting in forwards that hold a lease, and its slot is the new one's.
        Where leases and pins leave no room on the device, the adapter waits in the CPU tier, and
        has a slot again with the next lease on it.

        Args:
            name: The adapter's name.
            source: A PEFT folder, which must stay where it is: an evicted adapter is read again
                from there. Or a state dict with PEFT's keys; such an adapter never leaves CPU
                memory and counts there.
            config: For a state dict, a `fastlora.LoraConfig`, PEFT's own, or its fields.
            pin: Never evict it; see `pin`.

        Raises:
            CheckpointError: The adapter is damaged, does not fit the model, or holds what a pool
                does not support.
            ConfigError: The name or the config is wrong.
            PoolFullError: It never fits, or it is to be pinned and does not fit now. After any of
                these the pool is as it was.
            torch.OutOfMemoryError: There is no room for a pinned DoRA adapter's scales, which the
                next lease makes: it is in the pool then.
        """
        _check_name(name)
        if isinstance(source, Mapping):
            self._put(Entry(name, None, pin), self._reader.read_state(name, source, config))
        elif config is not None:
            raise ConfigError("config= is for state dicts; a folder has its own")
        else:
            self.load_entry(Entry(name, Path(source).absolute(), pin))

    @torch.inference_mode(False)
    def load_entry(self, entry: Entry) -> None:
        """Do what `load` does, with a record that the caller made.

        Args:
            entry: Names the adapter and its folder. It is the pool's record from now on.

        Raises:
            ConfigError: The name is wrong, or there is no folder.
            CheckpointError, PoolFullError, torch.OutOfMemoryError: As `load`.
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
        """Remember where an adapter is; it is read when it is first used.

        Args:
            name: A new name.
            folder: A PEFT folder, which must stay where it is. Its config is checked now, its
                tensors when they are read.

        Raises:
            CheckpointError: The folder holds no adapter that this pool can take.
            AdapterStateError: The name exists.
            ConfigError: The name is wrong.
        """
        self.register_entry(Entry(name, Path(folder).absolute()))

    def register_entry(self, entry: Entry) -> None:
        """Do what `register` does, with a record that the caller made.

        Args:
            entry: Names the adapter and its folder. It is the pool's record from now on.

        Raises:
            CheckpointError, AdapterStateError, ConfigError: As `register`.
        """
        self._register([entry])

    def register_folder(self, root: str | os.PathLike[str]) -> list[str]:
        """Register every adapter folder in a folder under its folder's name.

        A folder that is an adapter's itself, as PEFT writes the adapter ``"default"`` beside
        subfolders of others, is registered under its own name too.

        Returns:
            The names, sorted.

        Raises:
            CheckpointError: There are none, or one of them is not an adapter for this pool.
            AdapterStateError: A name exists.
            ConfigError: A name is wrong. Nothing is registered after any of these.
        """
        path = Path(root).absolute()
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such folder, expected one that holds adapters")
        folders = [p for p in (path, *path.iterdir()) if (p / CONFIG_NAME).is_file()]
        found = {folder.name: folder for folder in folders}
        if not found:
            raise CheckpointError(f"{path}: neither it nor a subfolder has an {CONFIG_NAME}")
        if len(found) < len(folders):
            raise AdapterStateError(
                f"{path}: an adapter of its own and a subfolder would both be named {path.name!r}; "
                "rename one of the folders"
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
        """Forget an adapter. Leases on it go on; its memory is free when they have ended.

        Raises:
            AdapterNotFoundError: There is none of that name.
        """
        with self._changed:
            self._residency.check_open()
            self._tiers.remove(name)
            self._changed.notify_all()
        self.group.packs.clear()

    def pin(self, name: str) -> None:
        """Bring an adapter to the device and keeps it there until `unpin`.

        Raises:
            AdapterNotFoundError: There is none of that name.
            CheckpointError: Its folder cannot be read any more.
            PoolFullError: It cannot fit.
        """
        with self.lease([name]), self._changed:
            self._tiers.entry(name).pinned = True

    def unpin(self, name: str) -> None:
        """Let an adapter be evicted again.

        Raises:
            AdapterNotFoundError: There is none of that name.
        """
        with self._changed:
            self._residency.check_open()
            self._tiers.entry(name).pinned = False
            self._changed.notify_all()

    def prefetch(self, names: Sequence[str]) -> Future[None]:
        """Bring adapters to the device in the background, as far as there is room without waiting.

        Returns:
            A future. It need not be waited for; ``result()`` raises where an adapter could not be
            read, as the next lease on it will.

        Raises:
            AdapterNotFoundError: There is none of one of the names.
        """
        return self._residency.prefetch(self._known(names))

    @property
    def names(self) -> list[str]:
        """Names of all adapters, in the order of their registration."""
        with self._changed:
            return list(self._tiers.entries)

    @property
    def resident(self) -> list[str]:
        """Names of the adapters on the device, the least recently used first."""
        with self._changed:
            return list(self._tiers.device)

    @property
    def replaced(self) -> int:
        """How many times `load` replaced an adapter or `unload` forgot one.

        While the number stays the same, the adapters of an open block are those of their names.
        """
        return self._tiers.replaced

    def slot_of(self, name: str) -> int | None:
        """Return an adapter's slot, or None while it is not on the device.

        It is certain to stay the adapter's only while a lease or a pin holds it.

        Raises:
            AdapterNotFoundError: There is none of that name.
        """
        with self._changed:
            self._tiers.entry(name)
            resident = self._tiers.device.get(name)
            return None if resident is None else resident.slot

    def plan(self, names: Sequence[str | None]) -> list[list[int]]:
        """Split a batch into batches that the device can hold, each of whole samples.

        Args:
            names: An adapter for each sample, as for `fastlora.adapters`; None for the base model.

        Returns:
            Indices into ``names``, in order; no batch has more than ``max_adapters`` different
            adapters. Samples without one go into the first. Pins and leases of others, and
            ``device_bytes``, are not counted: they can still refuse a batch, or make it wait.

        Raises:
            AdapterNotFoundError: There is none of one of the names.
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
        """Return what the pool holds and has done."""
        with self._changed:
            return self._residency.stats()

    # -------------------------------------------------------------------------------- leases

    @torch.inference_mode(False)
    def lease(self, names: Sequence[str], *, timeout: float | None = None) -> Lease:
        """Bring adapters to the device and keeps them there, as they are, until the lease ends.

        All or nothing: it waits, holding nothing, while the leases of other threads take room that
        it needs. A thread's own leases never end while it waits.

        Args:
            names: Registered names; they may repeat.
            timeout: Seconds to wait for room, or None for as long as it takes. A file that is being
                read is waited for.

        Returns:
            The lease, in force; end it with ``with`` or `Lease.release`.

        Raises:
            AdapterNotFoundError: There is no adapter of one of the names.
            CheckpointError: One cannot be read, or does not fit the model.
            PoolFullError: They can never fit beside what is pinned and what waiting threads hold,
                or the time is up. Nothing has changed.
            PoolClosedError: The pool is closed or closing.
            AdapterStateError: Adapters are being copied to the GPU and a CUDA graph is being
                captured.
        """
        return self._residency.acquire(Request(self._known(names)), timeout)

    def lease_resident(self) -> Lease:
        """Keep every adapter that is on the device now: for row ids that are slots.

        Raises:
            PoolClosedError, AdapterStateError: As `lease`.
        """
        return self._residency.acquire_resident()

    def remake_scales(self) -> None:
        """Make DoRA's scales of all that is on the device anew; `fastlora.refresh` calls it."""
        self._residency.remake_scales()

    # -------------------------------------------------------------------------------- closing

    def close(self, wait: float | None = None) -> None:
        """Put the base layers back into the model and forgets every adapter.

        With ``wait``, new leases and blocks raise `PoolClosedError` from now on, in every thread,
        and those that other threads hold have that many seconds to end. Without it, `close` does
        not wait for leases. Either way, a thread that prefetches ends after the adapter that it is
        reading. `close` on a closed pool does nothing.

        Args:
            wait: Seconds to wait for leases to end, or None to refuse while any is held.

        Raises:
            AdapterStateError: Leases are held. Without ``wait``, nothing has changed. With it, the
                time is up: the pool keeps refusing new leases, and a later `close` finishes.
            ConfigError: ``wait`` is not a number of at least 0.
        """
        number = isinstance(wait, (int, float)) and not isinstance(wait, bool)
        if wait is not None and not (number and 0 <= wait < math.inf):
            raise ConfigError(f"wait must be a number of seconds, at least 0, got {wait!r}")
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
            if kind is None:  # else an error of that kind is what ended the block
                raise

    def routing(
        self,
        ids: Sequence[str | None] | torch.Tensor,
        seeds: Mapping[str, int] | None,
        validate: bool,
        held: contextlib.ExitStack,
    ) -> Routing:
        """Return the routing of a `fastlora.adapters` block; ``held`` takes the lease."""
        return pool_routing(self, ids, seeds, validate, held)

    def _known(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return names that are all registered; raises for others, and for a single string."""
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise TypeError(f"names is {names!r}, expected a list of names")
        self._residency.check_known(names)
        return tuple(names)

    def __reduce__(self) -> Any:
        raise TypeError("an AdapterPool cannot be copied or pickled; close() it first")


def pool_of(model: nn.Module) -> AdapterPool | None:
    """Return the pool that was made for a model, or None."""
    found: AdapterPool | None = model.__dict__.get(_ATTRIBUTE)
    return found


def _check_name(name: object) -> None:
    """Raise `ConfigError` unless an adapter can have this name."""
    if not isinstance(name, str) or not name or name == BASE:
        raise ConfigError(
            f"an adapter's name must be a non-empty string other than {BASE!r}, got {name!r}"
        )


def _folder_of(entry: Entry) -> Path:
    """Return the folder of a record; raises `ConfigError` where name or folder is wrong."""
    _check_name(entry.name)
    if entry.folder is None:
        raise ConfigError(f"the record of {entry.name!r} has no folder")
    return entry.folder


def _check_limit(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")


@register_router
def _router(model: Any) -> AdapterPool | None:
    if isinstance(model, nn.Module):
        return pool_of(model)
    return model if isinstance(model, AdapterPool) else None
