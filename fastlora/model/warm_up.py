"""`warm_up`, which compiles the kernels of a model before its first request."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from fastlora.env import triton_interpreted
from fastlora.init.calibration_data import call_model, progress_bar
from fastlora.layers.shared_input import known_group
from fastlora.ops import execution_mode
from fastlora.ops.rows import sort_rows
from fastlora.routing.active import activate_routing
from fastlora.routing.caches import RoutingCache
from fastlora.routing.routers import router_of
from fastlora.routing.routing import Routing
from fastlora.user_warnings import warn
from fastlora.validation import ConfigError, check_is_module

if TYPE_CHECKING:
    from fastlora.kernels.precompile import KernelVariant

    _VariantsByKey = dict[str, KernelVariant]

_log = logging.getLogger("fastlora")
# Kernels' row tiles are multiples of this, so configs change only from one multiple to the next.
_ROW_STEP = 16
_SAMPLES = 2  # in the forward pass that shows which layers share an input
_MAX_PROCESSES = 16


@dataclass(frozen=True)
class WarmUpReport:
    """A report on what a warm-up of a model's kernels did.

    The report is the result of `warm_up`.

    Attributes:
        kernels: Number of kernels that the model launches.
        cached: Number of kernels that Triton's cache already had.
        failed: Name and error message of each kernel that could not be compiled.
        seconds: Duration of the warm-up, in seconds.
        reason: Reason why nothing was done, or an empty string.
    """

    kernels: int = 0
    cached: int = 0
    failed: tuple[tuple[str, str], ...] = ()
    seconds: float = 0.0
    reason: str = ""

    @property
    def compiled(self) -> int:
        """Number of kernels that the warm-up compiled."""
        return self.kernels - self.cached - len(self.failed)

    def __str__(self) -> str:
        if self.reason:
            return f"no kernels to compile: {self.reason}"
        failed = f", {len(self.failed)} failed" if self.failed else ""
        return (
            f"{self.kernels} kernels: {self.compiled} compiled in {self.seconds:.1f} s, "
            f"{self.cached} already cached{failed}"
        )


def warm_up(
    model: nn.Module,
    *,
    rows: int = 4096,
    adapters: int | None = None,
    ranks: Iterable[int] | None = None,
    inputs: Any = None,
    processes: int | None = None,
    show_progress_bar: bool = True,
) -> WarmUpReport:
    """Compile, ahead of time, the Triton kernels that a model needs for inference.

    After the warm-up, requests do not wait for compilation. The kernels are compiled into Triton's
    cache folder, in separate processes. Programs that start later reuse the compiled kernels. Which
    kernels the model launches is recorded from calls of its own layers, for few rows (decode) and
    for many (prefill). During these calls, no kernel runs.

    If a kernel cannot be compiled, or the process that compiles it dies, a warning names the
    kernel. The kernel is then compiled by the first request that needs it. If no Triton kernels run
    on the model's device, nothing is done, and one line is logged.

    No other thread may use Triton at the same time. The warm-up does not cover training, the
    batch-invariant mode, autocast, graphs of `torch.compile`, and the scales of DoRA adapters in a
    pool.

    Args:
        model: A `LoraModel`, a model with an `AdapterPool`, or a patched PEFT model. Outside of
            mixed batches, its active adapters are used.
        rows: Largest number of rows (tokens) in a forward pass.
        adapters: Largest number of adapters in a mixed batch (`fastlora.adapters`), or 0 if there
            are no mixed batches. None stands for all adapters of the model. For a pool, only 0
            makes a difference.
        ranks: Ranks of the adapters. None stands for the ranks of the model's adapters, or for all
            ranks up to the ``max_rank`` of a pool, or 64 if the pool has none.
        inputs: Inputs of a forward pass with at least two samples: a mapping of keyword arguments,
            a tuple of positional arguments, or a single argument, on the model's device. The
            forward pass shows which layers share an input. None uses ``input_ids``, as transformers
            models take them.
        processes: Maximum number of processes. None stands for the number of CPU cores, but at
            most 16.
        show_progress_bar: Whether to show a progress bar, if tqdm is installed and stderr is a
            terminal.

    Returns:
        A `WarmUpReport`. Converted to a string, it is a one-line summary.

    Raises:
        ConfigError: An argument is out of range, no adapter has any of the ranks, Triton's cache
            folder is not writable, or ``inputs`` is required or contains no tensor.
        UnsupportedLayerError: A layer does not support mixed batches.
        TypeError: The model has no adapters on linear layers, or is not a module.
    """
    check_is_module("warm_up", model)
    start = time.monotonic()
    wanted = ranks if ranks is None else sorted(set(ranks))
    checked = ("rows", rows, 1), ("adapters", adapters, 0), ("processes", processes, 1)
    for name, value, least in checked:
        if value is not None and value < least:
            raise ConfigError(f"{name} must be at least {least}, got {value}")
    if wanted is not None and (not wanted or wanted[0] < 1):
        raise ConfigError(f"ranks must be one or more integers, each at least 1, got {wanted}")
    reason = reason_without_kernels(_first_adapted_device(model))
    if reason:
        _log.warning("warm_up() compiles nothing: %s", reason)
        return WarmUpReport(reason=reason)
    check_kernel_cache_writable()
    from fastlora.kernels.precompile import compile_in_processes, is_cached

    variants = list(record_kernel_variants(model, rows, adapters, wanted, inputs).values())
    missing = [variant for variant in variants if not is_cached(variant)]
    failed: list[tuple[str, str]] = []
    if missing:
        count = _default_processes() if processes is None else processes
        made = compile_in_processes(missing, count)
        shows = show_progress_bar and _stderr_is_terminal()
        for variant, error in progress_bar(made, "Compiling kernels", shows, total=len(missing)):
            if error:
                failed.append((variant.name, error))
                warn(
                    f"kernel {variant.name} was not compiled ({error}); the first request that "
                    "needs it will compile it",
                )
    counts = len(variants), len(variants) - len(missing)
    return WarmUpReport(*counts, tuple(failed), time.monotonic() - start)


def reason_without_kernels(device: torch.device) -> str:
    """Return the reason why compiled kernels do not run on a device.

    The result is an empty string if they do run.
    """
    if triton_interpreted():
        return "TRITON_INTERPRET=1 is set"
    if execution_mode.auto_selects_kernels(device):
        return ""
    _, reason = execution_mode.triton_status(device.type, device.index or 0)
    return reason


def check_kernel_cache_writable() -> None:
    """Check that Triton's cache folder for kernels is writable.

    Raises:
        ConfigError: The cache folder is not writable.
    """
    from fastlora.kernels.precompile import cache_folder

    folder = cache_folder()
    if folder is None:
        return
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"Triton's cache folder {folder} is not writable ({error.strerror}); set "
            "TRITON_CACHE_DIR to a writable folder"
        ) from error


def _first_adapted_device(model: nn.Module) -> torch.device:
    """Return the device of the first layer with adapters."""
    for layer in _linear_layers(model):
        for parameter in layer.parameters():
            return parameter.device
    raise TypeError(
        f"warm_up() expects a model with adapters on linear layers, got a {type(model).__name__}"
    )


def _linear_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if getattr(module, "is_linear", False)]


def _default_processes() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(cores, _MAX_PROCESSES)


# -------------------------------------------------------------------------------------- recording


class _SharedInputLayers(NamedTuple):
    """Layers that share an input.

    Attributes:
        layers: The layers, in the order in which they are called.
        dtype: The dtype of the input.
    """

    layers: tuple[Any, ...]
    dtype: torch.dtype

    def run(self, rows: int) -> None:
        """Run the layers once on an input with the given number of rows.

        All layers receive the same tensor, which is uninitialized.
        """
        device = next(iter(self.layers[0].parameters())).device
        x = torch.empty(rows, self.layers[0].in_features, dtype=self.dtype, device=device)
        for layer in self.layers:
            layer(x)

    @property
    def in_and_out_features_per_layer(self) -> tuple[tuple[int, int], ...]:
        """The ``in_features`` and ``out_features`` of each layer."""
        return tuple((layer.in_features, layer.out_features) for layer in self.layers)


@torch.no_grad()
def record_kernel_variants(
    model: nn.Module,
    rows: int,
    adapters: int | None = None,
    ranks: Sequence[int] | None = None,
    inputs: Any = None,
) -> _VariantsByKey:
    """Record which kernel variants a model launches during inference, without running the kernels.

    To find the variants, the model and its layers are run. During these runs, each kernel launch is
    recorded instead of being executed, and no kernel is compiled. The result is a dict indexed by
    `KernelVariant.key`. The arguments are those of `warm_up`.
    """
    from fastlora.kernels.chips import chip_of
    from fastlora.kernels.mixed_rows_sort import MAX_IDS
    from fastlora.kernels.precompile import record_variants

    device = _first_adapted_device(model)
    mixed = [] if adapters == 0 else router_of(model).sample_routings(adapters, ranks)
    if ranks is not None and adapters != 0 and not mixed:
        raise ConfigError(f"no adapter in the model has any of the ranks {list(ranks)}")
    found: _VariantsByKey = {}
    with (
        _in_evaluation_mode(model),
        record_variants(chip_of(device)) as launched,
        _sort_with_pytorch_instead_of_kernel(),
    ):
        groups = _groups_after_forward_passes(model, mixed[:1], inputs)
        # Layers that did not know their group yet ran alone, as they never will again.
        launched.clear()
        searched: list[int] = []
        for routing in (None, *mixed):
            around: Any = contextlib.nullcontext() if routing is None else activate_routing(routing)
            with around:
                for group in _groups_with_distinct_launches(groups, rows, launched):
                    searched += _bisect_variant_changes(group, rows, launched, searched)
                found |= launched
                launched.clear()
    with record_variants(chip_of(device)) as launched:
        for routing in mixed[:1]:
            # Ids of samples, and ids of tokens, which are sorted by another kernel.
            for count in (1, min(rows, MAX_IDS)):
                ids = torch.zeros(count, dtype=torch.int64, device=device)
                sort_rows(ids, count, len(routing.names), device)
        found |= launched
    return found


def _groups_after_forward_passes(
    model: nn.Module, mixed_routings: Sequence[Routing], inputs: Any
) -> list[_SharedInputLayers]:
    """Run forward passes of a model, and return the groups of its layers that share an input.

    Layers share an input if they receive the same tensor. After two forward passes, each layer
    knows its group. Mixed batches additionally track the rows of their first forward pass, which
    the first request then does not have to do.
    """
    given = _default_token_ids(model) if inputs is None else inputs
    dtypes: dict[Any, torch.dtype] = {}

    def remember(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        dtypes[layer] = next(iter((*args, *kwargs.values()))).dtype

    contexts: list[Any] = [contextlib.nullcontext()]
    for routing in mixed_routings:
        ids = routing.ids.new_zeros(_sample_count(given))
        contexts.append(activate_routing(replace(routing, ids=ids, cache=RoutingCache())))
    for context in contexts:
        with context:
            handles = [
                layer.register_forward_pre_hook(remember, with_kwargs=True)
                for layer in _linear_layers(model)
            ]
            try:
                call_model(model, given)
            finally:
                for handle in handles:
                    handle.remove()
            call_model(model, given)
    found: dict[tuple[int, ...], _SharedInputLayers] = {}
    for layer, dtype in dtypes.items():
        group = known_group(layer)
        members = [layer] if group is None else [member() for member in group.members]
        own = tuple(member for member in members if member is not None)
        found[tuple(map(id, own))] = _SharedInputLayers(own, dtype)
    return list(found.values())


def _default_token_ids(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the token ids that `warm_up` passes to a model by default.

    The result is a dict with the keyword argument ``input_ids``, which transformers models accept.

    Raises:
        ConfigError: The model does not take token ids.
    """
    embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
    if embeddings is None:
        raise ConfigError(
            f"{type(model).__name__} might not accept input_ids; use inputs= to pass the arguments "
            "for a forward pass"
        )
    ids = torch.zeros(_SAMPLES, 8, dtype=torch.int64, device=embeddings.weight.device)
    return {"input_ids": ids}


