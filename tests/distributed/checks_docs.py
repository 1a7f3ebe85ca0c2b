"""The code of docs/distributed.md, as it stands; run by test_processes.py."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import fastlora
from tests.support.distributed import steps

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)


def given() -> dict[str, Any]:
    """The names that a reader has before each block."""
    model = steps.build()
    for name in ("a", "b"):
        model.add_adapter(name, fastlora.LoraConfig(r=4, target_modules=["q_proj"]))
    return {
        "fastlora": fastlora,
        "torch": torch,
        "model": model,
        "base_model": steps.tiny_llama(),
        "ids": steps.own_half(steps.tokens(0)),
        "names": ["a", "a"] if steps.rank() == 0 else ["b", None],
    }


def check_blocks(folder: Path) -> None:
    """Each block by itself; what some of them leave behind is right."""
    assert len(BLOCKS) == 4
    for number, block in enumerate(BLOCKS):
        (folder / str(number)).mkdir(exist_ok=True)
        os.chdir(folder / str(number))
        names = given()
        exec(compile(block, f"docs/distributed.md block {number}", "exec"), names)
        dist.barrier()
        if "report" in names:
            assert names["report"].stepped == ("a", "b")
        else:
            assert Path("adapter/adapter_model.safetensors").is_file()
            assert Path("adapter/b/adapter_model.safetensors").is_file()
    rows = fastlora.fusion_report(names["model"]).rows
    assert sum("tensor parallel" in row.reason for row in rows) == 6 < len(rows)
