"""A small model, adapters for it, and checks of a pool that several test files share."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import threading
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from fastlora.model.adapter_folder import KEY_PREFIX, WEIGHTS_NAME, save_adapter_folder
from fastlora.model.config import CONFIG_NAME, LoraConfig
from fastlora.ops.factors import PENDING
from fastlora.pool import AdapterPool, Factors
from fastlora.pool.address_tables import NO_COLUMN
from fastlora.pool.packed_adapter import PackedAdapter
from fastlora.pool.transfers import BaseTransfersToDevice
from tests.support.attacks import SLOW_PATTERN, pattern_fields

# Bytes of one adapter of rank 2 on q and v, fp32: three layers of two modules, blocks of 2 x 10 and
# 2 x 14 elements, which are whole multiples of 16 bytes.
RANK2 = 3 * 2 * 2 * (10 + 14) * 4

SLOW_FIELDS = pattern_fields(SLOW_PATTERN)


class Block(nn.Module):
    """Two linears of unequal widths, none a multiple of 16 bytes in 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(10, 14)
        self.v = nn.Linear(14, 10, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[..., 10]`` to ``[..., 10]``."""
        return x + self.v(self.q(x).tanh())


class Blocks(nn.Module):
    """An embedding, three blocks, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 10)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(10, 11)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Maps ids ``[...]`` to ``[..., 11]``."""
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def make_tensors(config: LoraConfig, seed: int, modules: list[str]) -> dict[str, torch.Tensor]:
    """Random factors by PEFT's keys, different for every seed."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {n: tuple(m.weight.shape) for n, m in Blocks().named_modules() if hasattr(m, "weight")}
    tensors = {}
    for name in modules:
        n, k = shapes[name]
        r = config.rank_for(name)
        at = f"{KEY_PREFIX}{name}"
        tensors[f"{at}.lora_A.weight"] = torch.randn(r, k, generator=generator)
        tensors[f"{at}.lora_B.weight"] = torch.randn(n, r, generator=generator)
        if config.lora_bias:
            tensors[f"{at}.lora_B.bias"] = torch.randn(n, generator=generator)
        if config.use_dora:  # far below the norms: a row that was not scaled shows
            magnitude = 0.5 + torch.rand(n, generator=generator)
            tensors[f"{at}.lora_magnitude_vector"] = magnitude
    return tensors


def make_folder(path: Path, seed: int, **fields: Any) -> Path:
    """Writes an adapter folder; targets are q and v unless the fields say otherwise."""
    config = LoraConfig(**{"target_modules": ["q", "v"], "r": 2, **fields})
    ends = tuple(config.target_modules or ())
    modules = [f"layers.{i}.{end}" for i in range(3) for end in sorted(ends)]
    save_adapter_folder(path, config, make_tensors(config, seed, modules))
    return path


def make_sparse_folder(
    path: Path, like: Path, rank: int, width: int | None = None, **fields: Any
) -> Path:
    """Writes the folder of an adapter of any size, whose tensors take no room on disk.

    It has the modules of the adapter in ``like``, with another rank and, where it is given, with
    another width of lora_A.
    """
    path.mkdir(parents=True)
    config = json.loads((like / CONFIG_NAME).read_text()) | fields
    (path / CONFIG_NAME).write_text(json.dumps(config))
    header, end = {}, 0
    for key, tensor in load_file(like / WEIGHTS_NAME).items():
        is_a = key.endswith("lora_A.weight")
        shape = (rank, width or tensor.shape[1]) if is_a else (tensor.shape[0], rank)
        start, end = end, end + 4 * shape[0] * shape[1]
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    with (path / WEIGHTS_NAME).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


@contextlib.contextmanager
def peak_memory(most: int) -> Iterator[None]:
    """Asserts that the block never holds more than ``most`` bytes of Python's memory at once."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        yield
        assert tracemalloc.get_traced_memory()[1] - before <= most
    finally:
        tracemalloc.stop()


def make_pool(root: Path, **limits: Any) -> AdapterPool:
    """A pool over a model of its own, with every adapter of a folder registered."""
    pool = AdapterPool(Blocks(), target_modules=["q", "v"], **limits)
    assert pool.register_folder(root) == sorted(path.name for path in root.iterdir())
    return pool


def use(pool: AdapterPool, *names: str) -> None:
    """One lease, checked within and after."""
    with pool.lease(names):
        check_pool(pool)
    check_pool(pool)


def state(pool: AdapterPool) -> tuple[Any, ...]:
    """Everything that a call that raises must leave as it was."""
    stats = pool.stats()
    tiers = pool._tiers
    where = [(n, tiers.device.get(n), e.pinned, e.folder) for n, e in tiers.entries.items()]
    tables = (pool.tables._addresses.tolist(), pool.tables._numbers.tolist())
    return where, pool.loaded_names, list(tiers.host.items()), stats.evictions, stats.leases, tables


def saved_factors(folder: Path, module: str) -> dict[str, torch.Tensor]:
    """One module's tensors as a file has them: ``lora_A.weight``, ..."""
    at = f"{KEY_PREFIX}{module}."
    tensors = load_file(folder / WEIGHTS_NAME)
    return {k.removeprefix(at): v for k, v in tensors.items() if k.startswith(at)}