def _sample_count(inputs: Any) -> int:
    """Return the number of samples in the inputs of a forward pass.

    Raises:
        ConfigError: The inputs contain no tensor.
    """
    if isinstance(inputs, Mapping):
        inputs = tuple(inputs.values())
    tensors = inputs if isinstance(inputs, (tuple, list)) else [inputs]
    for value in tensors:
        if isinstance(value, torch.Tensor):
            return len(value)
    raise ConfigError("inputs must contain a tensor with a row for each sample")


def _groups_with_distinct_launches(
    groups: Sequence[_SharedInputLayers], rows: int, launch_record: _VariantsByKey
) -> list[_SharedInputLayers]:
    """Return one group of layers for each combination of layer sizes, dtype, and kernels.

    The kernels are those that the layers launch, and the dtype is that of their input. If several
    groups agree in all of these, the result contains the first one. Groups that launch no kernel
    are left out. All groups run with 1 row and with ``rows``. In a Llama-8B, there are four such
    groups.
    """
    found: dict[object, _SharedInputLayers] = {}
    for group in groups:
        kernels = tuple(
            _run_and_list_kernel_keys(group, count, launch_record) for count in (1, rows)
        )
        if not any(kernels):
            continue
        found.setdefault((group.in_and_out_features_per_layer, group.dtype, kernels), group)
    return list(found.values())


