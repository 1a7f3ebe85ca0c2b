"""The work of one launch: bytes and FLOPs in closed form, instructions, and bytes in flight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from fastlora.bench import byte_forms
from fastlora.bench.byte_forms import Batch, Form, Sizes
from fastlora.bench.compiled import read_code
from fastlora.kernels.config_tables import KernelConfig
from fastlora.testing import Launch

BF16, WIDTH = torch.bfloat16, 2
# Suffixes of the argument names for each layer of a launch.
_MARKS = ("", "_1", "_2", "_3")
BatchOf = Callable[[int, int, int], Batch]


class Work(NamedTuple):
    """The work of one kernel.

    Attributes:
        name: Name of the kernel, or of PyTorch's operator.
        loads, stores: Distinct bytes that are loaded and stored.
        issued: Bytes of all loads and stores.
        flops: FLOPs of its products, counting whole tiles.
        launch: The launch, if the kernel is fastlora's.
        chunks: Number of iterations of a program's second loop.
    """

    name: str
    loads: int
    stores: int
    issued: int
    flops: int
    launch: Launch | None = None
    chunks: int = 1


def work_of(launch: Launch, batch_of: BatchOf, r: int, after_sum: bool = False) -> Work:
    """Return the work of one of fastlora's launches, from the closed form of its kernel.

    Args:
        launch: The launch, with bf16 tensors.
        batch_of: Function that returns the mixed batch of a linear layer for N outputs, K columns,
            and a rank.
        r: Rank of each adapter.
        after_sum: Whether the launch before it added partial sums. An expand then reads s in bf16.
    """
    name = _stem(launch)
    if name.startswith("mixed_"):
        form = _mixed_form(launch, batch_of, r, WIDTH if after_sum else 4)
    else:
        form = _form(launch, r)
    loads, stores = (sum(d for d, _ in side.values()) for side in (form.loads, form.stores))
    chunks = 1
    if name == "mixed_lora_linear":
        tiles = batch_of(launch.arguments["N"], 0, r).tiles(launch.arguments["BLOCK_M"])
        held = max(sum(byte_forms.whole(rank, 16) for rank in tile) for tile in tiles)
        chunks = -(-held // launch.arguments["BLOCK_R"])
    return Work(name, loads, stores, form.issued, form.flops, launch, chunks)


def _stem(launch: Launch) -> str:
    return launch.kernel.removeprefix("_").removesuffix("_kernel")


def _config(launch: Launch) -> KernelConfig:
    """Return the fields that closed forms read from the config of a launch."""
    given = launch.arguments
    return KernelConfig(
        block_m=given["BLOCK_M"],
        block_n=given.get("BLOCK_N", 0),
        block_k=given.get("BLOCK_K", 0),
        block_r=given.get("BLOCK_R", 0),
        num_warps=launch.num_warps,
        splits=given.get("SPLITS", launch.grid[1]),
        narrow_r=given.get("NARROW_R", 0),
    )


def _form(launch: Launch, r: int) -> Form:
    """Return the traffic and FLOPs of a launch for one adapter."""
    given, name = launch.arguments, _stem(launch)
    if name == "plane_sums":
        used = [mark for mark in _MARKS if given[f"size{mark}"]]
        return byte_forms.plane_sums(
            [(given[f"size{mark}"], given[f"num_partials{mark}"], WIDTH) for mark in used]
        )
    config = _config(launch)
    m, n, k, rank = (given.get(size, 0) for size in "MNKR")
    sizes = Sizes(m, n, k, rank, WIDTH, WIDTH)
    if name == "lora_shrink":
        return byte_forms.shrink(sizes, config)
    if name == "lora_dropout":
        return byte_forms.dropout(sizes, config)
    if name == "lora_grad_b":
        return byte_forms.grad_b(sizes, config, 1, given["HAS_BIAS"], given["HAS_DS"])
    if name == "lora_grad_a":
        ranks = [given[f"R{mark}"] for mark in _MARKS[: given["NUM_MODULES"]]]
        drops = given["HAS_DROPOUT"]
        return byte_forms.grad_a(sizes._replace(r=max(ranks)), config, ranks, drops)
    if given.get("NUM_TERMS", 1) > 1:
        ranks = [given[f"R{mark}"] for mark in _MARKS[: given["NUM_TERMS"]]]
        return byte_forms.summed_expand(sizes, config, ranks)
    forms = []
    for mark in _used_marks(given):
        own = sizes._replace(n=given[f"N{mark}"], r=given[f"R{mark}"])
        if name == "lora_linear":
            form = byte_forms.linear(own, config, given["NUM_PARTIALS"], given["HAS_BIAS"])
            if not given["STORE_S"]:
                form.stores.pop("s", None)
        else:
            form = byte_forms.expand(own, config, 1, given["NUM_PARTIALS"], given["READS_Y"])
        forms.append(form)
    return together(forms)


def _used_marks(given: Mapping[str, Any]) -> list[str]:
    """Return the marks of a launch's modules: a kernel for three also computes one or two."""
    return [mark for mark in _MARKS if given[f"N{mark}"]]


