"""Create the parts of a training run from its settings: adapters, data, and optimizers."""

from __future__ import annotations

import contextlib
import hashlib
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from fastlora.model import LoraModel, get_peft_model
from fastlora.model.adapter_folder import inspect_adapter_folder
from fastlora.model.config import LoraConfig
from fastlora.model.recommend import Recommendation
from fastlora.model.targets import check_all_target_modules_match
from fastlora.train.adapter_training_state import adapter_parameters
from fastlora.train.checkpoint import CheckpointState, list_checkpoints
from fastlora.train.data import SampleOrder, TokenizedCorpus, derive_seed, tokenize_files
from fastlora.train.optimizers import AdapterOptimizers, train_adapters
from fastlora.train.processes import TrainError, import_or_raise
from fastlora.train.settings import AdapterSettings, TrainSettings
from fastlora.validation import CheckpointError, ConfigError, error_prefix

if TYPE_CHECKING:
    from tqdm import tqdm
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# A run counts the samples of each adapter before it starts, which takes up to a minute for these.
_MOST_SAMPLES = 1_000_000_000
_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class SampleSchedule:
    """A schedule that determines the samples of each step in a training run.

    A step may have samples of several adapters. The order of the samples, which changes from epoch
    to epoch, depends only on the settings and the data. A resumed run therefore uses the samples in
    the same order.

    Attributes:
        order: The samples of each step.
        steps: Number of steps.
        micro_batch_size: Number of samples in a forward pass.
        adapter_steps: Dict that maps each adapter to the number of steps in which it has samples.
    """

    order: SampleOrder
    steps: int
    micro_batch_size: int
    adapter_steps: dict[str, int]


def check_model_and_out_paths(settings: TrainSettings) -> None:
    """Check that the model path and the output path of a run are usable.

    Raises:
        CheckpointError: The model is not a local folder with a ``config.json``.
        TrainError: The output path ``out`` exists and is not a folder.
    """
    if not (settings.model / "config.json").is_file():
        raise CheckpointError(
            f"{settings.model}: not a model folder (it has no config.json); only local folders are "
            "supported, so download the model first, for example with "
            "huggingface_hub.snapshot_download(repo_id)"
        )
    if settings.out.exists() and not settings.out.is_dir():
        raise TrainError(f"{settings.out}: expected a folder, found a file")


def checkpoint_to_resume(settings: TrainSettings, *, allow_resume: bool) -> Path | None:
    """Return the path of the checkpoint from which a run resumes.

    This is the newest checkpoint of the run. The result is None if the run has no checkpoint.

    Raises:
        TrainError: There is a checkpoint, and ``allow_resume`` is False.
    """
    found = list_checkpoints(settings.out / "checkpoints")
    if found and not allow_resume:
        raise TrainError(
            f"{found[-1]} is a checkpoint of an earlier run; resume that run with --resume, or "
            "choose another output folder"
        )
    return found[-1] if found else None


def with_adapters_in_checkpoint_order(
    settings: TrainSettings, state: CheckpointState
) -> TrainSettings:
    """Return the settings with the adapters in the same order as in a checkpoint.

    The order of the adapters determines the samples of each step, so a resumed run keeps it even if
    the config file lists the adapters in another order.
    """
    order = {name: place for place, name in enumerate(state.identity.get("adapters", ()))}
    adapters = sorted(settings.adapters, key=lambda own: order.get(own.name, len(order)))
    return replace(settings, adapters=tuple(adapters))


def adapter_configs(settings: TrainSettings, advice: Recommendation) -> dict[str, LoraConfig]:
    """Return a dict that maps each adapter to its `LoraConfig`.

    Raises `ConfigError` if a field is invalid, and the errors of `inspect_adapter_folder` if a
    folder in ``init_from`` is invalid.
    """
    configs = {
        adapter.name: adapter.new_adapter_config(advice)
        if adapter.init_from is None
        else inspect_adapter_folder(adapter.init_from).config
        for adapter in settings.adapters
    }
    for adapter in settings.adapters:
        with error_prefix(f"adapter {adapter.name!r}"):
            _check_init(configs[adapter.name], adapter.init_from is None, len(configs))
    return configs


