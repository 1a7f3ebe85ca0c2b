"""EVA's pass over data: which directions a layer's inputs have, and who gets how many ranks.

The loader is run over again and again; no batch is kept, and of each layer what
`fastlora.init.incremental_pca` keeps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fastlora.init.configs import EvaConfig
from fastlora.init.data import batches, device_of, hooked, progress, to_device
from fastlora.init.eva import LayerDirections, Prepare, share_ranks
from fastlora.validation import InitialisationError


class Search:
    """Finds directions and ranks: `find_groups`, then `run`, then `state`.

    Args:
        model: What runs over the data.
        layers: Its layers by name.
        limits: Name to the highest rank that a layer can get.
        budget: Sum of the ranks to share out.
        settings: Of EVA.
        forward: Calls the model with a batch.
        prepare_batch: Makes of a batch what the layers' prepare functions are given.
        prepare_layer: Name to what makes rows of a layer's inputs.
        gather: Whether to bring the rows of all processes together.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        limits: Mapping[str, int],
        budget: int,
        settings: EvaConfig,
        forward: Callable[[nn.Module, Any], object],
        prepare_batch: Callable[[Any], Any],
        prepare_layer: Mapping[str, Prepare],
        gather: bool,
    ) -> None:
        self.model, self.layers, self.settings = model, dict(layers), settings
        self.forward, self.prepare_batch, self.prepare = forward, prepare_batch, prepare_layer
        self.gather = _gather if gather and dist.is_initialized() else _as_it_is
        self.limits, self.budget = dict(limits), budget
        self.source = {name: name for name in layers}
        self.found: dict[str, LayerDirections] = {}
        self.ranks = dict(limits)

    def find_groups(self, loader: Iterable[Any]) -> None:
        """Runs one batch, to see which layers get the same inputs."""
        batch = next(iter(loader), None)
        if batch is None:
            raise InitialisationError("EVA: the dataloader is empty; expected at least one batch")
        batch = to_device(batch, device_of(self.model))
        prepared = self.prepare_batch(batch)
        digests: dict[str, bytes] = {}  # of a layer's inputs, in its first call

        def watching(name: str) -> Callable[..., None]:
            def watch(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
                rows = self.gather(self.prepare[name](inputs, prepared, name))
                data = rows.detach().contiguous().cpu().view(torch.uint8).numpy().data
                digests.setdefault(name, hashlib.blake2b(data).digest())

            return watch

        with hooked(self.layers, watching):
            self.forward(self.model, batch)
        missing = [name for name in self.layers if name not in digests]
        if missing:
            raise InitialisationError(
                f"layer {missing[0]!r}: the data never got there; leave it out (exclude_modules)"
            )
        groups: dict[bytes, list[str]] = {}
        for name, digest in digests.items():
            groups.setdefault(digest, []).append(name)
        followers = {name: names[0] for names in groups.values() for name in names[1:]}
        for names in groups.values():
            highest = max(self.limits[name] for name in names)
            self.limits |= dict.fromkeys(names, highest)
        self.source = {n: n for n in self.layers if n not in followers} | followers
        self.ranks = dict(self.limits)
        for name, of in self.source.items():
            if name == of:
                self.found[name] = LayerDirections(
                    name, self.limits[name], self.settings.tau, self.prepare[name], self.gather
                )

    def run(self, loader: Iterable[Any], show: bool) -> None:
        """Runs batches until every layer's directions, as many as it is to have, have settled."""
        handles: dict[str, Any] = {}
        done = dict.fromkeys(self.found, False)
        bar: Any = progress(self._endless(loader), "EVA", show and _is_first())
        try:
            for batch in bar:
                prepared = self.prepare_batch(batch)
                for name, directions in self.found.items():
                    directions.model_input = prepared
                    done[name] = bool(directions.settled[: self.ranks[name]].all())
                    if done[name] and name in handles:
                        handles.pop(name).remove()
                    elif not done[name] and name not in handles:
                        layer = self.layers[name]
                        handles[name] = layer.register_forward_pre_hook(directions.watch)
                if hasattr(bar, "set_description"):
                    settled = sum(done[of] for of in self.source.values())
                    bar.set_description(f"{settled}/{len(self.source)} layers have converged")
                if all(done.values()):
                    return
                self.forward(self.model, batch)
                if all(each.pca.components is not None for each in self.found.values()):
                    ratios = {name: each.pca.ratios for name, each in self.found.items()}
                    self.ranks = share_ranks(ratios, self.source, self.budget, self.limits)
        finally:
            if hasattr(bar, "close"):
                bar.close()
            for handle in handles.values():
                handle.remove()

    def _endless(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Yields batches, from the start again and again; keeps none."""
        while True:
            yield from batches(loader, self.model, "EVA", show=False)
            for name, each in self.found.items():
                if each.pca.components is None:
                    raise InitialisationError(
                        f"layer {name!r}: EVA needs a batch of at least {each.pca.count} rows "
                        f"(rho * r), and the largest has {each.most_rows}; expected larger batches"
                    )

    def state(self) -> dict[str, torch.Tensor]:
        """Returns what was found, in the order in which the ranks were shared out."""
        whiten = self.settings.whiten
        return {
            name: self.found[self.source[name]].directions(rank, whiten).clone()
            for name, rank in self.ranks.items()
        }


def _as_it_is(rows: torch.Tensor) -> torch.Tensor:
    return rows


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _gather(rows: torch.Tensor) -> torch.Tensor:
    """Returns the rows of all processes, whose numbers may differ."""
    size = torch.tensor([len(rows)], device=rows.device)
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    counts = [int(each) for each in sizes]
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.zeros_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
