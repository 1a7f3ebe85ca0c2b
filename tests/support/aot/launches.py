"""What is compiled ahead of time: the launch of every shipped config, in some variants.

A launch is recorded from the launcher itself: the same constants, strides and options as on a GPU.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch

from fastlora.kernels.chips import Chip
from fastlora.kernels.configs import (
    MAX_SPLITS,
    Shipped,
    all_invariant_shipped,
    all_shipped,
    kernel_of,
)
from tests.support.aot.grad_launches import GradOperands
from tests.support.aot.mixed_grad_launches import (
    SHARED_BY_SIBLINGS,
    MixedGradOperands,
    is_compiled,
)
from tests.support.chips import GPUS as CHIPS

MIXED_K_LOOPS = ("mixed_lora_shrink", "mixed_lora_linear", "mixed_lora_add")
_SLOTS = 64
_ROWS = 64


class Launch(NamedTuple):
    """One call of a kernel: the function and its keyword arguments, options included."""

    kernel: Any
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One kernel to compile: a shipped config on a chip, in one variant of its operands."""

    arch: str
    shipped: Shipped
    variant: str

    @property
    def is_mixed(self) -> bool:
        """Whether it is a kernel for mixed batches."""
        return self.shipped.kernel.startswith("mixed_")


def cases(chips: Sequence[Chip] = CHIPS) -> list[Case]:
    """Returns every case: each config in its heaviest variant, and some in others on sm_90.

    "heavy" is fp32 factors, planes, s_out, every bias and dropout, three siblings, at a size that
    the tiles divide; "plain" has none of these; "ragged" is heavy at sizes that 16 divides but no
    tile does, of the K loops for mixed batches on every chip; "uneven" is heavy at odd sizes, where
    nothing can be vectorised. "alone" is heavy without siblings, of the shrinks so narrow that they
    often run so. "invariant" is heavy in the batch-invariant mode, "unshared" the same without
    siblings. "training" is heavy as a mixed batch with gradients runs it: dropout, lora_b as its
    parameter lies. "siblings" is that for three modules that share x, which are without dropout.
    """
    result = []
    for chip in chips:
        for shipped in all_shipped(chip):
            if shipped.kernel.startswith(("mixed_lora_train", "mixed_lora_grad")):
                if is_compiled(chip, shipped):
                    result.append(Case(chip.arch, shipped, "training"))
                    if shipped.kernel in SHARED_BY_SIBLINGS and shipped.dtype == torch.bfloat16:
                        result.append(Case(chip.arch, shipped, "siblings"))
                continue
            result.append(Case(chip.arch, shipped, "heavy"))
            if chip.arch == "sm_80" and shipped.kernel in ("lora_grad_a", "lora_grad_b"):
                result.append(Case(chip.arch, shipped, "plain"))
            if chip.arch == "sm_90" and shipped.dtype == torch.bfloat16 and shipped.r == 64:
                result.append(Case(chip.arch, shipped, "plain"))
                result.append(Case(chip.arch, shipped, "ragged"))
                if shipped.config.block_m == 16 or shipped.kernel.startswith("lora_grad_"):
                    result.append(Case(chip.arch, shipped, "uneven"))
            elif shipped.kernel in MIXED_K_LOOPS and shipped.dtype == torch.bfloat16:
                result.append(Case(chip.arch, shipped, "ragged"))
            narrow = shipped.kernel == "mixed_lora_shrink" and shipped.config.block_r == 16
            if narrow and shipped.dtype == torch.bfloat16:
                result.append(Case(chip.arch, shipped, "alone"))
        for shipped in all_invariant_shipped(chip):
            result.append(Case(chip.arch, shipped, "invariant"))
            if shipped.kernel == "mixed_lora_shrink":
                result.append(Case(chip.arch, shipped, "unshared"))
    return result


def record(case: Case) -> Launch:
    """Returns the launch that the case's launcher makes."""
    return _recorded(case.shipped.kernel, _Operands(case))


