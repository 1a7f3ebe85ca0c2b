"""`AdapterPool` and bad input: one clear error, and everything as it was."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fastlora
from fastlora import LoraConfig
from fastlora.model.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from fastlora.model.adapter_folder import KEY_PREFIX, load_adapter_folder, save_adapter_folder
from fastlora.patterns import MATCHING_SECONDS
from fastlora.pool import AdapterPool
from fastlora.pool.packed_adapter import PackedAdapter
from fastlora.pool.reader import AdapterReader
from fastlora.pool.transfers import BaseTransfersToDevice
from fastlora.validation import (
    AdapterNotFoundError,
    AdapterStateError,
    AdapterTooLargeError,
    CheckpointError,
    ConfigError,
    PoolFullError,
)
from tests.support.pool_adapters import (
    RANK2,
    SLOW_FIELDS,
    Blocks,
    check_pool,
    make_folder,
    make_pool,
    make_sparse_folder,
    make_tensors,
    peak_memory,
    same_adapter,
    state,
    use,
)


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS_NAME)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_NAME)


def truncate(folder: Path) -> None:
    path = folder / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:-7])


def rename(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if old in key]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    return change


def drop(part: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: [tensors.pop(key) for key in list(tensors) if part in key]


Q0 = f"{KEY_PREFIX}layers.0.q"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (truncate, "truncated|ends at byte"),
    "no weights": (lambda f: (f / WEIGHTS_NAME).unlink(), WEIGHTS_NAME),
    "no config": (lambda f: (f / CONFIG_NAME).unlink(), CONFIG_NAME),
    "other names": (lambda f: edit_tensors(f, rename("layers.", "blocks.")), "layers.0"),
    "not a target": (
        lambda f: edit_tensors(f, rename("layers.0.q", "head")),
        "'head' is not among the modules that this pool adapts",
    ),
    "fewer layers": (
        lambda f: edit_tensors(f, drop("layers.2")),
        "LoRA factors are missing for 2 of the 6 modules",
    ),
    "no such target": (lambda f: edit_config(f, target_modules=["k"]), "different base"),
    "wider": (
        lambda f: edit_tensors(f, lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(2, 12)})),
        "the last dimension must have size 10, got 12",
    ),
    "taller": (
        lambda f: edit_tensors(f, lambda t: t.update({f"{Q0}.lora_B.weight": torch.ones(15, 2)})),
        "the first dimension must have size 14, got 15",
    ),
    "DoRA without magnitudes": (
        lambda f: edit_config(f, use_dora=True),
        "has no lora_magnitude_vector",
    ),
    "full copies": (lambda f: edit_config(f, modules_to_save=["head"]), "modules_to_save"),
    "biases": (lambda f: edit_config(f, bias="all"), "do not support bias='all'"),
    "trained tokens": (
        lambda f: edit_config(f, trainable_token_indices=[1]),
        "do not support trainable_token_indices",
    ),
    "copied layers": (
        lambda f: edit_config(f, layer_replication=[[0, 2], [0, 2]]),
        "do not support layer_replication",
    ),
    "rank": (
        lambda f: make_folder(f, 1, r=9),
        "r=9 exceeds the pool's max_rank=8",
    ),
    "rank by pattern": (
        lambda f: make_folder(f, 1, rank_pattern={"layers.1.v": 9}),
        "rank 9, which exceeds the pool's max_rank=8",
    ),
    "embedding that was saved with the adapter": (
        lambda f: edit_tensors(
            f, lambda t: t.update({f"{KEY_PREFIX}embed_tokens.weight": torch.ones(11, 10)})
        ),
        "a changed base weight",
    ),
    "overflow": (
        lambda f: edit_tensors(f, lambda t: t[f"{Q0}.lora_B.weight"].fill_(7e4)),
        "magnitude 7e\\+04, which is too large",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_adapter_that_raises_changes_nothing(root: Path, damage: str) -> None:
    model = Blocks().half()
    pool = AdapterPool(model, target_modules=["q", "v"], max_adapters=2, max_rank=8, cpu_bytes=0)
    pool.register_folder(root)
    use(pool, "a0", "a1")
    spoil, message = DAMAGE[damage]
    spoil(root / "a5")
    before = state(pool)
    with pytest.raises(CheckpointError, match=message):
        pool.load("new", root / "a5")
    with pytest.raises(CheckpointError, match=message):
        pool.load("a0", root / "a5")
    with pytest.raises(CheckpointError, match=message):
        pool.lease(["a2", "a5"])
    assert state(pool) == before
    with pool.lease(["a0"]) as lease:
        assert same_adapter(pool, lease.loaded_adapters[0], root / "a0")


def test_a_folder_that_is_an_adapter_itself(tmp_path: Path) -> None:
    """PEFT writes "default" into the folder and the others below it: none is left out."""
    make_folder(tmp_path / "run", 1)
    make_folder(tmp_path / "run" / "french", 2)
    pool = AdapterPool(Blocks(), target_modules=["q", "v"])
    assert pool.register_folder(tmp_path / "run") == ["french", "run"]
    use(pool, "run", "french")
    for name, folder in (("run", tmp_path / "run"), ("french", tmp_path / "run" / "french")):
        with pool.lease([name]) as lease:
            assert same_adapter(pool, lease.loaded_adapters[0], folder)
    make_folder(tmp_path / "run" / "run", 3)
    other = AdapterPool(Blocks(), target_modules=["q", "v"])
    with pytest.raises(AdapterStateError, match="both be named 'run'"):
        other.register_folder(tmp_path / "run")
    assert list(other.names) == []
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        CheckpointError, match="no adapter_config.json in this folder or in its subfolders"
    ):
        other.register_folder(tmp_path / "empty")


def test_files_outside_the_root(root: Path, tmp_path: Path) -> None:
    """E6: with ``root``, links out of it are refused at every read; without, they are followed."""
    model, outside = Blocks(), make_folder(tmp_path / "outside", 1)
    (root / "linked").mkdir()
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        (root / "linked" / name).symlink_to(outside / name)
    pool = AdapterPool(model, target_modules=["q", "v"], root=root)
    for call in (pool.load, pool.register):
        for folder in (root / "linked", outside):
            with pytest.raises(
                CheckpointError, match="points to a file outside the folder of adapters"
            ):
                call("x", folder)
    pool.register("a0", root / "a0")
    (root / "a0" / WEIGHTS_NAME).unlink()
    (root / "a0" / WEIGHTS_NAME).symlink_to(outside / WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match="points to a file outside the folder of adapters"):
        pool.lease(["a0"])
    pool.close()
    pool = AdapterPool(model, target_modules=["q", "v"])
    pool.register("x", root / "linked")
    with pool.lease(["x"]) as lease:
        assert same_adapter(pool, lease.loaded_adapters[0], outside)


def test_a_save_that_was_cut_off(root: Path) -> None:
    """R2: new weights beside the old config are read with the config that they were saved with."""
    old = (root / "a0" / CONFIG_NAME).read_bytes()
    file = load_adapter_folder(root / "a0")
    config = dataclasses.replace(file.config, lora_alpha=32, inference_mode=False)
    save_adapter_folder(root / "a0", config, file.tensors)
    (root / "a0" / CONFIG_NAME).write_bytes(old)
    pool = AdapterPool(Blocks(), target_modules=["q", "v"])
    with pytest.warns(UserWarning, match="a save was interrupted"):
        pool.register("a0", root / "a0")
        with pool.lease(["a0"]) as lease:
            scaling = {
                factors.scaling
                for row in (0, 1)
                if (factors := lease.loaded_adapters[0].factors(row))
            }
    assert scaling == {config.scaling_for("q")} != {file.config.scaling_for("q")}


@pytest.mark.parametrize("field", SLOW_FIELDS)
def test_a_pattern_that_backtracks_raises_within_a_bound(root: Path, field: str) -> None:
    """E2: a folder's pattern, in any field, cannot occupy the process."""
    pool = make_pool(root)
    use(pool, "a0")
    edit_config(root / "a5", **SLOW_FIELDS[field])
    before, start = state(pool), time.thread_time()
    for call in (
        lambda: pool.load("new", root / "a5"),
        lambda: pool.load("a0", root / "a5"),
        lambda: pool.lease(["a5"]),
    ):
        with pytest.raises(CheckpointError, match=f"a5.*{field}"):
            call()
    assert time.thread_time() - start < 3 * MATCHING_SECONDS
    assert state(pool) == before


