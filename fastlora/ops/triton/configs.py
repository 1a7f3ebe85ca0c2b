"""Which config, chip and pieces of rows a launch takes.

Nothing here imports Triton.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from fastlora.ops.plans import precision
from fastlora.ops.rows import Rows

if TYPE_CHECKING:
    from fastlora.kernels.chips import Chip
    from fastlora.kernels.configs import KernelConfig


def chip_of(x: torch.Tensor) -> Chip:
    """Returns the chip that a tensor's launches run on."""
    from fastlora.kernels import chips

    return chips.chip_of(x.device)


def on_device(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be x's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def config_of(
    launch: str,
    x: torch.Tensor,
    m: int = 0,
    n: int = 0,
    k: int = 0,
    r: int = 0,
    *,
    siblings: int = 1,
    batch_invariant: bool = False,
) -> KernelConfig:
    """Returns the config of a launch on x's device, whose dots are in x's dtype.

    The sizes, ``siblings`` and ``batch_invariant`` are those of `fastlora.kernels.configs.choose`.
    """
    from fastlora.kernels import configs

    return configs.choose(
        *(chip_of(x), launch, x.dtype),
        m=m,
        n=n,
        k=k,
        r=r,
        siblings=siblings,
        input_precision=precision(x.dtype),
        batch_invariant=batch_invariant,
    )


def rows_at(rows: Rows, batch_invariant: bool = False) -> list[torch.Tensor]:
    """Returns what operators over tables of addresses take as rows."""
    from fastlora.kernels.configs import piece_rows

    return [*rows.tensors(), rows.pieces(piece_rows(rows.m, batch_invariant))]


def rows_listed(rows: Rows) -> list[torch.Tensor]:
    """Returns what the forward's operators over lists of factors take as rows."""
    from fastlora.kernels.configs import TRAIN_PIECE_ROWS

    return [*rows.tensors(), rows.pieces(TRAIN_PIECE_ROWS)]


def runs_b(rows: Rows, dtype: torch.dtype, n: int) -> tuple[list[torch.Tensor], int]:
    """Returns rows and the rows of a run of ``lora_grad_b`` for dy ``[M, n]``."""
    from fastlora.kernels import configs

    chip = chip_of(rows.order)
    config = configs.choose(chip, "mixed_lora_grad_b", dtype, input_precision=precision(dtype))
    return _in_runs(rows, chip, configs.cdiv(n, config.block_n), config.block_m)


def runs_a(rows: Rows, dtype: torch.dtype, k: int) -> tuple[list[torch.Tensor], int]:
    """Returns rows and the rows of a run of ``lora_grad_a`` for x ``[M, k]``."""
    from fastlora.kernels import configs

    chip = chip_of(rows.order)
    config = configs.choose(chip, "mixed_lora_grad_a", dtype, input_precision=precision(dtype))
    return _in_runs(rows, chip, configs.cdiv(k, config.block_k), config.block_m)


def _in_runs(rows: Rows, chip: Chip, columns: int, block_m: int) -> tuple[list[torch.Tensor], int]:
    from fastlora.kernels.configs import run_rows

    run = run_rows(chip, rows.m, columns, block_m)
    return [*rows.tensors(), rows.pieces(run)], run
