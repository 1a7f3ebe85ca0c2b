"""Small kernels in PTX, for the tests of the emulator."""

from __future__ import annotations

import itertools

import torch

from tests.emulator.decode import Program
from tests.emulator.execute import Outcome, execute

_LETTERS = {2: "rs", 4: "r", 8: "rd"}


def kernel(body: str, *, pointers: int = 0, warps: int = 1, shared: int = 0) -> Program:
    """Returns a kernel that has its thread in ``%tid`` and its arguments in ``%p0``, ``%p1``..."""
    parameters = ",\n".join(f".param .u64 kernel_param_{i}" for i in range(pointers))
    loads = "".join(f"ld.param.b64 %p{i}, [kernel_param_{i}];\n" for i in range(pointers))
    text = f""".visible .entry kernel(
{parameters}
)
.reqntid {32 * warps}
{{
mov.u32 %tid, %tid.x;
mul.wide.u32 %tid4, %tid, 4;
{loads}{body}
ret;
}}
"""
    return Program(text, shared)


def run(
    body: str,
    *tensors: torch.Tensor,
    warps: int = 1,
    shared: int = 0,
    programs: int = 1,
    dependent: bool = False,
    order: int = 0,
    limit: int = 0,
) -> Outcome:
    """Executes such a kernel on tensors."""
    program = kernel(body, pointers=len(tensors), warps=warps, shared=shared)
    return execute(
        program,
        (programs, 1, 1),
        [tensor.data_ptr() for tensor in tensors],
        [tensor.untyped_storage() for tensor in tensors],
        dependent=dependent,
        order=order,
        limit=limit,
    )


def lanes(instructions: str, *inputs: torch.Tensor, out: torch.dtype) -> torch.Tensor:
    """Executes instructions in 32 lanes.

    In their text ``$0``, ``$1``... hold the lane's element of each input, and ``$d`` the result.
    """
    result = torch.zeros(32, dtype=out)
    body = ""
    for i, tensor in enumerate((*inputs, result)):
        register = f"%{_LETTERS[tensor.itemsize]}_{i}"
        name = "$d" if tensor is result else f"${i}"
        instructions = instructions.replace(name, register)
        body += f"mul.wide.u32 %o{i}, %tid, {tensor.itemsize};\nadd.s64 %a{i}, %p{i}, %o{i};\n"
        if tensor is not result:
            body += f"ld.global.b{8 * tensor.itemsize} {register}, [%a{i}];\n"
    size, last = 8 * result.itemsize, len(inputs)
    body += f"{instructions}\nst.global.b{size} [%a{last}], %{_LETTERS[result.itemsize]}_{last};"
    outcome = run(body, *inputs, result)
    assert outcome.reports == []
    return result


