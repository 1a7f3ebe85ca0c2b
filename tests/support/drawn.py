"""Which cases of a large table a run takes: the hash of the commit draws them."""

from __future__ import annotations

import functools
import math
import os
import random
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def commit() -> str:
    """Returns the hash of the commit that is tested, or nothing outside of a repository."""
    asked = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False)
    return found.stdout.strip()


def is_drawn() -> bool:
    """Whether the run takes a part of large tables: lanes do, a file that is run alone does not."""
    return os.environ.get("FASTLORA_CASES", "all") != "all"


def draw(cases: Sequence[str], share: float, table: str = "") -> set[str]:
    """Returns the part of a table's cases that the commit draws, at least one of them."""
    count = math.ceil(len(cases) * share)
    return set(random.Random(f"{commit()} {table}").sample(sorted(cases), count))
