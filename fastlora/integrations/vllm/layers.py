"""The functions that replace or wrap methods of vLLM's LoRA layers, batches, and managers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import fields
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fastlora.integrations.vllm.slots import LayerSlots, owning_layer_slots

_Factor = torch.Tensor | None
# The attribute of a lora_b that holds the scaling that vLLM would multiply it by.
_SCALING = "fastlora_scaling"
# Fields of a config that change the update.
_UPDATE_FIELDS = {"rank_pattern", "alpha_pattern", "lora_bias"}


def replacement(
    layer_class_name: str, method: str, original: Callable[..., Any]
) -> Callable[..., Any]:
    """Return the replacement for a method of a vLLM LoRA layer class."""
    if method == "create_lora_weights":
        return _creating_slots(original)
    if method == "reset_lora":
        return (
            _reset_embedding
            if layer_class_name == "VocabParallelEmbeddingWithLoRA"
            else _reset_lora
        )
    setters: dict[str, Callable[..., Any]] = {
        "MergedColumnParallelLinearWithLoRA": _set_slices,
        "MergedColumnParallelLinearVariableSliceWithLoRA": _split_and_set_slices,
        "VocabParallelEmbeddingWithLoRA": _set_embedding,
        "LogitsProcessorWithLoRA": _set_logits,
    }
    return setters.get(layer_class_name, _set_one_slice)


def _creating_slots(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_lora_weights(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        _replace_stacks_with_layer_slots(self)

    return create_lora_weights


def _replace_stacks_with_layer_slots(layer: Any) -> None:
    """Create the `LayerSlots` of a vLLM LoRA layer.

    The layer then stores its adapters in the `LayerSlots`, because its stacks of factors are
    replaced with views of the `LayerSlots`. The lora_a of an embedding layer is not replaced. If
    the layer already has a `LayerSlots`, this function does nothing.
    """
    stacks_b = _as_list(layer.lora_b_stacked)
    if hasattr(stacks_b[0], "fastlora_slots"):
        return
    # An embedding looks rows up in its lora_a, [slots, vocabulary, rank].
    stack_a = _as_list(layer.lora_a_stacked)[0]
    slots = LayerSlots(stack_a if stack_a.dim() == 4 else None, stacks_b)
    stacked_a, stacked_b = slots.stacked_factors()
    single = isinstance(layer.lora_b_stacked, torch.Tensor)
    layer.lora_b_stacked = stacked_b[0] if single else stacked_b
    if stacked_a:
        layer.lora_a_stacked = stacked_a[0] if single else stacked_a


def _as_list(value: Any) -> list[Any]:
    return [value] if isinstance(value, torch.Tensor) else list(value)


def _slots(layer: Any) -> LayerSlots:
    return owning_layer_slots(_as_list(layer.lora_b_stacked)[0])


def _reset_lora(self: Any, index: int) -> None:
    _slots(self).clear(index)


def _reset_embedding(self: Any, index: int) -> None:
    if not _slots(self).is_empty(index):
        self.lora_a_stacked[index] = 0
    _reset_lora(self, index)


def _set_one_slice(self: Any, index: int, lora_a: torch.Tensor, lora_b: torch.Tensor) -> None:
    scaling = _scaling(lora_b)
    if self.tp_size > 1:
        own_a, own_b = self.slice_lora_a(lora_a), self.slice_lora_b(lora_b)
        ((lora_a,), (lora_b,)) = _shards(self, [lora_a], [lora_b], [own_a], [own_b])
    _slots(self).write(index, [lora_a], [lora_b], [scaling])


def _shards(
    layer: Any,
    lora_a: Sequence[_Factor],
    lora_b: Sequence[_Factor],
    lora_a_sharded_by_vllm: Sequence[_Factor],
    lora_b_sharded_by_vllm: Sequence[_Factor],
) -> tuple[list[Any], list[Any]]:
    """Return this process's shards of a layer's factors.

    The result is a tuple of two lists, one for lora_a and one for lora_b. Each list has one entry
    for each slice of the layer. vLLM shards all factors, and the result contains vLLM's shards.
    However, the factors of vLLM's warm-up adapters have the shape of a shard even before vLLM
    shards them. These factors are returned as they were.

    Args:
        layer: The layer.
        lora_a: For each slice, the lora_a that vLLM passes.
        lora_b: For each slice, the lora_b that vLLM passes.
        lora_a_sharded_by_vllm: For each slice, lora_a as vLLM shards it.
        lora_b_sharded_by_vllm: For each slice, lora_b as vLLM shards it.
    """
    found_a, found_b = list[Any](lora_a_sharded_by_vllm), list[Any](lora_b_sharded_by_vllm)
    for index, (down, up) in enumerate(zip(lora_a, lora_b, strict=True)):
        features = layer.lora_a_stacked[index].shape[3]
        width = layer.lora_b_stacked[index].shape[2]
        for found, whole, axis, size in ((found_a, down, 1, features), (found_b, up, 0, width)):
            if whole is not None and found[index].shape[axis] != size == whole.shape[axis]:
                found[index] = whole
    return found_a, found_b


def _set_logits(self: Any, index: int, lora_a: torch.Tensor, lora_b: torch.Tensor) -> None:
    scaling, padding = _scaling(lora_b), self.base_layer.vocab_size - lora_b.shape[0]
    if lora_b.shape[0] == self.org_vocab_size and padding > 0:
        # Added tokens of the layer's vocabulary have no update.
        lora_b = F.pad(lora_b, (0, 0, 0, padding))
    _slots(self).write(index, [lora_a], [lora_b], [scaling])


def _set_embedding(self: Any, index: int, lora_a: torch.Tensor, lora_b: torch.Tensor) -> None:
    vocabulary = self.lora_a_stacked.shape[1]
    if lora_a.dim() != 2 or lora_a.shape[1] != vocabulary:
        raise ValueError(f"lora_A has shape {tuple(lora_a.shape)}, expected [rank, {vocabulary}]")
    _slots(self).write(index, [lora_a], [lora_b], [_scaling(lora_b)])
    self.lora_a_stacked[index] = 0
    self.lora_a_stacked[index, :, : lora_a.shape[0]].copy_(lora_a.t(), non_blocking=True)


def _set_slices(
    self: Any, index: int, lora_a: Sequence[_Factor], lora_b: Sequence[_Factor]
) -> None:
    scalings: Sequence[float | None] = [None if b is None else _scaling(b) for b in lora_b]
    if len(lora_b) != self.n_slices:
        # A factor that covers several slices is split. Its scaling is that of all its slices.
        scalings, _ = self.expand_packed_lora(scalings, lora_b)
        lora_a, lora_b = self.expand_packed_lora(lora_a, lora_b)
    if self.tp_size > 1:
        own_a, own_b = self.slice_lora_a(lora_a), self.slice_lora_b(lora_b)
        lora_a, lora_b = _shards(self, lora_a, lora_b, own_a, own_b)
    _slots(self).write(index, lora_a, lora_b, [1.0 if s is None else s for s in scalings])


def _split_and_set_slices(
    self: Any,
    index: int,
    lora_a: torch.Tensor | Sequence[_Factor],
    lora_b: torch.Tensor | Sequence[_Factor],
) -> None:
    """Split an adapter's factors into slices, and set the slices in the slot ``index``.

    A merged linear layer has one slice for each of its output sizes. A single lora_b is split. A
    single lora_a is used for all slices.
    """
    if isinstance(lora_b, torch.Tensor):
        sizes = self.base_layer.output_sizes
        parts = [lora_b[end - n : end] for n, end in zip(sizes, accumulate(sizes), strict=True)]
        scaling = _scaling(lora_b)
        # vLLM's warm-up adapters have the rows of the first slice only.
        lora_b = [_with_scaling(part, scaling) if part.shape[0] else None for part in parts]
    if isinstance(lora_a, torch.Tensor):
        lora_a = [lora_a] * self.n_slices
    _set_slices(self, index, lora_a, lora_b)


# ------------------------------------------------------------------------------------- the scaling


def keep_scaling_apart(self: Any) -> Any:
    """Keep the LoRA scaling separate from lora_b instead of multiplying lora_b by it.

    vLLM's method ``LoRALayerWeights.optimize``, which this function replaces, multiplies lora_b by
    the scaling. In 16-bit dtypes, this product would be rounded.
    """
    if self.scaling != 1:
        _with_scaling(self.lora_b, _scaling(self.lora_b) * self.scaling)
        self.scaling = 1
    return self


def _with_scaling(lora_b: torch.Tensor, scaling: float) -> torch.Tensor:
    setattr(lora_b, _SCALING, scaling)
    return lora_b


def _scaling(lora_b: torch.Tensor) -> float:
    return float(getattr(lora_b, _SCALING, 1.0))


# ------------------------------------------------------------------------------ prompts' logits


def with_prompt_logprobs_by_request(get_prompt_logprobs: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``GPUModelRunner._get_prompt_logprobs_dict`` so that each request uses its own adapter.

    The wrapped method runs once per request. vLLM computes the logits of one request's prompt at a
    time, but its LoRA backends only know the adapters of the sampled rows.
    """

    def _get_prompt_logprobs_dict(self: Any, hidden_states: Any, num_scheduled_tokens: Any) -> Any:
        manager = getattr(self, "lora_manager", None)
        if not manager or not self.num_prompt_logprobs:
            return get_prompt_logprobs(self, hidden_states, num_scheduled_tokens)
        adapters, unfinished = manager._adapter_manager, self.num_prompt_logprobs
        found: dict[str, Any] = {}
        wrappers = set(adapters.punica_wrapper_mapping.values())
        try:
            for request in [name for name in unfinished if name in num_scheduled_tokens]:
                self.num_prompt_logprobs = {request: unfinished[request]}
                lora = self.requests[request].lora_request
                with ExitStack() as stack:
                    for each in wrappers:
                        own = (lora.lora_int_id if lora else 0, adapters.lora_index_to_id)
                        stack.enter_context(each.logits_of_one_request(*own))
                    found |= get_prompt_logprobs(self, hidden_states, num_scheduled_tokens)
                if not self.num_prompt_logprobs:
                    del unfinished[request]
        finally:
            self.num_prompt_logprobs = unfinished
        return found

    return _get_prompt_logprobs_dict


