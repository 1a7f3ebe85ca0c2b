"""Runs the kernels once on small sizes that no tile divides, for use under compute-sanitizer."""

from __future__ import annotations

import argparse
import os
import sys

# Each tensor gets its own allocation, so that any access past its end is past an allocation's end.
os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch  # noqa: E402

from fastlora import functional  # noqa: E402
from fastlora.ops.rows import sort_rows  # noqa: E402

SIZES = ((1, 72, 40, 3), (17, 200, 136, 16), (130, 136, 72, 5))  # (M, K, N, R)
# (M, K, N) of mixed batches, with these ranks of the adapters in each of two modules.
MIXED_SIZES = ((17, 72, 40), (130, 40, 72))
MIXED_RANKS = ((3, 16, 40, 0), (8, 0, 1, 5))


def mixed(m: int, k: int, n: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """Run every kernel for mixed batches. Every fifth row has no adapter.

    Args:
        m: Number of rows.
        k: Number of input features.
        n: Number of output features.
        dtype: Dtype of all operands.
        device: Device of all operands.

    Returns:
        The results ``[M, N]``.
    """
    from fastlora.ops import schema  # noqa: F401 - imported for its registrations
    from fastlora.ops.triton.rows_argument import rows_argument_for_address_tables

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    def table(blocks: list[list[torch.Tensor]]) -> torch.Tensor:
        addresses = [[block.data_ptr() for block in row] for row in blocks]
        return torch.tensor(addresses, device=device)

    x, weight, bias = normal(m, k), normal(n, k), normal(n)
    lora_a = [[normal(r, k) for r in ranks] for ranks in MIXED_RANKS]
    lora_b = [[normal(r, n) for r in ranks] for ranks in MIXED_RANKS]
    lora_bias = [[normal(n) for _ in ranks] for ranks in MIXED_RANKS]
    rank = torch.tensor(MIXED_RANKS, dtype=torch.int32, device=device)
    largest = int(rank.max())
    addresses = table(lora_a), table(lora_b)
    scaling = torch.ones(rank.shape, device=device)
    tables = [*addresses, rank, scaling, table(lora_bias)]
    batch = sort_rows(torch.arange(m, device=device) % 5 - 1, m, 4)
    rows = rows_argument_for_address_tables(batch)
    ops = torch.ops.fastlora
    known, given = (x, weight, bias, rows), (tables, 0, largest, dtype)
    first, s = ops.lora_linear_at(*known, None, *given, "fused", [0, len(MIXED_RANKS)])
    (second,) = ops.lora_linear_at(*known, s, *given, "fused", [0, len(MIXED_RANKS)])
    alone = [ops.lora_linear_at(*known, None, *given, plan)[0] for plan in ("fused", "split")]
    results = [first, second, *alone]
    y = torch.nn.functional.linear(x, weight, bias)
    ops.lora_add_at_(y, x, rows, tables, 1, largest, dtype, "triton")
    scales = [torch.ones(n, device=device) for _ in MIXED_RANKS[1]]
    ops.lora_scale_(y, bias, rows, table([scales]), 0, "triton")
    return [*results, y]


def main() -> int:
    """Run all cases; return 0 if every result is finite, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--impl", default="triton", choices=("triton", "eager"))
    args = parser.parse_args()
    dtypes, sizes, mixed_sizes = [torch.bfloat16, torch.float16, torch.float32], SIZES, MIXED_SIZES
    if args.device != "cuda":  # Triton's interpreter takes seconds per case and has no bf16
        dtypes, sizes, mixed_sizes = dtypes[1:2], SIZES[1:2], MIXED_SIZES[:1]
    bad = cases = 0
    for dtype in dtypes:
        for m, k, n, r in sizes:
            x, weight, lora_a, lora_b = (
                torch.randn(shape, device=args.device).to(dtype).requires_grad_(index != 1)
                for index, shape in enumerate(((m, k), (n, k), (r, k), (n, r)))
            )
            bias = torch.randn(n, device=args.device).to(dtype)
            for plan, dropout_p in (("fused", 0.0), ("split", 0.1)):
                y = functional.lora_linear(
                    x, weight, lora_a, lora_b, 0.5,
                    bias=bias, dropout_p=dropout_p, impl=args.impl, plan=plan,
                )  # fmt: skip
                results = [y, *torch.autograd.grad(y.float().sum(), (x, lora_a, lora_b))]
                cases += 1
                bad += not all(bool(result.isfinite().all()) for result in results)
        for own in mixed_sizes if args.impl == "triton" else ():
            results = mixed(*own, dtype, args.device)
            cases += 1
            bad += not all(bool(result.isfinite().all()) for result in results)
    print(f"{cases} cases, {bad} with a result that is not finite")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
