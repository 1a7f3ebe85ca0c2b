"""Main directions of rows that come in batches, in memory for R of them.

Method: incremental PCA (Ross et al. 2008, as in scikit-learn), with the randomised SVD, its seed
and the dtypes of PEFT 0.21.2, ``utils/incremental_pca.py``.
"""

from __future__ import annotations

import torch

_SEED = 42
_ITERATIONS = 4


class IncrementalPca:
    """The R main directions of all rows so far.

    Args:
        count: R.

    Attributes:
        components: ``[R, K]``, orthonormal; None before the first batch.
        values: ``[R]``, singular values.
        ratios: ``[R]``, the share of the rows' variance along each.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.components: torch.Tensor | None = None
        self.values = self.ratios = torch.empty(0)
        self._seen = 0
        self._mean = self._variance = torch.empty(0, dtype=torch.float64)

    def add(self, rows: torch.Tensor) -> None:
        """Takes a batch of rows ``[M, K]``, M at least R."""
        batch, total = len(rows), self._seen + len(rows)
        sums = rows.sum(dim=0, dtype=torch.float64)
        mean, variance = self._moments(rows, sums, total)
        if self.components is None:
            data = rows - mean.to(rows)
        else:
            batch_mean = rows.mean(dim=0)
            shift = (self._seen / total * batch) ** 0.5 * (self._mean - batch_mean)
            # In fp64 from here on, as the mean is.
            data = torch.cat(
                [
                    (self.values[:, None] * self.components).double(),
                    (rows - batch_mean).double(),
                    shift[None],
                ]
            )
        # No more of them than a small batch, or a narrow layer, has.
        wanted = min(2 * self.count, *data.shape)
        devices = [data.device] if data.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(_SEED)
            _, s, v = torch.svd_lowrank(data, q=wanted, niter=_ITERATIONS)
        vh = v.T
        # The largest entry of each direction is positive.
        signs = vh[torch.arange(len(vh), device=vh.device), vh.abs().argmax(dim=1)].sign()
        self.components = (vh * signs[:, None])[: self.count]
        self.values = s[: self.count]
        self.ratios = (s.square() / (variance * total).sum())[: self.count]
        self._seen, self._mean, self._variance = total, mean, variance

    def _moments(
        self, rows: torch.Tensor, sums: torch.Tensor, total: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns mean and variance ``[K]`` of all rows, in fp64 (Chan et al. 1983)."""
        batch = len(rows)
        around = rows - sums / batch
        own = around.square().sum(dim=0) - around.sum(dim=0).square() / batch
        if not self._seen:
            return sums / total, own / total
        before = self._mean * self._seen
        ratio = self._seen / batch
        between = ratio / total * (before / ratio - sums).square()
        return (before + sums) / total, (self._variance * self._seen + own + between) / total
