"""Training state of one adapter: its parameters, optimizer, schedule, clipping, and loss scale."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from fastlora.model import LoraModel
from fastlora.model.adapter_state import file_keys_to_state_keys
from fastlora.sharding import clip_grads_with_norm_, total_norm
from fastlora.train.data import derive_seed
from fastlora.validation import AdapterStateError, CheckpointError


def adapter_parameters(model: LoraModel, name: str) -> dict[str, nn.Parameter]:
    """Return the parameters of an adapter as a dict, keyed by name.

    These are the parameters that are trained and saved with the adapter: its factors and DoRA
    magnitudes, its trained token rows, its copies of ``modules_to_save``, and the base model's
    biases that the config field ``bias`` selects.

    Raises:
        AdapterNotFoundError: The adapter does not exist.
    """
    model.base_model.check_adapter_loaded(name)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    keys = file_keys_to_state_keys(model, name).values()
    return {key: parameters[key] for key in keys if key in parameters}


@dataclass
class AdapterCounts:
    """Training counters for one adapter.

    Attributes:
        steps: Number of optimizer steps.
        skipped_steps: Number of steps skipped because a gradient was not finite.
        non_finite_losses: Number of losses left out of a backward pass because they were not
            finite.
        forwards: Number of dropout seeds drawn.
    """

    steps: int = 0
    skipped_steps: int = 0
    non_finite_losses: int = 0
    forwards: int = 0


class AdapterTrainingState:
    """The training state of one adapter, such as its parameters, optimizer, and step counters.

    The state also includes the adapter's learning rate schedule. See `AdapterOptimizers` for the
    arguments and errors.
    """

    def __init__(
        self,
        model: LoraModel,
        name: str,
        optimizer: Callable[[list[nn.Parameter]], Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler] | None,
        max_grad_norm: float | None,
        scaler: Callable[[], torch.amp.GradScaler] | None,
        seed: int,
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(
                f"max_grad_norm of adapter {name!r} must be greater than 0, got {max_grad_norm}"
            )
        self.name = name
        self.max_grad_norm = max_grad_norm
        self.parameters = _trainable_parameters_or_raise(
            model, name, rejects_fp16=scaler is not None
        )
        self.optimizer = _checked_optimizer(name, optimizer(self.parameters), self.parameters)
        self.scheduler = (
            None if scheduler is None else _checked_scheduler(name, scheduler(self.optimizer))
        )
        self.scaler = None if scaler is None else scaler()
        self._has_scaled_loss = False
        self.seed = seed
        self.counts = AdapterCounts()

    def check_has_trainable_parameters(self) -> None:
        """Raise `AdapterStateError` unless the adapter still has trainable parameters."""
        if not any(parameter.requires_grad for parameter in self.parameters):
            raise AdapterStateError(_frozen(self.name))

    def next_dropout_seed(self, process_rank: int = 0) -> int:
        """Return the next dropout seed of the adapter.

        Each call returns a seed for another forward pass. ``process_rank`` is the rank of the
        process that runs the forward pass. The seed has 62 bits.
        """
        parts = (
            self.seed,
            self.counts.forwards,
            self.name,
            *([process_rank] if process_rank else []),
        )
        self.counts.forwards += 1
        return derive_seed(*parts, nbytes=8) >> 2

    def scale_loss(self, loss: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
        """Scale the adapter's loss for the backward pass.

        The loss is multiplied by ``weight`` and by the loss scale, which is that of the adapter's
        gradient scaler. Without a gradient scaler, the loss scale is 1. ``loss`` is a scalar
        tensor. For `check_can_step`, the method records that the loss was scaled.
        """
        loss = loss if weight == 1 else loss * weight
        self._has_scaled_loss = True
        return loss if self.scaler is None else self.scaler.scale(loss)

    def check_can_step(self) -> None:
        """Raise `AdapterStateError` unless the adapter is ready for an optimizer step.

        The adapter must have gradients. If it has a gradient scaler, its loss must have been
        multiplied by the loss scale.
        """
        if not self.gradients():
            raise AdapterStateError(
                f"adapter {self.name!r} has no gradients; between zero_grad() and step(), call "
                "backward() on a loss that is computed from rows of this adapter"
            )
        if self.scaler is not None and not self._has_scaled_loss:
            raise AdapterStateError(
                f"the loss of adapter {self.name!r} was not multiplied by its loss scale; with a "
                "scaler, run the backward pass with AdapterOptimizers.backward()"
            )

    def gradients(self) -> list[torch.Tensor]:
        """Return the gradients of the adapter's parameters.

        The parameters are those that the adapter's optimizer updates. Parameters whose ``grad`` is
        None are left out.
        """
        return [p.grad for p in self._updated_parameters() if p.grad is not None]

    def _updated_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the optimizer updates.

        The optimizer may update only a subset of the adapter's parameters.
        """
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def unscale_gradients_and_get_norm(self) -> torch.Tensor:
        """Unscale the adapter's gradients, and return their total norm.

        The adapter's gradient scaler, if there is one, divides the gradients by the loss scale. The
        norm is a scalar tensor.
        """
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        return total_norm(self.gradients())

    def clip_and_step_if_finite(self, grad_norm: torch.Tensor, grad_norm_value: float) -> bool:
        """Clip the gradients and step the optimizer, but only if the gradient norm is finite.

        Returns whether the optimizer took a step. If the gradient norm is not finite, the step is
        counted as skipped.

        ``grad_norm`` is the norm of the gradients as a scalar tensor, and ``grad_norm_value`` is
        the same norm as a number.
        """
        finite = math.isfinite(grad_norm_value)
        if finite:
            if self.max_grad_norm is not None:
                clip_grads_with_norm_(self._updated_parameters(), self.max_grad_norm, grad_norm)
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()
            self.counts.steps += 1
        else:
            self.counts.skipped_steps += 1
        if self.scaler is not None:
            self.scaler.update()
        self._has_scaled_loss = False
        return finite

    def zero_grad(self) -> None:
        """Zero the gradients of the adapter's parameters.

        As in `torch.optim.Optimizer.zero_grad`, each gradient is set to None.
        """
        for parameter in self.parameters:
            parameter.grad = None
        self._has_scaled_loss = False

    def state_dict(self) -> dict[str, Any]:
        """Return the training state as a dict.

        The dict contains the states of the optimizer, the scheduler, and the gradient scaler, as
        well as the seed and the counts. The dict can be passed to `load_state_dict`, and includes
        the metadata for `check_state`.
        """
        return {
            "kind": self._kind(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "seed": self.seed,
            "counts": asdict(self.counts),
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise `CheckpointError` unless a training state matches this adapter.

        The state must match the adapter's optimizer, scheduler, and parameters.
        """
        what, mine = f"the state of adapter {self.name!r}", self.state_dict()
        if not isinstance(state, Mapping):
            raise CheckpointError(f"{what} must be a mapping, got {type(state).__name__}")
        for key, own in mine.items():
            if key not in state:
                raise CheckpointError(f"{what} has no {key!r}")
            if isinstance(own, Mapping) and set(state[key] or ()) < set(own):
                raise CheckpointError(
                    f"{key!r} in {what} must have the keys {list(own)}, got {state[key]!r}"
                )
            if type(own) is int and type(state[key]) is not int:
                raise CheckpointError(f"{key!r} in {what} must be an int, got {state[key]!r}")
        for key, expected in mine["kind"].items():
            found = state["kind"].get(key)
            if found != expected:
                raise CheckpointError(f"{what} has {key} {found}; expected {expected}")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the adapter's training state from a state dict.

        ``state`` is a dict that `state_dict` returned and `check_state` has accepted.
        """
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.seed, self.counts = state["seed"], AdapterCounts(**state["counts"])

    def set_scheduled_learning_rate(self) -> None:
        """Set the optimizer's learning rate to the current value of the adapter's schedule.

        The learning rate applies to the next optimizer step. If the scheduler is not a `LambdaLR`,
        the learning rate remains unchanged.
        """
        if isinstance(self.scheduler, LambdaLR):
            schedule = self.scheduler
            for group, base, rate in zip(
                self.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
            ):
                group["lr"] = base * rate(schedule.last_epoch)

    def _kind(self) -> dict[str, Any]:
        return {
            "optimizer": type(self.optimizer).__name__,
            "scheduler": None if self.scheduler is None else type(self.scheduler).__name__,
            "scaler": self.scaler is not None,
            # torch loads a state of another rank silently and fails at the next step.
            "parameters": [list(parameter.shape) for parameter in self.parameters],
            "groups": [len(group["params"]) for group in self.optimizer.param_groups],
        }


def _frozen(name: str) -> str:
    return f"adapter {name!r} is frozen; call train_adapters() with all adapters to train"


def _trainable_parameters_or_raise(
    model: LoraModel, name: str, rejects_fp16: bool
) -> list[nn.Parameter]:
    """Return an adapter's trainable parameters, or raise an error if it has none.

    An error is also raised if ``rejects_fp16`` is set and one of them is fp16.
    """
    named = {n: p for n, p in adapter_parameters(model, name).items() if p.requires_grad}
    if not named:
        raise AdapterStateError(_frozen(name))
    for key, parameter in named.items():
        if rejects_fp16 and parameter.dtype == torch.float16:
            raise TypeError(
                f"{key} is {parameter.dtype}; expected torch.float32, because GradScaler cannot "
                "unscale the gradients of fp16 parameters"
            )
    return list(named.values())


def _checked_optimizer(
    name: str, optimizer: Optimizer, parameters: list[nn.Parameter]
) -> Optimizer:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizers[{name!r}] returned {type(optimizer).__name__}; expected a "
            "torch.optim.Optimizer"
        )
    required = [
        parameter.name
        for parameter in inspect.signature(optimizer.step).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind <= parameter.POSITIONAL_OR_KEYWORD
    ]
    if required:
        raise TypeError(
            f"adapter {name!r}: {type(optimizer).__name__}.step() requires {', '.join(required)}; "
            "expected an optimizer whose step() has no required arguments"
        )
    own = {id(parameter) for parameter in parameters}
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    if not own.issuperset(held):
        raise ValueError(
            f"the optimizer of adapter {name!r} holds parameters that do not belong to the "
            f"adapter; expected only the parameters passed to optimizers[{name!r}]"
        )
    return optimizer


def _checked_scheduler(name: str, scheduler: LRScheduler) -> LRScheduler:
    if not isinstance(scheduler, LRScheduler) or isinstance(scheduler, ReduceLROnPlateau):
        raise TypeError(
            f"schedulers[{name!r}] returned {type(scheduler).__name__}; expected a scheduler from "
            "torch.optim.lr_scheduler whose step() does not require a metric"
        )
    return scheduler
