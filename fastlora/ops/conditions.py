"""What a forward runs under: asked once, when it begins, and handed down from there.

Which implementation runs: Triton's kernels or plain PyTorch. Whether `torch.compile` traces the
forward. The dtype of autocast. And the batch-invariant mode, in which a row's result does not
depend on what else is in its batch.

``with fastlora.batch_invariant():`` holds for LoRA linears, of one adapter and of a mixed batch,
without gradients. Their rows come out the same, bit for bit, for any number of rows, at any place
among them, beside any adapters, whatever the largest rank, and whether siblings such as q, k and v
shared a shrink. Bit equality is claimed of GPUs only, and only as far as the native test was run.

It holds because one kernel, tile, split of K and plan serve every batch, and no arithmetic of other
rows reaches a row's accumulator (`docs/dev/decisions.md`, Kernels). What cannot keep it raises
`ImplementationError`. What is no LoRA linear (attention, norms, an unadapted lm_head) is PyTorch's,
in the mode as outside.

Nothing here imports Triton.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import nn

from fastlora import env
from fastlora.validation import ImplementationError

IMPLEMENTATIONS = ("auto", "triton", "eager")

# Types of devices that "auto" means kernels for, where they run.
KERNEL_DEVICES: tuple[str, ...] = ("cuda",)
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_PLAIN = (torch.Tensor, nn.Parameter)
# Types that know autocast in every installation of torch.
_USUAL_DEVICES = ("cpu", "cuda")
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = env.triton_interpreted()


class _Thread(threading.local):
    """Whether the batch-invariant mode is on in a thread."""

    invariant = env.batch_invariant()


_thread = _Thread()

_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant_when_compiled(function: _Function) -> _Function:
    """Has `torch.compile` call the function while it traces, and keep the result as a constant.

    This is `torch.compiler.assume_constant_result` without its import of the compiler, which takes
    longer than that of torch.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@functools.cache
def _gpu_status(index: int) -> tuple[bool, str]:
    """Whether GPU ``index`` is one that the kernels are built for."""
    properties = torch.cuda.get_device_properties(index)
    from fastlora.kernels import chips

    chip = chips.chip_of(torch.device("cuda", index))
    if not chip.is_supported:
        return False, f"{properties.name} is {chip.arch}, for which there are no kernel configs"
    return True, f"{properties.name} ({chip.arch})"


@constant_when_compiled
def triton_status(device_type: str, index: int = 0) -> tuple[bool, str]:
    """Returns whether the Triton kernels can run on a device, and why or why not.

    Args:
        device_type: ``"cpu"``, ``"cuda"`` (also ROCm), or any other device type of torch.
        index: Which device of that type.
    """
    if not _HAS_TRITON:
        return False, "triton is not installed"
    if device_type == "cuda":
        return _gpu_status(index)
    if _INTERPRETED:
        return True, "TRITON_INTERPRET=1: the kernels run in Triton's interpreter"
    return False, f"no Triton kernels for device type {device_type!r}"


def runs_kernels(device: torch.device) -> bool:
    """Whether "auto" means kernels on a device, in a dtype that they take."""
    return device.type in KERNEL_DEVICES and triton_status(device.type, device.index or 0)[0]


def is_compiled() -> bool:
    """Whether `torch.compile` traces the code that asks."""
    return torch.compiler.is_compiling()


def is_traced(x: torch.Tensor) -> bool:
    """Whether a compiler traces what is computed from x: it sees no values."""
    return torch.compiler.is_compiling() or type(x) not in _PLAIN


def sees_operators(x: torch.Tensor, within_node: bool = False, by_profiler: bool = True) -> bool:
    """Whether something sees the operators called on x: tracing, modes, autograd, a profiler.

    ``within_node`` leaves out autograd, which records nothing within a node of its own. Without
    ``by_profiler`` a profiler does not count.
    """
    return bool(
        torch.compiler.is_compiling()
        or type(x) not in _PLAIN
        or (torch.is_grad_enabled() and not within_node)
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.maybe_current_level() is not None
        or torch._C._get_tracing_state() is not None
        or (by_profiler and torch.autograd._profiler_enabled())
    )


