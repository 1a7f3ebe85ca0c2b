"""`AdapterPool`: it stores what files say, keeps its budgets, and a refusal changes nothing."""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastlora import LoraConfig, get_peft_model
from fastlora.layers import FastLoraLinear, FastLoraWrapper
from fastlora.model.adapter_folder import WEIGHTS_NAME
from fastlora.pool import AdapterPool, pool_of
from fastlora.validation import (
    AdapterNotFoundError,
    AdapterStateError,
    CheckpointError,
    ConfigError,
    PoolFullError,
    TargetNotFoundError,
    UnsupportedLayerError,
)
from tests.support.pool_adapters import (
    RANK2,
    Blocks,
    check_pool,
    make_folder,
    make_pool,
    same_adapter,
    same_factors,
    saved_factors,
    state,
    use,
)

# ------------------------------------------------------------------------------------ contents

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 3, "lora_alpha": 5},
    "rslora": {"r": 3, "lora_alpha": 5, "use_rslora": True},
    "bias": {"r": 1, "lora_bias": True},
    "patterns": {"rank_pattern": {"layers.1.q": 7, "v": 1}, "alpha_pattern": {"layers.1.*": 3}},
    "part": {"r": 4, "target_modules": ["v"]},
}


def expected_scaling(fields: dict[str, Any], module: str) -> float:
    config = LoraConfig(**{"r": 2, **fields, "target_modules": ["q"]})
    rank, alpha = config.rank_for(module), config.alpha_for(module)
    return alpha / (math.sqrt(rank) if fields.get("use_rslora") else rank)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_residents_hold_what_the_files_say(tmp_path: Path, dtype: torch.dtype) -> None:
    pool = AdapterPool(Blocks().to(dtype), target_modules=["q", "v"])
    folders = {n: make_folder(tmp_path / n, 5, **fields) for n, fields in KINDS.items()}
    for name, folder in folders.items():
        pool.load(name, folder)
    check_pool(pool)
    with pool.lease(list(KINDS)) as lease:
        for name, resident in zip(KINDS, lease.loaded_adapters, strict=True):
            assert resident.name == name and pool.slot_of(name) == resident.slot
            assert resident.image.dtype == dtype
            assert same_adapter(pool, resident, folders[name])
            for index, module in enumerate(pool.modules):
                factors = resident.factors(index)
                if factors is not None:
                    assert factors.scaling == expected_scaling(KINDS[name], module.name)
        assert lease.max_rank == 7
    assert pool.modules[0] == ("layers.0.q", 10, 14, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_magnitudes_of_a_16_bit_pool_are_not_rounded(tmp_path: Path, dtype: torch.dtype) -> None:
    """They stay in fp32, bit for bit."""
    pool = AdapterPool(Blocks().to(dtype), target_modules=["q", "v"])
    pool.load("a", make_folder(tmp_path / "a", 1, use_dora=True))
    with pool.lease(["a"]) as lease:
        factors = lease.loaded_adapters[0].factors(0)
    saved = saved_factors(tmp_path / "a", pool.modules[0].name)["lora_magnitude_vector"]
    assert factors.magnitude.dtype == torch.float32 and factors.lora_a.dtype == dtype
    assert torch.equal(factors.magnitude, saved)


def test_nothing_is_padded_but_to_16_bytes(tmp_path: Path) -> None:
    pool = AdapterPool(Blocks().half(), target_modules=["q", "v"])
    pool.load("a", make_folder(tmp_path / "a", 0, r=3, target_modules=["q"], lora_bias=True))
    blocks = [3 * 10, 3 * 14, 14]  # elements of 2 bytes
    assert pool.stats().device_bytes == 3 * sum(-(-size // 8) * 16 for size in blocks)


def test_layers_know_their_pool(root: Path) -> None:
    pool = make_pool(root)
    for index, (name, k, n, _) in enumerate(pool.modules):
        layer = pool._model.get_submodule(name)
        assert isinstance(layer, FastLoraLinear)
        assert (layer.table_row, layer.routing_group) == (index, pool.group)
        assert (layer.in_features, layer.out_features) == (k, n)
    assert pool_of(pool._model) is pool


def test_a_state_dict_is_a_source_and_stays_in_cpu_memory(root: Path) -> None:
    pool = make_pool(root, max_adapters=1, cpu_bytes=3 * RANK2)
    tensors = load_file(root / "a3" / WEIGHTS_NAME)
    config = LoraConfig(r=2, target_modules=["q", "v"])
    for name in ("m0", "m1", "m2"):
        pool.load(name, tensors, config=config)
        check_pool(pool)
    before = state(pool)
    with pytest.raises(PoolFullError, match="cpu_bytes"):
        pool.load("m3", tensors, config=config)
    assert state(pool) == before
    pool.unload("m0")
    for name in [f"a{i}" for i in range(8)]:  # they share what m1 and m2 leave
        use(pool, name)
    with pool.lease(["m1"]) as lease:
        assert same_adapter(pool, lease.loaded_adapters[0], root / "a3")
    pool.load("m3", tensors, config=config.to_dict())
    with pytest.raises(ConfigError, match="requires a LoraConfig"):
        pool.load("m4", tensors)
    with pytest.raises(ConfigError, match="state dicts"):
        pool.load("m4", root / "a0", config=config)


# --------------------------------------------------------------------------------------- tiers


def test_the_least_recently_used_leaves_first(root: Path) -> None:
    pool = make_pool(root, max_adapters=3)
    for name in ("a0", "a1", "a2"):
        use(pool, name)
    use(pool, "a0")
    assert pool.loaded_names == ["a1", "a2", "a0"]
    use(pool, "a3")
    assert pool.loaded_names == ["a2", "a0", "a3"]
    pool.pin("a2")
    for name in ("a0", "a3", "a4", "a5"):  # a2 is the oldest now
        use(pool, name)
    assert pool.loaded_names == ["a2", "a4", "a5"]
    pool.unpin("a2")
    use(pool, "a6")
    assert pool.loaded_names == ["a4", "a5", "a6"]
    stats = pool.stats()
    assert (stats.hits, stats.misses, stats.loads, stats.evictions) == (4, 7, 7, 4)


def test_a_lease_keeps_its_adapters_on_the_device(root: Path) -> None:
    pool = make_pool(root, max_adapters=2)
    with pool.lease(["a0"]) as lease:
        for name in ("a1", "a2", "a3"):
            use(pool, name)
        assert pool.loaded_names == ["a0", "a3"]
        with pool.lease(["a0"]) as again:
            assert again.loaded_adapters == lease.loaded_adapters
            again.release()
        again.release()  # once is enough, the other lease goes on
        use(pool, "a4")
        assert pool.loaded_names == ["a0", "a4"]
    use(pool, "a5", "a6")
    assert pool.loaded_names == ["a5", "a6"]


@pytest.mark.parametrize("cpu_bytes", [0, RANK2, 3 * RANK2 + 5, None])
def test_budgets_hold_at_every_step(root: Path, cpu_bytes: int | None) -> None:
    pool = make_pool(root, max_adapters=4, device_bytes=3 * RANK2, cpu_bytes=cpu_bytes)
    big = make_folder(root.parent / "big", 9, r=4)  # twice the bytes
    pool.register("big", big)
    order = torch.randint(0, 9, (40, 2)).tolist()
    for pair in order:
        names = ["big" if i == 8 else f"a{i}" for i in pair]
        with pool.lease(names) as lease:
            check_pool(pool)
            for name, resident in zip(names, lease.loaded_adapters, strict=True):
                assert same_adapter(pool, resident, big if name == "big" else root / name)
        check_pool(pool)
    assert pool.stats().evictions > 10


def test_on_a_cpu_images_move_between_tiers_by_reference(root: Path) -> None:
    pool = make_pool(root, max_adapters=1)
    addresses = set()
    for name in ("a0", "a1", "a0"):
        with pool.lease([name]) as lease:
            addresses.add(lease.loaded_adapters[0].image.data_ptr())
    assert len(addresses) == 2
    assert pool.stats().loads == 2


def test_adapters_of_equal_shape_share_a_layout(root: Path) -> None:
    """It goes with the last of them."""
    pool = make_pool(root)
    pool.register("wide", make_folder(root.parent / "wide", 9, r=4))
    with pool.lease(["a0", "a1", "wide"]) as lease:
        one, two, wide = (resident.packed.layout for resident in lease.loaded_adapters)
        assert one is two is not wide
    known = [weakref.ref(one), weakref.ref(wide)]
    del lease, one, two, wide
    for name in pool.names:
        pool.unload(name)
    gc.collect()
    assert [layout() for layout in known] == [None, None]


def test_what_found_no_room_is_not_cached(root: Path) -> None:
    """An image that was read for a lease that was refused is in no tier, and is gone."""
    pool = make_pool(root, max_adapters=1)
    with pool.lease(["a0"]):
        with contextlib.suppress(PoolFullError):
            pool.lease(["a1"], timeout=0)
        gc.collect()
        assert pool.stats().loads == 2
        assert not pool._tiers.staged
        check_pool(pool)


def test_after_its_folder_is_gone_an_evicted_adapter_is_an_error(root: Path) -> None:
    pool = make_pool(root, max_adapters=1, cpu_bytes=0)
    use(pool, "a0")
    use(pool, "a1")
    shutil.rmtree(root / "a0")
    before = state(pool)
    with pytest.raises(CheckpointError, match="a0"):
        pool.lease(["a2", "a0"])
    assert state(pool) == before


def test_prefetch_fills_free_room_and_waits_for_none(root: Path) -> None:
    pool = make_pool(root, max_adapters=2)
    pool.prefetch(["a0", "a1", "a2"]).result(timeout=20)
    assert pool.loaded_names == ["a1", "a2"]
    with pool.lease(["a1", "a2"]):
        pool.prefetch(["a3"]).result(timeout=20)
        assert pool.loaded_names == ["a1", "a2"]
        assert "a3" in pool._tiers.host
    assert pool.stats().misses == 0
    with pytest.raises(AdapterNotFoundError):
        pool.prefetch(["b"])


def test_prefetch_makes_an_adapter_the_latest_in_cpu_memory(root: Path) -> None:
    sizes = make_pool(root, max_adapters=1)
    use(sizes, "a0")
    each = sizes.stats().device_bytes
    pool = make_pool(root, max_adapters=1, cpu_bytes=2 * each + each // 2)
    with pool.lease(["a0"]):
        for name in ("a1", "a2", "a1", "a3"):
            pool.prefetch([name]).result(timeout=20)
        assert list(pool._tiers.host) == ["a1", "a3"]


# ------------------------------------------------------------------------------- replacing, leases


def test_a_hot_swap_leaves_running_forwards_alone(root: Path) -> None:
    pool = make_pool(root, max_adapters=2)
    with pool.lease(["a0"]) as before:
        old = before.loaded_adapters[0]
        column = pool.tables._addresses[:, :, old.column].clone()
        pool.load("a0", root / "a5")
        check_pool(pool)
        assert same_adapter(pool, old, root / "a0")
        assert torch.equal(pool.tables._addresses[:, :, old.column], column)
        with pool.lease(["a0"]) as after:
            new = after.loaded_adapters[0]
            assert same_adapter(pool, new, root / "a5")
            assert new.slot == old.slot and new.column != old.column
            assert new.version != old.version
        assert pool.stats().device_bytes == 2 * RANK2
    assert pool.stats().device_bytes == RANK2


def test_swaps_beyond_the_spare_columns_wait_in_the_cpu_tier(root: Path) -> None:
    pool = make_pool(root, max_adapters=1)
    leases = []
    for seed in (0, 1, 2, 3, 4, 5, 6):
        pool.load("a0", root / f"a{seed}")
        check_pool(pool)
        if pool.slot_of("a0") is not None:
            leases.append(pool.lease(["a0"]))
    assert len(leases) == 5  # one slot, four spare columns
    assert pool.stats().in_cpu == 1
    with pytest.raises(PoolFullError):
        pool.lease(["a0"])
    for seed, lease in enumerate(leases):
        assert same_adapter(pool, lease.loaded_adapters[0], root / f"a{seed}")
        lease.release()
        lease.release()
    with pool.lease(["a0"]) as lease:
        assert same_adapter(pool, lease.loaded_adapters[0], root / "a6")
    assert pool.stats().device_bytes == RANK2


def test_a_swap_has_a_column_whatever_leases_hold(root: Path) -> None:
    """Adapters that nobody holds are swapped beside one of which leases hold every version."""
    pool = make_pool(root, max_adapters=3)
    leases = []
    for seed in range(8):
        pool.load("a0", root / f"a{seed}")
        check_pool(pool)
        if pool.slot_of("a0") is not None:
            leases.append(pool.lease(["a0"]))
        for name in ("a1", "a2", "a1"):
            pool.load(name, root / "a7")
            check_pool(pool)
    assert len(leases) == 7  # three slots, four spare columns
    for seed, lease in enumerate(leases):
        assert same_adapter(pool, lease.loaded_adapters[0], root / f"a{seed}")
        lease.release()
    with pool.lease(["a0", "a1"]) as lease:
        assert all(same_adapter(pool, resident, root / "a7") for resident in lease.loaded_adapters)


def test_a_pool_counts_names_that_lose_their_adapter(root: Path) -> None:
    """Who keeps something by names asks whether they mean the same adapters still."""
    pool = make_pool(root, max_adapters=2)
    before = pool.replaced
    use(pool, "a0", "a1")
    use(pool, "a2")  # evicts another one, which keeps its name
    pool.load("new", root / "a3")
    assert pool.replaced == before
    pool.load("a0", root / "a4")
    assert pool.replaced == before + 1
    pool.unload("a1")
    assert pool.replaced == before + 2


def test_tables_that_cannot_be_written_keep_their_slots(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_pool(root, max_adapters=2)
    use(pool, "a0")
    columns = pool.tables.column_of.tolist()

    def write(column: int, image: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(pool.tables, "write_column", write)
        with pytest.raises(RuntimeError, match="out of memory"):
            pool.lease(["a1"])
        with pytest.raises(RuntimeError, match="out of memory"):
            pool.load("a0", root / "a2")
    assert pool.tables.column_of.tolist() == columns
    use(pool, "a0", "a1")


def test_messages_name_the_limit_that_there_is(root: Path) -> None:
    for limits, said in (({}, False), ({"device_bytes": RANK2}, True)):
        pool = make_pool(root, max_adapters=1, **limits)
        with pool.lease(["a0"]), pytest.raises(PoolFullError) as raised:
            pool.pin("a1")
        assert "it holds 1 of at most 1 adapters" in str(raised.value)
        assert "; 1 are leased, 0 are pinned, and 0 were replaced" in str(raised.value)
        assert (f"(device_bytes={RANK2})" in str(raised.value)) is said


def test_a_lease_evicts_for_columns_alone(root: Path) -> None:
    """There are slots for two more adapters, and leases on replaced ones hold the columns."""
    pool = make_pool(root, max_adapters=4)
    leases = []
    for seed in range(7):
        pool.load("a0", root / f"a{seed}")
        leases.append(pool.lease(["a0"]))
    leases.pop().release()
    pool.lease(["a1"]).release()
    assert pool.stats().on_device == 2
    with pool.lease(["a2", "a3"]) as lease:
        assert same_adapter(pool, lease.loaded_adapters[0], root / "a2")
        assert same_adapter(pool, lease.loaded_adapters[1], root / "a3")
        check_pool(pool)
    for seed, lease in enumerate(leases):
        assert same_adapter(pool, lease.loaded_adapters[0], root / f"a{seed}")
        lease.release()


def test_unloading_spares_the_leases(root: Path) -> None:
    pool = make_pool(root, max_adapters=1)
    with pool.lease(["a0"]) as lease:
        pool.unload("a0")
        check_pool(pool)
        assert "a0" not in pool and len(pool) == 7
        assert same_adapter(pool, lease.loaded_adapters[0], root / "a0")
        with pytest.raises(AdapterNotFoundError):
            pool.lease(["a0"])
        pool.lease(["a1"]).release()  # the slot is free at once
    assert pool.stats().device_bytes == RANK2


def test_lease_resident_takes_what_is_there(root: Path) -> None:
    pool = make_pool(root, max_adapters=3)
    use(pool, "a0", "a1")
    hits = pool.stats().hits
    with pool.lease_loaded() as lease:
        assert [resident.name for resident in lease.loaded_adapters] == ["a0", "a1"]
    assert pool.stats().hits == hits + 2


def test_a_name_may_repeat_and_a_batch_may_be_all_base(root: Path) -> None:
    pool = make_pool(root, max_adapters=2)
    with pool.lease(["a1", "a0", "a1"]) as lease:
        assert [resident.name for resident in lease.loaded_adapters] == ["a1", "a0", "a1"]
    with pool.lease([]) as lease:
        assert lease.loaded_adapters == () and lease.max_rank == 0


# ------------------------------------------------------------------------------------ the model


def test_close_gives_the_model_back(root: Path) -> None:
    model = Blocks()
    model.layers[1].v.weight.requires_grad_(False)
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    modules = dict(model.named_modules())
    ids = torch.arange(11)
    expected = model(ids)
    with AdapterPool(model, target_modules=["q", "v"]) as pool:
        pool.load("a", root / "a0")
        assert torch.equal(model(ids), expected)  # no row has an adapter
        lease = pool.lease(["a"])
        with pytest.raises(AdapterStateError, match=r"the pool has active leases \(1\)"):
            pool.close()
        lease.release()
    pool.close()
    assert dict(model.named_modules()) == modules
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trains
    assert pool_of(model) is None
    for call in (lambda: pool.lease(["a"]), lambda: pool.load("a", root / "a0")):
        with pytest.raises(AdapterStateError, match="closed"):
            call()
    with pytest.raises(AdapterStateError, match="closed"):
        pool.lease_loaded()


def test_a_model_that_cannot_take_a_pool_is_left_alone(root: Path) -> None:
    model = Blocks()
    modules = dict(model.named_modules())
    with pytest.raises(UnsupportedLayerError, match="embed"):
        AdapterPool(model, target_modules=["q", "embed"])
    with pytest.raises(TargetNotFoundError):
        AdapterPool(model, target_modules=["nothing"])
    with pytest.raises(ValueError, match="meta"):
        AdapterPool(model, target_modules=["q"], device="meta")
    model.layers[2].q.to("meta")
    with pytest.raises(UnsupportedLayerError, match="are on cpu, meta"):
        AdapterPool(model, target_modules=["q"])
    assert dict(model.named_modules()) == modules
    assert all(p.requires_grad for p in model.parameters())
    for adapted in (get_peft_model(Blocks(), LoraConfig(target_modules=["q"])).get_base_model(),):
        with pytest.raises(AdapterStateError, match="already has LoRA layers"):
            AdapterPool(adapted)
    with AdapterPool(Blocks()) as pool, pytest.raises(AdapterStateError, match="already"):
        AdapterPool(pool._model)


def test_all_linear_and_layers_called_as_they_are() -> None:
    model = Blocks()
    model.layers[0].q.register_forward_hook(lambda module, args, out: out)
    with AdapterPool(model) as pool:
        assert [m.name for m in pool.modules][-1] == "head" and len(pool.modules) == 7
        assert isinstance(model.layers[0].q, FastLoraWrapper)
        with pytest.raises(TypeError, match="cannot be copied"):
            copy.deepcopy(model)
    assert type(model.layers[0].q) is nn.Linear


def test_factors_helper_tells_adapters_apart(root: Path) -> None:
    """The oracle of this file: it must not call everything equal."""
    with AdapterPool(Blocks(), target_modules=["q", "v"]) as pool:
        pool.load("a", root / "a0")
        with pool.lease(["a"]) as lease:
            factors = lease.loaded_adapters[0].factors(0)
            assert same_factors(factors, root / "a0", "layers.0.q")
            assert not same_factors(factors, root / "a1", "layers.0.q")
            assert not same_factors(factors, root / "a0", "layers.1.q")
        assert set(saved_factors(root / "a0", "layers.0.q")) == {"lora_A.weight", "lora_B.weight"}


# --------------------------------------------------------------------------------------- a batch


def test_a_batch_is_split_into_what_fits(root: Path) -> None:
    """Each part can be leased; all parts together are the batch, a name's samples in one part."""
    with make_pool(root, max_adapters=2) as pool:
        names = ["a3", None, "a1", "a3", "a0", "a1", None, "a2", "a4"]
        parts = pool.plan(names)
        assert parts == [[0, 1, 2, 3, 5, 6], [4, 7], [8]]
        for part in parts:
            use(pool, *(name for index in part if (name := names[index]) is not None))
        assert pool.plan([None, None]) == [[0, 1]] and pool.plan([]) == []
        assert pool.plan(["a1", "a0"]) == [[0, 1]]
        with pytest.raises(
            PoolFullError, match="split the batch with AdapterPool.plan, or increase"
        ):
            pool.lease(["a0", "a1", "a2"])
        with pytest.raises(AdapterNotFoundError, match="'a9'"):
            pool.plan(["a0", "a9"])


def test_a_pool_prints_what_it_holds(root: Path) -> None:
    """Name of the model, adapters known and on the device."""
    with make_pool(root, max_adapters=2) as pool:
        use(pool, "a0")
        shown = "AdapterPool(Blocks: 8 adapters, 1 of at most 2 on cpu, torch.float32)"
        assert repr(pool) == shown
