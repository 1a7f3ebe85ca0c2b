"""The tables of NVIDIA's chips; `fastlora.kernels.chips.Row` says what a row is."""

from __future__ import annotations

from fastlora.kernels.chips import Row, Table

# What most of them take. A chip's own rows come instead of these, launch and kind at a time.
_MOST: Table = {
    ("lora_shrink", "half"): (
        Row(128, 0, 64, 8, 4, (16, 32, 64, 128)),
        Row(64, 0, 64, 4, 4, (16, 32, 64)),
        Row(32, 0, 64, 4, 4, (16, 32, 64, 128)),
        Row(16, 0, 128, 4, 4, (16, 32, 64)),
    ),
    ("lora_shrink", "tf32"): (
        Row(128, 0, 32, 8, 4, (32,)),
        Row(64, 0, 32, 4, 4, (32,)),
        Row(32, 0, 32, 4, 4, (32,)),
        Row(16, 0, 64, 4, 4, (32,)),
    ),
    ("lora_shrink", "ieee"): (
        Row(128, 0, 32, 8, 2, (16,)),
        Row(64, 0, 32, 4, 2, (16,)),
        Row(32, 0, 32, 4, 2, (16,)),
        Row(16, 0, 32, 4, 2, (16,)),
    ),
    ("lora_linear", "tf32"): (
        Row(128, 128, 32, 8, 3, (32,)),
        Row(64, 64, 32, 4, 4, (32,)),
        Row(32, 32, 64, 4, 4, (32,)),
        Row(16, 32, 64, 4, 4, (32,)),
    ),
    # Without tensor cores every product is an FMA in registers, so tiles are small.
    ("lora_linear", "ieee"): (
        Row(128, 64, 16, 8, 2, (16,)),
        Row(64, 64, 16, 8, 2, (16,)),
        Row(32, 32, 32, 4, 2, (16,)),
        Row(16, 32, 32, 4, 2, (16,)),
    ),
    ("lora_expand", "half"): (
        Row(128, 128, 0, 8, 1, (16, 32, 64)),
        Row(64, 64, 0, 4, 1, (16, 32, 64)),
        Row(32, 64, 0, 4, 1, (16, 32, 64)),
        Row(16, 64, 0, 4, 1, (16, 32, 64, 128)),
    ),
    ("lora_expand", "tf32"): (
        Row(128, 64, 0, 8, 1, (32,)),
        Row(64, 64, 0, 4, 1, (32,)),
        Row(32, 64, 0, 4, 1, (32,)),
        Row(16, 64, 0, 4, 1, (32,)),
    ),
    ("lora_expand", "ieee"): (
        Row(128, 64, 0, 8, 1, (16,)),
        Row(64, 64, 0, 8, 1, (16,)),
        Row(32, 32, 0, 4, 1, (16,)),
        Row(16, 32, 0, 4, 1, (16,)),
    ),
    ("lora_grad_b", "half"): (
        Row(64, 128, 0, 8, 3, (16, 64)),
        Row(64, 64, 0, 4, 4, (16, 64)),
    ),
    ("lora_grad_b", "tf32"): (Row(64, 64, 0, 4, 3, (32,)),),
    ("lora_grad_b", "ieee"): (Row(32, 32, 0, 4, 2, (16,)),),
    ("lora_grad_a", "half"): (Row(32, 0, 64, 4, 5, (16, 32, 64)),),
    ("lora_grad_a", "tf32"): (Row(32, 0, 64, 4, 4, (32,)),),
    ("lora_grad_a", "ieee"): (Row(32, 0, 32, 4, 2, (16,)),),
    # Under dropout two accumulators live in the epilogue: smaller tiles than `lora_linear`'s.
    ("lora_grad_x", "half"): (
        Row(128, 128, 64, 8, 3, (16, 32)),
        Row(64, 64, 64, 4, 4, (16, 64)),
    ),
    ("lora_grad_x", "tf32"): (Row(64, 64, 32, 4, 4, (32,)),),
    ("lora_grad_x", "ieee"): (Row(32, 32, 32, 4, 2, (16,)),),
    # An update behind a GEMM of the library's, which is for many rows.
    ("lora_grad_x_add", "half"): (
        Row(128, 128, 0, 8, 1, (16, 32)),
        Row(64, 64, 0, 4, 1, (16, 64)),
    ),
    ("lora_grad_x_add", "tf32"): (Row(64, 64, 0, 4, 1, (32,)),),
    ("lora_grad_x_add", "ieee"): (Row(64, 64, 0, 8, 1, (16,)),),
    ("mixed_lora_shrink", "half"): (
        Row(128, 0, 64, 8, 4, (16, 64)),
        Row(64, 0, 64, 4, 4, (16, 64)),
        Row(16, 0, 128, 4, 4, (16, 64)),
    ),
    ("mixed_lora_shrink", "tf32"): (
        Row(128, 0, 32, 8, 4, (16,)),
        Row(64, 0, 32, 4, 4, (16,)),
        Row(16, 0, 64, 4, 4, (16,)),
    ),
    ("mixed_lora_shrink", "ieee"): (
        Row(128, 0, 32, 8, 2, (16,)),
        Row(64, 0, 32, 4, 2, (16,)),
        Row(16, 0, 32, 4, 2, (16,)),
    ),
    ("mixed_lora_linear", "half"): (
        Row(128, 128, 64, 8, 4, (32,)),
        Row(64, 128, 128, 8, 4, (64,)),
        Row(64, 64, 128, 4, 4, (32,)),
        Row(32, 64, 128, 8, 4, (64,)),
        Row(32, 32, 128, 4, 5, (64,)),
        Row(16, 64, 128, 4, 5, (64,)),
        Row(16, 32, 256, 4, 4, (64,)),
        Row(16, 16, 256, 4, 8, (64,)),
    ),
    ("mixed_lora_linear", "tf32"): (
        Row(64, 64, 32, 4, 4, (16,)),
        Row(16, 32, 64, 4, 4, (32,)),
    ),
    ("mixed_lora_linear", "ieee"): (
        Row(64, 64, 16, 8, 2, (16,)),
        Row(16, 32, 32, 4, 2, (16,)),
    ),
    ("mixed_lora_expand", "half"): (
        Row(128, 64, 0, 8, 1, (16, 32, 64)),
        Row(64, 64, 0, 4, 1, (16, 32, 64)),
        Row(16, 128, 0, 2, 1, (16, 32, 64)),
    ),
    ("mixed_lora_expand", "tf32"): (
        Row(128, 64, 0, 8, 1, (16,)),
        Row(64, 64, 0, 8, 1, (16,)),
        Row(16, 64, 0, 4, 1, (16,)),
    ),
    ("mixed_lora_expand", "ieee"): (
        Row(128, 64, 0, 8, 1, (16,)),
        Row(64, 64, 0, 8, 1, (16,)),
        Row(16, 64, 0, 4, 1, (16,)),
    ),
    ("mixed_lora_train_shrink", "half"): (Row(64, 0, 64, 8, 3, (16, 64)),),
    ("mixed_lora_train_shrink", "tf32"): (Row(64, 0, 32, 4, 4, (16,)),),
    ("mixed_lora_train_shrink", "ieee"): (Row(64, 0, 32, 4, 2, (16,)),),
    ("mixed_lora_train_linear", "half"): (
        Row(128, 128, 32, 8, 4, (16,)),
        Row(64, 64, 64, 8, 4, (32,)),
    ),
    ("mixed_lora_train_linear", "tf32"): (Row(64, 64, 32, 4, 3, (16,)),),
    ("mixed_lora_train_linear", "ieee"): (Row(64, 64, 16, 8, 2, (16,)),),
    ("mixed_lora_train_expand", "half"): (Row(64, 64, 0, 4, 1, (16, 32, 64)),),
    ("mixed_lora_train_expand", "tf32"): (Row(64, 64, 0, 8, 1, (16,)),),
    ("mixed_lora_train_expand", "ieee"): (Row(64, 64, 0, 8, 1, (16,)),),
    ("mixed_lora_grad_b", "half"): (Row(64, 128, 0, 8, 3, (16, 64)),),
    ("mixed_lora_grad_b", "tf32"): (Row(64, 64, 0, 4, 3, (32,)),),
    ("mixed_lora_grad_b", "ieee"): (Row(32, 32, 0, 4, 2, (16,)),),
    ("mixed_lora_grad_a", "half"): (Row(64, 0, 128, 8, 3, (16, 64)),),
    ("mixed_lora_grad_a", "tf32"): (Row(64, 0, 64, 4, 3, (32,)),),
    ("mixed_lora_grad_a", "ieee"): (Row(32, 0, 32, 4, 2, (16,)),),
    ("mixed_lora_grad_x", "half"): (
        Row(128, 128, 32, 8, 4, (16,)),
        Row(64, 64, 64, 8, 4, (32,)),
    ),
    ("mixed_lora_grad_x", "tf32"): (Row(64, 64, 32, 4, 3, (16,)),),
    ("mixed_lora_grad_x", "ieee"): (Row(64, 64, 16, 8, 2, (16,)),),
    ("mixed_lora_grad_x_add", "half"): (Row(64, 64, 0, 4, 1, (16, 32, 64)),),
    ("mixed_lora_grad_x_add", "tf32"): (Row(64, 64, 0, 8, 1, (16,)),),
    ("mixed_lora_grad_x_add", "ieee"): (Row(64, 64, 0, 8, 1, (16,)),),
    # Of codes: a tile's 32 elements a thread go through registers, so more warps, and fewer rows.
    ("coded_lora_linear", "half"): (
        Row(64, 64, 64, 4, 4, (16, 32)),
        Row(64, 32, 128, 4, 4, (16, 64)),
        Row(64, 16, 128, 4, 4, (16, 64)),
        Row(32, 64, 128, 8, 4, (16, 64)),
        Row(32, 32, 128, 4, 4, (16, 64)),
        Row(32, 16, 256, 4, 4, (16, 64)),
        Row(16, 64, 128, 8, 4, (16, 64)),
        Row(16, 32, 256, 8, 4, (16, 64)),
        Row(16, 16, 256, 4, 4, (16, 64)),
    ),
    ("coded_lora_linear", "tf32"): (
        Row(64, 64, 32, 4, 4, (32,)),
        Row(32, 32, 64, 4, 4, (32,)),
        Row(16, 32, 64, 4, 4, (32,)),
    ),
    ("coded_lora_linear", "ieee"): (
        Row(64, 64, 16, 8, 2, (16,)),
        Row(32, 32, 32, 4, 2, (16,)),
        Row(16, 32, 32, 4, 2, (16,)),
    ),
    ("coded_lora_grad_x", "half"): (Row(64, 64, 64, 4, 4, (16, 64)),),
    ("coded_lora_grad_x", "tf32"): (Row(64, 64, 32, 4, 4, (32,)),),
    ("coded_lora_grad_x", "ieee"): (Row(32, 32, 32, 4, 2, (16,)),),
    ("coded_mixed_lora_linear", "half"): (
        Row(64, 64, 64, 4, 4, (32,)),
        Row(32, 64, 128, 8, 4, (64,)),
        Row(32, 32, 128, 4, 4, (64,)),
        Row(16, 64, 128, 8, 4, (64,)),
        Row(16, 32, 256, 8, 4, (64,)),
        Row(16, 16, 256, 4, 4, (64,)),
    ),
    ("coded_mixed_lora_linear", "tf32"): (
        Row(64, 64, 32, 4, 4, (16,)),
        Row(16, 32, 64, 4, 4, (32,)),
    ),
    ("coded_mixed_lora_linear", "ieee"): (
        Row(64, 64, 16, 8, 2, (16,)),
        Row(16, 32, 32, 4, 2, (16,)),
    ),
}

