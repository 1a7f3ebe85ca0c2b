"""The differences from PEFT that `docs/differences.md` states, where a script meets them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tests.support.differential import base_biases
from tests.support.differential.bases import SAMPLES
from tests.support.differential.meeting import WITHIN, Meeting
from tests.support.differential.scripts import Operation, Script


class Exemption(NamedTuple):
    """A row of `docs/differences.md`.

    Attributes:
        title: The beginning of the row, or of one of its sentences.
        applies: Whether the row is about a difference.
        witness: A script that meets it.
    """

    title: str
    applies: Callable[[Meeting], bool]
    witness: Script


def _wrap(targets: Any, **config: Any) -> Operation:
    config = {"r": 2, "target_modules": targets, **config}
    return Operation("wrap", {"adapter_name": "default", "config": config})


def _add(name: str, targets: Any, **config: Any) -> Operation:
    config = {"r": 2, "target_modules": targets, **config}
    return Operation("add", {"adapter_name": name, "config": config})


def _op(name: str, **arguments: Any) -> Operation:
    return Operation(name, arguments)


def _set(names: Any) -> Operation:
    return _op("set", adapter_name=names)


def _mixed(*names: str) -> Operation:
    return _op("mixed", adapter_names=[*names, *["default"] * (SAMPLES - len(names))])


def _differing(meeting: Meeting) -> set[str]:
    """The keys in which two dicts differ."""
    _, ours, theirs = meeting.difference
    return {key for key in ours | theirs if ours.get(key) != theirs.get(key)}


def _some_lack(meeting: Meeting, field: str) -> bool:
    """Whether some of the loaded adapters have a field, and others do not."""
    values = [bool(config[field]) for config in meeting.configs.values()]
    return any(values) and not all(values)


def _cast_while_merged(meeting: Meeting) -> bool:
    names = [operation.name for operation in meeting.done]
    return "merge" in names and "cast" in names[names.index("merge") :]


def _of_sum(meeting: Meeting, part: str) -> bool:
    """Whether the shapes of a sum's own tensors with this part in their names differ."""
    what, ours, theirs = meeting.difference
    name = f".{meeting.operation.arguments['adapter_name']}."
    if what in ("parameters", "trainable"):
        names = _differing(meeting) if what == "parameters" else set(ours) ^ set(theirs)
        return all(name in f"{key}." and part in key for key in names)
    shapes = [None if each is None else getattr(each, "shape", None) for each in (ours, theirs)]
    return shapes[0] != shapes[1] and name in f"{what}." and part in what


def _biases_of_others(meeting: Meeting) -> bool:
    """Whether a file differs only in base biases of layers that are no targets of its adapter.

    With ``bias="all"`` only in their names.
    """
    what, ours, theirs = meeting.difference
    wrapped, bare = "base_layer.bias", "bias"
    if not what.endswith(": shapes"):
        return (ours is None and what.endswith(wrapped)) or (theirs is None and what.endswith(bare))
    adapter = what.removeprefix("file ").removesuffix(": shapes")
    targets = {key.partition(".lora_")[0] for key in theirs if ".lora_" in key}
    files = [{key.replace(wrapped, bare) for key in file} for file in (ours, theirs)]
    missing = {key.removesuffix(f".{bare}") for key in files[1] - files[0]}
    if meeting.configs[adapter]["bias"] == "all" and missing:
        return False
    return files[0] <= files[1] and not missing & targets


def _only_extra(meeting: Meeting, *ends: str) -> bool:
    """Whether a file of PEFT's has keys with these ends, and is ours but for them."""
    what, ours, theirs = meeting.difference
    if what.endswith(": shapes"):
        return dict(ours) == {k: v for k, v in theirs.items() if not k.endswith(ends)}
    return ours is None and what.endswith(ends)


def _stays_merged(meeting: Meeting) -> bool:
    """Whether it shows that adapters stay merged here, and that PEFT has unmerged them."""
    what, ours, theirs = meeting.difference
    if what == "layers' merged_adapters":
        rows = _of_rows(meeting.merged())  # which PEFT leaves merged
        return _merged(ours) == meeting.merged() and _merged(theirs).items() <= rows.items()
    if what.startswith("parameter/"):
        return meeting.in_merged() and meeting.was(ours)
    # Factors that are merged have no part in the forward.
    names = {name for names in meeting.merged().values() for name in names}
    of_merged = meeting.in_merged() and any(f".{name}." in f"{what}." for name in names)
    return what.startswith("gradient/") and of_merged and ours is None


