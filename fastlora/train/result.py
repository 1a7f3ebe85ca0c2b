"""What a training run ended with, and the error of one that could not go on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fastlora.train.prepare import TrainError


class NonFiniteError(TrainError):
    """A loss, a gradient or a weight became NaN or infinite, and the run cannot go on.

    Attributes:
        step: In which step, counted from 1.
        adapter: Whose.
    """

    def __init__(self, message: str, step: int, adapter: str) -> None:
        super().__init__(message)
        self.step = step
        self.adapter = adapter


@dataclass(frozen=True)
class TrainResult:
    """What a run ended with.

    Attributes:
        steps: Steps in all, those before a resume included.
        losses: Each adapter's loss in its last step; empty where nothing was left to do.
        eval_losses: Each adapter's loss on its evaluation data, at the end.
        adapters: Each adapter's folder.
        resumed_from: Step of the checkpoint that it went on from; 0 for none.
        skipped: How many of its steps each adapter skipped because a gradient was not finite in
            fp16; adapters that skipped none are left out.
    """

    steps: int
    losses: dict[str, float]
    eval_losses: dict[str, float]
    adapters: dict[str, Path]
    resumed_from: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
