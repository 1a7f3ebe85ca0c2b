"""Linears that are fed by one x, for launches of a group, and what each should give."""

from __future__ import annotations

import torch

from fastlora.kernels.modules import Module
from fastlora.testing import assert_within_budget
from tests.support.kernels.lab import Lab


class Layers:
    """Linears that are fed by one x ``[M, K]``."""

    def __init__(
        self,
        lab: Lab,
        m: int,
        columns: tuple[int, ...],
        ranks: tuple[int, ...],
        dtype: torch.dtype,
        bias: bool = True,
        k: int = 72,
    ) -> None:
        self.lab, self.x = lab, lab.rand(m, k, dtype=dtype)
        self.lora_a = [lab.rand(r, k, dtype=dtype) for r in ranks]
        self.weight = [lab.rand(n, k, dtype=dtype) for n in columns]
        self.lora_b = [lab.rand(n, r, dtype=dtype) for n, r in zip(columns, ranks, strict=True)]
        self.bias = [lab.rand(n, dtype=dtype) if bias else None for n in columns]
        self.scaling = [torch.tensor([0.5 + i], device=lab.device) for i in range(len(ranks))]
        # No two kernels share an s: each reads the one that it should have.
        self.s = torch.cat([self.x @ a.t() for a in self.lora_a], 1)

    def modules(self, splits: int = 1, weights: bool = True) -> list[Module]:
        """The launch's, over NaN."""
        made = []
        for weight, b, bias, scaling in zip(
            self.weight, self.lora_b, self.bias, self.scaling, strict=True
        ):
            shape = (self.x.shape[0], weight.shape[0])
            y = self.lab.poisoned(*shape, dtype=self.x.dtype)
            if splits > 1:
                y = self.lab.poisoned(splits, *shape, dtype=torch.float32)
            made.append(Module(y, b, scaling, bias, weight if weights else None))
        return made

    def check(self, ys: list[torch.Tensor], product: bool = True) -> None:
        """Compares every y with float64."""
        results = []
        for dtype in (self.x.dtype, torch.float64):
            first, found = 0, []
            for y, (_, b, scaling, bias, weight) in zip(ys, self.modules(), strict=True):
                s = self.s[:, first : first + b.shape[1]].to(dtype)
                first += b.shape[1]
                own = (s @ b.to(dtype).t()) * scaling.to(dtype)
                if product:
                    own = own + self.x.to(dtype) @ weight.to(dtype).t()
                found.append(own if bias is None else own + bias.to(dtype))
                assert y.shape == own.shape
            results.append(found)
        for number, (y, plain, truth) in enumerate(zip(ys, *results, strict=True)):
            assert_within_budget(y, plain, truth, f"y of {number}")