def _others_act(meeting: Meeting, merged: dict[str, list[str]]) -> bool:
    """Whether it is an output or gradient, and other adapters than the active ones are merged."""
    facts = meeting.after
    for layer, names in merged.items():
        active = {*facts["active"]} & {*facts["layers' available_adapters"][layer]}
        if active != {*names}:
            return meeting.about("output", "gradient/")
    return False


def _merges_again(meeting: Meeting) -> bool:
    """Whether it shows that PEFT unmerges in the forward, and what was merged here still is."""
    fact = "layers' merged_adapters"
    values = meeting.values, meeting.values_after
    return (
        meeting.about(WITHIN)
        and _unmerged_at_once(meeting)
        and meeting.after[fact] == meeting.before[fact]
        and all(torch.equal(value, values[1][name]) for name, value in values[0].items())
    )


def _starts_from_merged(meeting: Meeting) -> bool:
    """Whether it is the magnitude of a new adapter with DoRA on a layer with merged adapters."""
    what = meeting.difference.what
    return what.startswith("initial/") and "lora_magnitude" in what and meeting.in_merged()


def _unmerged_at_once(meeting: Meeting, rows: bool = False) -> bool:
    """Whether it shows that nothing is merged here, and that in PEFT what was merged still is.

    With ``rows`` only what was merged of trained rows.
    """
    what, ours, theirs = meeting.difference
    what = what.removeprefix(WITHIN)
    if what == "layers' merged_adapters":
        merged = meeting.merged()
        return not any(ours.values()) and _merged(theirs) == (_of_rows(merged) if rows else merged)
    if what.startswith("parameter/"):
        return meeting.in_merged() and meeting.was(theirs) and (not rows or "token_adapter" in what)
    return False


def _rows_unmerged_at_once(meeting: Meeting) -> bool:
    """Whether it shows that trained rows are unmerged here, and that in PEFT they still are."""
    what, _, theirs = meeting.difference
    # Rows that are merged have no part in the forward.
    idle = what.startswith("gradient/") and ".trainable_tokens_delta." in what and theirs is None
    return (
        _unmerged_at_once(meeting, rows=True)
        or (idle and meeting.in_merged())
        or _others_act(meeting, _of_rows(meeting.merged()))
    )


def _of_rows(merged: dict[str, list[str]]) -> dict[str, list[str]]:
    return {layer: names for layer, names in merged.items() if "token_adapter" in layer}


def _merged(found: dict[str, list[str]]) -> dict[str, list[str]]:
    """The layers that have merged adapters, each with their names."""
    return {layer: names for layer, names in found.items() if names}


def _weighted(*adapters: str, kind: str = "cat", name: str = "birch", **options: Any) -> Operation:
    options |= {"adapters": list(adapters), "weights": [0.5 for _ in adapters]}
    return Operation("weighted", {"adapter_name": name, "combination_type": kind, **options})


