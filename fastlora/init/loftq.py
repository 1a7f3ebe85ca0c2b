"""LoftQ: quantizes the base weight, and initializes the adapter from the quantization error.

The method is from https://arxiv.org/abs/2310.08659, as implemented in PEFT. The normal floats are
those of QLoRA (https://arxiv.org/abs/2305.14314), as implemented in bitsandbytes: each block of 64
consecutive values (in row-major order) is divided by its largest magnitude. The base layer remains
an unquantized layer whose weight contains the rounded values.
"""

from __future__ import annotations

import torch

from fastlora.init.configs import LoftQConfig
from fastlora.init.registry import InitConfigField, InitInputs, InitResult, register_init

BLOCK = 64
# Maps the number of bits to the values of the normal floats. The 4-bit values are the constants of
# bitsandbytes. The 2-bit values follow the same rule: evenly spaced quantiles of a normal
# distribution, with one more value above zero than below.
LEVELS = {
    2: (-1.0, 0.0, 0.3379152, 1.0),
    4: (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
}


@register_init(
    "loftq",
    title="LoftQ",
    changes_base=True,
    settings=InitConfigField("loftq_config", LoftQConfig, missing="raise", as_dict=True),
)
def loftq(given: InitInputs) -> InitResult:
    """Compute the initial factors of a layer using LoftQ.

    The base weight is quantized, and the factors are fitted to the quantization error. The sum of
    the quantized weight and ``B A`` therefore approximates the original weight. The result also
    contains the dequantized values of the quantized base weight.

    Each iteration quantizes ``W - B A`` to Q, and then sets ``B A`` to the best rank-R
    approximation of ``W - Q``. As in PEFT, the approximation does not take the adapter's scaling
    into account, so ``lora_alpha`` should equal ``r``.

    Raises:
        InitializationError: The weight has values that are not finite, or R exceeds its smaller
            dimension.
    """
    config = given.config if isinstance(given.config, LoftQConfig) else LoftQConfig()
    weight = given.base_weight()
    given.check_rank_limit(
        min(weight.shape), f"the smaller dimension of the weight {tuple(weight.shape)}"
    )
    left = weight
    for _ in range(config.loftq_iter):
        rounded = fake_quantize(left, config.loftq_bits)
        lora_a, lora_b = best_low_rank_factors(weight - rounded, given.rank)
        left = weight - lora_b @ lora_a
    return InitResult(lora_a, lora_b, rounded)


def fake_quantize(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Quantize a weight, and return the dequantized values.

    The result has the weight's dtype.

    Args:
        weight: The weight, ``[N, K]``.
        bits: Bits per value: 8 (integers with one scale per row), or 2 or 4 (normal floats with one
            scale per block of `BLOCK` values).
    """
    if bits == 8:
        weight = weight.half().to(weight.dtype)  # bitsandbytes expects fp16
        scales = weight.abs().amax(dim=1, keepdim=True)
        return (weight * (127.0 / scales.clamp_min(1e-30))).round() * (scales / 127.0)
    flat = weight.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1, keepdim=True)
    levels = torch.tensor(LEVELS[bits], dtype=weight.dtype, device=weight.device)
    between = (levels[1:] + levels[:-1]) / 2
    nearest = torch.bucketize(blocks / scales.clamp_min(1e-30), between)
    return (levels[nearest] * scales).flatten()[: flat.numel()].view_as(weight)


def best_low_rank_factors(error: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors whose product is the best rank-R approximation of a matrix.

    Args:
        error: The matrix, ``[N, K]``.
        rank: Rank of the approximation, R.

    Returns:
        A tuple (A ``[R, K]``, B ``[N, R]``).
    """
    u, s, vh = torch.linalg.svd(error, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root
