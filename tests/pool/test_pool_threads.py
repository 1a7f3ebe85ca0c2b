"""`AdapterPool` under threads: waiting, fairness, no half-loaded adapter; the order a GPU needs."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlora
import fastlora.pool.pool
from fastlora.pool import AdapterPool, Lease
from fastlora.pool.packed_adapter import PackedAdapter
from fastlora.validation import (
    AdapterNotFoundError,
    AdapterStateError,
    PoolClosedError,
    PoolFullError,
)
from tests.support.pool_adapters import (
    Blocks,
    RecordingTransfers,
    check_pool,
    make_folder,
    make_pool,
    same_adapter,
    saved_factors,
)

# Long enough for a thread that could go on to have gone on; a test that fails takes this long.
SOON, LONG = 0.05, 20.0


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight adapters, `a0` to `a7`, two of which use DoRA."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed in range(8):
        make_folder(folder / f"a{seed}", seed, r=1 + seed % 3, use_dora=seed % 4 == 3)
    return folder


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as executor:
        yield executor


def waits(future: Future[Any]) -> bool:
    time.sleep(SOON)
    return not future.done()


# -------------------------------------------------------------------------------------- waiting


def test_a_lease_waits_for_the_leases_of_others(root: Path, threads: ThreadPoolExecutor) -> None:
    pool = make_pool(root, max_adapters=2)
    with pool.lease(["a0", "a1"]):
        waiting = threads.submit(pool.lease, ["a2", "a3"], timeout=LONG)
        assert waits(waiting)
        with pytest.raises(PoolFullError, match="2 are leased"):
            pool.lease(["a2"])  # this thread's own lease is what is in the way
        with pytest.raises(PoolFullError):
            threads.submit(pool.lease, ["a4"], timeout=0.01).result(LONG)
    with waiting.result(LONG):
        assert pool.loaded_names == ["a2", "a3"]
    check_pool(pool)


def test_first_come_first_served(root: Path, threads: ThreadPoolExecutor) -> None:
    pool = make_pool(root, max_adapters=2)
    one, two = pool.lease(["a0"]), pool.lease(["a1"])
    large = threads.submit(pool.lease, ["a2", "a3"], timeout=LONG)
    assert waits(large)
    small = threads.submit(pool.lease, ["a4"], timeout=LONG)
    one.release()
    assert waits(small)  # there is room for it, but not its turn
    two.release()
    granted = large.result(LONG)
    assert waits(small)
    granted.release()
    small.result(LONG).release()


def test_a_thread_that_holds_leases_does_not_wait_for_others(
    root: Path, threads: ThreadPoolExecutor
) -> None:
    pool = make_pool(root, max_adapters=3)
    with pool.lease(["a0"]):
        large = threads.submit(pool.lease, ["a2", "a3", "a4"], timeout=LONG)
        assert waits(large)
        pool.lease(["a1"]).release()
    large.result(LONG).release()


def test_two_threads_that_wait_for_each_other(root: Path, threads: ThreadPoolExecutor) -> None:
    pool = make_pool(root, max_adapters=2)
    holding = threading.Event()

    def nested() -> None:
        with pool.lease(["a0"]):
            holding.set()
            pool.lease(["a2"], timeout=LONG).release()

    with pool.lease(["a1"]):
        other = threads.submit(nested)
        assert holding.wait(LONG)
        assert waits(other)  # this thread may end its lease
        with pytest.raises(PoolFullError):
            pool.lease(["a3"])  # now it cannot
        assert waits(other)
    other.result(LONG)
    check_pool(pool)


def test_a_waiter_hears_that_its_adapter_is_gone(root: Path, threads: ThreadPoolExecutor) -> None:
    pool = make_pool(root, max_adapters=1)
    with pool.lease(["a0"]):
        waiting = threads.submit(pool.lease, ["a1"], timeout=LONG)
        assert waits(waiting)
        pool.unload("a1")
        with pytest.raises(AdapterNotFoundError, match="a1"):
            waiting.result(LONG)


# -------------------------------------------------------------------------------------- reading


@dataclasses.dataclass
class SlowReads:
    """Holds every read outside the main thread until it may go on."""

    started: threading.Semaphore
    go: threading.Event


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> SlowReads:
    reads = SlowReads(threading.Semaphore(0), threading.Event())
    real = fastlora.pool.reader.AdapterReader.read_folder

    def read(self: Any, folder: Any) -> PackedAdapter:
        image = real(self, folder)
        if threading.current_thread() is not threading.main_thread():
            reads.started.release()
            assert reads.go.wait(LONG)
        return image

    monkeypatch.setattr(fastlora.pool.reader.AdapterReader, "read_folder", read)
    return reads


def test_an_adapter_is_read_once_for_all_who_want_it(
    root: Path, threads: ThreadPoolExecutor, slow: SlowReads
) -> None:
    pool = make_pool(root, max_adapters=4, cpu_bytes=0)
    first = threads.submit(pool.lease, ["a0"], timeout=LONG)
    assert slow.started.acquire(timeout=LONG)
    second = threads.submit(pool.lease, ["a0", "a1"], timeout=LONG)
    assert slow.started.acquire(timeout=LONG)  # a1
    assert waits(second)
    slow.go.set()
    with first.result(LONG) as one, second.result(LONG) as two:
        assert one.loaded_adapters[0] is two.loaded_adapters[0]
    assert pool.stats().loads == 2


def test_a_swap_overtakes_a_read(root: Path, threads: ThreadPoolExecutor, slow: SlowReads) -> None:
    pool = make_pool(root, max_adapters=1, cpu_bytes=0)
    lease = threads.submit(pool.lease, ["a0"], timeout=LONG)
    assert slow.started.acquire(timeout=LONG)
    pool.load("a0", root / "a3")
    pool.lease(["a1"]).release()  # the new one leaves the memory again
    slow.go.set()
    with lease.result(LONG) as granted:
        assert same_adapter(pool, granted.loaded_adapters[0], root / "a3")


def test_readers_do_not_hold_the_lock(
    root: Path, threads: ThreadPoolExecutor, slow: SlowReads
) -> None:
    pool = make_pool(root)
    pool.lease(["a1"]).release()
    reading = threads.submit(pool.lease, ["a0"], timeout=LONG)
    assert slow.started.acquire(timeout=LONG)
    threads.submit(pool.lease, ["a1"], timeout=LONG).result(LONG).release()
    assert not reading.done()
    slow.go.set()
    reading.result(LONG).release()


def test_a_slow_first_use_delays_no_other(
    root: Path, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E4: other adapters waited in the background behind one that was slow to read."""
    real, go = fastlora.pool.reader.AdapterReader.read_folder, threading.Event()

    def read(self: Any, folder: Path) -> PackedAdapter:
        assert folder.name != "a0" or go.wait(LONG)
        return real(self, folder)

    monkeypatch.setattr(fastlora.pool.reader.AdapterReader, "read_folder", read)
    pool = make_pool(root)
    slow = pool.prefetch(["a0"])
    for name in ("a1", "a2", "a3", "a4"):
        pool.prefetch([name]).result(LONG)
    assert not slow.done()
    go.set()
    slow.result(LONG)
    assert len(pool.loaded_names) == 5