SM_80: Table = {
    **_MOST,
    ("lora_linear", "half"): (
        Row(128, 128, 64, 8, 3, (16, 32)),
        Row(64, 64, 64, 4, 4, (16, 32, 64)),
        Row(32, 64, 128, 4, 4, (16, 32, 64)),
        Row(32, 32, 128, 4, 4, (16, 32, 64, 128)),
        Row(16, 64, 128, 4, 4, (16, 32, 64, 128)),
        Row(16, 32, 256, 4, 4, (16, 32, 64, 128)),
        Row(16, 16, 256, 4, 4, (16, 32, 64, 128)),
    ),
    ("mixed_lora_linear", "half"): (
        Row(128, 128, 64, 8, 3, (16,)),
        Row(64, 64, 64, 8, 4, (32,)),
        Row(32, 64, 128, 8, 4, (64,)),
        Row(32, 32, 128, 4, 4, (64,)),
        Row(16, 64, 128, 4, 4, (64,)),
        Row(16, 32, 256, 4, 4, (64,)),
        Row(16, 16, 256, 4, 4, (64,)),
    ),
}

SM_86: Table = {
    **_MOST,
    ("lora_shrink", "half"): (
        Row(128, 0, 32, 8, 4, (16, 32, 64, 128)),
        Row(64, 0, 64, 4, 3, (16, 32, 64)),
        Row(32, 0, 64, 4, 3, (16, 32, 64)),
        Row(16, 0, 128, 4, 3, (16, 32, 64)),
    ),
    ("lora_linear", "half"): (
        Row(128, 128, 32, 8, 4, (16, 32)),
        Row(64, 64, 64, 4, 4, (16, 32, 64)),
        Row(32, 64, 64, 4, 4, (16, 32, 64)),
        Row(32, 32, 128, 4, 4, (16, 32, 64, 128)),
        Row(16, 64, 128, 4, 4, (16, 32, 64, 128)),
        Row(16, 32, 128, 4, 5, (16, 32, 64, 128)),
        Row(16, 16, 256, 4, 4, (16, 32, 64, 128)),
    ),
    # Eight warps: at four, four siblings of rank 32 spill 48 bytes on sm_120.
    ("lora_grad_a", "half"): (Row(32, 0, 64, 8, 5, (16, 32, 64)),),
    ("lora_grad_x", "half"): (
        Row(128, 128, 32, 8, 4, (16, 32)),
        Row(64, 64, 64, 4, 4, (16, 64)),
    ),
    ("mixed_lora_shrink", "half"): (
        Row(128, 0, 32, 8, 4, (16, 64)),
        Row(64, 0, 64, 4, 3, (16, 64)),
        Row(16, 0, 128, 4, 3, (16, 64)),
    ),
    ("mixed_lora_linear", "half"): (
        Row(128, 128, 32, 8, 4, (32,)),
        Row(64, 64, 64, 8, 4, (32,)),
        Row(32, 64, 64, 8, 4, (64,)),
        Row(32, 32, 128, 4, 4, (64,)),
        Row(16, 64, 128, 4, 4, (64,)),
        Row(16, 32, 128, 4, 5, (64,)),
        Row(16, 16, 256, 4, 4, (64,)),
    ),
}