@pytest.mark.parametrize(
    ("argument", "fields"),
    [
        ("max_rank", {"r": 1_000_000}),
        ("max_rank", {"rank_pattern": {"q": 1_000_000, "v": 1_000_000}}),
        ("max_adapter_bytes", {"r": 1_000_000}),
        ("max_adapter_bytes", {"width": 10_000_000}),
    ],
    ids=["rank", "rank by pattern", "bytes", "bytes of wide factors"],
)
def test_limits_are_checked_before_a_tensor_is_read(
    root: Path, argument: str, fields: dict[str, Any]
) -> None:
    """E4: a file of 4 KB on disk has tensors of hundreds of MB."""
    limit = {"max_rank": 256, "max_adapter_bytes": 100 << 20}[argument]
    pool = make_pool(root, **{argument: limit})
    use(pool, "a0")
    rank = 2 if "width" in fields else 1_000_000
    folder = make_sparse_folder(root.parent / "sparse", root / "a0", rank, **fields)
    size = (folder / WEIGHTS_NAME).stat()
    assert size.st_size > 450_000_000 and size.st_blocks * 512 < 20_000
    before = state(pool)
    for name in ("new", "a0"):
        with (
            peak_memory(20 << 20),
            pytest.raises(AdapterTooLargeError, match=f"{argument}={limit}") as caught,
        ):
            pool.load(name, folder)
        assert caught.value.argument == argument
    assert state(pool) == before