RELOAD = _op("reload", is_trainable=True)
FROZEN = _op("set", adapter_name="default", inference_mode=True)
EXEMPTIONS: tuple[Exemption, ...] = (
    Exemption(
        "A failed call changes nothing",
        lambda m: m.about("theirs after a refusal"),
        Script(
            "Llama",
            (_wrap(["q_proj"]), _add("ash", ["q_proj"], r=3, init_lora_weights="orthogonal")),
        ),
    ),
    Exemption(
        "DoRA adapters can share a batch",
        lambda m: m.of("mixed") and m.accepted("DoRA", "variants") and any(m.chosen("use_dora")),
        Script("Llama", (_wrap(["q_proj"], use_dora=True), _mixed("default", "__base__"))),
    ),
    Exemption(
        "Modules of any class in `modules_to_save` can be used with a mixed batch",
        lambda m: m.of("mixed") and m.accepted("Mixed batching is only supported"),
        Script("Llama", (_wrap(["q_proj"], modules_to_save=["norm"]), _mixed("default"))),
    ),
    Exemption(
        "Convolutions with a dilation or a padding mode",
        lambda m: m.script.base == "Whisper" and m.accepted("no attribute 'stride'"),
        Script("Whisper", (_wrap(["conv1"]),)),
    ),
    Exemption(
        "The base biases that an adapter's config selects",
        base_biases.follow_their_rules,
        Script("Llama", (_wrap(["q_proj"]), _add("ash", ["v_proj"], bias="all"), _set("ash"))),
    ),
    Exemption(
        "inactive adapter's copies of modules (`modules_to_save`) are also trained",
        lambda m: (
            m.less()
            and m.trains(*(f"modules_to_save.{n}.bias" for n in m.inactive()))
            and any(config["bias"] == "all" for config in m.configs.values())
        ),
        Script(
            "BERT",
            (
                _wrap(["query"], bias="all", modules_to_save=["classifier"]),
                _add("ash", ["key"], modules_to_save=["classifier"]),
            ),
        ),
    ),
    Exemption(
        "In the adapter's file, each bias has the name that it would have in a model with only",
        lambda m: m.about("file ") and _biases_of_others(m),
        Script(
            "Llama",
            (_wrap(["q_proj"], bias="all"), _add("ash", ["v_proj"]), RELOAD),
        ),
    ),
    Exemption(
        "under names that no loader reads",
        lambda m: (
            m.about("file ")
            and any(config["bias"] == "all" for config in m.configs.values())
            and _only_extra(m, ".modules_to_save.bias", ".original_module.bias")
        ),
        Script("BERT", (_wrap(["query"], bias="all", modules_to_save=["classifier"]), RELOAD)),
    ),
    Exemption(
        "`disable_adapter` restores the previous trainable state",
        lambda m: (
            m.of("within_disabled")
            and m.about("trainable", "gradient/")
            and m.after["trainable"] == m.before["trainable"]
        ),
        Script("Llama", (_wrap(["q_proj"]), FROZEN, _op("within_disabled"))),
    ),
    Exemption(
        "`enable_adapter_layers` and exiting `disable_adapter`",
        lambda m: m.of("enable") and m.less(),
        Script("Llama", (_wrap(["q_proj"]), FROZEN, _op("disable"), _op("enable"))),
    ),
    Exemption(
        "A forward pass inside `disable_adapter` after `merge_adapter`",
        lambda m: m.of("within_disabled") and _merges_again(m),
        Script("Llama", (_wrap(["q_proj"]), _op("merge"), _op("within_disabled"))),
    ),
    Exemption(
        "**`unmerge` is exact.**",
        lambda m: _cast_while_merged(m) and m.about("parameter/", "output", "gradient/", "within"),
        Script("Llama", (_wrap(["q_proj"]), _op("merge"), _op("cast"), _op("unmerge"))),
    ),
    Exemption(
        "Merging into a head that shares the embedding's weight",
        lambda m: m.of("merge") and m.only_fastlora_raises("shares its weight with"),
        Script("GPT-2", (_wrap(["lm_head"]), _op("merge"))),
    ),
    Exemption(
        "Adding or loading an adapter leaves merged adapters merged",
        lambda m: (
            m.of("add", "load", "weighted")
            and (_stays_merged(m) or _starts_from_merged(m) or _others_act(m, m.merged()))
        ),
        Script("Llama", (_wrap(["q_proj"]), _op("merge"), _add("ash", ["v_proj"]))),
    ),
    Exemption(
        "`set_adapter` freezes the module copies and trained rows of all other adapters",
        lambda m: m.of("set") and m.less() and m.trains("modules_to_save", "trainable_tokens"),
        Script(
            "Llama",
            (
                _wrap(["q_proj"], modules_to_save=["norm"]),
                _op("load", saved="default", adapter_name="ash", is_trainable=True),
                _set("default"),
            ),
        ),
    ),
    Exemption(
        "Deleting an adapter that is not active",
        lambda m: (
            m.of("delete")
            and m.less()
            and m.trains("modules_to_save", "trainable_tokens")
            and m.operation.arguments["adapter_name"] not in m.before["active"]
        ),
        Script(
            "Llama",
            (
                _wrap(["q_proj"], trainable_token_indices=[1]),
                FROZEN,
                _add("ash", ["v_proj"], trainable_token_indices=[2]),
                _op("delete", adapter_name="ash"),
            ),
        ),
    ),
    Exemption(
        "Deleting the active adapter",
        lambda m: (
            m.of("delete")
            and m.operation.arguments["adapter_name"] in m.before["active"]
            and (
                (len(m.before["active"]) == 1 and m.after["active"] == m.after["adapters"][:1])
                or (m.less() and not any(m.before["layers' enabled"].values()))
                or m.accepted("Attempted to set multiple")
            )
        ),
        Script(
            "Llama",
            (
                _wrap(["q_proj"]),
                _add("ash", ["v_proj"]),
                _op("delete", adapter_name="default"),
            ),
        ),
    ),
    Exemption(
        "Adapters with and without trainable tokens",
        lambda m: (
            m.of("load", "reload", "mixed", "merge", "merge_and_unload")
            and (_some_lack(m, "trainable_token_indices") or _some_lack(m, "modules_to_save"))
            and m.accepted("token_adapter.trainable_tokens_delta", *(f"'{n}'" for n in m.configs))
        ),
        Script(
            "Llama",
            (_wrap(["q_proj"], trainable_token_indices=[1]), _add("ash", ["v_proj"]), RELOAD),
        ),
    ),
    Exemption(
        "A layer's own `set_adapter`",
        lambda m: m.of("set") and m.only_fastlora_raises("no adapter"),
        Script("Llama", (_wrap(["q_proj"]), _set(["default", "ash"]))),
    ),
    Exemption(
        "Sums of rsLoRA adapters are scaled correctly",
        lambda m: m.of("weighted") and m.about("update/", "file ") and any(m.chosen("use_rslora")),
        Script("Llama", (_wrap(["q_proj"], use_rslora=True), _weighted("default"))),
    ),
    Exemption(
        "Passing the name of an existing adapter raises an error, whereas PEFT returns silently",
        lambda m: m.of("weighted") and m.only_fastlora_raises("already exists"),
        Script("Llama", (_wrap(["q_proj"]), _weighted("default", name="default"))),
    ),
    Exemption(
        "DoRA adapters, adapters with trainable tokens",
        lambda m: m.of("weighted") and m.only_fastlora_raises("uses DoRA", "trains token embed"),
        Script("Llama", (_wrap(["q_proj"], use_dora=True), _weighted("default"))),
    ),
    Exemption(
        "Adapters that train base biases can be combined",
        lambda m: m.of("weighted") and m.accepted("only 1 adapter with bias"),
        Script("Llama", (_wrap(["q_proj"], bias="all"), _weighted("default"))),
    ),
    Exemption(
        "The config of the combined adapter records the rank of the factors for each layer",
        lambda m: (
            m.difference.what.endswith(": config")
            and any(m.about(f"file {name}:") for name in m.sums())
            and _differing(m)
            <= {"rank_pattern", "alpha_pattern", "init_lora_weights", "modules_to_save"}
            | {"use_rslora"}
        ),
        Script("Llama", (_wrap(["q_proj"], init_lora_weights=False), _weighted("default"), RELOAD)),
    ),
    Exemption(
        "PEFT's config records the largest rank as the rank of every layer",
        lambda m: m.of("weighted") and _of_sum(m, "lora_"),
        Script("Llama", (_wrap(["q_proj"]), _add("ash", ["v_proj"]), _weighted("default", "ash"))),
    ),
    Exemption(
        "The combined adapter also includes module copies that exist in only one of the original",
        lambda m: (
            m.of("weighted")
            and any(m.chosen("modules_to_save"))
            and (_of_sum(m, "modules_to_save") or m.about("layers' available_adapters"))
        ),
        Script(
            "Llama",
            (
                _wrap(["q_proj"]),
                _add("ash", ["q_proj"], modules_to_save=["norm"]),
                _weighted("default", "ash", kind="linear"),
            ),
        ),
    ),
    Exemption(
        "Calling `load_adapter(is_trainable=True)` with a name that is already in use",
        lambda m: (
            m.of("load")
            and m.operation.arguments["is_trainable"]
            and m.operation.arguments["adapter_name"] in m.before["adapters"]
            and (m.about("gradient/") or m.difference.what == "trainable")
            and m.trains(f".{m.operation.arguments['adapter_name']}.")
        ),
        Script(
            "Llama",
            (
                _wrap(["q_proj"]),
                FROZEN,
                _op("load", saved="default", adapter_name="default", is_trainable=True),
            ),
        ),
    ),
    Exemption(
        "Calling `merge_adapter` while adapters are disabled",
        lambda m: m.of("merge") and m.only_fastlora_raises("adapters are disabled"),
        Script("Llama", (_wrap(["q_proj"]), _op("disable"), _op("merge"))),
    ),
    Exemption(
        "**Unknown adapter names** raise an error in `set_requires_grad`, `merge_adapter",
        lambda m: (
            m.of("require", "merge", "merge_and_unload") and m.only_fastlora_raises("no adapter")
        ),
        Script(
            "Llama",
            (_wrap(["q_proj"]), _op("require", adapter_names="ash", requires_grad=False)),
        ),
    ),
    Exemption(
        "**Loading an adapter under a name that is already in use**",
        lambda m: m.of("load") and m.only_fastlora_raises("the loaded adapter"),
        Script(
            "Llama",
            (
                _wrap(["q_proj"]),
                _add("ash", ["v_proj"]),
                _op("load", saved="ash", adapter_name="default", is_trainable=False),
            ),
        ),
    ),
    Exemption(
        "If the existing adapter is merged, loading raises an error.",
        lambda m: m.of("load") and m.only_fastlora_raises("is currently merged"),
        Script(
            "Llama",
            (
                _wrap(["q_proj"]),
                _op("merge"),
                _op("load", saved="default", adapter_name="default", is_trainable=False),
            ),
        ),
    ),
    Exemption(
        "`disable_adapter_layers` unmerges merged adapters immediately",
        lambda m: m.of("disable") and _unmerged_at_once(m),
        Script("Llama", (_wrap(["q_proj"]), _op("merge"), _op("disable"))),
    ),
    Exemption(
        "`set_adapter` on a merged model",
        lambda m: m.of("set") and _rows_unmerged_at_once(m),
        Script(
            "Llama",
            (_wrap(["q_proj"], trainable_token_indices=[1]), _op("merge"), _set("default")),
        ),
    ),
    Exemption(
        "An adapter cannot target a module that another adapter has copied",
        lambda m: (
            m.of("add", "load")
            and (
                m.only_fastlora_raises("modules_to_save")
                or (m.about("initial/") and m.inside(".original_module.", ".modules_to_save."))
            )
        ),
        Script(
            "Llama",
            (
                _wrap(["q_proj"], modules_to_save=["lm_head"]),
                _add("ash", "all-linear", trainable_token_indices={"lm_head": [1]}),
            ),
        ),
    ),
    Exemption(
        "LoRA on a head that is tied to the embedding",
        lambda m: (
            m.of("wrap", "add")
            and bool(m.config.get("trainable_token_indices"))
            and m.only_fastlora_raises("already adapted with LoRA (target_modules)")
        ),
        Script("T5", (_wrap(["q", "lm_head"], trainable_token_indices=[1]),)),
    ),
    Exemption(
        "**Names of experts.**",
        lambda m: (
            m.script.base == "Mixtral"
            and (
                isinstance(m.config.get("target_modules"), str)
                or (m.difference.what.endswith(": config") and _differing(m) == {"target_modules"})
            )
        ),
        Script("Mixtral", (_wrap("all-linear"),)),
    ),
    Exemption(
        "**Mixtral.** If `target_modules` is not set",
        lambda m: (
            m.script.base == "Mixtral"
            and m.config.get("target_modules", "") is None
            and m.accepted("No `target_modules` passed", "No modules were targeted")
        ),
        Script("Mixtral", (_wrap(None),)),
    ),
)


def row_of(meeting: Meeting) -> str | None:
    """The title of the row that states a difference, or None."""
    for exemption in EXEMPTIONS:
        if exemption.applies(meeting):
            return exemption.title
    return None