def _bisect_variant_changes(
    group: _SharedInputLayers,
    rows: int,
    launch_record: _VariantsByKey,
    extra_row_counts: Sequence[int],
) -> list[int]:
    """Use bisection to find the row counts at which a group's kernel variants change.

    The launched kernels are recorded. The group is run with enough row counts to launch all of its
    kernels for 1 to ``rows`` rows. The row counts at which the kernels change are found by
    bisection between powers of two. If two row counts launch the same kernels, the row counts
    between them are assumed to launch these kernels too.

    Args:
        group: The layers to run.
        rows: The largest row count.
        launch_record: The dict in which launches are recorded.
        extra_row_counts: Row counts with which the group is run too: the results for other groups.

    Returns:
        The last tested row count before each change.
    """
    marks = {1, rows, *(mark for mark in extra_row_counts if mark <= rows)}
    power = 2
    while power < rows:
        marks |= {power, power + 1}
        power *= 2
    known = {mark: _run_and_list_kernel_keys(group, mark, launch_record) for mark in sorted(marks)}
    ordered = sorted(known)
    changes: list[int] = []
    pairs = list(zip(ordered, ordered[1:], strict=False))
    while pairs:
        low, high = pairs.pop()
        if known[low] == known[high]:
            continue
        step = 1 if high <= _ROW_STEP else _ROW_STEP
        middle = (low + high) // (2 * step) * step
        if not low < middle < high:
            changes.append(low)
            continue
        known[middle] = _run_and_list_kernel_keys(group, middle, launch_record)
        pairs += [(low, middle), (middle, high)]
    return changes


def _run_and_list_kernel_keys(
    group: _SharedInputLayers, rows: int, launch_record: _VariantsByKey
) -> frozenset[str]:
    """Run a group of layers, and return the keys of the kernels that the layers launch."""
    others = dict(launch_record)
    launch_record.clear()
    group.run(rows)
    found = frozenset(launch_record)
    launch_record.update(others)
    return found


@contextlib.contextmanager
def _sort_with_pytorch_instead_of_kernel() -> Iterator[None]:
    """Context manager under which PyTorch, not a Triton kernel, sorts the rows of mixed batches.

    In the ``with`` block, kernels are only recorded. PyTorch may use the result of the sort as
    indices, so the result must not be the uninitialized output of a kernel that is only recorded.
    """
    from fastlora.kernels import mixed_rows_sort

    before = mixed_rows_sort.can_sort
    mixed_rows_sort.can_sort = lambda ids, slots: False
    try:
        yield
    finally:
        mixed_rows_sort.can_sort = before


@contextlib.contextmanager
def _in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _stderr_is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()
