"""What a model keeps of sets of adapters, and for how long."""

from __future__ import annotations

import weakref

import torch

from fastlora.ops.torch.packed_choice import BatchSizeCategory
from fastlora.routing.caches import PackedAdapterSet, PackedAdapterSetsCache, cuda_stream_handle
from fastlora.weights_version import weights_versions


def test_sets_of_replaced_factors_are_dropped_together() -> None:
    """Another set may hold the memory of a factor that was replaced, too."""
    cache = PackedAdapterSetsCache()
    kept = [weakref.ref(cache.get((name,), True)) for name in "ab"]
    assert all(known() is not None for known in kept)
    weights_versions.invalidate_trainable_weights()
    cache.get(("a",), True)
    assert all(known() is None for known in kept)


def test_the_sets_that_were_used_last_stay_cached() -> None:
    cache = PackedAdapterSetsCache()
    first, second = (cache.get((name,), False) for name in "ab")
    assert cache.get(("a",), False) is first
    cache.get(("c",), False)
    assert cache.get(("a",), False) is first
    assert cache.get(("b",), False) is not second


def test_sets_that_cannot_change_hold_after_training() -> None:
    fixed, trained = PackedAdapterSet(False), PackedAdapterSet(True)
    assert fixed.is_valid() and trained.is_valid()
    weights_versions.invalidate_trainable_weights()
    assert fixed.is_valid()
    assert not trained.has_current_weights_version and not trained.is_valid()


def test_a_layer_is_packed_when_it_comes_again() -> None:
    kind, known = next(iter(BatchSizeCategory)), PackedAdapterSet(False)
    assert known.get_or_should_pack(3, torch.float32, kind) == (None, False)
    assert known.get_or_should_pack(4, torch.float32, kind) == (None, False)
    assert known.get_or_should_pack(3, torch.float32, kind) == (None, True)
    known.put(3, torch.float32, kind, None)  # its factors cannot be packed
    assert known.get_or_should_pack(3, torch.float32, kind) == (None, False)
    assert known.get_or_should_pack(4, torch.float32, kind) == (None, True)


def test_a_clear_ends_what_open_blocks_keep() -> None:
    cache = PackedAdapterSetsCache()
    known = cache.get(("a",), True)
    cache.clear()
    assert not known.has_current_weights_version
    assert cache.get(("a",), True) is not known


def test_devices_without_streams_have_the_handle_zero() -> None:
    for name in ("cpu", "meta", "xpu"):
        assert cuda_stream_handle(torch.device(name)) == 0


def test_what_a_graph_reads_stays_in_memory_until_it_is_unpinned() -> None:
    class Read:
        pass

    cache, read = PackedAdapterSetsCache(), Read()
    kept = weakref.ref(read)
    cache.keep_cuda_graph_references(read)
    del read
    cache.clear()
    assert kept() is not None
    cache.drop_cuda_graph_references()
    assert kept() is None
