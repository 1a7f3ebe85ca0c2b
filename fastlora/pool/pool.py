"""`AdapterPool`, which stores thousands of adapters for one model.

Each sample of a batch may use a different adapter of the pool.
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

from fastlora.deprecation import RenamedAttribute, without_old_names
from fastlora.model.adapter_files import CONFIG_NAME
from fastlora.pool.address_tables import PoolTables
from fastlora.pool.layers import InstalledPoolLoraLayers
from fastlora.pool.leases import Lease, LeaseManager, LeaseRequest
from fastlora.pool.packed_adapter import AdapterPacker, PackedAdapter
from fastlora.pool.reader import AdapterReader
from fastlora.pool.records import PoolStats, RegisteredAdapter
from fastlora.pool.router import lease_batch_routing, sample_routing_per_rank
from fastlora.pool.scales import DoraScaleUpdater
from fastlora.pool.tiers import StorageTiers
from fastlora.pool.transfers import make_transfers
from fastlora.routing.block import adapters
from fastlora.routing.ids import BASE
from fastlora.routing.routers import register_adapter_router
from fastlora.routing.routing import Routing
from fastlora.validation import AdapterStateError, CheckpointError, ConfigError, check_rank

_ATTRIBUTE = "_fastlora_pool"


class AdapterPool:
    """A pool of a model's adapters, which are loaded onto the device on demand.

    The pool moves adapters between the device, CPU memory, and disk.

    Every method may be called from any thread, even during forward passes. Before a forward pass,
    `fastlora.adapters` takes a lease on the adapters of the batch. The lease brings these adapters
    to the device, evicting the least recently used adapters if there is no room, and keeps them
    unchanged until it ends. Files are read and packed without holding the pool's lock.

    The limits ``device_bytes`` and ``cpu_bytes`` do not cover all memory. Adapters that a thread is
    reading belong to no tier yet; `prefetch` uses four threads. The pool also caches packed factors
    for plain PyTorch (`fastlora.ops.torch.packed`), for the last two sets of adapters that were
    used repeatedly. With a GPU, the CPU tier is in page-locked memory, and PyTorch rounds each
    allocation up to a power of two.

    Args:
        model: Any module without LoRA layers. LoRA layers without adapters replace its target
            modules, and `close` restores the original modules.
        target_modules: The modules that adapters may adapt, as in `LoraConfig`.
        target_parameters: The parameters that adapters may adapt, as in `LoraConfig`. If None,
            ``target_modules="all-linear"`` also selects all stacks of experts that are not
            quantized, in transformers' modules of experts (``use_experts_implementation``) and in
            Llama 4's, and the routers of the model types in which ``"all-linear"`` selects experts.
        max_adapters: Maximum number of adapters on the device. It is also the number of slots, the
            values that integer row ids may have.
        device_bytes: Limit in bytes for factors on the device, excluding DoRA's scales, or None for
            no limit.
        cpu_bytes: Limit in bytes for factors in CPU memory, or None for no limit.
        dtype: Dtype of the stored factors, or None for the base weights' dtype.
        max_rank: Largest accepted rank, or None for any rank. CUDA graphs require this limit.
        max_adapter_bytes: Largest accepted size of an adapter's tensor file in bytes, or None for
            any size. This limit and ``max_rank`` are checked before any tensor is read, except for
            ``max_rank`` if a file has factors of single experts.
        device: Device of the factors, or None for the base weights' device.
        root: Folder that must contain the files of every adapter after symbolic links are resolved,
            or None for no restriction. A file outside the folder raises `CheckpointError`.

    Attributes:
        modules: Name, K, N, and number of matrices of each target, which is a linear layer or a
            parameter. The index of a target is the ``table_row`` of its layer.
        group: The routing group that all of the pool's layers belong to.
        tables: The tables of addresses, ranks, and scalings that kernels read.
        max_rank: The argument ``max_rank``.

    Raises:
        AdapterStateError: The model already has LoRA layers.
        TargetNotFoundError, UnsupportedLayerError, ConfigError: ``target_modules`` or a limit is
            invalid. The model is unchanged.
    """

    @torch.inference_mode(False)  # the tensors are also used outside of inference mode
    def __init__(
        self,
        model: nn.Module,
        *,
        target_modules: str | Iterable[str] = "all-linear",
        target_parameters: Iterable[str] | None = None,
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
        parameters = None if target_parameters is None else list(target_parameters)
        block = functools.partial(adapters, self)
        self._layers = InstalledPoolLoraLayers(model, targets, parameters, block)
        try:
            base_device, base_dtype = self._layers.base_weights_device_and_dtype()
            self.device = torch.device(device) if device is not None else base_device
            transfers = make_transfers(self.device)
            packer = AdapterPacker(
                self._layers.targets, dtype or base_dtype, pin_memory=self.device.type == "cuda"
            )
            # The additional columns are for replaced images that are still leased. One of them is
            # for a new image, which is written before the old image is removed, so that the old
            # image is still available if the write fails.
            columns = max_adapters + max(4, max_adapters // 8) + 1
            with transfers.use_write_stream():
                self.tables = PoolTables(
                    len(self._layers.targets), columns, max_adapters, self.device
                )
        except BaseException:
            self._layers.restore_model()
            raise
        self.modules, self.group = list(self._layers.targets), self._layers.group
        self.dtype, self.max_rank, self.max_adapters = packer.dtype, max_rank, max_adapters
        self._reader = AdapterReader(
            model, packer, max_rank=max_rank, max_bytes=max_adapter_bytes, root=within
        )
        self._tiers = StorageTiers(self.tables, transfers, device_bytes, cpu_bytes)
        scales = DoraScaleUpdater(self._layers.layers, self.tables, transfers)
        self._lease_manager = LeaseManager(self._reader, self._tiers, transfers, scales)
        self._changed = self._lease_manager.changed
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
        """Load an adapter from a folder or a state dict, and register it under the given name.

        It is loaded onto the device, and replaces any adapter with the same name. The new adapter
        takes over the slot of the replaced adapter. Leases on the replaced adapter remain valid, so
        forward passes under them still use it. If leased and pinned adapters leave no room on the
        device, the new adapter is stored in the CPU tier, and the next lease on it brings it to the
        device. If ``cpu_bytes`` leaves no room for it either, that lease reads its folder again.

        Args:
            name: Name of the adapter.
            source: A PEFT folder, or a state dict with PEFT's keys. A folder must not be moved,
                because an evicted adapter is read from it again. An adapter from a state dict
                always stays in memory and counts toward ``cpu_bytes``.
            config: The config of a state dict: a `fastlora.LoraConfig`, a PEFT `LoraConfig`, or a
                mapping of its fields. Must be None for a folder.
            pin: Whether to keep the adapter on the device; see `pin`.

        Raises:
            CheckpointError: The adapter is damaged, does not match the model, or has contents that
                a pool does not support.
            ConfigError: The name or the config is invalid.
            PoolFullError: The adapter can never fit on the device, or it must be pinned and does
                not fit now. After any of these errors, the pool is unchanged.
            torch.OutOfMemoryError: There is not enough memory for the scales of a pinned DoRA
                adapter. The adapter is in the pool, and the next lease on it computes the scales.
        """
        _check_adapter_name(name)
        if isinstance(source, Mapping):
            self._put(
                RegisteredAdapter(name, None, pin),
                self._reader.read_state_dict(name, source, config),
            )
        elif config is not None:
            raise ConfigError(
                "config= is only for state dicts; an adapter folder has its own config"
            )
        else:
            self.load_registered(RegisteredAdapter(name, Path(source).absolute(), pin))

    @torch.inference_mode(False)
    def load_registered(self, entry: RegisteredAdapter) -> None:
        """Load a `RegisteredAdapter` into the pool.

        The adapter is read from its folder. The new adapter replaces any adapter with the same
        name. If the pool has no adapter with this name yet, the adapter is registered too. See
        `load` for details.

        Args:
            entry: A record of the adapter's name and folder. The pool keeps the record and modifies
                it.

        Raises:
            ConfigError: The name is invalid, or the record does not specify a folder.
            CheckpointError, PoolFullError, torch.OutOfMemoryError: As in `load`.
        """
        self._put(entry, self._reader.read_folder(_require_folder(entry)))

    def _put(self, entry: RegisteredAdapter, image: PackedAdapter) -> None:
        with self._changed:
            self._lease_manager.check_pool_open()
            self._tiers.register_or_replace(entry, image)
            self._lease_manager.loads += 1
            self._changed.notify_all()
        self._lease_manager.compute_dora_scales_if_pinned(entry.name)

    def register(self, name: str, folder: str | os.PathLike[str]) -> None:
        """Register an adapter folder under a name.

        The adapter is read when it is first used.

        Args:
            name: Name of the adapter, which must not be registered yet.
            folder: A PEFT folder, which must not be moved. Its config is checked now; its tensors
                are checked when they are read.

        Raises:
            CheckpointError: The folder does not contain an adapter that this pool supports.
            AdapterStateError: The name is already registered.
            ConfigError: The name is invalid.
        """
        self.register_adapter(RegisteredAdapter(name, Path(folder).absolute()))

    def register_adapter(self, entry: RegisteredAdapter) -> None:
        """Register an adapter with the pool.

        The adapter's tensors are read when the adapter is first used. The method `register` does
        the same, but takes a name and a folder instead of a `RegisteredAdapter`.

        Args:
            entry: A record of the adapter's name and folder. The pool keeps the record and modifies
                it.

        Raises:
            CheckpointError, AdapterStateError, ConfigError: As in `register`.
        """
        self._register([entry])

    def register_folder(self, root: str | os.PathLike[str]) -> list[str]:
        """Register all adapters in a folder.

        The adapters are in direct subfolders, and each adapter gets the name of its subfolder. If
        the folder itself contains an adapter, that adapter is registered too, under the folder's
        own name. PEFT saves the adapter ``"default"`` in the folder itself, and saves other
        adapters in subfolders.

        Args:
            root: The folder with the adapters.

        Returns:
            A sorted list of the registered names.

        Raises:
            CheckpointError: The folder contains no adapters, or an adapter that this pool does not
                support.
            AdapterStateError: A name is already registered.
            ConfigError: A name is invalid. After any of these errors, nothing is registered.
        """
        path = Path(root).absolute()
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such folder; expected a folder of adapters")
        folders = [p for p in (path, *path.iterdir()) if (p / CONFIG_NAME).is_file()]
        found = {folder.name: folder for folder in folders}
        if not found:
            raise CheckpointError(f"{path}: no {CONFIG_NAME} in this folder or in its subfolders")
        if len(found) < len(folders):
            raise AdapterStateError(
                f"{path}: the adapter in this folder and the one in a subfolder would both be "
                f"named {path.name!r}; rename one of the folders"
            )
        self._register([RegisteredAdapter(name, folder) for name, folder in found.items()])
        return sorted(found)

    def _register(self, entries: Sequence[RegisteredAdapter]) -> None:
        folders = [_require_folder(entry) for entry in entries]
        uses_dora = [self._reader.check_folder(folder).use_dora for folder in folders]
        with self._changed:
            self._lease_manager.check_pool_open()
            self._tiers.register(entries, any(uses_dora))

    def unload(self, name: str) -> None:
        """Unload an adapter from the pool.

        The adapter is also unregistered, so no adapter in the pool has this name afterwards. Leases
        on the adapter remain valid. The adapter's memory is freed when the last of these leases
        ends, or immediately if the adapter is not leased.

        Raises:
            AdapterNotFoundError: No adapter has this name.
        """
        with self._changed:
            self._lease_manager.check_pool_open()
            self._tiers.remove(name)
            self._changed.notify_all()
        self.group.packs.clear()

    def pin(self, name: str) -> None:
        """Pin an adapter, so that it is not evicted.

        The adapter stays on the device until `unpin` is called. If the adapter is not on the device
        yet, it is brought there.

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
            self._lease_manager.check_pool_open()
            self._tiers.entry(name).pinned = False
            self._changed.notify_all()

    def prefetch(self, names: Sequence[str]) -> Future[None]:
        """Start loading adapters in the background, and return a future.

        Each adapter is brought to the device if there is currently room for it. Otherwise, it is
        only read into CPU memory, within ``cpu_bytes``.

        Args:
            names: Names of registered adapters.

        Returns:
            A future, which may be ignored. If an adapter cannot be read, ``result()`` raises the
            error, and the adapters after it in ``names`` are not loaded. The next lease on an
            adapter that was not loaded reads it.

        Raises:
            AdapterNotFoundError: One of the names is not registered.
        """
        return self._lease_manager.prefetch(self._require_registered(names))

    @property
    def names(self) -> list[str]:
        """Names of all adapters in the pool.

        The list contains the names of all registered adapters, including adapters that are not
        loaded. The names are in the order of registration.
        """
        with self._changed:
            return list(self._tiers.entries)

    def __dir__(self) -> list[str]:
        return without_old_names(self, super().__dir__())

    resident = RenamedAttribute("loaded_names")
    lease_resident = RenamedAttribute("lease_loaded")
    load_entry = RenamedAttribute("load_registered")
    register_entry = RenamedAttribute("register_adapter")
    remake_scales = RenamedAttribute("recompute_scales")

    @property
    def loaded_names(self) -> list[str]:
        """Names of the adapters that are currently loaded.

        An adapter is loaded while it is on the device. The least recently used adapter comes first.
        """
        with self._changed:
            return list(self._tiers.device)

    @property
    def replaced(self) -> int:
        """Number of adapters that have been replaced in the pool.

        Adapters that were removed by `unload` also count. As long as this number does not change,
        each name in an open `fastlora.adapters` block still refers to the same adapter. An eviction
        does not change this number, because the name still refers to the evicted adapter.
        """
        return self._tiers.replaced

    def slot_of(self, name: str) -> int | None:
        """Return an adapter's slot.

        The slot is the integer that refers to the adapter in row ids, or None if the adapter is not
        on the device. It can change unless a lease or a pin keeps the adapter on the device. Take
        the lease or the pin before the call, and keep it while batches use the slot.

        Raises:
            AdapterNotFoundError: No adapter has this name.
        """
        with self._changed:
            self._tiers.entry(name)
            loaded = self._tiers.device.get(name)
            return None if loaded is None else loaded.slot

    def plan(self, names: Sequence[str | None]) -> list[list[int]]:
        """Split a batch into smaller batches that each fit in the pool.

        All adapters of a smaller batch fit on the device at the same time. Only the number of
        adapters is considered. A lease for one of the batches may still wait or raise an error
        because of pins, leases of other threads, or ``device_bytes``.

        Args:
            names: Name of the adapter of each sample, or None for the base model.

        Returns:
            A list of batches, each a list of increasing indices into ``names``. Each batch uses at
            most ``max_adapters`` different adapters. Samples without an adapter are in the first
            batch.

        Raises:
            AdapterNotFoundError: One of the names is not registered.
        """
        self._require_registered([name for name in names if name is not None])
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
        """Return the pool's statistics.

        The statistics describe the pool's current contents and its operations so far.
        """
        with self._changed:
            return self._lease_manager.stats()

    # -------------------------------------------------------------------------------- leases

    @torch.inference_mode(False)
    def lease(self, names: Sequence[str], *, timeout: float | None = None) -> Lease:
        """Lease adapters, so that they stay loaded until the lease is released.

        Adapters that are not on the device are loaded first. The leased adapters stay on the device
        until the lease ends, and do not change during this time. All of the requested adapters are
        leased together. While leases of other threads leave too little room on the device, this
        method waits without reserving any room. Leases of the calling thread do not end while it
        waits.

        Args:
            names: Names of registered adapters, which may repeat.
            timeout: Maximum time to wait for room in seconds, or None for no limit. The time for
                reading files is not limited.

        Returns:
            The active lease. End it with a ``with`` statement or `Lease.release`.

        Raises:
            AdapterNotFoundError: One of the names is not registered.
            CheckpointError: An adapter cannot be read, or does not match the model.
            PoolFullError: The adapters can never fit next to pinned adapters and adapters that are
                leased by waiting threads, or the time is up. The pool is unchanged.
            PoolClosedError: The pool is closed or closing.
            AdapterStateError: A CUDA graph is being captured while adapters are being copied to the
                GPU.
        """
        return self._lease_manager.acquire(LeaseRequest(self._require_registered(names)), timeout)

    def lease_loaded(self) -> Lease:
        """Return a lease on all adapters that are already loaded.

        The lease covers the adapters that are on the device when this method is called, and keeps
        these adapters there. If row ids are slots, `fastlora.adapters` uses this lease, because
        slots may refer to any loaded adapter.

        Raises:
            PoolClosedError, AdapterStateError: As in `lease`.
        """
        return self._lease_manager.acquire_all_loaded()

    def recompute_scales(self) -> None:
        """Recompute the scales that the pool stores for its loaded adapters.

        The scales are those of DoRA adapters. An adapter is loaded if it is on the device. Scales
        are recomputed only if the base weights have changed. Missing scales are computed too.
        """
        self._lease_manager.recompute_stale_dora_scales_of_pool()

    # -------------------------------------------------------------------------------- closing

    def close(self, wait: float | None = None) -> None:
        """Close the pool.

        All adapters are removed, which frees their memory. The pool's layers are removed from the
        model, and the model's original modules are restored. If ``wait`` is given, new leases and
        `fastlora.adapters` blocks raise `PoolClosedError` in every thread from now on, and other
        threads have ``wait`` seconds to end their leases. Prefetch threads finish the adapter that
        they are reading and then stop. Closing a closed pool does nothing.

        Args:
            wait: Maximum time in seconds to wait for leases to end, or None to raise an error
                immediately if any lease is held.

        Raises:
            AdapterStateError: A lease is held. If ``wait`` is None, the pool is unchanged.
                Otherwise the time is up: the pool continues to reject new leases, and `close` can
                be called again.
            ConfigError: ``wait`` is not a finite number of at least 0.
        """
        number = isinstance(wait, (int, float)) and not isinstance(wait, bool)
        if wait is not None and not (number and 0 <= wait < math.inf):
            raise ConfigError(f"wait must be a non-negative number of seconds, got {wait!r}")
        self._lease_manager.reject_new_leases_and_drain(wait)
        with self._changed:
            if self._lease_manager.closed:
                return
            self._lease_manager.closed = True
            for name in list(self._tiers.entries):
                self._tiers.remove(name)
            self._layers.restore_model()
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
        """Return the routing that assigns adapters to the rows of a batch.

        See `lease_batch_routing`.
        """
        return lease_batch_routing(self, ids, seeds, validate, held)

    def sample_routings(self, adapters: int | None, ranks: Sequence[int] | None) -> list[Routing]:
        """Return example routings for `warm_up`.

        See `fastlora.routing.routers.AdapterRouter`.
        """
        return sample_routing_per_rank(self, ranks)

    def _require_registered(self, names: Sequence[str]) -> tuple[str, ...]:
        """Check that all names are registered, and return them as a tuple.

        Raises:
            TypeError: ``names`` is a single string or not a sequence.
            AdapterNotFoundError: One of the names is not registered.
        """
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise TypeError(f"names must be a list of adapter names, but got {names!r}")
        self._lease_manager.check_registered(names)
        return tuple(names)

    def __reduce__(self) -> Any:
        raise TypeError("an AdapterPool cannot be copied or pickled; close() it first")


def pool_of(model: nn.Module) -> AdapterPool | None:
    """Return the open adapter pool of a model.

    The result is None if the model has no pool.
    """
    found: AdapterPool | None = model.__dict__.get(_ATTRIBUTE)
    return found


def _check_adapter_name(name: object) -> None:
    """Raise `ConfigError` unless ``name`` is a valid adapter name."""
    if not isinstance(name, str) or not name or name == BASE:
        raise ConfigError(
            f"an adapter's name must be a non-empty string other than {BASE!r}, got {name!r}"
        )


def _require_folder(entry: RegisteredAdapter) -> Path:
    """Return the folder of a registered adapter, or raise an error if it has no folder.

    An adapter that was loaded from a state dict has no folder.

    Raises:
        ConfigError: The adapter's name is invalid, or its record does not specify a folder.
    """
    _check_adapter_name(entry.name)
    if entry.folder is None:
        raise ConfigError(f"the record of adapter {entry.name!r} does not specify a folder")
    return entry.folder


def _check_limit(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")


@register_adapter_router
def _router(model: Any) -> AdapterPool | None:
    if isinstance(model, nn.Module):
        return pool_of(model)
    return model if isinstance(model, AdapterPool) else None
