"""`ExecutionMode`: how a forward pass runs, which is determined once when it begins.

It states which implementation runs (the Triton kernels or plain PyTorch), whether
`torch.compile` traces the forward pass, which dtype autocast uses, and whether the batch-invariant
mode is on. In that mode, the result of a row does not depend on the other rows of its batch.

``with fastlora.batch_invariant():`` applies to LoRA linears without gradients, with one adapter or
in a mixed batch. Each row has the same bits for any number of rows, at any position, next to any
adapters, with any largest rank, and whether or not layers such as q, k, and v shared a shrink.
Bitwise equality is claimed for GPUs only, and only as far as the native test has been run.

The mode works because every batch uses the same kernel, tile, split of K, and plan, and no
arithmetic on other rows reaches a row's accumulator (`docs/dev/decisions.md`, Kernels). A LoRA
linear that cannot run this way raises `ImplementationError`. All other modules (attention, norms,
an unadapted lm_head) run in PyTorch, as they do outside the mode.

Nothing here imports Triton.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, Protocol, TypeVar

import torch
from torch import nn
from torch.autograd import forward_ad

from fastlora import env
from fastlora.validation import ImplementationError

IMPLEMENTATIONS = ("auto", "triton", "eager")

# Device types on which "auto" selects the kernels, if the kernels run there.
KERNEL_DEVICES: tuple[str, ...] = ("cuda",)
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_PLAIN = (torch.Tensor, nn.Parameter)
# Device types that support autocast in every build of torch.
_USUAL_DEVICES = ("cpu", "cuda")
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = env.triton_interpreted()


def is_forward_ad_active() -> bool:
    """Return whether forward-mode automatic differentiation is active.

    fastlora's autograd functions raise an error in this mode. Kernels and registered operators are
    not used in it, because their results would have no tangents.
    """
    level: int = forward_ad._current_level
    return level >= 0


def raise_for_second_derivative() -> NoReturn:
    """Raise `RuntimeError` for a backward pass that runs with ``create_graph=True``.

    The backward passes of fastlora's autograd functions call this function if gradients are
    enabled. Without the error, a second derivative would lack the contribution of these functions.
    PyTorch's `once_differentiable` detects only some of these cases.
    """
    raise RuntimeError(
        "fastlora's layers support first derivatives only; do not pass create_graph=True, or use "
        "PEFT's layers, which fastlora.unpatch(model) restores in a patched PEFT model"
    )


def raise_if_gradients_are_batched(
    grads: Iterable[torch.Tensor | None], error: RuntimeError
) -> None:
    """Raise `RuntimeError` if a backward pass failed because its gradients are batched.

    Autograd batches gradients with vmap if ``is_grads_batched=True`` or ``vectorize=True`` is
    passed. PyTorch's errors do not say so.

    Args:
        grads: The incoming gradients of the backward pass.
        error: The error that it raised.
    """
    functorch = torch._C._functorch
    tensors = [grad for grad in grads if grad is not None]
    if any(functorch.is_legacy_batchedtensor(t) or functorch.is_batchedtensor(t) for t in tensors):
        raise RuntimeError(
            "fastlora's layers do not support batched gradients (is_grads_batched=True, "
            "vectorize=True) in mixed batches, with DoRA, with active dropout, or when the kernels "
            "are used; compute one gradient at a time"
        ) from error


class _BatchInvariantState(threading.local):
    """The state of batch-invariant mode.

    Each thread has its own.
    """

    def __init__(self) -> None:
        # Not a class attribute: compiled graphs check only attributes of instances again.
        self.invariant = env.batch_invariant()


_batch_invariant_state = _BatchInvariantState()

_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant_when_compiled(function: _Function) -> _Function:
    """Decorator that makes `torch.compile` treat a function's result as a constant.

    The function is called while the graph is traced. The decorator has the effect of
    `torch.compiler.assume_constant_result`, but does not import the compiler, which takes longer to
    import than torch itself.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@functools.cache
def _gpu_support_and_description(index: int) -> tuple[bool, str]:
    """Return whether the kernels support a GPU, and a description of the GPU.

    The result is a tuple (is supported, description). The description states the GPU's name and
    architecture. If the GPU is not supported, the description also states the reason. ``index`` is
    the index of the GPU.
    """
    properties = torch.cuda.get_device_properties(index)
    from fastlora.kernels import chips

    chip = chips.chip_of(torch.device("cuda", index))
    if not chip.is_supported:
        return False, f"{properties.name} is {chip.arch}, for which there are no kernel configs"
    return True, f"{properties.name} ({chip.arch})"


@constant_when_compiled
def triton_status(device_type: str, index: int = 0) -> tuple[bool, str]:
    """Return whether the Triton kernels can run on a device.

    The result is a tuple (runs, explanation). If the kernels cannot run, the explanation states the
    reason. If they can run, it describes the GPU, or says that they run in Triton's interpreter.

    Args:
        device_type: ``"cpu"``, ``"cuda"`` (also for ROCm), or any other device type of torch.
        index: Index of the device within its type.
    """
    if not _HAS_TRITON:
        return False, "triton is not installed"
    if device_type == "cuda":
        return _gpu_support_and_description(index)
    if _INTERPRETED:
        return True, "TRITON_INTERPRET=1: the kernels run in Triton's interpreter"
    return False, f"no Triton kernels for device type {device_type!r}"


