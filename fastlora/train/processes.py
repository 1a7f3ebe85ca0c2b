"""The processes that train together: what they must agree about, and those of `fastlora train`."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn

from fastlora.sharding import is_sharded, several_processes
from fastlora.train.losses import AdapterLosses
from fastlora.validation import ConfigError, FastLoraError, near_names

T = TypeVar("T")

INSTALL = "pip install 'fastlora-triton[train]'"
# Beside adapters' names, none of which has a slash.
_STOP = "/stop"


class TrainError(FastLoraError, RuntimeError):
    """A training run cannot start or go on."""


def needed(name: str, what: str = "training needs") -> Any:
    """Imports a library of the extra ``train``; raises `TrainError` where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise TrainError(f"{what} {name}; install it with: {INSTALL}") from error


class Agreed(NamedTuple):
    """A batch's losses as all processes see them.

    Attributes:
        finite: Adapters with a loss somewhere, and none anywhere that is not finite.
        left_out: Adapters with a loss somewhere that is not finite.
        weights: What this process multiplies its loss of each adapter by, so that the mean of all
            processes' gradients is that of one process with the whole batch.
    """

    finite: tuple[str, ...]
    left_out: tuple[str, ...]
    weights: dict[str, float]


class BatchGroup:
    """The processes that share batches; or one on its own, which agrees with itself at no cost.

    ``group`` is as in `AdapterOptimizers`; ``names`` come in one order in all processes.
    """

    def __init__(self, group: Any, names: Sequence[str], device: torch.device) -> None:
        if group == "auto":
            group = dist.group.WORLD if several_processes() else None
        self._group = group
        self._names = list(names)
        self._device = device
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    @property
    def alone(self) -> bool:
        """Whether nobody else takes part."""
        return self.size == 1

    def total(self, *counts: Mapping[str, float]) -> list[dict[str, float]]:
        """Returns the sums over all processes of numbers by adapter; missing ones are zeros."""
        rows = [[float(table.get(name, 0)) for name in self._names] for table in counts]
        if not self.alone:
            sent = torch.tensor(rows, dtype=_widest(self._device), device=self._device)
            dist.all_reduce(sent, group=self._group)
            rows = sent.tolist()
        return [dict(zip(self._names, row, strict=True)) for row in rows]

    def agree(self, losses: AdapterLosses) -> Agreed:
        """Returns which losses count, the same in every process."""
        seen, bad, tokens = self.total(
            dict.fromkeys(losses.values, 1), dict.fromkeys(losses.non_finite, 1), losses.tokens
        )
        finite = tuple(name for name in self._names if seen[name] and not bad[name])
        left_out = tuple(name for name in self._names if bad[name])
        weights = dict.fromkeys(losses.values, float(self.size))
        if losses.own_divisors:
            # From means over own tokens to shares of the mean over everybody's.
            weights = {n: self.size * losses.tokens[n] / tokens[n] for n in losses.values}
        return Agreed(finite, left_out, weights)

    def anywhere(self, names: Collection[str]) -> set[str]:
        """Returns the names that any process has."""
        (found,) = self.total(dict.fromkeys(names, 1))
        return {name for name, count in found.items() if count}

    def average_(self, parameters: Iterable[torch.Tensor]) -> None:
        """Replaces gradients by their means, which leaves those that are means already.

        Those of DTensors are always shared: FSDP2 keeps what is not elsewhere.
        """
        for parameter in parameters:
            if self.alone or is_sharded(parameter) or not parameter.requires_grad:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad, group=self._group)
            parameter.grad /= self.size


