"""Stages that chips share are what each chip's own compile makes: equal PTX, equal resources."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fastlora import env
from tests.support.aot.compile_kernels import compile_launch, measure_group
from tests.support.aot.launches import CHIPS, Case, cases, record
from tests.support.aot.shared_compiles import Compiled, compile_for, groups_of
from tests.support.aot.specialisation import specialise, target_of

pytestmark = pytest.mark.skipif(env.triton_interpreted(), reason="the interpreter compiles nothing")

SHARING = ("sm_80", "sm_86", "sm_89")


def group_of(stem: str, dtype: torch.dtype) -> list[Case]:
    """The cheapest of a kernel's heavy cases that all sharing chips compile alike."""
    chosen = cases([chip for chip in CHIPS if chip.arch in SHARING])
    of_stem = [
        case
        for case in chosen
        if (case.shipped.kernel, case.shipped.dtype, case.variant) == (stem, dtype, "heavy")
    ]
    groups = groups_of(of_stem, lambda case: repr(specialise(record(case), case.arch)))
    whole = [group for group in groups if [case.arch for case in group] == list(SHARING)]
    return min(whole, key=lambda group: group[0].shipped.config.block_r)


def instructions(ptx: str) -> list[str]:
    """PTX without what names source lines."""
    lines = ptx.partition(".section")[0].splitlines()
    return [line for line in lines if not re.match(r"\s*(\.loc|\.file|//|$)", line)]


@pytest.mark.parametrize(
    ("stem", "dtype"),
    [
        ("lora_linear", torch.bfloat16),
        ("mixed_lora_shrink", torch.float32),
        ("lora_grad_b", torch.bfloat16),
    ],
)
def test_a_shared_stage_gives_what_a_chip_of_its_own_gives(stem: str, dtype: torch.dtype) -> None:
    group = group_of(stem, dtype)
    assert measure_group(group) == [row for case in group for row in measure_group([case])]
    alone = {case.arch: compile_launch(record(case), case.arch) for case in group}
    for donor, stage, case in (("sm_80", "ttgir", group[1]), ("sm_86", "ptx", group[2])):
        given = Compiled(alone[donor].asm, alone[donor].metadata.shared)
        options = specialise(record(case), case.arch).options
        made = compile_for(target_of(case.arch), given, stage, options)
        whole = alone[case.arch]
        assert instructions(made.asm["ptx"]) == instructions(whole.asm["ptx"])
        assert made.shared == whole.metadata.shared


def test_every_case_is_in_one_group() -> None:
    """Chips of other generations share nothing; the three together save two in five compiles."""
    chosen = cases()
    groups = groups_of(chosen, lambda case: repr(specialise(record(case), case.arch)))
    assert sorted(map(repr, chosen)) == sorted(repr(case) for group in groups for case in group)
    for group in groups:
        archs = [case.arch for case in group]
        assert len(group) == 1 or archs == sorted(set(archs))
        assert len(group) == 1 or set(archs) <= set(SHARING)
