"""Communication between processes that train together, and the processes of `fastlora train`."""

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

from fastlora.command_line import install_command
from fastlora.sharding import has_multiple_processes, is_dtensor
from fastlora.train.losses import AdapterLosses
from fastlora.validation import ConfigError, FastLoraError, near_names

T = TypeVar("T")

# This key is used beside adapter names, which cannot contain a slash.
_STOP = "/stop"


class TrainError(FastLoraError, RuntimeError):
    """Raised when a problem prevents a training run from starting or continuing.

    The error message describes the problem.
    """


def import_or_raise(name: str, what: str = "training needs") -> Any:
    """Import and return a module, or raise an error if it is missing.

    The module is a library of the ``train`` extra. The error is a `TrainError`.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise TrainError(f"{what} {name}; install it with: {install_command('train')}") from error


class AgreedFiniteLosses(NamedTuple):
    """The finite losses of a batch, as agreed by all training processes.

    Each adapter has its own loss. If an adapter's loss is not finite in at least one process, all
    processes skip the loss of that adapter. The losses of the other adapters are still used. The
    tuple contains the names of the adapters with finite losses, the names of the adapters whose
    losses are skipped, and the weights of this process's losses.

    Attributes:
        finite: Names of the adapters with a loss in at least one process and a non-finite loss in
            no process.
        left_out: Names of the adapters with a non-finite loss in at least one process.
        weights: Dict that maps each adapter with a loss in this process to the weight of the loss.
            With these weights, the mean of the gradients of all processes equals the gradient of
            one process with the whole batch.
    """

    finite: tuple[str, ...]
    left_out: tuple[str, ...]
    weights: dict[str, float]


class BatchProcessGroup:
    """A group of processes that train together on each batch.

    Each batch is split among the processes. The methods of the group are collective operations. A
    process that trains alone does not communicate.

    Args:
        group: See `AdapterOptimizers`.
        names: Names of the adapters, in the same order in all processes.
        device: Device for the tensors that the processes exchange.
    """

    def __init__(self, group: Any, names: Sequence[str], device: torch.device) -> None:
        if group == "auto":
            group = dist.group.WORLD if has_multiple_processes() else None
        self._group = group
        self._names = list(names)
        self._device = device
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    @property
    def is_single_process(self) -> bool:
        """Whether the group consists of a single process."""
        return self.size == 1

    def sum_counts(self, *counts: Mapping[str, float]) -> list[dict[str, float]]:
        """Sum each dict of counts over all processes.

        The result is a list with one dict of sums per argument. Each dict maps adapter
        names to counts. A missing count is zero.
        """
        rows = [[float(table.get(name, 0)) for name in self._names] for table in counts]
        if not self.is_single_process:
            sent = torch.tensor(rows, dtype=_widest_float_dtype(self._device), device=self._device)
            dist.all_reduce(sent, group=self._group)
            rows = sent.tolist()
        return [dict(zip(self._names, row, strict=True)) for row in rows]

    def agree_on_finite_losses(self, losses: AdapterLosses) -> AgreedFiniteLosses:
        """Agree with the other processes on which adapters' losses are finite.

        An adapter's loss must be finite in every process that has a loss of the adapter. The result
        also contains a weight for each loss of this process.
        """
        seen, bad, tokens = self.sum_counts(
            dict.fromkeys(losses.values, 1), dict.fromkeys(losses.non_finite, 1), losses.tokens
        )
        finite = tuple(name for name in self._names if seen[name] and not bad[name])
        left_out = tuple(name for name in self._names if bad[name])
        weights = dict.fromkeys(losses.values, float(self.size))
        if losses.own_divisors:
            # Turn a mean over the tokens of this process into a share of the mean over all tokens.
            weights = {n: self.size * losses.tokens[n] / tokens[n] for n in losses.values}
        return AgreedFiniteLosses(finite, left_out, weights)

    def union_of_names(self, names: Collection[str]) -> set[str]:
        """Return the union of the names from all processes."""
        (found,) = self.sum_counts(dict.fromkeys(names, 1))
        return {name for name, count in found.items() if count}

    def average_gradients_(self, parameters: Iterable[torch.Tensor]) -> None:
        """Replace each gradient with its mean over all processes.

        A gradient that is already the mean does not change. DTensors are skipped, because FSDP2
        stores unreduced gradients outside of ``grad``.
        """
        for parameter in parameters:
            if self.is_single_process or is_dtensor(parameter) or not parameter.requires_grad:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad, group=self._group)
            parameter.grad /= self.size


def torchrun_world_size() -> int:
    """Return the number of processes that torchrun started.

    Without torchrun, the number is 1.
    """
    return int(os.environ.get("WORLD_SIZE", "1"))


class RunProcesses:
    """The processes of a training run.

    A run has a single process, or several processes that torchrun started. Every process has the
    whole model, with the same adapters and optimizer states. Only the main process (`main`) writes
    files and reports.

    Args:
        cpu: Whether to run on the CPU even if there is an accelerator.
        trackers: Names of accelerate's trackers to use.
        folder: Folder for the trackers that write files.

    Raises:
        TrainError: accelerate did not form one group of all processes.
        ConfigError, TrainError: See `check_trackers`.
    """

    def __init__(self, cpu: bool, trackers: Sequence[str] = (), folder: Path | None = None) -> None:
        accelerate = import_or_raise("accelerate")
        # Without `cpu` and without an accelerator, each process would form a group of its own.
        cpu = cpu or not torch.accelerator.is_available()
        check_trackers(trackers)
        if torchrun_world_size() > 1:
            # If this module is imported after the group is formed, the defaults of its functions
            # hold the group. Its threads then run until the process ends, and can abort it.
            importlib.import_module("torch.distributed.nn")
        self._tracked = bool(trackers)
        options = {"log_with": list(trackers), "project_dir": folder} if trackers else {}
        self._accelerator = accelerate.Accelerator(cpu=cpu, mixed_precision="no", **options)
        self.count: int = self._accelerator.num_processes
        started = torchrun_world_size()
        if self.count != started:
            raise TrainError(
                f"torchrun started {started} processes, but accelerate formed a group of "
                f"{self.count}; separate groups would overwrite each other's files"
            )
        self.device: torch.device = self._accelerator.device
        self.main: bool = self._accelerator.is_main_process

    def runs_forward_pass(self, position: int) -> bool:
        """Return whether this process runs the forward pass with the given index in a step.

        The step is a training step or an evaluation. The forward passes of a step are numbered from
        0 and distributed evenly over the processes. Each forward pass runs in exactly one process.
        """
        return position % self.count == self._accelerator.process_index

    def sum_values_and_stop_flags(
        self, values: dict[str, float], *, stop: bool
    ) -> tuple[dict[str, float], bool]:
        """Sum the values over all processes, and return the sums and whether any process must stop.

        ``stop`` says whether this process must stop.
        """
        sent = {**values, _STOP: float(stop)}
        (total,) = BatchProcessGroup("auto", list(sent), self.device).sum_counts(sent)
        return total, total.pop(_STOP) > 0

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum the gradients over all processes.

        There is one all-reduce operation per dtype. All processes must pass the same parameters,
        each once. A parameter that has no gradient in any process has no gradient afterwards
        either.
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

    def run_in_main_and_broadcast(self, work: Callable[[], T]) -> T:
        """Call ``work`` in the main process, and return its result in all processes.

        If ``work`` raises an error, all processes raise it. If only the main process raised the
        error, the other processes would wait for it forever.
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
        """Start the trackers of the run.

        A run is started in each tracker. This may create files.
        """
        if self._tracked:
            self._accelerator.init_trackers("trackers")

    def log_to_trackers(self, values: dict[str, Any], step: int) -> None:
        """Log a step's metrics to the trackers.

        ``values`` maps the names of the metrics to numbers and strings. Only the main process logs
        the metrics.
        """
        if self._tracked and values:
            self._accelerator.log(values, step=step)

    def close_trackers(self) -> None:
        """Close all trackers.

        Data that has not been written yet is flushed first.
        """
        while self._accelerator.trackers:
            self._accelerator.trackers.pop().finish()

    def close_trackers_and_leave_group(self) -> None:
        """Close the trackers, and destroy the process group."""
        while self._accelerator.trackers:  # left after an error, which is already being raised
            with contextlib.suppress(OSError):
                self.close_trackers()
        self._accelerator.end_training()


def check_trackers(names: Sequence[str]) -> None:
    """Raise an error unless all trackers are supported and installed.

    accelerate must support them.

    Raises:
        ConfigError: accelerate supports no tracker of that name.
        TrainError: A tracker or accelerate is not installed.
    """
    if not names:
        return
    tracking = import_or_raise("accelerate", "trackers need").tracking
    known = tracking.LOGGER_TYPE_TO_CLASS
    built_in = {str(kind) for kind in tracking.LoggerType}
    there = {str(kind) for kind in tracking.get_available_trackers()} | (set(known) - built_in)
    for name in names:
        if name not in known:
            raise ConfigError(
                f"track: unknown tracker {name!r}{near_names(name, known)}; accelerate supports "
                f"{', '.join(sorted(known))}"
            )
        if name not in there:
            raise TrainError(
                f"tracker {name!r} is not installed; install it with: pip install {name}"
            )


def _widest_float_dtype(device: torch.device) -> torch.dtype:
    """Return the widest floating-point dtype that the device supports."""
    return torch.float32 if device.type == "mps" else torch.float64
