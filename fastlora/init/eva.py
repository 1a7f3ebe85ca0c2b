"""EVA: A starts as the main directions of a layer's inputs, and layers share out the ranks.

Method: https://arxiv.org/abs/2410.07170, as in PEFT. An adapter starts with B zero and A random;
`fastlora.model.eva.initialize_lora_eva_weights` then gives it directions and ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fastlora.init.configs import EvaConfig
from fastlora.init.incremental_pca import IncrementalPca
from fastlora.init.registry import Given, Settings, Start, register_init
from fastlora.validation import InitialisationError

# What of a layer's inputs counts: of the inputs, the batch's part of it and the layer's name.
Prepare = Callable[[Any, Any, str], torch.Tensor]


@register_init(
    "eva",
    title="EVA",
    any_kind=True,
    calibration="initialize_lora_eva_weights",
    settings=Settings("eva_config", EvaConfig),
)
def eva(given: Given) -> Start:
    """A as `nn.Linear` draws it, B zero."""
    return Start(given.lora_a, torch.zeros_like(given.lora_b))


def as_rows(layer_input: Any, _model_input: Any, layer_name: str) -> torch.Tensor:
    """Returns a layer's first input as rows ``[M, K]``.

    Raises:
        TypeError: It is no tensor.
    """
    x = layer_input[0] if isinstance(layer_input, (tuple, list)) else layer_input
    if not isinstance(x, torch.Tensor):
        raise TypeError(
            f"layer {layer_name!r} has an input of type {type(x).__name__}; pass a "
            "prepare_layer_inputs_fn that makes rows of it"
        )
    return x.flatten(0, -2) if x.dim() > 2 else x


class LayerDirections:
    """The directions of one layer's inputs, and those which have settled.

    Args:
        name: The layer's, for the prepare function.
        count: How many directions.
        tau: The cosine with its own last value from which on a direction has settled.
        prepare: Makes rows of the layer's inputs.
        gather: Brings the rows of all processes together.
    """

    def __init__(
        self,
        name: str,
        count: int,
        tau: float,
        prepare: Prepare,
        gather: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self.name, self.tau, self.prepare, self.gather = name, tau, prepare, gather
        self.pca = IncrementalPca(count)
        self.settled = torch.zeros(count, dtype=torch.bool)
        self.model_input: Any = None
        self.most_rows = 0

    @torch.no_grad()
    def watch(self, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Takes what a forward gives the layer; skips a batch of fewer rows than directions."""
        rows = self.gather(self.prepare(inputs, self.model_input, self.name))
        self.most_rows = max(self.most_rows, len(rows))
        if len(rows) < self.pca.count:
            return
        before = self.pca.components
        self.pca.add(rows.float())
        after = self.pca.components
        if before is not None and after is not None and len(before) == len(after):
            same = torch.cosine_similarity(after, before.to(after)) >= self.tau
            self.settled = same.cpu()

    def directions(self, rank: int, whiten: bool) -> torch.Tensor:
        """Returns the first directions ``[rank, K]`` in fp32."""
        found = self.pca.components
        if found is None:
            raise InitialisationError(f"layer {self.name!r} has no directions yet")
        found = found[:rank]
        return (found / self.pca.values[:rank].sqrt()[:, None] if whiten else found).float()


def share_ranks(
    ratios: Mapping[str, torch.Tensor],
    source: Mapping[str, str],
    budget: int,
    limits: Mapping[str, int],
) -> dict[str, int]:
    """Returns a rank for each layer: directions that explain more come first.

    Args:
        ratios: Layer with directions of its own to the share of variance of each.
        source: Layer to the layer whose directions it has: itself, or one with the same inputs.
        budget: Sum of the ranks.
        limits: Layer to its highest rank.
    """
    owners = [name for name, of in source.items() for _ in ratios[of][: limits[of]]]
    values = torch.cat([ratios[of][: limits[of]].cpu() for of in source.values()])
    chosen = values.argsort(descending=True)[:budget].tolist()
    counted = Counter(owners[index] for index in chosen)
    ranks = {name: counted.get(name, 0) for name in source}
    for name, of in source.items():
        if ranks[of] < ranks[name]:  # the layer that is asked has the highest rank
            ranks[of], ranks[name] = ranks[name], ranks[of]
    return ranks
