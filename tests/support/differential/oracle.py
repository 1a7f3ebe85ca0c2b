"""Runs a script on fastlora and on PEFT, and raises where they differ."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

import fastlora
from tests.support.differential.exemptions import row_of
from tests.support.differential.meeting import First, Meeting
from tests.support.differential.observations import Difference, differences
from tests.support.differential.scripts import Operation, Script, draw
from tests.support.differential.sides import Observation, Side, peft

READS = ("load", "reload")  # operations that read what `save` wrote
FIRST = ("wrap", "reload")  # operations that give a base model its first adapter
OURS = ("save", "observe")  # operations that never raise in fastlora
SHOWN = 8  # differences in a message


class Disagreement(AssertionError):
    """The sides differ, and no row of `docs/differences.md` says so."""


def run_seed(seed: int) -> list[str]:
    """Runs a seed's script; returns the rows of `docs/differences.md` that ended it early."""
    script = draw(seed)
    try:
        return run(script)
    except Disagreement as found:
        raise Disagreement(
            f"{found}\nReplay: FASTLORA_FUZZ_SEEDS={seed} python -m pytest tests/differential"
        ) from None


def run(script: Script) -> list[str]:
    """Runs a script, and ends it at the first difference.

    Returns:
        The rows of `docs/differences.md` that state the difference; none where there is none.

    Raises:
        Disagreement: No row states it. The message has the script up to there.
    """
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _Run(script, Path(folder)).run()


class _Run:
    """Three sides: ours and PEFT's in float64, and PEFT's in float32 for the budget."""

    def __init__(self, script: Script, folder: Path) -> None:
        self.script = script
        library = peft if script.patched else fastlora
        self.ours = Side(script, library, torch.float64, folder / "ours", script.patched)
        self.theirs = Side(script, peft, torch.float64, folder / "theirs")
        self.single = Side(script, peft, torch.float32, folder / "single")
        self.ours.partner, self.theirs.partner = self.theirs, self.ours
        self.sides = (self.ours, self.theirs, self.single)
        self.first = First("", "none", frozenset())

    def run(self) -> list[str]:
        """Runs the operations until one differs; see `run`."""
        for number, operation in enumerate(self.script.operations):
            done, configs = self.script.operations[:number], self.configs()
            before, values = self.ours.facts(), self.ours.copied()
            found = self.operate(operation, number)
            after, values_after = self.ours.facts(), self.ours.copied()
            if operation.name in FIRST:
                self.first = self.first_adapter(after)
            meetings = [
                Meeting(
                    self.script,
                    done,
                    operation,
                    difference,
                    configs,
                    before,
                    after,
                    values,
                    values_after,
                    self.first,
                )
                for difference in found
            ]
            rows = [row_of(meeting) for meeting in meetings]
            unstated = [m for m, row in zip(meetings, rows, strict=True) if row is None]
            if unstated:
                shown = self.script._replace(operations=(*done, operation))
                lines = [f"  {meeting.difference}" for meeting in unstated[:SHOWN]]
                raise Disagreement("\n".join([str(shown), *lines]))
            if meetings:
                return sorted({row for row in rows if row is not None})
            if self.theirs.model is None:  # both sides raised for the first adapter
                break
        return []

    def configs(self) -> dict[str, dict[str, Any]]:
        """PEFT's config of each adapter."""
        held = getattr(self.theirs.model, "peft_config", None) or {}
        return {name: config.to_dict() for name, config in held.items()}

    def first_adapter(self, facts: dict[str, Any]) -> First:
        """What PEFT's model got first, with the facts of our side."""
        name, config = next(iter(self.configs().items()), ("", {"bias": "none"}))
        return First(name, config["bias"], frozenset(facts.get("parameters", ())))

    def operate(self, operation: Operation, number: int) -> list[Difference]:
        """Runs an operation on every side; returns the differences behind it."""
        if operation.name in READS:
            saved, found = self.each(Operation("save"), number)
            if found or not saved:
                return found
        observed, found = self.each(operation, number)
        if found or not observed:
            return found
        if operation.name == "weighted":
            for side in (self.ours, self.single):
                side.copy_adapter(self.theirs, operation.arguments["adapter_name"])
        return self.each(Operation("observe"), number)[1]

    def each(self, operation: Operation, number: int) -> tuple[list[Any], list[Difference]]:
        """Runs an operation on every side.

        Returns:
            What each side returned, none where all of them refuse; and the differences.
        """
        before = [side.state() for side in self.sides]
        outcomes = [self.outcome(side, operation, number) for side in self.sides]
        ours, theirs, single = outcomes
        raised = [isinstance(outcome, Exception) for outcome in outcomes]
        if not any(raised):
            return outcomes, list(differences(*outcomes))
        if raised[0] != raised[1]:
            return [], [Difference("refusal", ours, theirs)]
        if not raised[2]:
            return [], [Difference("refusal in float32", single, theirs)]
        if operation.name in OURS and not self.script.patched:  # else PEFT is on every side
            return [], [Difference("refusal of every side", ours, theirs)]
        found = []
        if not isinstance(ours, (ValueError, TypeError, RuntimeError)) and not self.script.patched:
            found.append(Difference("class of the error", ours, theirs))
        for name, side, was in zip(("ours", "theirs"), self.sides, before, strict=False):
            if not (self.script.patched and name == "ours"):  # it is a model of PEFT's
                now = side.state()
                found += [
                    Difference(f"{name} after a refusal: {key}", now[key], was[key])
                    for key in was
                    if now[key] != was[key]
                ]
        return [], found

    def outcome(self, side: Side, operation: Operation, number: int) -> Observation | Exception:
        """What an operation returns, or the error that it raises."""
        try:
            return side.run(operation, number)
        except Exception as error:  # PEFT raises any class of error
            return error
