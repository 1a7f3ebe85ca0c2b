"""A mixed batch by dense products: every row is multiplied by all rank rows, and keeps its own.

``y = x @ weight.T + bias + select(x @ A.T) @ B``. A ``[S * R, K]`` and B ``[S * R, N]`` are the
factors of all S slots side by side, with R rows each and zeros beyond a slot's rank. B is scaled.
The GPU's BLAS library computes the products. Columns of other adapters are dropped by selection,
and B is finite: a non-finite element of lora_b makes its column NaN in the rows of its own adapter
only.

The factors are given as addresses, which PyTorch cannot read, so `launch_mixed_lora_expand` gathers
them. Its rows of s are unit vectors, so that it adds the rank rows themselves. This reads and
writes every slot's factors once more, whether they are used or not. All shapes follow from S, R,
and M. A CUDA graph can be replayed for any mix, and the launches do not depend on the mix.

This is a contender of `mixed_kernels`. It copies all factors in every call, and fastlora has no
plan of this kind. The arguments are as in `fastlora.ops.schema`, for one module.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastlora.ops.rows import INVALID_SLOT
from fastlora.ops.triton.launch_configs import config_of

# From this many rank rows S * R on, multiplying every row by all of them cannot pay off.
MAX_RANK_ROWS = 256


def check_dense(slots: int, max_rank: int) -> None:
    """Raise `ValueError` for more rank rows than this method supports."""
    if slots * max_rank > MAX_RANK_ROWS:
        raise ValueError(
            f"{slots} slots of rank {max_rank} are {slots * max_rank} rank rows, expected at most "
            f"{MAX_RANK_ROWS}"
        )


def dense_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    route: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    s: torch.Tensor | None,
    lora_a_address: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor],
    *,
    max_rank: int,
    factor_dtype: torch.dtype,
) -> torch.Tensor:
    """Return y ``[M, N]``.

    Args:
        x: ``[M, K]``.
        weight: ``[N, K]``.
        bias: ``[N]`` or None.
        route: order, segment_of, and segment_slot.
        s: ``[splits, M, R']`` if another layer of the shared-input group has computed it. A is then
            not gathered. Otherwise None.
        lora_a_address: ``[S]``.
        tables: lora_b_address, lora_bias_address or None, rank, and scaling, ``[S]`` each.
        max_rank: Upper bound of the ranks. R is this bound, or 1 if it is 0.
        factor_dtype: Dtype of the factors behind the addresses.

    Raises:
        ValueError: See `check_dense`.
    """
    lora_b_address, lora_bias_address, rank, scaling = tables
    (m, k), n, slots, r = x.shape, weight.shape[0], rank.shape[0], max(max_rank, 1)
    order, segment_of, segment_slot = route
    check_dense(slots, r)
    rank = rank.clamp(max=r)
    gather = _Gather(x, rank, r, factor_dtype)
    # The initial value of a row before any product, by slot: the lora_bias, or NaN where necessary.
    # Two entries follow: for rows without an adapter, and for invalid ids.
    start = x.new_zeros(slots + 2, n)
    start[slots + 1].fill_(float("nan"))
    gather.add_start_(start[:slots], lora_b_address, lora_bias_address, scaling)
    if bias is not None:
        start.add_(bias.to(x.dtype))
    rows_of = order.long()
    slot = torch.empty_like(rows_of).scatter_(0, rows_of, segment_slot[segment_of.long()].long())
    place = torch.where(slot >= 0, slot, slots + (slot == INVALID_SLOT).long())
    y = start.index_select(0, place).addmm_(x, weight.t())

    if s is None:
        # [M, K] x [K, S * R]
        shrunk = F.linear(x, gather.rank_rows(lora_a_address, None, k)).view(m, slots, r)
    else:
        summed = s.sum(0)[:, :r].to(x.dtype)
        shrunk = torch.empty_like(summed).index_copy_(0, rows_of, summed).unsqueeze(1)
    ids = torch.arange(max(slots, r), device=x.device)
    own = (slot[:, None] == ids[:slots])[:, :, None] & (ids[:r] < rank[:, None])
    kept = torch.where(own, shrunk, shrunk.new_zeros(())).view(m, slots * r)
    lora_b = gather.rank_rows(lora_b_address, scaling, n)
    # [M, S * R] x [S * R, N]
    return y.addmm_(kept, torch.nan_to_num_(lora_b, 0.0, 0.0, 0.0))


class _Gather:
    """Reads the factors behind addresses into matrices of x's dtype."""

    def __init__(
        self, x: torch.Tensor, rank: torch.Tensor, r: int, factor_dtype: torch.dtype
    ) -> None:
        self.x, self.rank, self.r, self.factor_dtype = x, rank, r, factor_dtype
        self.slots = torch.arange(rank.shape[0], dtype=torch.int32, device=x.device)

    def rank_rows(
        self, address: torch.Tensor, scaling: torch.Tensor | None, columns: int
    ) -> torch.Tensor:
        """Return ``[S * R, columns]``. A column with a non-finite element is NaN."""
        rows = self.x.new_zeros(self.rank.shape[0] * self.r, columns)
        # [R, R'], where R' is a multiple of 16, as kernels read s; the same for each slot.
        units = torch.eye(self.r, -(-self.r // 16) * 16, device=self.x.device)
        self._expand_(rows, units.repeat(self.rank.shape[0], 1), address, None, scaling)
        return rows

    def add_start_(
        self,
        start: torch.Tensor,
        address: torch.Tensor,
        bias_address: torch.Tensor | None,
        scaling: torch.Tensor,
    ) -> None:
        """Add to ``[S, N]`` the terms of an adapter that do not depend on s."""
        nothing = torch.zeros(len(start), -(-self.r // 16) * 16, device=self.x.device)
        self._expand_(start, nothing, address, bias_address, scaling)

    def _expand_(
        self,
        y: torch.Tensor,
        s: torch.Tensor,
        address: torch.Tensor,
        bias_address: torch.Tensor | None,
        scaling: torch.Tensor | None,
    ) -> None:
        from fastlora.kernels import mixed_lora_expand
        from fastlora.kernels.mixed_rows import RankRows

        config, slots = config_of("mixed_lora_expand", y, *y.shape, r=s.shape[-1]), len(self.slots)
        order = torch.arange(y.shape[0], dtype=torch.int32, device=y.device)
        segment_of = order // max(y.shape[0] // max(slots, 1), 1)
        pieces = torch.ops.fastlora.rows_pieces(segment_of, slots, config.block_m)
        mixed_lora_expand.launch_mixed_lora_expand(
            *([y], s.unsqueeze(0), [order, segment_of, self.slots, order, pieces]),
            RankRows(address, bias_address, self.rank, scaling, self.factor_dtype, self.r),
            config=config,
        )
