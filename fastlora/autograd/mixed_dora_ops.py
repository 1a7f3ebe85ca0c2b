"""DoRA rows whose dropout acts, in a compiled graph: an operator each way that finds them by id.

What one adapter computes is `fastlora.autograd.dora_dropped`; which rows are its own is known when
the graph runs, so that the graph serves any mix. Both base products are of these rows alone. An
adapter without rows gets zeros as gradients.

Shapes: ``x [..., K]``, ``weight [N, K]``, ``y [..., N]``, ids and seeds int64 ``[B]`` and ``[S]``;
of each of the D adapters ``lora_a [R, K]``, ``lora_b [N, R]``, magnitude and squares ``[N]``, and
``scaling [D]``. ``slots`` has the number in ids of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from fastlora.autograd.dora_dropped import Dropped, Wanted, forward_rows, gradients
from fastlora.autograd.linear import plain_backward
from fastlora.ops.rows import sort_rows
from fastlora.ops.schema import composes, define, fakes, implements

_ADAPTERS = "Tensor[] lora_a, Tensor[] lora_b, Tensor[] magnitude, Tensor[] squares, Tensor scaling"
_BATCH = "Tensor ids, Tensor seeds, int[] slots, float[] dropout_p, str impl"
# They read on the host how many rows each adapter has: a CUDA graph cannot hold that.
_TAGS = (torch.Tag.cudagraph_unsafe,)
define(
    f"mixed_dora_dropped(Tensor y, Tensor x, Tensor weight, {_ADAPTERS}, {_BATCH}, bool keeps_z)"
    " -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
define(
    f"mixed_dora_dropped_backward(Tensor dy, Tensor x, Tensor weight, {_ADAPTERS}, {_BATCH},"
    " Tensor s, Tensor z, bool[] wanted) -> Tensor[]",
    tags=_TAGS,
)
define(
    f"mixed_dora_graph_dropped(Tensor y, Tensor x, Tensor weight, {_ADAPTERS}, {_BATCH}) -> Tensor"
)


class _Own(NamedTuple):
    """An adapter that has rows: its place among the D, and theirs in x and in s and z."""

    place: int
    rows: torch.Tensor
    part: slice
    adapter: Dropped


def _owners(
    x: torch.Tensor,
    lora_a: list[torch.Tensor],
    lora_b: list[torch.Tensor],
    magnitude: list[torch.Tensor],
    squares: list[torch.Tensor],
    scaling: torch.Tensor,
    ids: torch.Tensor,
    seeds: torch.Tensor,
    slots: list[int],
    dropout_p: list[float],
    impl: str,
) -> Iterator[_Own]:
    batch = sort_rows(ids, x.shape[0], seeds.shape[0])
    segment_of = {segment.slot: segment for segment in batch.segments}
    for place, slot in enumerate(slots):
        if slot in segment_of:
            _, start, stop = segment_of[slot]
            seed = seeds[slot : slot + 1].to(x.device if impl == "triton" else "cpu")
            adapter = Dropped(
                *(lora_a[place], lora_b[place], magnitude[place], squares[place], scaling[place]),
                *(seed, dropout_p[place], impl),
            )
            rows = batch.order[start:stop].long().to(x.device)
            yield _Own(place, rows, slice(start, stop), adapter)


@implements("mixed_dora_dropped")
def _mixed_dora_dropped(
    y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *batch: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns y with the adapters' rows added, and their s and z in the order of sorted rows."""
    *own_batch, keeps_z = batch
    y = y.clone(memory_format=torch.contiguous_format)
    s, z = _saved(y, x, batch[0], keeps_z)
    for own in _owners(x, *own_batch):
        base, rows = y[own.rows], x[own.rows]
        made = forward_rows(base, rows, weight, None, own.adapter, inplace=True)
        y[own.rows] = made.y
        s[own.part, : made.s.shape[1]] = made.s
        if keeps_z:
            z[own.part] = made.z
    return y, s, z