# --------------------------------------------------------------------------------------- closing


def test_close_under_traffic(root: Path, threads: ThreadPoolExecutor) -> None:
    """R9: with three threads that forward in a loop, there is no moment without a lease."""
    model = Blocks()
    modules = dict(model.named_modules())
    pool = AdapterPool(model, target_modules=["q", "v"], max_adapters=3)
    pool.register_folder(root)
    ids, started = torch.arange(10).view(2, 5), threading.Barrier(4)

    def work(seed: int) -> None:
        for step in itertools.count():
            with fastlora.adapters(pool, [f"a{(seed + step) % 8}", None]), torch.no_grad():
                model(ids)
                if step == 1:
                    started.wait(LONG)  # all of them hold a lease now

    loops = [threads.submit(work, seed) for seed in range(3)]
    started.wait(LONG)
    pool.close(wait=LONG)
    for loop in loops:
        with pytest.raises(PoolClosedError, match="the pool is clos"):
            loop.result(LONG)
    stats = pool.stats()
    assert (stats.leases, stats.on_device, stats.in_cpu, stats.registered) == (0, 0, 0, 0)
    assert (stats.device_bytes, stats.cpu_bytes) == (0, 0)
    check_pool(pool)
    assert dict(model.named_modules()) == modules


def test_a_close_that_runs_out_of_time_is_finished_later(
    root: Path, threads: ThreadPoolExecutor
) -> None:
    """R9: the pool refuses whatever would keep it open, while what holds a lease goes on."""
    pool = make_pool(root, max_adapters=2)
    lease = pool.lease(["a0", "a1"])
    waiting = threads.submit(pool.lease, ["a2"], timeout=LONG)
    assert waits(waiting)
    start = time.monotonic()
    with pytest.raises(AdapterStateError, match=r"after 0.2 seconds, .* \(active leases: 1;"):
        pool.close(wait=0.2)
    assert 0.2 <= time.monotonic() - start < LONG
    with pytest.raises(PoolClosedError, match="closing and accepts no new leases"):
        waiting.result(LONG)
    for call in (
        lambda: pool.lease(["a0"]),
        lambda: pool.lease([]),
        lambda: pool.lease_loaded(),
        lambda: pool.register("b", root / "a2"),
        lambda: pool.register_folder(root),
        lambda: pool.load("b", root / "a2"),
        lambda: pool.load("a0", root / "a2"),
        lambda: pool.prefetch(["a3"]),
        lambda: pool.pin("a0"),
        lambda: pool.unload("a3"),
    ):
        with pytest.raises(PoolClosedError):
            call()
    with pytest.raises(AdapterStateError, match=r"the pool has active leases \(1\)"):
        pool.close()
    for resident in lease.loaded_adapters:
        assert same_adapter(pool, resident, root / resident.name)
    later = threads.submit(pool.close, wait=LONG)
    assert waits(later)
    lease.release()
    later.result(LONG)
    pool.close()
    with pytest.raises(PoolClosedError, match="is closed"):
        pool.lease(["a0"])
    stats = pool.stats()
    assert (stats.leases, stats.device_bytes, stats.cpu_bytes, stats.registered) == (0, 0, 0, 0)
    check_pool(pool)


