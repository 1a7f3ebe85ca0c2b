"""Functions that build the operators' argument ``rows``: sorted rows, and pieces or runs of them.

Nothing here imports Triton.
"""

from __future__ import annotations

import torch

from fastlora.ops.plans import fp32_precision
from fastlora.ops.rows import Rows


def rows_argument_for_address_tables(
    rows: Rows, batch_invariant: bool = False
) -> list[torch.Tensor]:
    """Return the tensors for the ``rows`` argument of operators that read address tables."""
    from fastlora.kernels.configs import piece_rows

    return [*rows.operator_arguments(), rows.piece_starts(piece_rows(rows.m, batch_invariant))]


def rows_argument_for_factor_lists(rows: Rows) -> list[torch.Tensor]:
    """Return the tensors for the ``rows`` argument of operators that receive lists of factors.

    The tensors describe the rows of all adapters together. For operators that work on runs, use
    `rows_and_run_length_for_gradients`.
    """
    from fastlora.kernels.configs import TRAIN_PIECE_ROWS

    return [*rows.operator_arguments(), rows.piece_starts(TRAIN_PIECE_ROWS)]


def rows_and_run_length_for_gradients(
    launch: str, rows: Rows, dtype: torch.dtype, columns: int
) -> tuple[list[torch.Tensor], int]:
    """Return the row tensors and the run length for a gradient operator.

    The result is a tuple (tensors for the ``rows`` argument of the operator, run length). A run is
    a range of sorted positions, and its length is the number of rows in it. The rows of a run may
    use different adapters. No piece is part of two runs.

    Args:
        launch: ``"mixed_lora_grad_b"`` or ``"mixed_lora_grad_a"``.
        rows: Rows of the batch.
        dtype: Dtype of dy ``[M, N]`` or x ``[M, K]``.
        columns: N or K.
    """
    from fastlora.kernels import chips, configs

    chip = chips.chip_of(rows.order.device)
    config = configs.choose(chip, launch, dtype, input_precision=fp32_precision(dtype))
    programs = configs.cdiv(columns, config.block_n or config.block_k)
    run = configs.run_rows(chip, rows.m, programs, config.block_m)
    return [*rows.operator_arguments(), rows.piece_starts(run)], run
