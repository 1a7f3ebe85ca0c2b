"""`make mutants`: changes one place of the code at a time, and counts what no test notices.

    python -m tests.faults.mutants [--only WORD] [--open] [--jobs N]

Cosmic Ray finds and makes the changes. A hash of each line draws the lines, and one change of each;
so an edit of other lines leaves a mutant drawn. `mutants.csv` lists the outcomes. A mutant that
survives needs a reason there: the run keeps the reasons of mutants that are still drawn.
"""

from __future__ import annotations

import argparse
import ast
import csv
import hashlib
import itertools
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cosmic_ray.ast
import cosmic_ray.mutating
import cosmic_ray.plugins

from tests.faults.fault import ROOT
from tests.faults.forks import Forks, forks
from tests.faults.run import OPTIONS, copy_to

SEED = "2026"
COUNT = 300
MOST_SURVIVORS = 0.1
# Seconds for the tests of one mutant.
LIMIT = 150
TABLE = Path(__file__).with_name("mutants.csv")
COLUMNS = ("module", "line", "occurrence", "change", "changed line", "outcome", "reason")
_CONFORMANCE = "tests/conformance/test_conformance.py -k model-mixed-plain"
_BLOCKS = ("tests/routing/test_open_blocks.py", "tests/routing/test_mixed_blocks.py")
# By the beginning of a module's path: runs of tests for its mutants, the fastest first.
TESTS = {
    "fastlora/algebra/": ("tests/algebra",),
    "fastlora/routing/row_": (
        "tests/routing/test_row_kinds.py",
        "tests/routing/test_row_samples.py",
        "tests/routing/test_selected_rows.py",
        "tests/routing/test_experts.py",
    ),
    "fastlora/routing/caches.py": (
        "tests/routing/test_cached_adapter_sets.py",
        "tests/routing/test_in_force.py",
        *_BLOCKS,
        "tests/ops/test_packed.py",
        _CONFORMANCE,
    ),
    "fastlora/routing/": (
        "tests/routing/test_ids.py",
        "tests/routing/test_watch.py",
        "tests/routing/test_in_force.py",
        "tests/routing/test_cached_adapter_sets.py",
        *_BLOCKS,
        _CONFORMANCE,
        "tests/routing/test_selected_rows.py",
        "tests/routing/test_sample_routings.py",
        "tests/test_public_api.py",
    ),
    "fastlora/ops/rows.py": ("tests/ops/test_rows.py", _CONFORMANCE),
    "fastlora/pool/tiers.py": (
        "tests/pool/test_pool.py",
        "tests/pool/test_pool_scales.py",
        "tests/pool/test_pool_threads.py",
        "tests/pool/test_pool_batches.py",
    ),
    "fastlora/model/targets.py": (
        "tests/model/test_targets.py",
        "tests/model/test_experts.py",
        "tests/model/test_expert_files.py",
    ),
}
# Variables are renamed only by operators that need their names. Identity for equality changes
# nothing for None, names, and small numbers.
_LEFT_OUT = ("Variable", "_Eq_Is", "_NotEq_IsNot", "_Is_Eq", "_IsNot_NotEq")

Place = tuple[int, int]


@dataclass(frozen=True)
class Mutant:
    """One change of one line.

    Attributes:
        path: The module.
        key: The first five columns of its row in the table.
        text: The module with the change.
    """

    path: str
    key: tuple[str, ...]
    text: str


def _hash(*parts: object) -> str:
    return hashlib.sha256(" ".join(map(str, (SEED, *parts))).encode()).hexdigest()


def left_out(tree: ast.Module) -> Iterator[tuple[Place, Place]]:
    """Yields where code is that says nothing of behavior: annotations, type imports, slots."""
    for node in ast.walk(tree):
        found: Sequence[ast.AST | None] = ()
        if isinstance(node, (ast.arg, ast.AnnAssign)):
            found = (node.annotation,)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found = (node.returns,)
        elif ast.unparse(node).startswith(("if TYPE_CHECKING:", "__slots__ =")):
            found = (node,)
        for each in filter(None, found):
            yield (each.lineno, each.col_offset), (each.end_lineno, each.end_col_offset)


def candidates(path: str) -> Iterator[tuple[int, str, int]]:
    """Yields the line, Cosmic Ray's name, and the occurrence of each change of a module."""
    text = (ROOT / path).read_text(encoding="utf-8")
    without = tuple(left_out(ast.parse(text)))
    nodes = tuple(cosmic_ray.ast.ast_nodes(cosmic_ray.ast.get_ast(text)))
    for name in cosmic_ray.plugins.operator_names():
        if any(part in name for part in _LEFT_OUT):
            continue
        operator = cosmic_ray.plugins.get_operator(name)()
        places = (place for node in nodes for place, *_ in operator.mutation_positions(node))
        for occurrence, place in enumerate(places):
            if not any(start <= place < stop for start, stop in without):
                yield place[0], name, occurrence