def test_blocks_of_the_model_while_and_after_its_pool_closes(root: Path) -> None:
    """R9: the model's own blocks are refused with the pool's, and then it is a plain model."""
    model = Blocks()
    pool = AdapterPool(model, target_modules=["q", "v"])
    pool.register("a0", root / "a0")
    ids = torch.arange(5)[None]
    with torch.no_grad():
        plain = model(ids)
        with fastlora.adapters(model, ["a0"]):
            assert not torch.equal(model(ids), plain)
            with pytest.raises(AdapterStateError, match="active leases: 1"):
                pool.close(wait=0.01)
            with pytest.raises(PoolClosedError), fastlora.adapters(model, ["a0"]):
                pass
            assert not torch.equal(model(ids), plain)
        pool.close()
        with pytest.raises(TypeError, match="a model with an AdapterPool"):
            fastlora.adapters(model, ["a0"]).__enter__()
        assert torch.equal(model(ids), plain)


def test_close_ends_what_is_read_in_the_background(root: Path, slow: SlowReads) -> None:
    """R9: a read that is under way counts as long as it runs, those that wait are cancelled."""
    pool = make_pool(root)
    running = [pool.prefetch([f"a{i}", "a7"]) for i in range(4)]
    for _ in running:
        assert slow.started.acquire(timeout=LONG)
    queued = pool.prefetch(["a5"])
    with pytest.raises(AdapterStateError, match="threads currently reading adapters: 4"):
        pool.close(wait=0.05)
    assert queued.cancelled()
    slow.go.set()
    pool.close()
    for future in running:
        with pytest.raises(PoolClosedError):
            future.result(LONG)
    assert pool.stats().device_bytes == pool.stats().cpu_bytes == 0
    check_pool(pool)


