"""Writes `docs/peft_suite.md`: which of PEFT's own tests fail over fastlora, by class, and why.

    python -m tests.support.peft_suite BASE OURS [PATCHED] > docs/peft_suite.md

Each argument is a file of results, one JSON object a test: ``id``, ``outcome`` as pytest's, and
for a failure ``why`` with ``type``, ``message`` and ``test``, the lines of the test that failed.
BASE is PEFT alone; OURS with `LoraConfig`, `get_peft_model`, `PeftModel` and `TaskType` of the
package ``peft`` replaced by ours before the tests import them; PATCHED with every LoRA model given
to `fastlora.patch`. A test that was run twice counts with its last result.
"""

from __future__ import annotations

import collections
import json
import re
import sys
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


NOT_OURS = "not supported by fastlora; use `peft.get_peft_model`, then `fastlora.patch`"
DIFFERS = "[differences](differences.md)"
RULES = (
    Rule(
        "aLoRA, BD-LoRA, VeLoRA, KaSA, MonteCLoRA, Arrow, QALoRA",
        NOT_OURS,
        r"does not support (velora|alora|monteclora|arrow|kasa|use_bdlora|use_qalora)"
        r"|[Kk]asa|[Aa]lora|ActivatedLora|Montec|[Aa]rrow|BdLora|[Vv]elora",
    ),
    Rule(
        "Methods other than LoRA, models that mix methods",
        NOT_OURS,
        r"expected 'LORA'|must be 'LORA'|mixed=True|[Mm]ixedModel|[Pp]rompt|prefix_tuning",
    ),
    Rule(
        "Pickles",
        f"fastlora neither reads nor writes them; {DIFFERS}, Files",
        r"safe_serialization|adapter_model.bin",
    ),
    Rule("Hub ids", f"fastlora downloads nothing; {DIFFERS}, Files", r"no such folder. Only local"),
    Rule(
        "A second `get_peft_model` on the same base model",
        f"raises an error, where PEFT warns; {DIFFERS}, Adapters",
        r"already has LoRA layers|test_mapping",
    ),
    Rule(
        "Mixed batches, sums, and different sets of `target_parameters`",
        f"work, where PEFT raises an error; {DIFFERS}, Config",
        r"DID NOT RAISE.*DecoderModelsTargetParameters::test_(generate_with_)?mixed_adapter"
        r"|ModelsTargetParameters::test_weighted_combination|with_different_target_parameters",
    ),
    Rule(
        "Mixed batches in training and with DoRA",
        f"work, where PEFT raises an error; {DIFFERS}, Adapters",
        r"DID NOT RAISE.*(mixed_adapter|DoRA)|mixed_adapter.*DID NOT RAISE|MixedAdapterBatches.*",
    ),
    Rule(
        "`target_parameters` that match nothing, parametrized weights",
        f"raise an error that names them; {DIFFERS}, Config",
        r"invalid_target_parameters_warns|with_existing_parametrization",
    ),
    Rule(
        "Merging into a shared weight",
        f"raises an error, or separates the weights with another warning; {DIFFERS}, Adapters",
        r"shares its weight|[Tt]ied|tie_word|WeightTying",
    ),
    Rule(
        "Adapters with the name of a module",
        f"lose no tensors, so there is no warning; {DIFFERS}, Adapters",
        r"NamingConflict",
    ),
    Rule(
        "Missing tensors, or tensors of the wrong shape",
        f"raise an error before anything changes; {DIFFERS}, Adapters",
        r"missing_keys_warning|FsdpShape|ignore_mismatched_sizes|state_dict has no",
    ),
    Rule(
        "PEFT's LoRA layers with `_register_custom_module`",
        f"must be subclasses of `fastlora.layers.LoraLayer`; {DIFFERS}, Adapters",
        r"registered for this|DynamicDispatch",
    ),
    Rule(
        "Sums of adapters with trainable tokens",
        f"raise an error, where PEFT drops the tokens; {DIFFERS}, Adapters",
        r"which cannot be combined with",
    ),
    Rule(
        "Text or class of an error",
        f"fastlora's names the layer, the field, and the value; {DIFFERS}, Adapters",
        r"Regex pattern did not match\.|matches no module|with a forward method, got|DID NOT RAISE"
        r"|bias must be one of|this layer has no adapter|has no default targets"
        r"|selects rows of|ensure_weight_tying makes|cannot split",
    ),
    Rule(
        "Text or class of a warning",
        f"fastlora's names what is left out; {DIFFERS}, Adapters",
        r"DID NOT WARN|warnings emitted|_warns|any\(<generator",
    ),
    Rule(
        "PEFT's classes, private methods, and caches",
        f"fastlora has its own; {DIFFERS}, Adapters",
        r"isinstance\(|has no attribute '|TestTargetParameters::|TestDoraCaching"
        r"|Prefixes|repr_lora|assert \[\]"
        r"|AuxiliaryTrainingWrapper|MinimalTargetModules|test_merge_layers.*LoRA trainable_tokens",
    ),
    Rule(
        "Others, one test each",
        f"sums rounded in another order, one factor of a pair, one layer set alone; {DIFFERS}",
        r"layer_replication|embed_scale_is|wrapped_learnable_bias|expected both factors"
        r"|extra_key_raises"
        r"|lora_plus_embedding|use_dora_linear|active_adapters_irregular"
        r"|FastLoraMultiheadAttention|auto class",
    ),
    Rule(
        "Config files",
        f"checked when they are read and when they are created; {DIFFERS}, Config",
        r"test_config.py",
    ),
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


def main(base_path: str, ours_path: str, patched_path: str | None = None) -> str:
    """Returns the page."""
    base, ours = read(base_path), read(ours_path)
    found: collections.Counter[int] = collections.Counter()
    rest = []
    for entry in worse(base, ours):
        text = text_of(entry)
        rule = next((n for n, r in enumerate(RULES) if re.search(r.pattern, text)), None)
        if rule is None:
            rest.append(text[:300])
        else:
            found[rule] += 1
    lines = [
        "# PEFT's own tests",
        "",
        "This page shows how many of PEFT 0.21.2's own tests pass with fastlora. The counts",
        "exclude tests that mention only PEFT methods other than LoRA. The tests ran on a CPU",
        "without access to the Hugging Face Hub. Instead of the models on the Hub, the tests used",
        "small, randomly initialized models with the same names and architectures.",
        "",
        "| run | passed | fail, but pass with PEFT alone |",
        "|---|---|---|",
        f"| PEFT alone | {passed(base):,} of {len(base):,} | |",
        f"| fastlora's `LoraConfig`, `get_peft_model`, `PeftModel`, `TaskType` | {passed(ours):,} |"
        f" {len(worse(base, ours)):,} |",
    ]
    if patched_path:
        patched = read(patched_path)
        worst = worse(base, patched)
        lines.append(
            f"| PEFT with `fastlora.patch` on every LoRA model | {passed(patched):,} |"
            f" {len(worst):,} |"
        )
    lines += [
        "",
        "## Tests that fail with fastlora in place of PEFT",
        "",
        "| tests about | number | why they fail |",
        "|---|---|---|",
    ]
    order = sorted(found, key=lambda n: -found[n])
    lines += [f"| {RULES[n].label} | {found[n]} | {RULES[n].reason} |" for n in order]
    if rest:
        lines += [f"| Not sorted | {len(rest)} | to be read |"]
    if patched_path:
        lines += ["", "## Tests that fail in patched models", ""]
        failed = [entry["id"].partition("::")[2] for entry in worst]
        lines += ["```text", *failed, "```"] if failed else ["No test fails."]
        if any("TestTargetParameters::" in name for name in failed):
            lines += [
                "",
                "The tests in `TestTargetParameters` fail because they replace PEFT's private",
                "method `_LoraFactorsProxy.forward`, which fastlora does not call for experts.",
            ]
    lines += [
        "",
        "## Update this page",
        "",
        "The tests are part of PEFT's source distribution. A pytest plugin runs the tests three",
        "times: with PEFT alone, with fastlora in place of PEFT, and with `fastlora.patch`",
        "applied to every LoRA model. For the second run, the plugin replaces PEFT's",
        "`LoraConfig`, `get_peft_model`, `PeftModel`, and `TaskType` with fastlora's versions",
        "before the tests import them. For each run, the plugin writes a file with one JSON",
        "object per test. The command `python -m tests.support.peft_suite BASE OURS PATCHED`",
        "generates this page from the three files. The module's docstring describes the format of",
        "the files.",
    ]
    sys.stderr.writelines(f"{text}\n" for text in rest)
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    sys.stdout.write(main(*sys.argv[1:]) + "\n")
