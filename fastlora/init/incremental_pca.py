"""Incremental PCA: the principal directions of rows that arrive in batches.

The method is that of Ross et al. 2008, as in scikit-learn, with the randomized SVD, the seed, and
the dtypes of PEFT 0.21.2, ``utils/incremental_pca.py``. The memory is proportional to the number of
directions and does not depend on the number of batches.
"""

from __future__ import annotations

import torch

_SEED = 42
_ITERATIONS = 4


class IncrementalPca:
    """Incremental PCA, which computes the principal directions of rows that arrive in batches.

    It computes the first R principal directions of all rows added so far.

    Args:
        count: Number of directions, R.
        tau: A direction has converged once its cosine similarity with its previous value is at
            least ``tau``.

    Attributes:
        components: The directions, ``[R, K]``, orthonormal, or None before the first batch.
        values: Singular values, ``[R]``.
        ratios: Fraction of the rows' variance that each direction explains, ``[R]``.
        settled: Whether each direction has converged, a bool CPU tensor of shape ``[R]``.
        most_rows: Number of rows in the largest batch so far.
    """

    def __init__(self, count: int, tau: float) -> None:
        self.count, self.tau, self.most_rows = count, tau, 0
        self.components: torch.Tensor | None = None
        self.values = self.ratios = torch.empty(0, device="cpu")
        self.settled = torch.zeros(count, dtype=torch.bool, device="cpu")
        self._seen = 0
        self._mean = self._variance = torch.empty(0, dtype=torch.float64, device="cpu")

    def partial_fit(self, rows: torch.Tensor) -> None:
        """Update the principal components with a batch of rows.

        The components are the directions. The rows are ``[M, K]``. A batch with fewer than R rows
        is ignored.
        """
        self.most_rows = max(self.most_rows, len(rows))
        if len(rows) < self.count:
            return
        batch, total, before = len(rows), self._seen + len(rows), self.components
        sums = rows.sum(dim=0, dtype=torch.float64)
        mean, variance = self._compute_updated_mean_and_variance(rows, sums, total)
        if before is None:
            data = rows - mean.to(rows)
        else:
            batch_mean = rows.mean(dim=0)
            shift = (self._seen / total * batch) ** 0.5 * (self._mean - batch_mean)
            # From here on, the computation is in fp64, like the mean.
            data = torch.cat(
                [
                    (self.values[:, None] * before).double(),
                    (rows - batch_mean).double(),
                    shift[None],
                ]
            )
        # A small batch or a narrow layer has fewer than 2 R directions.
        wanted = min(2 * self.count, *data.shape)
        devices = [data.device] if data.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(_SEED)
            _, s, v = torch.svd_lowrank(data, q=wanted, niter=_ITERATIONS)
        vh = v.T
        # The sign is chosen so that the largest entry of each direction is positive.
        signs = vh[torch.arange(len(vh), device=vh.device), vh.abs().argmax(dim=1)].sign()
        after = self.components = (vh * signs[:, None])[: self.count]
        if before is not None and len(before) == len(after):
            self.settled = (torch.cosine_similarity(after, before.to(after)) >= self.tau).cpu()
        self.values = s[: self.count]
        self.ratios = (s.square() / (variance * total).sum())[: self.count]
        self._seen, self._mean, self._variance = total, mean, variance

    def _compute_updated_mean_and_variance(
        self, rows: torch.Tensor, sums: torch.Tensor, total: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the mean and variance of all rows so far, including a new batch.

        The result is a tuple (mean, variance) of fp64 tensors with the shape ``[K]``. This method
        does not change the object, so the caller must store the result. The algorithm is that of
        Chan et al. 1983.

        Args:
            rows: The rows of the new batch.
            sums: Sum of these rows, ``[K]`` in fp64.
            total: Number of all rows, including the new batch.
        """
        batch = len(rows)
        around = rows - sums / batch
        own = around.square().sum(dim=0) - around.sum(dim=0).square() / batch
        if not self._seen:
            return sums / total, own / total
        before = self._mean * self._seen
        ratio = self._seen / batch
        between = ratio / total * (before / ratio - sums).square()
        return (before + sums) / total, (self._variance * self._seen + own + between) / total
