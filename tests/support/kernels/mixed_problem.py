"""A mixed batch to launch kernels on, and what each of its rows should be in float64."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from fastlora.kernels.chips import chip_of
from fastlora.kernels.config_tables import KernelConfig
from fastlora.kernels.configs import choose
from fastlora.kernels.mixed_rows import RankRows
from fastlora.ops import schema  # noqa: F401 - registers the operator_backend
from fastlora.ops.rows import sort_rows
from fastlora.ops.triton.rows_argument import rows_argument_for_address_tables
from fastlora.testing import assert_within_budget
from tests.support.kernels.lab import Lab
from tests.support.kernels.modules import module_of
from tests.support.sums import yardstick

OPS = torch.ops.fastlora
# Ranks on and off the tiles, one past all of them, and a module that an adapter leaves alone; and
# three modules that share x.
RANKS = (1, 3, 8, 16, 24, 64, 128, 0)
THREE = (RANKS, (16, 0, 8, 1, 64, 3, 24, 128), (8, 8, 0, 0, 16, 1, 1, 0))
# What a kernel's config is chosen by.
CHOSEN_BY = {
    "mixed_lora_expand": "mr",
    "mixed_lora_linear": "mn",
    "mixed_lora_shrink": "mr",
}
Results = dict[str, torch.Tensor]


def draw_ids(m: int, slots: int, seed: int = 0) -> list[int]:
    """Returns a slot for each row, rows without an adapter among them."""
    chance = random.Random(seed)
    return [chance.randint(-1, slots - 1) for _ in range(m)]


class Batch:
    """Rows of several adapters, sorted.

    Attributes:
        ids: Slot of each row.
        m, slots: How many rows and slots there are.
        groups: The sorted rows.
    """

    lab: Lab
    ids: Sequence[int]
    slots: int

    def sort(self) -> None:
        """Makes `groups` of the ids."""
        self.m = len(self.ids)
        self.groups = sort_rows(self._ids(self.ids), self.m, self.slots)

    def _ids(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=self.lab.device)

    @property
    def route(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What every launch takes of the row groups."""
        return self.groups.order, self.groups.segment_of, self.groups.segment_slot

    def rows(self, batch_invariant: bool = False) -> list[torch.Tensor]:
        """What operators over tables take as rows."""
        return rows_argument_for_address_tables(self.groups, batch_invariant)

    def regroup(self, ids: Sequence[int]) -> None:
        """Gives the rows other slots, in the same buffers, as a captured graph has them."""
        self.ids, rows = ids, self.groups
        fresh = sort_rows(self._ids(ids), rows.m, rows.slots, rows.order.device)
        for mine, other in zip(rows.operator_arguments(), fresh.operator_arguments(), strict=True):
            mine.copy_(other)
        for block_m, starts in rows._pieces.items():
            starts.copy_(fresh.piece_starts(block_m))

    def rows_of(self, *slots: int) -> list[int]:
        """Rows that use one of some slots."""
        return [row for row, own in enumerate(self.ids) if own in slots]

    def positions_of(self, slot: int) -> list[int]:
        """Sorted positions of the rows that use a slot."""
        order = self.groups.order.tolist()
        return [position for position, row in enumerate(order) if self.ids[row] == slot]

    def results(self, dtype: torch.dtype) -> Results:
        """What every result should be, in ``dtype`` by PyTorch."""
        raise NotImplementedError

    def check_apart(self, run: Callable[[], Results | torch.Tensor], spoilt: torch.Tensor) -> None:
        """Puts NaN, then infinity, into one element of an operand.

        Raises unless results are not finite exactly where float64 arithmetic adapter by adapter
        says so, and keep every other bit.
        """

        def named() -> Results:
            found = run()
            return found if isinstance(found, dict) else {"y": found}

        clean, before = named(), spoilt.clone()
        for value in (float("nan"), float("inf")):
            spoilt.fill_(value)
            found, exact = named(), self.results(torch.float64)
            spoilt.copy_(before)
            touched = 0
            for name, actual in found.items():
                finite = exact[name].isfinite()
                assert torch.equal(actual.isfinite(), finite), name
                assert torch.equal(actual[finite], clean[name][finite]), name
                touched += int(not finite.all())
            assert touched


