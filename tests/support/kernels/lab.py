"""Where the kernel tests run, and the tensors that they run on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter."""
    from fastlora.env import triton_interpreted  # reads its environment: not before it is set

    return triton_interpreted()


def native() -> bool:
    """Whether they run on a GPU."""
    return torch.cuda.is_available() and not interpreted()


def cap_warps(most: int) -> None:
    """Gives every kernel of this process so many warps at most; before any config was chosen."""
    from fastlora.kernels import configs

    plain = configs.config_of_row

    def capped(*args: Any, **kwargs: Any) -> configs.KernelConfig:
        config = plain(*args, **kwargs)
        return replace(config, num_warps=min(config.num_warps, most))

    configs.config_of_row = capped  # what `choose` asks


def put_rows(monkeypatch: Any, chip: Any, key: tuple[str, str], rows: Sequence[Any]) -> None:
    """Puts measured rows in front of a chip's table, and has nothing of it remembered."""
    from fastlora.kernels import config_tables, configs

    table = config_tables.table_of(chip)
    monkeypatch.setitem(config_tables.MEASURED, chip.arch, {**table, key: (*rows, *table[key])})
    for name in ("choose", "plan_of"):
        function = getattr(configs, name)
        monkeypatch.setattr(configs, name, getattr(function, "__wrapped__", function))


class Lab:
    """Makes the tensors of a test, on the device under test."""

    @property
    def device(self) -> torch.device:
        """Where the test's tensors lie."""
        return torch.device("cuda" if native() else "cpu")

    def rand(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Normal values, the same on every device."""
        return torch.randn(shape).to(self.device, dtype)

    def poisoned(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """An output buffer of NaN: what a kernel forgets to write shows."""
        return torch.full(shape, float("nan"), dtype=dtype, device=self.device)

    def strided(self, x: torch.Tensor, layout: str) -> torch.Tensor:
        """The same values ``[M, K]`` in another layout; what lies between them is NaN."""
        if layout == "contiguous":
            return x
        if layout == "transposed":
            return x.t().contiguous().t()
        m, k = x.shape
        if layout == "rows":  # a column slice of a wider matrix
            wide = self.poisoned(m, k + 5, dtype=x.dtype)
            wide[:, 3 : 3 + k] = x
            return wide[:, 3 : 3 + k]
        if layout == "both":
            wide = self.poisoned(2 * m, 3 * k, dtype=x.dtype)
            wide[::2, ::3] = x
            return wide[::2, ::3]
        raise ValueError(layout)