def _check_init(config: LoraConfig, is_new: bool, adapters: int) -> None:
    init = config.init
    if is_new and init.calibration:
        raise ConfigError(
            f"init_lora_weights={config.init_lora_weights!r} needs fastlora.{init.calibration}, "
            "which a training run does not call; create the adapter in Python, save it, and start "
            "from it with init_from"
        )
    if init.changes_base and adapters > 1:
        raise ConfigError(
            f"init_lora_weights={config.init_lora_weights!r} changes the base weights, which the "
            f"other {adapters - 1} adapters of this run share; train this adapter alone"
        )


def add_trainable_adapters(
    base: PreTrainedModel, settings: TrainSettings, advice: Recommendation
) -> LoraModel:
    """Add the adapters of a run to the base model, and return the `LoraModel`.

    All adapters are made trainable. The initial factors of a new adapter depend on the seed and the
    adapter's name, but not on other adapters.

    Raises the errors of `get_peft_model` and `LoraModel.load_adapter`. Also raises an error if an
    entry of targets matches no module, if an adapter trains fp16 parameters, or if one of several
    adapters trains biases of the base model.
    """
    configs = adapter_configs(settings, advice)
    check_dropout_dtype(configs, next(base.parameters()).dtype)
    has_weights = not all(parameter.is_meta for parameter in base.parameters())
    model: LoraModel | None = None
    for adapter in settings.adapters:
        name, config, folder = adapter.name, configs[adapter.name], adapter.init_from
        torch.manual_seed(derive_seed(settings.seed, name))
        if folder is not None and has_weights:
            if model is None:
                model = LoraModel.from_pretrained(base, folder, name, is_trainable=True)
            else:
                model.load_adapter(folder, name, is_trainable=True)
            continue
        if folder is None:
            with error_prefix(f"adapter {name!r}"):
                check_all_target_modules_match(base, config)
        if folder is not None or (settings.load_in and not has_weights):
            config = config.shapes_only()
        config = replace(config, inference_mode=False)
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    if model is None:
        raise ConfigError("no adapters were given")
    train_adapters(model, list(configs))
    _check_no_fp16_trained(model)
    return model


def _check_no_fp16_trained(model: LoraModel) -> None:
    """Raise `ConfigError` if an adapter has trainable fp16 parameters.

    Training in fp16 needs loss scaling, and torch cannot unscale the gradients of fp16 parameters.
    The factors of an adapter are fp32. Biases of the base model and copies of its modules have the
    dtype of the base model.
    """
    for name, config in model.peft_config.items():
        for key, parameter in adapter_parameters(model, name).items():
            if parameter.requires_grad and parameter.dtype == torch.float16:
                copied = ".modules_to_save." in key
                field, instead = (
                    ("modules_to_save", "no modules_to_save") if copied else ("bias", "bias='none'")
                )
                raise ConfigError(
                    f"adapter {name!r} has {field}={getattr(config, field)!r}, so it trains "
                    "parameters in the base model's dtype (float16), and torch cannot unscale "
                    f"their gradients; use dtype 'bfloat16' or 'float32', or {instead}"
                )


def check_dropout_dtype(configs: Mapping[str, LoraConfig], base_dtype: torch.dtype) -> None:
    """Raise `ConfigError` if an adapter uses dropout and the base dtype does not support it."""
    for name, config in configs.items():
        if config.lora_dropout and base_dtype not in _COMPUTE_DTYPES:
            raise ConfigError(
                f"adapter {name!r} has lora_dropout={config.lora_dropout}, but the base model is "
                f"in {base_dtype}, and dropout needs a 16-, 32-, or 64-bit float dtype; set dtype, "
                "or set lora_dropout to 0"
            )


