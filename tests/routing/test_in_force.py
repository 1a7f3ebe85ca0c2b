"""What is in force in a block, and which batches fit it."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastlora import adapters
from fastlora.ops.rows import INVALID_SLOT, NO_SLOT
from fastlora.routing import active, block
from fastlora.routing.caches import RoutingCache
from fastlora.routing.routing import RoutedLayerGroup, layer_numbers_from_name_hashes
from fastlora.validation import (
    AdapterNotFoundError,
    AdapterStateError,
    UnsupportedLayerError,
)
from tests.support.row_checks import D, ours


def _model() -> Any:
    return ours(nn.Sequential(nn.Linear(D, D)), ("0",))


@pytest.mark.parametrize(
    ("shape", "per_sample", "fits"),
    [
        ((2, 3, D), False, True),
        ((2, 3, D), True, True),
        ((1, 2, D), False, True),
        ((1, 2, D), True, False),
        ((3, D), False, False),
        ((2, 3, 0), False, True),
        ((2, 0, D), True, True),
        ((), False, True),
    ],
)
def test_a_batch_has_an_id_for_each_sample_or_token(
    shape: tuple[int, ...], per_sample: bool, fits: bool
) -> None:
    """To generate, for each sample: later tokens have no ids of their own."""
    model = _model()
    group = model.base_model.group
    x = torch.empty(shape)
    with adapters(model, ["a", "b"]):
        wrong = nullcontext() if fits else pytest.raises(ValueError, match="2 adapter ids")
        with wrong:
            active.check_batch_matches_ids(group, (x,), {}, per_sample=per_sample)
        with wrong:
            active.check_batch_matches_ids(group, (), {"input_ids": x}, per_sample=per_sample)
        with active.skip_batch_size_check():
            active.check_batch_matches_ids(group, (x,), {}, per_sample=per_sample)
        active.check_batch_matches_ids(RoutedLayerGroup(), (torch.empty(7, D),), {})
    active.check_batch_matches_ids(group, (torch.empty(7, D),), {})


def test_samples_without_tokens_have_ids_to_generate() -> None:
    model = _model()
    group, x = model.base_model.group, torch.empty(2, 0, D)
    with adapters(model, []):
        active.check_batch_matches_ids(group, (x,), {})
        with pytest.raises(ValueError, match="2 samples and 0 adapter ids"):
            active.check_batch_matches_ids(group, (x,), {}, per_sample=True)


def test_a_later_block_is_told_of_an_id_out_of_range() -> None:
    """The message has the first 20 names of any number."""
    model, names = _model(), tuple(f"n{slot:02}" for slot in range(25))
    with adapters(model, ["a", "b"]):
        (routing,) = active.active_routings()
        for ids, invalid in (([0, 1], False), ([0, -2], True)):
            routing = dataclasses.replace(
                routing, names=names, ids=torch.tensor(ids), cache=RoutingCache()
            )
            routing.sorted_rows(4, torch.device("cpu"))
            routing.defer_id_check()
            wrong = pytest.raises(AdapterNotFoundError, match=r"in an earlier block.*'n19'\]")
            with wrong if invalid else nullcontext():
                routing.group.unchecked.raise_pending_errors()


def test_ids_are_checked_where_the_host_reads_rows() -> None:
    cpu = torch.device("cpu")
    with adapters(_model(), ["a", "b"]):
        (routing,) = active.active_routings()
    for ids, invalid in (([0, 1], False), ([0, -2], True)):
        routing = dataclasses.replace(routing, ids=torch.tensor(ids), cache=RoutingCache())
        routing.sorted_rows(4, cpu)
        wrong = pytest.raises(AdapterNotFoundError, match="^an adapter id is out of range")
        with wrong if invalid else nullcontext():
            routing.sorted_rows(4, cpu, check_ids_now=True)


def test_slots_that_nobody_checks_and_that_do_not_exist_are_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As of ids that a captured graph reads."""
    monkeypatch.setattr(block, "is_capturing_cuda_graph", lambda ids: True)
    with adapters(_model(), torch.tensor([1, 7, -1, -5], dtype=torch.int32)):
        (routing,) = active.active_routings()
    rows = routing.sorted_rows(4, torch.device("cpu"))
    assert routing.ids.tolist() == [1, INVALID_SLOT, NO_SLOT, INVALID_SLOT]
    assert rows.used_slots == (1,) and rows.invalid.item()


@pytest.mark.parametrize(
    ("ids", "may_see_partial_rows", "compiling", "raises"),
    [
        (["a", "b"], False, False, False),
        (["a", "b"], False, True, False),
        (["a", "b"], True, False, True),
        (["a"], True, False, False),
        (["a"], True, True, True),
    ],
)
def test_an_expert_raises_where_rows_are_not_followed(
    ids: list[str], may_see_partial_rows: bool, compiling: bool, raises: bool
) -> None:
    model = _model()
    layer = model.base_model.model[0]
    layer.may_see_partial_rows = may_see_partial_rows
    with adapters(model, ids):
        (routing,) = active.active_routings()
    routing.cache.row_checker = None
    wrong = pytest.raises(UnsupportedLayerError, match="layer '0' looks like an expert")
    with wrong if raises else nullcontext():
        routing.check_gets_all_rows(layer, torch.ones(2, D), compiling)