def test_state_dicts_have_the_same_limits(root: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q"])
    tensors = make_tensors(config, 0, [f"layers.{i}.q" for i in range(3)])
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    for argument, limit in (("max_rank", 3), ("max_adapter_bytes", nbytes - 1)):
        pool = AdapterPool(Blocks(), target_modules=["q"], **{argument: limit})
        with pytest.raises(AdapterTooLargeError, match=f"{argument}={limit}"):
            pool.load("a", tensors, config=config)
        assert pool.names == []
    AdapterPool(Blocks(), target_modules=["q"], max_adapter_bytes=nbytes, max_rank=4).load(
        "a", tensors, config=config
    )


@pytest.mark.parametrize("what", ["tensors", "nested", "twice", "long name"])
def test_a_large_header_takes_little_memory_and_time(root: Path, what: str) -> None:
    """E4: a header is read before its tensors are, and bounded by what the pool's modules need."""
    pool = make_pool(root)
    entry = {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}
    if what == "tensors":
        text = json.dumps(
            {f"base_model.model.layers.{i}.q.lora_A.weight": entry for i in range(100_000)}
        )
    elif what == "nested":
        text = '{"__metadata__": [' + ",".join(["[]"] * 10_000_000) + "]}"
    elif what == "twice":
        text = "{" + ", ".join(f'"{i}": 1' for i in range(10_000)) + ', "9999": 1}'
    else:
        text = json.dumps({KEY_PREFIX + "." * 200_000 + "weight": entry})
    data = len(text).to_bytes(8, "little") + text.encode() + bytes(4)
    (root / "a5" / WEIGHTS_NAME).write_bytes(data)
    edit_config(root / "a5", task_type="SEQ_CLS")
    start = time.thread_time()
    with peak_memory(50 << 20), pytest.raises(CheckpointError, match="header|duplicate|characters"):
        pool.load("new", root / "a5")
    assert time.thread_time() - start < 2


def test_configs_are_bounded_by_what_the_modules_need(root: Path) -> None:
    """E4: one bound for the config, in its file and in the metadata of the weights."""
    pool = make_pool(root)
    names = [module.name for module in pool.modules]
    by_name = {"target_modules": names, "rank_pattern": dict.fromkeys(names, 2)}
    edit_config(root / "a1", **by_name, alpha_pattern=dict.fromkeys(names, 4))
    use(pool, "a1")  # all modules in all fields
    text = (root / "a2" / CONFIG_NAME).read_bytes()
    tensors = load_file(root / "a2" / WEIGHTS_NAME)
    config = json.dumps(json.loads(text) | {"revision": "x" * 100_000})
    (root / "a3" / CONFIG_NAME).write_text(config)
    with pytest.raises(CheckpointError, match=rf"a3.*: the file is {len(config)} bytes long"):
        pool.load("new", root / "a3")
    metadata = {"fastlora.config": config, "fastlora.replaces": hashlib.sha256(text).hexdigest()}
    save_file(tensors, root / "a2" / WEIGHTS_NAME, metadata)
    with pytest.raises(
        CheckpointError, match=rf"the stored config is {len(config)} bytes long, expected"
    ):
        pool.load("new", root / "a2")
    with pytest.warns(UserWarning, match="a save was interrupted"):
        load_adapter_folder(root / "a2")  # a model has no such bound


def test_a_file_is_read_as_it_was_checked(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """E4, E6: the limits hold for the file that is read, whatever takes its place."""
    pool = make_pool(root, max_rank=2)
    large = make_folder(root / "large", 9, r=3)
    real = AdapterReader._update_config_and_locate_tensors

    def places(*args: Any) -> Any:
        found = real(*args)
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            (large / name).replace(root / "a0" / name)
        return found

    monkeypatch.setattr(AdapterReader, "_update_config_and_locate_tensors", places)
    pool.load("new", root / "a0")
    monkeypatch.undo()
    with pool.lease(["new"]) as lease:
        assert lease.max_rank == 2
    with pytest.raises(AdapterTooLargeError, match="max_rank=2"):
        pool.load("new", root / "a0")


def test_blocks_by_name_plan_for_the_ranks_that_they_use(root: Path) -> None:
    """A high limit makes no small adapter slower. Slots may be captured, so they plan for it."""
    pool = make_pool(root, max_rank=200)
    use(pool, "a0", "a1")
    for ids, planned in ((["a0", "a1"], 2), (torch.tensor([0, 1]), 200)):
        with contextlib.ExitStack() as held:
            source: Any = pool.routing(ids, None, False, held).source
            assert source.tables.max_rank == planned


def test_patterns_in_a_pool_mean_what_they_mean_in_peft(root: Path) -> None:
    """Ranks, alphas, targets and layers by expressions, lookahead included."""
    peft = pytest.importorskip("peft")
    fields = {
        "target_modules": r"^layers\.\d\.(?!v)[qv]$|.*\.1\.v",
        "rank_pattern": {r"(?:0|2)\.q": 3, "layers.1.v": 1},
        "alpha_pattern": {r".*\.q": 24, "v": 5},
    }
    theirs = peft.get_peft_model(Blocks(), peft.LoraConfig(r=2, lora_alpha=4, **fields))
    theirs.save_pretrained(root / "expressions")
    pool = make_pool(root)
    with pool.lease(["expressions"]) as lease:
        for index, module in enumerate(pool.modules):
            layer = theirs.base_model.model.get_submodule(module.name)
            found = lease.loaded_adapters[0].factors(index)
            assert (found is None) == (not hasattr(layer, "scaling")), module.name
            if found is not None:
                assert torch.equal(found.lora_a, layer.lora_A["default"].weight)
                assert found.scaling == layer.scaling["default"]


@pytest.mark.parametrize("damage", ["no weights", "full copies", "biases", "rank"])
def test_registering_checks_what_needs_no_tensors(root: Path, damage: str) -> None:
    spoil, message = DAMAGE[damage]
    spoil(root / "a5")
    pool = AdapterPool(Blocks(), target_modules=["q", "v"], max_rank=8)
    with pytest.raises(CheckpointError, match=message):
        pool.register_folder(root)
    assert pool.names == []
    with pytest.raises(CheckpointError, match=message):
        pool.register("x", root / "a5")
    assert pool.names == []


def test_state_dicts_are_checked_too(root: Path) -> None:
    pool = AdapterPool(Blocks(), target_modules=["q"])
    config = LoraConfig(r=2, target_modules=["q"])
    good = make_tensors(config, 0, [f"layers.{i}.q" for i in range(3)])
    magnitude = {f"{Q0}.lora_magnitude_vector": torch.ones(14)}
    for tensors, message in [
        ({}, "no LoRA factors"),
        (good | magnitude, "use_dora=False"),
        ({k: v.long() for k, v in good.items()}, "int64"),
        ({k: v.numpy() for k, v in good.items()}, "expected a tensor"),
        ({k: v.to("meta") for k, v in good.items()}, "meta"),
        ({k: v.to_sparse() for k, v in good.items()}, "sparse"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            pool.load("a", tensors, config=config)
    assert pool.names == []
    pool.load("a", {k: v.requires_grad_() for k, v in good.items()}, config=config)


def test_dora_where_a_weight_cannot_be_read(root: Path) -> None:
    """The norm needs the base weight; the pool is as it was."""
    model = Blocks()
    model.layers[0].q = nn.Identity()
    model.layers[0].q.in_features, model.layers[0].q.out_features = 10, 14
    pool = AdapterPool(model, target_modules=["q", "v"])
    folder = make_folder(root.parent / "dora", 1, use_dora=True)
    with pytest.raises(CheckpointError, match=r"'layers.0.q': DoRA needs the base weight"):
        pool.load("a", folder)
    assert pool.names == []
    pool.load("b", make_folder(root.parent / "v", 2, target_modules=["v"], use_dora=True))


def test_names_are_checked(root: Path) -> None:
    pool = make_pool(root)
    with pytest.raises(AdapterNotFoundError, match=r"'a9' among the 8.*close names: a\d"):
        pool.lease(["a0", "a9"])
    for call in (pool.unload, pool.pin, pool.unpin, pool.slot_of):
        with pytest.raises(AdapterNotFoundError, match="'b'"):
            call("b")
    with pytest.raises(AdapterStateError, match="'a3' already exists"):
        pool.register("a3", root / "a3")
    with pytest.raises(AdapterStateError, match="already exists"):
        pool.register_folder(root)
    for name in ("", "__base__", 3):
        with pytest.raises(ConfigError, match="non-empty string"):
            pool.load(name, root / "a3")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="'a0'"):
        pool.lease("a0")
    with pytest.raises(TypeError, match="list of adapter names, but got 'abc'"):
        pool.prefetch("abc")
    with pytest.raises(AdapterStateError, match="'a3' already exists"):
        pool.register_folder(root / "a3")  # an adapter's own folder
    make_folder(root / "__base__", 1)
    pool = AdapterPool(Blocks(), target_modules=["q", "v"])
    with pytest.raises(ConfigError, match="__base__"):
        pool.register_folder(root)
    assert len(pool) == 0


def test_what_can_never_fit_raises(root: Path) -> None:
    pool = make_pool(root, max_adapters=3, device_bytes=2 * RANK2)
    use(pool, "a0")
    big = make_folder(root.parent / "big", 0, r=5)
    before = state(pool)
    with pytest.raises(PoolFullError, match="needs 4 adapters.*at most 3"):
        pool.lease(["a0", "a1", "a2", "a3"])
    with pytest.raises(PoolFullError, match=f"{3 * RANK2} bytes.*device_bytes={2 * RANK2}"):
        pool.lease(["a0", "a1", "a2"])
    with pytest.raises(PoolFullError, match="more than device_bytes"):
        pool.load("big", big)
    assert state(pool) == before
    pool.pin("a0")
    pool.pin("a1")
    before = state(pool)
    with pytest.raises(PoolFullError, match="2 are pinned"):
        pool.lease(["a2"])
    with pytest.raises(PoolFullError, match="cannot be pinned"):
        pool.load("a7", root / "a7", pin=True)
    with pytest.raises(PoolFullError, match="2 are pinned"):
        pool.pin("a2")
    assert state(pool) == before
    pool.load("a0", root / "a6")  # in the place of the old one
    assert pool.loaded_names == ["a1", "a0"]


def test_limits_are_checked() -> None:
    model = Blocks()
    for limits, message in [
        ({"max_adapters": 0}, "max_adapters"),
        ({"device_bytes": -1}, "device_bytes"),
        ({"cpu_bytes": 1.5}, "cpu_bytes"),
        ({"max_adapter_bytes": -1}, "max_adapter_bytes"),
        ({"max_rank": 0}, "r must be"),
        ({"dtype": torch.int8}, "int8"),
    ]:
        with pytest.raises(ConfigError, match=message):
            AdapterPool(model, target_modules=["q"], **limits)
    assert type(model.layers[0].q) is nn.Linear


class Separate(BaseTransfersToDevice):
    """A device with memory of its own, which can be full."""

    shares_memory = False
    full = False

    def upload(self, image: PackedAdapter) -> PackedAdapter:
        """Copies, unless it is full."""
        if self.full:
            raise torch.OutOfMemoryError("the device is full")
        return dataclasses.replace(image, data=image.data.clone())


@pytest.mark.parametrize("shares", [False, True])
def test_a_load_that_fails(root: Path, monkeypatch: pytest.MonkeyPatch, shares: bool) -> None:
    """The device is full, for a new name and for a swap; or its tables cannot be written."""
    device = Separate()
    device.shares_memory = shares
    monkeypatch.setattr("fastlora.pool.pool.make_transfers", lambda _: device)
    pool = make_pool(root, max_adapters=2)
    pool.load("mine", root / "a0")
    slot, before = pool.slot_of("mine"), state(pool)
    assert slot is not None
    column = pool.tables.column_of[slot].item()

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("no page-locked memory")

    for name in ("mine", "other"):
        device.full = True
        with pytest.raises(torch.OutOfMemoryError, match="device"):
            pool.load(name, root / "a1")
        device.full = False
        with monkeypatch.context() as broken:
            broken.setattr(pool.tables, "write_column", fail)
            with pytest.raises(torch.OutOfMemoryError, match="page-locked"):
                pool.load(name, root / "a1")
    assert state(pool) == before and pool.slot_of("mine") == slot
    assert pool.tables.column_of[slot].item() == column
    with pool.lease(["mine"]) as lease:
        assert same_adapter(pool, lease.loaded_adapters[0], root / "a0")
    check_pool(pool)


@pytest.mark.parametrize("name", ["a0", "a1"], ids=["swap", "new"])
def test_an_adapter_that_fails_last_leaves_the_slot(
    root: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """No slot means a column that is free, which another adapter gets next."""
    pool = make_pool(root, max_adapters=2)
    pool.load("a0", root / "a0")
    assign, calls = pool.tables.assign, []

    def fail(slot: int, column: int) -> None:
        assign(slot, column)
        calls.append(slot)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(pool.tables, "assign", fail)
    with pytest.raises(KeyboardInterrupt):
        pool.load(name, root / "a5")
    check_pool(pool)
    with pool.lease(["a0"]) as lease:
        assert same_adapter(pool, lease.loaded_adapters[0], root / "a0")


def test_a_swap_that_fails_where_leases_hold_all_columns_but_one(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old adapter acts on, and the swap works once the device has room."""
    pool = make_pool(root, max_adapters=1)
    pool.load("mine", root / "a0")
    leases = []
    for seed in (1, 2, 3, 4):  # the columns beside the slots
        leases.append(pool.lease(["mine"]))
        pool.load("mine", root / f"a{seed}")
    before = state(pool)

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("no page-locked memory")

    with monkeypatch.context() as broken:
        broken.setattr(pool.tables, "write_column", fail)
        with pytest.raises(torch.OutOfMemoryError):
            pool.load("mine", root / "a5")
    assert state(pool) == before
    check_pool(pool)
    pool.load("mine", root / "a5")
    with pool.lease(["mine"], timeout=30) as lease:
        assert same_adapter(pool, lease.loaded_adapters[0], root / "a5")
    for lease in leases:
        lease.release()
    check_pool(pool)


def test_a_close_that_raises_changes_nothing(root: Path) -> None:
    """Prefetching goes on, and the error that ends a block is the one that is raised."""
    pool = make_pool(root)
    with pool.lease(["a0"]):
        waiting = pool.prefetch(["a1", "a2"])
        with pytest.raises(AdapterStateError, match=r"the pool has active leases \(1\)"):
            pool.close()
        assert waiting.result(60) is None
        with pytest.raises(KeyError, match="mine"), pool:
            raise KeyError("mine")
        use(pool, "a3")
    for wait in (-1, float("nan"), float("inf"), "5", True):
        with pytest.raises(ConfigError, match="wait must be a non-negative number of seconds"):
            pool.close(wait=wait)  # type: ignore[arg-type]
    use(pool, "a3")
    pool.close()


def test_close_gives_back_methods_of_the_instance(root: Path) -> None:
    """Those of accelerate's hooks, say: they act below the pool's, and remain."""
    model = Blocks()
    calls: list[str] = []
    plain = model.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        calls.append("forward")
        return plain(x)

    def generate(x: torch.Tensor) -> torch.Tensor:
        calls.append("generate")
        return model(x)

    model.forward, model.generate = forward, generate
    with AdapterPool(model, max_adapters=2) as pool:
        pool.load("a", root / "a0")
        model.generate(torch.zeros(1, 2, dtype=torch.int64), adapter_names=["a"])
    assert calls == ["generate", "forward"]
    assert (model.forward, model.generate) == (forward, generate)
    with pytest.raises(RuntimeError):
        AdapterPool(model, max_adapters=2, device="nodevice")
    assert (model.forward, model.generate) == (forward, generate)


def test_functions_of_models_do_not_take_pools(root: Path) -> None:
    pool = AdapterPool(Blocks(), root=root, target_modules=["q"])
    for function in (fastlora.clear_caches, fastlora.warm_up):
        with pytest.raises(TypeError, match=r"\(\) expects a model \(an nn.Module\), got a Ada"):
            function(pool)  # type: ignore[operator]
