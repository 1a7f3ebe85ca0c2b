"""One mixed batch computed in several ways on one model, for comparisons.

All sides share the base weights and the adapters' factors, so that they differ only in what they
compute. Their results are compared with float64 before anything is timed.
"""

from __future__ import annotations

import copy
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

import fastlora
from fastlora.bench.float64 import Float64
from fastlora.bench.measure import interleaved_seconds, median_ratio
from fastlora.validation import FastLoraError

BASE, OURS, PEFT, IN_TURN = "base", "fastlora", "peft", "in_turn"
# Calls before the call that is checked. A set of adapters is packed in its second call, and found
# in the cache from the third one on.
_WARM_UP = {BASE: 1, OURS: 2}
# A model amplifies each rounding. Among 64 sequences through 30 layers in bf16, the worst errors of
# two correct results were 6.8 and 2.7, while most errors were 0.6. Therefore the errors of all
# sequences are combined, over at least this many sequences. If a side exceeds the budget, the
# yardstick is repeated up to this many times with other roundings. A correct side is one more draw
# of this kind, so with n draws it is the largest in one of n + 1 checks.
_DRAWS = 32

Side = Callable[[], torch.Tensor]


class WrongResultError(FastLoraError):
    """A side computes a different result from the others, so its time is meaningless."""


class Check(NamedTuple):
    """The root mean square of a side's error against float64, and the error budget."""

    error: float
    budget: float


class Row(NamedTuple):
    """The result of one side for one mixed batch.

    Attributes:
        adapters: Number of different adapters in the batch.
        side: Name of the side.
        median_ms: Median milliseconds of a forward pass.
        ratio_to_base: Median over the rounds of the time divided by the base model's.
        rounds: Number of rounds.
        error: Root mean square of the error against float64; None for the base model.
        budget: Maximum allowed error.
    """

    adapters: int
    side: str
    median_ms: float
    ratio_to_base: float
    rounds: int
    error: float | None
    budget: float | None


