"""``fastlora train``: train adapters of one base model together, from a config file or flags.

The config file is TOML, JSON, or YAML. In it, `model` is the folder of the base model and `out` is
the output folder. Each adapter has a table `adapters.NAME` with its `data` and its own settings:
`r`, `alpha`, `dropout`, `targets`, `rslora`, `dora`, `lr`, or any other field of
`fastlora.LoraConfig` that defines the adapter, which `task_type` and `revision` do not. A table
`defaults` has settings for all adapters.

Flags override the file. For several GPUs or processes, run:
`torchrun --nproc-per-node N -m fastlora train ...`
"""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from torch.nn.functional import cross_entropy

from fastlora.command_line import parse_arguments
from fastlora.integrations.report import auto_implementation, fusion_report
from fastlora.model.config_checks import BIAS_MODES
from fastlora.model.estimate import estimate, format_bytes
from fastlora.model.recommend import Recommendation, recommend
from fastlora.model.step_memory import measure_peak_of_created_tensors
from fastlora.model.target_names import ALL_LINEAR
from fastlora.routing.block import adapters
from fastlora.train import base_model, checkpoint, prepare
from fastlora.train.processes import check_trackers, torchrun_world_size
from fastlora.train.quantization import base_model_dtype
from fastlora.train.run import TrainResult, train
from fastlora.train.setting_types import SWITCH, TEXTS
from fastlora.train.settings import ALIASES, AdapterSettings, TrainSettings, read_settings
from fastlora.train.signals import RunInterrupted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Value of --init -> value of init_lora_weights.
_INITS: dict[str, bool | str] = {"true": True, "gaussian": "gaussian", "false": False}
# Flags for fields of `fastlora.LoraConfig`: keyword arguments for argparse, and the help text.
_LORA_FLAGS: dict[str, tuple[dict[str, Any], str]] = {
    "--r": ({"type": int, "metavar": "N"}, "rank"),
    "--alpha": ({"type": float, "metavar": "X"}, "LoRA alpha; the scaling is alpha / r"),
    "--dropout": (
        {"type": float, "metavar": "P"},
        "dropout probability on the input of the adapters",
    ),
    "--targets": (TEXTS.flag, "modules to adapt (default: all-linear)"),
    "--modules-to-save": (TEXTS.flag, "modules that each adapter trains and saves in full"),
    "--rslora": (SWITCH.flag, "scale by alpha / sqrt(r) instead of alpha / r"),
    "--dora": (SWITCH.flag, "use DoRA: train a magnitude for each output feature"),
    "--lora-bias": (SWITCH.flag, "add a bias to lora_B"),
    "--bias": ({"choices": BIAS_MODES}, "biases of the base model to train (default: none)"),
    "--init": (
        {"choices": tuple(_INITS)},
        "initialization: lora_A uniform and lora_B zero (true), lora_A normal and lora_B zero "
        "(gaussian), or both random (false) (default: true)",
    ),
}
_NOT_SETTINGS = ("config", "data", "eval_data", "prompt", "resume", "dry_run", "quiet")
_RUN_SETTINGS = {f.name for f in fields(TrainSettings)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to ``parser``."""
    parser.add_argument(
        "config",
        type=Path,
        nargs="?",
        metavar="CONFIG",
        help="config file (.toml, .json, or .yaml)",
    )
    parser.add_argument(
        "--data",
        action="append",
        metavar="NAME=FILE",
        help="training data of an adapter: a .jsonl, .json, .csv, .tsv, or .parquet file, or a "
        "folder saved by datasets, with the columns messages; conversations; instruction, input, "
        "and output; prompt and completion; or text. Plain text (.txt or .md) also works. Repeat "
        "the option for more files or more adapters",
    )
    parser.add_argument(
        "--eval-data",
        action="append",
        metavar="NAME=FILE",
        help="evaluation data of an adapter, in the formats of --data; repeatable",
    )
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="show each adapter's answer to this prompt at every evaluation; repeatable",
    )
    group = parser.add_argument_group("options for all adapters (they override the config file)")
    shorter = {name: short for short, name in ALIASES.items()}
    for where, settings in ((parser, TrainSettings), (group, AdapterSettings)):
        for own in fields(settings):
            if text := own.metadata.get("help"):
                flag = "--" + shorter.get(own.name, own.name).replace("_", "-")
                where.add_argument(flag, help=text, **own.metadata["setting_type"].flag)
    for flag, (options, text) in _LORA_FLAGS.items():
        group.add_argument(flag, help=text, **options)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="resume from the newest checkpoint; add --steps N to extend a finished run to N steps",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check config and data; print parameters, memory, and fused layers; write nothing",
    )
    parser.add_argument("--quiet", action="store_true", help="hide progress bars")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command ``fastlora train``, and return its exit code.

    The command trains the adapters. ``argv`` contains its arguments; None uses the arguments of the
    process. The exit code is 0, or 128 plus the number of the signal that interrupted the run. The
    errors of `train` are raised.
    """
    parser = argparse.ArgumentParser(
        prog="fastlora train",
        description=(__doc__ or "").replace("``", ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    args = parse_arguments(parser, argv)
    settings = read_settings(args.config, _flags_from_arguments(args, parser))
    main_process = os.environ.get("RANK", "0") == "0"
    try:
        if args.dry_run:
            text = dry_run_report(settings, resume=args.resume)
        else:
            text = summarize_result(
                train(
                    settings, resume=args.resume, progress=not args.quiet, on_message=_print_message
                )
            )
    except RunInterrupted as interrupted:
        if not main_process:
            return 0  # after a nonzero code, torchrun would end the main process too early
        report = f"fastlora: {interrupted}\n"
        if interrupted.checkpoint is not None:
            report += f"resume with: {_resume_command(sys.argv[1:] if argv is None else argv)}\n"
        _write_unless_pipe_closed(sys.stderr, report)
        return 128 + interrupted.signal
    if main_process:
        _print_message(text)
    return 0


def _resume_command(argv: Sequence[str]) -> str:
    """Return the shell command that resumes a run started with the arguments ``argv``."""
    program, processes = ["fastlora"], torchrun_world_size()
    if processes > 1:
        if os.environ.get("LOCAL_WORLD_SIZE", "1") != str(processes):
            return "the same torchrun command on each machine, with --resume"
        program = ["torchrun", "--nproc-per-node", str(processes), "-m", "fastlora"]
    resume = [] if "--resume" in argv else ["--resume"]
    return shlex.join([*program, "train", *argv, *resume])


def _print_message(text: str) -> None:
    _write_unless_pipe_closed(sys.stdout, f"{text}\n")


def _write_unless_pipe_closed(stream: TextIO, text: str) -> None:
    """Write text to a stream, unless the stream is a pipe whose reader has closed it.

    In that case, the text and all later output are discarded. For example, Ctrl-C also ends the
    ``tee`` that reads the output, and the run must still save.
    """
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


def _flags_from_arguments(
    args: argparse.Namespace, parser: argparse.ArgumentParser
) -> dict[str, Any]:
    """Convert the parsed command-line arguments to a dict of flags.

    `read_settings` accepts this dict as ``flags``. If a ``--data`` or ``--eval-data`` argument does
    not have the form ``NAME=FILE``, ``parser`` reports the error.
    """
    given = {k: v for k, v in vars(args).items() if v is not None and k not in _NOT_SETTINGS}
    flags: dict[str, Any] = {k: given.pop(k) for k in list(given) if k in _RUN_SETTINGS}
    if "init" in given:
        given["init_lora_weights"] = _INITS[given.pop("init")]
    if [name.lower() for name in given.get("targets", ())] == [ALL_LINEAR]:
        given["targets"] = ALL_LINEAR
    if args.prompt:
        given["prompts"] = args.prompt
    flags["defaults"] = given
    for key in ("data", "eval_data"):
        files: dict[str, list[str]] = {}
        for entry in getattr(args, key) or ():
            name, found, path = entry.partition("=")
            if not (name and found and path):
                parser.error(f"--{key.replace('_', '-')}: expected NAME=FILE, got {entry!r}")
            files.setdefault(name, []).append(path)
        flags[key] = files
    return flags


def summarize_result(result: TrainResult) -> str:
    """Return a text summary of a run's result.

    The summary has one line per adapter. The last line names the files with the losses. If the
    run was resumed, the first line says so.
    """
    lines = []
    if result.resumed_from:
        done = (
            ": nothing left to do; pass a larger --steps to continue" if not result.losses else ""
        )
        lines.append(f"resumed after step {result.resumed_from} of {result.steps}{done}")
    for name, folder in result.adapters.items():
        parts = [name]
        if name in result.mean_losses:
            parts.append(f"mean loss {result.mean_losses[name]:.4f}")
        if name in result.losses:
            parts.append(f"last loss {result.losses[name]:.4f}")
        if name in result.eval_losses:
            parts.append(f"evaluation loss {result.eval_losses[name]:.4f}")
        if name in result.skipped:
            count = result.skipped[name]
            parts.append(f"{count} step{'s' if count > 1 else ''} skipped (gradients not finite)")
        lines.append(", ".join([*parts, f"saved in {folder}"]))
    lines.append(f"losses of all steps are in {', '.join(map(str, result.files))}")
    if len(result.files) == 1:
        lines[-1] += " (to also plot them, install matplotlib: pip install matplotlib)"
    return "\n".join(lines)


def dry_run_report(settings: TrainSettings, *, resume: bool = False) -> str:
    """Return a report of what a run would do, without training.

    No weights are read and no files are written.

    Args:
        settings: The settings of the run.
        resume: Whether the run would resume from a checkpoint.

    Raises:
        FastLoraError: An error that `train` would raise before it reads weights.
    """
    prepare.check_model_and_out_paths(settings)
    found = prepare.checkpoint_to_resume(settings, allow_resume=resume)
    state = None if found is None else checkpoint.read_checkpoint_state(found)
    if state is not None:
        settings = prepare.with_adapters_in_checkpoint_order(settings, state)
    check_trackers(settings.track)
    base = base_model.build_base_model_on_meta(settings, keep_stored_quantization=True)
    advice = recommend(base)
    configs = prepare.adapter_configs(settings, advice)
    estimates = {name: estimate(base, config) for name, config in configs.items()}
    kind, dtype = type(base).__name__, str(next(base.parameters()).dtype).removeprefix("torch.")
    device = torch.device("cpu")
    if not settings.cpu and torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator() or device
    if device.type == "cuda":
        advice = recommend(base, memory_bytes=torch.cuda.get_device_properties(0).total_memory)
    first = next(iter(estimates.values()))
    is_quantized = first.scale_bytes > 0
    # This adds the adapters to the base model.
    fusion = _add_adapters_and_report_fusion(base, settings, advice, device, is_quantized)
    processes = torchrun_world_size()
    tokenizer = base_model.load_tokenizer(settings)
    corpora = prepare.read_and_tokenize_data(settings, tokenizer)
    held_out = prepare.read_and_tokenize_data(settings, tokenizer, "eval_data")
    schedule = prepare.make_sample_schedule(settings, corpora, processes)
    base_model.check_samples_fit_model(base, [*corpora.values(), *held_out.values()])
    base_model.check_prompts_fit_model(base, settings, corpora, tokenizer)
    held = sum(e.training_bytes for e in estimates.values())
    trained = sum(e.adapter_parameters for e in estimates.values())
    length = max(corpus.num_tokens(i) for corpus in corpora.values() for i in range(len(corpus)))
    step = _estimate_step_memory(settings, advice, schedule.micro_batch_size, length)
    bits = ", stored in quantized form" if is_quantized else ""
    bits = f", quantized in {settings.load_in}" if settings.load_in else bits
    scales = f" ({format_bytes(first.scale_bytes)} of that for scales)" if bits else ""
    workspace = f", one dequantized weight {format_bytes(first.workspace_bytes)}" if bits else ""
    activations = "unknown" if step is None else format_bytes(step)
    whole = first.base_bytes + held + first.workspace_bytes + (step or 0)
    lines = [
        f"base model  {settings.model}: {kind}, {first.base_parameters:,} parameters, "
        f"{dtype}{bits}",
        f"advice      {advice}",
        f"steps       {schedule.steps} of {settings.batch_size} samples, "
        f"{schedule.micro_batch_size} per forward, {processes} process"
        f"{'es' if processes > 1 else ''}"
        + ("" if state is None else f"; {_count(state.step, 'step')} already done"),
        "",
    ]
    for name, config in configs.items():
        lines += [
            f"{name}: {corpora[name]}, {_count(schedule.adapter_steps[name], 'step')}",
            *(f"{' ' * len(name)}  {note}" for note in corpora[name].notes),
            f"{' ' * len(name)}  r {config.r}, alpha {config.lora_alpha:g}, dropout "
            f"{config.lora_dropout:g}; {estimates[name]}",
        ]
    lines += [
        "",
        f"memory      {format_bytes(whole)} in each process: base model "
        f"{format_bytes(first.base_bytes)}{scales}, {_count(len(estimates), 'adapter')} with "
        f"{trained:,} parameters in total {format_bytes(held)} (weights, gradients, AdamW)"
        f"{workspace}, activations {activations} "
        f"({schedule.micro_batch_size} samples of {length} tokens)",
        "",
        fusion,
    ]
    return "\n".join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _estimate_step_memory(
    settings: TrainSettings, advice: Recommendation, samples: int, length: int
) -> int | None:
    """Estimate the memory that a training step uses, in bytes.

    The result is the peak memory of one forward and backward pass with ``samples`` samples of
    ``length`` tokens. The estimate excludes weights and gradients, and is for the base model before
    quantization. The estimate also excludes dropout, which stores only seeds. The result is None if
    the memory cannot be estimated, because the model does not run on the meta device.
    """
    plain = replace(settings, load_in=None, dtype=base_model_dtype(settings))
    base = base_model.build_base_model_on_meta(plain)
    base_model.enable_gradient_checkpointing_if_set(base, settings)
    model = prepare.add_trainable_adapters(base, plain, advice).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    names = itertools.islice(itertools.cycle(a.name for a in settings.adapters), samples)
    ids = torch.empty(samples, length, dtype=torch.long, device="meta")

    def step() -> None:
        with adapters(model, list(names)):
            inputs = {"input_ids": ids, "attention_mask": torch.empty_like(ids)}
            logits = model(**inputs, use_cache=False).logits
        shifted = logits[:, :-1].flatten(0, 1).float()
        cross_entropy(shifted, ids[:, 1:].flatten()).backward()

    try:
        return measure_peak_of_created_tensors(step)
    except (RuntimeError, NotImplementedError):
        return None


def _add_adapters_and_report_fusion(
    base: PreTrainedModel,
    settings: TrainSettings,
    advice: Recommendation,
    device: torch.device,
    is_quantized: bool,
) -> str:
    """Add the adapters to the base model, and return a text report on its fused layers.

    The report shows which LoRA layers are fused on the given device. For a quantized model, the
    text is a note instead. The note states the number of LoRA layers and explains how to get the
    report from the loaded model.
    """
    report = fusion_report(prepare.add_trainable_adapters(base, settings, advice))
    if is_quantized:
        where = f"that bitsandbytes will quantize in {settings.load_in}"
        return (
            f"{len(report.rows)} LoRA layers over weights "
            f"{where if settings.load_in else 'that bitsandbytes has quantized'}; call "
            "fastlora.fusion_report on the loaded model to see which of them are fused"
        )
    implementation, reason = auto_implementation(device)
    return str(replace(report, implementation=implementation, reason=reason))
