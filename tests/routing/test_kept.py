"""What a model keeps of sets of adapters, and for how long."""

from __future__ import annotations

import weakref

import torch

from fastlora.ops.torch.packed_choice import RowsKind
from fastlora.routing.kept import PackCache, SetPack
from fastlora.weight_marks import marks


def test_sets_of_replaced_factors_are_dropped_together() -> None:
    """Another set may hold the memory of a factor that was replaced, too."""
    cache = PackCache()
    kept = [weakref.ref(cache.get((name,), True)) for name in "ab"]
    assert all(known() is not None for known in kept)
    marks.end_trained()
    cache.get(("a",), True)
    assert all(known() is None for known in kept)


def test_the_sets_that_were_used_last_are_kept() -> None:
    cache = PackCache()
    first, second = (cache.get((name,), False) for name in "ab")
    assert cache.get(("a",), False) is first
    cache.get(("c",), False)
    assert cache.get(("a",), False) is first
    assert cache.get(("b",), False) is not second


def test_sets_that_cannot_change_hold_after_training() -> None:
    fixed, trained = SetPack(False), SetPack(True)
    assert fixed.holds() and trained.holds()
    marks.end_trained()
    assert fixed.holds()
    assert not trained.may_hold and not trained.holds()


def test_a_layer_is_packed_when_it_comes_again() -> None:
    kind, known = next(iter(RowsKind)), SetPack(False)
    assert known.get(3, torch.float32, kind) == (None, False)
    assert known.get(4, torch.float32, kind) == (None, False)
    assert known.get(3, torch.float32, kind) == (None, True)
    known.put(3, torch.float32, kind, None)  # its factors cannot be packed
    assert known.get(3, torch.float32, kind) == (None, False)
    assert known.get(4, torch.float32, kind) == (None, True)


def test_a_clear_ends_what_open_blocks_keep() -> None:
    cache = PackCache()
    known = cache.get(("a",), True)
    cache.clear()
    assert not known.may_hold
    assert cache.get(("a",), True) is not known


def test_what_a_graph_reads_is_kept_until_it_is_unpinned() -> None:
    class Read:
        pass

    cache, read = PackCache(), Read()
    kept = weakref.ref(read)
    cache.pin(read)
    del read
    cache.clear()
    assert kept() is not None
    cache.unpin()
    assert kept() is None