SM_90: Table = {
    **_MOST,
    ("lora_linear", "half"): (
        Row(128, 256, 64, 8, 3, (16,)),
        Row(128, 128, 64, 8, 4, (16, 32, 64)),
        Row(64, 128, 128, 4, 4, (16, 32)),
        Row(64, 64, 128, 4, 4, (16, 32, 64)),
        Row(64, 32, 128, 4, 5, (16, 32, 64)),
        Row(64, 16, 128, 4, 6, (16, 32, 64)),
        Row(32, 64, 128, 4, 4, (16, 32, 64)),
        Row(32, 32, 128, 4, 5, (16, 32, 64, 128)),
        Row(32, 16, 256, 4, 7, (16, 32, 64)),
        Row(16, 64, 128, 4, 5, (16, 32, 64, 128)),
        Row(16, 32, 256, 4, 4, (16, 32, 64, 128)),
        Row(16, 16, 256, 4, 8, (16, 32, 64, 128)),
    ),
    ("lora_linear", "tf32"): (
        Row(128, 128, 32, 8, 4, (32,)),
        Row(64, 64, 64, 4, 3, (32,)),
        Row(32, 32, 64, 4, 4, (32,)),
        Row(16, 32, 64, 4, 4, (32,)),
    ),
    # Eight warps on 64 rows would give each of two warp groups half of BLOCK_R, which is less than
    # the swizzle of shared memory spans.
    ("lora_grad_b", "half"): (
        Row(64, 256, 0, 4, 3, (16,)),
        Row(64, 128, 0, 4, 3, (16, 64)),
        Row(64, 64, 0, 4, 4, (16, 64)),
    ),
    ("mixed_lora_train_shrink", "half"): (Row(64, 0, 64, 4, 4, (16, 64)),),
    ("mixed_lora_train_linear", "half"): (
        Row(128, 128, 32, 8, 4, (16,)),
        Row(64, 64, 64, 4, 4, (32,)),
    ),
    ("mixed_lora_grad_x", "half"): (
        Row(128, 128, 32, 8, 4, (16,)),
        Row(64, 64, 64, 4, 4, (32,)),
    ),
    ("mixed_lora_grad_b", "half"): (Row(64, 128, 0, 4, 3, (16, 64)),),
    ("mixed_lora_grad_a", "half"): (Row(64, 0, 128, 4, 3, (16, 64)),),
}