def auto_selects_kernels(device: torch.device) -> bool:
    """Return whether ``impl="auto"`` selects Triton kernels on a device.

    The result is for dtypes that the kernels support.
    """
    return device.type in KERNEL_DEVICES and triton_status(device.type, device.index or 0)[0]


def is_being_compiled() -> bool:
    """Return whether `torch.compile` is compiling the caller."""
    return torch.compiler.is_compiling()


def is_traced(x: torch.Tensor) -> bool:
    """Return whether operations on x are being traced.

    The result is True while a compiler traces the operations, because the values of x are then
    unknown. The function does not detect `torch.jit.trace`, which records real values.
    """
    return torch.compiler.is_compiling() or type(x) not in _PLAIN


def has_unknown_values(x: torch.Tensor) -> bool:
    """Return whether the values of x are unknown, as for a meta tensor or a traced tensor.

    The values cannot be read if x is on the meta device, or while a compiler traces operations on
    x. The function does not detect the capture of a CUDA graph.
    """
    return x.is_meta or is_traced(x)


def disable_autocast_on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context manager that disables autocast for a device.

    `torch.autocast` does not support the meta device.
    """
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def operators_are_observed(
    x: torch.Tensor, in_autograd_function: bool = False, by_profiler: bool = True
) -> bool:
    """Return whether something, such as autograd, observes the operators that are applied to x.

    Compilers and other tracers, dispatch modes, profilers, autograd, and functorch transforms
    observe operators: they intercept or record the calls. If ``in_autograd_function`` is set,
    autograd is ignored, because it records nothing inside an autograd function. If ``by_profiler``
    is False, profilers are ignored.
    """
    return bool(
        torch.compiler.is_compiling()
        or type(x) not in _PLAIN
        or (torch.is_grad_enabled() and not in_autograd_function)
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.maybe_current_level() is not None
        or torch._C._get_tracing_state() is not None
        or (by_profiler and torch.autograd._profiler_enabled())
    )


def dispatch_mode_may_keep_results(x: torch.Tensor) -> bool:
    """Return whether a dispatch mode may keep the results of operations on x.

    Selective activation checkpointing is such a mode. It saves the results of some operators for
    the recomputation, so nothing may be written into these results. Code that writes into the
    result of a matrix product has to copy it first.
    """
    return not has_unknown_values(x) and bool(torch._C._len_torch_dispatch_stack())


def call_on_device_of(x: torch.Tensor, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function with the current device set to x's device.

    The function launches kernels. A profiler shows the call as ``fastlora::`` and the function's
    name.
    """
    if torch.autograd._profiler_enabled():
        with (
            torch.profiler.record_function(f"fastlora::{function.__name__}"),
            torch.cuda.device(x.device if x.is_cuda else -1),
        ):
            return function(*args)
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return function(*args)
    with torch.cuda.device(x.device):
        return function(*args)


