"""What operators take as rows: the sorted rows, and the pieces or runs that a launch works on.

Nothing here imports Triton.
"""

from __future__ import annotations

import torch

from fastlora.ops.plans import precision
from fastlora.ops.rows import Rows


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
    return _in_runs("mixed_lora_grad_b", rows, dtype, n)


def runs_a(rows: Rows, dtype: torch.dtype, k: int) -> tuple[list[torch.Tensor], int]:
    """Returns rows and the rows of a run of ``lora_grad_a`` for x ``[M, k]``."""
    return _in_runs("mixed_lora_grad_a", rows, dtype, k)


def _in_runs(
    launch: str, rows: Rows, dtype: torch.dtype, columns: int
) -> tuple[list[torch.Tensor], int]:
    from fastlora.kernels import chips, configs

    chip = chips.chip_of(rows.order.device)
    config = configs.choose(chip, launch, dtype, input_precision=precision(dtype))
    programs = configs.cdiv(columns, config.block_n or config.block_k)
    run = configs.run_rows(chip, rows.m, programs, config.block_m)
    return [*rows.tensors(), rows.pieces(run)], run