class _Operands(GradOperands, MixedGradOperands):
    """Makes the operands of a case, on the meta device, and calls its launcher with them."""

    def __init__(self, case: Case) -> None:
        self.stem, self.dtype, self.r, self.config = case.shipped
        self.heavy = case.variant != "plain"
        self.modules = 3 if self.heavy and case.variant not in ("alone", "unshared") else 1
        self.siblings = case.variant == "siblings"
        chip = next(chip for chip in CHIPS if chip.arch == case.arch)
        self.pdl = chip.has_pdl
        self.m = _ROWS if case.is_mixed else getattr(self.config, "block_m", _ROWS)
        self.n = self.k = {"ragged": 4112, "uneven": 4099}.get(case.variant, 4096)
        if case.variant == "uneven" and not case.is_mixed:
            self.r -= 1
        self.factor_dtype = torch.float32 if self.heavy else self.dtype

    def __call__(self, module: Any) -> None:
        getattr(self, self.stem)(getattr(module, f"launch_{kernel_of(self.stem)}"))

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")

    def lora_shrink(self, launch: Callable[..., None]) -> None:
        launch(
            self.empty(self.config.splits, self.m, self.r, dtype=torch.float32),
            self.empty(self.m, self.k),
            self.empty(self.r, self.k, dtype=self.factor_dtype),
            seed=self.empty(1, dtype=torch.int64),
            dropout_p=0.1 if self.heavy else 0.0,
            config=self.config,
        )

    def lora_linear(self, launch: Callable[..., None]) -> None:
        s = self.empty(self.m, self.r)
        planes = self.empty(MAX_SPLITS, self.m, self.r, dtype=torch.float32)
        launch(
            self.empty(self.m, self.n),
            self.empty(self.m, self.k),
            self.empty(self.n, self.k),
            planes if self.heavy else s,
            self.empty(self.n, self.r, dtype=self.factor_dtype),
            self.empty(self.r, dtype=torch.float32),
            bias=self.empty(self.n) if self.heavy else None,
            s_out=s if self.heavy else None,
            config=self.config,
            pdl=self.pdl,
        )

    def lora_expand(self, launch: Callable[..., None]) -> None:
        launch(
            self.empty(self.m, self.n),
            self.empty(self.m, self.r),
            self.empty(self.n, self.r, dtype=self.factor_dtype),
            self.empty(self.r, dtype=torch.float32),
            config=self.config,
        )

    def lora_dropout(self, launch: Callable[..., None]) -> None:
        launch(
            self.empty(self.m, self.k),
            self.empty(self.m, self.k),
            seed=self.empty(1, dtype=torch.int64),
            dropout_p=0.1,
            config=self.config,
        )

    def route(self) -> tuple[torch.Tensor, ...]:
        """Returns order, segment_of and segment_slot."""
        sizes = (self.m, self.m, min(self.m, _SLOTS + 2))
        return tuple(self.empty(size, dtype=torch.int32) for size in sizes)

    def addresses(self, *shape: int) -> torch.Tensor:
        return self.empty(*shape, dtype=torch.int64)

    def tables(self) -> tuple[torch.Tensor | None, ...]:
        """Returns the addresses of lora_b and lora_bias, the ranks and the scalings."""
        return (
            self.addresses(_SLOTS),
            self.addresses(_SLOTS) if self.heavy else None,
            self.empty(_SLOTS, dtype=torch.int32),
            self.empty(_SLOTS, dtype=torch.float32),
        )

    def mixed_lora_shrink(self, launch: Callable[..., None]) -> None:
        launch(
            self.empty(4, self.modules, self.m, 64, dtype=torch.float32),
            self.empty(self.m, self.k),
            *self.route(),
            self.empty(_ROWS, dtype=torch.int32),
            self.addresses(self.modules, _SLOTS),
            self.empty(self.modules, _SLOTS, dtype=torch.int32),
            factor_dtype=self.factor_dtype,
            config=self.config,
        )

    def mixed_lora_linear(self, launch: Callable[..., None]) -> None:
        launch(
            self.empty(self.m, self.n),
            self.empty(self.m, self.k),
            self.empty(self.n, self.k),
            self.empty(self.n) if self.heavy else None,
            self.empty(4, self.m, 64, dtype=torch.float32),
            *self.route(),
            *self.tables(),
            factor_dtype=self.factor_dtype,
            config=self.config,
            pdl=self.pdl and not self.config.batch_invariant,
        )

    def mixed_lora_expand(self, launch: Callable[..., None]) -> None:
        launch(
            self.empty(self.m, self.n),
            self.empty(4, self.m, 64, dtype=torch.float32),
            *self.route(),
            *self.tables(),
            factor_dtype=self.factor_dtype,
            config=self.config,
        )

    def mixed_lora_add(self, launch: Callable[..., None]) -> None:
        launch(
            self.empty(self.m, self.n),
            self.empty(self.m, self.k),
            *self.route(),
            self.empty(_ROWS, dtype=torch.int32),
            self.addresses(_SLOTS),
            *self.tables(),
            factor_dtype=self.factor_dtype,
            config=self.config,
        )

    def mixed_dora_scale(self, launch: Callable[..., None]) -> None:
        launch(
            self.empty(self.m, self.n),
            self.empty(self.n) if self.heavy else None,
            *self.route(),
            self.empty(_ROWS, dtype=torch.int32),
            self.addresses(_SLOTS),
            config=self.config,
        )


def _recorded(stem: str, launch: Callable[[Any], None]) -> Launch:
    """Returns the one launch that a launcher makes."""
    with recording(kernel_of(stem)) as made:
        launch(importlib.import_module(f"fastlora.kernels.{kernel_of(stem)}"))
    (only,) = made
    return only


@contextlib.contextmanager
def recording(*stems: str) -> Iterator[list[Launch]]:
    """Replaces kernels by ones that write down their launches, in the list that it yields."""
    made: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda **arguments: made.append(Launch(self.kernel, arguments))

    with contextlib.ExitStack() as stack:
        for stem in stems:
            module = importlib.import_module(f"fastlora.kernels.{stem}")
            name = f"_{stem}_kernel"
            recorder = Recorder(getattr(module, name))
            stack.enter_context(mock.patch.object(module, name, recorder))
        yield made