def read_and_tokenize_data(
    settings: TrainSettings,
    tokenizer: PreTrainedTokenizerBase,
    which: str = "data",
    *,
    progress: bool = False,
) -> dict[str, TokenizedCorpus]:
    """Read and tokenize the training or evaluation data that the settings name.

    The data files of each adapter are those in its ``"data"`` or ``"eval_data"``, as ``which``
    says. Returns a dict that maps the name of each adapter with files to its `TokenizedCorpus`.

    Raises `DataError` if a file or a row is invalid.
    """
    files = [(a, getattr(a, which)) for a in settings.adapters if getattr(a, which)]
    # Delay the bar: one that ends immediately would only flicker.
    with progress_bar(
        desc=f"reading {which}", unit=" samples", disable=not progress, leave=False, delay=1.0
    ) as bar:
        return {
            adapter.name: tokenize_files(
                paths,
                tokenizer,
                settings.max_length,
                settings.data_options(adapter),
                advance=bar.update,
            )
            for adapter, paths in files
        }


def describe_data(
    corpora: Mapping[str, TokenizedCorpus], held_out: Mapping[str, TokenizedCorpus]
) -> list[str]:
    """Return messages that describe the training data and the evaluation data.

    For each adapter, the messages state the format and the size of its data, and include any notes
    about its files. ``held_out`` contains the evaluation data.
    """
    lines = []
    for what, found in (("", corpora), (", evaluation", held_out)):
        for name, corpus in found.items():
            lines += [f"{name}{what}: {note}" for note in corpus.notes]
            lines.append(f"{name}{what}: {corpus}")
    return lines


