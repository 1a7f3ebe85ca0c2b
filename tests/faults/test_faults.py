"""The table of faults holds what its readers rely on; `make faults` tries the faults themselves."""

from __future__ import annotations

import re
import subprocess
from collections import Counter

from tests.faults.fault import ROOT, all_faults

FAULTS = all_faults()


def test_every_fault_applies_and_changes_its_file() -> None:
    for fault in FAULTS:
        text = (ROOT / fault.path).read_text(encoding="utf-8")
        assert fault.planted() != text, fault.sentence
        compile(fault.planted(), fault.path, "exec")


def test_every_fault_names_tests_that_exist() -> None:
    for fault in FAULTS:
        assert fault.tests, fault.sentence
        for name in fault.tests:
            path, *inner = name.partition("[")[0].split("::")
            text = (ROOT / path).read_text(encoding="utf-8")
            assert inner, name
            assert all(re.search(rf"\b(def|class) {word}\b", text) for word in inner), name


def test_there_are_enough_different_faults() -> None:
    assert len(FAULTS) >= 80
    assert len({fault.sentence for fault in FAULTS}) == len(FAULTS)
    kinds = Counter((fault.path, fault.function(), fault.kind) for fault in FAULTS)
    assert [key for key, number in kinds.items() if number > 1] == []


def test_most_faults_name_the_commit_that_fixed_them() -> None:
    commits = [fault.source for fault in FAULTS if re.fullmatch(r"[0-9a-f]{7,}", fault.source)]
    assert len(commits) >= 50
    shallow = ["git", "-C", str(ROOT), "rev-parse", "--is-shallow-repository"]
    if subprocess.run(shallow, capture_output=True, text=True, check=False).stdout != "false\n":
        return  # a copy without its history
    for name in commits:
        asked = ["git", "-C", str(ROOT), "cat-file", "-e", f"{name}^{{commit}}"]
        assert subprocess.run(asked, check=False).returncode == 0, name