def on_device_of(x: torch.Tensor, function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function that launches kernels while x's device is the current one."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return function(*args)
    with torch.cuda.device(x.device):
        return function(*args)


def resolve_impl(impl: str, x: torch.Tensor, dtype: torch.dtype | None = None) -> str:
    """Returns ``"triton"`` or ``"eager"`` where kernels may compute, as `conditions_of` knows.

    Args:
        impl: ``"triton"``, or ``"auto"`` on a device of `KERNEL_DEVICES`.
        x: The input.
        dtype: That is computed in; None for x's.

    Raises:
        ValueError: ``impl`` is not one of `IMPLEMENTATIONS`.
        ImplementationError: ``impl="triton"`` cannot run on x; a named implementation is never
            replaced by another.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    device = x.device
    runs, why = triton_status(device.type, device.index or 0)
    dtype = dtype or x.dtype
    if runs and dtype not in KERNEL_DTYPES:
        runs, why = False, f"the kernels support fp16, bf16 and fp32, got {dtype}"
    if runs:
        return "triton"
    if impl == "triton":
        raise ImplementationError(f"impl='triton' cannot run: {why}")
    return "eager"


class _Layer(Protocol):
    in_features: int
    out_features: int

    def get_base_layer(self) -> nn.Module: ...


class Conditions(NamedTuple):
    """What one forward runs under.

    Attributes:
        impl: ``"triton"`` or ``"eager"``. In the batch-invariant mode what was asked for, which
            `check_invariant` checks.
        backend: Its name in `fastlora.ops.backend.BACKENDS`; the kernels' in that mode.
        compiling: Whether `torch.compile` traces the forward.
        invariant: Whether the batch-invariant mode is on, or the call has its plan.
        autocast: The dtype of autocast, where it is on.
        tracing: Whether the forward is to be the modules' own, in plain PyTorch: `torch.jit.trace`,
            or the ONNX exporter by it, records it, or x is a nested tensor.
    """

    impl: str
    backend: str
    compiling: bool
    invariant: bool
    autocast: torch.dtype | None
    tracing: bool = False

    def refuse(self, layer: _Layer, why: str) -> None:
        """Raises `ImplementationError` for a layer that has to run otherwise, if the mode is on."""
        if self.invariant:
            base = layer.get_base_layer()
            raise ImplementationError(
                f"{type(layer).__name__} over {type(base).__name__} ({layer.in_features} to "
                f"{layer.out_features} features) cannot run in batch-invariant mode: {why}"
            )

    def check_invariant(self, x: torch.Tensor, plan: str = "auto", dropout_p: float = 0.0) -> None:
        """Checks that the batch-invariant mode's implementation, the kernels, runs what was asked.

        Raises:
            ImplementationError: It cannot.
            ValueError: The implementation that was asked for does not exist.
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


def conditions_of(x: torch.Tensor, impl: str, plan: str = "auto") -> Conditions:
    """Returns what a forward runs under.

    Args:
        x: Its input, ``[..., K]``.
        impl, plan: As in `fastlora.functional.lora_linear`.

    Raises:
        ValueError, ImplementationError: As `resolve_impl`, but in the batch-invariant mode.
    """
    kind, autocast = "cpu" if x.is_cpu else x.device.type, None
    knows = kind in _USUAL_DEVICES or torch.amp.is_autocast_available(kind)
    if knows and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        autocast = torch.get_autocast_dtype(kind)
    compiling = torch.compiler.is_compiling()
    if plan == "invariant" or _thread.invariant:
        return Conditions(impl, "triton", compiling, True, autocast)
    if impl == "auto" and kind not in KERNEL_DEVICES:
        impl = "eager"
    elif impl != "eager":
        impl = resolve_impl(impl, x, autocast)
    tracing = not compiling and (torch._C._get_tracing_state() is not None or x.is_nested)
    if impl == "eager" and autocast is None and not compiling and not tracing:
        return _USUAL  # each layer of a model asks: what is made once is not made there
    return Conditions(impl, impl, compiling, False, autocast, tracing)


_USUAL = Conditions("eager", "eager", False, False, None)


def is_batch_invariant() -> bool:
    """Whether the mode is on in this thread."""
    return _thread.invariant


@contextlib.contextmanager
def batch_invariant(enabled: bool = True) -> Iterator[None]:
    """Turns the batch-invariant mode on, or off, for the forwards of this thread in the block.

    ``FASTLORA_BATCH_INVARIANT=1`` in the environment turns it on for all threads, which a forward
    that activation checkpointing repeats in the backward needs. The mode is slower; by how much was
    not measured.

    Args:
        enabled: False turns it off.
    """
    before = is_batch_invariant()
    _thread.invariant = enabled
    try:
        yield
    finally:
        _thread.invariant = before