def drawn() -> list[Mutant]:
    """Returns the mutants in the order in which they are drawn."""
    ranked = []
    for file in sorted(ROOT.glob("fastlora/**/*.py")):
        path = file.relative_to(ROOT).as_posix()
        if not path.startswith(tuple(TESTS)):
            continue
        lines = file.read_text(encoding="utf-8").splitlines()
        changes: dict[int, list[tuple[str, int]]] = {}
        for line, name, occurrence in candidates(path):
            changes.setdefault(line, []).append((name, occurrence))
        seen: Counter[str] = Counter()
        for line in sorted(changes):
            before = lines[line - 1].strip()
            seen[before] += 1
            place = (path, before, str(seen[before]))
            ranked.append((_hash(*place), place, line, changes[line]))
    mutants = (_mutant(*each) for _, *each in sorted(ranked))
    return list(itertools.islice(filter(None, mutants), COUNT))


def _mutant(
    place: tuple[str, str, str], line: int, changes: Sequence[tuple[str, int]]
) -> Mutant | None:
    """Returns the change that is drawn of a line, or None where each one leaves no Python."""
    text = (ROOT / place[0]).read_text(encoding="utf-8")
    order = sorted(range(len(changes)), key=lambda index: _hash(*place, index, changes[index][0]))
    for name, occurrence in (changes[index] for index in order):
        operator = cosmic_ray.plugins.get_operator(name)()
        mutated = cosmic_ray.mutating.mutate_code(text, operator, occurrence)
        try:
            compile(mutated, place[0], "exec")
        except SyntaxError:
            continue
        after = "" if "RemoveDecorator" in name else mutated.splitlines()[line - 1].strip()
        return Mutant(place[0], (*place, name.removeprefix("core/"), after), mutated)
    return None


def runs_of(path: str) -> tuple[str, ...]:
    """Returns the runs of tests for a module's mutants."""
    return next(runs for start, runs in TESTS.items() if path.startswith(start))


def outcome(mutant: Mutant, lane: Forks, source: Path) -> str:
    """Runs the tests of a mutant, in a copy of the project, until one fails."""
    with tempfile.TemporaryDirectory(prefix="fastlora-mutant-") as scratch:
        folder = copy_to(Path(scratch), source)
        (folder / mutant.path).write_text(mutant.text, encoding="utf-8")
        for run in runs_of(mutant.path):
            code, output = lane.pytest(folder, (*OPTIONS, "-x", *run.split()), LIMIT)
            if code is None:
                return "time limit"
            if code or " passed" not in output:
                return "killed"
    return "survived"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the mutants; returns 0 when few survive, and each of those for a reason."""
    parser = argparse.ArgumentParser(description="change the code, and see that the tests notice")
    parser.add_argument("--only", default="", help="mutants with this in their module or line")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="mutants at a time")
    parser.add_argument("--open", action="store_true", help="new ones, then survivors")
    args = parser.parse_args(argv)
    mutants = drawn()
    with TABLE.open(newline="", encoding="utf-8") as file:
        known = {tuple(row[:5]): row for row in list(csv.reader(file))[1:]}
    chosen = [mutant for mutant in mutants if args.only in " ".join(mutant.key)]
    if args.open:
        ended = {key for key, row in known.items() if row[5] != "survived"}
        chosen = [mutant for mutant in chosen if mutant.key not in ended]
        chosen.sort(key=lambda mutant: mutant.key in known)
    runs = sorted({run for mutant in chosen for run in runs_of(mutant.path)})
    with (
        forks({}) as lane,
        ThreadPoolExecutor(max_workers=args.jobs) as pool,
        tempfile.TemporaryDirectory(prefix="fastlora-mutants-") as scratch,
    ):
        copy = copy_to(Path(scratch))  # with the bytecode that its tests write
        ran = pool.map(lambda run: lane.pytest(copy, (*OPTIONS, *run.split()), LIMIT), runs)
        wrong = [output for code, output in ran if code != 0]
        if wrong:
            _say(f"WITHOUT A MUTANT: {''.join(wrong)[-3000:]}")
            return 1
        outcomes = pool.map(lambda mutant: outcome(mutant, lane, copy), chosen)
        for mutant, found in zip(chosen, outcomes, strict=True):
            reason = known[mutant.key][6] if mutant.key in known and found == "survived" else ""
            known[mutant.key] = [*mutant.key, found, reason]
            _say(" | ".join(known[mutant.key]))
            _write([known[each.key] for each in mutants if each.key in known])
    rows = [known[mutant.key] for mutant in mutants if mutant.key in known]
    survivors = [row for row in rows if row[5] == "survived"]
    unexplained = [row for row in survivors if not row[6]]
    _say(f"{len(survivors)} of {len(rows)} mutants survived, {len(unexplained)} without a reason")
    return 1 if unexplained or len(survivors) > MOST_SURVIVORS * len(rows) else 0


def _write(rows: Sequence[Sequence[str]]) -> None:
    with TABLE.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
