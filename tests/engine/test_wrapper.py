"""Each method of the wrapper on vLLM's own layers, compared with a loop over rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.engine import vllm_layers
from tests.engine.vllm_layers import ADAPTERS, K, MIX, SLOTS, VOCABULARY

from fastlora.testing import assert_within_budget

pytestmark = pytest.mark.usefixtures("one_process")
MIXES = {
    "mixed": MIX,
    "one row": (9,),
    "one row without an adapter": (0,),
    "one adapter": (7,) * 17,
    "no adapter": (0,) * 17,
    "long samples": (7,) * 24 + (0,) * 16 + (3,) * 24,
}


def _run(case: vllm_layers.Case, x: torch.Tensor, ids: tuple[int, ...]) -> torch.Tensor:
    own = vllm_layers.wrapper(128)
    case.layer.set_mapping(own)
    vllm_layers.start_batch(own, ids)
    with torch.inference_mode():
        result = case.layer(x.clone())
    return result[0] if isinstance(result, tuple) else result


def _check(case: vllm_layers.Case, ids: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(len(ids), K, dtype=dtype)
    slots = vllm_layers.slots_of(ids)
    y = _run(case, x, ids)
    base = _run(case, x, (0,) * len(ids))
    truth = base.double() + vllm_layers.updates(x, case, slots, torch.float64)
    same = (base + vllm_layers.updates(x, case, slots, dtype)).to(dtype)
    assert_within_budget(y, same, truth)
    for row, slot in enumerate(slots):
        if slot < 0:
            assert torch.equal(y[row], base[row])


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("name", vllm_layers.LINEAR)
def test_linear_layers(name: str, mix: str) -> None:
    _check(vllm_layers.linear_case(name), MIXES[mix], torch.float32)


def test_bf16() -> None:
    case = vllm_layers.linear_case("MergedQKVParallelLinearWithLoRA", torch.bfloat16)
    _check(case, MIX, torch.bfloat16)