# ----------------------------------------------------------------------- the adapters of a batch


def with_one_lora_request_per_adapter_id(
    make_batch_lora_inputs: Callable[..., Any],
) -> Callable[..., Any]:
    """Wrap ``InputBatch.make_lora_inputs`` so that it returns one LoRA request per adapter ID.

    vLLM puts the LoRA requests into a set, in which LoRA requests with the same adapter name are
    equal. If an adapter is unloaded and another one is loaded under its name, requests for both
    adapters can run together, and vLLM would activate only one of the two adapters.
    """

    def make_lora_inputs(
        self: Any, num_scheduled_tokens: Any, num_sampled_tokens: Any
    ) -> tuple[Any, Any, tuple[Any, ...]]:
        sampled, tokens, _ = make_batch_lora_inputs(self, num_scheduled_tokens, num_sampled_tokens)
        return sampled, tokens, tuple(self.lora_id_to_lora_request.values())

    return make_lora_inputs


def one_lora_request_per_adapter_id(lora_state: Any, req_ids: Sequence[str]) -> tuple[Any, ...]:
    """Return one LoRA request per adapter ID for the given requests.

    The adapter IDs are those that the requests use. This function replaces
    ``LoraState.get_activate_loras`` of model runner V2. vLLM's method can omit an adapter, for the
    reason given in `with_one_lora_request_per_adapter_id`.
    """
    found = (lora_state.lora_requests.get(name) for name in req_ids)
    return tuple({each.lora_int_id: each for each in found if each is not None}.values())


