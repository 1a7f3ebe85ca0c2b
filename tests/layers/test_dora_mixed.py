"""DoRA rows beside plain ones: joint equals solo, nothing reaches another's rows, and the pool."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import AdapterPool, LoraConfig, LoraModel, adapters, get_peft_model
from fastlora.model.adapter_folder import KEY_PREFIX, WEIGHTS_NAME
from fastlora.train import train_adapters
from fastlora.validation import CheckpointError
from tests.support.pool_adapters import Blocks, make_folder
from tests.support.tiny import TwoLayers

peft = pytest.importorskip("peft", reason="compares with PEFT")

NAMES = ["dora", "plain", None, "wide", "dora", "other"]
# Every row has DoRA in "v", the first adapter drops and the second does not.
IN_ORDER = ["dora", "dora", "wide", "wide", "wide", "wide"]
SEEDS = {"dora": 1, "plain": 2, "wide": 3, "other": 4}


def model_of(p: float, dtype: torch.dtype = torch.float64) -> Any:
    """Four adapters, three with DoRA; of different ranks, targets and dropouts."""
    torch.manual_seed(0)
    model: Any = get_peft_model(
        TwoLayers(),
        LoraConfig(r=3, target_modules=["q", "v"], use_dora=True, lora_dropout=p),
        adapter_name="dora",
    )
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["q"], lora_dropout=p))
    model.add_adapter("wide", LoraConfig(r=8, target_modules=["v"], use_dora=True))
    model.add_adapter(
        "other", LoraConfig(r=3, target_modules=["q"], use_dora=True, lora_dropout=p / 2)
    )
    model.to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_((1 + torch.randn(parameter.shape) / 2).to(dtype))
    train_adapters(model, list(SEEDS))
    return model


def gradients(model: Any, loss: torch.Tensor, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of every adapter parameter, by name; those that have none are left out."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    named |= {f"x{i}": t for i, t in enumerate(inputs)}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: g for n, g in zip(named, found, strict=True) if g is not None}


@pytest.mark.parametrize(
    ("p", "tokens", "names"),
    [(0.0, False, NAMES), (0.4, False, NAMES), (0.0, True, NAMES), (0.4, True, NAMES)]
    + [(0.4, False, IN_ORDER), (0.4, False, IN_ORDER[::-1])],
)
def test_joint_training_is_solo_training(p: float, tokens: bool, names: list[str | None]) -> None:
    """Outputs and every gradient of each adapter, with dropout, for ids per sample and token."""
    model = model_of(p)
    x = torch.randn(6, 5, 16, dtype=torch.float64, requires_grad=True)
    rows = 5 if tokens else 1
    slots = {name: i for i, name in enumerate(model.peft_config)}
    ids: Any = names
    if tokens:
        ids = torch.tensor([slots.get(n, -1) for n in names]).repeat_interleave(rows)
    with adapters(model, ids, seeds=SEEDS):
        y = model(x)
    joint = gradients(model, y.pow(2).sum(), x)
    for name in {*names}:
        own = [i for i, n in enumerate(names) if n == name]
        with adapters(model, [name] * len(own), seeds=SEEDS):
            alone = model(x[own])
        torch.testing.assert_close(alone, y[own])
        solo = gradients(model, alone.pow(2).sum(), x)
        torch.testing.assert_close(solo.pop("x0")[own], joint["x0"][own])
        assert all(f".{name}." in n for n in solo)
        for key, grad in solo.items():
            torch.testing.assert_close(grad, joint[key], msg=lambda m, key=key: f"{key}: {m}")
    magnitudes = [n for n in joint if "magnitude" in n]
    if names is NAMES:
        assert len(magnitudes) == 4 and len(joint) == 1 + 4 + 2 * 5


@pytest.mark.parametrize("training", [True, False])
def test_one_adapter_for_all_rows_is_the_active_one(training: bool) -> None:
    """A batch of one adapter gives what set_adapter gives, gradients too."""
    model = model_of(0.0).train(training)
    x = torch.randn(4, 16, dtype=torch.float64)
    for name in SEEDS:
        with adapters(model, [name] * 4):
            mixed = model(x)
        routed = gradients(model, mixed.pow(2).sum())
        model.set_adapter(name)
        plain = model(x)
        torch.testing.assert_close(mixed, plain)
        found = gradients(model, plain.pow(2).sum())
        assert set(found) == set(routed) and found
        for key, grad in found.items():
            torch.testing.assert_close(grad, routed[key])
        train_adapters(model, list(SEEDS))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_inference_packed_or_not(dtype: torch.dtype) -> None:
    """The first forward, those from packed factors, and those after a change of a magnitude."""
    model = model_of(0.3, dtype).eval()
    x = torch.randn(6, 16).to(dtype)
    with torch.no_grad():
        for scale in (1.0, 1.5):
            for name, parameter in model.named_parameters():
                if "magnitude" in name:
                    parameter.mul_(scale)
            truth, expected = copy.deepcopy(model).double(), []
            for i, name in enumerate(NAMES):
                with adapters(truth, [name]):
                    expected.append(truth(x[i : i + 1].double()))
            for _ in range(2):
                with adapters(model, NAMES):
                    for _ in range(3):
                        y = model(x)
                        tolerance = 1e-12 if dtype == torch.float64 else 2**-5
                        largest = torch.cat(expected).abs().max()
                        assert (y - torch.cat(expected)).abs().max() <= tolerance * largest


def test_not_a_number_stays_in_its_rows() -> None:
    """Neither a DoRA adapter's NaN nor an infinite base row reaches rows of others."""
    model = model_of(0.0).eval()
    x = torch.randn(6, 16, dtype=torch.float64)
    with torch.no_grad():
        with adapters(model, NAMES):
            expected = model(x)
        layer = model.base_model.model.q
        layer.lora_magnitude_vector["other"].weight.fill_(float("nan"))
        for _ in range(3):
            with adapters(model, NAMES):
                y = model(x)
            assert y[5].isnan().all()
            torch.testing.assert_close(y[:5], expected[:5])
        x[2] = float("inf")
        with adapters(model, NAMES):
            torch.testing.assert_close(model(x)[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])
    with adapters(model, NAMES):
        torch.testing.assert_close(model(x)[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_and_a_late_backward(reentrant: bool) -> None:
    """A checkpoint recomputes outside of the block what it computed inside, with dropout."""
    model = model_of(0.4)
    results = []
    for wrap in (False, True):
        x = torch.randn(6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        x.requires_grad_(True)
        with adapters(model, NAMES, seeds=SEEDS):
            y = checkpoint(model, x, use_reentrant=reentrant) if wrap else model(x)
        model.zero_grad()
        y.pow(2).sum().backward()
        named = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append({"y": y.detach(), "x": x.grad, **named})
    assert results[0].keys() == results[1].keys() and len(results[0]) == 16
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key]), key


def test_a_patched_peft_model_mixes_dora_rows() -> None:
    """Which PEFT itself refuses: adapter_names, and training through fastlora.adapters."""
    torch.manual_seed(0)
    model = peft.get_peft_model(
        TwoLayers().double(), peft.LoraConfig(r=3, target_modules=["q", "v"], use_dora=True)
    )
    model.add_adapter("plain", peft.LoraConfig(r=2, target_modules=["q"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(1 + torch.randn(parameter.shape) / 2)
    x = torch.randn(3, 16, dtype=torch.float64)
    names = ["plain", "default", "__base__"]
    model.eval()
    with pytest.raises(ValueError, match="DoRA"):
        copy.deepcopy(model)(x, adapter_names=names)  # which leaves hooks behind
    expected = []
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                expected.append(model(x[i : i + 1]))
        else:
            model.set_adapter(name)
            expected.append(model(x[i : i + 1]))
    fastlora.patch(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x, adapter_names=names), torch.cat(expected))
    with adapters(model.train(), names):
        torch.testing.assert_close(model(x), torch.cat(expected))


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


@pytest.mark.parametrize("max_adapters", [3, 8])
def test_a_pool_serves_dora(root: Path, max_adapters: int) -> None:
    """By name and by slot, from packed factors too, and where only the input wants a gradient."""
    model, pool = pool_of(root, torch.float64, max_adapters=max_adapters)
    expected = alone(root)
    with torch.no_grad():
        for _ in range(3):
            with adapters(pool, OWN):
                torch.testing.assert_close(model(IDS), expected)
        slots = torch.tensor([-1 if n is None else pool.slot_of(n) for n in OWN])
        with adapters(pool, slots):
            torch.testing.assert_close(model(IDS), expected)
    embedded = model.embed(IDS).detach().requires_grad_(True)
    with adapters(pool, OWN):
        hidden = embedded
        for layer in model.layers:
            hidden = layer(hidden)
        y = model.head(hidden)
    torch.testing.assert_close(y, expected)
    (grad,) = torch.autograd.grad(y.pow(2).sum(), embedded)
    plain = LoraModel.from_pretrained(_blocks(), root / "a").double()
    own = model.embed(IDS[:1]).detach().requires_grad_(True)
    hidden = own
    for layer in plain.base_model.model.layers:
        hidden = layer(hidden)
    loss = plain.base_model.model.head(hidden).pow(2).sum()
    torch.testing.assert_close(grad[:1], torch.autograd.grad(loss, own)[0])


def _blocks() -> Blocks:
    torch.manual_seed(0)
    return Blocks()


def test_a_pool_follows_swaps_evictions_and_the_base(root: Path, tmp_path: Path) -> None:
    """A replaced adapter's norms are its own, and a changed base weight is seen."""
    model, pool = pool_of(root, torch.float64, max_adapters=2)
    make_folder(tmp_path / "new", 7, r=2, use_dora=True)
    with torch.no_grad():
        with adapters(pool, ["a", "b"]):
            before = model(IDS[:2])
        pool.load("a", tmp_path / "new")
        with adapters(pool, ["a", "c"]):  # b goes
            swapped = model(IDS[:2])
        fresh = LoraModel.from_pretrained(_blocks(), tmp_path / "new").double().eval()
        torch.testing.assert_close(swapped[:1], fresh(IDS[:1]))
        assert not torch.allclose(swapped[:1], before[:1])
        model.layers[0].q.weight.mul_(2)
        fresh.base_model.model.layers[0].q.weight.mul_(2)
        with adapters(pool, ["a"]):
            torch.testing.assert_close(model(IDS[:1]), fresh(IDS[:1]))


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
