"""One mixed batch computed in several ways on one model: the sides of every comparison.

All sides share the base weights and the adapters' factors, so that they differ in what they do
only. Their results are compared with float64 before anything is timed.
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
# Calls before the one that is checked. A set of adapters is packed the second time that it comes;
# the third time finds it packed.
_WARM_UP = {BASE: 1, OURS: 2}
# A model carries one rounding far: of 64 sequences through 30 layers in bf16 the worst one of two
# right results was off by 6.8 and 2.7, where most are off by 0.6. So all count together, over so
# many sequences at least; where that does not cover a side, so often with other roundings. A right
# side is one more such draw: it is the largest of all once in so many checks and one more.
_DRAWS = 32

Side = Callable[[], torch.Tensor]


class WrongResultError(FastLoraError):
    """A side computes something else than the others, so its time means nothing."""


class Check(NamedTuple):
    """A side's error against float64, its root mean square, and what it may be."""

    error: float
    budget: float


class Row(NamedTuple):
    """What one side took for one mixed batch.

    Attributes:
        adapters: Different adapters in the batch.
        side: Its name.
        median_ms: Milliseconds of a forward.
        ratio_to_base: Median of the rounds' ratios to the base model's time.
        rounds: How many.
        error: Its difference from float64, root mean square; None for the base model.
        budget: What it may be.
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

    The base model goes into evaluation mode, its parameters are frozen and its cache of keys and
    values is switched off: a forward is one step.

    Args:
        base: A transformers model that takes ``input_ids`` alone.
        adapters: How many.
        rank: Of each; alpha is half of that, so that the model stays well conditioned.
        peft: Whether to build PEFT's side too.
        on_adapter: Called after each adapter has been added.

    Attributes:
        base: The model itself.
        ours: A `fastlora.LoraModel` over the same weights.
        theirs: PEFT's model over the same weights and factors, or None.
        names: Of the adapters.
        targets: Names of the adapted modules.
        scaling: Of every adapter.
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
        """Returns fastlora's layer of that name."""
        return self.ours.get_base_model().get_submodule(target)

    def random_ids(self, sequences: int, tokens: int) -> torch.Tensor:
        """Returns ``[sequences, tokens]`` int64 token numbers from torch's generator."""
        vocabulary = self.base.get_input_embeddings().num_embeddings
        device = next(self.base.parameters()).device
        return torch.randint(0, vocabulary, (sequences, tokens), device=device)

    def random_mix(self, sequences: int, adapters: int) -> list[str]:
        """Returns the first adapters' names, shared out evenly in random order."""
        order = torch.randperm(sequences).tolist()
        return [self.names[index % adapters] for index in order]

    # ----------------------------------------------------------------------------- the sides

    def sides(self, mix: Sequence[str], ids: torch.Tensor) -> dict[str, Side]:
        """Returns the ways to compute one batch, each the last token's output ``[B, V]``.

        ``in_turn`` runs the adapters one after another, each on its own rows, in a model that holds
        one adapter; changing it costs nothing there.

        Args:
            mix: An adapter for each of the B sequences.
            ids: ``[B, T]`` int64.
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
        """Returns the outputs ``[B, V]`` by the textbook expression, added by hooks on the base.

        Args:
            mix: See `sides`.
            ids: See `sides`.
            exact: In float64 throughout, from the same weights.
            seed: Move what each target gives by up to half a unit in its last place, at random.
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
        """Compares every side but the base model's with float64, and warms it up.

        Every side is warm afterwards, and ours in its steady state.

        Raises:
            WrongResultError: A side's error is beyond twice that of the textbook expression in the
                model's own dtype, plus a rounding: the root mean square over all outputs, or over
                those of the best sequence, where roundings hide the least.
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
        """Checks the sides of one batch, then times them.

        Args:
            sides: Ways to compute it; `BASE` must be among them.
            mix: See `sides`.
            ids: See `sides`.
            rounds: Timed ones, at least 1.
            on_step: Called behind the check and behind each round.

        Returns:
            A row for each side, and the seconds of each in each round.

        Raises:
            WrongResultError: See `check`; nothing was timed.
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
    """Returns a model's output for the last token of each sequence, ``[B, V]``."""
    output: torch.Tensor = model(input_ids=ids, **arguments)[0]
    # A view of several tokens would keep the outputs of all.
    return output[:, 0] if output.shape[1] == 1 else output[:, -1].clone()


def _yardstick(plain: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """Returns the textbook expression's error in the best sequence, and over all."""
    pairs = zip(_best_and_all(plain.double() - truth), _best_and_all(truth), strict=True)
    best, error = (error + torch.finfo(plain.dtype).eps / 2 * size for error, size in pairs)
    return best, error


def _best_and_all(outputs: torch.Tensor) -> tuple[float, float]:
    """Returns root mean squares of ``[B, V]``: the least of a row, and all; NaN where there is."""
    squares = outputs.square().mean(-1)
    return squares.amin().sqrt().item(), squares.mean().sqrt().item()


def twin(model: Any) -> Any:
    """Returns a copy of the modules that shares parameters and buffers.

    But not 4-bit codes: bitsandbytes repacks them for one side, which the others would find.
    """
    shared = [p for p in model.parameters() if getattr(p, "quant_state", None) is None]
    shared += model.buffers()
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def _peft_twin(contest: Contest, rank: int) -> Any:
    """Returns PEFT's model; all adapters but the first put into its dicts by hand.

    Adding them one by one takes PEFT over a minute for 64.
    """
    import peft

    config = peft.LoraConfig(
        r=rank,
        lora_alpha=0.5 * rank,  # type: ignore[arg-type]  # PEFT computes with it as it is
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
    """A forward hook: adds to each sequence its own adapter."""
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
