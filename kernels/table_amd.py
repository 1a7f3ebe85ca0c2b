"""The tables of AMD's chips; `fastlora.kernels.chips.Row` says what a row is."""

from __future__ import annotations

from fastlora.kernels.chips import Row, Table

_HALF: Table = {
    ("lora_shrink", "half"): (
        Row(128, 0, 64, 8, 2, (16, 32, 64, 128)),
        Row(64, 0, 64, 4, 2, (16, 32, 64, 128)),
        Row(32, 0, 64, 4, 2, (16, 32, 64, 128)),
        Row(16, 0, 128, 4, 2, (16, 32, 64)),
    ),
    ("lora_expand", "half"): (
        Row(128, 128, 0, 8, 1, (16, 32, 64)),
        Row(64, 64, 0, 4, 1, (16, 32, 64)),
        Row(32, 64, 0, 4, 1, (16, 32, 64)),
        Row(16, 64, 0, 4, 1, (16, 32, 64, 128)),
    ),
    ("lora_grad_b", "half"): (
        Row(64, 128, 0, 4, 2, (16, 64)),
        Row(64, 64, 0, 4, 2, (16, 64)),
    ),
    ("lora_grad_a", "half"): (Row(64, 0, 64, 4, 2, (16, 32, 64)),),
    ("lora_grad_x", "half"): (
        Row(128, 128, 64, 8, 2, (16, 32)),
        Row(64, 64, 64, 4, 2, (16, 64)),
    ),
    ("lora_grad_x_add", "half"): (
        Row(128, 128, 0, 8, 1, (16, 32)),
        Row(64, 64, 0, 4, 1, (16, 64)),
    ),
    ("mixed_lora_shrink", "half"): (
        Row(128, 0, 64, 8, 2, (16, 64)),
        Row(64, 0, 64, 4, 2, (16, 64)),
        Row(16, 0, 128, 4, 2, (16, 64)),
    ),
    ("mixed_lora_expand", "half"): (
        Row(128, 64, 0, 8, 1, (16, 32, 64)),
        Row(64, 64, 0, 4, 1, (16, 32, 64)),
        Row(16, 128, 0, 2, 1, (16, 32, 64)),
    ),
    ("mixed_lora_train_shrink", "half"): (Row(64, 0, 64, 4, 2, (16, 64)),),
    ("mixed_lora_train_linear", "half"): (
        Row(128, 128, 64, 8, 2, (16,)),
        Row(64, 64, 64, 4, 2, (32,)),
    ),
    ("mixed_lora_train_expand", "half"): (Row(64, 64, 0, 4, 1, (16, 32, 64)),),
    ("mixed_lora_grad_b", "half"): (Row(64, 128, 0, 4, 2, (16, 64)),),
    ("mixed_lora_grad_a", "half"): (Row(64, 0, 128, 4, 2, (16, 64)),),
    ("mixed_lora_grad_x", "half"): (
        Row(128, 128, 64, 8, 2, (16,)),
        Row(64, 64, 64, 4, 2, (32,)),
    ),
    ("mixed_lora_grad_x_add", "half"): (Row(64, 64, 0, 4, 1, (16, 32, 64)),),
}

