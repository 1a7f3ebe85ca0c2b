"""Write and read the checkpoints of a training run.

A checkpoint is either complete or does not exist, and only the run that wrote it can resume from
it. It is written to a temporary folder beside the other checkpoints, flushed to disk file by file,
and then renamed. If the run is killed or the disk is full, the older checkpoints remain intact.
Nothing in a checkpoint is pickled: adapters are in PEFT's format, the tensors of the optimizers are
in safetensors, and the rest is in JSON.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastlora.model.atomic_files import (
    atomic_new_folder,
    atomic_remove_folder,
    remove_abandoned_temp_folders,
)
from fastlora.model.inject import base_parameters
from fastlora.model.tensor_file import read_safetensors, write_safetensors
from fastlora.validation import CheckpointError

FORMAT = 1
_STATE, _TENSORS, _ADAPTERS = "state.json", "optimizers.safetensors", "adapters"
# Number of values of a weight that its fingerprint covers.
_SAMPLED = 64


@dataclass(frozen=True)
class CheckpointState:
    """The training state that a checkpoint stores.

    A resumed run starts from this state and from the adapter weights. A checkpoint stores the
    adapter weights in separate files.

    Attributes:
        step: Number of completed steps.
        identity: Dict of everything that determines the results of the run; see `run_identity`.
        optimizers: State from `AdapterOptimizers.state_dict`.
    """

    step: int
    identity: dict[str, Any]
    optimizers: dict[str, Any]


def checkpoint_adapters_folder(checkpoint: Path) -> Path:
    """Return the path of the folder in which a checkpoint stores the adapters.

    The folder has one subfolder per adapter.
    """
    return checkpoint / _ADAPTERS


def list_checkpoints(root: Path) -> list[Path]:
    """List the paths of all checkpoints in ``root``, ordered by step.

    The newest checkpoint is last. If ``root`` is not a folder, the list is empty.
    """
    if not root.is_dir():
        return []
    found = [p for p in root.iterdir() if re.fullmatch(r"step-\d{8,}", p.name) and p.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def checkpoint_path(root: Path, step: int) -> Path:
    """Return the path of the checkpoint for a step.

    The checkpoint need not exist.
    """
    return root / f"step-{step:08d}"


@contextlib.contextmanager
def write_checkpoint(root: Path, state: CheckpointState, max_to_keep: int) -> Iterator[Path]:
    """Write a checkpoint atomically, and remove old checkpoints.

    This context manager yields the folder in which the caller saves the adapters. In the ``with``
    block, the checkpoint is a temporary folder. On exit, the state is written, and the checkpoint
    is completed by renaming the folder. Then all but the newest ``max_to_keep`` checkpoints are
    removed.

    Args:
        root: The folder of all checkpoints of the run.
        state: The state to save beside the adapters.
        max_to_keep: Number of checkpoints to keep, including the new checkpoint.

    Raises:
        CheckpointError: A file cannot be written, for instance because the disk is full. All older
            checkpoints remain intact, and nothing of the new checkpoint is left.
    """
    target = checkpoint_path(root, state.step)
    with (
        write_error_as_checkpoint_error(target, "; older checkpoints are unchanged"),
        atomic_new_folder(target) as partial,
    ):
        yield checkpoint_adapters_folder(partial)
        _write_state(partial, state)
    remove_old_checkpoints(root, max_to_keep)


@contextlib.contextmanager
def write_error_as_checkpoint_error(folder: Path, consequence: str = "") -> Iterator[None]:
    """Convert a write error in the ``with`` block to a `CheckpointError`.

    The message names ``folder`` and ends with ``consequence``.
    """
    try:
        yield
        return
    except OSError as error:
        reason: BaseException = error
    except CheckpointError as error:
        if error.__cause__ is None:  # the data is invalid; no write has failed
            raise
        reason = error.__cause__
    raise CheckpointError(f"{folder} could not be written ({reason}){consequence}") from reason


def remove_old_checkpoints(root: Path, max_to_keep: int) -> None:
    """Remove all but the newest ``max_to_keep`` checkpoints.

    The temporary files of killed runs are removed too.
    """
    for old in list_checkpoints(root)[:-max_to_keep]:
        with contextlib.suppress(OSError):  # do not fail the run; the next checkpoint tries again
            atomic_remove_folder(old)
    remove_abandoned_temp_folders(root)


def read_checkpoint_state(path: Path) -> CheckpointState:
    """Read the training state of a checkpoint.

    The adapter weights are not read.

    Raises:
        CheckpointError: The checkpoint is damaged or has another format version.
    """
    state_path = path / _STATE
    try:
        data = json.loads(state_path.read_text(encoding="utf-8"))
        version = data["format"]
        if version == FORMAT:
            step, identity, skeleton = data["step"], data["identity"], data["optimizers"]
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{state_path} is not a valid training state ({error!r})") from error
    if version != FORMAT:
        raise CheckpointError(f"{state_path}: format is {version!r}, expected {FORMAT}")
    tensors = path / _TENSORS
    try:
        loaded = read_safetensors(tensors)
        return CheckpointState(step, identity, _restore_tensors(skeleton, loaded))
    except (OSError, KeyError, TypeError) as error:
        raise CheckpointError(f"{tensors} does not match {state_path.name} ({error!r})") from error


def base_weight_fingerprints(model: nn.Module) -> dict[str, str]:
    """Return a dict that maps the name of each base weight to its fingerprint.

    A fingerprint contains the dtype, the shape, and a digest of 64 values spread over the
    parameter. This is enough to detect a fine-tuned or differently initialized model without
    reading a large model in full.
    """
    found = {}
    for name, parameter in base_parameters(model):
        flat = parameter.detach().reshape(-1)
        positions = torch.linspace(
            0, max(flat.numel() - 1, 0), _SAMPLED, dtype=torch.float64
        ).long()
        values = flat[positions.to(flat.device)].cpu() if flat.numel() else flat.cpu()
        sampled = values.contiguous().view(torch.uint8).numpy().tobytes()
        digest = hashlib.blake2b(sampled, digest_size=8).hexdigest()
        shape = "x".join(map(str, parameter.shape))
        found[name] = f"{str(parameter.dtype).removeprefix('torch.')} {shape} {digest}"
    return found


def describe_identity_differences(
    before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> list[str]:
    """Return a message for each difference between two runs.

    ``before`` and ``now`` are the identities of the runs; see `run_identity`. A message has the
    form ``"batch_size was 8, is 4"``. ``prefix`` is the prefix of the names in nested dicts.
    """
    found = []
    for key in dict.fromkeys([*before, *now]):
        path = f"{prefix}.{key}" if prefix else str(key)
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += describe_identity_differences(old, new, path)
        elif old != new:
            found.append(f"{path} was {_shortened(old)}, is {_shortened(new)}")
    return found


def _shortened(value: Any) -> str:
    if value is None:
        return "missing"
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _write_state(folder: Path, state: CheckpointState) -> None:
    tensors: dict[str, torch.Tensor] = {}
    data = {
        "format": FORMAT,
        "step": state.step,
        "identity": state.identity,
        "optimizers": _extract_tensors(state.optimizers, "", tensors),
    }
    write_safetensors(folder / _TENSORS, tensors)
    (folder / _STATE).write_text(json.dumps(data), encoding="utf-8")


def _extract_tensors(value: Any, key: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Replace the tensors in a nested value with placeholders, and collect the tensors in a dict.

    The tensors are added to ``tensors`` under names that begin with ``key``. The result is a
    JSON-compatible copy of the value. The value is a training state or a part of a training state,
    and remains unchanged.
    """
    if isinstance(value, torch.Tensor):
        tensors[key] = value
        return {"tensor": key}
    if isinstance(value, Mapping):
        # Stored as pairs, because the keys in the state of an optimizer are numbers.
        return {"dict": [[k, _extract_tensors(v, f"{key}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_extract_tensors(v, f"{key}/{i}", tensors) for i, v in enumerate(value)]}
    return value


def _restore_tensors(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Put the tensors back into a value that `_extract_tensors` returned.

    The value is a state.
    """
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "dict":
        return {k: _restore_tensors(v, tensors) for k, v in inner}
    made = [_restore_tensors(v, tensors) for v in inner]
    return tuple(made) if kind == "tuple" else made
