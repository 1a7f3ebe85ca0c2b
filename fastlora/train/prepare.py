"""From settings to what a training run works with: model, adapters, tokens, optimizers."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from fastlora.model import LoraModel
from fastlora.model.recommend import Recommendation
from fastlora.train.checkpoint import checkpoints
from fastlora.train.config import AdapterSettings, TrainSettings
from fastlora.train.data import Corpus, Order, encode
from fastlora.train.optimizers import AdapterOptimizers
from fastlora.validation import CheckpointError, ConfigError, FastLoraError

INSTALL = "pip install 'fastlora-triton[train]'"


class TrainError(FastLoraError, RuntimeError):
    """A training run cannot start or go on."""


@dataclass(frozen=True, eq=False)
class Schedule:
    """What a run does, step by step.

    Attributes:
        order: Which samples a step has.
        steps: How many.
        micro_batch_size: Samples in a forward.
        own_steps: In how many steps each adapter has samples.
    """

    order: Order
    steps: int
    micro_batch_size: int
    own_steps: dict[str, int]


def check_folders(settings: TrainSettings, *, resume: bool) -> Path | None:
    """Returns the checkpoint to go on from, or None; raises unless a run can use its folders.

    Raises:
        CheckpointError: The base model is no local folder.
        TrainError: ``out`` is a file, or has checkpoints and is not to be resumed.
    """
    if not (settings.model / "config.json").is_file():
        raise CheckpointError(
            f"{settings.model}: no model folder (it has no config.json); only local folders are "
            "read, for instance what huggingface_hub.snapshot_download(repo_id) returns"
        )
    if settings.out.exists() and not settings.out.is_dir():
        raise TrainError(f"{settings.out}: is a file, expected a folder")
    found = checkpoints(settings.out / "checkpoints")
    if found and not resume:
        raise TrainError(
            f"{found[-1]} is a checkpoint of an earlier run; resume it (--resume), or choose "
            "another out folder"
        )
    return found[-1] if found else None


def load_tokenizer(settings: TrainSettings) -> Any:
    """Returns the base model's tokenizer; raises `CheckpointError` where it cannot be read."""
    transformers = _transformers()
    try:
        return transformers.AutoTokenizer.from_pretrained(settings.model, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{settings.model}: no tokenizer can be read ({error})") from error


def load_base(settings: TrainSettings, *, empty: bool = False, progress: bool = False) -> Any:
    """Returns the base model as a causal language model.

    Args:
        settings: The run's.
        progress: Let transformers show its bar.
        empty: On the meta device, without reading or allocating weights.

    Raises:
        CheckpointError: It cannot be read.
    """
    transformers = _transformers()
    auto = transformers.AutoModelForCausalLM
    try:
        if not empty:
            with contextlib.nullcontext() if progress else _without_bars(transformers):
                return auto.from_pretrained(
                    settings.model, dtype=settings.dtype, local_files_only=True
                )
        config = transformers.AutoConfig.from_pretrained(settings.model, local_files_only=True)
        own = getattr(config, "dtype", None) or torch.float32
        dtype = own if settings.dtype == "auto" else getattr(torch, settings.dtype)
        with torch.device("meta"):
            return auto.from_config(config, dtype=dtype)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{settings.model}: cannot be loaded as a causal language model ({error})"
        ) from error


def read_data(
    settings: TrainSettings, tokenizer: Any, which: str = "data", *, progress: bool = False
) -> dict[str, Corpus]:
    """Returns each adapter's tokens; adapters without such files are left out.

    Args:
        settings: The run's.
        tokenizer: The base model's.
        which: ``"data"`` or ``"eval_data"``.
        progress: Show a bar.

    Raises:
        DataError: A file or line is wrong.
    """
    corpora: dict[str, Corpus] = {}
    if not any(getattr(adapter, which) for adapter in settings.adapters):
        return corpora
    with _bar(f"reading {which}", progress) as advance:
        for adapter in settings.adapters:
            files = getattr(adapter, which)
            if files:
                corpora[adapter.name] = encode(
                    files, tokenizer, settings.max_length, chat=settings.chat, advance=advance
                )
    return corpora


def check_fit(base: Any, corpora: Iterable[Corpus]) -> None:
    """Raises unless a base model can take the samples, which it would notice in the middle.

    Raises:
        ConfigError: A sample is longer than the model's positions.
        CheckpointError: The tokenizer has tokens that the model has no embedding for.
    """
    positions = getattr(base.config, "max_position_embeddings", None)
    vocabulary = base.get_input_embeddings().weight.shape[0]
    for corpus in corpora:
        longest = max(range(len(corpus)), key=corpus.length)
        if positions is not None and corpus.length(longest) > positions:
            raise ConfigError(
                f"{corpus.place(longest)}: has {corpus.length(longest)} tokens, and the base model "
                f"takes {positions}; set max_length to at most that"
            )
        largest = int(corpus.ids.max())
        if largest >= vocabulary:
            raise CheckpointError(
                f"the tokenizer gave token {largest}, and the base model has {vocabulary}; they "
                "are not of one model"
            )


