"""Operands of the launches that train a mixed batch, for `launches.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastlora.kernels.chips import Chip
from fastlora.kernels.configs import Shipped
from fastlora.kernels.mixed_lora_grad_reduce import DsPlanes
from fastlora.kernels.mixed_rows import DropoutTables

# Launches that siblings share in training.
SHARED_BY_SIBLINGS = ("mixed_lora_train_shrink", "mixed_lora_grad_a")
_SLOTS = 64
_PLANES = 96
_RUN = 128


def is_compiled(chip: Chip, shipped: Shipped) -> bool:
    """Whether a config is compiled for a chip: in 16 bits for all, in fp32 once a family.

    FMAs, which no test holds to anything but that they compile, on one NVIDIA chip.
    """
    if shipped.dtype != torch.float32:
        return True
    fma = shipped.config.input_precision == "ieee" and chip.max_registers is not None
    return chip.arch == "sm_80" if fma else chip.arch == chip.family


class MixedGradOperands:
    """What `launches._Operands` calls the launchers with; its attributes are described there."""

    config: Any
    siblings: bool
    m: int
    n: int
    k: int
    pdl: bool
    factor_dtype: torch.dtype
    empty: Callable[..., torch.Tensor]
    route: Callable[[], tuple[torch.Tensor, ...]]
    addresses: Callable[..., torch.Tensor]

    def ints(self, *shape: int) -> torch.Tensor:
        return self.empty(*shape, dtype=torch.int32)

    def planes(self, *shape: int) -> torch.Tensor:
        return self.empty(*shape, dtype=torch.float32)

    def drops(self) -> DropoutTables | None:
        """Returns the tables of a dropout, None where siblings share a launch."""
        if self.siblings:
            return None
        return DropoutTables(
            self.ints(_SLOTS + 1), self.addresses(_SLOTS), self.ints(_SLOTS), self.planes(_SLOTS)
        )

    def mixed_lora_train_shrink(self, launch: Callable[..., None]) -> None:
        modules = 3 if self.siblings else 1
        launch(
            self.planes(4, modules, self.m, 64),
            self.empty(self.m, self.k),
            *self.route(),
            self.ints(_SLOTS),
            self.addresses(modules, _SLOTS),
            self.ints(modules, _SLOTS),
            factor_dtype=self.factor_dtype,
            config=self.config,
            dropout=self.drops(),
        )

    def tables_b(self) -> tuple[torch.Tensor, ...]:
        """Returns the addresses of lora_b and lora_bias, the ranks and the scalings."""
        return (
            self.addresses(_SLOTS),
            self.addresses(_SLOTS),
            self.ints(_SLOTS),
            self.planes(_SLOTS),
        )

    def mixed_lora_train_linear(self, launch: Callable[..., None]) -> None:
        launch(
            self.empty(self.m, self.n),
            self.empty(self.m, self.k),
            self.empty(self.n, self.k),
            self.empty(self.n),
            self.empty(1, self.m, 64),
            *self.route(),
            *self.tables_b(),
            factor_dtype=self.factor_dtype,
            config=self.config,
            pdl=self.pdl,
            by_column=True,
        )

    def mixed_lora_train_expand(self, launch: Callable[..., None]) -> None:
        launch(
            self.empty(self.m, self.n),
            self.empty(1, self.m, 64),
            *self.route(),
            *self.tables_b(),
            factor_dtype=self.factor_dtype,
            config=self.config,
            by_column=True,
        )

    def mixed_lora_grad_b(self, launch: Callable[..., None]) -> None:
        launch(
            self.planes(32, self.m, 64),
            self.planes(_PLANES, self.n, 64),
            self.planes(_PLANES, self.n),
            self.empty(self.m, self.n),
            self.empty(self.m, 64),
            *self.route(),
            self.ints(_SLOTS),
            self.addresses(_SLOTS),
            self.ints(_SLOTS),
            rows=_RUN,
            max_rank=64,
            factor_dtype=self.factor_dtype,
            config=self.config,
        )

    def mixed_lora_grad_a(self, launch: Callable[..., None]) -> None:
        modules = 3 if self.siblings else 1
        launch(
            self.planes(_PLANES, modules, 64, self.k),
            self.empty(self.m, self.k),
            self.empty(modules, self.m, 64),
            *self.route(),
            self.ints(_SLOTS),
            self.ints(modules, _SLOTS),
            rows=_RUN,
            max_columns=64,
            config=self.config,
            dropout=self.drops(),
        )

    def mixed_lora_grad_x(self, launch: Callable[..., None]) -> None:
        launch(
            self.empty(self.m, self.k),
            self.empty(self.m, self.n),
            self.empty(self.n, self.k).t(),
            None,
            self.empty(1, self.m, 64),
            *self.route(),
            self.addresses(_SLOTS),
            None,
            self.ints(_SLOTS),
            None,
            factor_dtype=self.factor_dtype,
            config=self.config,
            pdl=False,
            dropout=self.drops(),
        )

    def mixed_lora_grad_x_add(self, launch: Callable[..., None]) -> None:
        launch(
            self.empty(self.m, self.k),
            self.empty(1, self.m, 64),
            *self.route(),
            self.addresses(_SLOTS),
            None,
            self.ints(_SLOTS),
            None,
            factor_dtype=self.factor_dtype,
            config=self.config,
            dropout=self.drops(),
        )

    def mixed_lora_grad_reduce(self, launch: Callable[..., None]) -> None:
        planes = self.planes(_PLANES, self.n, 64).transpose(1, 2).unsqueeze(1)
        launch(
            self.empty(_SLOTS * self.n, dtype=self.factor_dtype),
            planes,
            self.ints(_SLOTS + 1),
            self.ints(1, _SLOTS),
            self.planes(1, _SLOTS),
            self.addresses(1, _SLOTS),
            m=self.m,
            columns=self.n,
            rows=_RUN,
            by_column=True,
            config=self.config,
            bias_planes=self.planes(_PLANES, self.n),
            bias_offset=self.addresses(1, _SLOTS),
            ds=DsPlanes(self.empty(self.m, 64), self.planes(32, self.m, 64), *self.route()[1:]),
        )