# ------------------------------------------------------------------------------------- hammering


def contents(pool: AdapterPool, root: Path) -> dict[str, list[dict[str, torch.Tensor]]]:
    return {f.name: [saved_factors(f, m.name) for m in pool.modules] for f in root.iterdir()}


def is_whole(resident: Any, saved: list[dict[str, torch.Tensor]]) -> bool:
    return all(
        torch.equal(resident.factors(i).lora_a, tensors["lora_A.weight"])
        and torch.equal(resident.factors(i).lora_b, tensors["lora_B.weight"])
        for i, tensors in enumerate(saved)
    )


@pytest.mark.parametrize("cpu_bytes", [0, 4000, None])
def test_no_thread_ever_sees_a_half_loaded_adapter(root: Path, cpu_bytes: int | None) -> None:
    pool = make_pool(root, max_adapters=4, device_bytes=8000, cpu_bytes=cpu_bytes)
    known = contents(pool, root)
    seen = {"leases": 0, "gone": 0, "full": 0}
    failures: list[str] = []
    prefetches: list[Future[None]] = []
    start = threading.Barrier(4)

    def work(seed: int) -> None:
        rng = random.Random(seed)
        start.wait(LONG)
        for _ in range(60):
            name = f"a{rng.randrange(8)}"
            action = rng.random()
            if action < 0.1:  # another adapter under this name
                pool.load(name, root / f"a{rng.randrange(8)}")
            elif action < 0.2:
                with contextlib.suppress(AdapterNotFoundError):
                    pool.unload(name)
                pool.load(name, root / name)
            elif action < 0.3:
                with contextlib.suppress(AdapterNotFoundError):
                    prefetches.append(pool.prefetch([name]))
            else:
                names = [f"a{rng.randrange(8)}" for _ in range(rng.randrange(1, 4))]
                try:
                    lease = pool.lease(names)
                except AdapterNotFoundError:
                    seen["gone"] += 1
                    continue
                with lease:
                    seen["leases"] += 1
                    for resident in lease.loaded_adapters:
                        for _ in range(2):  # it stays what it is
                            whole = [n for n, saved in known.items() if is_whole(resident, saved)]
                            if len(whole) != 1:
                                failures.append(f"{resident.name} is none of the files: {whole}")
            used = pool.stats()
            most = used.cpu_bytes if cpu_bytes is None else cpu_bytes
            if used.device_bytes > 8000 or used.cpu_bytes > most:
                failures.append(f"over budget: {used}")

    futures = [Future[None]() for _ in range(4)]

    def run(seed: int) -> None:
        try:
            futures[seed].set_result(work(seed))
        except Exception as error:
            futures[seed].set_exception(error)

    for seed in range(4):
        threading.Thread(target=run, args=(seed,), daemon=True).start()
    for done in futures:
        done.result(60)  # a deadlock ends here
    assert not failures, failures[0]
    assert seen["leases"] > 100
    assert not concurrent.futures.wait(prefetches, LONG).not_done
    check_pool(pool)
    assert pool.stats().leases == 0 and pool.stats().evictions > 10


# ------------------------------------------------------------------------------ what a GPU needs


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> RecordingTransfers:
    transfers = RecordingTransfers()
    monkeypatch.setattr(fastlora.pool.pool, "make_transfers", lambda device: transfers)
    return transfers


