"""Matrix products on a CPU, computed in fp32 if the processor has no 16-bit matrix instructions.

Without these instructions, PyTorch's own 16-bit products take many times as long as fp32 products.
For SmolLM2's linear layer of 576 to 1536 and 512 rows in bf16, the forward pass takes 91.5 ms in
PyTorch and 11 ms here on one AVX2 core, and 30 and 8 ms on one AVX-512 core without bf16. The
gradient of the input takes 377 and 11 ms, and 30 and 7 ms. Either way, sums are in fp32 and rounded
once. If a product is added to a tensor, this addition is also in fp32 here.

In all other cases, these functions call PyTorch's. These cases include code that a compiler or
tracer traces, products for which autograd records a graph, and operands of different dtypes.
Temporaries are the smaller operand in fp32, and parts of the larger operand and of the result. No
function is called that autocast would run in a lower precision: autocast ignores in-place products
and products with ``out``. Callers may write into all results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastlora.ops.execution_mode import dispatch_mode_may_keep_results

_dispatch_modes = torch._C._len_torch_dispatch_stack
# Number of elements that are converted at a time. Parts are larger if the smaller operand and the
# result are, and never larger than `Fp32ProductThresholds.largest_part`.
_CHUNK = 1 << 17
# Minimum number of rows that are converted at a time.
_LEAST = 32


@dataclass(frozen=True)
class Fp32ProductThresholds:
    """The size thresholds that determine whether a product is computed in fp32.

    The thresholds apply to operands of one dtype that the processor emulates. In addition,
    ``largest_part`` limits how many elements of an operand are converted at a time.

    Attributes:
        few_rows: Up to this many rows of x, PyTorch is as fast for a weight ``[N, K]``.
        few_other_rows: Up to this many rows of the left operand, PyTorch is as fast for any other
            layout.
        largest_part: Maximum number of elements of the larger operand that are converted at a time.
            Up to this limit, a part is as large as the smaller operand and the result together.
    """

    few_rows: int
    few_other_rows: int
    largest_part: int


# For few rows and a right operand that is stored as ``[N, K]``, PyTorch computes dot products at
# the speed of memory. In a bf16 layer of 576 to 1536, 2 rows take 0.43 ms in PyTorch and 0.81 ms
# here, and 4 rows take 0.8 and 0.6 ms. For more rows, a product in two parts takes up to a third
# longer than in one.
DOTS = Fp32ProductThresholds(few_rows=3, few_other_rows=0, largest_part=1 << 22)
# With AVX-512, oneDNN emulates bf16 at a quarter of the speed of fp32, in any layout and without a
# temporary: 64 rows take 3.7 ms in oneDNN and 1.2 ms here, and 8 rows take 0.66 and 0.68 ms. With
# fewer than 64 rows, or with larger parts, the temporaries would raise the peak memory of a forward
# pass above PEFT's.
ONEDNN = Fp32ProductThresholds(few_rows=63, few_other_rows=63, largest_part=1 << 16)


def _cpu_emulated_dtypes() -> dict[torch.dtype, Fp32ProductThresholds]:
    """Return the dtypes that this CPU emulates, and the fp32 thresholds of each dtype.

    The result is a dict that maps each dtype to its `Fp32ProductThresholds`. These thresholds
    determine for which sizes a product is computed in fp32 instead. The dict is empty if the CPU is
    not an x86 CPU.
    """
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


EMULATED = _cpu_emulated_dtypes()


def can_use_fp32_for_emulated_dtype(*operands: torch.Tensor) -> bool:
    """Return whether fp32 can be used for a product of operands in an emulated dtype.

    An emulated dtype is a dtype that the processor emulates. The result is False for any other
    dtype, and if autograd or a compiler records the product. If PyTorch's own product is as fast,
    the functions of this module call it even if the result is True.
    """
    first = operands[0]
    return (
        first.dtype in EMULATED
        and first.device.type == "cpu"
        and all(t.dtype is first.dtype for t in operands)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in operands))
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )


def make_writable(product: torch.Tensor) -> torch.Tensor:
    """Return a product that the caller may write into.

    The result is a copy if a dispatch mode may keep the product itself.
    """
    return product.clone() if dispatch_mode_may_keep_results(product) else product


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``x @ weight.T + bias``.

    The result has the shape ``[M, N]`` for ``x [M, K]``. Unlike `F.linear`, this function may
    compute the product in fp32 instead of the operands' dtype. Fp32 is used if the processor
    emulates the dtype of the operands, and if fp32 is possible and faster.
    """
    operands = (x, weight) if bias is None else (x, weight, bias)
    if (
        x.dtype not in EMULATED
        or not can_use_fp32_for_emulated_dtype(*operands)
        or _native_is_as_fast_as_fp32(x, weight.t())
    ):
        y = F.linear(x, weight, bias)
        return y if torch.compiler.is_compiling() or not _dispatch_modes() else make_writable(y)
    return mm(x, weight.t()) if bias is None else addmm_(bias.repeat(x.shape[0], 1), x, weight.t())


def mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return ``a @ b`` for two matrices.

    The result has the shape ``[M, N]`` for ``a [M, K]`` and ``b [K, N]``. Unlike `torch.mm`, this
    function may compute the product in fp32 instead of the operands' dtype. Fp32 is used if the
    processor emulates the dtype of a and b, and if fp32 is possible and faster.
    """
    if (
        a.dtype not in EMULATED
        or not can_use_fp32_for_emulated_dtype(a, b)
        or _native_is_as_fast_as_fp32(a, b)
    ):
        y = torch.mm(a, b)
        return y if torch.compiler.is_compiling() or not _dispatch_modes() else make_writable(y)
    y = a.new_empty(a.shape[0], b.shape[1])

    def write(part: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        part.copy_(torch.mm(a, b, out=a.new_empty(part.shape)))

    _multiply_in_fp32_by_chunks(write, y, a, b)
    return y


def addmm_(y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Add ``a @ b`` to y in place, and return y.

    y has the shape ``[M, N]``. Its dtype may differ from that of a and b. If the processor emulates
    the dtype of a and b, the product is computed in fp32 where this is possible and faster.
    """
    if y.dtype != a.dtype:
        return y.add_(mm(a, b))
    if (
        y.dtype not in EMULATED
        or not can_use_fp32_for_emulated_dtype(y, a, b)
        or _native_is_as_fast_as_fp32(a, b)
    ):
        return y.addmm_(a, b)

    def add(part: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        part.copy_(part.float().addmm_(a, b))

    _multiply_in_fp32_by_chunks(add, y, a, b)
    return y


def mm_into_(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Write ``a @ b`` into ``out`` in place.

    The function returns ``out``, which has the shape ``[M, N]``. On a CPU, the product is computed
    in the dtype of ``out`` if this dtype is wider than that of the operands.
    """
    is_narrower = torch.promote_types(out.dtype, a.dtype) != out.dtype
    if not a.is_cpu or is_narrower or (out.dtype == a.dtype and a.dtype in EMULATED):
        return out.copy_(mm(a, b))
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the batched matrix product ``a @ b``.

    The result has the shape ``[G, M, N]`` for ``a [G, M, K]`` and ``b [G, K, N]``. Unlike
    `torch.bmm`, this function computes the product in fp32 if the processor emulates the dtype of a
    and b, and if fp32 is possible and faster.
    """
    if not can_use_fp32_for_emulated_dtype(a, b) or _native_is_as_fast_as_fp32(a, b):
        y = torch.bmm(a, b)
        return y if torch.compiler.is_compiling() or not _dispatch_modes() else make_writable(y)
    y = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    for part in _groups(a, b):
        own_a, own_b = a[part].float(), b[part].float()
        y[part] = torch.bmm(own_a, own_b, out=own_a.new_empty(y[part].shape))
    return y


def baddbmm_(y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Add the batched matrix product ``a @ b`` to y in place.

    The function returns y, which has the shape ``[G, M, N]``. Unlike `torch.Tensor.baddbmm_`, the
    function computes the product in fp32 if the processor emulates the dtype of y, a, and b, and if
    fp32 is possible and faster.
    """
    if not can_use_fp32_for_emulated_dtype(y, a, b) or _native_is_as_fast_as_fp32(a, b):
        return y.baddbmm_(a, b)
    for part in _groups(a, b):
        y[part] = y[part].float().baddbmm_(a[part].float(), b[part].float())
    return y


def native_product_may_be_slow(dtype: torch.dtype, rows: int) -> bool:
    """Return whether PyTorch's matmul may be slow for the given dtype and number of rows.

    The function does not consider the memory layout of the operands. In some layouts, a product
    with few rows is fast even if the result is True.
    """
    return dtype in EMULATED and rows > EMULATED[dtype].few_other_rows


def _native_is_as_fast_as_fp32(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether PyTorch multiplies a and b at least as fast in their own dtype as in fp32.

    The processor emulates the dtype of a and b. The time of the product in fp32 includes the
    conversion of a and b. PyTorch's product in the dtype of a and b is at least as fast if ``a``
    has few rows.
    """
    emulation = EMULATED[a.dtype]
    few = emulation.few_rows if b.stride(-2) == 1 else emulation.few_other_rows
    return a.shape[-2] <= few


def _multiply_in_fp32_by_chunks(
    write_or_add_product: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None],
    y: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
) -> None:
    """Multiply a and b in fp32, chunk by chunk.

    The larger operand is converted to fp32 in chunks, which limits the memory for the converted
    operands. The fp32 copies at any time are a copy of the whole smaller operand and a copy of one
    chunk of the larger operand.

    ``write_or_add_product`` is called with each part of y and the fp32 operands of this part.
    ``write_or_add_product`` writes the product of these operands to the part of y, or adds the
    product to the part of y.
    """
    by_rows = a.numel() > b.numel()
    parted, whole = (a, b.float()) if by_rows else (b.t(), a.float())
    results = y if by_rows else y.t()
    part_elements = min(max(_CHUNK, whole.numel() + y.numel()), EMULATED[y.dtype].largest_part)
    size = max(part_elements // max(parted.shape[1], results.shape[1], 1), _LEAST)
    for own, part in zip(parted.split(size), results.split(size), strict=True):
        if by_rows:
            write_or_add_product(part, own.float(), whole)
        else:
            write_or_add_product(part.t(), whole, own.float().t())


def _groups(a: torch.Tensor, b: torch.Tensor) -> Iterator[slice]:
    (groups, m, k), n = a.shape, b.shape[2]
    count = max(_CHUNK // max(m * k, k * n, m * n, 1), 1)
    return (slice(at, at + count) for at in range(0, groups, count))
