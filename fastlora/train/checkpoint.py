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

from fastlora.model.inject import base_parameters
from fastlora.model.replace_files import new_folder, remove_abandoned, remove_folder
from fastlora.model.tensor_file import read_tensors, write_tensors
from fastlora.validation import CheckpointError

FORMAT = 1
_STATE, _TENSORS, _ADAPTERS = "state.json", "optimizers.safetensors", "adapters"
# Number of values of a weight that its fingerprint covers.
_SAMPLED = 64


@dataclass(frozen=True)
class TrainState:
    """The training state in a checkpoint, which is everything except the adapters' weights.

    Attributes:
        step: Number of completed steps.
        identity: Dict of everything that determines the results of the run; see `differences`.
        optimizers: State from `AdapterOptimizers.state_dict`.
    """

    step: int
    identity: dict[str, Any]
    optimizers: dict[str, Any]


def adapters_folder(checkpoint: Path) -> Path:
    """Return the path of a checkpoint's adapter folder, which has one subfolder per adapter."""
    return checkpoint / _ADAPTERS


def checkpoints(root: Path) -> list[Path]:
    """Return the paths of all checkpoints in ``root``, ordered from oldest to newest."""
    if not root.is_dir():
        return []
    found = [p for p in root.iterdir() if re.fullmatch(r"step-\d{8,}", p.name) and p.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def checkpoint_folder(root: Path, step: int) -> Path:
    """Return the path of the checkpoint for step ``step``, which may not exist."""
    return root / f"step-{step:08d}"


@contextlib.contextmanager
def new_checkpoint(root: Path, state: TrainState, keep: int) -> Iterator[Path]:
    """Yield the path of a new checkpoint's adapter folder, and complete the checkpoint on exit.

    On exit, all but the newest ``keep`` checkpoints are removed.

    Args:
        root: The folder of all checkpoints of the run.
        state: The state to save beside the adapters.
        keep: Number of checkpoints to keep, including the new checkpoint.

    Raises:
        CheckpointError: A file cannot be written, for instance because the disk is full. All older
            checkpoints remain intact, and nothing of the new checkpoint is left.
    """
    target = checkpoint_folder(root, state.step)
    with writing(target, "; older checkpoints are unchanged"), new_folder(target) as partial:
        yield adapters_folder(partial)
        _write_state(partial, state)
    sweep(root, keep)


@contextlib.contextmanager
def writing(folder: Path, consequence: str = "") -> Iterator[None]:
    """Convert a write error in the block to a `CheckpointError` that names ``folder``."""
    try:
        yield
        return
    except OSError as error:
        reason: BaseException = error
    except CheckpointError as error:
        if error.__cause__ is None:  # the data is invalid; no write has failed
            raise
        reason = error.__cause__
    raise CheckpointError(f"{folder}: could not be written ({reason}){consequence}") from reason


def sweep(root: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints, and the temporary files of killed runs."""
    for old in checkpoints(root)[:-keep]:
        with contextlib.suppress(OSError):  # do not fail the run; the next checkpoint tries again
            remove_folder(old)
    remove_abandoned(root)


def read_checkpoint(path: Path) -> TrainState:
    """Read the training state of a checkpoint, without the adapters' weights.

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
        raise CheckpointError(f"{state_path}: not a valid training state ({error!r})") from error
    if version != FORMAT:
        raise CheckpointError(f"{state_path}: format is {version!r}, expected {FORMAT}")
    tensors = path / _TENSORS
    try:
        loaded = read_tensors(tensors)
        return TrainState(step, identity, _joined(skeleton, loaded))
    except (OSError, KeyError, TypeError) as error:
        raise CheckpointError(f"{tensors}: does not match {state_path.name} ({error!r})") from error


def fingerprint(model: nn.Module) -> dict[str, str]:
    """Return a dict that maps each base parameter's name to a string that identifies its values.

    The string contains the dtype, the shape, and a digest of 64 values spread over the parameter.
    This is enough to detect a fine-tuned or differently initialized model without reading a large
    model in full.
    """
    found = {}
    for name, parameter in base_parameters(model):
        flat = parameter.detach().reshape(-1)
        places = torch.linspace(0, max(flat.numel() - 1, 0), _SAMPLED, dtype=torch.float64).long()
        values = flat[places.to(flat.device)].cpu() if flat.numel() else flat.cpu()
        sampled = values.contiguous().view(torch.uint8).numpy().tobytes()
        digest = hashlib.blake2b(sampled, digest_size=8).hexdigest()
        shape = "x".join(map(str, parameter.shape))
        found[name] = f"{str(parameter.dtype).removeprefix('torch.')} {shape} {digest}"
    return found


def differences(before: Mapping[str, Any], now: Mapping[str, Any], at: str = "") -> list[str]:
    """Return a message for each difference between two run identities.

    A message has the form ``"batch_size was 8, is 4"``. ``at`` is the prefix of the names in nested
    dicts.
    """
    found = []
    for key in dict.fromkeys([*before, *now]):
        path = f"{at}.{key}" if at else str(key)
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, path)
        elif old != new:
            found.append(f"{path} was {_shown(old)}, is {_shown(new)}")
    return found


def _shown(value: Any) -> str:
    if value is None:
        return "missing"
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _write_state(folder: Path, state: TrainState) -> None:
    tensors: dict[str, torch.Tensor] = {}
    data = {
        "format": FORMAT,
        "step": state.step,
        "identity": state.identity,
        "optimizers": _split(state.optimizers, "", tensors),
    }
    write_tensors(folder / _TENSORS, tensors)
    (folder / _STATE).write_text(json.dumps(data), encoding="utf-8")


def _split(value: Any, key: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Convert a state to data that JSON can represent, and move its tensors to ``tensors``."""
    if isinstance(value, torch.Tensor):
        tensors[key] = value
        return {"tensor": key}
    if isinstance(value, Mapping):
        # Stored as pairs, because the keys in the state of an optimizer are numbers.
        return {"dict": [[k, _split(v, f"{key}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_split(v, f"{key}/{i}", tensors) for i, v in enumerate(value)]}
    return value


def _joined(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Rebuild a state from the output of `_split` and its tensors."""
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "dict":
        return {k: _joined(v, tensors) for k, v in inner}
    made = [_joined(v, tensors) for v in inner]
    return tuple(made) if kind == "tuple" else made
