"""How the next token is chosen: settings of a request, and the choice for all rows of a forward."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastlora.validation import ConfigError

MOST_STOPS = 4
# Below it, differences of logits leave fp32's range, and the likeliest token is what is left.
_GREEDY = 1e-4


@dataclass(frozen=True)
class Sampling:
    """What a request asks of its answer.

    Attributes:
        max_tokens: Most tokens of the answer; None for as many as there is room.
        temperature: 0 takes the likeliest token.
        top_p: Draw among the likeliest tokens that together have this probability.
        seed: Of this request's draws; None draws one.
        stop: Texts that end the answer, and are no part of it.

    Raises:
        ConfigError: There are too many stop texts, or an empty one. `protocol` bounds the numbers.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.stop) > MOST_STOPS:
            raise ConfigError(f"stop has {len(self.stop)} texts, expected at most {MOST_STOPS}")
        if not all(self.stop):
            raise ConfigError("stop has an empty text, which would end every answer at once")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature < _GREEDY

    def generator(self) -> torch.Generator:
        """Returns the source of this request's draws, on the CPU for any device."""
        seed = secrets.randbits(63) if self.seed is None else self.seed
        return torch.Generator().manual_seed(seed)


def choose(
    logits: torch.Tensor, settings: Sequence[Sampling], generators: Sequence[torch.Generator]
) -> list[int | None]:
    """Returns the next token of each row, or None where its logits are not finite.

    A row's draw depends on its own logits and generator only, whatever else is in the batch.

    Args:
        logits: ``[n, V]`` fp32.
        settings, generators: Of each row.
    """
    chosen: list[int | None] = list(logits.argmax(-1).tolist())
    finite = logits.amax(-1).isfinite().tolist()
    for row, (own, generator) in enumerate(zip(settings, generators, strict=True)):
        if not finite[row]:
            chosen[row] = None
        elif not own.greedy:
            chosen[row] = _drawn(logits[row], own, generator)
    return chosen


def _drawn(logits: torch.Tensor, own: Sampling, generator: torch.Generator) -> int:
    probabilities = ((logits - logits.max()) / own.temperature).softmax(-1)
    ordered, tokens = probabilities.sort(descending=True)
    sums = ordered.double().cumsum(0)
    kept = int((sums - ordered < own.top_p).sum())
    drawn = torch.rand((), generator=generator, dtype=torch.float64).item() * sums[kept - 1].item()
    place = int(torch.searchsorted(sums[:kept].contiguous(), drawn, right=True))
    return int(tokens[min(place, kept - 1)])
