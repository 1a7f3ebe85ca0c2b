"""A tiny model folder, data and runs of `fastlora train`, for its tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastlora.commands import cli
from tests.support.programs import error_of
from tests.support.tiny import tiny_llama

WORDS = ["sea", "ship", "north wind", "tin", "robot", "lamp", "harbour", "salt", "bolt", "star"]


def make_base(folder: Path, model: Any = None, **changes: Any) -> Path:
    """Saves a model, and a tokenizer of a token for each ASCII character.

    The model is a random Llama of two layers with ``changes``, unless another one is given.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {chr(32 + i): i for i in range(95)} | {"<eos>": 95, "<pad>": 96}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    (tiny_llama(**changes) if model is None else model).save_pretrained(folder)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.save_pretrained(folder)
    return folder


def make_data(folder: Path) -> dict[str, Path]:
    """Writes prompts and completions for adapter a, texts for b, and a plain text for c."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {n: folder / f"{n}.{'txt' if n == 'c' else 'jsonl'}" for n in "abc"}
    pairs = [{"prompt": f"{w}?", "completion": f" the {w} {i}"} for i, w in enumerate(WORDS)]
    paths["a"].write_text("".join(f"{json.dumps(row)}\n" for row in pairs))
    texts = [{"text": f"{w} " * (1 + i % 3)} for i, w in enumerate(WORDS[:6])]
    paths["b"].write_text("".join(f"{json.dumps(row)}\n" for row in texts))
    paths["c"].write_text("".join(f"{w} and " for w in WORDS))
    return paths


def config(base: Path, data: dict[str, Path], out: Path, **changes: Any) -> dict[str, Any]:
    """A config of two adapters of different ranks, with dropout, weight decay and schedules."""
    return {
        "model": str(base),
        "out": str(out),
        "steps": 8,
        "batch_size": 4,
        "micro_batch_size": 2,
        "save_every": 3,
        "seed": 5,
        "defaults": {"dropout": 0.1, "warmup_ratio": 0.3},
        "adapters": {
            "a": {"data": str(data["a"]), "r": 2, "lr": 1e-2, "max_grad_norm": 0.5},
            "b": {
                **{"data": str(data["b"]), "r": 4, "lr": 2e-2, "rslora": True},
                **{"targets": ["q_proj", "down_proj"], "weight_decay": 0.1, "schedule": "cosine"},
            },
        },
        **changes,
    }


def write_config(path: Path, given: dict[str, Any]) -> Path:
    """Writes a config as JSON."""
    path.write_text(json.dumps(given))
    return path


def train(path: Path, given: dict[str, Any], *flags: object) -> dict[str, torch.Tensor]:
    """Writes a config, runs the command over it here, and returns what it saved."""
    write_config(path, given)
    assert cli.main(["train", str(path), "--quiet", *map(str, flags)]) == 0
    return saved(Path(given["out"]))


def same(left: Path | dict[str, torch.Tensor], right: Path | dict[str, torch.Tensor]) -> bool:
    """Whether two runs, or what they saved, are the same adapters bit for bit."""
    ours, theirs = (saved(run) if isinstance(run, Path) else run for run in (left, right))
    assert ours.keys() == theirs.keys() and ours
    return all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def saved(out: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the adapters in a run's folder."""
    found = {}
    for path in sorted(out.glob("*/adapter_model.safetensors")):
        found |= {f"{path.parent.name}:{key}": t for key, t in load_file(path).items()}
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Returns what sets ``a.b.c`` in a config; None takes it out."""

    def apply(given: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for parent in parents:
            given = given[parent]
        if value is None:
            del given[last]
        else:
            given[last] = value

    return apply


def failing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """``fails(config, *flags)`` runs the command, which must fail in one line, and returns that."""

    def fails(given: dict[str, Any], *flags: object) -> str:
        path = write_config(tmp_path / "c.json", given)
        return error_of(capsys, "train", path, "--quiet", *flags)

    return fails


def log(out: Path, kind: str = "loss") -> list[dict[str, Any]]:
    """The entries of a kind in a run's log."""
    lines = (out / "log.jsonl").read_text().splitlines()
    return [entry for entry in map(strict, lines) if kind in entry]


def strict(text: str) -> Any:
    """Reads JSON as every reader does, without Python's NaN and Infinity."""

    def raise_error(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=raise_error)
