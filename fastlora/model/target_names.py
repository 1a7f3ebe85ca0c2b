"""Match the names of modules and parameters to the entries of a config, by PEFT's rules.

The rules follow PEFT 0.21.2, ``tuners/tuners_utils.py``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from fastlora.patterns import (
    count_toward_matching_time_limit,
    layer_index_after_match,
    matches_consecutive_components,
    matches_whole_name,
)
from fastlora.validation import near_names

if TYPE_CHECKING:
    from fastlora.model.config import LoraConfig

ALL_LINEAR = "all-linear"

# Heads that PEFT trains in full for a task, even if modules_to_save does not name them.
_TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
# Maximum number of names to list in a message. A config may have any number of names.
_MOST_SHOWN = 10


def saved_modules_and_task_heads(config: LoraConfig) -> list[str]:
    """Return the names of the modules to save, including the heads of the config's task type.

    The list consists of the entries of ``modules_to_save`` and the names from `task_heads`, without
    duplicates.
    """
    return list(dict.fromkeys([*(config.modules_to_save or ()), *task_heads(config)]))


def task_heads(config: LoraConfig) -> tuple[str, ...]:
    """Return the names of the task heads to train and save for a config's task type.

    As in PEFT, these names are added to ``modules_to_save``.
    """
    return _TASK_HEADS.get(config.task_type or "", ())


def is_all_linear(targets: object) -> bool:
    """Return whether a value of ``target_modules`` is ``"all-linear"``."""
    return isinstance(targets, str) and targets.lower() == ALL_LINEAR


def dotted_suffixes_shortest_first(name: str) -> list[str]:
    """Return all suffixes of a dotted name, from the shortest to the longest.

    The first suffix is the last component, and the last suffix is the whole name. For example, the
    suffixes of ``"a.b.c"`` are ``["c", "b.c", "a.b.c"]``.
    """
    found, at = [], len(name)
    while at >= 0:
        at = name.rfind(".", 0, at)
        found.append(name[at + 1 :])
    return found


def distinguishing_suffixes(names: Collection[str], others: Iterable[str]) -> set[str]:
    """Return the shortest suffixes that match all of ``names`` and none of ``others``.

    The result is a small set, because one suffix can match several names. If all suffixes of a name
    match others, the whole name is used.
    """
    taken = {suffix for other in others for suffix in dotted_suffixes_shortest_first(other)}
    chosen: set[str] = set()
    for name in sorted(names):
        suffixes = dotted_suffixes_shortest_first(name)
        if not any(suffix in chosen for suffix in suffixes):
            chosen.add(next((s for s in suffixes if s not in taken), name))
    return chosen


def matches_names(name: str, entries: Collection[str]) -> bool:
    """Return whether a name matches at least one of the entries.

    An entry matches if it is the whole name or the last components of the name. For example, the
    entry ``"b.c"`` matches ``"b.c"`` and ``"a.b.c"``, but not ``"a.bb.c"``.
    """
    return any(map(entries.__contains__, dotted_suffixes_shortest_first(name)))


def is_excluded(name: str, config: LoraConfig, saved: list[str]) -> bool:
    """Return whether a config excludes the module or parameter with a given name.

    A name is excluded from the targets if it matches ``exclude_modules`` or one of the modules to
    save.

    Args:
        name: The name of a module or parameter.
        config: The adapter's config.
        saved: The result of `saved_modules_and_task_heads`.
    """
    exclude = config.exclude_modules
    if isinstance(exclude, str):
        if exclude and matches_whole_name("exclude_modules", exclude, name):
            return True
    elif exclude and matches_names(name, exclude):
        return True
    # Here, an entry matches whole path components and everything below them. In
    # find_modules_to_save, it matches any suffix. Both rules are PEFT's.
    with count_toward_matching_time_limit("modules_to_save"):
        return any(
            matches_consecutive_components("modules_to_save", entry, name) for entry in saved
        )


def matches_targets(name: str, targets: set[str] | str, config: LoraConfig) -> bool:
    """Return whether a name matches the target modules of a config.

    The targets are the resolved ``target_modules``: a set of names or a regular expression. If the
    targets are a set, the name must also belong to one of the layers in ``layers_to_transform``. A
    full name in the set is exempt from this layer filter. Exclusions are checked separately: see
    `is_excluded`.
    """
    if isinstance(targets, str):
        return matches_whole_name("target_modules", targets, name)
    if name in targets:
        return True  # a full name is exempt from the layer filter
    return matches_names(name, targets) and in_layers(name, config)


def in_layers(name: str, config: LoraConfig) -> bool:
    """Return whether a name belongs to one of the layers in the config's ``layers_to_transform``.

    If ``layers_to_transform`` is not set, the result is True.
    """
    layers = config.layers_to_transform
    if layers is None or layers == []:
        return True
    patterns = config.layers_pattern or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    # The first number in the name is the layer's index. Later numbers may be indices of experts.
    if patterns:
        with count_toward_matching_time_limit("layers_pattern"):
            found = (
                layer_index_after_match("layers_pattern", pattern, name) for pattern in patterns
            )
            index = next((i for i in found if i is not None), None)
    else:
        match = re.match(r".*?\.[^.]*\.(\d+)\.", name)
        index = None if match is None else int(match[1])
    # A config may list any number of layers.
    with count_toward_matching_time_limit("layers_to_transform"):
        return index in layers if isinstance(layers, list) else index == layers


def suggest_names(entries: Sequence[str], names: list[str], kind: str = "modules") -> str:
    """Return text that suggests similar names for config entries that match nothing.

    The text is appended to a message about the entries, which match no name in a model. If there
    are no similar names, the text lists names in the model.
    """
    for entry in entries[:_MOST_SHOWN]:
        # Compare with names of the same number of components: `attn.q_proj` with
        # `self_attn.q_proj`.
        depth = entry.count(".")
        candidates = sorted(
            {s for n in names for s in dotted_suffixes_shortest_first(n)[depth : depth + 1]}
        )
        close = near_names(entry, candidates)
        if close:
            return close
    return (
        f"; the model has {kind} named "
        f"{', '.join(sorted({n.rpartition('.')[2] for n in names})[:10])}"
    )


def format_config_value(value: Collection[Any] | str | int | None) -> str:
    """Format the value of a config field for a message.

    A collection is sorted, and a long collection is truncated.
    """
    if value is None or isinstance(value, (str, int)):
        return repr(value)
    more = len(value) - _MOST_SHOWN
    return f"{sorted(value)[:_MOST_SHOWN]}" + (f" and {more} more" if more > 0 else "")
