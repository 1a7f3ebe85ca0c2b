"""Seeds of dropout: layers' against SplitMix64 in Python's integers; given and drawn ones."""

from __future__ import annotations

import pytest
import torch

from fastlora.ops.seeds import (
    derive_seeds_of_call,
    derive_seeds_of_layer,
    draw_seeds,
    dropout_seeds_of_layers,
)

MASK = 2**64 - 1


def splitmix(seed: int, layer: int) -> int:
    """The top 62 bits of the step after ``layer`` steps from a seed."""
    z = (seed + (layer + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return (z ^ (z >> 31)) >> 2


def test_layers_seeds_are_splitmix64() -> None:
    """All layers' at once, and one layer's."""
    seeds, layers = (0, 7, 2**62 - 1, 123456789), (0, 3, 2**32 - 1)
    given = torch.tensor(seeds)
    expected = [[splitmix(seed, layer) for seed in seeds] for layer in layers]
    assert dropout_seeds_of_layers(given, layers).tolist() == expected
    assert [derive_seeds_of_layer(given, layer).tolist() for layer in layers] == expected


def test_calls_of_layers_have_their_own_seeds() -> None:
    """A layer's first call has the seeds that it always had."""
    given, layers = torch.tensor([0, 7]), (0, 3, 2**32 - 1)
    assert derive_seeds_of_call(given, 0) is given
    calls = [dropout_seeds_of_layers(derive_seeds_of_call(given, n), layers) for n in range(4)]
    assert torch.cat(calls).unique().numel() == 4 * 3 * 2


def test_given_seeds_are_taken_and_others_drawn() -> None:
    """What is given moves nothing of what is drawn; wide and negative numbers wrap."""
    torch.manual_seed(0)
    drawn = draw_seeds(("a", "b", "c"), None)
    torch.manual_seed(0)
    mixed = draw_seeds(("a", "b", "c"), {"b": 5, "c": -1, "other": 3})
    assert mixed.tolist() == [drawn[0].item(), 5, -1]
    assert draw_seeds(("a",), {"a": 2**64 + 9}).tolist() == [9]
    before = torch.get_rng_state()
    assert draw_seeds(("a", "b"), {"b": 4}, draw=False).tolist() == [0, 4]
    assert torch.equal(torch.get_rng_state(), before)


def test_odd_seeds_are_named() -> None:
    for given, message in (
        ([1], "seeds is a list"),
        ({"a": True}, "'a' is True"),
        ({"a": 1.0}, "1.0"),
    ):
        with pytest.raises(TypeError, match=message):
            draw_seeds(("a",), given)