def swizzled(matrix: torch.Tensor, width: int) -> tuple[torch.Tensor, int, int]:
    """Returns a matrix ``[rows, columns]`` as TMA would lay it out for wgmma, row by row.

    A block has 8 rows of ``width`` bytes, 16 without a swizzle. Blocks follow one another along the
    rows, then along the columns. Within a block the swizzle exchanges units of 16 bytes.

    Returns:
        The bytes, and the distances of blocks along rows and along columns.
    """
    rows, columns = matrix.shape
    per_row = max(width, 16)
    image = torch.zeros(rows * columns, dtype=matrix.dtype)
    along_columns = rows * per_row
    for row, column in itertools.product(range(rows), range(columns)):
        block, byte = divmod(2 * column, per_row)
        unit = byte // 16 ^ row % 8 // (128 // width) if width else byte // 16
        place = block * along_columns + row * per_row + unit * 16 + byte % 16
        image[place // 2] = matrix[row, column]
    return image, 8 * per_row, along_columns


def _descriptor(start: int, leading: int, stride: int, width: int) -> int:
    mode = {0: 0, 128: 1, 64: 2, 32: 3}[width]
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62


WGMMA_N, WGMMA_K = 128, 64


def wgmma_kernel(
    width: int, major: str, in_registers: bool
) -> tuple[str, list[torch.Tensor], torch.Tensor]:
    """A product of ``[64, K]`` and ``[K, N]`` by two wgmma; its tensors, and the right result."""
    chance = torch.Generator().manual_seed(4)
    a, b = (
        torch.randn(64, WGMMA_K, generator=chance),
        torch.randn(WGMMA_K, WGMMA_N, generator=chance),
    )
    a, b = a.bfloat16(), b.bfloat16()
    image_a, block_a, far_a = swizzled(a, width)
    image_b, block_b, far_b = swizzled(b if major == "MN" else b.t(), width)
    image = torch.cat([image_a, image_b])
    tensors = [image, torch.zeros(64, WGMMA_N), a]
    body = "mul.lo.u32 %t, %tid, 16; cvt.u64.u32 %o, %t; add.s64 %g, %p0, %o;"
    body += "add.u32 %s, %t, global_smem;"
    for offset in range(0, 2 * image.numel(), 2048):
        body += f"ld.global.v4.b32 {{%x, %y, %z, %w}}, [%g+{offset}];"
        body += f"st.shared.v4.b32 [%s+{offset}], {{%x, %y, %z, %w}};"
    body += "FENCE: fence.proxy.async.shared::cta; bar.sync 0;"
    d = [f"%d{i}" for i in range(WGMMA_N // 2)]
    body += "".join(f"mov.b32 {name}, 0f3F800000;" for name in d)
    body += "setp.eq.b32 %accumulate, 0, 0; and.b32 %i, %tid, 3;"
    body += "shr.u32 %q, %tid, 2; and.b32 %q, %q, 7;"
    body += "shr.u32 %v, %tid, 5; mad.lo.u32 %row, %v, 16, %q;"  # the lane's row of A
    base, start_b = 1024, 1024 + 2 * image_a.numel()
    for step in range(WGMMA_K // 16):
        per_row = max(width, 16)
        along_k = 32 * step // per_row * far_a + 32 * step % per_row
        left = f"{_descriptor(base + along_k, far_a, block_a, width)}"
        if in_registers:
            body += f"mul.lo.u32 %l, %row, {2 * WGMMA_K}; mad.lo.u32 %l, %i, 4, %l;"
            body += "cvt.u64.u32 %o, %l; add.s64 %m, %p2, %o;"
            for i in range(4):
                offset = 32 * step + 16 * WGMMA_K * (i % 2) + 16 * (i // 2)
                body += f"ld.global.b32 %a{step}_{i}, [%m+{offset}];"
            left = "{" + ", ".join(f"%a{step}_{i}" for i in range(4)) + "}"
        if major == "MN":
            # Without a swizzle the two distances change places.
            along_k, steps = 2 * step * block_b, (far_b, block_b) if width else (block_b, far_b)
            right = _descriptor(start_b + along_k, *steps, width)
        else:
            along_k = 32 * step // per_row * far_b + 32 * step % per_row
            right = _descriptor(start_b + along_k, far_b, block_b, width)
        flags = f"1, 1, {int(major == 'MN')}" if in_registers else f"1, 1, 0, {int(major == 'MN')}"
        body += "wgmma.fence.sync.aligned;"
        body += f"wgmma.mma_async.sync.aligned.m64n{WGMMA_N}k16.f32.bf16.bf16 {{{', '.join(d)}}}, "
        body += f"{left}, {right}, %accumulate, {flags};"
    body += "wgmma.commit_group.sync.aligned; BEFORE: wgmma.wait_group.sync.aligned 0; AFTER: "
    body += f"mul.lo.u32 %l, %row, {4 * WGMMA_N}; mad.lo.u32 %l, %i, 8, %l;"
    body += "cvt.u64.u32 %o, %l; add.s64 %m, %p1, %o;"
    for i, name in enumerate(d):
        offset = 4 * (8 * WGMMA_N * (i // 2 % 2) + 8 * (i // 4) + i % 2)
        body += f"st.global.b32 [%m+{offset}], {name};"
    return body, tensors, (a.double() @ b.double() + 1).float()
