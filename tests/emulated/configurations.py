"""Every config that `choose` returns for the layers of Llama 3.1 8B, and a case that forces it.

Configs that differ only in their splits of a sum, two or more, compile to the same kernel: two
splits stand for all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple
from unittest import mock

import torch

from fastlora.kernels import configs, launch
from fastlora.kernels.chips import Chip
from fastlora.kernels.config_tables import MAX_GROUP_SIZE, KernelConfig, kernel_of, table_of
from fastlora.quantized_tensor import dequantize
from tests.emulated.cases import BF16, FP32, Case, sort, sums
from tests.support.kernels.lab import Lab
from tests.support.kernels.mixed_grad_problem import GradProblem, mix
from tests.support.kernels.mixed_problem import MixedProblem, Results, draw_ids
from tests.support.kernels.one_adapter import Problem
from tests.support.kernels.quantized_weights import make_quantized_weight
from tests.support.kernels.scale_problem import ScaleProblem

# One card each of the chips that the lane emulates.
CARDS = {"sm_80": Chip("sm_80", 108), "sm_90": Chip("sm_90", 132)}
# N and K of q and o, of k and v, of gate and up, and of down.
LAYERS = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
ROWS = sorted({rows + more for rows in (2**power for power in range(15)) for more in (0, 1)})
RANKS = (8, 16, 32, 64)
# Launches that the batch-invariant mode has.
INVARIANT = ("lora_shrink", "lora_linear", "coded_lora_linear", "mixed_lora_shrink")
INVARIANT += ("mixed_lora_linear", "mixed_lora_train_linear", "coded_mixed_lora_linear")
# The axis along which a kernel loops over its pipelined steps.
_LOOPS = {"lora_shrink": "k", "lora_linear": "k", "lora_grad_b": "m", "lora_grad_a": "m"}
# Rows of a batch for which the host makes pieces of so many.
_ROWS_OF_PIECES = {16: 37, 64: 133, 128: 2053}


class Configuration(NamedTuple):
    """A config of a launch, and the rank and the siblings for which `choose` returns it."""

    launch: str
    config: KernelConfig
    r: int
    group_size: int

    def __str__(self) -> str:
        own = self.config
        sides = (f"{s}{getattr(own, f'block_{s}')}" for s in "mnkr" if getattr(own, f"block_{s}"))
        parts = [self.launch, *sides, f"warps{own.num_warps}", f"stages{own.num_stages}"]
        parts += [f"narrow{own.narrow_r}"] * (own.narrow_r > 0) + ["splits"] * (own.splits > 1)
        parts += [f"siblings{own.group_size}"] * (own.group_size > 1)
        return "-".join([*parts, *["invariant"] * own.batch_invariant])


def configurations(chip: Chip) -> list[Configuration]:
    """Returns every config of every launch of the chip's table, in bf16."""
    found: dict[tuple[str, KernelConfig], Configuration] = {}
    for name in sorted({name for name, _ in table_of(chip)}):
        counts = range(1, MAX_GROUP_SIZE + 1) if name == "lora_grad_a" else (1,)
        for n, k in LAYERS:
            for m in ROWS:
                for r in RANKS:
                    for group_size in counts:
                        for mode in (False, True)[: 1 + (name in INVARIANT)]:
                            sizes = {"m": m, "n": n, "k": k, "r": r, "group_size": group_size}
                            own = configs.choose(chip, name, BF16, **sizes, batch_invariant=mode)
                            own = replace(own, splits=min(own.splits, 2))
                            found.setdefault((name, own), Configuration(name, own, r, group_size))
    return list(found.values())


