"""The scales that a pool makes for its DoRA adapters: when, where they lie, and in which order."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlora
from fastlora.pool import AdapterPool, scales
from fastlora.pool.address_tables import NO_COLUMN, PENDING
from fastlora.validation import AdapterStateError
from tests.support.pool_adapters import (
    Blocks,
    RecordingTransfers,
    check_pool,
    make_folder,
    make_pool,
    saved_factors,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two DoRA adapters, of which one adapts v only, and a plain one."""
    folder = tmp_path_factory.mktemp("adapters")
    make_folder(folder / "a", 1, use_dora=True)
    make_folder(folder / "b", 2, r=4, target_modules=["v"], use_dora=True)
    make_folder(folder / "c", 3)
    return folder


def scales_of(pool: AdapterPool, name: str) -> dict[int, torch.Tensor]:
    """An adapter's scales, by module."""
    with pool.lease([name]) as lease:
        check_pool(pool)
        return dict(lease.loaded_adapters[0].scales.blocks)


def test_they_follow_their_adapter_and_the_base(root: Path) -> None:
    """Made once, where they stay; a base weight that changed makes those of its module anew."""
    pool = make_pool(root, max_adapters=2)
    weight = pool._model.layers[0].q.weight
    first = scales_of(pool, "a")
    assert sorted(first) == list(range(6))
    saved = saved_factors(root / "a", "layers.0.q")

    def expected() -> torch.Tensor:
        # r is 2 and lora_alpha its default, 8
        norm = (weight + 4 * saved["lora_B.weight"] @ saved["lora_A.weight"]).norm(dim=1)
        return (saved["lora_magnitude_vector"] / norm).detach()

    torch.testing.assert_close(first[0], expected())
    versions = [g._version for g in first.values()]
    again = scales_of(pool, "a")
    assert all(again[row] is g for row, g in first.items())
    assert [g._version for g in again.values()] == versions
    with torch.no_grad():
        weight.mul_(3)
    assert scales_of(pool, "a")[0] is first[0]
    torch.testing.assert_close(first[0], expected())
    assert [g._version for g in first.values()][1:] == versions[1:]
    # A write that PyTorch does not count, in an open block too.
    with pool.lease(["a"]):
        weight.data.mul_(7)
        fastlora.clear_caches(pool._model)
        torch.testing.assert_close(first[0], expected())
    assert sorted(scales_of(pool, "b")) == [1, 3, 5]
    with pool.lease(["b", "c"]) as lease:  # a goes
        check_pool(pool)
        assert lease.loaded_adapters[1].scales is None


def test_they_follow_base_weights_that_are_replaced_twice(root: Path) -> None:
    """A base weight may get its first address again, with as many writes (R5)."""
    pool = make_pool(root)
    weight, saved = pool._model.layers[0].q.weight, saved_factors(root / "a", "layers.0.q")
    reused = 0
    for _ in range(5):
        before = weight.data_ptr()
        found = scales_of(pool, "a")[0]
        norm = (weight + 4 * saved["lora_B.weight"] @ saved["lora_A.weight"]).norm(dim=1)
        torch.testing.assert_close(found, (saved["lora_magnitude_vector"] / norm).detach())
        weight.data = weight.data * 2
        weight.data = weight.data * 2
        reused += weight.data_ptr() == before
    assert reused > 0


def test_a_pool_knows_of_dora_from_its_registration_on(root: Path) -> None:
    """So that graphs that are compiled before such an adapter is there have scales already."""
    pool = make_pool(root)
    assert pool.loaded_names == [] and pool.tables.uses_dora
    plain = AdapterPool(Blocks(), target_modules=["q", "v"])
    plain.register("c", root / "c")
    assert not plain.tables.uses_dora
    plain.register("a", root / "a")
    assert plain.tables.uses_dora


