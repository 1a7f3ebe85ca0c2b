"""DoRA rows beside plain ones: joint equals solo, nothing reaches another's rows, and the pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastlora import AdapterPool, adapters
from fastlora.model.adapter_folder import KEY_PREFIX, WEIGHTS_NAME
from fastlora.validation import CheckpointError
from tests.support.pool_adapters import Blocks, make_folder

peft = pytest.importorskip("peft", reason="compares with PEFT")


# ------------------------------------------------------------------------------- the pool


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two DoRA adapters and a plain one."""
    folder = tmp_path_factory.mktemp("dora")
    make_folder(folder / "a", 1, r=2, use_dora=True)
    make_folder(folder / "b", 2, r=4, target_modules=["v"], use_rslora=True, use_dora=True)
    make_folder(folder / "c", 3, r=3, target_modules=["q"])
    return folder


IDS = torch.arange(12).view(4, 3) % 11
OWN = ["a", "c", None, "b"]


def alone(root: Path, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Each sample with its adapter loaded by PEFT."""
    rows = []
    for i, name in enumerate(OWN):
        torch.manual_seed(0)
        model: Any = Blocks()
        if name is not None:
            model = peft.PeftModel.from_pretrained(model, root / name)
        with torch.no_grad():
            rows.append(model.to(dtype).eval()(IDS[i : i + 1]))
    return torch.cat(rows)


def pool_of(root: Path, dtype: torch.dtype, **limits: Any) -> tuple[Blocks, AdapterPool]:
    """The same model at every call, and its pool."""
    torch.manual_seed(0)
    model = Blocks().to(dtype).eval()
    pool = AdapterPool(model, target_modules=["q", "v"], **limits)
    pool.register_folder(root)
    return model, pool


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_magnitudes_of_a_16_bit_pool_are_not_rounded(root: Path, dtype: torch.dtype) -> None:
    """They stay in fp32, bit for bit, and outputs are within 16-bit rounding of PEFT's."""
    model, pool = pool_of(root, dtype, max_adapters=3)
    stored = load_file(root / "a" / WEIGHTS_NAME)
    with pool.lease(["a", "b"]) as lease:
        factors = lease.residents[0].factors(pool.modules.index(pool.modules[0]))
        name = pool.modules[0].name
        assert factors.magnitude.dtype == torch.float32
        assert torch.equal(factors.magnitude, stored[f"{KEY_PREFIX}{name}.lora_magnitude_vector"])
        assert factors.lora_a.dtype == dtype
    expected = alone(root)
    with torch.no_grad(), adapters(pool, OWN):
        y = model(IDS)
    assert (y.double() - expected).abs().max() < 8 * torch.finfo(dtype).eps * expected.abs().max()


def test_a_pool_refuses_dora_where_a_weight_cannot_be_read(root: Path) -> None:
    """The norm needs the base weight; the pool is as it was."""

    class Opaque(torch.nn.Module):
        in_features, out_features = 10, 14

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, x], -1)[..., :14]

    torch.manual_seed(0)
    model = Blocks()
    model.layers[0].q = Opaque()
    pool = AdapterPool(model, target_modules=["q", "v"])
    with pytest.raises(CheckpointError, match=r"'layers.0.q': DoRA needs the base weight"):
        pool.load("a", root / "a")
    assert pool.names == []
    pool.load("b", root / "b")