def sizes_of(given: Configuration) -> dict[str, int]:
    """Returns M, N and K: two tiles and a ragged edge, and more steps than the pipeline has stages.

    Columns stay multiples of 16 where a tile leaves room for that, so that copies are asynchronous.
    """
    name, config = given.launch, given.config
    blocks = {"m": config.block_m, "n": config.block_n, "k": config.block_k}
    loop = _LOOPS.get(kernel_of(name).removeprefix("mixed_"), "")
    sizes = {}
    for axis, block in blocks.items():
        steps = config.splits * (config.num_stages + 2) if axis == loop else 2
        edge = 64 if name.startswith("coded_") else 16
        edge = 5 if axis == "m" else min(edge, max(block // 2, 8))
        sizes[axis] = steps * block + edge if block else 40
    if name.removeprefix("coded_") == "lora_grad_x" or name == "mixed_lora_grad_x":
        # A gradient of x sums over the layer's N.
        sizes["n"], sizes["k"] = sizes["k"], sizes["n"]
    if name.startswith("coded_"):  # blocks of 64 elements lie within a row
        sizes["k"] = -(-sizes["k"] // 64) * 64
    return sizes


@contextlib.contextmanager
def forced(given: Configuration) -> Iterator[None]:
    """Within the block `choose` returns the config for its launch, and no launch is kept."""
    plain, asked = configs.choose, []

    def choose(chip: Chip, name: str, *args: object, **kwargs: object) -> KernelConfig:
        if name != given.launch:
            return plain(chip, name, *args, **kwargs)
        asked.append(name)
        return given.config

    with (
        mock.patch.object(configs, "choose", choose),
        mock.patch.object(launch, "_CAN_CACHE", False),
    ):
        yield
    assert asked, f"nobody asked for a config of {given.launch}"


def case_of(given: Configuration) -> Case:
    """Returns the case that forces a config."""
    name = given.launch
    if name == "plane_sums":
        return sums(planes=(5, 6, 7, 9))
    if name == "mixed_rows_sort":
        return sort(40, 1, 5, 16)
    if name == "mixed_dora_scale":
        return _scale(given)
    if name.startswith(("mixed_lora_train", "mixed_lora_grad")):
        return _step(given)
    return _mixed(given) if "mixed" in name else _one(given)


def _one(given: Configuration) -> Case:
    """A kernel of one adapter, over codes where the launch is."""

    def run(lab: Lab) -> Results:
        sizes = sizes_of(given).values()
        dropout_p = 0.0 if given.launch == "lora_shrink" else 0.3
        others = [given.r] * (given.group_size - 1)
        problem = Problem(lab, *sizes, given.r, BF16, dropout_p, others)
        stem = given.launch.removeprefix("coded_").removeprefix("dropout_")
        is_quantized = given.launch.startswith("coded_")
        quantized = make_quantized_weight("nf4 nested", problem.weight) if is_quantized else None
        if quantized is not None:
            problem.weight = quantized.quantized_data
        found: Results = getattr(problem, stem.removeprefix("lora_"))(given.config)
        if quantized is not None:
            problem.weight = dequantize(quantized)
        problem.check(found)
        return found

    return run


def _mixed(given: Configuration) -> Case:
    """A kernel of a mixed batch over tables, over codes where the launch is."""

    def run(lab: Lab) -> Results:
        m, n, k = sizes_of(given).values()
        ranks = (given.r, 3, 0, 8, given.r)
        problem = MixedProblem(lab, draw_ids(m, 5), [ranks], k, [n], BF16, biased=(1, 3))
        kernel = kernel_of(given.launch).removeprefix("mixed_lora_")
        if kernel == "shrink":
            s = lab.poisoned(2, 1, m, -(-problem.max_rank // 16) * 16, dtype=FP32)
            problem.shrink_into(s, given.config)
            problem.check_shrunk(s)
            return {"s": s}
        quantized = make_quantized_weight("nf4 nested", problem.weights[0])
        if given.launch.startswith("coded_"):
            problem.weights = [quantized.quantized_data]
        y = problem.run(kernel, given.config, splits=2)
        if given.launch.startswith("coded_"):
            problem.weights = [dequantize(quantized)]
        problem.check(y)
        return {"y": y}

    return run


def _step(given: Configuration) -> Case:
    """Forward and gradients of a mixed batch that trains."""

    def run(lab: Lab) -> Results:
        m, n, k = sizes_of(given).values()
        ids = mix(40) + [3] * max(m, 200)
        r = given.r
        problem = GradProblem(
            lab, ids, n, k, BF16, ranks=(1, 3, 8, r, r, 0, 8), dropout=True, run_rows=384
        )
        plan = "split" if given.launch.endswith(("_expand", "_add")) else "fused"
        with forced(given):
            found = problem.run(plan)
        problem.check(found)
        return found

    return run


def _scale(given: Configuration) -> Case:
    """DoRA's scales, of as many rows as have the config's pieces."""

    def run(lab: Lab) -> Results:
        ids = draw_ids(_ROWS_OF_PIECES[given.config.block_m], 8)
        problem = ScaleProblem(lab, ids, 8, sizes_of(given)["n"], BF16, pending=(1,))
        with forced(given):
            y: torch.Tensor = problem.run()
        problem.check(y)
        return {"y": y}

    return run
