"""Which cases of a large table a run takes: the hash of the commit draws them."""

from __future__ import annotations

import functools
import hashlib
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def commit() -> str:
    """Returns the hash of the commit that is tested, or nothing outside of a repository."""
    asked = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False)
    return found.stdout.strip()


def is_drawn(case: str, share: float) -> bool:
    """Whether the commit draws this case, as it does ``share`` of all cases."""
    digest = hashlib.sha256(f"{commit()} {case}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64
