"""Sampling settings of a request, and the choice of the next token for a batch of requests."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastlora.validation import ConfigError

MAX_STOPS = 4
# Below this temperature, scaled differences of logits exceed the range of fp32, and only the
# likeliest token is left.
_GREEDY = 1e-4


@dataclass(frozen=True)
class SamplingParams:
    """The sampling parameters of a request, such as its temperature.

    Attributes:
        max_tokens: Maximum number of tokens in the answer; None for as many as fit.
        temperature: Sampling temperature; 0 always chooses the most likely token.
        top_p: Sample from the smallest set of most likely tokens with at least this total
            probability.
        seed: Seed of the random numbers for this request; None for a random seed.
        stop: Stop strings, which end the answer and are not part of it.

    Raises:
        ConfigError: There are too many stop strings, or one is empty. `protocol` checks the
            numbers.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.stop) > MAX_STOPS:
            raise ConfigError(f"stop has {len(self.stop)} strings, expected at most {MAX_STOPS}")
        if not all(self.stop):
            raise ConfigError("stop has an empty string, which would end every answer")

    @property
    def greedy(self) -> bool:
        """Whether sampling is greedy.

        If so, the most likely token is always chosen.
        """
        return self.temperature < _GREEDY

    def make_generator(self) -> torch.Generator:
        """Create the request's random number generator.

        The generator is always on the CPU.
        """
        seed = secrets.randbits(63) if self.seed is None else self.seed
        return torch.Generator().manual_seed(seed)


def sample_tokens(
    logits: torch.Tensor, settings: Sequence[SamplingParams], generators: Sequence[torch.Generator]
) -> list[int | None]:
    """Sample the next token of each row.

    The result is None for a row with non-finite logits. The choice for a row depends only on its
    own logits and generator, not on the rest of the batch.

    Args:
        logits: Logits of shape ``[n, V]``, fp32.
        settings: Sampling settings of each row.
        generators: Random generator of each row.
    """
    chosen: list[int | None] = list(logits.argmax(-1).tolist())
    finite = logits.amax(-1).isfinite().tolist()
    for row, (own, generator) in enumerate(zip(settings, generators, strict=True)):
        if not finite[row]:
            chosen[row] = None
        elif not own.greedy:
            chosen[row] = _sample_top_p(logits[row], own, generator)
    return chosen


def _sample_top_p(logits: torch.Tensor, own: SamplingParams, generator: torch.Generator) -> int:
    probabilities = ((logits - logits.max()) / own.temperature).softmax(-1)
    ordered, tokens = probabilities.sort(descending=True)
    sums = ordered.double().cumsum(0)
    nucleus = int((sums - ordered < own.top_p).sum())
    drawn = (
        torch.rand((), generator=generator, dtype=torch.float64).item() * sums[nucleus - 1].item()
    )
    place = int(torch.searchsorted(sums[:nucleus].contiguous(), drawn, right=True))
    return int(tokens[min(place, nucleus - 1)])
