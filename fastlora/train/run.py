"""Train several adapters of one base model together, in one process or in several.

A step has a fixed set of samples and a fixed number of forward passes. The forward passes are
distributed over the processes, and the gradients are summed before the optimizers step. A run in
several processes therefore matches a run in one process, up to the rounding of that sum. All random
numbers are a function of the seed, the step, and the forward pass, so a resumed run is bitwise
identical to an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from fastlora.deprecation import renamed_arguments
from fastlora.model.adapter_folder import save_adapter_folder
from fastlora.model.lora_model import LoraModel, adapter_state
from fastlora.model.recommend import recommend
from fastlora.routing.block import adapters
from fastlora.train import base_model, checkpoint, prepare, run_log
from fastlora.train.adapter_training_state import adapter_parameters
from fastlora.train.data import (
    SampleRef,
    TokenizedCorpus,
    TrainBatch,
    collate_samples,
    derive_seed,
    sorted_micro_batches,
)
from fastlora.train.generation import generate_answers
from fastlora.train.lock import lock_folder
from fastlora.train.losses import causal_lm_losses
from fastlora.train.processes import RunProcesses, TrainError, torchrun_world_size
from fastlora.train.settings import TrainSettings
from fastlora.train.signals import RunInterrupted, StopSignalHandler
from fastlora.validation import CheckpointError

# The smallest normal number in fp16. Below it, the gradient of a scaled loss loses digits.
_LEAST_SCALE = 2.0**-14

_Failure = TypeVar("_Failure", TrainError, CheckpointError)


class NonFiniteError(TrainError):
    """A value such as a loss or a gradient became NaN or infinite during training.

    The value is a loss, a gradient, or a weight of an adapter. The run cannot continue.

    Attributes:
        step: The step, counted from 1.
        adapter: The name of the adapter.
    """

    def __init__(self, message: str, step: int, adapter: str) -> None:
        super().__init__(message)
        self.step = step
        self.adapter = adapter


@dataclass(frozen=True)
class TrainResult:
    """The result of a training run.

    Attributes:
        steps: Total number of steps, including those before a resume.
        losses: Dict that maps each adapter to its loss in its last step; empty if no steps were
            left.
        mean_losses: Dict that maps each adapter to its mean training loss over all steps, including
            the steps before a resume.
        eval_losses: Dict that maps each adapter to its evaluation loss at the end of the run.
        adapters: Dict that maps each adapter to its output folder.
        resumed_from: Step of the checkpoint that the run resumed from; 0 for a new run.
        files: Paths of the table of all losses and, if matplotlib is installed, of the plot.
        skipped: Dict that maps each adapter with skipped steps to their number. A step is skipped
            if an fp16 gradient is not finite.
    """

    steps: int
    losses: dict[str, float]
    eval_losses: dict[str, float]
    adapters: dict[str, Path]
    resumed_from: int = 0
    mean_losses: dict[str, float] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    skipped: dict[str, int] = field(default_factory=dict)


@renamed_arguments(say="on_message")
def train(
    settings: TrainSettings,
    *,
    resume: bool = False,
    progress: bool = True,
    on_message: Callable[[str], object] | None = None,
) -> TrainResult:
    """Train the adapters of a run, and return the result.

    Each adapter is saved at the end, in PEFT's format, in a folder with its name.

    The run holds a lock on ``settings.out``. In the main thread, if Python's default handlers of
    SIGINT and SIGTERM are installed, the first signal ends the run after the current step. The run
    then saves the adapters and a checkpoint. A second signal has its usual effect.

    Every training forward pass reseeds the global random generators of Python, NumPy, and torch.

    Args:
        settings: Settings from `read_settings`.
        resume: Whether to resume from the newest checkpoint in ``settings.out``, if there is one.
        progress: Whether to show progress bars.
        on_message: Function that is called with messages about the data and, at evaluations, with
            answers to prompts.

    Returns:
        A `TrainResult` with the losses and the paths of the written files.

    Raises:
        ConfigError, AdapterStateError, DataError, TargetNotFoundError, UnsupportedLayerError,
            CheckpointError, TrainError: The settings, the data, or the base model are invalid or do
            not match. This is raised before the first step, and nothing has been written.
        TrainError: Another run holds the lock of ``settings.out``.
        RunInterrupted: A signal ended the run.
        NonFiniteError: A loss, gradient, or weight is not finite. In fp16, steps with a non-finite
            gradient are skipped; the error is raised if an adapter's loss scale falls too low or
            the adapter never takes a step. The checkpoints are unchanged.
        TrainError: The log, the losses, or the data of a tracker cannot be written, or the answers
            to the prompts cannot be generated. The run has ended after its step, as after a signal.
        CheckpointError: An adapter or a checkpoint cannot be written. The older checkpoints are
            unchanged. After the first step, the messages of this error and of `TrainError` name the
            saved adapters and the newest checkpoint.
    """
    with open_run(settings, resume=resume, progress=progress, on_message=on_message) as run:
        return run.train()


@renamed_arguments(say="on_message")
@contextlib.contextmanager
def open_run(
    settings: TrainSettings,
    *,
    resume: bool = False,
    progress: bool = True,
    on_message: Callable[[str], object] | None = None,
) -> Iterator[Run]:
    """Set up a training run and yield it.

    See `train` for the arguments and errors. The ``with`` block holds the lock of the output folder
    and handles signals.
    """
    prepare.check_model_and_out_paths(settings)
    with contextlib.ExitStack() as stack:
        main_callback = on_message if os.environ.get("RANK", "0") == "0" else None
        signals = stack.enter_context(StopSignalHandler(torchrun_world_size(), main_callback))
        processes = RunProcesses(settings.cpu, settings.track, settings.out)
        stack.callback(processes.close_trackers_and_leave_group)
        processes.run_in_main_and_broadcast(lambda: stack.enter_context(lock_folder(settings.out)))
        found = prepare.checkpoint_to_resume(settings, allow_resume=resume)
        # Add all adapters to an empty base model first, to find errors before data or weights are
        # read.
        empty = base_model.build_base_model_on_meta(settings)
        prepare.add_trainable_adapters(empty, settings, recommend(empty))
        run = Run(settings, found, processes, signals, progress, on_message)
        stack.callback(run.close_log)
        yield run


class _MeanLossesAndFilePaths(NamedTuple):
    """The mean losses of a training run, and the paths of the loss files that it wrote.

    The mean loss of each adapter is computed from its training losses. The loss files are a table
    and, if matplotlib is installed, a plot. If the run has steps left, there are no mean losses and
    no files.
    """

    means: dict[str, float]
    files: tuple[Path, ...]


class Run:
    """A training run, from its preparation to its last step.

    A run trains the adapters of a base model. If ``resumed`` is the path of a checkpoint, the run
    resumes from that checkpoint. If ``resumed`` is None, the run starts from the beginning.
    """

    def __init__(
        self,
        settings: TrainSettings,
        resumed: Path | None,
        processes: RunProcesses,
        signals: StopSignalHandler,
        progress: bool,
        on_message: Callable[[str], object] | None = None,
    ) -> None:
        state = None if resumed is None else checkpoint.read_checkpoint_state(resumed)
        if state is not None:
            settings = prepare.with_adapters_in_checkpoint_order(settings, state)
        self.processes = processes
        self.settings = settings
        self._signals = signals
        # Whether any process had a reason to stop when the processes last exchanged losses.
        self._stop_agreed = False
        # The first failure to write the log, the losses, or tracker data, or to generate answers.
        # It ends the run.
        self._failure: TrainError | None = None
        self.progress = progress and self.processes.main
        self.root = settings.out / "checkpoints"
        self.step = 0
        self.losses: dict[str, float] = {}
        self._log: run_log.RunLogFile | None = None
        self._on_message = (
            on_message if on_message is not None and self.processes.main else lambda text: None
        )

        tokenizer = self.tokenizer = base_model.load_tokenizer(settings)
        self.corpora = prepare.read_and_tokenize_data(settings, tokenizer, progress=self.progress)
        self.held_out = prepare.read_and_tokenize_data(
            settings, tokenizer, "eval_data", progress=self.progress
        )
        for line in prepare.describe_data(self.corpora, self.held_out):
            self._on_message(line)
        self.schedule = prepare.make_sample_schedule(settings, self.corpora, self.processes.count)
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad = next(i for i in ids if i is not None)
        self.model = self._make_model()
        advice = recommend(self.model)
        self.optimizers = prepare.make_optimizers(
            self.model, settings, advice, self.schedule, self.processes.device
        )
        weights = checkpoint.base_weight_fingerprints(self.model.get_base_model())
        self.identity = prepare.run_identity(
            settings, self.schedule, self.corpora, self.model, weights
        )
        if resumed is not None and state is not None:
            self._resume(resumed, state)
        self.resumed_from = self.step

    def _make_model(self) -> LoraModel:
        settings, device = self.settings, self.processes.device
        if settings.deterministic and device.type == "cuda":
            # cuBLAS reads it at startup. Without it, results of split reductions may differ between
            # runs.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
        base = base_model.load_base_model(settings, device, progress=self.progress)
        base_model.check_samples_fit_model(base, [*self.corpora.values(), *self.held_out.values()])
        base_model.check_prompts_fit_model(base, settings, self.corpora, self.tokenizer)
        base_model.enable_gradient_checkpointing_if_set(base, settings)
        model = prepare.add_trainable_adapters(base, settings, recommend(base))
        model.to(device)
        if settings.packing in ("bfd", "bfd_split"):
            base_model.check_separates_packed_samples(model.eval(), settings.packing)
        return model.train()

    def _resume(self, path: Path, state: checkpoint.CheckpointState) -> None:
        steps, before = self.schedule.steps, state.identity.get("steps")
        # Only the number of steps may change. The learning rates follow it.
        found = checkpoint.describe_identity_differences(
            {**state.identity, "steps": steps}, self.identity
        )
        if found:
            raise CheckpointError(
                f"{path} is from a different run: {_join_first_and_count_rest(found, 5, '; ')}"
            )
        if steps < state.step:
            raise CheckpointError(
                f"{path}: {state.step} steps are already done, but the run is limited to "
                f"{steps}; set --steps to {state.step} or more"
            )
        for adapter in self.settings.adapters:
            folder = checkpoint.checkpoint_adapters_folder(path) / adapter.name
            self.model.load_adapter(folder, adapter.name, is_trainable=True)
        self.optimizers.load_state_dict(state.optimizers)
        self.step = state.step
        if steps != before:
            self.optimizers.follow_schedules()
            self._on_message(
                f"continuing after step {self.step}, to {steps} steps instead of {before}"
            )

    def train(self) -> TrainResult:
        """Run the training to its end, and return the result.

        The training loop runs all remaining steps, including the evaluations and checkpoints that
        are due. The adapters and a checkpoint are saved at the end.

        Raises:
            RunInterrupted: A signal arrived. Everything trained so far has been saved.
            TrainError: The log or the data of a tracker could not be written, or an answer could
                not be generated. Everything trained so far has been saved.
            NonFiniteError, CheckpointError: See `train`.
        """
        settings, steps = self.settings, self.schedule.steps
        was_evaluated = self.processes.run_in_main_and_broadcast(self._open_log_and_check_evaluated)
        with self._defer_write_error("trackers"):
            self.processes.start_trackers()
        where = {"processes": self.processes.count, "device": str(self.processes.device)}
        self._write_log_and_trackers({"step": self.step, **where})
        self.processes.run_in_main_and_broadcast(self._raise_deferred_write_error)
        saved = None
        self._signals.defer_first_signal()
        # A run interrupted after this step has not evaluated yet; a finished run evaluates again.
        evaluated = {} if was_evaluated or not self.step else self._evaluation_losses_if_due()
        with prepare.progress_bar(
            total=steps, initial=self.step, desc="training", unit="step", disable=not self.progress
        ) as bar:
            while self.step < steps and not self._run_should_stop():
                self._run_training_step()
                bar.set_postfix_str(self._progress_text(), refresh=False)
                bar.update()
                if self.step == steps:
                    self._check_no_adapter_skipped_all_steps()
                evaluated = self._evaluation_losses_if_due()
                if self._is_due_or_last(settings.save_every):
                    self.save_adapters_and_checkpoint()
                    saved = self.step
        if saved != self.step and not self._is_before_first_step():
            self.save_adapters_and_checkpoint()
        means, files = self.processes.run_in_main_and_broadcast(
            self._write_loss_files_and_close_trackers
        )
        if self._is_before_first_step():
            raise self._interrupted("before the first step; nothing was trained")
        if self.step < steps:
            raise self._interrupted(f"after step {self.step} of {steps}", saved=True)
        if self._signals.received is not None or self._run_should_stop():
            raise self._interrupted(f"after the run's last step ({steps})", saved=True)
        losses, skipped = dict(self.losses), self._skipped_step_counts_by_adapter()
        folders = self._output_folders_of_adapters_with_steps()
        return TrainResult(
            self.step, losses, evaluated, folders, self.resumed_from, means, files, skipped
        )

    def _open_log_and_check_evaluated(self) -> bool:
        """Open the log, and return whether the adapters have already been evaluated at this step.

        An earlier run may have evaluated them. If no steps are left, the result is False, because
        this run repeats the evaluation.
        """
        checkpoint.remove_old_checkpoints(self.root, self.settings.keep)
        ended = self.step == self.schedule.steps
        last_key = None
        if self._is_due_or_last(self.settings.eval_every):
            has_prompts = any(adapter.prompts for adapter in self.settings.adapters)
            last_key = "answers" if has_prompts else "eval_loss" if self.held_out else None
        self._log = run_log.RunLogFile(
            self.settings.out, self.step, evaluates=ended, last_key=last_key
        )
        return self._log.was_evaluated

    def _write_loss_files_and_close_trackers(self) -> _MeanLossesAndFilePaths:
        """Write the table and the plot of the losses, and close the trackers.

        If steps are left, no file is written. Raises the first error from writing the log, the
        losses, or tracker data.
        """
        folder = self.settings.out
        means: dict[str, float] = {}
        files: list[Path | None] = []
        if self.step == self.schedule.steps and self._failure is None:
            with self._defer_write_error("losses"):
                logged = run_log.read_logged_losses(folder)
                means = run_log.mean_training_loss_by_adapter(logged)
                files = [
                    run_log.write_loss_table(folder, logged),
                    run_log.plot_losses(folder, logged),
                ]
        with self._defer_write_error("trackers"):
            self.processes.close_trackers()
        self._raise_deferred_write_error()
        return _MeanLossesAndFilePaths(means, tuple(path for path in files if path is not None))

    @contextlib.contextmanager
    def _defer_write_error(self, what: str) -> Iterator[None]:
        """Defer a write error that is raised in the ``with`` block.

        The error is recorded instead of being raised. The current step continues, and the run then
        ends with the error. If there are several errors, only the first one is recorded. The
        message of the error says that ``what`` could not be written.
        """
        try:
            with run_log.os_error_as_train_error(what):
                yield
        except TrainError as error:
            self._failure = self._failure or error

    def _raise_deferred_write_error(self) -> None:
        """Raise the deferred error, if there is one.

        An error is deferred if a write or the generation of answers has failed. If several errors
        occurred, the first one is raised. A recovery hint is added to the message of the error.
        """
        if self._failure is not None:
            raise self._with_recovery_hint(
                self._failure, self._output_folders_of_adapters_with_steps()
            ) from self._failure

    def _run_should_stop(self) -> bool:
        """Return whether the run should stop early, for example because of a signal.

        A deferred write error stops the run too. A run that should stop ends after the current
        step. The result is the same in all processes. In a run with several processes, the result
        is updated only when the processes exchange their losses.
        """
        return self._stop_agreed if self.processes.count > 1 else self._this_process_should_stop()

    def _this_process_should_stop(self) -> bool:
        """Return whether this process has a reason to stop the training run early.

        The reason may be a signal or a deferred write error. The process then ends after the
        current step. Other processes may not have a reason to stop yet. In contrast, the result of
        `_run_should_stop` is the same in all processes.
        """
        return self._signals.received is not None or self._failure is not None

    def _interrupted(self, when: str, *, saved: bool = False) -> RunInterrupted:
        number = self._signals.received or signal.SIGTERM  # received by another process
        text = f"interrupted by {number.name} {when}"
        if not saved:
            return RunInterrupted(text, number)
        folder = checkpoint.checkpoint_path(self.root, self.step)
        adapters = ", ".join(map(str, self._output_folders_of_adapters_with_steps().values()))
        return RunInterrupted(f"{text}; saved: {adapters} and {folder}", number, folder)

    def _output_folders_of_adapters_with_steps(self) -> dict[str, Path]:
        """Return a dict that maps each trained adapter to its output folder.

        A trained adapter is an adapter that has taken at least one step.
        """
        counts = self.optimizers.counts
        return {name: self.settings.out / name for name in self.corpora if counts[name].steps}

    def _evaluation_losses_if_due(self) -> dict[str, float]:
        """Run the evaluation if it is due, and return the evaluation losses.

        The result is a dict that maps each adapter with evaluation data to its loss. Unless the run
        is about to stop, the answers to the prompts are logged too. If no evaluation is due, the
        result is an empty dict. A run that stops leaves the evaluation to the run that resumes it.
        """
        if self._run_should_stop() or not self._is_due_or_last(self.settings.eval_every):
            return {}
        evaluated = self.evaluate() if self.held_out else {}
        if not self._run_should_stop():
            self.generate_and_log_answers()
        return evaluated

    def _is_before_first_step(self) -> bool:
        """Return whether the run has yet to complete its first step.

        In a resumed run, only the steps after the checkpoint count. The result is False if no steps
        are left.
        """
        return self.resumed_from == self.step < self.schedule.steps

    def _is_due_or_last(self, every: int) -> bool:
        """Return whether a periodic action is due now.

        The action is due every ``every`` steps and after the last step. If ``every`` is 0, it is
        due only after the last step.
        """
        return self.step == self.schedule.steps or (every > 0 and self.step % every == 0)

    def close_log(self) -> None:
        """Close the log."""
        if self._log is not None:
            self._log.close()

    def _run_training_step(self) -> None:
        """Run one training step.

        The step consists of the forward and backward passes, the optimizer step, and the log entry.
        Raises `NonFiniteError` if a loss or a gradient is not finite. With loss scaling, an
        adapter with a non-finite gradient is skipped instead, unless its loss scale is too low.
        """
        values = self._compute_mean_losses_by_adapter(
            self.schedule.order.step_samples(self.step), self.corpora, accumulate_gradients=True
        )
        for name, value in values.items():
            if not math.isfinite(value):
                raise self._not_finite("loss", name, value, self.step + 1)
        self.processes.sum_gradients(self._trainable_parameters(values))
        report = self.optimizers.step(values)
        self.optimizers.zero_grad()
        for name in report.skipped:
            scale, value = self.optimizers.loss_scale(name), report.grad_norms[name]
            if scale is None:
                raise self._not_finite("gradient", name, value, self.step + 1)
            if scale < _LEAST_SCALE:
                how = f", with the loss scale already reduced to {scale:g}"
                raise self._not_finite("gradient", name, value, self.step + 1, how)
        self.step += 1
        self.losses.update(values)
        rates = {
            name: optimizer.param_groups[0]["lr"]
            for name, optimizer in self.optimizers.by_adapter.items()
        }
        entry: dict[str, Any] = {"loss": values, "grad_norm": report.grad_norms, "next_lr": rates}
        if report.skipped:
            entry["skipped"] = list(report.skipped)
        self._write_log_and_trackers({"step": self.step, **entry})

    def _skipped_step_counts_by_adapter(self) -> dict[str, int]:
        """Return a dict that maps each adapter to its number of skipped steps.

        Adapters without skipped steps are left out.
        """
        counts = self.optimizers.counts
        return {name: count.skipped_steps for name, count in counts.items() if count.skipped_steps}

    def _check_no_adapter_skipped_all_steps(self) -> None:
        """Raise `NonFiniteError` if an adapter has skipped all of its steps.

        A step is skipped if a gradient of the adapter is not finite.
        """
        for name, count in self.optimizers.counts.items():
            if not count.steps and count.skipped_steps:
                scale = f"{self.optimizers.loss_scale(name):g}"
                raise self._stopped(
                    f"adapter {name!r} was never updated: its gradient was non-finite in each of "
                    f"its {count.skipped_steps} steps (loss scale: {scale}); to train without loss "
                    "scaling, set dtype to 'bfloat16' or 'float32'",
                    name,
                    self.step,
                )

    def _trainable_parameters(self, names: Iterable[str]) -> list[nn.Parameter]:
        """Return the trainable parameters of the named adapters.

        The list has no duplicates.
        """
        found = (p for name in names for p in adapter_parameters(self.model, name).values())
        return list({id(p): p for p in found if p.requires_grad}.values())

    def _compute_mean_losses_by_adapter(
        self,
        samples: Sequence[SampleRef],
        corpora: Mapping[str, TokenizedCorpus],
        *,
        accumulate_gradients: bool,
    ) -> dict[str, float]:
        """Compute the mean loss of each adapter on the given samples.

        The mean is over the tokens that contribute to the loss. The forward passes are distributed
        over all processes. With ``accumulate_gradients=True``, gradients are accumulated too. An
        interrupted run ends an evaluation early; the returned losses are then meaningless.
        """
        from accelerate.utils import set_seed

        drawn = {row.adapter for row in samples}
        tokens = {name: 0 for name in corpora if name in drawn}
        for row in samples:
            tokens[row.adapter] += corpora[row.adapter].num_loss_tokens(row.sample)
        sums = dict.fromkeys(tokens, 0.0)
        for number, part in enumerate(
            sorted_micro_batches(samples, corpora, self.schedule.micro_batch_size)
        ):
            # Draw seeds in every process, so that all processes count the same forward passes.
            seeds = (
                self.optimizers.draw_seeds([row.adapter for row in part])
                if accumulate_gradients
                else None
            )
            if not accumulate_gradients and self._this_process_should_stop():
                break
            if not self.processes.runs_forward_pass(number):
                continue
            if accumulate_gradients:  # makes random numbers a function of step and forward pass
                set_seed(derive_seed(self.settings.seed, self.step, number, nbytes=4))
            batch = collate_samples(part, corpora, self.pad, self.processes.device)
            losses = causal_lm_losses(  # nothing keeps the logits alive after this call
                self._logits(batch, seeds), batch.labels, batch.adapters, tokens=tokens
            )
            if accumulate_gradients:
                self.optimizers.backward(losses)
            for name, value in losses.values.items():
                sums[name] += value
        found, self._stop_agreed = self.processes.sum_values_and_stop_flags(
            sums, stop=self._this_process_should_stop()
        )
        return found

    def _logits(self, batch: TrainBatch, seeds: Mapping[str, int] | None) -> torch.Tensor:
        with adapters(self.model, batch.adapters, seeds=seeds):
            logits: torch.Tensor = self.model(**batch.inputs, use_cache=False).logits
        return logits

    def _not_finite(
        self, what: str, name: str, value: float, step: int, how: str = ""
    ) -> NonFiniteError:
        return self._stopped(f"the {what} of adapter {name!r} is {value}{how}", name, step)

    def _stopped(self, text: str, name: str, step: int) -> NonFiniteError:
        rows = self.schedule.order.step_samples(step - 1)
        sources = [str(self.corpora[name].sources[r.sample]) for r in rows if r.adapter == name]
        found = checkpoint.list_checkpoints(self.root)
        last = (
            f"the last good checkpoint is {found[-1]}"
            if found
            else "no checkpoint has been saved yet"
        )
        samples = (
            f". Its samples in that step: {_join_first_and_count_rest(sources, 3, '; ')}"
            if sources
            else ""
        )
        return NonFiniteError(f"step {step}: {text}; training stopped; {last}{samples}", step, name)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Evaluate the model on the evaluation data, and return the losses.

        The result is a dict that maps each adapter with evaluation data to its mean loss. The
        losses are also logged. If the run is about to stop, nothing is logged, and the result is an
        empty dict.
        """
        rows = [SampleRef(n, i) for n, corpus in self.held_out.items() for i in range(len(corpus))]
        self.model.eval()
        found = self._compute_mean_losses_by_adapter(
            rows, self.held_out, accumulate_gradients=False
        )
        self.model.train()
        if self._run_should_stop():
            return {}
        self._write_log_and_trackers({"step": self.step, "eval_loss": found})
        return found

    def generate_and_log_answers(self) -> None:
        """Generate answers to the run's prompts, and log the answers.

        Each adapter answers its own prompts. Only the main process generates answers. The other
        processes wait at the next step. An error of the model ends the run as a write error does.
        """
        prompts = {a.name: a.prompts for a in self.settings.adapters if a.prompts}
        if not prompts or not self.processes.main:
            return
        self.model.eval()
        tokens = self.settings.sample_tokens
        try:
            found = generate_answers(
                self.model, self.tokenizer, prompts, self.corpora, tokens, self.pad
            )
        except Exception as error:
            failure = TrainError(
                f"the answers to the prompts could not be generated ({type(error).__name__}: "
                f"{error}); change or remove the prompts, or reduce sample_tokens"
            )
            failure.__cause__ = error
            self._failure = self._failure or failure
            return
        finally:
            self.model.train()
        entries = {
            name: [{"prompt": p, "answer": a} for p, a in zip(prompts[name], own, strict=True)]
            for name, own in found.items()
        }
        self._write_log_and_trackers({"step": self.step, "answers": entries})
        with self._defer_write_error("answers"):
            for name, own in entries.items():
                for number, entry in enumerate(own, 1):
                    prompt, text = entry["prompt"], entry["answer"]
                    self._on_message(f"step {self.step}, {name}: {prompt!r} -> {text!r}")
                    self.processes.log_to_trackers({f"answers/{name}/{number}": text}, self.step)

    def save_adapters_and_checkpoint(self) -> None:
        """Save the adapters and a checkpoint.

        If the current step already has a checkpoint, none is written. Adapters are smaller than a
        checkpoint, so on a full disk each adapter that still fits is saved.

        Raises:
            CheckpointError: An adapter or the checkpoint cannot be written. Older checkpoints are
                unchanged.
            NonFiniteError: A weight is not finite. The last update overflowed although its loss was
                finite, and a checkpoint of it would be useless.
        """
        for name in self.corpora:
            weights = [parameter.detach() for parameter in self._trainable_parameters([name])]
            value = float(nn.utils.get_total_norm(weights, math.inf))
            if not math.isfinite(value):
                raise self._not_finite("largest absolute weight", name, value, self.step)
        state = checkpoint.CheckpointState(self.step, self.identity, self.optimizers.state_dict())

        def write() -> None:
            self._save_trained_adapters()
            if checkpoint.checkpoint_path(self.root, self.step).exists():
                return
            try:
                with checkpoint.write_checkpoint(self.root, state, self.settings.keep) as folder:
                    for adapter in self.settings.adapters:
                        save_adapter(self.model, adapter.name, folder / adapter.name)
            except CheckpointError as error:
                raise self._with_recovery_hint(
                    error, self._output_folders_of_adapters_with_steps()
                ) from error

        self.processes.run_in_main_and_broadcast(write)

    def _save_trained_adapters(self) -> None:
        """Save all trained adapters.

        Each adapter is saved to its own folder in the output folder of the run. A trained adapter
        is an adapter that has taken at least one step. If an adapter cannot be written, the other
        adapters are still written before `CheckpointError` is raised.
        """
        saved, failures = [], []
        for name, folder in self._output_folders_of_adapters_with_steps().items():
            try:
                save_adapter(self.model, name, folder)
                saved.append(name)
            except CheckpointError as error:
                failures.append(error)
        if failures:
            raise self._with_recovery_hint(failures[0], saved) from failures[0]

    def _with_recovery_hint(self, error: _Failure, saved_adapters: Iterable[str]) -> _Failure:
        """Return an error with a recovery hint added to its message.

        The result is a new error of the same type. The hint names the saved adapters and, if there
        is one, the checkpoint from which the run can resume. Before the first step is completed,
        the hint says only that nothing was trained.
        """
        if self._is_before_first_step():
            return type(error)(f"{error}; nothing was trained")
        saved = ", ".join(str(self.settings.out / name) for name in saved_adapters) or "none"
        found = checkpoint.list_checkpoints(self.root)
        resume = f"continue from {found[-1]} with --resume" if found else "no checkpoint was saved"
        text = f"{error}; adapters saved after step {self.step}: {saved}; {resume}"
        return type(error)(text)

    def _write_log_and_trackers(self, entry: dict[str, Any]) -> None:
        """Write an entry to the log and to the trackers.

        Only the main process does this.
        """
        if self._log is None:
            return
        with self._defer_write_error("trackers"):
            self._log.write(entry)
            numbers = run_log.flatten_for_trackers({k: v for k, v in entry.items() if k != "step"})
            self.processes.log_to_trackers(numbers, self.step)

    def _progress_text(self) -> str:
        skipped = self._skipped_step_counts_by_adapter()
        shown = [
            f"{name} {value:.3f}" + (f" ({skipped[name]} skipped)" if name in skipped else "")
            for name, value in self.losses.items()
        ]
        return _join_first_and_count_rest(shown, 6, ", ")


def save_adapter(model: LoraModel, name: str, folder: Path) -> None:
    """Save an adapter to a folder.

    The files are in PEFT's format; see `save_adapter_folder`.
    """
    tensors = adapter_state.adapter_file_state_dict(model, name, model.state_dict(), "auto")
    with checkpoint.write_error_as_checkpoint_error(folder):
        save_adapter_folder(folder, model.peft_config[name], tensors)


def _join_first_and_count_rest(items: Sequence[str], count: int, separator: str) -> str:
    """Join the first ``count`` items, and append the number of remaining items."""
    more = [f"and {len(items) - count} more"] if len(items) > count else []
    return separator.join([*items[:count], *more])