def test_rows_are_followed_until_every_layer_has_run() -> None:
    model, x = _model(), torch.ones(2, D)
    assert not active.is_checking_rows()
    for followed in (True, False):
        with torch.no_grad(), adapters(model, ["a", "b"]):
            assert active.is_checking_rows() is followed
            model(x)


def test_no_block_begins_over_merged_weights() -> None:
    model = _model()
    model.merge_adapter()
    with (
        pytest.raises(AdapterStateError, match="merged into the base weights"),
        adapters(model, []),
    ):
        pass
    model.unmerge_adapter()
    with adapters(model, ["b"]):
        assert active.active_routings()


def test_tasks_do_not_get_the_blocks_of_others() -> None:
    """A task that comes between raises, however it calls the model; child tasks see the block."""
    model = _model()
    x = torch.randn(2, D)
    layer = model.base_model.model[0]

    async def run(ids: list[str], *, then: Any = None) -> torch.Tensor:
        with torch.no_grad(), adapters(model, ids):
            await asyncio.sleep(0)
            if then is not None:
                await then()
            return model(x)

    async def call(function: Any) -> torch.Tensor:
        return function(x)

    async def together(*coroutines: Any) -> list[Any]:
        return await asyncio.gather(*coroutines, return_exceptions=True)

    expected = asyncio.run(run(["a", "b"]))
    others = [
        lambda: run(["b", "b"]),
        lambda: call(model),
        lambda: call(layer),
        lambda: call(lambda x: checkpoint(model, x, use_reentrant=True)),
    ]
    for other in others:
        found, error = asyncio.run(together(run(["a", "b"]), other()))
        torch.testing.assert_close(found, expected)
        assert isinstance(error, RuntimeError) and "another asyncio task" in str(error)
    children: list[torch.Tensor] = []

    async def child() -> None:
        children.append(await asyncio.create_task(call(model)))

    asyncio.run(run(["a", "b"], then=child))
    torch.testing.assert_close(children[0], expected)


def test_tasks_that_have_ended_leave_their_blocks() -> None:
    """As fixtures and cells do, whose next part runs in a task of its own."""
    model = _model()
    x = torch.randn(2, D)
    opened = adapters(model, ["a", "b"])

    async def enter() -> None:
        opened.__enter__()

    async def call() -> torch.Tensor:
        return model(x)

    with adapters(model, ["a", "b"]):
        expected = model(x)
    asyncio.run(enter())
    torch.testing.assert_close(asyncio.run(call()), expected)
    torch.testing.assert_close(model(x), expected)
    opened.__exit__(None, None, None)
    assert not active.active_routings() and not active._thread.task_blocks


def test_blocks_end_in_the_reverse_order() -> None:
    model = _model()
    first, second = adapters(model, ["a"]), adapters(model, ["b"])
    first.__enter__()
    second.__enter__()
    with pytest.raises(RuntimeError, match="reverse of the order"):
        first.__exit__(None, None, None)
    assert [routing.names for routing in active.active_routings()] == [("b",)]
    second.__exit__(None, None, None)
    assert not active.active_routings()


def test_a_forward_ends_what_it_made_for_layers_that_were_not_called() -> None:
    class Results:
        is_discarded = False

        def discard_untaken(self) -> None:
            self.is_discarded = True

    group, own, others = RoutedLayerGroup(), Results(), Results()
    thread = threading.get_ident()
    group.unfinished = {(thread, 0, 1): own, (thread + 1, 0, 1): others}
    active.discard_unused_results(group)
    assert own.is_discarded and not others.is_discarded
    assert list(group.unfinished.values()) == [others]


def test_a_block_knows_its_slots_among_all_adapters() -> None:
    """Compiled graphs read those, so that another mix of adapters is other contents."""
    model = ours(nn.Sequential(nn.Linear(D, D)), ("0",))
    for ids, names, slots, among in (
        (["b", None], ("b",), [0, -1], [1, -1]),
        (["b", "a"], ("a", "b"), [1, 0], [1, 0]),
        ([None, None], (), [-1, -1], [-1, -1]),
    ):
        with adapters(model, ids):
            (routing,) = active.active_routings()
        assert routing.names == names and routing.ids.tolist() == slots
        assert routing.whole is not None and routing.whole.names == ("a", "b")
        assert routing.whole.ids.tolist() == among
        assert len(routing.whole.seeds) == 2


def test_layers_have_numbers_of_their_own() -> None:
    first, second = layer_numbers_from_name_hashes(["q", "v"])
    assert first != second and layer_numbers_from_name_hashes(["v"]) == [second]
    assert layer_numbers_from_name_hashes(["q", "v"], [first, second]) == [first + 1, second + 1]
    assert layer_numbers_from_name_hashes(["q"], [first, first + 1]) == [first + 2]
