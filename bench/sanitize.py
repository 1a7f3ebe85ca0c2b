"""Runs the kernels once on small sizes off every tile, to be watched by compute-sanitizer."""

from __future__ import annotations

import argparse
import os
import sys

# Every tensor its own allocation, so that an access past its end is one past an allocation's end.
os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch  # noqa: E402

from fastlora import functional  # noqa: E402

SIZES = ((1, 72, 40, 3), (17, 200, 136, 16), (130, 136, 72, 5))  # (M, K, N, R)


def main() -> int:
    """Returns 0 when every result is finite."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--impl", default="triton", choices=("triton", "eager"))
    args = parser.parse_args()
    # Triton's interpreter has no bf16 arithmetic.
    dtypes = [torch.bfloat16] if args.device == "cuda" else []
    bad = cases = 0
    for dtype in (*dtypes, torch.float16, torch.float32):
        for m, k, n, r in SIZES:
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
                results = (y, *torch.autograd.grad(y.float().sum(), (x, lora_a, lora_b)))
                cases += 1
                bad += not all(bool(result.isfinite().all()) for result in results)
    print(f"{cases} cases, {bad} with a result that is not finite")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
