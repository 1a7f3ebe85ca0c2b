"""A key-value cache with one row per running request, and forward passes over its rows.

Every request starts at position 0 of its row in the cache, so requests of any lengths can run side
by side. The rows of a forward pass are adjacent, so their keys and values are read in place.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from fastlora.validation import ConfigError, UnsupportedLayerError

# The frequencies of these RoPE types depend on the longest row of a batch once it exceeds the
# length of pretraining.
_ROPES_BY_LENGTH = ("dynamic", "longrope")
_STEP = 256  # minimum number of positions by which the cache grows


class BatchKVCache:
    """A key-value cache for a batch of requests.

    Each request has one row. The cache covers all layers of a model and has the interface of a
    transformers cache. Layers call `update` to write and read their keys and values.

    The buffers have shape ``[rows, heads, length, head_dim]``. They are initialized to zeros,
    because a masked position still takes part in a product with weight 0. Their length grows as
    requests need it, up to ``length``, and never shrinks.
    """

    def __init__(self, rows: int, length: int) -> None:
        self.rows, self.length = rows, length
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._first, self._starts, self._end = 0, torch.zeros(0, dtype=torch.int64), 0
        self._index = self._starts
        self._at: int | None = None  # where all rows write, or None if their positions differ
        self._room = min(length, _STEP)

    def set_write_positions(
        self, first_row: int, starts: torch.Tensor, tokens_per_row: int
    ) -> None:
        """Set the cache positions to which the next forward pass writes.

        The pass writes ``tokens_per_row`` new tokens per row. ``first_row`` is the first row of the
        pass. ``starts``, ``[n]`` int64, contains the first new position of each row. The positions
        must be equal unless ``tokens_per_row`` is 1.
        """
        self._first, self._starts = first_row, starts
        self._at = int(starts[0]) if bool((starts == starts[0]).all()) else None
        self._index = torch.arange(starts.numel())
        self._end = int(starts.max()) + tokens_per_row
        if self._end > self._room:
            self._grow(min(self.length, max(2 * self._room, -(-self._end // _STEP) * _STEP)))

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a layer's new keys and values, and return the layer's cached keys and values.

        The returned tensors include the new keys and values. They contain the rows of this forward
        pass, up to the end of the longest row.
        """
        found = []
        for states, cached in zip(
            (keys, values), self._buffers(layer_idx, keys, values), strict=True
        ):
            n, _heads, count, _width = states.shape
            rows = cached[self._first : self._first + n]
            if self._at is not None:
                rows[:, :, self._at : self._at + count] = states
            else:
                index, at = (
                    positions.to(states.device) for positions in (self._index, self._starts)
                )
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
            for cached in pair:
                longer = cached.new_zeros(cached.shape[0], cached.shape[1], room, cached.shape[3])
                longer[:, :, : self._room] = cached
                grown.append(longer)
            self._layers[layer] = grown[0], grown[1]
        self._room = room

    @torch.no_grad()
    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of one row to another row."""
        for cached in self._all():
            cached[target, :, :length] = cached[source, :, :length]

    @torch.no_grad()
    def zero_cache_row(self, row: int) -> None:
        """Fill a row of the cache with zeros.

        Otherwise a NaN in the row would make the next request NaN: a masked NaN times 0 is NaN.
        """
        for cached in self._all():
            cached[row] = 0

    def _all(self) -> list[torch.Tensor]:
        return [cached for pair in self._layers.values() for cached in pair]

    @property
    def nbytes(self) -> int:
        """Size of the key-value cache in bytes.

        The memory is allocated in forward passes, so the size is 0 before the first forward pass.
        """
        return sum(cached.nbytes for cached in self._all())

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """Return the length of the cached sequence, in tokens.

        The caches of the transformers library have a method with this name. If the rows of the
        current forward pass have cached sequences of different lengths, the longest one determines
        the result. The new tokens of the forward pass are not counted. Some models call this method
        even though they are given ``position_ids``.
        """
        return int(self._starts.max()) if self._starts.numel() else 0


class KVCacheModelRunner:
    """Runs a language model with a key-value cache.

    A forward pass returns the logits from which the next tokens are sampled.
    The model is a causal language model of transformers, and the cache is a `BatchKVCache`.

    Args:
        model: The model, in evaluation mode.
        rows: Number of rows.
        length: Maximum number of tokens in a row. None uses the model's limit, but at most 2,048.

    Raises:
        UnsupportedLayerError: The model has an unsupported kind of layer or uses ALiBi, or its
            forward pass does not accept a cache, positions, and a mask.
        ConfigError: ``length`` exceeds the limit of the model.
    """

    def __init__(self, model: Any, rows: int, length: int | None) -> None:
        parameters = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"
        self._selects_logits = "logits_to_keep" in parameters
        lacking = {self._cache_name, "position_ids", "attention_mask"} - parameters.keys()
        if lacking:
            raise UnsupportedLayerError(
                f"{type(model).__name__} does not accept {', '.join(sorted(lacking))}, which "
                "serving requires"
            )
        most = max_positions(model.config)
        if length is not None and most is not None and length > most:
            raise ConfigError(
                f"the maximum combined length of a prompt and its completion is set to {length} "
                f"tokens, but the model supports at most {most}; set it to {most} or less"
            )
        self.length = length or min(most or 2048, 2048)
        self.cache = BatchKVCache(rows, self.length)
        self._model = model

    @torch.no_grad()
    def last_token_logits(
        self, first: int, starts: Sequence[int], tokens: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """Return the logits at the last token of each row.

        The result is an fp32 tensor ``[n, V]``.

        Args:
            first: The first of n adjacent rows.
            starts: Number of cached positions of each row. The numbers must be equal unless each
                row gets one token.
            tokens: New tokens of each row. Shorter rows are padded on the right. Their own queries
                do not attend to the padding.
        """
        device = self._model.device
        lengths = [len(own) for own in tokens]
        count = max(lengths)
        ids = torch.tensor([[*own, *[own[-1]] * (count - len(own))] for own in tokens])
        begin = torch.tensor(starts, dtype=torch.int64)
        self.cache.set_write_positions(first, begin, count)
        positions = begin[:, None] + torch.arange(count)
        end = int(begin.max()) + count
        hidden = torch.arange(end)[None, None, :] > positions[:, :, None]
        dtype = self._model.dtype
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)
        lengths_kept = sorted(set(lengths))
        index = torch.tensor([lengths_kept.index(length) for length in lengths])
        options: dict[str, Any] = {self._cache_name: self.cache, "use_cache": True}
        if self._selects_logits:
            options["logits_to_keep"] = torch.tensor(
                [length - 1 for length in lengths_kept], device=device
            )
        else:
            index = torch.tensor(lengths) - 1
        logits = self._model(
            input_ids=ids.to(device),
            position_ids=positions.to(device),
            attention_mask=mask[:, None].to(device),
            **options,
        ).logits
        return logits[torch.arange(len(lengths)), index.to(logits.device)].float()


def max_positions(config: Any) -> int | None:
    """Return the maximum number of positions that a model supports according to its config.

    The maximum applies to each request. If the model uses a sliding window, the maximum is at most
    the size of the window. The result is None if the config contains no limit. Raises
    `UnsupportedLayerError` if the model uses ALiBi or has layers of a type other than full
    attention and sliding-window attention.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(text, "alibi", False):
        raise UnsupportedLayerError(
            f"{type(text).__name__} has alibi=True; serving only supports models that compute "
            "position embeddings from position_ids"
        )
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    # GPT-Neo ends the windows of all rows at the position of the longest row.
    kinds |= {"local"} & set(getattr(text, "attention_layers", None) or ())
    if kinds - {"sliding_attention"}:
        raise UnsupportedLayerError(
            f"{type(text).__name__} has layers of type {', '.join(sorted(kinds))}; serving only "
            "supports layers of type full_attention or sliding_attention"
        )
    most: int | None = getattr(text, "max_position_embeddings", None)
    # Rows are not aligned, so a sliding window would cover other positions in each row.
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
