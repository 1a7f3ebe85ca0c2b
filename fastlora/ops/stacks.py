"""Operands of adapters on a stack of E weights of equal shape, and the grouped base product.

Each row of x belongs to one matrix of the stack and to one adapter. With S adapters, its key is
``matrix * S + slot``. Rows are sorted by key (`fastlora.ops.rows.sort_rows` with E * S slots), so
that the rows of one matrix are adjacent, and among them the rows of one adapter.

Shapes, for P sorted rows: x ``[P, K]``, the stack ``[E, N, K]``, y ``[P, N]``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastlora.ops.factors import LayerAdapterOperands
from fastlora.ops.seeds import dropout_seeds_of_layers


class StackedWeightAdapterOperands(NamedTuple):
    """The LoRA operands of a stacked weight, such as factors and scalings.

    The operands are those of all adapters. Backends receive the adapters in this form. A stacked
    weight is a stack of E weights.

    Attributes:
        lora_a: For each adapter ``[E, R, K]``. An adapter that does not adapt the stack has rank 0.
        lora_b: For each adapter its rank rows ``[E, R, N]``, which are the columns of lora_b.
        scaling: One number per adapter, ``[S]`` in fp32, or fp64 for an fp64 x.
        dropout_p: Active dropout probability of each adapter.
        seeds: Dropout seed of each key, int64 ``[E * S]``, or None if no dropout is active.
    """

    lora_a: list[torch.Tensor]
    lora_b: list[torch.Tensor]
    scaling: torch.Tensor
    dropout_p: tuple[float, ...]
    seeds: torch.Tensor | None = None

    @property
    def num_matrices(self) -> int:
        """Number of matrices in the stack, E."""
        return self.lora_a[0].shape[0]

    def as_operands_of_one_layer(self) -> LayerAdapterOperands:
        """Convert the operands of the stack to the operands of a single layer.

        In the result, each matrix of the stack has its own adapters. A key stands for one matrix of
        the stack and one adapter. The result has one adapter for each key, and thus ``E * S``
        adapters in the order of the keys. The factors of the result are views of this object's
        factors.
        """
        count = self.num_matrices
        lora_a = [
            down for own in zip(*(a.unbind() for a in self.lora_a), strict=True) for down in own
        ]
        lora_b = [
            up.t() for own in zip(*(b.unbind() for b in self.lora_b), strict=True) for up in own
        ]
        none: list[torch.Tensor | None] = [None] * len(lora_a)
        return LayerAdapterOperands(
            lora_a, lora_b, none, self.scaling.repeat(count), self.dropout_p * count, self.seeds
        )


def rank_row_views(
    lora_a: torch.Tensor, lora_b: torch.Tensor, num_matrices: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return stacked LoRA factors as views in which every factor matrix has one row per rank index.

    lora_a and lora_b have the shapes in which adapter files store them. The views have the shapes
    ``[E, R, K]`` for lora_a and ``[E, R, N]`` for lora_b. The rows of the views are called rank
    rows.

    The layout is that of PEFT 0.21.2, ``tuners/lora/layer.py`` (`ParamWrapper.get_delta_factors`):
    the matrix index varies slowest in the rows of lora_a, and fastest in the columns of lora_b.

    Args:
        lora_a: ``[E * R, K]``.
        lora_b: ``[N, R * E]``.
        num_matrices: Number of matrices in the stack, E.
    """
    a = lora_a.view(num_matrices, -1, lora_a.shape[1])
    return a, lora_b.view(lora_b.shape[0], -1, num_matrices).permute(2, 1, 0)


def transposed_rank_rows(lora_b: torch.Tensor, num_matrices: int) -> torch.Tensor:
    """Transpose the stacked lora_b matrices so that each one has one row per rank index.

    lora_b has the shape ``[N, R * E]``, and the result has the shape ``[E, R, N]``. Each row of the
    result is a column of lora_b, and is contiguous. The result is a copy unless lora_b is stored in
    column-major order. PyTorch copies the transpose of a matrix several times faster than other
    permutations, so the rows of one rank are adjacent in memory.
    """
    rows = lora_b.t().contiguous()
    return rows.view(-1, num_matrices, lora_b.shape[0]).transpose(0, 1)


def dropout_seeds_of_keys(adapter_seeds: torch.Tensor, num_matrices: int) -> torch.Tensor:
    """Derive dropout seeds for the matrices of a stack from the adapters' seeds.

    Each pair of a matrix and an adapter has a key and a seed of its own. For E matrices and S
    adapters, the result is an int64 tensor ``[E * S]`` with the seeds in the order of the keys.
    """
    return dropout_seeds_of_layers(adapter_seeds, range(num_matrices)).reshape(-1)