# In either precision of fp32.
_FP32 = {
    "lora_shrink": (
        Row(128, 0, 32, 8, 2, (32,)),
        Row(64, 0, 32, 4, 2, (32,)),
        Row(32, 0, 32, 4, 2, (32,)),
        Row(16, 0, 64, 4, 2, (32,)),
    ),
    "lora_linear": (
        Row(128, 128, 32, 8, 2, (32,)),
        Row(64, 64, 32, 4, 2, (32,)),
        Row(32, 32, 64, 4, 2, (32,)),
        Row(16, 32, 64, 4, 2, (32,)),
    ),
    "lora_expand": (
        Row(128, 64, 0, 8, 1, (32,)),
        Row(64, 64, 0, 4, 1, (32,)),
        Row(32, 64, 0, 4, 1, (32,)),
        Row(16, 64, 0, 4, 1, (32,)),
    ),
    "lora_grad_b": (Row(64, 64, 0, 4, 2, (32,)),),
    "lora_grad_a": (Row(32, 0, 64, 4, 2, (32,)),),
    "lora_grad_x": (Row(64, 64, 32, 4, 2, (32,)),),
    "lora_grad_x_add": (Row(64, 64, 0, 4, 1, (32,)),),
    "mixed_lora_shrink": (
        Row(128, 0, 32, 8, 2, (16,)),
        Row(64, 0, 32, 4, 2, (16,)),
        Row(16, 0, 64, 4, 2, (16,)),
    ),
    "mixed_lora_linear": (
        Row(64, 64, 32, 4, 2, (16,)),
        Row(16, 32, 64, 4, 2, (32,)),
    ),
    "mixed_lora_expand": (
        Row(128, 64, 0, 8, 1, (16,)),
        Row(64, 64, 0, 8, 1, (16,)),
        Row(16, 64, 0, 4, 1, (16,)),
    ),
    "mixed_lora_train_shrink": (Row(64, 0, 32, 4, 2, (16,)),),
    "mixed_lora_train_linear": (Row(64, 64, 32, 4, 2, (16,)),),
    "mixed_lora_train_expand": (Row(64, 64, 0, 8, 1, (16,)),),
    "mixed_lora_grad_b": (Row(64, 64, 0, 4, 2, (32,)),),
    "mixed_lora_grad_a": (Row(64, 0, 64, 4, 2, (32,)),),
    "mixed_lora_grad_x": (Row(64, 64, 32, 4, 2, (16,)),),
    "mixed_lora_grad_x_add": (Row(64, 64, 0, 8, 1, (16,)),),
}

GFX942: Table = {
    **_HALF,
    ("lora_linear", "half"): (
        Row(128, 128, 64, 8, 2, (16, 32, 64)),
        Row(64, 64, 64, 4, 2, (16, 32, 64)),
        Row(32, 64, 128, 4, 2, (16, 32, 64)),
        Row(32, 32, 128, 4, 2, (16, 32, 64, 128)),
        Row(16, 64, 128, 4, 2, (16, 32, 64, 128)),
        Row(16, 32, 128, 4, 2, (16, 32, 64, 128)),
    ),
    ("mixed_lora_linear", "half"): (
        Row(128, 128, 64, 8, 2, (32,)),
        Row(64, 64, 64, 4, 2, (64,)),
        Row(32, 64, 128, 4, 2, (64,)),
        Row(32, 32, 128, 4, 2, (64,)),
        Row(16, 64, 128, 4, 2, (64,)),
        Row(16, 32, 128, 4, 2, (64,)),
    ),
    **{(launch, kind): rows for launch, rows in _FP32.items() for kind in ("tf32", "ieee")},
}

GFX950: Table = {
    **_HALF,
    ("lora_linear", "half"): (
        Row(128, 128, 64, 8, 2, (16, 32, 64)),
        Row(64, 64, 128, 4, 2, (16, 32, 64)),
        Row(32, 64, 128, 4, 2, (16, 32, 64)),
        Row(32, 32, 128, 4, 2, (16, 32, 64, 128)),
        Row(16, 64, 256, 4, 2, (16, 32, 64)),
        Row(16, 32, 256, 4, 2, (16, 32, 64, 128)),
    ),
    ("mixed_lora_linear", "half"): (
        Row(128, 128, 64, 8, 2, (32,)),
        Row(64, 64, 128, 4, 2, (64,)),
        Row(32, 64, 128, 4, 2, (64,)),
        Row(32, 32, 128, 4, 2, (64,)),
        Row(16, 64, 256, 4, 2, (64,)),
        Row(16, 32, 256, 4, 2, (64,)),
    ),
    **{(launch, "ieee"): rows for launch, rows in _FP32.items()},
}
