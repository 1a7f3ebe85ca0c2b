"""The launches for which `bench/tune.py` measures tiles and plans, in order.

    python bench/tune_points.py [--chip sm_90] [--processors 132]

The problems are those of `shapes.tune_points`. Their launches, and the sizes with which configs and
plans are requested, are recorded from the host path on CPU tensors, with neither a GPU nor a
compiler. If several problems make the same request, it is measured on the slowest of them.

The largest decode comes first. Then come the launches of a layer with today's plans, then the
launches of the other plans of decodes, and then the plans. Within each part, the slowest come
first. Times are predicted as in `bench/predict.py`, without what only compiled code shows.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from fastlora.bench import shapes, shared_input
from fastlora.bench.ceilings import CEILINGS, Ceilings
from fastlora.bench.counted import Case, skipped_products, uncompiled_launches
from fastlora.bench.launch_forms import BF16, work_of
from fastlora.bench.shapes import DECODE_MAX_ROWS, Point
from fastlora.kernels import config_tables, configs, measurements
from fastlora.kernels.chips import Chip, ConfigRow
from fastlora.kernels.config_files import FileRow
from fastlora.testing import Launch

# The launches with tuned tiles.
LAUNCHES = (
    "lora_shrink",
    "lora_linear",
    "lora_expand",
    "lora_grad_b",
    "lora_grad_a",
    "lora_grad_x_add",
    "lora_grad_x",
    "mixed_lora_shrink",
    "mixed_lora_linear",
    "mixed_lora_expand",
    "mixed_lora_train_shrink",
    "mixed_lora_train_linear",
    "mixed_lora_train_expand",
    "mixed_lora_grad_b",
    "mixed_lora_grad_a",
    "mixed_lora_grad_x_add",
    "mixed_lora_grad_x",
)
PLANNED = [name for name in LAUNCHES if name in config_tables.PLANNED]
PLANS = ("fused", "split")
FEW_ROWS = 16  # rows of the smallest tile: its measurement also covers fewer rows


class Request(NamedTuple):
    """What the host path asks `configs.choose`, or for a plan `configs.plan_of`.

    Sizes that a launch leaves out are 0. ``r`` is the rank by which measured rows are selected.
    """

    launch: str
    is_plan: bool = False
    m: int = 0
    n: int = 0
    k: int = 0
    r: int = 0
    group_size: int = 0

    @property
    def sizes(self) -> dict[str, int]:
        """The arguments of `configs.choose`."""
        given = self._asdict()
        return {name: given[name] for name in ("m", "n", "k", "r", "group_size") if given[name]}

    @property
    def limits(self) -> dict[str, int]:
        """The limits of a measured row that covers this request, in the columns of `ConfigRow`.

        A row measured for many rows does not cover half as many, which have fewer programs.
        """
        columns = {"m": "max_m", "r": "max_r"}
        found = {columns.get(name, name): value for name, value in self.sizes.items()}
        return found | ({"min_m": self.m // 2 + 1} if self.m > FEW_ROWS else {})


class Group(NamedTuple):
    """The candidates that are timed together: the tiles, or the plans, for one request.

    Attributes:
        problem: The layers in which they are timed.
        request: The request.
        plan: The plan under which the launch runs; for plans, today's plan.
        us: Predicted time of the launch, in microseconds.
        stage: 0 for a launch of a layer with today's plan, 1 for one with the other plan, 2 for
            plans.
    """

    problem: Point
    request: Request
    plan: str
    us: float
    stage: int

    @property
    def point(self) -> Point:
        """The problem, with the launch and its N appended to the layers' names."""
        launch, is_plan, _, n, *_ = self.request
        words = [launch, "plan"] if is_plan else [launch, f"N={n}"] if n else [launch]
        return self.problem._replace(layer=" ".join([self.problem.layer, *words]))


def groups(problems: Sequence[Point], chip: Chip) -> list[Group]:
    """Return the groups of all problems, in the order in which they are measured."""
    found: dict[Request, Group] = {}
    for problem in problems:
        for group in _groups_of(problem, chip):
            other = found.get(group.request, group)
            found[group.request] = min(group, other, key=lambda g: (g.stage, -g.us))
    decode = max((p.m for p in problems if p.m <= DECODE_MAX_ROWS), default=0)
    return sorted(found.values(), key=lambda g: (g.problem.m != decode, g.stage, -g.us))


def _groups_of(problem: Point, chip: Chip) -> Iterator[Group]:
    """Yield the groups of one problem: those of today's plan, of the other plan, and the plans."""
    made, plans = requests_of(problem, chip)
    today = {request.launch: plan for request, plan in plans}
    # All layers of a problem have the same plan.
    for request, us in made:
        yield Group(problem, request, next(iter(today.values()), ""), us, 0)
    if problem.m > DECODE_MAX_ROWS:  # the library's GEMM is faster than Triton's
        return
    total = sum(us for _, us in made)
    for request, plan in plans:
        other = PLANS[plan == PLANS[0]]
        with rows_first(plan_rows(problem.m, other), chip.arch):
            for own, us in requests_of(problem, chip)[0]:
                yield Group(problem, own, other, us, 1)
        yield Group(problem, request, plan, total, 2)


def plan_rows(m: int, plan: str, dtype: torch.dtype = torch.bfloat16) -> list[FileRow]:
    """Return rows that force a plan for all launches of up to m rows."""
    kind = "half" if dtype.itemsize == 2 else "ieee"
    return [FileRow(name, kind, ConfigRow(max_m=m, plan=plan)) for name in PLANNED if plan]


@contextlib.contextmanager
def rows_first(rows: Sequence[FileRow], arch: str) -> Iterator[None]:
    """Put rows before all others of the arch's table within the block."""
    with mock.patch.dict(config_tables.MEASURED):
        measurements.put_first(arch, rows, "candidate")
        _forget()
        try:
            yield
        finally:
            _forget()


