"""What kernels read about a model's adapters: tables, slots, devices and dtypes."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from tests.support.kernels.mixed_models import pool_of, run, use_impl
from tests.support.tiny import with_adapters

pytest.importorskip("triton", reason="runs kernels")

import fastlora
from fastlora import adapters
from fastlora.kernels import lora_shrink
from fastlora.layers import address_tables
from fastlora.model.inject import lora_layers
from fastlora.testing import assert_within_budget
from fastlora.validation import AdapterStateError, ImplementationError


class Pair(nn.Module):
    """Two layers fed by one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(48, 32), nn.Linear(48, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[..., 48]`` to ``[..., 32]``."""
        return self.q(x) * self.k(x)


def build(lab: Any, ranks: tuple[int, ...] = (8, 4)) -> Any:
    """Random adapters ``a0``, ``a1``, ... in fp32, on the kernels."""
    torch.manual_seed(0)
    fields = {"target_modules": ["q", "k"], "init_lora_weights": False}
    configs = {f"a{i}": fastlora.LoraConfig(r=rank, **fields) for i, rank in enumerate(ranks)}
    return use_impl(with_adapters(Pair(), configs), "triton").to(lab.device).eval()


def shrinks(model: Any, x: torch.Tensor) -> list[int]:
    """Of how many layers each shrink of a forward is whose siblings are known."""
    for _ in range(2):
        run(model, x, ["a0", "a1"])
    launch = lora_shrink.launch_mixed_lora_shrink
    with mock.patch.object(lora_shrink, "launch_mixed_lora_shrink", wraps=launch) as shrink:
        run(model, x, ["a0", "a1"])
    return [call.args[0].shape[1] for call in shrink.call_args_list]


def test_inference_mode_shares_where_nobody_was_seen_to_write(lab: Any) -> None:
    """Writes are not counted there; a forward where they are has shown that there are none."""
    model, x = build(lab), torch.randn(2, 48, device=lab.device)
    assert shrinks(model, x) == [2]
    with torch.inference_mode():
        assert shrinks(model, x.clone()) == [2]
    model.base_model.model.q._shared_input_group.unwritten = False
    with torch.inference_mode():
        assert shrinks(model, x.clone()) == [1, 1]  # q's and k's, neither of them for both


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_neighbors_of_another_dtype_change_nothing(lab: Any, dtype: torch.dtype) -> None:
    """An adapter beside one whose factors are in 16 bits keeps its own in fp32."""
    model, x = build(lab, (8, 8)), torch.randn(4, 48, device=lab.device)
    names = ["a1", "a0", "a1", None]
    own = [0, 2]
    alone = run(model, x[own], ["a1", "a1"])
    truth = copy.deepcopy(model).double()
    use_impl(truth, "eager")
    exact = run(truth, x[own].double(), ["a1", "a1"])
    for layer in lora_layers(model).values():
        for factors in (layer.lora_A, layer.lora_B):
            factors["a0"].to(dtype)
    assert_within_budget(run(model, x, names)[own], alone, exact)


def test_a_factor_on_another_device_never_reaches_a_kernel(lab: Any) -> None:
    """Its address would mean nothing there."""
    model, x = build(lab), torch.randn(2, 48, device=lab.device)
    model.base_model.model.q.lora_A["a0"].to_empty(device="meta")
    patched = mock.patch.object(lora_shrink, "launch_mixed_lora_shrink")
    with patched as shrink, pytest.raises(Exception) as caught:
        run(model, x, ["a0", "a1"])
    assert not shrink.called
    assert isinstance(caught.value, (ValueError, ImplementationError)), caught.value
    assert "lora_a" in str(caught.value)


class Chain(nn.Module):
    """k, q and v in sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.q, self.v = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[..., 32]`` to ``[..., 32]``."""
        return self.v(self.q(self.k(x)).sin())


def test_layers_adapted_within_a_block(lab: Any) -> None:
    """A layer in front of all others moves nobody's row in tables that open blocks read."""
    torch.manual_seed(0)

    def config(*targets: str) -> fastlora.LoraConfig:
        return fastlora.LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False)

    model = fastlora.get_peft_model(Chain().to(lab.device), config("q", "v"), "a").eval()
    model.add_adapter("b", config("q", "v"))
    x, ids = torch.randn(4, 32, device=lab.device), ["a", "b", None, "b"]

    def on_kernels() -> None:
        model.eval()
        use_impl(model, "triton")

    on_kernels()
    with torch.no_grad(), adapters(model, ids):
        before = model(x)
        model.add_adapter("c", config("k", "v"))
        on_kernels()
        within = [model(x)]
        with adapters(model, ["c"] * 4):
            assert not torch.allclose(model(x), before)
        within.append(model(x))
    with fastlora.batch_invariant():
        invariant = run(model, x, ids)
    for found in (*within, run(model, x, ids), invariant):
        torch.testing.assert_close(found, before)


def test_forwards_of_other_rows_in_one_block(lab: Any) -> None:
    """Where a layer's factors lie is kept for the rows of the forward that found it."""
    model, names = build(lab), ["a0", None, "a1"]
    inputs = [torch.randn(3, tokens, 48, device=lab.device) for tokens in (1, 5, 2, 5)]
    expected = [run(model, x, names) for x in inputs]
    with torch.no_grad(), adapters(model, names):
        for x, y in zip(inputs, expected, strict=True):
            torch.testing.assert_close(model(x), y)


