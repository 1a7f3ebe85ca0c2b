"""Dropout seeds: one is drawn per adapter of a batch, from which the layers' seeds are derived.

A layer's seed is a SplitMix64 step from the adapter's seed. The masks of the layers are therefore
independent, and one number determines them all (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014). If a layer is called several times in one block, each
call has its own masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

SEED_BITS = 62
_INCREMENT = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
# Larger than the number of any layer, so that no call has the seeds of a layer.
_CALLS = 2**40


@torch.inference_mode(False)  # Missing seeds are written into the result later.
def draw_seeds(
    names: Sequence[str], given: Mapping[str, int] | None, *, draw: bool = True
) -> torch.Tensor:
    """Draw a random dropout seed for each adapter whose seed is not given.

    The result contains one seed per adapter, given or drawn. It is an int64 tensor ``[S]`` on the
    CPU.

    Args:
        names: Names of the batch's adapters.
        given: Seeds of some adapters by name. The other seeds are drawn from torch's default
            generator.
        draw: Whether dropout can be active. If False, nothing is drawn, and seeds that are not
            given are 0.

    Raises:
        TypeError: ``given`` is not a mapping to integers.
    """
    chosen = {} if given is None else given
    if not isinstance(chosen, Mapping):
        raise TypeError(f"seeds is a {type(given).__name__}, expected a mapping from names to ints")
    for given_name, seed in chosen.items():
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"the seed of {given_name!r} is {seed!r}, expected an int")
    seeds = torch.zeros(len(names), dtype=torch.int64, device="cpu")
    if draw and names:
        seeds = torch.randint(0, 2**SEED_BITS, (len(names),), device="cpu")
    for slot, name in enumerate(names):
        if name in chosen:
            seeds[slot] = _wrap_to_int64(chosen[name])
    return seeds


def dropout_seeds_of_layers(adapter_seeds: torch.Tensor, layers: Sequence[int]) -> torch.Tensor:
    """Return the dropout seeds of each layer, derived from the adapters' seeds.

    For L layers and S adapters, the result is an int64 tensor ``[L, S]``. ``layers`` contains the
    numbers of the layers.
    """
    steps = [_wrap_to_int64((number + 1) * _INCREMENT) for number in layers]
    steps_of = torch.tensor(steps, dtype=torch.int64, device=adapter_seeds.device)
    return _mixed_bits(adapter_seeds[None, :] + steps_of[:, None])  # wraps around at 64 bits


def derive_seeds_of_layer(adapter_seeds: torch.Tensor, layer: int) -> torch.Tensor:
    """Derive a layer's dropout seeds from the adapters' seeds.

    For S adapters, the result is an int64 tensor ``[S]``. See `dropout_seeds_of_layers`.
    """
    return _mixed_bits(adapter_seeds + _wrap_to_int64((layer + 1) * _INCREMENT))


def derive_seeds_of_call(adapter_seeds: torch.Tensor, call_number: int) -> torch.Tensor:
    """Derive the adapters' seeds for the calls of layers that have the given number.

    ``call_number`` says how many calls of the layer came before in the block. The first calls,
    whose number is 0, use ``adapter_seeds`` themselves.
    """
    if call_number == 0:
        return adapter_seeds
    return derive_seeds_of_layer(adapter_seeds, _CALLS + call_number)


def _wrap_to_int64(value: int) -> int:
    """Wrap an integer to the range of a signed 64-bit integer.

    The result consists of the low 64 bits of ``value``.
    """
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def _mixed_bits(z: torch.Tensor) -> torch.Tensor:
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        z = (z ^ _logical_shift_right(z, shift)) * _wrap_to_int64(multiplier)
    return _logical_shift_right(z ^ _logical_shift_right(z, 31), 64 - SEED_BITS)


def _logical_shift_right(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift the int64 tensor z right by ``bits`` bits, filling with zeros."""
    return (z >> bits) & (2 ** (64 - bits) - 1)