SM_100: Table = {
    **_MOST,
    ("lora_linear", "half"): (
        Row(128, 256, 64, 8, 3, (16, 32, 64)),
        Row(128, 128, 64, 8, 4, (16, 32, 64)),
        Row(64, 64, 128, 4, 4, (16, 32, 64)),
        Row(64, 32, 128, 4, 5, (16, 32, 64)),
        Row(32, 64, 128, 4, 4, (16, 32, 64)),
        Row(32, 32, 128, 4, 5, (16, 32, 64, 128)),
        Row(32, 16, 256, 4, 7, (16, 32, 64)),
        Row(16, 64, 128, 4, 5, (16, 32, 64, 128)),
        Row(16, 32, 256, 4, 4, (16, 32, 64, 128)),
        Row(16, 16, 256, 4, 8, (16, 32, 64, 128)),
    ),
    ("lora_linear", "tf32"): (
        Row(128, 128, 32, 8, 4, (32,)),
        Row(64, 64, 64, 4, 3, (32,)),
        Row(32, 32, 64, 4, 4, (32,)),
        Row(16, 32, 64, 4, 4, (32,)),
    ),
    ("lora_grad_b", "half"): (
        Row(64, 256, 0, 8, 3, (16, 64)),
        Row(64, 128, 0, 8, 3, (16, 64, 128)),
        Row(64, 64, 0, 4, 4, (16, 64)),
    ),
    # Unmeasured: about 8 TB/s want twice the bytes on their way that H100's 3.35 do.
    ("lora_grad_a", "half"): (Row(64, 0, 64, 8, 4, (16, 32, 64)),),
    ("mixed_lora_train_shrink", "half"): (Row(64, 0, 64, 4, 4, (16, 64)),),
    ("mixed_lora_grad_b", "half"): (Row(64, 128, 0, 4, 3, (16, 64)),),
    ("mixed_lora_grad_a", "half"): (Row(64, 0, 128, 4, 3, (16, 64)),),
}
