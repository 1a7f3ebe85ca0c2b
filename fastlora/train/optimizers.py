"""`AdapterOptimizers`: an optimizer, a schedule, clipping and a loss scale for each adapter.

All that a step of one adapter depends on is its own, so that it is the step of the adapter's solo
run: absent adapters do not move (AdamW would, on zero gradients), and what is not finite in one
stops that one only.
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
from fastlora.train.losses import AdapterLosses
from fastlora.train.processes import BatchGroup
from fastlora.train.solo import AdapterCounts, Solo, adapter_parameters
from fastlora.validation import AdapterNotFoundError, AdapterStateError, near_names


def train_adapters(model: LoraModel, names: str | Sequence[str]) -> None:
    """Makes these adapters trainable, and of all adapters them alone.

    Unlike ``model.set_adapter``, which a later call of would freeze the others again, it leaves the
    active adapters as they are, and each may own a copy of the same module (``modules_to_save``):
    in a mixed batch no row has more than one adapter.

    Raises:
        AdapterNotFoundError: There is no such adapter.
        AdapterStateError: Several are named, and one trains the base model's biases.
        ValueError: None is named.
    """
    chosen = check_trained_together(model, names)
    trained = {id(p) for name in chosen for p in adapter_parameters(model, name).values()}
    for name in model.peft_config:
        for parameter in adapter_parameters(model, name).values():
            parameter.requires_grad_(id(parameter) in trained)


def check_trained_together(model: LoraModel, names: str | Sequence[str]) -> list[str]:
    """Returns the names without repetitions; raises as `train_adapters`."""
    chosen = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    if not chosen:
        raise ValueError(f"no adapter is named; expected some of {list(model.peft_config)}")
    for name in chosen:
        model.base_model.check_known(name)
    for name in chosen:
        bias = model.peft_config[name].bias
        if bias != "none" and len(chosen) > 1:
            raise AdapterStateError(
                f"adapter {name!r} has bias={bias!r}: it trains the base model's biases, which "
                "every row shares; expected bias='none', or to train it alone"
            )
    return chosen


@dataclass(frozen=True)
class StepReport:
    """What one `AdapterOptimizers.step` did. Adapters in none of these were absent.

    Attributes:
        stepped: Adapters whose optimizer stepped.
        skipped: Adapters that did not step because a gradient was not finite.
        left_out: Adapters with a loss that was not finite since the step before; one that had
            finite losses too is also in ``stepped`` or ``skipped``.
        grad_norms: Norm of each adapter's gradient, unscaled, before clipping.
    """

    stepped: tuple[str, ...]
    skipped: tuple[str, ...]
    left_out: tuple[str, ...]
    grad_norms: dict[str, float]


class AdapterOptimizers:
    """Steps several adapters of a model, each with its own optimizer.

    Args:
        model: With the adapters loaded and trainable (`train_adapters`).
        optimizers: For each adapter what makes its optimizer from its parameters, for instance
            ``functools.partial(torch.optim.AdamW, lr=1e-3)``.
        schedulers: For some adapters what makes a learning-rate schedule from the optimizer; it
            moves once for each step of that adapter.
        max_grad_norm: Norm to clip each adapter's gradient to, one for all or by adapter; None for
            no clipping.
        scaler: Makes a `torch.amp.GradScaler`, for training in fp16. Each adapter has its own, so
            that one that overflows lowers nobody else's scale.
        seed: Start of the dropout seeds.
        group: The processes that share the batches, whose gradients DDP or FSDP2 averages: a
            process group, ``"auto"`` for all of them where torch.distributed runs, or None to train
            without the others. Each of them must make every call, in one order. Make this object
            after ``fully_shard``, which replaces parameters.

    Raises:
        AdapterNotFoundError: There is no such adapter, or an argument names another one.
        AdapterStateError: An adapter is frozen, or one of several trains the base model's biases.
        ValueError, TypeError: An argument is not as described. Nothing has changed.

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
        names = check_trained_together(model, list(optimizers))
        schedules = schedulers or {}
        if isinstance(max_grad_norm, Mapping):
            norms: Mapping[str, float | None] = max_grad_norm
        else:
            norms = dict.fromkeys(names, max_grad_norm)
        for argument, mapping in (("schedulers", schedules), ("max_grad_norm", norms)):
            for name in mapping:
                if name not in names:
                    raise AdapterNotFoundError(
                        f"{argument} names adapter {name!r}, which has no optimizer here; those "
                        f"that have are {names}{near_names(name, names)}"
                    )
        self._adapters = {
            name: Solo(
                model, name, optimizers[name], schedules.get(name), norms.get(name), scaler, seed
            )
            for name in names
        }
        scalers = {id(a.scaler) for a in self._adapters.values() if a.scaler is not None}
        if scaler is not None and len(scalers) < len(names):
            raise ValueError("scaler made one object twice, expected a new one for each adapter")
        self._group = BatchGroup(group, names, self._adapters[names[0]].parameters[0].device)
        self._present: set[str] = set()
        self._left_out: set[str] = set()

    @property
    def by_adapter(self) -> dict[str, Optimizer]:
        """Each adapter's optimizer."""
        return {name: adapter.optimizer for name, adapter in self._adapters.items()}

    @property
    def counts(self) -> dict[str, AdapterCounts]:
        """What has happened to each adapter so far."""
        return {name: adapter.counts for name, adapter in self._adapters.items()}

    def loss_scale(self, name: str) -> float | None:
        """Returns what an adapter's loss is multiplied with now; None without a scaler.

        Raises:
            AdapterNotFoundError: It has no optimizer here.
        """
        scaler = self._known(name).scaler
        return None if scaler is None else float(scaler.get_scale())

    def draw_seeds(self, names: Sequence[str | None]) -> dict[str, int]:
        """Returns the dropout seeds of a batch's adapters, for `fastlora.adapters`.

        Each comes from the adapter's name and the number of its own forwards so far, so that its
        masks are those of its solo run (with samples padded to the same length). Where processes
        share batches, each draws its own, and counts every forward for every adapter.

        Raises:
            AdapterNotFoundError: One has no optimizer here.
        """
        present = dict.fromkeys(name for name in names if name is not None and name != BASE)
        chosen = [self._known(name) for name in present]
        if self._group.alone:
            return {adapter.name: adapter.draw_seed() for adapter in chosen}
        drawn = {n: a.draw_seed(self._group.rank) for n, a in self._adapters.items()}
        return {adapter.name: drawn[adapter.name] for adapter in chosen}

    def total_tokens(self, counts: Mapping[str, int]) -> dict[str, int]:
        """Returns how many tokens all processes have of each adapter, for losses' ``tokens``.

        Args:
            counts: This process's (`count_tokens`), of all batches of the step.
        """
        (total,) = self._group.total(counts)
        return {name: int(count) for name, count in total.items() if count}

    def backward(self, losses: AdapterLosses) -> None:
        """Adds the gradients of the finite losses, and to no other adapter anything.

        A loss that is not finite is counted and left out; gradients that its adapter has from
        earlier batches of the same step stay. (Not under FSDP2 without gradient synchronisation:
        what it accumulates is out of reach, and the adapter's step is skipped.)

        Where processes share the batch, a loss counts where it is finite in all of them, and the
        gradients are those of one process with the whole batch: losses over own tokens are weighted
        by these, losses over given ``tokens`` are taken to be shares of one mean (`total_tokens`).

        Raises:
            AdapterNotFoundError: A loss is of an adapter that has no optimizer here.
            AdapterStateError: It is of one that has been frozen since. Nothing has changed.
        """
        for name in losses.values:
            self._known(name).check_trainable()
        agreed = self._group.agree(losses)
        for name in agreed.left_out:
            self._adapters[name].counts.non_finite_losses += 1
        self._left_out.update(agreed.left_out)
        if not agreed.finite:
            return
        own = [name for name in agreed.finite if name in losses.by_adapter]
        roots = [
            self._adapters[name].scaled(losses.by_adapter[name], agreed.weights[name])
            for name in own
        ]
        seeds: list[torch.Tensor | None] = [None] * len(roots)
        if self._group.alone:
            # 0 * NaN: the rows of a loss left out take part in the backward.
            spoiled = [adapter for name, adapter in self._adapters.items() if name not in own]
        else:
            # All of the graph, whatever rows are here: DDP and FSDP2 wait for every parameter.
            spoiled = [self._adapters[name] for name in agreed.left_out]
            if not losses.graph.requires_grad:
                raise AdapterStateError(
                    "the losses have no graph; expected those of a forward inside "
                    "fastlora.adapters(), with gradients, which reaches every adapter that trains"
                )
            for name in agreed.finite:
                if name not in own:  # a loss scale exists from the first loss on
                    self._adapters[name].scaled(losses.graph.new_zeros(()))
            roots.append(losses.graph)
            seeds.append(torch.zeros_like(losses.graph))
        kept = [(parameter, parameter.grad) for other in spoiled for parameter in other.parameters]
        for parameter, _ in kept:
            parameter.grad = None
        try:
            torch.autograd.backward(roots, seeds)
        finally:
            for parameter, gradient in kept:
                parameter.grad = gradient
        self._present.update(agreed.finite)

    def step(self, present: Iterable[str] | None = None) -> StepReport:
        """Steps each adapter that had a finite loss since the last step. Costs one host sync.

        An adapter whose gradient is not finite is skipped: its optimizer and schedule do not move,
        and its loss scale is lowered where it has one.

        Args:
            present: The adapters to step, for a backward made by hand; None for those of
                `backward`.

        Raises:
            AdapterNotFoundError: One has no optimizer here.
            AdapterStateError: One has no gradient at all. Nothing has changed.
        """
        if present is None:
            wanted = self._present
        else:
            wanted = self._group.anywhere([self._known(name).name for name in present])
        # Under DDP's no_sync(), what was set aside for a loss left out was never shared.
        for name in self._adapters:
            if name in wanted and name in self._left_out:
                self._group.average_(self._adapters[name].parameters)
        for name in wanted:
            if not self._known(name).gradients():
                raise AdapterStateError(
                    f"adapter {name!r} has no gradient to step with; expected a backward of a loss "
                    "over its rows since the last zero_grad()"
                )
        # In the order of the optimizers, so that nothing depends on the order of rows.
        chosen = [adapter for name, adapter in self._adapters.items() if name in wanted]
        norms = [adapter.unscaled_norm() for adapter in chosen]
        values = torch.stack([n.to(norms[0].device) for n in norms]).tolist() if norms else []
        stepped: list[str] = []
        skipped: list[str] = []
        grad_norms: dict[str, float] = {}
        for adapter, norm, value in zip(chosen, norms, values, strict=True):
            (stepped if adapter.step(norm, value) else skipped).append(adapter.name)
            grad_norms[adapter.name] = value
        left_out = tuple(name for name in self._adapters if name in self._left_out)
        self._present.clear()
        self._left_out.clear()
        return StepReport(tuple(stepped), tuple(skipped), left_out, grad_norms)

    def zero_grad(self, names: Iterable[str] | None = None) -> None:
        """Drops the gradients of these adapters; of all by default.

        Raises:
            AdapterNotFoundError: One has no optimizer here.
        """
        for adapter in [self._known(n) for n in (self._adapters if names is None else names)]:
            adapter.zero_grad()
            self._present.discard(adapter.name)

    def state_dict(self) -> dict[str, Any]:
        """Returns by adapter all that `load_state_dict` needs to go on exactly.

        Take it behind a step: gradients that are still being accumulated are not in it.
        """
        return {name: adapter.state_dict() for name, adapter in self._adapters.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a state by adapter; adapters that it does not name keep theirs.

        Raises:
            AdapterNotFoundError: It names an adapter that has no optimizer here.
            CheckpointError: It is of another optimizer, schedule or rank. Nothing has changed.
        """
        for name, saved in state.items():
            self._known(name).check_state(saved)
        for name, saved in state.items():
            self._adapters[name].load_state_dict(saved)

    def follow_schedules(self) -> None:
        """Sets learning rates to what the schedules say for the next step.

        A loaded state brings the rates of the schedule that it was saved with.
        """
        for adapter in self._adapters.values():
            adapter.follow_schedule()

    def _known(self, name: str) -> Solo:
        if name not in self._adapters:
            raise AdapterNotFoundError(
                f"adapter {name!r} has no optimizer here; those that have are "
                f"{list(self._adapters)}{near_names(str(name), self._adapters)}"
            )
        return self._adapters[name]