def launched() -> int:
    """Returns how many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class RunProcesses:
    """The processes of `fastlora train`, through accelerate: one, or several under torchrun.

    Every process has the whole model, and all of them hold the same adapters and optimizer states.
    `main` writes and reports; trackers that write files do in ``folder``. Raises `TrainError` where
    accelerate did not bring the processes together, and as `check_trackers`.
    """

    def __init__(self, cpu: bool, trackers: Sequence[str] = (), folder: Path | None = None) -> None:
        accelerate = needed("accelerate")
        # Without an accelerator it has to be told, or each process of several is one of its own.
        cpu = cpu or not torch.accelerator.is_available()
        check_trackers(trackers)
        self._tracked = bool(trackers)
        options = {"log_with": list(trackers), "project_dir": folder} if trackers else {}
        self._accelerator = accelerate.Accelerator(cpu=cpu, mixed_precision="no", **options)
        self.count: int = self._accelerator.num_processes
        started = launched()
        if self.count != started:
            raise TrainError(
                f"torchrun started {started} processes, and accelerate formed a group of "
                f"{self.count}; each would train alone and write over the others"
            )
        self.device: torch.device = self._accelerator.device
        self.main: bool = self._accelerator.is_main_process

    def does(self, number: int) -> bool:
        """Returns whether the part of that number of a step's work is for this process."""
        return number % self.count == self._accelerator.process_index

    def summed(self, values: dict[str, float], *, stop: bool) -> tuple[dict[str, float], bool]:
        """Returns the sum over all processes of each value, and whether any of them is to stop."""
        sent = {**values, _STOP: float(stop)}
        (total,) = BatchGroup("auto", list(sent), self.device).total(sent)
        return total, total.pop(_STOP) > 0

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sums gradients over all processes, in one transfer for each dtype.

        All of them name the same parameters, each once. One that has no gradient in any of them has
        none behind it either.
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
            counts = summed[: len(own)].tolist()
            for parameter, count, piece in zip(own, counts, pieces, strict=True):
                parameter.grad = piece.view_as(parameter) if count else None

    def in_main(self, work: Callable[[], T]) -> T:
        """Does something in the main process; its result or error is that of all of them.

        Otherwise the others would wait for one that has stopped.
        """
        outcome: list[Any] = [None, None]
        if self.main:
            try:
                outcome[0] = work()
            except (FastLoraError, OSError) as error:
                outcome[1] = error
        if self.count > 1:
            from accelerate.utils import broadcast_object_list

            broadcast_object_list(outcome)
        result, failure = outcome
        if failure is not None:
            raise failure
        return cast(T, result)

    def start_trackers(self) -> None:
        """Has the trackers begin a run; call it where files may be written."""
        if self._tracked:
            self._accelerator.init_trackers("trackers")

    def track(self, values: dict[str, Any], step: int) -> None:
        """Gives the trackers numbers and texts by name."""
        if self._tracked and values:
            self._accelerator.log(values, step=step)

    def end_trackers(self) -> None:
        """Has the trackers write what they hold, and end."""
        while self._accelerator.trackers:
            self._accelerator.trackers.pop().finish()

    def end(self) -> None:
        """Ends the trackers and leaves the process group."""
        while self._accelerator.trackers:  # where another error ended the run, which is raised
            with contextlib.suppress(OSError):
                self.end_trackers()
        self._accelerator.end_training()


def check_trackers(names: Sequence[str]) -> None:
    """Raises unless accelerate has all of these trackers, installed."""
    if not names:
        return
    tracking = needed("accelerate", "trackers need").tracking
    known = tracking.LOGGER_TYPE_TO_CLASS
    built_in = {str(kind) for kind in tracking.LoggerType}
    there = {str(kind) for kind in tracking.get_available_trackers()} | (set(known) - built_in)
    for name in names:
        if name not in known:
            raise ConfigError(
                f"track: there is no tracker {name!r}{near_names(name, known)}; accelerate has "
                f"{', '.join(sorted(known))}"
            )
        if name not in there:
            raise TrainError(f"tracker {name!r} is not installed: pip install {name}")


def _widest(device: torch.device) -> torch.dtype:
    """Returns the widest dtype that a device adds in."""
    return torch.float32 if device.type == "mps" else torch.float64