class _StreamIgnoringWriteErrors:
    """A stream that ignores write errors.

    With this stream, a progress bar cannot abort a run. A write fails on a full disk, for instance.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __eq__(self, other: object) -> bool:  # tqdm compares it with sys.stderr
        return self._stream == other

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


def progress_bar(**options: Any) -> tqdm[Any]:
    """Create a tqdm progress bar with the given options.

    The options are keyword arguments of `tqdm.tqdm`, for example ``disable=True`` to hide the bar.
    The bar is written to stderr. If writing fails, the error is ignored, so that it does not end a
    training run.

    Raises:
        TrainError: tqdm is not installed.
    """
    return import_or_raise("tqdm").tqdm(file=_StreamIgnoringWriteErrors(sys.stderr), **options)


def make_sample_schedule(
    settings: TrainSettings, corpora: Mapping[str, TokenizedCorpus], processes: int
) -> SampleSchedule:
    """Create the schedule that determines which samples each step of a run uses.

    The schedule also determines the maximum number of samples in a forward pass. Each process runs
    at least one forward pass in every step.

    Raises:
        ConfigError: A step has fewer forward passes than there are processes, or an adapter has no
            sample in any step.
    """
    size = settings.batch_size
    micro = settings.micro_batch_size or math.ceil(size / processes)
    if math.ceil(size / micro) < processes:
        smaller = f", or micro_batch_size to at most {size // processes}"
        raise ConfigError(
            f"a step of {size} samples is split into {math.ceil(size / micro)} forward passes of "
            f"up to {micro} samples, but each of the {processes} processes needs at least one "
            f"forward pass; set batch_size to at least {processes * micro}"
            f"{smaller if size >= processes else ''}"
        )
    order = SampleOrder(
        {name: len(corpus) for name, corpus in corpora.items()}, size, settings.seed
    )
    steps = settings.steps or max(math.ceil(settings.epochs * order.total / size), 1)
    if steps * size > _MOST_SAMPLES:
        raise ConfigError(
            f"the run has {steps * size} samples, but at most {_MOST_SAMPLES} are supported; "
            "reduce steps, epochs, or batch_size"
        )
    adapter_steps = order.count_steps_with_samples(steps)
    for name, count in adapter_steps.items():
        if not count:
            raise ConfigError(
                f"none of the {steps} steps uses a training sample for adapter {name!r}; increase "
                f"steps (an epoch has {math.ceil(order.total / size)} steps) or batch_size"
            )
    return SampleSchedule(order, steps, micro, adapter_steps)


def make_optimizers(
    model: LoraModel,
    settings: TrainSettings,
    advice: Recommendation,
    schedule: SampleSchedule,
    device: torch.device,
) -> AdapterOptimizers:
    """Create the optimizers of the adapters.

    The optimizers are AdamW with learning-rate schedules. Gradients are clipped and, for fp16,
    losses are scaled.
    """
    return AdapterOptimizers(
        model,
        {
            a.name: partial(
                torch.optim.AdamW,
                lr=advice.learning_rate if a.learning_rate is None else a.learning_rate,
                weight_decay=a.weight_decay,
            )
            for a in settings.adapters
        },
        schedulers={
            a.name: partial(
                LambdaLR, lr_lambda=learning_rate_lambda(a, schedule.adapter_steps[a.name])
            )
            for a in settings.adapters
        },
        max_grad_norm={a.name: a.max_grad_norm for a in settings.adapters if a.max_grad_norm},
        scaler=partial(torch.amp.GradScaler, device.type) if needs_loss_scaling(model) else None,
        seed=settings.seed,
        group=None,  # `RunProcesses` sums the gradients
    )


def needs_loss_scaling(model: nn.Module) -> bool:
    """Return whether training the model needs loss scaling.

    Loss scaling is needed if the model has fp16 parameters, even if all of them are frozen. With
    loss scaling, a step with a non-finite gradient is skipped and is not an error.
    """
    return any(p.dtype == torch.float16 for p in model.parameters())


def learning_rate_lambda(adapter: AdapterSettings, total_steps: int) -> Callable[[int], float]:
    """Return a function that maps a step number to an adapter's learning-rate multiplier."""
    warmup = math.ceil(adapter.warmup_ratio * total_steps)

    def at(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
        if adapter.schedule == "linear":
            return 1 - done
        return 0.5 * (1 + math.cos(math.pi * done)) if adapter.schedule == "cosine" else 1.0

    return at


def run_identity(
    settings: TrainSettings,
    schedule: SampleSchedule,
    corpora: Mapping[str, TokenizedCorpus],
    model: LoraModel,
    weights: Mapping[str, str],
) -> dict[str, Any]:
    """Return a dict that identifies a run.

    It contains everything that determines the run's results, and is JSON-compatible. ``weights`` is
    the result of `base_weight_fingerprints`.
    """
    adapters = {}
    for adapter in settings.adapters:
        corpus = corpora[adapter.name]
        config = model.peft_config[adapter.name].to_dict()
        for field in ("base_model_name_or_path", "inference_mode", "peft_version", "revision"):
            config.pop(field, None)
        rows = corpus.ends if corpus.documents is None else [n for d in corpus.documents for n in d]
        parts = (corpus.ids, corpus.counts, torch.tensor(corpus.ends), torch.tensor(rows))
        tokens = hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts))
        adapters[adapter.name] = {
            "data": corpus.digest,
            "tokens": tokens.hexdigest(),
            "learning_rate": adapter.learning_rate,
            "weight_decay": adapter.weight_decay,
            "schedule": adapter.schedule,
            "warmup_ratio": adapter.warmup_ratio,
            "max_grad_norm": adapter.max_grad_norm,
            "config": config,
        }
    # Included only if set, so that checkpoints from before this setting existed can resume.
    bits = {"load_in": settings.load_in} if settings.load_in else {}
    return bits | {
        "steps": schedule.steps,
        "batch_size": settings.batch_size,
        "micro_batch_size": schedule.micro_batch_size,
        "seed": settings.seed,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "adapters": adapters,
        "model": dict(weights),
    }