def _saved(
    y: torch.Tensor, x: torch.Tensor, lora_a: list[torch.Tensor], keeps_z: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns memory for s and z, of which only the adapters' rows are ever touched."""
    rank = max(a.shape[0] for a in lora_a)
    return x.new_empty(x.shape[0], rank), x.new_empty(x.shape[0] if keeps_z else 0, y.shape[1])


@fakes("mixed_dora_dropped")
def _(
    y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *batch: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return y.new_empty(y.shape), *_saved(y, x, batch[0], batch[-1])


@implements("mixed_dora_dropped_backward")
def _mixed_dora_dropped_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *batch: Any
) -> list[torch.Tensor]:
    """Returns the gradients of x, the weight, and three of each adapter in turn; see `_results`."""
    *own_batch, s, z, wanted = batch
    found = _results(x, weight, batch, wanted)
    for tensor in found:
        tensor.zero_()
    for own in _owners(x, *own_batch):
        at = 2 + 3 * own.place
        own_s = s[own.part, : own.adapter.lora_a.shape[0]]
        own_z = z[own.part] if z.shape[0] else None
        asked = Wanted(*wanted[:2], *wanted[at : at + 3])
        got = gradients(
            *(dy[own.rows], x[own.rows], weight, own.adapter, own_s, own_z, asked),
            own_base=False,
        )
        if got.x is not None:
            found[0][own.rows] = got.x
        if got.weight is not None:
            found[1] += got.weight
        for offset, gradient in enumerate(got[2:]):
            if gradient is not None:
                found[at + offset].copy_(gradient)
    return found


def _results(
    x: torch.Tensor, weight: torch.Tensor, batch: Any, wanted: list[bool]
) -> list[torch.Tensor]:
    """Returns memory for every gradient, of no element where it is not wanted."""
    lora_a, lora_b, magnitude = batch[:3]
    like = [x, weight]
    for adapter in zip(lora_a, lora_b, magnitude, strict=True):
        like += adapter
    return [
        tensor.new_empty(tensor.shape if asked else (0,))
        for tensor, asked in zip(like, wanted, strict=True)
    ]


@fakes("mixed_dora_dropped_backward")
def _(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *batch: Any) -> list[torch.Tensor]:
    return _results(x, weight, batch, batch[-1])


class _MixedDoraDropped(torch.autograd.Function):
    """Saves x, the parameters, s, and z where a magnitude wants a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        batch: tuple[Any, ...],
        ids: torch.Tensor,
        seeds: torch.Tensor,
        squares: list[torch.Tensor],
        scaling: torch.Tensor,
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        """``factors`` holds lora_a, lora_b and the magnitude of each adapter in turn."""
        needs = ctx.needs_input_grad
        wanted = [*needs[1:3], *needs[8:]]
        args = factors[::3], factors[1::3], factors[2::3], squares, scaling, ids, seeds, *batch
        result, s, z = torch.ops.fastlora.mixed_dora_dropped(
            y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), weight, *args, any(wanted[4::3])
        )
        ctx.batch, ctx.wanted = batch, wanted
        ctx.save_for_backward(x, weight, ids, seeds, scaling, s, z, *squares, *factors)
        return result.view(y.shape)

    @staticmethod
    @plain_backward
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, ids, seeds, scaling, s, z, *rest = ctx.saved_tensors
        count = len(ctx.batch[0])
        squares, factors = rest[:count], rest[count:]
        args = factors[::3], factors[1::3], factors[2::3], squares, scaling, ids, seeds, *ctx.batch
        found = torch.ops.fastlora.mixed_dora_dropped_backward(
            *(grad.reshape(-1, grad.shape[-1]).to(x.dtype), x.reshape(-1, x.shape[-1]), weight),
            *(*args, s, z, ctx.wanted),
        )
        dx, d_weight, *d_factors = (
            gradient if asked else None for gradient, asked in zip(found, ctx.wanted, strict=True)
        )
        dx = None if dx is None else dx.view(x.shape)
        return grad, dx, d_weight, None, None, None, None, None, *d_factors


@composes("mixed_dora_graph_dropped")
def _mixed_dora_graph_dropped(
    y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: list[torch.Tensor],
    lora_b: list[torch.Tensor],
    magnitude: list[torch.Tensor],
    squares: list[torch.Tensor],
    scaling: torch.Tensor,
    ids: torch.Tensor,
    seeds: torch.Tensor,
    slots: list[int],
    dropout_p: list[float],
    impl: str,
) -> torch.Tensor:
    """Returns ``y [..., N]``, the base layer's in the adapters' rows, with their DoRA in it."""
    factors = [t for adapter in zip(lora_a, lora_b, magnitude, strict=True) for t in adapter]
    batch = list(slots), list(dropout_p), impl
    return _MixedDoraDropped.apply(y, x, weight, batch, ids, seeds, squares, scaling, *factors)
