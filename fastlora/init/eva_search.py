"""The data-driven step of EVA: finds principal directions of layer inputs, and distributes ranks.

The data loader is iterated as often as necessary. No batches are stored, only the state of one
incremental PCA (`fastlora.init.incremental_pca`) per layer or group of layers.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fastlora.init.calibration_data import (
    forward_pre_hooks,
    iterate_batches,
    move_to_device,
    parameter_device,
    progress_bar,
)
from fastlora.init.configs import EvaConfig
from fastlora.init.eva import Prepare
from fastlora.init.incremental_pca import IncrementalPca
from fastlora.validation import InitializationError


@dataclass
class EvaDirectionSearch:
    """Search for the directions that EVA uses to initialize the layers.

    The directions are the principal directions of each layer's inputs, which incremental PCA finds.
    The search also distributes the total rank among the layers. Call `find_shared_inputs`, then
    `repeat_batches_until_converged`, then `directions`.

    Attributes:
        model: The model to run over the data.
        layers: Maps the name of each adapted layer to the layer.
        limits: Maps each layer name to the highest rank that the layer can get.
        budget: Sum of the ranks of all layers.
        settings: The config of EVA.
        forward: Function that calls the model with a batch.
        prepare_batch: Function that takes a batch and returns the second argument of the
            ``prepare_layer`` functions.
        prepare_layer: Maps each layer name to a function that converts the layer's inputs to rows
            ``[M, K]``.
        gather: Whether to gather the rows of all processes.
        source: Maps each layer name to the name of the layer whose directions it uses: the layer
            itself, or another layer with the same inputs.
        found: Maps the names of the layers in ``source.values()`` to their incremental PCA.
        ranks: Maps each layer name to its current rank.
    """

    model: nn.Module
    layers: Mapping[str, nn.Module]
    limits: dict[str, int]
    budget: int
    settings: EvaConfig
    forward: Callable[[nn.Module, Any], object]
    prepare_batch: Callable[[Any], Any]
    prepare_layer: Mapping[str, Prepare]
    gather: bool
    source: dict[str, str] = field(default_factory=dict, init=False)
    found: dict[str, IncrementalPca] = field(default_factory=dict, init=False)
    ranks: dict[str, int] = field(default_factory=dict, init=False)

    def find_shared_inputs(self, loader: Iterable[Any]) -> None:
        """Find the layers that receive the same inputs.

        The model is run on the first batch to find these layers. The directions are later computed
        only once for layers that receive the same inputs.

        Raises:
            InitializationError: The loader is empty, or the data did not reach one of the layers.
        """
        batch = next(iter(loader), None)
        if batch is None:
            raise InitializationError("EVA: the dataloader is empty; expected at least one batch")
        digests: dict[str, bytes] = {}  # of the input of each layer's first call

        def callback(name: str, rows: torch.Tensor) -> None:
            data = rows.detach().contiguous().cpu().view(torch.uint8).numpy().data
            digests.setdefault(name, hashlib.blake2b(data).digest())

        self._run_batch_with_hooks(
            move_to_device(batch, parameter_device(self.model)), self.layers, callback
        )
        missing = [name for name in self.layers if name not in digests]
        if missing:
            raise InitializationError(
                f"layer {missing[0]!r}: the data did not reach this layer; exclude the "
                "layer with exclude_modules"
            )
        groups: dict[bytes, list[str]] = {}
        for name, digest in digests.items():
            groups.setdefault(digest, []).append(name)
        followers = {name: names[0] for names in groups.values() for name in names[1:]}
        for names in groups.values():
            highest = max(self.limits[name] for name in names)
            self.limits |= dict.fromkeys(names, highest)
        owners = [name for name in self.layers if name not in followers]
        self.source = {name: name for name in owners} | followers
        self.found = {n: IncrementalPca(self.limits[n], self.settings.tau) for n in owners}
        self.ranks = dict(self.limits)

    def repeat_batches_until_converged(self, loader: Iterable[Any], show: bool) -> None:
        """Run batches through the model until all layers have converged.

        Each batch updates the principal directions of the layers that have not converged. A layer
        has converged if its first R directions have converged, where R is its current rank.

        Args:
            loader: The data loader, which is iterated as often as necessary.
            show: Whether to show a progress bar.
        """
        first = not dist.is_initialized() or dist.get_rank() == 0
        bar: Any = progress_bar(self._cycle_batches(loader), "EVA", show and first)
        with contextlib.closing(bar):
            for batch in bar:
                moving = {
                    n for n, of in self.found.items() if not of.settled[: self.ranks[n]].all()
                }
                if hasattr(bar, "set_description"):
                    settled = sum(of not in moving for of in self.source.values())
                    bar.set_description(f"{settled}/{len(self.source)} layers have converged")
                if not moving:
                    return
                self._run_batch_with_hooks(
                    batch, moving, lambda name, rows: self.found[name].partial_fit(rows.float())
                )
                if all(each.components is not None for each in self.found.values()):
                    ratios = {name: each.ratios for name, each in self.found.items()}
                    self.ranks = distribute_ranks(ratios, self.source, self.budget, self.limits)

    def _run_batch_with_hooks(
        self, batch: Any, names: Iterable[str], callback: Callable[[str, torch.Tensor], None]
    ) -> None:
        """Run a batch through the model, and pass the inputs of the named layers to ``callback``.

        Args:
            batch: The batch.
            names: Names of the layers.
            callback: Function that is called with the name and the inputs ``[M, K]`` of a layer at
                each call of the layer.
        """
        prepared = self.prepare_batch(batch)

        def make_hook(name: str) -> Callable[..., None]:
            @torch.no_grad()  # even if the model runs with gradients
            def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
                rows = self.prepare_layer[name](inputs, prepared, name)
                callback(
                    name, _gather_rows(rows) if self.gather and dist.is_initialized() else rows
                )

            return hook

        with forward_pre_hooks({name: self.layers[name] for name in names}, make_hook):
            self.forward(self.model, batch)

    def _cycle_batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches of a data loader in an endless cycle.

        When the loader is exhausted, it is iterated again.

        Raises:
            InitializationError: After one pass over the loader, no batch had enough rows for one of
                the layers.
        """
        while True:
            yield from iterate_batches(loader, self.model, "EVA", show=False)
            for name, each in self.found.items():
                if each.components is None:
                    raise InitializationError(
                        f"layer {name!r}: EVA needs a batch of at least {each.count} rows "
                        f"(rho * r), but the largest batch has {each.most_rows}; use larger batches"
                    )

    def directions(self) -> dict[str, torch.Tensor]:
        """Return a dict that maps each layer name to the layer's principal directions.

        The directions of a layer are ``[rank, K]`` in fp32.

        Raises:
            InitializationError: A layer has no directions yet.
        """
        made = {}
        for name, rank in self.ranks.items():
            found = self.found[self.source[name]]
            if found.components is None:
                raise InitializationError(
                    f"layer {name!r} has no principal directions yet; call "
                    "repeat_batches_until_converged first"
                )
            scales = found.values[:rank].sqrt()[:, None] if self.settings.whiten else 1.0
            made[name] = (found.components[:rank] / scales).float()
        return made