def test_a_swap_leaves_them_to_those_who_hold_them(root: Path) -> None:
    pool = make_pool(root)
    with pool.lease(["a"]) as old:
        kept = {row: g.clone() for row, g in old.loaded_adapters[0].scales.blocks.items()}
        pool.load("a", root / "b")
        check_pool(pool)
        assert sorted(scales_of(pool, "a")) == [1, 3, 5]
        check_pool(pool)
        assert all(
            torch.equal(old.loaded_adapters[0].scales.blocks[row], g) for row, g in kept.items()
        )
    check_pool(pool)


def test_weights_that_cannot_be_told_apart(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing tells whether they have changed, every lease makes scales anew.

    A backward has those of its forward.
    """
    pool = make_pool(root)
    monkeypatch.setattr(scales, "base_weight_stamp", lambda layer: None)
    first = scales_of(pool, "b")
    pool._model.layers[0].v.weight.data *= 2
    before = {row: g.clone() for row, g in first.items()}
    assert scales_of(pool, "b")[1] is first[1]
    assert not torch.equal(first[1], before[1]) and torch.equal(first[3], before[3])
    x = torch.randn(2, 14, requires_grad=True)
    grads = []
    for between in (lambda: None, lambda: pool.lease(["b"]).release()):
        with fastlora.adapters(pool, ["b", None]):
            y = pool._model.layers[0].v(x)
        between()
        grads += torch.autograd.grad(y.sum(), x)
    assert torch.equal(*grads)


def test_threads_make_them_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that come meanwhile wait for them; who needs none does not."""
    pool, real, made = make_pool(root), scales.adapted_squared_norms, []
    scales_of(pool, "b")

    def slow(*given: Any) -> torch.Tensor:
        time.sleep(0.05)
        made.append(given)
        return real(*given)

    monkeypatch.setattr(scales, "adapted_squared_norms", slow)
    with ThreadPoolExecutor(5) as threads:
        leases = [threads.submit(scales_of, pool, "a") for _ in range(4)]
        deadline = time.monotonic() + 20
        while not made and time.monotonic() < deadline:
            time.sleep(0.001)
        for others in (["c"], ["b"]):  # what is there already, with scales of its own or without
            with pool.lease(others, timeout=0):
                assert len(made) < 6
        found = [lease.result(20) for lease in leases]
    assert len(made) == 6
    assert all(other[row] is g for other in found for row, g in found[0].items())


def test_a_column_that_is_written_again_is_of_its_last_adapter(root: Path) -> None:
    """As where a copy to the device failed: to a graph without scales only plain ones are there."""
    pool = make_pool(root)
    with pool.lease(["a", "c"]) as lease:
        dora, plain = (resident.packed for resident in lease.loaded_adapters)
        column = max(resident.column for resident in lease.loaded_adapters) - 2
        for image, found in ((plain, column), (dora, NO_COLUMN), (plain, column)):
            pool.tables.write_column(column, image)
            pool.tables.assign(5, column)
            assert pool.tables.column_of[5] == column
            assert pool.tables.plain_column_of[5] == found


def test_a_failure_leaves_the_pool_as_it_was(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, real, calls = make_pool(root), scales.adapted_squared_norms, []

    def full(*given: Any) -> torch.Tensor:
        calls.append(given)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("the device is full")
        return real(*given)

    monkeypatch.setattr(scales, "adapted_squared_norms", full)
    with pytest.raises(torch.OutOfMemoryError):
        pool.lease(["a"])
    assert pool.stats().leases == 0
    check_pool(pool)
    assert sorted(scales_of(pool, "a")) == list(range(6))


def test_a_failure_halfway_leaves_tables_of_what_is_there(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over fp64 weights, whose scales do not stay where they are, while others lease them."""
    pool, real = (
        AdapterPool(Blocks().double(), target_modules=["q", "v"]),
        scales.adapted_squared_norms,
    )
    pool.register("a", root / "a")
    calls = []

    def full(*given: Any) -> torch.Tensor:
        calls.append(given)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("the device is full")
        return real(*given)

    with pool.lease(["a"]) as lease:
        made, column = lease.loaded_adapters[0].scales, lease.loaded_adapters[0].column
        with torch.no_grad():
            for layer in pool._model.layers:
                layer.q.weight.mul_(2)
        monkeypatch.setattr(scales, "adapted_squared_norms", full)
        with pytest.raises(torch.OutOfMemoryError):
            pool.lease(["a"])
        for row, block in made.blocks.items():
            assert pool.tables.scale_address[row, column] == block.data_ptr()


def test_a_pinned_adapter_waits_for_nobodys_room(root: Path) -> None:
    """Its scales are made where it is, whoever waits for a lease meanwhile."""
    pool = make_pool(root, max_adapters=4)
    pool.register("d", root / "b")
    pool.register("e", root / "c")
    with ThreadPoolExecutor(2) as threads:
        with pool.lease(["c", "e"]):
            waiting = threads.submit(lambda: pool.lease(["a", "b", "d"], timeout=20).release())
            deadline = time.monotonic() + 20
            while not pool._lease_manager.queue and time.monotonic() < deadline:
                time.sleep(0.001)
            threads.submit(pool.load, "new", root / "a", pin=True).result(10)
            column = pool._tiers.device["new"].column
            assert (pool.tables.scale_address[:, column] > PENDING).all()
        waiting.result(20)


def test_refresh_reaches_adapters_that_were_replaced(root: Path) -> None:
    """While a lease holds them; and it is no use of an adapter to the statistics."""
    pool = make_pool(root)
    with pool.lease(["a"]) as old:
        pool.load("a", root / "b")
        held, hits = old.loaded_adapters[0].scales, pool.stats().hits
        before = held.blocks[0].clone()
        pool._model.layers[0].q.weight.data.mul_(7)
        fastlora.clear_caches(pool._model)
        assert not torch.equal(held.blocks[0], before)
        assert pool.stats().hits == hits


def test_a_first_lease_in_inference_mode(root: Path) -> None:
    """Scales can be written anew outside of it."""
    pool = make_pool(root)
    pool.load("a", root / "a")
    with torch.inference_mode():
        pool.lease_loaded().release()
    with torch.no_grad():
        pool._model.layers[0].q.weight.mul_(3)
    with torch.device("meta"):  # a default that is not the pool's
        pool.lease(["a"]).release()
    check_pool(pool)


def test_none_are_made_while_a_graph_is_captured(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph would make them anew in each of its replays."""
    pool = make_pool(root)
    with monkeypatch.context() as patched:
        patched.setattr(scales, "is_device_capturing", lambda device: True)
        with pytest.raises(AdapterStateError, match="acquire the lease before the capture"):
            pool.lease(["a"])
        pool.lease(["c"]).release()
    assert pool.stats().leases == 0
    pool.lease(["a"]).release()
    monkeypatch.setattr(scales, "is_device_capturing", lambda device: True)
    pool.lease(["a"]).release()


def test_their_order_on_a_gpu(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind what may have written base weights and what reads them; forwards wait for them."""
    device = RecordingTransfers()
    monkeypatch.setattr(fastlora.pool.pool, "make_transfers", lambda _: device)
    pool = make_pool(root)
    with pool.lease(["a"]):
        assert device.kinds() == ["write", "forward", "pool waits for"] + ["forward waits for"] * 2
        assert device.log[1][1] == device.log[2][1]
    with pool.lease(["a"]):  # nothing to make
        assert device.kinds()[5:] == ["forward"] + ["forward waits for"] * 2
    device.log.clear()
    with torch.no_grad():
        pool._model.layers[2].v.weight.add_(1)
    with pool.lease(["a"]):
        readers = ["pool waits for"] * 2  # the last forward of this stream, and this lease
        assert device.kinds() == ["forward", *readers, *["forward waits for"] * 2]
