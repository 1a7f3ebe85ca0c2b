"""Counts what the kernels of one adapter move, one by one, in Triton's interpreter.

Those of a fused training step of one linear, and beside them the in-place expand, dropout, and the
sum of a split shrink that stands alone.

``TRITON_INTERPRET=1 python -m tests.support.bytes.count_bytes --write`` writes
`docs/kernel_bytes.csv`; without ``--write`` it prints the rows. ``touched`` bytes must come from
memory, ``issued`` ones are what the L2 cache must serve.
"""

from __future__ import annotations

import contextlib
import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import torch
import triton.language as tl

from fastlora.kernels import chips
from fastlora.kernels.chips import Chip
from fastlora.kernels.configs import cdiv, choose
from fastlora.ops import schema  # noqa: F401 - registers the operators
from tests.support.bytes import byte_forms
from tests.support.bytes.byte_counter import ByteCounter, KernelCount
from tests.support.bytes.byte_forms import Form

TABLE = Path(__file__).parents[3] / "docs" / "kernel_bytes.csv"
COLUMNS = ("m", "k", "n", "r", "adapters", "kernel", "touched", "issued", "issued_over_touched")
# Linears of 2048, 1024 and 4096 at a quarter of each size, on a sixteenth of an H100: as many tiles
# for each processor, and as many bytes of planes for each of an activation, as at full size.
H100 = Chip("sm_90", 132)
QUARTER = Chip("sm_90", 132 // 16)
# M, K, N, R
FULL_STEPS = [(2048, 2048, 2048, 16), (1024, 4096, 1024, 16), (1024, 1024, 4096, 64)]
STEPS = [(m // 4, k // 4, n // 4, r) for m, k, n, r in FULL_STEPS]
_HALF = torch.float16
_E, _F = 2, 4  # bytes of fp16 activations, and of the fp32 masters of the factors


@contextlib.contextmanager
def _on_quarter() -> Iterator[None]:
    """Kernels are launched as on that chip."""
    with (
        mock.patch.object(chips, "chip_of", lambda device: QUARTER),
        # Programmatic dependent launch: the interpreter has no order of launches to relax.
        mock.patch.object(tl.extra.cuda, "gdc_wait", lambda: None),
        mock.patch.object(tl.extra.cuda, "gdc_launch_dependents", lambda: None),
    ):
        yield


def count_step(m: int, k: int, n: int, r: int) -> dict[str, KernelCount]:
    """Runs a forward and its backward in fused kernels; returns the count of each kernel."""
    x, weight = torch.randn(m, k, dtype=_HALF), torch.randn(n, k, dtype=_HALF)
    lora_a, lora_b, dy = torch.randn(r, k), torch.randn(n, r), torch.randn(m, n, dtype=_HALF)
    scaling, ops = torch.tensor(0.5), torch.ops.fastlora
    with _on_quarter():
        with ByteCounter() as forward:
            factors = [lora_a, lora_b, None]
            _, s = ops.lora_linear(
                x, weight, None, [], None, factors, scaling, None, [0.0], "triton", "fused"
            )
        with ByteCounter() as backward:
            ds, _, _ = ops.lora_grad_b(dy, s, [], 0, [lora_b], [False], scaling, True, "triton")
        with ByteCounter() as d_input:
            ops.lora_grad_x(dy, weight, ds, [], [lora_a], None, [0.0], "triton", "fused")
        with ByteCounter() as d_factor:
            ops.lora_grad_a(x, [ds], [], 0, [lora_a], None, [0.0], "triton")
    counted: dict[str, KernelCount] = {}
    for counter, renamed in (
        (forward, {}),
        (backward, {"plane_sums": "plane_sums of lora_grad_b"}),
        (d_input, {"lora_linear": "lora_grad_x"}),
        (d_factor, {"plane_sums": "plane_sums of lora_grad_a"}),
    ):
        for name, count in counter.kernels.items():
            stem = name.removeprefix("_").removesuffix("_kernel")
            counted[renamed.get(stem, stem)] = count
    return counted


def forms_of_step(m: int, k: int, n: int, r: int, chip: Chip = QUARTER) -> dict[str, Form]:
    """Returns what `count_step` must find, from the shapes and the tiles of the chosen configs."""
    shrink = choose(chip, "lora_shrink", _HALF, m=m, k=k, r=r)
    linear = choose(chip, "lora_linear", _HALF, m=m, n=n, k=k, r=r)
    grad_b = choose(chip, "lora_grad_b", _HALF, m=m, n=n, r=r)
    grad_x = choose(chip, "lora_grad_x", _HALF, m=m, k=k, r=r)
    grad_a = choose(chip, "lora_grad_a", _HALF, m=m, k=k, r=r, siblings=1)
    forms = {
        "lora_shrink": byte_forms.shrink(m, k, r, _E, _F, shrink),
        "lora_linear": byte_forms.linear(m, n, k, r, _E, _F, shrink.splits, linear),
        "lora_grad_b": byte_forms.grad_b(m, n, r, _E, _F, 1, False, grad_b),
        "lora_grad_x": byte_forms.grad_x(m, n, k, r, _E, _F, False, grad_x),
        "lora_grad_a": byte_forms.grad_a(m, k, [r], _E, _F, False, grad_a),
    }
    planes = [(m * r, cdiv(n, grad_b.block_n), _E), (n * r, grad_b.splits, _F)]
    summed = [entry for entry in planes if entry[1] > 1]
    if summed:
        forms["plane_sums of lora_grad_b"] = byte_forms.plane_sums(*zip(*summed, strict=True))
    if grad_a.splits > 1:
        forms["plane_sums of lora_grad_a"] = byte_forms.plane_sums([r * k], [grad_a.splits], [_F])
    return forms


def count_others(m: int, k: int, n: int, r: int) -> dict[str, KernelCount]:
    """Runs the kernels that a fused step does not take."""
    x, y, seed = torch.randn(m, k, dtype=_HALF), torch.randn(m, n, dtype=_HALF), torch.tensor([7])
    s, lora_b, scaling = torch.randn(m, r, dtype=_HALF), torch.randn(n, r), torch.tensor(0.5)
    with _on_quarter(), ByteCounter() as counter:
        torch.ops.fastlora.lora_expand_(y, s, [], [lora_b], [None], scaling, "triton")
        torch.ops.fastlora.lora_dropout(x, seed, 0.5)
        torch.ops.fastlora.lora_shrink(x, [], [torch.randn(r, k)], 1, None, [0.0], "triton")
    found = {name[1 : -len("_kernel")]: count for name, count in counter.kernels.items()}
    del found["lora_shrink"]  # as in the step
    return found


def forms_of_others(m: int, k: int, n: int, r: int) -> dict[str, Form]:
    """Returns what `count_others` must find."""
    forms = {
        "lora_expand": byte_forms.expand(
            m, n, r, _E, _F, choose(QUARTER, "lora_expand", _HALF, m=m, n=n, r=r)
        ),
        "lora_dropout": byte_forms.dropout(
            m, k, _E, choose(QUARTER, "lora_dropout", _HALF, m=m, k=k)
        ),
    }
    splits = choose(QUARTER, "lora_shrink", _HALF, m=m, k=k, r=r).splits
    if splits > 1:
        forms["lora_shrink_reduce"] = byte_forms.shrink_reduce(m, r, _E, splits)
    return forms


def count_all(m: int, k: int, n: int, r: int) -> dict[str, KernelCount]:
    """Both counts: one of every kernel."""
    return {**count_step(m, k, n, r), **count_others(m, k, n, r)}


def floor(m: int, k: int, n: int, r: int, chip: Chip = QUARTER) -> int:
    """Returns the design's floor: both GEMMs' bytes, and what no one can avoid.

    That is: the factors where they are used, s and ds written and read, the gradients, and the
    planes, written and read, of the fewest parts that give three of four processors a program:
    parts of K beside 64 rows for the shrink, the fewest that Hopper's instructions take; of rows
    and of columns for `lora_grad_b`, which reduces over both; of rows beside 64 columns, a line of
    128 bytes in 16 bits, for `lora_grad_a`.
    """
    gemms = _E * (2 * m * k + m * n + k * n) + _E * (2 * m * n + 2 * m * k + n * k)
    factors = 2 * _F * r * (k + n)  # once in the forward, once in the backward
    shares = _E * m * r * 6  # s and ds: each written once and read twice
    gradients = _F * r * (k + n)
    programs = cdiv(3 * chip.num_sms, 4)

    def planes(columns: int, rows: int) -> int:
        return (columns * m if columns > 1 else 0) + (rows * n if rows > 1 else 0)

    grad_b = min(planes(columns, cdiv(programs, columns)) for columns in range(1, programs + 1))

    def split(size: int) -> int:
        parts = cdiv(programs, cdiv(size, 64))
        return parts * size if parts > 1 else 0

    return gemms + factors + shares + gradients + 2 * 4 * r * (split(m) + grad_b + split(k))


def rows_of_table(
    m: int, k: int, n: int, r: int, counted: dict[str, KernelCount]
) -> list[dict[str, str]]:
    """Returns one row for each kernel: how often a touched byte is asked for."""
    rows = []
    for kernel, count in counted.items():
        ratio = f"{count.issued / count.distinct:.2f}"
        values = (m, k, n, r, 1, kernel, count.distinct, count.issued, ratio)
        rows.append(dict(zip(COLUMNS, map(str, values), strict=True)))
    return rows


def main(arguments: Sequence[str]) -> int:
    """Counts, and prints the rows or writes the table."""
    rows = [row for sizes in STEPS for row in rows_of_table(*sizes, count_all(*sizes))]
    with TABLE.open("w", newline="") if "--write" in arguments else sys.stdout as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