def distribute_ranks(
    ratios: Mapping[str, torch.Tensor],
    source: Mapping[str, str],
    budget: int,
    limits: Mapping[str, int],
) -> dict[str, int]:
    """Distribute a rank budget among layers, and return the rank of each layer.

    The result is a dict that maps layer names to ranks. The directions that explain the largest
    fractions of variance are chosen. The rank of a layer is the number of its directions that were
    chosen.

    Args:
        ratios: Maps the names of the layers in ``source.values()`` to the fraction of the variance
            that each of their directions explains.
        source, budget, limits: As in `EvaDirectionSearch`.
    """
    owners = [name for name, of in source.items() for _ in ratios[of][: limits[of]]]
    values = torch.cat([ratios[of][: limits[of]].cpu() for of in source.values()])
    chosen = values.argsort(descending=True)[:budget].tolist()
    counted = Counter(owners[index] for index in chosen)
    ranks = {name: counted.get(name, 0) for name in source}
    for name, of in source.items():
        if ranks[of] < ranks[name]:  # the layer that provides directions needs the highest rank
            ranks[of], ranks[name] = ranks[name], ranks[of]
    return ranks


def _gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Gather the rows from all processes into one tensor.

    The rows are those of a layer's inputs. The processes may have different numbers of rows.
    """
    size = torch.tensor([len(rows)], device=rows.device)
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    counts = [int(each) for each in sizes]
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.zeros_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
