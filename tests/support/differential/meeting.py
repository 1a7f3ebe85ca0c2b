"""Where a script meets a difference, and what is known of the model there."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from tests.support.differential.observations import Difference
from tests.support.differential.scripts import Operation, Script

WITHIN = "within disable_adapter(): "  # in front of what is seen within the block


class First(NamedTuple):
    """The model when it got its first adapter, which is when PEFT decides which biases train.

    Attributes:
        adapter_name: The adapter.
        bias: Of its config.
        parameters: Names of the model's parameters.
    """

    adapter_name: str
    bias: str
    parameters: frozenset[str]


class Meeting(NamedTuple):
    """Where a difference was found.

    Attributes:
        script: The script.
        done: The operations before the one that differs.
        operation: The operation that differs.
        difference: How it differs; ``what`` is ``"refusal"`` where one side refuses.
        configs: PEFT's config of each adapter, as a dict, before the operation.
        before: The facts of our side before the operation.
        after: The facts of our side behind it.
        values: Our side's parameters before the operation.
        values_after: Our side's parameters behind it.
        first: The model when it got its first adapter.
    """

    script: Script
    done: tuple[Operation, ...]
    operation: Operation
    difference: Difference
    configs: dict[str, dict[str, Any]]
    before: dict[str, Any]
    after: dict[str, Any]
    values: dict[str, torch.Tensor]
    values_after: dict[str, torch.Tensor]
    first: First

    @property
    def config(self) -> dict[str, Any]:
        """The config that the operation adds."""
        config: dict[str, Any] = self.operation.arguments.get("config", {})
        return config

    def only_fastlora_raises(self, *words: str) -> bool:
        """Whether fastlora alone raises, with one of these words."""
        what, ours, theirs = self.difference
        raised = isinstance(ours, Exception) and not isinstance(theirs, Exception)
        return what == "refusal" and raised and any(word in str(ours) for word in words)

    def accepted(self, *words: str) -> bool:
        """Whether PEFT alone raises, with one of these words."""
        what, ours, theirs = self.difference
        accepted = isinstance(theirs, Exception) and not isinstance(ours, Exception)
        return what == "refusal" and accepted and any(word in str(theirs) for word in words)

    def of(self, *operations: str) -> bool:
        """Whether the operation is one of these."""
        return self.operation.name in operations

    def about(self, *kinds: str) -> bool:
        """Whether the difference is in facts or values whose keys begin like this."""
        return self.difference.what.startswith(kinds)

    def trains(self, *parts: str) -> bool:
        """Whether it is about what trains, and only about names with one of these parts."""
        what, ours, theirs = self.difference
        if what.endswith("trainable"):
            names = set(ours or ()) ^ set(theirs or ())
        else:
            names = {what.partition("gradient/base_model.model.")[2]}
        return all(any(part in name for part in parts) for name in names)

    def inside(self, *parts: str) -> bool:
        """Whether it is a value of PEFT's alone, with one of these parts in its name."""
        what, ours, _ = self.difference
        return ours is None and any(part in what for part in parts)

    def less(self) -> bool:
        """Whether it is about what trains, and less of it trains than in PEFT."""
        what, ours, theirs = self.difference
        if what == "trainable":
            return set(ours) < set(theirs)
        return what.startswith("gradient/") and ours is None

    def merged(self) -> dict[str, list[str]]:
        """The adapters that are merged before the operation, by the name of their layer."""
        found = self.before.get("layers' merged_adapters", {})
        return {layer: names for layer, names in found.items() if names}

    def in_merged(self) -> bool:
        """Whether it is a value of a layer that has merged adapters before the operation."""
        _, found, name = self.difference.what.partition("/")
        return bool(found) and any(
            name.startswith(f"base_model.{layer}.") for layer in self.merged()
        )

    def was(self, value: torch.Tensor | None) -> bool:
        """Whether a value is what our side's parameter of this name was before the operation."""
        before = self.values.get(self.difference.what.partition("/")[2])
        return before is not None and value is not None and torch.allclose(value, before, rtol=1e-9)

    def sums(self) -> list[str]:
        """The adapters that `add_weighted_adapter` made."""
        return [op.arguments["adapter_name"] for op in self.done if op.name == "weighted"]

    def inactive(self) -> list[str]:
        """The adapters behind the operation that do not act."""
        return [n for n in self.after.get("adapters", ()) if n not in self.after["active"]]

    def chosen(self, field: str) -> list[Any]:
        """The values of a field in the configs of the adapters that the operation names."""
        arguments = self.operation.arguments
        names = arguments.get("adapters") or arguments.get("adapter_names") or self.configs
        return [self.configs[name][field] for name in names if name in self.configs]
