"""The processes of a run, through accelerate: one, or several under torchrun."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from fastlora.train.prepare import INSTALL, TrainError
from fastlora.validation import FastLoraError

_T = TypeVar("_T")


def launched() -> int:
    """Returns how many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class Processes:
    """What the processes of a run have to agree on.

    Every process has the whole model, and all of them hold the same adapters and optimizer states.

    Args:
        cpu: Don't use an accelerator.

    Attributes:
        count: How many there are.
        device: This one's.
        main: Whether this one writes and reports.

    Raises:
        TrainError: accelerate is not installed, or did not bring the processes together.
    """

    def __init__(self, cpu: bool) -> None:
        try:
            from accelerate import Accelerator
        except ImportError as error:
            raise TrainError(f"training needs accelerate; install it with: {INSTALL}") from error
        # Without an accelerator it has to be told, or each process of several is one of its own.
        cpu = cpu or not torch.accelerator.is_available()
        self._accelerator = Accelerator(cpu=cpu, mixed_precision="no")
        self.count: int = self._accelerator.num_processes
        started = launched()
        if self.count != started:
            raise TrainError(
                f"torchrun started {started} processes, and accelerate formed a group of "
                f"{self.count}; each would train alone and write over the others"
            )
        self.device: torch.device = self._accelerator.device
        self.main: bool = self._accelerator.is_main_process

    def own(self, parts: Sequence[_T]) -> Iterable[tuple[int, _T, bool]]:
        """Yields number and content of each part, and whether it is for this process."""
        for number, part in enumerate(parts):
            yield number, part, number % self.count == self._accelerator.process_index

    def summed(self, values: dict[str, float]) -> dict[str, float]:
        """Returns the sum over all processes of each value."""
        if self.count == 1:
            return values
        exact = torch.float32 if self.device.type == "mps" else torch.float64
        flat = torch.tensor(list(values.values()), dtype=exact, device=self.device)
        summed = self._accelerator.reduce(flat, "sum").tolist()
        return dict(zip(values, summed, strict=True))

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sums gradients over all processes, in one transfer for each dtype.

        A parameter that has no gradient in any of them has none behind it either.

        Args:
            parameters: The same in all processes, each once.
        """
        if self.count == 1:
            return
        for dtype in dict.fromkeys(p.dtype for p in parameters):
            own = [p for p in parameters if p.dtype == dtype]
            there = [float(p.grad is not None) for p in own]
            parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in own]
            flags = torch.tensor(there, dtype=dtype, device=own[0].device)
            flat = torch.cat([flags, *(part.reshape(-1) for part in parts)])
            summed = self._accelerator.reduce(flat, "sum")
            pieces = summed[len(own) :].split([p.numel() for p in own])
            for parameter, count, piece in zip(
                own, summed[: len(own)].tolist(), pieces, strict=True
            ):
                parameter.grad = piece.view_as(parameter) if count else None

    def in_main(self, work: Callable[[], None]) -> None:
        """Does something in the main process; its error is raised in all of them.

        Otherwise the others would wait for one that has stopped.
        """
        failure: list[Any] = [None]
        if self.main:
            try:
                work()
            except (FastLoraError, OSError) as error:
                failure[0] = error
        if self.count > 1:
            from accelerate.utils import broadcast_object_list

            broadcast_object_list(failure)
        if failure[0] is not None:
            raise failure[0]

    def end(self) -> None:
        """Leaves the process group."""
        self._accelerator.end_training()