class Factors(NamedTuple):
    """One adapter's part in one module, as views of its image."""

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    lora_bias: torch.Tensor | None


@dataclass
class MixedProblem(Batch):
    """The operands of a launch: x, G modules that share it, S adapters in images of their own.

    Args:
        lab: The fixture.
        ids: Slot of each row.
        ranks: Rank of each slot in each module, ``[G][S]``.
        k: Columns of x.
        ns: Outputs of each module.
        dtype: Of x and the base.
        factor_dtype: Of the images; x's where it is None.
        biased: Slots whose adapter has a lora_bias.
    """

    lab: Lab
    ids: Sequence[int]
    ranks: Sequence[Sequence[int]]
    k: int
    ns: Sequence[int]
    dtype: torch.dtype
    factor_dtype: torch.dtype | None = None
    biased: Sequence[int] = ()
    images: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.factor_dtype = self.factor_dtype or self.dtype
        self.slots = len(self.ranks[0])
        self.sort()
        self.max_rank = max(1, *(max(row) for row in self.ranks))
        self.x = self.lab.rand(self.m, self.k, dtype=self.dtype)
        self.weights = [self._weight(n) for n in self.ns]
        self.biases = [self.lab.rand(n, dtype=self.dtype) for n in self.ns]
        self.scaling = 0.5 + torch.rand(len(self.ns), self.slots).to(self.lab.device)
        self.rank = torch.tensor(self.ranks, dtype=torch.int32, device=self.lab.device)
        per_slot = [self._image(slot) for slot in range(self.slots)]
        self.factors = [[slot[g] for slot in per_slot] for g in range(len(self.ns))]
        self.lora_a_address = self._table([[f.lora_a for f in row] for row in self.factors])
        self.lora_b_address = self._table([[f.lora_b for f in row] for row in self.factors])
        biases = self._table([[f.lora_bias for f in row] for row in self.factors])
        self.lora_bias_address = biases if self.biased else None

    def _weight(self, n: int) -> torch.Tensor:
        return self.lab.rand(n, self.k, dtype=self.dtype).div_(self.k**0.5)

    def _image(self, slot: int) -> list[Factors]:
        """Makes one adapter: blocks at multiples of 16 bytes, NaN between them."""
        width = self.factor_dtype.itemsize
        blocks: list[tuple[int, torch.Tensor]] = []
        end, parts = 0, []
        for g, n in enumerate(self.ns):
            r = self.ranks[g][slot]
            made = [self.lab.rand(r, self.k) / self.k**0.5, self.lab.rand(r, n) / max(r, 1) ** 0.5]
            if slot in self.biased:
                made.append(self.lab.rand(n))
            for block in made:
                blocks.append((end, block.to(self.dtype)))
                end = -(-(end + block.numel()) * width // 16) * 16 // width
            parts.append(len(made))
        image = self.lab.poisoned(end + 1, dtype=self.factor_dtype)
        views = []
        for start, block in blocks:
            view = image[start : start + block.numel()].view(block.shape)
            views.append(view.copy_(block))
        self.images.append(image)
        found = iter(views)
        return [Factors(*(next(found) for _ in range(p)), *[None] * (3 - p)) for p in parts]

    def _table(self, blocks: list[list[torch.Tensor | None]]) -> torch.Tensor:
        addresses = [
            [0 if block is None or not block.numel() else block.data_ptr() for block in row]
            for row in blocks
        ]
        return torch.tensor(addresses, dtype=torch.int64, device=self.lab.device)

    @property
    def all_tables(self) -> list[torch.Tensor]:
        """What operators take as tables."""
        biases = [] if self.lora_bias_address is None else [self.lora_bias_address]
        return [self.lora_a_address, self.lora_b_address, self.rank, self.scaling, *biases]

    def up(self, *tables: torch.Tensor | None) -> RankRows:
        """What expand and linear take of `tables`."""
        return RankRows(*tables, self.factor_dtype, self.max_rank)

    def tables(self, g: int = 0) -> tuple[torch.Tensor | None, ...]:
        """What expand and linear take of module g's tables."""
        bias = self.lora_bias_address
        return (
            self.lora_b_address[g],
            None if bias is None else bias[g],
            self.rank[g],
            self.scaling[g],
        )

    def shrunk(self, splits: int = 1) -> torch.Tensor:
        """Returns s as a shrink leaves it, fp32 ``[splits, G, M, R]``; NaN where it writes nothing.

        In splits whose sum is right to fp32; ranks are filled up to a multiple of four with zeros.
        """
        columns = -(-self.max_rank // 16) * 16
        s = self.lab.poisoned(splits, len(self.ns), self.m, columns, dtype=torch.float32)
        for g, factors in enumerate(self.factors):
            for slot, (lora_a, _, _) in enumerate(factors):
                at, r = self.positions_of(slot), lora_a.shape[0]
                value = self.x[self.rows_of(slot)].float() @ lora_a.float().t()
                parts = torch.rand(splits, 1, 1).to(value.device)
                s[:, g, at, : -(-r // 4) * 4] = 0
                s[:, g, at, :r] = value * (parts / parts.sum())
        return s

    def expected(self, g: int, dtype: torch.dtype, base: bool = True) -> torch.Tensor:
        """Returns module g's y, or its adapters' part alone, in ``dtype`` by PyTorch."""
        x = self.x.to(dtype)
        y = torch.zeros(self.m, self.ns[g], dtype=dtype, device=x.device)
        if base:
            y = F.linear(x, self.weights[g].to(dtype), self.biases[g].to(dtype))
        for slot, (lora_a, lora_b, lora_bias) in enumerate(self.factors[g]):
            rows = self.rows_of(slot)
            delta = x[rows] @ lora_a.to(dtype).t() @ lora_b.to(dtype)
            if lora_bias is not None:
                delta = delta + lora_bias.to(dtype)
            y[rows] += (self.scaling[g, slot].double() * delta).to(dtype)
        return y

    def check(self, y: torch.Tensor, g: int = 0) -> None:
        """Raises unless y is module g's, as near to float64 as PyTorch is in the same dtype."""
        exact = {"y": self.expected(g, torch.float64)}
        near = yardstick(lambda: {"y": self.expected(g, self.dtype)}, exact)
        assert_within_budget(y, near["y"], exact["y"], "y")

    def results(self, dtype: torch.dtype) -> Results:
        """Module 0's y."""
        return {"y": self.expected(0, dtype)}

    # ------------------------------------------------------------------------- launches

    def launch(self, stem: str, config: KernelConfig | None, g: int = 0, **given: Any) -> None:
        """Launches a kernel for module g, a shrink for all; ``given`` are parameters by name."""
        sizes = {"m": self.m, "n": self.ns[g], "r": len(self.ns) * self.max_rank}
        if config is None:
            known = {name: sizes[name] for name in CHOSEN_BY[stem]}
            config = choose(chip_of(self.x.device), stem, self.dtype, **known)
        launcher = getattr(module_of(stem), f"launch_{stem}")
        operands = {
            "x": self.x,
            "weights": [self.weights[g]],
            "biases": [self.biases[g]],
            "rows": [*self.groups.operator_arguments(), self.groups.piece_starts(config.block_m)],
            "up": self.up(*self.tables(g)),
            "config": config,
            "pdl": False,
            **given,
        }
        taken = inspect.signature(launcher).parameters.keys() & operands.keys()
        launcher(**{name: operands[name] for name in taken})

    def run(
        self,
        kernel: str,
        config: KernelConfig | None = None,
        g: int = 0,
        splits: int = 1,
        y: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns module g's y by "linear", over NaN, or "expand", from a right base and s."""
        if y is None and kernel == "linear":
            y = self.lab.poisoned(self.m, self.ns[g], dtype=self.dtype)
        elif y is None:
            y = F.linear(self.x, self.weights[g], self.biases[g])
        self.launch(f"mixed_lora_{kernel}", config, g, ys=[y], s=self.shrunk(splits)[:, g])
        return y

    def run_group(self, kernel: str, config: KernelConfig, splits: int) -> list[torch.Tensor]:
        """As `run`, of all modules in one launch."""
        ys = [self.lab.poisoned(self.m, n, dtype=self.dtype) for n in self.ns]
        if kernel == "expand":
            pairs = zip(self.weights, self.biases, strict=True)
            ys = [F.linear(self.x, weight, bias) for weight, bias in pairs]
        each = zip(*(self.tables(g) for g in range(len(ys))), strict=True)
        up = self.up(*(None if own[0] is None else torch.stack(own) for own in each))
        given = {"ys": ys, "weights": self.weights, "biases": self.biases, "up": up}
        self.launch(f"mixed_lora_{kernel}", config, s=self.shrunk(splits), **given)
        return ys

    def shrink_into(self, s: torch.Tensor, config: KernelConfig | None = None) -> None:
        """Writes s ``[splits, G, M, R]``."""
        down = self.up(self.lora_a_address, None, self.rank, None)
        self.launch("mixed_lora_shrink", config, s=s, down=down)

    def check_shrunk(self, s: torch.Tensor) -> None:
        """Compares every row's sum of planes, in fours, and that nothing else was written."""

        def expected(factors: Sequence[Factors], dtype: torch.dtype) -> Results:
            own = [
                F.linear(self.x[self.rows_of(slot)].to(dtype), lora_a.to(self.dtype).to(dtype))
                for slot, (lora_a, _, _) in enumerate(factors)
            ]
            return {"s": torch.cat([each.flatten() for each in own])}

        for g, factors in enumerate(self.factors):
            actual = []
            for slot, (lora_a, _, _) in enumerate(factors):
                at, r = self.positions_of(slot), lora_a.shape[0]
                filled = -(-r // 4) * 4
                actual.append(s[:, g, at, :r].sum(0).flatten())
                assert (s[:, g, at, r:filled] == 0).all()
                assert s[:, g, at, filled:].isnan().all()
            exact = expected(factors, torch.float64)
            near = yardstick(lambda own=factors: expected(own, self.dtype), exact)
            assert_within_budget(torch.cat(actual), near["s"], exact["s"], "s")
            assert s[:, g, self.positions_of(-1)].isnan().all()

    # ------------------------------------------------------------------------ operators

    def linear_arguments(
        self, g: int = 0, s: torch.Tensor | None = None, plan: str = "auto"
    ) -> tuple[Any, ...]:
        """Of ``lora_linear_at``."""
        return (
            *(self.x, self.weights[g], self.biases[g], self.rows(), s),
            *(self.all_tables, g, self.max_rank, self.factor_dtype, plan),
            None if s is None else [0, len(self.ns)],
        )

    def group_arguments(self, plan: str = "auto") -> tuple[Any, ...]:
        """Of ``lora_linear_at`` where module 0 makes the s of all."""
        return (*self.linear_arguments(0, None, plan)[:-1], [0, len(self.ns)])

    def shared_s(self) -> torch.Tensor:
        """s of all modules, as planes."""
        s: torch.Tensor = OPS.lora_linear_at(*self.group_arguments())[1]
        return s

    def add_arguments(self, y: torch.Tensor) -> tuple[Any, ...]:
        """Of ``lora_add_at_``."""
        given = y, self.x, self.rows(), self.all_tables
        return (*given, 0, self.max_rank, self.factor_dtype, "triton")