def _mixed_form(launch: Launch, batch_of: BatchOf, r: int, s_width: int) -> Form:
    """Return the traffic and FLOPs of a launch in the forward pass of a mixed batch."""
    given, config = launch.arguments, _config(launch)
    n, k = given.get("N", 0), given.get("K", 0)
    if _stem(launch) == "mixed_lora_shrink":  # rank rows of an adapter in all modules
        return byte_forms.mixed_shrink(batch_of(n, k, r * given["modules"]), config, launch.grid[1])
    sizes = [given[f"N{mark}"] for mark in _used_marks(given)]
    if _stem(launch) == "mixed_lora_expand":
        partials = given["NUM_PARTIALS"]
        batches = [batch_of(own, k, r) for own in sizes]
        return together(
            [byte_forms.mixed_expand(own, config, partials, s_width) for own in batches]
        )
    partials, biased = given["num_partials"], given["HAS_BIAS"]
    return together(
        [byte_forms.mixed_linear(batch_of(own, k, r), config, partials, biased) for own in sizes]
    )


def together(forms: Sequence[Form]) -> Form:
    """Return the layers of one launch as one form. They read the same x, which is counted once."""
    loads = {f"{t}_{i}": v for i, form in enumerate(forms) for t, v in form.loads.items()}
    for i in range(1, len(forms)):
        if f"x_{i}" in loads:
            loads[f"x_{i}"] = (0, loads[f"x_{i}"][1])
    stores = {f"{t}_{i}": v for i, form in enumerate(forms) for t, v in form.stores.items()}
    return Form(loads, stores, sum(form.flops for form in forms))


def instructions_of(launch: Launch, chunks: int) -> int:
    """Return the instructions that a warp executes. The sizes determine the iterations of loops."""
    given, code = launch.arguments, read_code(launch.binary)
    rows, columns = given.get("rows_per_split", 0), given.get("k_per_split", given.get("K", 0))
    rounds = -(-rows // given["BLOCK_M"]) if rows else 0
    if not rows and "BLOCK_K" in given:
        rounds = -(-columns // given["BLOCK_K"])
    if launch.kernel != "_mixed_lora_linear_kernel":  # only one of these loops runs
        return code.instructions + max(rounds - 1, 0) * max(code.inner, default=0)
    first = code.inner[0] if code.inner else 0
    return code.instructions + (rounds - 1) * first + (chunks - 1) * code.largest


def bytes_in_flight(launch: Launch) -> int:
    """Return the bytes that a program has in flight, or 0 if they are not counted."""
    given, stages = launch.arguments, max(launch.num_stages - 1, 1)
    m, n, k, r = (given.get(f"BLOCK_{axis}", 0) for axis in "MNKR")
    rows = min(m, given.get("M", m))
    elements = {
        "lora_shrink": stages * k * (rows + r),
        "lora_linear": stages * k * (rows + n),
        "lora_expand": (rows * n if given.get("READS_Y", True) else 0) + (rows + n) * r,
        "lora_grad_b": stages * rows * n,
        "lora_grad_a": stages * rows * k,
    }.get(_stem(launch).removeprefix("mixed_"), 0)
    return WIDTH * elements
