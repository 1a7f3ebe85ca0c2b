"""`AdapterOptimizers`: a separate optimizer, schedule, clipping, and loss scale for each adapter.

Everything that affects a step of an adapter belongs to that adapter, so the adapter trains as it
would alone, up to rounding. An adapter without rows in the batch does not change, whereas a shared
AdamW would update it with zero gradients. A non-finite value in one adapter stops the step of that
adapter only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fastlora.model import LoraModel
from fastlora.routing.ids import BASE
from fastlora.train.adapter_training_state import (
    AdapterCounts,
    AdapterTrainingState,
    adapter_parameters,
)
from fastlora.train.losses import AdapterLosses
from fastlora.train.processes import BatchProcessGroup
from fastlora.validation import AdapterNotFoundError, AdapterStateError, near_names


def train_adapters(model: LoraModel, names: str | Sequence[str]) -> None:
    """Make the named adapters trainable.

    All other adapters are frozen. The function sets ``requires_grad`` of the adapters' parameters.
    The model's training mode does not change. The named adapters can then be trained at the same
    time. Several of the named adapters may have their own copies of the same module
    (``modules_to_save``), because each row of a mixed batch uses at most one adapter.

    The active adapters remain the same. To change the active adapters, call ``model.set_adapter``
    before this function. A later call to ``model.set_adapter`` freezes all adapters that the call
    does not activate.

    Args:
        model: The model with its adapters.
        names: Names of the adapters to train.

    Raises:
        AdapterNotFoundError: An adapter does not exist.
        AdapterStateError: Several adapters are named, and one of them trains the base model's
            biases.
        ValueError: No adapter is named.
    """
    chosen = check_can_train_together(model, names)
    trained = {id(p) for name in chosen for p in adapter_parameters(model, name).values()}
    for name in model.peft_config:
        for parameter in adapter_parameters(model, name).values():
            parameter.requires_grad_(id(parameter) in trained)


def check_can_train_together(model: LoraModel, names: str | Sequence[str]) -> list[str]:
    """Check that the adapters can be trained together, and return their names.

    The names are without duplicates. Raises the errors of `train_adapters`.
    """
    chosen = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    if not chosen:
        raise ValueError(
            f"no adapters were given; expected one or more of {list(model.peft_config)}"
        )
    for name in chosen:
        model.base_model.check_adapter_loaded(name)
    for name in chosen:
        bias = model.peft_config[name].bias
        if bias != "none" and len(chosen) > 1:
            raise AdapterStateError(
                f"adapter {name!r} has bias={bias!r}, which trains base model biases that all "
                "adapters share; use bias='none', or train this adapter alone"
            )
    return chosen


@dataclass(frozen=True)
class StepReport:
    """A report on an optimizer step: the updated and skipped adapters, and their gradient norms.

    `AdapterOptimizers.step` returns this report. An adapter without a loss since the previous step
    is in none of the fields.

    Attributes:
        stepped: Names of the adapters that the step updated.
        skipped: Names of the adapters that the step skipped because a gradient was not finite.
        left_out: Names of the adapters with a non-finite loss since the previous step. An adapter
            that also had finite losses is in ``stepped`` or ``skipped`` too.
        grad_norms: Dict that maps each updated or skipped adapter to its gradient norm, after
            unscaling and before clipping.
    """

    stepped: tuple[str, ...]
    skipped: tuple[str, ...]
    left_out: tuple[str, ...]
    grad_norms: dict[str, float]


class AdapterOptimizers:
    """The optimizers of a model's adapters, one for each adapter.

    Each adapter is trained with its own optimizer, learning-rate schedule, gradient clipping, and
    loss scale.

    Args:
        model: The model, with the adapters loaded and trainable (`train_adapters`).
        optimizers: Dict that maps each adapter to a function that creates its optimizer from a list
            of its parameters, for instance ``functools.partial(torch.optim.AdamW, lr=1e-3)``.
        schedulers: Dict that maps some or all adapters to a function that creates a learning-rate
            schedule from the optimizer. A schedule advances only when its adapter steps.
        max_grad_norm: Maximum gradient norm of each adapter: a number for all adapters, or a dict
            that maps adapters to numbers. None disables clipping.
        scaler: Function that creates a `torch.amp.GradScaler`, for training in fp16. It is called
            once for each adapter, so that an overflow in one adapter does not lower the loss scale
            of another.
        seed: Seed from which the dropout seeds are derived.
        group: The processes that share each batch, and over which DDP or FSDP2 averages gradients.
            This is a process group, ``"auto"`` for all processes if torch.distributed is in use, or
            None to train without other processes. All processes must make the same calls in the
            same order. With FSDP2, create this object after ``fully_shard``, which replaces
            parameters.

    Raises:
        AdapterNotFoundError: An adapter does not exist, or another argument names an adapter that
            ``optimizers`` does not name.
        AdapterStateError: An adapter is frozen, or one of several adapters trains the base model's
            biases.
        ValueError, TypeError: An argument is invalid. Nothing has changed.

    Examples:
        >>> train_adapters(model, ["a", "b"])
        >>> optimizers = AdapterOptimizers(model, {"a": partial(AdamW, lr=1e-3), "b": SGD})
        >>> with adapters(model, names, seeds=optimizers.draw_seeds(names)):
        ...     logits = model(input_ids).logits
        >>> optimizers.backward(causal_lm_losses(logits, labels, names))
        >>> report = optimizers.step()
        >>> optimizers.zero_grad()
    """

    def __init__(
        self,
        model: LoraModel,
        optimizers: Mapping[str, Callable[[list[nn.Parameter]], Optimizer]],
        *,
        schedulers: Mapping[str, Callable[[Optimizer], LRScheduler]] | None = None,
        max_grad_norm: float | Mapping[str, float] | None = None,
        scaler: Callable[[], torch.amp.GradScaler] | None = None,
        seed: int = 0,
        group: Any = "auto",
    ) -> None:
        names = check_can_train_together(model, list(optimizers))
        schedules = schedulers or {}
        if isinstance(max_grad_norm, Mapping):
            norms: Mapping[str, float | None] = max_grad_norm
        else:
            norms = dict.fromkeys(names, max_grad_norm)
        for argument, mapping in (("schedulers", schedules), ("max_grad_norm", norms)):
            for name in mapping:
                if name not in names:
                    raise AdapterNotFoundError(
                        f"{argument} names adapter {name!r}, which has no optimizer; adapters "
                        f"with an optimizer: {names}{near_names(name, names)}"
                    )
        self._adapters = {
            name: AdapterTrainingState(
                model, name, optimizers[name], schedules.get(name), norms.get(name), scaler, seed
            )
            for name in names
        }
        scalers = {id(a.scaler) for a in self._adapters.values() if a.scaler is not None}
        if scaler is not None and len(scalers) < len(names):
            raise ValueError(
                "scaler returned the same object twice, expected a new one for each adapter"
            )
        self._group = BatchProcessGroup(group, names, self._adapters[names[0]].parameters[0].device)
        self._present: set[str] = set()
        self._left_out: set[str] = set()

    @property
    def by_adapter(self) -> dict[str, Optimizer]:
        """A dict that maps each adapter to its optimizer."""
        return {name: adapter.optimizer for name, adapter in self._adapters.items()}

    @property
    def counts(self) -> dict[str, AdapterCounts]:
        """The training counters of each adapter, by adapter name.

        This is a dict that maps each adapter to the `AdapterCounts` that have accumulated so far,
        such as its number of optimizer steps.
        """
        return {name: adapter.counts for name, adapter in self._adapters.items()}

    def loss_scale(self, name: str) -> float | None:
        """Return the current loss scale of an adapter.

        The result is None if no scaler is used.

        Raises:
            AdapterNotFoundError: The adapter has no optimizer in this object.
        """
        scaler = self._adapter_state(name).scaler
        return None if scaler is None else float(scaler.get_scale())

    def draw_seeds(self, names: Sequence[str | None]) -> dict[str, int]:
        """Draw a pseudorandom dropout seed for each of the named adapters.

        The result is a dict that maps adapter names to seeds. Pass it to `fastlora.adapters` as
        ``seeds``. Each adapter has its own sequence of seeds: a seed is derived from ``seed``, the
        name of the adapter, and the number of its forward passes so far. The dropout masks are
        therefore the same as if the adapter trained alone, provided that its samples are padded to
        the same length. If processes share batches, each process draws its own seeds, and every
        forward pass counts for every adapter.

        Args:
            names: The adapter of each sample. None and ``"__base__"`` need no seed.

        Raises:
            AdapterNotFoundError: An adapter has no optimizer in this object.
        """
        present = dict.fromkeys(name for name in names if name is not None and name != BASE)
        chosen = [self._adapter_state(name) for name in present]
        if self._group.is_single_process:
            return {adapter.name: adapter.next_dropout_seed() for adapter in chosen}
        drawn = {n: a.next_dropout_seed(self._group.rank) for n, a in self._adapters.items()}
        return {adapter.name: drawn[adapter.name] for adapter in chosen}

    def total_tokens(self, counts: Mapping[str, int]) -> dict[str, int]:
        """Sum the token count of each adapter over all processes, and return the totals.

        ``counts`` contains the counts of this process. The result is a dict that maps adapter names
        to the total token counts of all batches of a step in all processes. Adapters without tokens
        are left out. Pass the dict to `causal_lm_losses` or `adapter_losses` as ``tokens``.

        Args:
            counts: Token counts of this process for all batches of the step; see `count_tokens`.
        """
        (total,) = self._group.sum_counts(counts)
        return {name: int(count) for name, count in total.items() if count}

    def backward(self, losses: AdapterLosses) -> None:
        """Run the backward pass for the losses of the adapters.

        The gradients of the finite losses are accumulated, and the gradients of the other adapters
        remain unchanged. A non-finite loss is counted and skipped. Gradients that its adapter has
        accumulated from earlier batches of the same step are preserved. The exception is FSDP2
        without gradient synchronization: the accumulated gradients are not accessible, and the step
        of the adapter is skipped.

        If processes share the batch, a loss is used only if it is finite in all of them. The
        gradients are then the same as for one process with the whole batch. Losses that are means
        over the tokens of one process are weighted by their token counts. Losses with given
        ``tokens`` are taken as shares of a common mean (`total_tokens`).

        Args:
            losses: Losses of a forward pass inside a `fastlora.adapters` block.

        Raises:
            AdapterNotFoundError: A loss belongs to an adapter that has no optimizer in this object.
            AdapterStateError: A loss belongs to an adapter that is now frozen, or processes share
                the batch and ``losses`` has no graph.
        """
        for name in losses.values:
            self._adapter_state(name).check_has_trainable_parameters()
        agreed = self._group.agree_on_finite_losses(losses)
        for name in agreed.left_out:
            self._adapters[name].counts.non_finite_losses += 1
        self._left_out.update(agreed.left_out)
        if not agreed.finite:
            return
        own = [name for name in agreed.finite if name in losses.by_adapter]
        roots = [
            self._adapters[name].scale_loss(losses.by_adapter[name], agreed.weights[name])
            for name in own
        ]
        seeds: list[torch.Tensor | None] = [None] * len(roots)
        if self._group.is_single_process:
            # Rows of a skipped loss still take part in the backward pass, where 0 * NaN is NaN.
            spoiled = [adapter for name, adapter in self._adapters.items() if name not in own]
        else:
            # Run the backward pass over the whole graph, whichever adapters this process has rows
            # of: DDP and FSDP2 wait for every parameter.
            spoiled = [self._adapters[name] for name in agreed.left_out]
            if not losses.graph.requires_grad:
                raise AdapterStateError(
                    "the losses have no graph; expected those of a forward inside "
                    "fastlora.adapters(), with gradients, which reaches every adapter that trains"
                )
            for name in agreed.finite:
                if name not in own:  # GradScaler creates its scale at the first loss
                    self._adapters[name].scale_loss(losses.graph.new_zeros(()))
            roots.append(losses.graph)
            seeds.append(torch.zeros_like(losses.graph))
        saved_gradients = [
            (parameter, parameter.grad) for other in spoiled for parameter in other.parameters
        ]
        for parameter, _ in saved_gradients:
            parameter.grad = None
        try:
            torch.autograd.backward(roots, seeds)
        finally:
            for parameter, gradient in saved_gradients:
                parameter.grad = gradient
        self._present.update(agreed.finite)

    def step(self, present: Iterable[str] | None = None) -> StepReport:
        """Step the optimizers of the adapters that are present in the batch, and return a report.

        The adapters in ``present`` are updated. If ``present`` is None, the adapters that had a
        finite loss in `backward` since the last step are updated. The gradients of an adapter are
        clipped if the adapter has a ``max_grad_norm``. An adapter with a non-finite gradient is
        skipped: its optimizer and its schedule do not advance, and its loss scale, if any, is
        lowered. The call causes one host-device synchronization.

        Args:
            present: Names of the adapters to step, if the backward pass was run without calling
                `backward`. None steps the adapters with finite losses in `backward`. With a scaler,
                `backward` must be called.

        Returns:
            A `StepReport` with the updated adapters, the skipped adapters, and the gradient norms.

        Raises:
            AdapterNotFoundError: An adapter has no optimizer in this object.
            AdapterStateError: An adapter has no gradient at all, or its loss was not multiplied by
                its loss scale. Nothing has changed.
        """
        if present is None:
            wanted = self._present
        else:
            wanted = self._group.union_of_names(
                [self._adapter_state(name).name for name in present]
            )
        # Under DDP's no_sync(), gradients set aside in a backward pass have not been averaged.
        for name in self._adapters:
            if name in wanted and name in self._left_out:
                self._group.average_gradients_(self._adapters[name].parameters)
        for name in wanted:
            self._adapter_state(name).check_can_step()
        # Step in the order of the optimizers, so that the order of the rows has no effect.
        chosen = [adapter for name, adapter in self._adapters.items() if name in wanted]
        norms = [adapter.unscale_gradients_and_get_norm() for adapter in chosen]
        values = torch.stack([n.to(norms[0].device) for n in norms]).tolist() if norms else []
        stepped: list[str] = []
        skipped: list[str] = []
        grad_norms: dict[str, float] = {}
        for adapter, norm, value in zip(chosen, norms, values, strict=True):
            (stepped if adapter.clip_and_step_if_finite(norm, value) else skipped).append(
                adapter.name
            )
            grad_norms[adapter.name] = value
        left_out = tuple(name for name in self._adapters if name in self._left_out)
        self._present.clear()
        self._left_out.clear()
        return StepReport(tuple(stepped), tuple(skipped), left_out, grad_norms)

    def zero_grad(self, names: Iterable[str] | None = None) -> None:
        """Zero the gradients of the named adapters, or of all adapters if ``names`` is None.

        As in `torch.optim.Optimizer.zero_grad`, each gradient is set to None.

        Raises:
            AdapterNotFoundError: An adapter has no optimizer in this object.
        """
        for adapter in [
            self._adapter_state(n) for n in (self._adapters if names is None else names)
        ]:
            adapter.zero_grad()
            self._present.discard(adapter.name)

    def state_dict(self) -> dict[str, Any]:
        """Return the state dict of the optimizers.

        The dict maps each adapter to its training state, and can be passed to `load_state_dict`.
        A training state includes the states of the optimizer, the schedule, and the loss scale, as
        well as the seed and the counts. Call this method after `step`, because gradients that are
        still being accumulated are not included.
        """
        return {name: adapter.state_dict() for name, adapter in self._adapters.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the saved state of the optimizers.

        ``state`` is a dict that `state_dict` returned. The dict maps adapters to their training
        states. Adapters that are not in ``state`` remain unchanged.

        Raises:
            AdapterNotFoundError: ``state`` names an adapter that has no optimizer in this object.
            CheckpointError: A state is from an adapter with a different optimizer, schedule, or
                rank. Nothing has changed.
        """
        for name, saved in state.items():
            self._adapter_state(name).check_state(saved)
        for name, saved in state.items():
            self._adapters[name].load_state_dict(saved)

    def follow_schedules(self) -> None:
        """Set the learning rate of each adapter to the current value of its schedule.

        The current value is the learning rate for the adapter's next step. The schedules themselves
        do not advance. Call this method after `load_state_dict` if a schedule has changed, because
        a loaded state contains the learning rates of the schedule that it was saved with. If an
        adapter's schedule is not a `LambdaLR`, the learning rate of the adapter remains unchanged.
        """
        for adapter in self._adapters.values():
            adapter.set_scheduled_learning_rate()

    def _adapter_state(self, name: str) -> AdapterTrainingState:
        if name not in self._adapters:
            raise AdapterNotFoundError(
                f"adapter {name!r} has no optimizer; adapters with an optimizer: "
                f"{list(self._adapters)}{near_names(str(name), self._adapters)}"
            )
        return self._adapters[name]
