"""Writes `docs/peft_suite.md`: which of PEFT's own tests fail over fastlora, by class, and why.

    python -m tests.support.peft_suite BASE OURS [PATCHED] > docs/peft_suite.md

Each argument is a file of results, one JSON object a test: ``id``, ``outcome`` as pytest's, and
for a failure ``why`` with ``type``, ``message`` and ``test``, the lines of the test that failed.
BASE is PEFT alone; OURS with `LoraConfig`, `get_peft_model`, `PeftModel` and `TaskType` of the
package ``peft`` replaced by ours before the tests import them; PATCHED with every LoRA model given
to `fastlora.patch`. A test that was run twice counts with its last result.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """A class of failing tests.

    Attributes:
        label: What the tests ask for.
        reason: Why they fail here.
        pattern: What a failure of the class has in its type, message, test or lines.
    """

    label: str
    reason: str
    pattern: str


NOT_OURS = "refused by name; `peft.get_peft_model`, then `fastlora.patch`"
RULES = (
    Rule(
        "Variants of LoRA: aLoRA, BD-LoRA, VeLoRA, KaSA, MonteCLoRA, Arrow, QALoRA",
        NOT_OURS,
        r"does not have (velora|alora|monteclora|arrow|kasa|use_bdlora|use_qalora)"
        r"|[Kk]asa|[Aa]lora|ActivatedLora|Montec|[Aa]rrow|BdLora|[Vv]elora",
    ),
    Rule("`target_parameters`", NOT_OURS, r"does not have target_parameters|argetParameter"),
    Rule("Other methods than LoRA, mixed models", NOT_OURS, r"peft_type|mixed=True|[Mm]ixedModel"),
    Rule("Megatron layers", NOT_OURS, r"does not have megatron"),
)


def text_of(entry: dict[str, Any]) -> str:
    """Returns what the rules look at."""
    why = entry.get("why") or {}
    first = " ".join(str(why.get("message", "")).splitlines()[:3])
    return f"{why.get('type')} | {first} | {entry['id']} | {why.get('test')}"


def read(path: str) -> dict[str, dict[str, Any]]:
    """Returns the last result of each test; a failed teardown does not hide a failed call."""
    found: dict[str, dict[str, Any]] = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        old = found.get(entry["id"])
        if not (old and entry.get("when") == "teardown" and old["outcome"] == "failed"):
            found[entry["id"]] = entry
    return found


def worse(base: dict[str, Any], ours: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns what fails, and passes with PEFT alone."""
    return [
        entry
        for name, entry in ours.items()
        if entry["outcome"] in ("failed", "error")
        and base.get(name, {}).get("outcome") in ("passed", "xfailed")
    ]


def passed(results: dict[str, dict[str, Any]]) -> int:
    """Returns how many tests passed."""
    return sum(entry["outcome"] == "passed" for entry in results.values())