class Contest:
    """A model with many adapters of one rank on all its linear layers, in fastlora and in PEFT.

    The base model is set to evaluation mode, its parameters are frozen, and its key-value cache is
    turned off, so that a forward pass is one step.

    Args:
        base: A transformers model that takes only ``input_ids``.
        adapters: Number of adapters.
        rank: Rank of each adapter. alpha is half of the rank, to keep the model well conditioned.
        peft: Whether to create PEFT's model too.
        on_adapter: Called after each adapter has been added.

    Attributes:
        base: The model itself.
        ours: A `fastlora.LoraModel` over the same weights.
        theirs: PEFT's model over the same weights and factors, or None.
        names: Names of the adapters.
        targets: Names of the adapted modules.
        scaling: Scaling of every adapter.
    """

    def __init__(
        self,
        base: Any,
        adapters: int,
        rank: int,
        *,
        peft: bool = True,
        on_adapter: Callable[[], object] = lambda: None,
    ) -> None:
        base.eval().requires_grad_(False)
        base.config.use_cache = False
        self.base = base
        self.names = [f"adapter_{index}" for index in range(adapters)]
        self.scaling = 0.5
        config = fastlora.LoraConfig(
            r=rank, lora_alpha=0.5 * rank, target_modules="all-linear", init_lora_weights=False
        )
        self.ours = fastlora.get_peft_model(
            twin(base), config, self.names[0], autocast_adapter_dtype=False
        )
        on_adapter()
        for name in self.names[1:]:
            self.ours.add_adapter(name, config, autocast_adapter_dtype=False)
            on_adapter()
        self.ours.eval().requires_grad_(False)
        self.targets = [
            name
            for name, module in self.ours.get_base_model().named_modules()
            if isinstance(module, fastlora.layers.LoraLayer)
        ]
        self._single = fastlora.get_peft_model(
            twin(base), config, self.names[0], autocast_adapter_dtype=False
        ).eval()
        self.theirs = _peft_twin(self, rank) if peft else None

    def layer(self, target: str) -> Any:
        """Return fastlora's layer with a given name."""
        return self.ours.get_base_model().get_submodule(target)

    def random_ids(self, sequences: int, tokens: int) -> torch.Tensor:
        """Return random int64 token ids ``[sequences, tokens]`` from torch's generator."""
        vocabulary = self.base.get_input_embeddings().num_embeddings
        device = next(self.base.parameters()).device
        return torch.randint(0, vocabulary, (sequences, tokens), device=device)

    def random_mix(self, sequences: int, adapters: int) -> list[str]:
        """Return the names of the first adapters, distributed evenly in random order."""
        order = torch.randperm(sequences).tolist()
        return [self.names[index % adapters] for index in order]

    # ----------------------------------------------------------------------------- the sides

    def sides(self, mix: Sequence[str], ids: torch.Tensor) -> dict[str, Side]:
        """Return the ways to compute one batch. Each returns the last token's output ``[B, V]``.

        ``in_turn`` runs the adapters one after another, each on its own rows, in a model with one
        adapter. Switching the adapter costs nothing in this model.

        Args:
            mix: An adapter for each of the B sequences.
            ids: Token ids, int64 ``[B, T]``.
        """
        sides: dict[str, Side] = {
            BASE: partial(last_output, self.base, ids),
            OURS: partial(self._mixed, mix, ids),
        }
        if self.theirs is not None:
            sides[PEFT] = partial(last_output, self.theirs, ids, adapter_names=list(mix))
        sides[IN_TURN] = partial(self._in_turn, _rows_by_name(mix, ids.device), ids)
        return sides

    def _mixed(self, mix: Sequence[str], ids: torch.Tensor) -> torch.Tensor:
        with fastlora.adapters(self.ours, mix):
            return last_output(self.ours, ids)

    def _in_turn(self, rows: Mapping[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
        results = []
        model = self._single.get_base_model()
        for name, own in rows.items():
            for target in self.targets:
                source, layer = self.layer(target), model.get_submodule(target)
                for kind in ("lora_A", "lora_B"):
                    getattr(layer, kind)[self.names[0]] = getattr(source, kind)[name]
            results.append(last_output(self._single, ids[own]))
        joint = torch.cat(results)
        return torch.empty_like(joint).index_copy_(0, torch.cat(list(rows.values())), joint)

    # ----------------------------------------------------------------------------- the truth

    def plain(
        self, mix: Sequence[str], ids: torch.Tensor, *, exact: bool = False, seed: int | None = None
    ) -> torch.Tensor:
        """Return the outputs ``[B, V]`` of the textbook expression, which hooks add to the base.

        Args:
            mix: See `sides`.
            ids: See `sides`.
            exact: Whether to compute everything in float64, from the same weights.
            seed: Seed of random changes to each target's output, by up to half a unit in the last
                place; None for no changes.
        """
        rows = _rows_by_name(mix, ids.device)
        generator = None if seed is None else torch.Generator(ids.device).manual_seed(seed)
        handles = [
            self.base.get_submodule(target).register_forward_hook(
                partial(_add_adapters, self.layer(target), rows, self, generator)
            )
            for target in self.targets
        ]
        try:
            with Float64() if exact else nullcontext():
                return last_output(self.base, ids)
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def check(
        self, sides: Mapping[str, Side], mix: Sequence[str], ids: torch.Tensor
    ) -> dict[str, Check]:
        """Compare every side except the base model with float64, and warm all sides up.

        Afterwards every side is warm, and fastlora is in its steady state.

        Raises:
            WrongResultError: The error of a side is larger than twice the error of the textbook
                expression in the model's own dtype, plus a rounding. The error is the root mean
                square over all outputs, and over the outputs of the best sequence, in which
                roundings hide the least.
        """
        truth = self.plain(mix, ids, exact=True)
        drawn = [_yardstick(self.plain(mix, ids), truth)]
        while len(ids) * len(drawn) < _DRAWS:
            other = self.random_ids(*ids.shape)
            drawn.append(_yardstick(self.plain(mix, other), self.plain(mix, other, exact=True)))
        most = 2.0 * max(best for best, _ in drawn)
        checks = {}
        for name, side in sides.items():
            for _ in range(_WARM_UP.get(name, 0)):
                side()
            if name == BASE:
                continue
            best, error = _best_and_all(side().double() - truth)
            budget = 2.0 * max(own for _, own in drawn)
            while best <= most and error > budget and len(drawn) < _DRAWS:
                drawn.append(_yardstick(self.plain(mix, ids, seed=len(drawn)), truth))
                budget = max(budget, 2.0 * drawn[-1][1])
            for whose, found, limit in (("best sequence's ", best, most), ("", error, budget)):
                if not found <= limit:  # also catches NaN
                    raise WrongResultError(
                        f"{name} is wrong with {len(set(mix))} adapters: its {whose}outputs differ "
                        f"from float64 by {found:.2e}, expected at most {limit:.2e}; nothing was "
                        "timed"
                    )
            checks[name] = Check(error, budget)
        return checks

    @torch.no_grad()
    def measure(
        self,
        sides: Mapping[str, Side],
        mix: Sequence[str],
        ids: torch.Tensor,
        rounds: int,
        on_step: Callable[[], object] = lambda: None,
    ) -> tuple[list[Row], dict[str, list[float]]]:
        """Check the sides of one batch, then time them.

        Args:
            sides: The ways to compute the batch, including `BASE`.
            mix: See `sides`.
            ids: See `sides`.
            rounds: Number of timed rounds, at least 1.
            on_step: Called after the check and after each round.

        Returns:
            A row for each side, and the seconds of each side in each round.

        Raises:
            WrongResultError: See `check`. Nothing has been timed in this case.
        """
        checks = self.check(sides, mix, ids)
        on_step()
        times = interleaved_seconds(sides, rounds, device=ids.device, on_round=on_step)
        rows = [
            Row(
                adapters=len(set(mix)),
                side=side,
                median_ms=statistics.median(seconds) * 1e3,
                ratio_to_base=median_ratio(times, side, BASE),
                rounds=rounds,
                error=checks[side].error if side in checks else None,
                budget=checks[side].budget if side in checks else None,
            )
            for side, seconds in times.items()
        ]
        return rows, times


def last_output(model: Any, ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """Return a model's output for the last token of each sequence, ``[B, V]``."""
    output: torch.Tensor = model(input_ids=ids, **arguments)[0]
    # A view of several tokens would keep the outputs of all tokens alive.
    return output[:, 0] if output.shape[1] == 1 else output[:, -1].clone()


def _yardstick(plain: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """Return the error of the textbook expression in the best sequence, and over all sequences."""
    pairs = zip(_best_and_all(plain.double() - truth), _best_and_all(truth), strict=True)
    best, error = (error + torch.finfo(plain.dtype).eps / 2 * size for error, size in pairs)
    return best, error


def _best_and_all(outputs: torch.Tensor) -> tuple[float, float]:
    """Return root mean squares of ``[B, V]``: the smallest of any row, and all. NaN propagates."""
    squares = outputs.square().mean(-1)
    return squares.amin().sqrt().item(), squares.mean().sqrt().item()


def twin(model: Any) -> Any:
    """Return a copy of the modules that shares parameters and buffers.

    4-bit weights are not shared: bitsandbytes repacks them for one side, which would affect the
    others.
    """
    shared = [p for p in model.parameters() if getattr(p, "quant_state", None) is None]
    shared += model.buffers()
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def _peft_twin(contest: Contest, rank: int) -> Any:
    """Return PEFT's model, with all adapters except the first one inserted into its dicts by hand.

    Adding 64 adapters one by one takes PEFT over a minute.
    """
    import peft

    config = peft.LoraConfig(
        r=rank,
        lora_alpha=0.5 * rank,  # type: ignore[arg-type]  # PEFT accepts a float here
        target_modules=contest.targets,
        init_lora_weights=False,
    )
    first = contest.names[0]
    model = peft.get_peft_model(twin(contest.base), config, first, autocast_adapter_dtype=False)
    for target in contest.targets:
        layer: Any = model.get_base_model().get_submodule(target)
        source = contest.layer(target)
        for name in contest.names:
            for kind in ("lora_A", "lora_B", "lora_dropout"):
                getattr(layer, kind)[name] = getattr(source, kind)[name]
            layer.scaling[name] = layer.scaling[first]
    return model.eval()


def _rows_by_name(mix: Sequence[str], device: torch.device) -> dict[str, torch.Tensor]:
    rows = defaultdict(list)
    for index, name in enumerate(mix):
        rows[name].append(index)
    return {name: torch.tensor(own, device=device) for name, own in rows.items()}


def _add_adapters(
    layer: Any,
    rows: Mapping[str, torch.Tensor],
    contest: Contest,
    generator: torch.Generator | None,
    _: nn.Module,
    inputs: tuple[torch.Tensor, ...],
    output: torch.Tensor,
) -> torch.Tensor:
    """Add each sequence's own adapter to the output, as a forward hook."""
    batch = sum(len(own) for own in rows.values())
    x = inputs[0].reshape(batch, -1, inputs[0].shape[-1])
    result = output.reshape(batch, -1, output.shape[-1]).clone()
    for name, own in rows.items():
        s = x[own] @ layer.lora_A[name].weight.t()
        result[own] += contest.scaling * (s @ layer.lora_B[name].weight.t())
    if generator is not None:
        moved = torch.rand(result.shape, generator=generator, device=result.device) - 0.5
        exact = result.double()
        result = (exact + torch.finfo(result.dtype).eps * exact * moved).to(result.dtype)
    return result.view(output.shape)