def make_schedule(
    settings: TrainSettings, corpora: Mapping[str, Corpus], processes: int
) -> Schedule:
    """Returns the run's steps.

    Raises:
        ConfigError: A step has too little for so many processes, or an adapter is in no step.
    """
    size = settings.batch_size
    micro = settings.micro_batch_size or math.ceil(size / processes)
    if math.ceil(size / micro) < processes:
        raise ConfigError(
            f"{processes} processes, and a step of {size} samples has {math.ceil(size / micro)} "
            f"forwards of {micro}; expected one for each process: set batch_size to at least "
            f"{processes * micro}, or micro_batch_size to at most {max(size // processes, 1)}"
        )
    order = Order({name: len(corpus) for name, corpus in corpora.items()}, size, settings.seed)
    steps = settings.steps or max(math.ceil(settings.epochs * order.total / size), 1)
    own_steps = order.presence(steps)
    for name, count in own_steps.items():
        if not count:
            raise ConfigError(
                f"none of the {steps} steps has a sample of adapter {name!r}; raise steps (an "
                f"epoch is {math.ceil(order.total / size)}) or batch_size"
            )
    return Schedule(order, steps, micro, own_steps)


def make_optimizers(
    model: LoraModel,
    settings: TrainSettings,
    advice: Recommendation,
    own_steps: Mapping[str, int],
    device: torch.device,
) -> AdapterOptimizers:
    """Returns each adapter's AdamW, with its schedule and clipping; in fp16, a loss scale too."""
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
            a.name: partial(LambdaLR, lr_lambda=rate(a, own_steps[a.name]))
            for a in settings.adapters
        },
        max_grad_norm={a.name: a.max_grad_norm for a in settings.adapters if a.max_grad_norm},
        scaler=partial(torch.amp.GradScaler, device.type) if needs_scale(model) else None,
        seed=settings.seed,
        group=None,  # `fastlora.train.processes` sums gradients and counts itself
    )


def needs_scale(model: nn.Module) -> bool:
    """Whether losses are scaled, so that a gradient that is not finite is no failure: in fp16."""
    return any(p.dtype == torch.float16 for p in model.parameters())


def rate(adapter: AdapterSettings, total: int) -> Callable[[int], float]:
    """Returns what the learning rate is multiplied with at each of an adapter's own steps."""
    warmup = math.ceil(adapter.warmup_ratio * total)

    def at(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min((step - warmup) / max(total - warmup, 1), 1.0)
        if adapter.schedule == "linear":
            return 1 - done
        return 0.5 * (1 + math.cos(math.pi * done)) if adapter.schedule == "cosine" else 1.0

    return at


def identity(
    settings: TrainSettings,
    schedule: Schedule,
    corpora: Mapping[str, Corpus],
    model: LoraModel,
    weights: Mapping[str, str],
) -> dict[str, Any]:
    """Returns what determines a run's numbers, ready for JSON.

    Args:
        settings: The run's.
        schedule: Its steps.
        corpora: Its data.
        model: With the adapters.
        weights: Of `fingerprint`.
    """
    adapters = {}
    for adapter in settings.adapters:
        corpus = corpora[adapter.name]
        config = model.peft_config[adapter.name].to_dict()
        for field in ("base_model_name_or_path", "inference_mode", "peft_version", "revision"):
            config.pop(field, None)
        heads = torch.tensor([corpus.heads, corpus.ends])
        tokens = hashlib.sha256(corpus.ids.numpy().tobytes() + heads.numpy().tobytes())
        adapters[adapter.name] = {
            "data": corpus.digest,
            "tokens": tokens.hexdigest(),
            **adapter.optimizing(),
            "config": config,
        }
    return {
        "steps": schedule.steps,
        "batch_size": settings.batch_size,
        "micro_batch_size": schedule.micro_batch_size,
        "seed": settings.seed,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "adapters": adapters,
        "model": dict(weights),
    }


def _transformers() -> Any:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import transformers
    except ImportError as error:
        raise TrainError(f"training needs transformers; install it with: {INSTALL}") from error
    return transformers


@contextlib.contextmanager
def _without_bars(transformers: Any) -> Iterator[None]:
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _bar(what: str, show: bool) -> Iterator[Callable[[int], Any]]:
    from tqdm import tqdm

    with tqdm(desc=what, unit=" samples", disable=not show, leave=False) as bar:
        yield bar.update
