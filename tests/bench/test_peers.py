"""Peers' kernels as contenders: stand-ins with their signatures, in PyTorch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastlora.bench import contenders, linear, mixed_kernels, peers, shapes
from fastlora.bench.harness import Checker

CPU = torch.device("cpu")


class LoRAW:
    """Unsloth's `LoRA_W`."""

    @staticmethod
    def apply(x: Any, weight: Any, quantized: None, a: Any, b: Any, scaling: float) -> Any:
        """Takes x ``[1, M, K]``."""
        return x @ weight.t() + scaling * (x @ a.t() @ b.t())


class Meta:
    """vLLM's `LoRAKernelMeta`, of which the stand-in needs the adapter of each row."""

    @staticmethod
    def make(max_loras: int, max_num_tokens: int, device: torch.device) -> Meta:
        """Makes one."""
        return Meta()

    def prepare_tensors(self, mapping: torch.Tensor) -> None:
        """Takes the adapter of each row."""
        assert mapping.dtype == torch.int32
        self.mapping = mapping

    def meta_args(self, tokens: int) -> tuple[torch.Tensor]:
        """What kernels take."""
        return (self.mapping[:tokens],)


def shrink(x: Any, factors: Any, out: Any, mapping: torch.Tensor, scaling: float) -> None:
    """Factors ``[adapters, 1, R, K]``, out ``[1, M, R]``."""
    out[0] = scaling * torch.einsum("mk,mrk->mr", x, factors[0][mapping.long(), 0])


def expand(
    s: Any, factors: Any, y: Any, mapping: torch.Tensor, offset_start: int, add_inputs: bool
) -> None:
    """Factors ``[adapters, 1, N, R]``."""
    assert add_inputs and not offset_start and factors[0].is_contiguous()
    y += torch.einsum("mr,mnr->mn", s[0], factors[0][mapping.long(), 0])


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both peers, as stand-ins."""
    ops = SimpleNamespace(LoRAKernelMeta=Meta, lora_shrink=shrink, lora_expand=expand)
    modules = {"unsloth": SimpleNamespace(LoRA_W=LoRAW), "vllm": ops}
    monkeypatch.setattr(peers, "is_installed", lambda name: True)
    monkeypatch.setattr(peers, "_module", modules.__getitem__)


@pytest.mark.usefixtures("installed")
def test_peers_solve_the_same_problems() -> None:
    """As `Checker` judges, and it sees a wrong one."""
    (unsloth,), (vllm,) = peers.peers_for("train"), peers.peers_for("mixed")
    assert peers.peers_for("forward") == ()
    train = next(p for p in shapes.tiny_points() if p.mode == "train")
    one = contenders.Problem.random(train, torch.float32, CPU, "eager")
    exact, by = contenders.truths(train, one), contenders.YARDSTICK
    checker = Checker(one, contenders.TRAIN, exact, by)
    assert checker.fault(unsloth) == ""
    mixed = next(p for p in shapes.tiny_mixed_points() if p.mode == "mixed")
    many = mixed_kernels.MixedProblem.random(mixed, torch.float32, CPU)
    checker = Checker(
        many, mixed_kernels.BY_HAND, mixed_kernels.truths(many), mixed_kernels.YARDSTICK
    )
    assert checker.fault(vllm) == ""
    many.vllm[0].mapping = many.vllm[0].mapping.roll(1)  # type: ignore[attr-defined]
    assert checker.fault(vllm).startswith("wrong: result 0")


def test_peers_that_are_not_there_are_listed_and_take_no_part(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "is_installed", lambda name: name == "vllm")
    assert [c.name for mode in ("train", "mixed") for c in peers.peers_for(mode)] == ["vllm"]
    with pytest.raises(SystemExit) as ended:
        linear.arguments("x").parse_args(["--list"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "train: base, peft, fused" in printed
    assert "unsloth (train): unsloth.kernels.fast_lora is not installed" in printed
    assert "vllm (mixed): vllm.lora.ops.triton_ops found" in printed