def resolve_impl(
    impl: str, x: torch.Tensor, dtype: torch.dtype | None = None
) -> Literal["triton", "eager"]:
    """Return the name of the implementation that runs on x.

    The name is ``"triton"`` or ``"eager"``. `execution_mode_of` resolves all other cases itself.

    Args:
        impl: ``"triton"``, or ``"auto"`` on a device in `KERNEL_DEVICES`.
        x: The input.
        dtype: The dtype of the computation, or None for x's dtype.

    Raises:
        ValueError: ``impl`` is not one of `IMPLEMENTATIONS`.
        ImplementationError: ``impl`` is ``"triton"``, and the kernels cannot run on x. If an
            implementation is requested by name, no other one replaces it.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    device = x.device
    runs, reason = triton_status(device.type, device.index or 0)
    dtype = dtype or x.dtype
    if runs and dtype not in KERNEL_DTYPES:
        runs, reason = False, f"the kernels support fp16, bf16 and fp32, got {dtype}"
    if runs and forward_ad._current_level >= 0:  # inline, because every layer's call gets here
        runs, reason = False, "the kernels do not support forward-mode differentiation"
    if runs:
        return "triton"
    if impl == "triton":
        raise ImplementationError(f"impl='triton' cannot be used: {reason}")
    return "eager"


class _Layer(Protocol):
    in_features: int
    out_features: int

    def get_base_layer(self) -> nn.Module: ...


@dataclass(frozen=True, slots=True)  # Slots are read several times faster than a NamedTuple.
class ExecutionMode:
    """The conditions under which a forward pass runs, such as compilation and autocast.

    The object states whether compilation, tracing, autocast, and batch invariance are active. It
    also names the backend that executes the forward pass: Triton kernels or plain PyTorch.

    Attributes:
        impl: ``"triton"`` or ``"eager"``. In batch-invariant mode this is the requested
            implementation, which `check_supports_batch_invariance` checks.
        backend: The backend's name in `fastlora.ops.backend.BACKENDS`. In batch-invariant mode
            it is always ``"triton"``.
        compiling: Whether `torch.compile` traces the forward pass.
        invariant: Whether batch-invariant mode is on, or the call requests its plan.
        autocast: The dtype of autocast, or None if autocast is off.
        tracing: Whether the modules run their own ``forward`` in plain PyTorch. This is the case if
            x is a nested tensor, or if `torch.jit.trace` records the forward pass, directly or for
            the ONNX exporter.
    """

    impl: str
    backend: str
    compiling: bool
    invariant: bool
    autocast: torch.dtype | None
    tracing: bool = False

    def raise_if_batch_invariant(self, layer: _Layer, reason: str) -> None:
        """Raise an `ImplementationError` if batch-invariant mode is on.

        This is called for a layer that cannot run in this mode. ``reason`` says why it cannot.
        """
        if self.invariant:
            base = layer.get_base_layer()
            raise ImplementationError(
                f"{type(layer).__name__} with base layer {type(base).__name__} "
                f"({layer.in_features} to {layer.out_features} features) cannot run in "
                f"batch-invariant mode: {reason}"
            )

    def check_supports_batch_invariance(
        self, x: torch.Tensor, plan: str = "auto", dropout_p: float = 0.0
    ) -> None:
        """Raise an exception if a call cannot run in batch-invariant mode.

        Only the Triton kernels can run in this mode. Call this method only if the mode is on or
        requested, because the check itself does not depend on whether the mode is on.

        Raises:
            ImplementationError: The kernels cannot handle the call in this mode.
            ValueError: The requested implementation does not exist.
        """
        impl = self.impl
        if impl == "eager" or plan not in ("auto", "fused", "invariant"):
            asked = f"impl={impl!r}" if impl == "eager" else f"plan={plan!r}"
            raise ImplementationError(
                f"{asked} cannot run in batch-invariant mode: the results of PyTorch's GEMMs "
                "depend on the number of rows"
            )
        if dropout_p:
            raise ImplementationError(
                f"dropout_p={dropout_p} is not supported in batch-invariant mode: a row's mask "
                "depends on its position in the batch; call eval()"
            )
        try:
            resolve_impl("triton" if impl == "auto" else impl, x)
        except ImplementationError as error:
            raise ImplementationError(
                f"batch-invariant mode needs the Triton kernels: {error}"
            ) from None


def execution_mode_of(x: torch.Tensor, impl: str, plan: str = "auto") -> ExecutionMode:
    """Determine the execution mode of a forward pass on x.

    The result is an `ExecutionMode`, which contains the implementation and the backend. The result
    also states whether compilation, tracing, autocast, and batch invariance are active.

    Args:
        x: The input, ``[..., K]``.
        impl, plan: As in `fastlora.functional.lora_linear`.

    Raises:
        ValueError, ImplementationError: As in `resolve_impl`, except in batch-invariant mode.
    """
    kind, autocast = "cpu" if x.is_cpu else x.device.type, None
    knows = kind in _USUAL_DEVICES or torch.amp.is_autocast_available(kind)
    if knows and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        autocast = torch.get_autocast_dtype(kind)
    compiling = torch.compiler.is_compiling()
    if plan == "invariant" or _batch_invariant_state.invariant:
        return ExecutionMode(impl, "triton", compiling, True, autocast)
    if impl == "auto" and kind not in KERNEL_DEVICES:
        impl = "eager"
    elif impl != "eager":
        impl = resolve_impl(impl, x, autocast)
    tracing = not compiling and (torch._C._get_tracing_state() is not None or x.is_nested)
    if autocast is None and not compiling and not tracing:
        return _USUAL[impl]  # Every layer of a model calls this function: build no record here.
    return ExecutionMode(impl, impl, compiling, False, autocast, tracing)


_USUAL = {impl: ExecutionMode(impl, impl, False, False, None) for impl in ("triton", "eager")}


def is_batch_invariant() -> bool:
    """Return whether batch-invariant mode is on.

    Each thread has its own mode.
    """
    return _batch_invariant_state.invariant


@contextlib.contextmanager
def batch_invariant(enabled: bool = True) -> Iterator[None]:
    """Context manager that turns batch-invariant mode on or off.

    In batch-invariant mode, the result of a LoRA layer for a row does not depend on the other rows
    of the batch.

    Only this thread is affected. ``FASTLORA_BATCH_INVARIANT=1`` in the environment turns the mode
    on for all threads. A forward pass that activation checkpointing repeats during the backward
    pass needs this setting. The mode is slower, but the cost has not been measured.

    Args:
        enabled: Whether the mode is on within the ``with`` block.
    """
    before = is_batch_invariant()
    _batch_invariant_state.invariant = enabled
    try:
        yield
    finally:
        _batch_invariant_state.invariant = before