def _forget() -> None:
    configs.choose.cache_clear()
    configs.plan_of.cache_clear()


# ---------------------------------------------------------------------------------- the recording


def requests_of(
    problem: Point, chip: Chip
) -> tuple[list[tuple[Request, float]], list[tuple[Request, str]]]:
    """Record one solution of a problem on the host path.

    Returns:
        A tuple of two lists: the requests of tuned launches, each with the predicted time of its
        launch, and the requests of plans, each with the plan.
    """
    solve = shared_input.MODES[problem.mode].solve
    # Outside of the block, in which the kernel that sorts rows would not run.
    operands = shared_input.Problem.uninitialized(problem, BF16, torch.device("cpu"))
    with (
        uncompiled_launches(*chip) as launches,
        skipped_products(),
        recorded_requests(launches) as (asked, plans),
    ):
        solve(operands)
    made: dict[Request, float] = {}
    for request, launch in launches_of_requests(asked, launches):
        us = predicted_us(problem, launch, CEILINGS.get(chip.arch, CEILINGS["sm_90"]))
        made[request] = max(us, made.get(request, 0.0))
    return [*made.items()], [*dict.fromkeys(plans)]


Asked = list[tuple[int, Request, configs.KernelConfig]]


@contextlib.contextmanager
def recorded_requests(
    launches: Sequence[Launch],
) -> Iterator[tuple[Asked, list[tuple[Request, str]]]]:
    """Record what is asked of `configs.choose` and `configs.plan_of` within the block.

    Yields:
        A tuple of two lists. The first has the number of launches before each request for a config,
        the request, and the config. The second has each request for a plan, and the plan.
    """
    chosen, planned = configs.choose, configs.plan_of
    asked: Asked = []
    plans: list[tuple[Request, str]] = []

    @functools.wraps(chosen)
    def choose(chip: Chip, launch: str, dtype: torch.dtype, **given: Any) -> configs.KernelConfig:
        config = chosen(chip, launch, dtype, **given)
        sizes = {name: given.get(name, 0) for name in "mnkr"}
        if config_tables.kernel_of(launch) == "lora_grad_a":
            sizes["group_size"] = given.get("group_size", 1)
        asked.append((len(launches), Request(launch, **sizes), config))
        return config

    @functools.wraps(planned)
    def plan_of(chip: Chip, launch: str, dtype: torch.dtype, **given: Any) -> str:
        plan = planned(chip, launch, dtype, **given)
        sizes = {name: given[name] for name in "mnk"}
        request = Request(launch, True, **sizes, r=given["r"] * given.get("slots", 1))
        plans.append((request, plan))
        return plan

    # What clears the caches goes on to do so.
    choose.cache_clear = chosen.cache_clear  # type: ignore[attr-defined]
    plan_of.cache_clear = planned.cache_clear  # type: ignore[attr-defined]
    with (
        mock.patch.object(configs, "choose", choose),
        mock.patch.object(configs, "plan_of", plan_of),
    ):
        yield asked, plans


def launches_of_requests(
    asked: Asked, launches: Sequence[Launch]
) -> Iterator[tuple[Request, Launch]]:
    """Yield each launch in `LAUNCHES` with the request for its config.

    It is the last request for the launch's kernel before the launch.
    """
    for place, launch in enumerate(launches):
        kernel = launch.kernel.removeprefix("_").removesuffix("_kernel")
        own = [
            request
            for before, request, _ in asked
            if before <= place and config_tables.kernel_of(request.launch) == kernel
        ]
        if own and own[-1].launch in LAUNCHES:
            yield own[-1], launch


def predicted_us(problem: Point, launch: Launch, ceilings: Ceilings) -> float:
    """Return the predicted time of a launch in microseconds, for the order of the measurements.

    It is the start-up time of a kernel plus the longest of its bytes, its traffic through the L2
    cache, and its FLOPs. The gradients of mixed batches have no closed form. For them, only the
    bytes of the tensors count.
    """
    if launch.kernel.startswith("_mixed_lora_grad"):
        tensors = [value for value in launch.values if isinstance(value, torch.Tensor)]
        moved: float = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
        return ceilings.launch_us + 1e6 * moved / ceilings.bytes_per_s
    case = Case(problem.mode, problem.m, problem.adapters)
    work = work_of(launch, case.batch, problem.r)
    return ceilings.launch_us + 1e6 * max(
        (work.loads + work.stores) / ceilings.bytes_per_s,
        work.issued / ceilings.l2_bytes_per_s,
        work.flops / ceilings.flop_per_s,
    )


# ------------------------------------------------------------------------------------ the command


def write_groups(path: Path, found: Sequence[Group]) -> None:
    """Write a line of JSON for each group, for the processes that measure."""
    path.write_text("".join(f"{json.dumps(group)}\n" for group in found))


def read_groups(path: Path) -> list[Group]:
    """Read what `write_groups` wrote."""
    lines = map(json.loads, path.read_text().splitlines())
    return [
        Group(Point(*problem), Request(*request), *others) for problem, request, *others in lines
    ]


def main() -> int:
    """Print the groups in the order of their measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", default="sm_90")
    parser.add_argument("--processors", type=int, default=132)
    args = parser.parse_args()
    for group in groups(shapes.tune_points(), Chip(args.chip, args.processors)):
        launch, sizes = group.request.launch, group.request.sizes
        words = " ".join(f"{name.upper()}={value}" for name, value in sizes.items())
        what = "plan" if group.request.is_plan else group.plan or "any plan"
        print(f"prediction: {group.us:.1f} us, {launch} {words}, {what}, in {group.problem}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