# ----------------------------------------------------------------------- checks of a loaded adapter


def with_adapter_checks(load_adapter: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap vLLM's adapter-loading method so that it also checks the adapter.

    The wrapped method is ``WorkerLoRAManager._load_adapter``. The adapter's config is checked
    before the adapter is loaded, and its factors are checked afterward.
    """

    def _load_adapter(self: Any, lora_request: Any) -> Any:
        check_no_config_fields_vllm_ignores(lora_request.lora_path, lora_request.lora_name)
        lora = load_adapter(self, lora_request)
        check_factors_fit_model(lora, self._adapter_manager, lora_request.lora_name)
        return lora

    return _load_adapter


def check_no_config_fields_vllm_ignores(lora_path: str, lora_name: str) -> None:
    """Raise `ValueError` if an adapter's config sets a field that vLLM ignores.

    The checked fields all affect the LoRA update: ``rank_pattern``, ``alpha_pattern``, and
    ``lora_bias``. vLLM 0.31 ignores all three.
    """
    helper = import_module("vllm.lora.peft_helper").PEFTHelper
    known = {field.name for field in fields(helper)}
    absolute = import_module("vllm.lora.utils").get_adapter_absolute_path(lora_path)
    file = Path(absolute) / "adapter_config.json"
    if known >= _UPDATE_FIELDS or not file.is_file():
        return
    config = json.loads(file.read_text(encoding="utf-8"))
    ignored = sorted(field for field in _UPDATE_FIELDS - known if config.get(field))
    if ignored:
        raise ValueError(
            f"adapter {lora_name!r}: this version of vLLM ignores {', '.join(ignored)}"
        )


def check_factors_fit_model(lora: Any, manager: Any, adapter_name: str) -> None:
    """Check that the factors of an adapter fit the layers of the model.

    This function is called before the adapter is loaded into a slot. The factors of experts are not
    checked.

    Raises:
        ValueError: A factor is missing, is not finite, has the wrong shape, or has too high a rank.
    """
    shapes = _allowed_in_out_features_by_module(manager)
    for module, weights in lora.loras.items():
        if ".experts" in module:
            continue
        down, up = weights.lora_a, weights.lora_b
        where = f"adapter {adapter_name!r}, module {module!r}"
        if down is None or up is None:
            raise ValueError(f"{where}: lora_{'A' if down is None else 'B'} is missing")
        if down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1]:
            raise ValueError(
                f"{where}: lora_A has shape {tuple(down.shape)} and lora_B has shape "
                f"{tuple(up.shape)}, expected [rank, in_features] and [out_features, rank]"
            )
        if down.shape[0] > manager.lora_config.max_lora_rank:
            raise ValueError(
                f"{where}: rank {down.shape[0]} is greater than "
                f"max_lora_rank={manager.lora_config.max_lora_rank}"
            )
        # The names in a pooling model's adapters may lack the prefix.
        expected = shapes.get(module, shapes.get(f"model.{module}"))
        found = down.shape[1], up.shape[0]
        if expected is not None and (found[0] != expected[0] or found[1] not in expected[1:]):
            outputs = " or ".join(map(str, expected[1:]))
            raise ValueError(
                f"{where}: the factors fit a layer with {found[0]} inputs and {found[1]} outputs, "
                f"but the layer has {expected[0]} inputs and {outputs} outputs"
            )
        if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
            raise ValueError(f"{where}: a factor contains non-finite values")


def _allowed_in_out_features_by_module(manager: Any) -> dict[str, tuple[int, ...]]:
    """Return the allowed numbers of input and output features for each module.

    The modules are those that can appear in an adapter file. The result maps a module's name to a
    tuple ``(in_features, out_features, ...)``. Several values of out_features are allowed for an
    output layer with a padded vocabulary, and for a part of a layer that has more slices than
    parts.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name, layer in manager.modules.items():
        base = layer.base_layer
        if hasattr(layer, "hidden_size") and hasattr(base, "vocab_size"):
            found[name] = layer.hidden_size, base.vocab_size, base.org_vocab_size
        elif hasattr(base, "org_vocab_size"):
            found[name] = base.org_vocab_size, base.embedding_dim
        elif hasattr(layer, "n_slices") and hasattr(base, "input_size"):
            members, sizes = manager.packed_modules.get(name, ()), _unsharded_output_sizes(base)
            # An adapter may name the fused layer itself.
            found[name] = base.input_size, sum(sizes)
            if len(sizes) == len(members):
                pairs = zip(members, sizes, strict=True)
                found |= {member: (base.input_size, size) for member, size in pairs}
            else:
                starts = range(len(sizes))
                adjacent = {sum(sizes[i : j + 1]) for i in starts for j in starts[i:]}
                found |= {member: (base.input_size, *sorted(adjacent)) for member in members}
    return found


def _unsharded_output_sizes(base: Any) -> list[int]:
    """Return the output sizes that a layer would have without sharding.

    The result has one size for each slice of the layer.
    """
    if hasattr(base, "total_num_kv_heads"):
        # Processes may have copies of key and value heads, which output_sizes counts.
        heads, kv_heads = base.total_num_heads, base.total_num_kv_heads
        return [heads * base.head_size, kv_heads * base.head_size, kv_heads * base.v_head_size]
    return list(getattr(base, "output_sizes", [base.output_size]))
