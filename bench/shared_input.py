"""Linear layers that receive the same x, as one problem: operands, contenders, and fastlora.

fastlora runs the functions that its layers call: `run_grouped_linears` for one adapter, the
operators that read address tables for a mixed batch, and `grouped_shrink` before `run_adapters` in
the training of a mixed batch. `bench/tune.py` times this problem, so its launches are those of a
model.

Results are every y in a forward pass. In training, dx follows, and then d_lora_a and d_lora_b of
each layer and adapter in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from fastlora.autograd.lora_linear import run_adapters
from fastlora.autograd.shared_input import grouped_shrink, run_grouped_linears
from fastlora.bench.contenders import SCALING, Contender, Results
from fastlora.bench.mixed_strategies import Rows
from fastlora.bench.modes import Mode
from fastlora.bench.shapes import MIXED_SEQUENCES, Point
from fastlora.ops.factors import Base, LayerAdapterOperands
from fastlora.ops.operator_backend import launch_mixed_group_without_operator
from fastlora.ops.rows import Rows as SortedRows
from fastlora.ops.rows import sort_rows
from fastlora.ops.triton.rows_argument import rows_argument_for_address_tables

Draw = Callable[..., torch.Tensor]


class Layer(NamedTuple):
    """One layer: ``weight [N, K]``, for each adapter lora_a ``[R, K]`` and lora_b ``[N, R]``, dy.

    In training, ``dy [M, N]`` is the gradient of the layer's output. Otherwise it is empty.
    """

    weight: torch.Tensor
    lora_a: list[torch.Tensor]
    lora_b: list[torch.Tensor]
    dy: torch.Tensor


@dataclass
class Problem:
    """One set of operands of layers that receive the same ``x [M, K]``.

    Attributes:
        x: The input. In training, it and every factor require gradients.
        layers: The layers.
        scaling: Scaling of each adapter, fp32 ``[S]``.
        sorted_by_hand, rows: The adapter of each row in a mixed batch, for plain PyTorch and for
            fastlora, or None.
        tables: fastlora's address tables of a mixed batch without gradients.
        y: An empty tensor, because no contender writes into an operand.
    """

    x: torch.Tensor
    layers: list[Layer]
    scaling: torch.Tensor
    sorted_by_hand: Rows | None
    rows: SortedRows | None
    tables: list[torch.Tensor]
    y: torch.Tensor

    @classmethod
    def random(
        cls, point: Point, dtype: torch.dtype, device: torch.device, impl: str = ""
    ) -> Problem:
        """Draw operands for which the base term and the adapter's term are of similar magnitude."""

        def normal(rows: int, columns: int, scale: float) -> torch.Tensor:
            return torch.randn(rows, columns, dtype=dtype, device=device).mul_(scale)

        return cls._made(point, device, normal)

    @classmethod
    def uninitialized(cls, point: Point, dtype: torch.dtype, device: torch.device) -> Problem:
        """Allocate operands without values, to record the launches of a problem."""

        def empty(rows: int, columns: int, scale: float) -> torch.Tensor:
            return torch.empty(rows, columns, dtype=dtype, device=device)

        return cls._made(point, device, empty)

    @classmethod
    def _made(cls, point: Point, device: torch.device, draw: Draw) -> Problem:
        trains, ranks, k = "train" in point.mode, point.ranks_of_adapters, point.k

        def layer(n: int) -> Layer:
            lora_a = [draw(r, k, k**-0.5).requires_grad_(trains) for r in ranks]
            lora_b = [draw(n, r, r**-0.5).requires_grad_(trains) for r in ranks]
            return Layer(draw(n, k, k**-0.5), lora_a, lora_b, draw(point.m * trains, n, 1.0))

        layers = [layer(n) for n in point.outputs_of_layers]
        x = draw(point.m, k, 1.0).requires_grad_(trains)
        scaling = torch.full((len(ranks),), SCALING, dtype=torch.float32, device=device)
        by_hand = rows = None
        if point.adapters:
            sequences = min(point.m, MIXED_SEQUENCES)
            slots = (torch.arange(sequences) % len(ranks))[torch.randperm(sequences)].to(device)
            by_hand = Rows.of(slots, len(ranks), point.m // sequences, sorted_before=False)
            rows = sort_rows(slots, point.m, len(ranks))
        tables = [] if rows is None or trains else _tables(layers, ranks, scaling)
        return cls(x, layers, scaling, by_hand, rows, tables, x.new_empty(0))

    @property
    def factors(self) -> list[torch.Tensor]:
        """The lora_a and lora_b of each layer and adapter in turn."""
        pairs = [zip(layer.lora_a, layer.lora_b, strict=True) for layer in self.layers]
        return [factor for layer in pairs for pair in layer for factor in pair]


def _tables(layers: list[Layer], ranks: list[int], scaling: torch.Tensor) -> list[torch.Tensor]:
    """Return address tables of adjacent layers: addresses, ranks, and scalings, each ``[G, S]``."""
    device, count = scaling.device, len(layers)
    a_address, b_address = (
        torch.tensor([[factor.data_ptr() for factor in own] for own in each], device=device)
        for each in ([layer.lora_a for layer in layers], [layer.lora_b for layer in layers])
    )
    rank = torch.tensor([ranks] * count, dtype=torch.int32, device=device)
    return [a_address, b_address, rank, scaling.expand(count, -1).contiguous()]


# ----------------------------------------------------------------------------- without gradients


def _base(p: Problem) -> list[torch.Tensor]:
    return [F.linear(p.x, layer.weight) for layer in p.layers]


def _plain(p: Problem) -> list[torch.Tensor]:
    """Compute PEFT's expression. In a mixed batch, rows are sorted by adapter and put back."""
    rows = p.sorted_by_hand
    x = p.x if rows is None else rows.there(p.x)
    parts = [x] if rows is None else x.split(rows.counts)
    ys = []
    for layer in p.layers:
        each = zip(parts, layer.lora_a, layer.lora_b, strict=True)
        term = torch.cat([F.linear(F.linear(own, a), b) for own, a, b in each])
        y = F.linear(x, layer.weight) + term * SCALING
        ys.append(y if rows is None else rows.back(y))
    return ys


def _fastlora(p: Problem) -> list[torch.Tensor]:
    """Run what fastlora's layers run: one adapter, or a mixed batch with or without gradients."""
    x, layers = p.x, p.layers
    weights, biases = [layer.weight for layer in layers], [None] * len(layers)
    if p.rows is None:
        lora_a, lora_b = ([own[0] for own in each] for each in zip(*_factors(p), strict=True))
        operands = [*weights, *biases, *lora_a, *lora_b, *[p.scaling[0]] * len(layers), *biases]
        return [*run_grouped_linears(x, operands, (0.0,) * len(layers), "triton")]
    if p.tables:
        rows, largest = (
            rows_argument_for_address_tables(p.rows),
            max(a.shape[0] for a in layers[0].lora_a),
        )
        if len(layers) == 1:
            given = None, p.tables, 0, largest, x.dtype, "auto"
            return [torch.ops.fastlora.lora_linear_at(x, weights[0], None, rows, *given)[0]]
        made = launch_mixed_group_without_operator(
            x, weights, biases, rows, p.tables, 0, largest, x.dtype
        )
        if made is None:
            raise RuntimeError("something observes operators, so layers do not share a launch")
        return made
    count, inner = len(p.scaling), [None] * len(layers)
    if len(layers) > 1:
        lora_a = [layer.lora_a for layer in layers]
        shared = grouped_shrink(x, lora_a, (0.0,) * len(layers), "triton", p.rows)
        inner = [result.s for result in shared]
    return [
        run_adapters(
            *(x, Base(layer.weight)),
            LayerAdapterOperands(
                layer.lora_a, layer.lora_b, [None] * count, p.scaling, (0.0,) * count
            ),
            "triton",
            rows=p.rows,
            s=s,
        )
        for layer, s in zip(layers, inner, strict=True)
    ]


def _factors(p: Problem) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    return [(layer.lora_a, layer.lora_b) for layer in p.layers]


# ---------------------------------------------------------------------------------- with gradients


def _forward(run: Callable[[Problem], list[torch.Tensor]]) -> Callable[[Any], Results]:
    def forward(p: Problem) -> Results:
        with torch.no_grad():
            return tuple(run(p))

    return forward


def _trained(
    run: Callable[[Problem], list[torch.Tensor]], has_factors: bool = True
) -> Callable[[Any], Results]:
    """Return a function that runs a forward pass and its backward pass."""

    def train(p: Problem) -> Results:
        ys, wanted = run(p), [p.x, *(p.factors if has_factors else [])]
        gradients = torch.autograd.grad(ys, wanted, [layer.dy for layer in p.layers])
        return (*(y.detach() for y in ys), *gradients)

    return train


def _truths(point: Point, p: Problem) -> dict[str, Results]:
    """Return the float64 results by kind."""
    rows, x = p.sorted_by_hand, p.x.detach().double()
    counts = [len(x)] if rows is None else rows.counts
    if rows is not None:
        x = rows.there(x)

    def back(y: torch.Tensor) -> torch.Tensor:
        return y if rows is None else rows.back(y)

    bases, ys, grads = [], [], []
    d_base, dx = torch.zeros_like(x), torch.zeros_like(x)
    for weight, lora_a, lora_b, dy in p.layers:
        base = x @ weight.double().t()
        y = base.clone()
        own_dy = dy.double()
        if "train" in point.mode:
            own_dy = own_dy if rows is None else rows.there(own_dy)
            d_base += own_dy @ weight.double()
        start = 0
        for a, b, count in zip(lora_a, lora_b, counts, strict=True):
            own, start = slice(start, start + count), start + count
            down, up = a.detach().double(), b.detach().double()
            s = x[own] @ down.t()
            y[own] += SCALING * (s @ up.t())
            if "train" in point.mode:
                ds = SCALING * (own_dy[own] @ up)
                dx[own] += ds @ down
                grads += [ds.t() @ x[own], SCALING * (own_dy[own].t() @ s)]
        bases.append(back(base))
        ys.append(back(y))
    if "train" not in point.mode:
        return {"base": tuple(bases), _KINDS[point.mode][1]: tuple(ys)}
    return {
        "train_base": (*bases, back(d_base)),
        _KINDS[point.mode][1]: (*ys, back(d_base + dx), *grads),
    }


# By mode: the kind of the base alone, and of the layers with adapters.
_KINDS = {
    "forward": ("base", "full"),
    "train": ("train_base", "train"),
    "mixed": ("base", "mixed"),
    "mixed_train": ("train_base", "mixed_train"),
}


def _mode(name: str) -> Mode:
    base_kind, kind = _KINDS[name]
    trains = "train" in name
    base: Any = _trained(_base, has_factors=False) if trains else _forward(_base)
    plain, solve = ((_trained if trains else _forward)(run) for run in (_plain, _fastlora))
    contenders = Contender("base", base_kind, base), Contender("plain", kind, plain)
    return Mode(
        draw=Problem.random,
        truths=_truths,
        yardstick={base_kind: "base", kind: "plain"},
        contenders=lambda *_: contenders,
        solve=solve,
    )


MODES = {name: _mode(name) for name in _KINDS}
