"""A model with one row of keys and values for each running request, and forwards over some rows.

Every row begins at position 0 of its own row in the cache, so requests of any lengths stand side by
side, and the rows of a forward are neighbours, so keys and values are read where they lie.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from fastlora.validation import ConfigError, UnsupportedLayerError

# Their frequencies depend on the longest row of a batch once it passes the length of pretraining.
_ROPES_BY_LENGTH = ("dynamic", "longrope")
_STEP = 256  # positions by which the cache grows at least


class RowCache:
    """Keys and values of every layer, ``[rows, heads, length, head_dim]``, in what transformers
    calls a cache: layers call `update`.

    Memory is zeros at first, since a masked position still takes part in a product with weight 0.
    It grows in length as requests need it, up to ``length``, and stays.
    """

    def __init__(self, rows: int, length: int) -> None:
        self.rows, self.length = rows, length
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._first, self._starts, self._end = 0, torch.zeros(0, dtype=torch.int64), 0
        self._index = self._starts
        self._at: int | None = None  # where all rows write, if it is one place
        self._room = min(length, _STEP)

    def begin(self, first: int, starts: torch.Tensor, count: int) -> None:
        """Says where the next forward writes ``count`` new tokens of each row, from ``first`` on.

        ``starts``, ``[n]`` int64, are their first positions: all the same, unless ``count`` is 1.
        """
        self._first, self._starts = first, starts
        self._at = int(starts[0]) if bool((starts == starts[0]).all()) else None
        self._index = torch.arange(starts.numel())
        self._end = int(starts.max()) + count
        if self._end > self._room:
            self._grow(min(self.length, max(2 * self._room, -(-self._end // _STEP) * _STEP)))

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes a layer's new keys and values; returns all of the rows' up to the longest."""
        found = []
        for states, kept in zip(
            (keys, values), self._buffers(layer_idx, keys, values), strict=True
        ):
            n, _heads, count, _width = states.shape
            rows = kept[self._first : self._first + n]
            if self._at is not None:
                rows[:, :, self._at : self._at + count] = states
            else:
                index, at = (places.to(states.device) for places in (self._index, self._starts))
                rows[index, :, at] = states[:, :, 0]
            found.append(rows[:, :, : self._end])
        return found[0], found[1]

    def _buffers(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if layer not in self._layers:
            made = [
                states.new_zeros(self.rows, states.shape[1], self._room, states.shape[3])
                for states in (keys, values)
            ]
            self._layers[layer] = made[0], made[1]
        return self._layers[layer]

    def _grow(self, room: int) -> None:
        for layer, pair in self._layers.items():
            grown = []
            for kept in pair:
                longer = kept.new_zeros(kept.shape[0], kept.shape[1], room, kept.shape[3])
                longer[:, :, : self._room] = kept
                grown.append(longer)
            self._layers[layer] = grown[0], grown[1]
        self._room = room

    @torch.no_grad()
    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first positions of a row over another one."""
        for kept in self._all():
            kept[target, :, :length] = kept[source, :, :length]

    @torch.no_grad()
    def clear(self, row: int) -> None:
        """Makes a row zeros: what held NaN would be NaN times 0 for the next request."""
        for kept in self._all():
            kept[row] = 0

    def _all(self) -> list[torch.Tensor]:
        return [kept for pair in self._layers.values() for kept in pair]

    @property
    def nbytes(self) -> int:
        """Bytes of the cache, known once a forward has run."""
        return sum(kept.nbytes for kept in self._all())

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """Positions before the new tokens, for models that ask; they are given position_ids."""
        return int(self._starts.max()) if self._starts.numel() else 0


class Rows:
    """Forwards of transformers' causal language model, in evaluation mode, over a `RowCache`.

    Raises:
        UnsupportedLayerError: The model keeps something else than keys and values, or takes no
            positions.
        ConfigError: ``length`` is more than the model has.
    """

    def __init__(self, model: Any, rows: int, length: int | None) -> None:
        parameters = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"
        self._keeps = "logits_to_keep" in parameters
        lacking = {self._cache_name, "position_ids", "attention_mask"} - parameters.keys()
        if lacking:
            raise UnsupportedLayerError(
                f"{type(model).__name__} takes no {', '.join(sorted(lacking))}, which serving needs"
            )
        most = most_positions(model.config)
        if length is not None and most is not None and length > most:
            raise ConfigError(f"a length of {length} tokens is more than the model's {most}")
        self.length = length or min(most or 2048, 2048)
        self.cache = RowCache(rows, self.length)
        self._model = model

    @torch.no_grad()
    def forward(
        self, first: int, starts: Sequence[int], tokens: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """Returns the logits behind the last token of each row, ``[n, V]`` in fp32.

        Args:
            first: The first of n neighbouring rows.
            starts: Positions that each row has already; all the same unless each gets one token.
            tokens: New tokens of each row; shorter ones are padded on the right, where no query of
                their own sees it.
        """
        device = self._model.device
        lengths = [len(own) for own in tokens]
        count = max(lengths)
        ids = torch.tensor([[*own, *[own[-1]] * (count - len(own))] for own in tokens])
        begin = torch.tensor(starts, dtype=torch.int64)
        self.cache.begin(first, begin, count)
        positions = begin[:, None] + torch.arange(count)
        end = int(begin.max()) + count
        hidden = torch.arange(end)[None, None, :] > positions[:, :, None]
        dtype = self._model.dtype
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)
        kept = sorted(set(lengths))
        place = torch.tensor([kept.index(length) for length in lengths])
        options: dict[str, Any] = {self._cache_name: self.cache, "use_cache": True}
        if self._keeps:
            options["logits_to_keep"] = torch.tensor([length - 1 for length in kept], device=device)
        else:
            place = torch.tensor(lengths) - 1
        logits = self._model(
            input_ids=ids.to(device),
            position_ids=positions.to(device),
            attention_mask=mask[:, None].to(device),
            **options,
        ).logits
        return logits[torch.arange(len(lengths)), place.to(logits.device)].float()


def most_positions(config: Any) -> int | None:
    """Returns how many positions a request may take with a model, None where it has no limit.

    Raises `UnsupportedLayerError` for a model that keeps something else than keys and values.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    if kinds - {"sliding_attention"}:
        raise UnsupportedLayerError(
            f"{type(text).__name__} has layers of {', '.join(sorted(kinds))}; serving keeps keys "
            "and values of attention only"
        )
    most: int | None = getattr(text, "max_position_embeddings", None)
    # Rows are not aligned, so a window that slides would be another one for each.
    window = getattr(text, "sliding_window", None)
    if window and (kinds or getattr(text, "use_sliding_window", True)):
        most = min(most or window, window)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type"))
    if kind in _ROPES_BY_LENGTH:
        short = rope.get("original_max_position_embeddings") or getattr(
            text, "original_max_position_embeddings", None
        )
        most = min(most or short, short) if short else most
    return most