def same_factors(found: Factors | None, folder: Path, module: str) -> bool:
    """Whether a resident's factors are, value by value, those of a file."""
    saved = saved_factors(folder, module)
    if found is None or not saved:
        return found is None and not saved
    bias = saved.get("lora_B.bias")
    return bool(
        torch.equal(found.lora_a, saved["lora_A.weight"].to(found.lora_a.dtype))
        and torch.equal(found.lora_b, saved["lora_B.weight"].to(found.lora_b.dtype))
        and (found.lora_bias is None) == (bias is None)
        and (bias is None or torch.equal(found.lora_bias, bias.to(found.lora_bias.dtype)))
    )


def same_adapter(pool: AdapterPool, resident: Any, folder: Path) -> bool:
    """Whether a resident is, on every module of the pool, the adapter in a folder."""
    return all(
        same_factors(resident.factors(index), folder, module.name)
        for index, module in enumerate(pool.modules)
    )


def at_address(address: int, like: torch.Tensor) -> torch.Tensor:
    """The memory at an address, shaped like a tensor."""
    raw = bytearray(ctypes.string_at(address, like.nbytes))
    return torch.frombuffer(raw, dtype=like.dtype).view(like.shape)


def check_pool(pool: AdapterPool) -> None:
    """Asserts what must hold whenever no call is under way: budgets, counts, tables."""
    tiers, tables = pool._tiers, pool.tables
    held = tiers.loaded_adapters
    assert all(resident.leases for resident in tiers.retired)
    assert {*tiers.device, *tiers.host} <= set(tiers.entries)
    assert tiers.device_bytes is None or tiers.device_bytes_used <= tiers.device_bytes
    assert tiers.cpu_bytes is None or tiers.cpu_bytes_used <= tiers.cpu_bytes
    assert len(tiers.device) <= pool.max_adapters
    slots = [resident.slot for resident in tiers.device.values()]
    assert sorted(slots + tiers._free_slots) == list(range(pool.max_adapters))
    for slot in tiers._free_slots:
        assert tables.column_of[slot] == tables.plain_column_of[slot] == NO_COLUMN
    for resident in tiers.device.values():
        assert tables.column_of[resident.slot] == resident.column
        plain = NO_COLUMN if resident.uses_dora else resident.column
        assert tables.plain_column_of[resident.slot] == plain
    columns = [resident.column for resident in held]
    assert sorted(columns + tiers._free_columns) == list(range(tiers.columns + 1))
    assert not tables.rank[:, tiers._free_columns].any()
    assert not tables.scale_address[:, tiers._free_columns].any()
    if pool._tiers._transfers.shares_memory:
        assert not set(tiers.device) & set(tiers.host)
    for resident in held:
        for index in range(len(pool.modules)):
            _check_column(pool, resident, index)


def _check_column(pool: AdapterPool, resident: Any, index: int) -> None:
    factors, tables = resident.factors(index), pool.tables
    at = (index, resident.column)
    addresses = [t[at].item() for t in (tables.a_address, tables.b_address, tables.bias_address)]
    assert all(address % 16 == 0 for address in addresses)
    if factors is None:
        assert tables.rank[at] == 0
        assert addresses == [0, 0, 0]
        assert tables.scale_address[at] == 0
        return
    _check_scale(tables.scale_address[at].item(), factors, resident.scales, index)
    assert tables.rank[at] * pool.modules[index].num_matrices == factors.lora_a.shape[0]
    assert tables.scaling[at] == torch.tensor(factors.scaling, dtype=torch.float32)
    blocks = (factors.lora_a, factors.lora_b.t(), factors.lora_bias)
    for address, block in zip(addresses, blocks, strict=True):
        assert (address == 0) == (block is None)
        if block is not None:
            assert torch.equal(at_address(address, block), block)


def _check_scale(address: int, factors: Factors, scales: Any, index: int) -> None:
    if factors.magnitude is None:
        assert address == 0
    elif scales is None:
        assert address == PENDING
    else:
        assert torch.equal(at_address(address, scales.blocks[index]), scales.blocks[index])


class RecordingTransfers(BaseTransfersToDevice):
    """A device of its own, on the CPU, that notes in which order it is written and waited for."""

    shares_memory = False

    def __init__(self) -> None:
        self.log: list[tuple[str, Any]] = []
        self.marks = 0
        self.done = False

    def upload(self, image: PackedAdapter) -> PackedAdapter:
        data = image.data.clone()
        self.log.append(("write", data.data_ptr()))
        return dataclasses.replace(image, data=data)

    def record_event_after_writes(self) -> int:
        self.marks += 1
        return self.marks

    def is_event_done(self, mark: Any) -> bool:
        return self.done

    def make_stream_wait_for_writes(self, marks: Iterable[Any]) -> None:
        self.log += [("forward waits for", mark) for mark in marks]

    def record_read_event_and_stream_id(self) -> tuple[Any, int]:
        self.marks += 1
        self.log.append(("forward", self.marks))
        return self.marks, threading.get_ident()

    def order_writes_after_reads(self, marks: Iterable[Any]) -> None:
        self.log += [("pool waits for", mark) for mark in marks]

    def kinds(self) -> list[str]:
        """What happened, in order."""
        return [kind for kind, _ in self.log]
