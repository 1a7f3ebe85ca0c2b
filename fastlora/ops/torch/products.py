"""Matrix products on a CPU: in fp32 where the processor has no instructions for 16-bit ones.

There PyTorch's own 16-bit products take many times as long as fp32's. SmolLM2's linear of 576 to
1536, 512 rows of bf16, PyTorch and here: forward 91.5 and 11 ms on one AVX2 core, 30 and 8 on an
AVX512 core without bf16; gradient of the input 377 and 11 ms, 30 and 7. The sums are fp32 either
way and rounded once; where a product is added to a result, here also the sum is.

Everywhere else these are PyTorch's functions, and under a compiler or tracer, where a graph is
recorded, and for operands that do not agree in dtype. Temporaries are the smaller operand in fp32,
and parts of the larger one and of the result. Nothing is called that autocast would narrow: it
knows neither in-place products nor those with ``out``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

# Numbers of an operand that are widened at once, unless `Emulation.largest_part` says otherwise.
_CHUNK = 1 << 17
# And at least so many rows of it.
_LEAST = 32


@dataclass(frozen=True)
class Emulation:
    """How a processor that emulates a dtype's products fares, and so when they are widened.

    Attributes:
        few_rows: Rows of x up to which PyTorch multiplies by a weight ``[N, K]`` as quickly.
        few_other_rows: Rows of the left operand up to which it does in any other layout.
        largest_part: Numbers of an operand that may be widened at once, where the smaller operand
            and the result together have as many.
    """

    few_rows: int
    few_other_rows: int
    largest_part: int


# PyTorch takes dot products of few rows with what lies in memory as ``[N, K]``, at memory's speed:
# 2 rows of bf16 through 576 to 1536 in 0.43 ms and here in 0.81; 4 in 0.8 and 0.6. For more rows a
# product in two parts costs up to a third more than one.
DOTS = Emulation(few_rows=3, few_other_rows=0, largest_part=1 << 22)
# oneDNN emulates bf16 with AVX512 at a quarter of fp32's rate, whatever the layout, without a
# temporary: 64 rows in 3.7 ms and here in 1.2, 8 in 0.66 and 0.68. Below 64 rows, or in larger
# parts, what is widened would make a forward peak above PEFT's.
ONEDNN = Emulation(few_rows=63, few_other_rows=63, largest_part=1 << 16)


def _emulated() -> dict[torch.dtype, Emulation]:
    """Returns the dtypes whose products this processor emulates, as far as is known (x86)."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in ("AVX2", "AVX512") or not torch.backends.mkldnn.is_available():
        return {}
    emulated = {}
    if capability == "AVX512":
        if not torch.cpu._is_avx512_bf16_supported():
            emulated[torch.bfloat16] = ONEDNN
    elif not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        emulated[torch.bfloat16] = DOTS
    if not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        emulated[torch.float16] = DOTS
    return emulated


EMULATED = _emulated()


def widens(*operands: torch.Tensor) -> bool:
    """Whether a product of these is computed in fp32 here."""
    first = operands[0]
    return (
        first.dtype in EMULATED
        and first.device.type == "cpu"
        and all(t.dtype is first.dtype for t in operands)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in operands))
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Returns ``x @ weight.T + bias``, ``[M, N]``, for ``x [M, K]``."""
    operands = (x, weight) if bias is None else (x, weight, bias)
    if x.dtype not in EMULATED or not widens(*operands) or _are_few(x, weight.t()):
        return F.linear(x, weight, bias)
    return mm(x, weight.t()) if bias is None else addmm_(bias.repeat(x.shape[0], 1), x, weight.t())


def mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Returns ``a @ b``, ``[M, N]``, for ``a [M, K]`` and ``b [K, N]``."""
    if a.dtype not in EMULATED or not widens(a, b) or _are_few(a, b):
        return torch.mm(a, b)
    y = a.new_empty(a.shape[0], b.shape[1])

    def write(part: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        part.copy_(torch.mm(a, b, out=a.new_empty(part.shape)))

    _in_parts(write, y, a, b)
    return y


def addmm_(y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Adds ``a @ b`` to ``y [M, N]`` in place and returns it."""
    if y.dtype not in EMULATED or not widens(y, a, b) or _are_few(a, b):
        return y.addmm_(a, b)

    def add(part: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        part.copy_(part.float().addmm_(a, b))

    _in_parts(add, y, a, b)
    return y


def bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Returns ``a @ b``, ``[G, M, N]``, for ``a [G, M, K]`` and ``b [G, K, N]``."""
    if not widens(a, b) or _are_few(a, b):
        return torch.bmm(a, b)
    y = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    for part in _groups(a, b):
        own_a, own_b = a[part].float(), b[part].float()
        y[part] = torch.bmm(own_a, own_b, out=own_a.new_empty(y[part].shape))
    return y


def baddbmm_(y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Adds ``a @ b`` to ``y [G, M, N]`` in place and returns it."""
    if not widens(y, a, b) or _are_few(a, b):
        return y.baddbmm_(a, b)
    for part in _groups(a, b):
        y[part] = y[part].float().baddbmm_(a[part].float(), b[part].float())
    return y


def is_slow(dtype: torch.dtype, rows: int) -> bool:
    """Whether PyTorch's products of so many rows are slow on this processor, in some layout."""
    return dtype in EMULATED and rows > EMULATED[dtype].few_other_rows


def _are_few(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the rows of a are so few that PyTorch's emulated ``a @ b`` is as quick."""
    emulation = EMULATED[a.dtype]
    few = emulation.few_rows if b.stride(-2) == 1 else emulation.few_other_rows
    return a.shape[-2] <= few


def _in_parts(
    compute: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None],
    y: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
) -> None:
    """Calls ``compute`` for parts of y with their operands in fp32; the smaller one is whole."""
    by_rows = a.numel() > b.numel()
    parted, whole = (a, b.float()) if by_rows else (b.t(), a.float())
    results = y if by_rows else y.t()
    at_once = min(max(_CHUNK, whole.numel() + y.numel()), EMULATED[y.dtype].largest_part)
    size = max(at_once // max(parted.shape[1], results.shape[1], 1), _LEAST)
    for own, part in zip(parted.split(size), results.split(size), strict=True):
        if by_rows:
            compute(part, own.float(), whole)
        else:
            compute(part.t(), whole, own.float().t())


def _groups(a: torch.Tensor, b: torch.Tensor) -> Iterator[slice]:
    (groups, m, k), n = a.shape, b.shape[2]
    count = max(_CHUNK // max(m * k, k * n, m * n, 1), 1)
    return (slice(at, at + count) for at in range(0, groups, count))
