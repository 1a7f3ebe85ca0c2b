"""`FastLoraPunicaWrapper`, which computes vLLM's LoRA updates with fastlora.

vLLM's layers pass their stacked factors to the methods. The stacks are views of a `LayerSlots`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase

from fastlora.integrations.vllm.batch import slots_of_rows
from fastlora.integrations.vllm.slots import owning_layer_slots
from fastlora.ops.execution_mode import is_being_compiled
from fastlora.ops.rows import NO_SLOT
from fastlora.ops.slots import BatchRows

# vLLM's sampler and its layers have separate rows.
_TOKENS, _SAMPLED = 0, 1


class FastLoraPunicaWrapper(PunicaWrapperBase):
    """Implementation of vLLM's Punica wrapper that computes LoRA updates with fastlora.

    The Punica wrapper is vLLM's LoRA interface. All methods change y in place. Rows without an
    adapter are not changed.
    """

    def __init__(
        self,
        max_num_batched_tokens: int,
        max_batches: int,
        device: torch.device | str,
        **kwargs: Any,
    ) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device)
        count, shape = kwargs["lora_config"].max_loras, (2, max_num_batched_tokens)
        with torch.inference_mode(False):
            self._slots = torch.full(shape, NO_SLOT, dtype=torch.int64, device=device)
        # vLLM's properties read these tensors.
        self._token_lora_indices, self._sampler_indices = self._slots.unbind(0)
        self._on_gpu = self._slots.device.type != "cpu"
        self._tokens = BatchRows(self._token_lora_indices, count, self._on_gpu)
        self._sampled = BatchRows(self._sampler_indices, count, self._on_gpu)
        self._one_request: BatchRows | None = None

    def update_metadata(
        self,
        mapping: Any,
        lora_index_to_id: list[int | None],
        max_loras: int,
        vocab_size: int,
        **kwargs: Any,
    ) -> None:
        """Update the metadata for a new batch.

        The slots of the tokens and of the sampled rows are recorded according to vLLM's mapping.
        """
        self.is_prefill = mapping.is_prefill
        tokens = slots_of_rows(mapping.index_mapping, lora_index_to_id)
        sampled = slots_of_rows(mapping.prompt_mapping, lora_index_to_id)
        host = np.full(self._slots.shape, NO_SLOT)
        host[_TOKENS, : len(tokens)] = tokens
        host[_SAMPLED, : len(sampled)] = sampled
        staged = torch.from_numpy(host)
        self._slots.copy_(staged.pin_memory() if self._on_gpu else staged, non_blocking=True)
        # An embedding looks up rows without an adapter in slot 0. The result is not used.
        torch.mul(self._token_lora_indices.clamp(min=0), vocab_size, out=self._embeddings_indices)
        self.indices_len[:] = [len(tokens), len(sampled), len(sampled), len(tokens)]
        self._tokens.reset_for_batch(tokens)
        self._sampled.reset_for_batch(sampled)
        self.no_lora = not self._tokens.used_slots

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **kwargs: Any,
    ) -> None:
        """Add the LoRA update of a linear layer.

        The slices of y are adjacent columns.
        """
        _check_scale(scale)
        owning_layer_slots(lora_b_stacked[0]).add_linear_(
            _as_matrix(y), _as_matrix(x), self._tokens
        )

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        **kwargs: Any,
    ) -> None:
        """Add the output layer's LoRA update to the logits.

        The update is added to the first columns.

        Raises:
            ValueError: The rows are neither the sampled rows nor those of one request.
        """
        rows = self._sampled if self._one_request is None else self._one_request
        if rows is self._sampled:
            self._check_sampled_rows(x.shape[0])
        _check_scale(scale)
        owning_layer_slots(lora_b_stacked).add_linear_(_as_matrix(y), _as_matrix(x), rows)

    @contextmanager
    def logits_of_one_request(
        self, adapter: int, adapter_of_slot: Sequence[int | None]
    ) -> Iterator[None]:
        """Context manager for computing the logits of one request with the request's adapter.

        The adapter is applied to all rows of the logits. The context manager is used for the logits
        of prompts, which vLLM computes for one request at a time.

        Args:
            adapter: ID of the request's adapter. Zero stands for no adapter.
            adapter_of_slot: Adapter ID in each slot, or None for an empty slot.
        """
        slots = slots_of_rows((adapter,), adapter_of_slot)
        rows = torch.full_like(self._token_lora_indices, int(slots[0]))
        self._one_request = BatchRows(rows, self._sampled.count, False)
        self._one_request.reset_for_batch(slots)
        try:
            yield
        finally:
            self._one_request = None

    def _check_sampled_rows(self, m: int) -> None:
        sampled = self.indices_len[1]
        if is_being_compiled() or not self._sampled.used_slots or m == sampled:
            return
        raise ValueError(f"got {m} rows, expected the {sampled} sampled rows of the batch")

    def add_lora_embedding(
        self, y: torch.Tensor, x: torch.Tensor, lora_b_stacked: torch.Tensor, **kwargs: Any
    ) -> None:
        """Add the LoRA update of an embedding layer.

        x ``[M, R]`` contains the rows that were looked up in lora_a.
        """
        owning_layer_slots(lora_b_stacked).expand[0].add_(y, x, self._tokens)

    def add_shrink(
        self,
        y: tuple[torch.Tensor, ...] | torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        scale: float,
        **kwargs: Any,
    ) -> None:
        """Add the product of x and lora_a to y.

        The product of x and lora_a is the LoRA shrink output. Each row of x uses the lora_a of its
        own adapter. For each slice i, ``scale * x @ lora_a.T`` is added to ``y[i]``, which vLLM
        fills with zeros. ``scale`` must be 1, because `add_expand` multiplies by the scaling. vLLM
        calls this method if ``fully_sharded_loras`` is set.
        """
        _check_scale(scale)
        for own, products in zip(y, owning_layer_slots(lora_a_stacked[0]).shrink, strict=True):
            products.add_(own, _as_matrix(x), self._tokens)

    def add_expand(
        self,
        y: torch.Tensor,
        x: tuple[torch.Tensor, ...] | torch.Tensor,
        lora_b_stacked: tuple[torch.Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        **kwargs: Any,
    ) -> None:
        """Add the product of x and lora_b to y.

        ``scaling * x[i] @ lora_b.T`` is added to each slice i of y. vLLM calls this method if
        ``fully_sharded_loras`` is set.
        """
        y, start = _as_matrix(y), offset_start
        for own, products in zip(x, owning_layer_slots(lora_b_stacked[0]).expand, strict=True):
            products.add_(y[:, start : start + products.width], own, self._tokens)
            start += products.width

    def apply_lora_full_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        weight_stacked: torch.Tensor,
        bias_stacked: torch.Tensor,
        module_enabled: torch.Tensor,
    ) -> None:
        """Apply adapters' full linear layers to the rows whose adapters have one.

        The full linear layer of an adapter is its own classification head, which has a full weight
        and a bias instead of low-rank factors. The output of the head replaces the row of y. Rows
        are not changed if their adapter does not have its own head.

        Args:
            y: ``[M, labels]``.
            x: ``[M, K]``.
            weight_stacked: ``[slots, 1, labels, K]``.
            bias_stacked: ``[slots, labels]``.
            module_enabled: bool ``[slots]``, whether the adapter in each slot has its own head.

        Raises:
            ValueError: The rows are not the sampled rows.
        """
        self._check_sampled_rows(x.shape[0])
        slots = self._sampler_indices[: x.shape[0]]
        # Traced code and captured graphs serve every batch, so they compute every slot.
        is_eager = not (self._on_gpu or is_being_compiled())
        used = self._sampled.used_slots if is_eager else range(weight_stacked.shape[0])
        for slot in used:
            full = F.linear(x, weight_stacked[slot, 0]).float() + bias_stacked[slot].float()
            own = (slots == slot) & module_enabled[slot]
            y.copy_(torch.where(own.unsqueeze(1), full.to(y.dtype), y))


def _check_scale(scale: float) -> None:
    if scale != 1.0:
        raise ValueError(f"scale is {scale}, expected 1.0, because each slot has its own scaling")


def _as_matrix(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dim() == 2 else tensor.view(-1, tensor.shape[-1])
