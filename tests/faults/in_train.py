"""Faults of ``fastlora/train``: steps, losses, resumed runs, saved files and locks."""

from __future__ import annotations

from tests.faults.fault import Fault

_CLI = "tests/commands/train"
_LOCK = f"{_CLI}/test_train_cli_lock.py"
_TRAIN = "tests/train/test_train.py"

FAULTS = (
    Fault(
        sentence="A loss that is not finite spoils gradients of earlier batches of its adapter.",
        kind="NaN across batches",
        source="e8ceaab",
        path="fastlora/train/optimizers.py",
        before="spoiled = [adapter for name, adapter in self._adapters.items() if name not in own]",
        after="spoiled = []",
        tests=(f"{_TRAIN}::test_a_loss_that_is_not_finite_is_left_out",),
    ),
    Fault(
        sentence="A token that does not count makes its adapter's loss NaN.",
        kind="NaN across rows",
        source="e8ceaab",
        path="fastlora/train/losses.py",
        before="sums = torch.where(mask, token_losses, 0.0).reshape(len(token_losses), -1).sum(1)",
        after="sums = (token_losses * mask).reshape(len(token_losses), -1).sum(1)",
        tests=("tests/train/test_train_losses.py::test_losses_for_each_sample_and_mask",),
    ),
    Fault(
        sentence="A resumed adapter draws the dropout masks of its first forwards again.",
        kind="a resume that does not repeat",
        source="e8ceaab",
        path="fastlora/train/adapter_training_state.py",
        before='        self.seed, self.counts = state["seed"], AdapterCounts(**state["counts"])\n',
        after='        self.seed = state["seed"]\n',
        tests=(f"{_TRAIN}::test_resuming_is_exact",),
    ),
    Fault(
        sentence="A skipped step moves its adapter's schedule.",
        kind="a schedule moved by a skipped step",
        source="e8ceaab",
        path="fastlora/train/adapter_training_state.py",
        before="            self.counts.skipped_steps += 1\n",
        after="""\
            self.counts.skipped_steps += 1
            if self.scheduler is not None:
                self.scheduler.step()
""",
        tests=(f"{_TRAIN}::test_a_gradient_that_is_not_finite_skips_its_step",),
    ),
    Fault(
        sentence="A run locks a file that another run has just removed.",
        kind="a lock without a name",
        source="a61c464",
        path="fastlora/train/lock.py",
        before="            locked = _is_file_at(descriptor, path)\n",
        after="            locked = True\n",
        tests=(f"{_LOCK}::test_a_lock_file_that_is_left_or_removed",),
    ),
    Fault(
        sentence="A worker process that outlives its killed run keeps the run's lock.",
        kind="a lock kept by a child",
        source="a61c464",
        path="fastlora/train/lock.py",
        before="    while _held:\n        os.close(_held.pop())\n",
        after="    _held.clear()\n",
        tests=(f"{_LOCK}::test_a_worker_process_keeps_no_lock",),
    ),
    Fault(
        sentence="A second run starts in the folder of one that is still alive.",
        kind="a lock not taken",
        source="R11",
        path="fastlora/train/lock.py",
        before="            if not free:\n                raise TrainError(",
        after="            if free is None:\n                raise TrainError(",
        tests=(f"{_LOCK}::test_what_the_lock_says",),
    ),
    Fault(
        sentence="Gradients that were not multiplied by a loss scale are divided by it.",
        kind="a missing check",
        source="issue 29",
        path="fastlora/train/adapter_training_state.py",
        before="        if self.scaler is not None and not self._has_scaled_loss:\n",
        after="        if False:\n",
        tests=(f"{_TRAIN}::test_a_loss_without_its_scale_does_not_step",),
    ),
    Fault(
        sentence="The threads of a process group run until its process ends.",
        kind="a crash at the exit",
        source="issue 29",
        path="fastlora/train/processes.py",
        before='importlib.import_module("torch.distributed.nn")',
        after="pass",
        tests=(f"{_CLI}/test_train_cli.py::test_processes_end_the_threads_of_their_group",),
    ),
    Fault(
        sentence="The logits of a forward are kept until its backward has ended.",
        kind="a tensor kept too long",
        source="f6ce964",
        path="fastlora/train/run.py",
        before="""\
            losses = causal_lm_losses(  # nothing keeps the logits alive after this call
                self._logits(batch, seeds), batch.labels, batch.adapters, tokens=tokens
            )
""",
        after="""\
            logits = self._logits(batch, seeds)
            losses = causal_lm_losses(logits, batch.labels, batch.adapters, tokens=tokens)
""",
        tests=(
            f"{_CLI}/test_train_cli_options.py::"
            "test_logits_are_gone_before_the_backward_and_the_next_forward",
        ),
    ),
    Fault(
        sentence="A checkpoint and an adapter are saved with a weight that is not finite.",
        kind="a saved weight that is not finite",
        source="b67297e",
        path="fastlora/train/run.py",
        before=(
            "            if not math.isfinite(value):\n"
            '                raise self._not_finite("largest absolute weight"'
        ),
        after=(
            "            if value < 0:\n"
            '                raise self._not_finite("largest absolute weight"'
        ),
        tests=(f"{_CLI}/test_train_cli_errors.py::test_a_weight_that_is_not_finite",),
    ),
    Fault(
        sentence="A run ends well although an adapter skipped all of its steps.",
        kind="a run without a step",
        source="4b2def6",
        path="fastlora/train/run.py",
        before="            if not count.steps and count.skipped_steps:\n",
        after="            if not count.steps and not count.skipped_steps:\n",
        tests=(f"{_CLI}/test_train_cli_fp16.py::test_a_run_that_never_stepped",),
    ),
    Fault(
        sentence="An interrupted run writes its checkpoint before the adapters.",
        kind="a kill between files",
        source="a61c464",
        path="fastlora/train/run.py",
        before="""\
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
""",
        after="""\
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
            self._save_trained_adapters()
""",
        tests=(f"{_CLI}/test_train_cli_interrupt.py::test_adapters_are_saved_first",),
    ),
    Fault(
        sentence="A run that was resumed keeps the log of steps that it takes again.",
        kind="a log of steps taken twice",
        source="7b72f2e",
        path="fastlora/train/run_log.py",
        before="            remaining = [line for line in lines if _step_of(line) <= step]\n",
        after='            remaining = [line for line in lines if _step_of(line) < float("inf")]\n',
        tests=(f"{_CLI}/test_train_cli_fp16.py::test_a_log_goes_on_from_a_checkpoint",),
    ),
    Fault(
        sentence="Bytes that are no UTF-8 are trained on as other characters.",
        kind="data read as something else",
        source="c494dcd",
        path="fastlora/train/data/files.py",
        before='        text = data.decode("utf-8-sig")\n',
        after='        text = data.decode("utf-8-sig", "replace")\n',
        tests=(f"{_CLI}/test_train_cli_errors.py::test_missing_and_binary_data",),
    ),
    Fault(
        sentence="Half a character in a data file fails in the tokenizer, without file and line.",
        kind="an error without a place",
        source="c494dcd",
        path="fastlora/train/data/formats.py",
        before="            text.encode()\n",
        after='            text.encode("utf-8", "replace")\n',
        tests=("tests/train/test_data.py::test_what_raises",),
    ),
    Fault(
        sentence="A learning rate is taken that overflows in AdamW's first step.",
        kind="no bound on a rate",
        source="1bc0601",
        path="fastlora/train/setting_types.py",
        before="LARGEST_RATE = 3.4e37",
        after="LARGEST_RATE = 3.4e38",
        tests=(
            f"{_CLI}/test_train_cli_errors.py::test_bad_config"
            "[adapters.a.lr-3e+38-learning_rate must be a number from 0 to 3.4e+37, got 3e+38]",
        ),
    ),
    Fault(
        sentence="A run whose output nobody reads any more ends with exit code 1 after Ctrl-C.",
        kind="an exit code",
        source="3261ca1",
        path="fastlora/train/command.py",
        before="    except BrokenPipeError:\n",
        after="    except BlockingIOError:\n",
        tests=(f"{_CLI}/test_train_cli_interrupt.py::test_the_reader_of_the_output_ends_first",),
    ),
    Fault(
        sentence="A run that is resumed with its adapters in another order shuffles anew.",
        kind="a resume that does not repeat",
        source="review of train",
        path="fastlora/train/run.py",
        before=(
            "            settings = prepare.with_adapters_in_checkpoint_order(settings, state)\n"
        ),
        after="            prepare.with_adapters_in_checkpoint_order(settings, state)\n",
        tests=(
            f"{_CLI}/test_train_cli_checkpoints.py::test_resume_with_adapters_in_another_order",
        ),
    ),
    Fault(
        sentence="Of two adapters of one name in a JSON config, one is dropped without a word.",
        kind="a key that is dropped",
        source="review of train",
        path="fastlora/train/settings_file.py",
        before="    return json.loads(text, object_pairs_hook=unique)\n",
        after="    return json.loads(text)\n",
        tests=(f"{_CLI}/test_train_cli_errors.py::test_bad_config_files",),
    ),
    Fault(
        sentence="The flag --epochs does nothing if the config file has steps.",
        kind="a flag that is ignored",
        source="review of train",
        path="fastlora/train/settings.py",
        before='        given.pop("steps", None)  # it would take precedence over epochs\n',
        after="        pass\n",
        tests=(f"{_CLI}/test_train_cli_options.py::test_toml_and_precedence",),
    ),
    Fault(
        sentence="A prompt whose answer exceeds the model's positions fails after all steps.",
        kind="a check that comes too late",
        source="review of train",
        path="fastlora/train/base_model.py",
        before="            if positions is not None and len(ids) + answer - 1 > positions:\n",
        after="            if positions is not None and len(ids) > positions:\n",
        tests=(f"{_CLI}/test_train_cli_errors.py::test_prompts_that_the_model_cannot_take",),
    ),
    Fault(
        sentence="An error while the model answers prompts loses everything that the run trained.",
        kind="a run that is lost",
        source="review of train",
        path="fastlora/train/run.py",
        before="            self._failure = self._failure or failure\n            return\n",
        after="            raise\n",
        tests=(f"{_CLI}/test_train_cli_interrupt.py::test_answers_that_the_model_cannot_give",),
    ),
)
