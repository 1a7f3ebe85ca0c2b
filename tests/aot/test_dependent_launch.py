"""A dependent launch reads s behind its wait; a kernel that waits too late, or not always, shows.

That every shipped config does it right is a column of the table (`test_ahead_of_time.py`).
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fastlora import env, kernels
from tests.support.aot.compile_kernels import compile_launch
from tests.support.aot.launches import CHIPS, Case, cases, record
from tests.support.aot.resources import early_loads_of_s

pytestmark = pytest.mark.skipif(env.triton_interpreted(), reason="the interpreter compiles nothing")

WAIT = re.compile(r"^( +)if PDL:\n +tl\.extra\.cuda\.gdc_wait\(\)\n", re.M)
# What each kernel has behind its rank rows.
BEHIND = {
    "lora_linear": r"^( +)if HAS_BIAS:\n +acc \+= bias\[None, :\]\n",
    "mixed_lora_linear": r"^( +)if HAS_BIAS:\n +acc \+= bias\[None, :\]\n",
    "mixed_lora_expand": r"^( +)acc \*= scale\n",
}
EDITS = {
    "late": ("", r"\1if PDL:\n\1    tl.extra.cuda.gdc_wait()\n\g<0>"),
    "sometimes": (r"\1if PDL and pid_n == 0:\n\1    tl.extra.cuda.gdc_wait()\n", r"\g<0>"),
    "never": ("", r"\g<0>"),
}


def mutant(stem: str, edit: str, folder: Path) -> ModuleType:
    """A kernel's module with its wait elsewhere."""
    source = Path(importlib.import_module(f"fastlora.kernels.{stem}").__file__ or "").read_text()
    behind, (wait, edited) = re.compile(BEHIND[stem], re.M), EDITS[edit]
    assert len(WAIT.findall(source)) == len(behind.findall(source)) == 1
    path = folder / f"{stem}.py"
    path.write_text(behind.sub(edited, WAIT.sub(wait, source)))
    spec = importlib.util.spec_from_file_location(f"fastlora.kernels.{stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def smallest(stem: str) -> Case:
    """The heavy case on sm_90 that compiles fastest."""
    chips = [chip for chip in CHIPS if chip.arch == "sm_90"]
    found = [
        case
        for case in cases(chips)
        if case.shipped.kernel == stem
        and case.variant == "heavy"
        and case.shipped.dtype == torch.bfloat16
    ]
    return min(found, key=lambda c: c.shipped.config.block_m * c.shipped.config.block_n)


@pytest.mark.parametrize("stem", BEHIND)
@pytest.mark.parametrize("edit", ["", *EDITS])
def test_a_wait_in_the_wrong_place_shows(stem: str, edit: str, tmp_path: Path) -> None:
    case = smallest(stem)
    name = f"fastlora.kernels.{stem}"
    module = mutant(stem, edit, tmp_path) if edit else importlib.import_module(name)
    with mock.patch.dict(sys.modules, {name: module}), mock.patch.object(kernels, stem, module):
        launch = record(case)
    assert launch.arguments["launch_pdl"]
    early = early_loads_of_s(launch, compile_launch(launch, case.arch), case.arch)
    assert (early > 0) == bool(edit)
