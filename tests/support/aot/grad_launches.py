"""Operands of the launches that train a single adapter, for `launches.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch


class GradOperands:
    """What `launches._Operands` calls the launchers with; its attributes are described there."""

    config: Any
    m: int
    n: int
    k: int
    r: int
    heavy: bool
    factor_dtype: torch.dtype
    empty: Callable[..., torch.Tensor]

    def dropout(self) -> dict[str, Any]:
        seed = self.empty(1, dtype=torch.int64)
        return {"seed": seed, "dropout_p": 0.1} if self.heavy else {}

    def sum_of(self, *shape: int) -> torch.Tensor:
        """An output of the backward: planes, or itself in the factor's dtype."""
        return self.empty(4, *shape, dtype=torch.float32) if self.heavy else self.empty(*shape)

    def lora_grad_b(self, launch: Callable[..., None]) -> None:
        launch(
            self.sum_of(self.m, self.r),
            self.sum_of(self.n, self.r),
            self.empty(4, self.n, dtype=torch.float32) if self.heavy else None,
            self.empty(self.m, self.n),
            self.empty(self.m, self.r),
            self.empty(self.n, self.r, dtype=self.factor_dtype),
            self.empty(self.r, dtype=torch.float32),
            config=self.config,
        )

    def lora_grad_a(self, launch: Callable[..., None]) -> None:
        config = self.config if self.heavy else replace(self.config, siblings=1)
        launch(
            [self.sum_of(self.r, self.k) for _ in range(config.siblings)],
            self.empty(self.m, self.k),
            [self.empty(self.m, self.r) for _ in range(config.siblings)],
            seeds=self.empty(config.siblings, dtype=torch.int64) if self.heavy else None,
            dropout_p=[0.1] * config.siblings,
            config=config,
        )

    def lora_grad_x(self, launch: Callable[..., None]) -> None:
        launch(
            self.empty(self.m, self.k),
            self.empty(self.m, self.n),
            self.empty(self.n, self.k).t(),
            self.empty(self.m, self.r),
            self.empty(self.r, self.k, dtype=self.factor_dtype).t(),
            None,
            bias=None,
            s_out=None,
            config=self.config,
            pdl=False,
            **self.dropout(),
        )

    def lora_grad_x_add(self, launch: Callable[..., None]) -> None:
        launch(
            self.empty(self.m, self.k),
            self.empty(self.m, self.r),
            self.empty(self.r, self.k, dtype=self.factor_dtype).t(),
            None,
            config=self.config,
            **self.dropout(),
        )

    def plane_sums(self, launch: Callable[..., None]) -> None:
        outs = [self.empty(self.r + 1, self.k), *(self.empty(64, self.k) for _ in range(3))]
        planes = [self.empty(4, *out.shape, dtype=torch.float32) for out in outs]
        launch(outs, planes, config=self.config)
