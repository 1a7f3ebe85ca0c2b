"""Which base biases train, here and in PEFT; `docs/differences.md` has both rules."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from tests.support.differential.meeting import WITHIN, Meeting


def follow_their_rules(meeting: Meeting) -> bool:
    """Whether the two rules name different biases, and each side trains those of its own rule."""
    what, ours, theirs = meeting.difference
    what = what.removeprefix(WITHIN)
    if what != "trainable" and not what.startswith("gradient/"):
        return False
    expected = here(meeting), in_peft(meeting)
    if expected[0] == expected[1]:
        return False
    if what == "trainable":
        found = [{_plain(name) for name in names or ()} for names in (ours, theirs)]
        biases = [_base_biases(names) for names in found]
        return biases == [*expected] and found[0] - biases[0] == found[1] - biases[1]
    name = _plain(what.removeprefix("gradient/"))
    has = ours is not None, theirs is not None
    return has == (name in expected[0], name in expected[1])


def here(meeting: Meeting) -> set[str]:
    """Those that the adapters ask for which are active and train."""
    facts = meeting.after if "active" in meeting.after else meeting.before
    if meeting.difference.what.startswith(WITHIN):
        return set()
    return {
        bias
        for name in facts["active"]
        if any(_is_factor(parameter, name) for parameter in facts["trainable"])
        for bias in _asked(facts["parameters"], name, _bias_of(meeting, name))
    }


def in_peft(meeting: Meeting) -> set[str]:
    """Those that the model's first adapter asked for when it was added."""
    first = meeting.first
    return _asked(first.parameters, first.adapter_name, first.bias)


def _bias_of(meeting: Meeting, name: str) -> str:
    config: dict[str, Any] = meeting.configs.get(name, meeting.config)
    bias: str = config.get("bias", "none")
    return bias


def _asked(parameters: Collection[str], name: str, bias: str) -> set[str]:
    """The base biases that an adapter's config asks for, but for those of modules it copies."""
    biases = _base_biases(map(_plain, parameters))
    copies = {
        p.partition(".modules_to_save.")[0] for p in parameters if f".modules_to_save.{name}." in p
    }
    if bias == "all":
        return {b for b in biases if not any(b.startswith(f"{copy}.") for copy in copies)}
    if bias == "lora_only":
        return biases & {
            f"{p.partition('.lora_')[0]}.bias" for p in parameters if _is_factor(p, name)
        }
    return set()


def _is_factor(parameter: str, name: str) -> bool:
    return ".lora_" in parameter and f".{name}." in f"{parameter}."


def _base_biases(names: Any) -> set[str]:
    others = (".lora_", ".modules_to_save.")
    return {n for n in names if n.endswith(".bias") and not any(other in n for other in others)}


def _plain(name: str) -> str:
    """The name of a base parameter without the wrapper of a copied module."""
    return name.replace(".original_module.", ".")
