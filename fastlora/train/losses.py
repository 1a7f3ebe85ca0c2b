"""The loss of each adapter in a mixed batch: the mean over the adapter's own tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastlora.routing.ids import BASE
from fastlora.validation import check_floating

# Label of the tokens that transformers excludes from the loss.
IGNORED = -100


@dataclass(frozen=True, eq=False)
class AdapterLosses:
    """The losses of a batch, by adapter.

    The batch may be a mixed batch with rows of several adapters. A token counts if it contributes
    to the loss. Adapters without counted tokens are left out of all fields.

    Attributes:
        by_adapter: Dict that maps each adapter to its loss, a scalar tensor with an autograd graph.
        values: The same losses as Python floats.
        tokens: Dict that maps each adapter to its number of counted tokens.
        total: Sum of the finite losses, or a zero without a graph if there are none. Its gradient
            for an adapter is the gradient of the adapter's own loss. An adapter with a non-finite
            loss may still get NaN gradients (0 * NaN), because its rows take part in the backward
            pass; `AdapterOptimizers.backward` prevents this.
        own_divisors: Whether each loss is a mean over the adapter's tokens in this batch, and not a
            share of a mean over more tokens (argument ``tokens`` of `adapter_losses`).
        graph: The token losses. A backward pass from them reaches the whole graph of the forward
            pass.
    """

    by_adapter: dict[str, torch.Tensor]
    values: dict[str, float]
    tokens: dict[str, int]
    total: torch.Tensor
    own_divisors: bool
    graph: torch.Tensor

    @property
    def finite(self) -> tuple[str, ...]:
        """Names of the adapters with finite losses."""
        return tuple(name for name, value in self.values.items() if math.isfinite(value))

    @property
    def non_finite(self) -> tuple[str, ...]:
        """Names of the adapters whose loss is NaN or infinite."""
        return tuple(name for name, value in self.values.items() if not math.isfinite(value))


def adapter_losses(
    token_losses: torch.Tensor,
    adapters: Sequence[str | None],
    *,
    mask: torch.Tensor | None = None,
    tokens: Mapping[str, int] | None = None,
) -> AdapterLosses:
    """Compute the loss of each adapter in a mixed batch from per-token losses.

    The loss of an adapter is the mean loss over its own tokens. The computation synchronizes the
    host with the device once.

    Args:
        token_losses: A loss for each token or sample, of shape ``[B, ...]`` and any floating-point
            dtype.
        adapters: The adapter of each of the B samples. Samples with None or ``"__base__"`` count
            for no adapter.
        mask: Bool tensor that selects the losses to average, of the same shape as ``token_losses``;
            None selects all losses.
        tokens: Dict that maps each adapter to the divisor of its summed losses, which replaces its
            token count in this batch. With gradient accumulation, pass each adapter's token count
            over all batches of the step (`count_tokens`): the step then equals a step with one
            large batch.

    Returns:
        The losses of all adapters that have counted tokens.

    Raises:
        ValueError: ``adapters`` does not have B entries, a shape is wrong, or ``tokens`` lacks an
            adapter or has a count below 1.
        TypeError: A tensor has the wrong dtype, or an entry of ``adapters`` has the wrong type.
    """
    check_floating("token_losses", token_losses)
    if not token_losses.dim():
        raise ValueError("token_losses has no dimensions, expected one loss for each sample")
    samples = _sample_indices_by_adapter(adapters, token_losses.shape[0])
    if mask is None:
        mask = torch.ones_like(token_losses, dtype=torch.bool)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask has dtype {mask.dtype}, expected torch.bool")
    if mask.shape != token_losses.shape:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, expected {tuple(token_losses.shape)}, the shape "
            "of token_losses"
        )
    for name in samples:
        divisor = None if tokens is None else tokens.get(name)
        if divisor is not None and divisor < 1:
            raise ValueError(f"tokens[{name!r}] is {divisor}, expected at least 1")

    wide = token_losses.to(torch.promote_types(token_losses.dtype, torch.float32))
    by_adapter: dict[str, torch.Tensor] = {}
    values: dict[str, float] = {}
    found: dict[str, int] = {}
    for name, total, count, value in _sum_losses_and_count_tokens(wide, mask, samples):
        if not count:
            continue
        divisor = count if tokens is None else tokens.get(name)
        if divisor is None:
            raise ValueError(
                f"the tokens argument has no entry for adapter {name!r}, which has {count} tokens "
                "in this batch"
            )
        by_adapter[name], values[name], found[name] = total / divisor, value / divisor, count
    finite = [by_adapter[name] for name, value in values.items() if math.isfinite(value)]
    joint = torch.stack(finite).sum() if finite else wide.new_zeros(())
    return AdapterLosses(by_adapter, values, found, joint, tokens is None, token_losses)


def _sum_losses_and_count_tokens(
    token_losses: torch.Tensor, mask: torch.Tensor, samples_by_adapter: dict[str, list[int]]
) -> list[tuple[str, torch.Tensor, int, float]]:
    """For each adapter, sum the token losses and count the tokens.

    Only the tokens that the mask selects are included. Returns a tuple (name, sum, token count, sum
    as a float) for each adapter.
    """
    if not samples_by_adapter:
        return []
    # Select instead of multiplying, so that a NaN outside the mask adds nothing. [B]
    sums = torch.where(mask, token_losses, 0.0).reshape(len(token_losses), -1).sum(1)
    counts = mask.reshape(len(token_losses), -1).sum(1)
    order = torch.tensor(
        [i for rows in samples_by_adapter.values() for i in rows], device=token_losses.device
    )
    sizes = [len(rows) for rows in samples_by_adapter.values()]
    own_sums = [part.sum() for part in sums.index_select(0, order).split(sizes)]
    own_counts = [part.sum() for part in counts.index_select(0, order).split(sizes)]
    summed = torch.stack(own_sums).detach()
    counted, values = torch.stack([torch.stack(own_counts).to(summed.dtype), summed]).tolist()
    return list(zip(samples_by_adapter, own_sums, map(int, counted), values, strict=True))


def causal_lm_losses(
    logits: torch.Tensor,
    labels: torch.Tensor,
    adapters: Sequence[str | None],
    *,
    tokens: Mapping[str, int] | None = None,
) -> AdapterLosses:
    """Compute the causal language modeling loss of each adapter.

    The loss is the mean cross-entropy loss for predicting the next token. It equals the loss that a
    causal language model of transformers computes for a batch with the samples of this adapter
    only.

    Args:
        logits: Logits of shape ``[B, T, V]``, in any floating-point dtype. 16-bit logits are
            converted to fp32.
        labels: Labels of shape ``[B, T]``, int64, not shifted. Tokens with label -100 do not
            contribute to the loss.
        adapters: See `adapter_losses`.
        tokens: Token counts by which the summed losses are divided; see `adapter_losses`.

    Returns:
        The losses of all adapters that have counted tokens.

    Raises:
        ValueError, TypeError: See `adapter_losses`; or ``logits`` or ``labels`` has the wrong shape
            or dtype.
    """
    check_floating("logits", logits)
    if logits.dim() != 3:
        raise ValueError(f"logits has shape {tuple(logits.shape)}, expected [B, T, V]")
    if labels.shape != logits.shape[:2]:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}, expected {tuple(logits.shape[:2])} (the "
            "first two dimensions of logits)"
        )
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    _sample_indices_by_adapter(adapters, labels.shape[0])  # raises before any work
    shifted = _shift_labels(labels)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    token_losses = F.cross_entropy(
        wide.flatten(0, 1), shifted.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return adapter_losses(
        token_losses.view(shifted.shape), adapters, mask=shifted != IGNORED, tokens=tokens
    )


def count_tokens(labels: torch.Tensor, adapters: Sequence[str | None]) -> dict[str, int]:
    """For each adapter, count the tokens that contribute to the loss.

    The loss is that of `causal_lm_losses`. This causes one host-device synchronization.

    Args:
        labels: Labels of shape ``[B, T]``, int64, not shifted.
        adapters: See `adapter_losses`.

    Returns:
        A dict that maps each adapter with counted tokens to the number of these tokens.

    Raises:
        ValueError: ``labels`` has the wrong shape.
        ValueError, TypeError: ``adapters`` is invalid; see `adapter_losses`.
    """
    if labels.dim() != 2:
        raise ValueError(f"labels has shape {tuple(labels.shape)}, expected [B, T]")
    samples = _sample_indices_by_adapter(adapters, labels.shape[0])
    counts = (_shift_labels(labels) != IGNORED).sum(1).tolist()
    found = {name: sum(counts[i] for i in rows) for name, rows in samples.items()}
    return {name: count for name, count in found.items() if count}


def _sample_indices_by_adapter(adapters: Sequence[str | None], count: int) -> dict[str, list[int]]:
    """Return a dict that maps each adapter to the list of its sample indices.

    Raises `ValueError` unless ``adapters`` has ``count`` entries.
    """
    if isinstance(adapters, str):
        raise TypeError(
            f"adapters is the string {adapters!r}; expected a list with one name for each sample"
        )
    if len(adapters) != count:
        raise ValueError(
            f"adapters has {len(adapters)} entries; expected {count}, one for each sample"
        )
    samples: dict[str, list[int]] = {}
    for index, name in enumerate(adapters):
        if name is None or name == BASE:
            continue
        if not isinstance(name, str):
            raise TypeError(f"adapters[{index}] is {name!r}, expected a name or None")
        samples.setdefault(name, []).append(index)
    return samples


def _shift_labels(labels: torch.Tensor) -> torch.Tensor:
    """Shift the labels so that each position has the label of the next token.

    The shape of the labels, ``[B, T]``, does not change.
    """
    # Shift the labels rather than the logits, which would have to be copied.
    return F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