def test_slots_are_looked_up_on_the_device(lab: Any) -> None:
    """As a captured graph does at every replay: swaps, evictions and wrong slots."""
    model = build(lab, (8, 4, 2))
    _, pool, states = pool_of(model, "q", "k", max_adapters=3)
    slots = torch.tensor([pool.slot_of(f"a{i}") for i in (2, 0, 1)] + [-1, 3, -5]).to(lab.device)

    def columns() -> dict[str, int]:
        with pool.lease_loaded() as lease:
            return {resident.name: resident.column for resident in lease.loaded_adapters}

    found = pool.tables.columns_of_slots(slots).tolist()
    assert found == [columns()[f"a{i}"] for i in (2, 0, 1)] + [-1, -2, -2]
    with pool.lease(["a0"]):  # so that the new factors cannot take the old ones' column
        pool.load("a0", states["a0"], config=model.peft_config["a0"])
        moved = pool.tables.columns_of_slots(slots).tolist()
    assert moved[1] != found[1] and moved[1] == columns()["a0"]
    assert (moved[0], moved[2]) == (found[0], found[2])
    pool.unload("a1")
    assert pool.tables.columns_of_slots(slots).tolist()[2] == -2


def test_a_captured_pool_needs_its_largest_rank(lab: Any) -> None:
    """Buffers of a graph are as large as the pool says."""
    model = build(lab)
    _, pool, _ = pool_of(model, "q", "k")
    ids = torch.zeros(2, dtype=torch.int64, device=lab.device)
    with (
        mock.patch.object(fastlora.pool.router, "is_capturing_cuda_graph", lambda _: True),
        pytest.raises(AdapterStateError, match="max_rank"),
        adapters(pool, ids),
    ):
        pass


def test_a_captured_block_is_the_block(lab: Any) -> None:
    """What a capture records computes the rows that an ordinary block does."""
    model = build(lab)
    base, pool, _ = pool_of(model, "q", "k", max_rank=16)
    ids = torch.tensor([pool.slot_of("a1"), -1, pool.slot_of("a0")]).to(lab.device)
    x = torch.randn(3, 48, device=lab.device)
    for target, slots in ((base, ids), (model, torch.tensor([1, -1, 0]).to(lab.device))):
        expected = run(target, x, slots)
        with (
            mock.patch.object(fastlora.routing.block, "is_capturing_cuda_graph", lambda _: True),
            mock.patch.object(fastlora.pool.router, "is_capturing_cuda_graph", lambda _: True),
        ):
            assert torch.equal(run(target, x, slots), expected)


def test_tables_end_with_what_they_were_made_from(lab: Any) -> None:
    """A fused step moves no version, nor does a write before eval(): lora_b is copied anew."""
    model = build(lab)
    x, names = torch.randn(3, 48, device=lab.device), ["a1", None, "a0"]
    up = model.base_model.model.q.lora_B["a1"].weight
    up.requires_grad_(True).grad = torch.ones_like(up)
    step = torch.optim.SGD([up], lr=0.5, fused=True).step
    for write in (step, lambda: up.data.mul_(3)):
        before, version = run(model, x, names), up._version
        if write is not step:
            model.train()
        write()
        model.eval()
        assert up._version == version
        expected = run(copy.deepcopy(model), x, names)
        assert torch.equal(run(model, x, names), expected)
        assert not torch.equal(before[0], expected[0])


def tables_of(model: Any, x: torch.Tensor, ids: Any) -> list[weakref.ref[torch.Tensor]]:
    """What a forward's kernels read of the adapters: tables, and the factors behind addresses."""
    run(model, x, ids)
    sets = model.base_model.group.packs._sets.values()
    (tables,) = (kept.tables for kept in sets if kept.tables is not None)
    return [weakref.ref(t) for t in (*tables[:5], *tables.keepalive)]


def test_what_a_captured_graph_reads_stays(lab: Any) -> None:
    """Its replays find tables and copies of lora_b at their addresses, whatever comes meanwhile.

    Without a capture they go with the next sets of adapters.
    """
    x, slots = torch.randn(3, 48, device=lab.device), torch.tensor([1, -1, 0]).to(lab.device)
    for captured in (False, True):
        model = build(lab, (8, 4, 2))
        if captured:
            with (
                mock.patch.object(
                    fastlora.routing.block, "is_capturing_cuda_graph", lambda _: True
                ),
                mock.patch.object(address_tables, "is_capturing_cuda_graph", lambda _: True),
            ):
                read = tables_of(model, x, slots)
        else:
            read = tables_of(model, x, slots)
        for names in (["a0", "a1", "a0"], ["a1", "a2", "a1"], ["a2", "a0", "a0"]):
            run(model, x, names)
        with adapters(model, ["a0", "a1", None]):
            model.train()(x.clone().requires_grad_()).sum().backward()
        model.eval()
        run(model, x, slots)
        gc.collect()
        assert all(reference() is not None for reference in read) == captured
        fastlora.clear_caches(model)
        gc.collect()
        assert not any(reference() is not None for reference in read)