def test_memory_on_the_device_is_reused_behind_its_readers(
    root: Path, device: RecordingTransfers, threads: ThreadPoolExecutor
) -> None:
    pool = make_pool(root, max_adapters=1)
    with pool.lease(["a0"]):
        threads.submit(lambda: pool.lease(["a0"]).release()).result(LONG)
    assert device.kinds() == ["write"] + ["forward waits for"] * 2 + ["forward"] * 2
    forwards = {mark for kind, mark in device.log if kind == "forward"}
    device.log.clear()
    with pool.lease(["a1"]):
        assert device.kinds()[:3] == ["pool waits for"] * 2 + ["write"]
        assert {mark for kind, mark in device.log if kind == "pool waits for"} == forwards
        device.log.clear()
        pool.load("a1", root / "a2")  # the old one is leased: nothing to wait for yet
        assert device.kinds() == ["write"]
    assert device.kinds() == ["write", "forward", "pool waits for"]
    check_pool(pool)


def test_a_slot_changes_its_meaning_behind_its_readers(
    root: Path, device: RecordingTransfers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replays of a captured graph look slots up on the device, when the host is long past them."""
    pool = make_pool(root, max_adapters=1)
    assign = pool.tables.assign

    def noted(slot: int, column: int) -> None:
        device.log.append(("assign", column))
        assign(slot, column)

    monkeypatch.setattr(pool.tables, "assign", noted)
    for change in (
        lambda: pool.load("a0", root / "a5"),  # a swap
        lambda: pool.lease(["a1"]).release(),  # an eviction
        lambda: pool.unload("a0"),
    ):
        pool.lease(["a0"]).release()
        device.log.clear()
        change()
        kinds = device.kinds()
        assert "pool waits for" in kinds[: kinds.index("assign")]
        check_pool(pool)


def test_forwards_wait_only_for_copies_under_way(root: Path, device: RecordingTransfers) -> None:
    pool = make_pool(root)
    pool.lease(["a0"]).release()
    pool.lease(["a0"]).release()
    assert device.kinds().count("forward waits for") == 2
    device.done = True
    pool.lease(["a0"]).release()
    device.done = False
    pool.lease(["a0"]).release()
    assert device.kinds().count("forward waits for") == 2


def test_the_cpu_tier_keeps_copies_of_what_a_gpu_holds(
    root: Path, device: RecordingTransfers
) -> None:
    pool = make_pool(root, max_adapters=2)
    order = ["a0", "a1", "a2", "a0", "a1"]
    for name in order:
        with pool.lease([name]) as lease:
            assert same_adapter(pool, lease.loaded_adapters[0], root / name)
        check_pool(pool)
    stats = pool.stats()
    assert (stats.loads, stats.in_cpu, stats.on_device) == (3, 3, 2)
    assert device.kinds().count("write") == 5
    pool.load("a0", root / "a5")
    with pool.lease(["a0"]) as lease:
        assert same_adapter(pool, lease.loaded_adapters[0], root / "a5")
    check_pool(pool)


def test_a_copy_that_fails_loses_no_adapter(
    root: Path, device: RecordingTransfers, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shares in (False, True):
        monkeypatch.setattr(RecordingTransfers, "shares_memory", shares)
        pool = make_pool(root, max_adapters=2)
        pool.lease(["a0"]).release()
        real, calls = device.upload, []

        def upload(
            image: PackedAdapter,
            real: Callable[[PackedAdapter], PackedAdapter] = real,
            calls: Any = calls,
        ) -> PackedAdapter:
            calls.append(1)  # not the image: then it would still be found
            if len(calls) == 2:
                raise torch.OutOfMemoryError("the device is full")
            return real(image)

        monkeypatch.setattr(device, "upload", upload)
        with pytest.raises(torch.OutOfMemoryError):
            pool.lease(["a1", "a2"])
        check_pool(pool)
        monkeypatch.setattr(device, "upload", real)
        lease: Lease = pool.lease(["a1", "a2"])
        for resident in lease.loaded_adapters:
            assert same_adapter(pool, resident, root / resident.name)
        lease.release()
        assert pool.stats().loads == 3
        check_pool(pool)
