"""The code of README.md and of the pages in docs/ runs as it stands, on a small model."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import re
import shlex
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlora
from fastlora import LoraConfig, env, get_peft_model
from fastlora.train.settings import read_settings, settings_from_dict
from tests.faults.fault import all_faults
from tests.support.tiny import tiny_llama

pytest.importorskip("transformers", reason="the models of the pages are transformers'")
pytest.importorskip("peft", reason="some pages patch a PEFT model")

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Its code runs in two processes: tests/distributed/checks_docs.py.
ELSEWHERE = {"distributed.md"}


def blocks(language: str) -> list[Any]:
    """Page and text of each block of code of a language."""
    return [
        pytest.param(page, text, id=f"{page.name}-{number}")
        for page in PAGES
        if page.name not in ELSEWHERE
        for number, text in enumerate(
            re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
        )
    ]


def given() -> dict[str, Any]:
    """The names that a reader has before each block."""
    ids = torch.randint(0, 97, (3, 6))
    return {
        "base_model": tiny_llama(),
        "another_base": tiny_llama(),
        "model": get_peft_model(tiny_llama(), LoraConfig(target_modules="all-linear")),
        "inputs": {"input_ids": ids, "max_new_tokens": 3},
        "batch": {"input_ids": ids, "labels": ids},
        "torch": torch,
    }


def save_given(names: dict[str, Any]) -> None:
    """The folders that a reader has: a base model, and what somebody trained before."""
    names["another_base"].save_pretrained("base")
    for folder in ("adapter", "adapters/one"):
        names["model"].save_pretrained(folder)


@pytest.mark.parametrize(("page", "text"), blocks("python"))
def test_python(
    page: Path,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each block by itself, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    names = given()
    save_given(names)
    exec(compile(text, str(page), "exec"), names)
    if "report" in names:
        assert names["report"].fused == len(names["report"].rows) > 0
        assert "LoRA layers are eligible for the fused call" in capsys.readouterr().out
    if "merged" in names:
        assert fastlora.fusion_report(names["merged"]).rows == ()


@pytest.mark.parametrize(
    "page", {each.values[0]: None for each in blocks("python")}, ids=lambda page: page.name
)
def test_python_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a page in one session, as a reader runs them."""
    monkeypatch.chdir(tmp_path)
    names = given()
    save_given(names)
    for each in blocks("python"):
        if each.values[0] == page:
            exec(compile(each.values[1], str(page), "exec"), names)


@pytest.mark.parametrize(("page", "text"), blocks("toml"))
def test_toml(page: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each settings file is taken by `fastlora train`, from the project's folder."""
    tomllib = pytest.importorskip("tomllib", reason="part of Python from 3.11 on")
    monkeypatch.chdir(ROOT)
    settings = settings_from_dict(tomllib.loads(text), {}, page.name)
    assert all(file.is_file() for adapter in settings.adapters for file in adapter.data)


@pytest.mark.parametrize(("page", "text"), blocks("yaml"))
def test_yaml(page: Path, text: str, tmp_path: Path) -> None:
    """Each settings file in YAML too."""
    pytest.importorskip("yaml", reason="transformers brings it")
    path = tmp_path / "run.yaml"
    path.write_text(text.replace("examples/", f"{ROOT}/examples/"), encoding="utf-8")
    settings = read_settings(path, {})
    assert all(file.is_file() for adapter in settings.adapters for file in adapter.data)


def test_the_first_command_on_the_training_page(
    smollm2_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command writes the model folder that the page's config file names."""
    tomllib = pytest.importorskip("tomllib", reason="part of Python from 3.11 on")
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    program, flag, code = shlex.split(next(re.finditer(r"^    (.+)$", page, re.M))[1])
    assert (program, flag) == (".venv/bin/python", "-c")
    exec(code, {})
    printed = Path(capsys.readouterr().out.strip())
    assert printed == smollm2_dir and (printed / "model.safetensors").is_file()
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    config = next(re.finditer(r"```toml\n(.*?)```", page, re.S))[1]
    named = Path(tomllib.loads(config)["model"]).expanduser()
    assert named == env.cache_dir() / smollm2_dir.name


def test_the_table_of_recommended_values() -> None:
    """It has the values of `recommend`, which follow the rule for alpha below the table."""
    page = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:under|\d).*billion.*\|$", page, re.M)
    sizes = (1, 10**9, 7 * 10**9, 13 * 10**9)  # the smallest model of each row
    for row, size, below in zip(rows, sizes, (*sizes[1:], 10**12), strict=True):
        for count in (size, below - 1):
            advice = fastlora.recommend(count)
            assert advice.lora_alpha == 2 * advice.r == 2 * max(advice.r_range)
            ends = (advice.r_range, advice.lora_alpha_range)
            shown = (" to ".join(map(str, sorted({*end}))) for end in ends)
            assert row.split(" | ")[1:] == [*shown, f"{advice.lora_dropout:g} |"]
            assert max(advice.lora_alpha_range) / min(advice.r_range) <= 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page: Path) -> None:
    """Every link of a page leads to a file of the project, and to a heading that is there."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name}: {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}
            assert heading in anchors, f"{page.name}: {target}"


def test_the_tables_of_speed_are_those_of_the_results() -> None:
    """Every figure of docs/speed.md comes from a row of a CSV."""
    from fastlora.bench import speed_page

    page = speed_page.PAGE.read_text(encoding="utf-8")
    assert speed_page.rendered(page) == page
    assert page.count("<!-- ") == 13


def test_the_figures_of_the_readme_and_the_home_are_those_of_the_results() -> None:
    """Every figure of the home's table of results, and of README, comes from a row of a CSV."""
    home = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    table = home.partition("| measured against PEFT")[2]
    cells = {
        line.split("|")[1].strip(): line.split("|")[3].strip()
        for line in table.partition("\n\n")[0].splitlines()[2:]
    }
    faster = {
        row["adapters"]: 1 / float(row["ratio_to_peft"])
        for row in rows_of("mixed_cpu_avx512.csv")
        if (row["phase"], row["dtype"], row["side"]) == ("decode", "fp32", "fastlora_one_block")
    }
    steps = {
        (row["method"], row["dtype"]): row
        for method, file in (("lora", "train_step_cpu_avx512.csv"), ("dora", "train_step_cpu.csv"))
        for row in rows_of(file)  # of a case measured twice the last row counts
        if (row["batch"], row["adapters"], row["dropout"]) == ("4x128", "fp32", "0.0")
        and row["method"] == method
    }

    def both(column: str, *cases: tuple[str, str]) -> str:
        return " / ".join(f"{float(steps[case][column]):.2f}" for case in cases)

    bf16 = [("lora", "bf16"), ("dora", "bf16")]
    expected = {
        f"decode, 64 sequences, {' / '.join(faster)} adapters, fp32": " / ".join(
            f"{value:.1f}" for value in faster.values()
        )
        + " times faster",
        "peak memory of the step, LoRA / DoRA, bf16 with fp32 adapters": (
            f"{both('peak_ratio', *bf16)} of PEFT's"
        ),
    }
    for name, method in (("LoRA", "lora"), ("DoRA", "dora")):
        figures = both("ratio_to_peft", (method, "fp32"), (method, "bf16"))
        expected[f"training step, {name}, fp32 / bf16 with fp32 adapters"] = (
            f"{figures} of PEFT's time"
        )
    assert {case: cells.get(case) for case in expected} == expected
    (ours, peft) = (
        f"{float(row['ratio_to_base']):.1f}"
        for side in ("fastlora_one_block", "peft")
        for row in rows_of("mixed_cpu_avx512.csv")
        if (row["dtype"], row["adapters"], row["side"]) == ("fp32", "64", side)
    )
    serving = " ".join((ROOT / "docs" / "serving.md").read_text(encoding="utf-8").split())
    assert f"takes {ours} times as long as with the base model alone." in serving
    assert f"With PEFT's `adapter_names`, it takes {peft} times as long" in serving
    # What has no figure here says so.
    assert not [c for n, c in cells.items() if n not in expected and re.search(r"\d\.\d", c)]
    peak = float(steps["dora", "bf16"]["peak_ratio"])
    lora = [f"{float(steps['lora', dtype]['ratio_to_peft']):.2f}" for dtype in ("fp32", "bf16")]
    for page in (PAGES[0], ROOT / "docs" / "index.md"):
        text = " ".join(page.read_text(encoding="utf-8").split())
        decode = (
            f"takes {ours}x as long as decoding without adapters, compared with {peft}x for PEFT"
        )
        assert decode in text
        assert "the peak memory of a DoRA training step" in text
        assert f"bf16 weights and fp32 adapters is {peak:.0%} of PEFT's." in text
    readme = " ".join(PAGES[0].read_text(encoding="utf-8").split())
    fp32_step = f"in fp32 on 4 sequences of 128 tokens takes {lora[0]} times as long with fastlora"
    assert f"{fp32_step} as with PEFT." in readme
    bf16_step = f"a step with fastlora takes {lora[1]} times as long as one with PEFT."
    assert f"With a bf16 model and fp32 adapters, {bf16_step}" in readme


def test_the_figures_of_serving_are_those_of_the_results() -> None:
    page = " ".join((ROOT / "docs" / "serving.md").read_text(encoding="utf-8").split())
    rates: dict[str, list[float]] = {}
    for row in rows_of("serve_contest_cpu.csv"):
        rates.setdefault(row["way"], []).append(float(row["tokens_per_cpu_second"]))
    first, *_ = rates.values()
    for own in rates.values():
        ratio = statistics.median(a / b for a, b in zip(own, first, strict=True))
        assert " | ".join([*(f"{rate:.1f}" for rate in own), f"{ratio:.2f} |"]) in page
    (soak,) = rows_of("serve_soak_cpu.csv")
    assert f"The server completed {int(soak['requests']):,} requests and generated " in page
    assert f"loaded, replaced, or unloaded {soak['changes']} times in total." in page
    assert f"All {soak['greedy']} greedy answers were identical" in page
    assert (
        f"The median memory usage in the second quarter of the run was {int(soak['mib']):,} MiB"
        in page
    )
    assert f"Peak memory usage over the whole run was {int(soak['mib_most']):,} MiB." in page
    assert f"The median in the last quarter was {float(soak['growth']):.3f} times" in page


def rows_of(name: str) -> list[dict[str, str]]:
    """The rows of a CSV in bench/results."""
    with (ROOT / "bench" / "results" / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_sites_navigation_has_every_page() -> None:
    """Each page in docs/ that has not moved is in mkdocs.yml and on the index, and vice versa."""
    settings, _, nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")
    named = set(re.findall(r"[\w/]+\.md", nav))
    moved = set(re.findall(r"^  /([\w/]+\.md)$", settings.partition("not_in_nav:")[2], re.M))
    site = importlib.import_module("docs.build_site")
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES[1:]}
    assert moved < pages
    pages -= moved
    assert named == pages | set(site.OUTSIDE.values()) | {"reference.md"}
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\(([\w/]+\.md)\)", index))
    assert linked == pages - {"index.md"}
    assert all((ROOT / source).is_file() for source in site.OUTSIDE)


def test_a_broken_link_of_the_site_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<h1 id="top">A</h1><a href="sub/b.html#part">b</a><a href="#top">a</a>'
        '<a href="https://pytorch.org/x">out</a><img src="missing.png"><a href="#nowhere">c</a>'
    )
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.html").write_text(
        '<a href="../a.html#to%70">a</a><a href="c.html">c</a>'
    )
    site = importlib.import_module("docs.build_site")
    assert site.broken_links(tmp_path) == [
        "a.html: sub/b.html#part",
        "a.html: missing.png",
        "a.html: #nowhere",
        "sub/b.html: c.html",
    ]


def test_only_inline_code_is_broken() -> None:
    """Short code stays whole, long code may break after separators, and blocks are left alone."""
    site = importlib.import_module("docs.build_site")
    long = "tests/integrations/test_peft_compatibility_calls.py"
    parts = long.replace("/", "/<wbr>").replace("_", "_<wbr>").replace(".", ".<wbr>")
    found = site.on_page_content(
        f"<p><code>a/b.py</code> <code>{long}</code></p>", None, None, None
    )
    assert found == f'<p><code class="short">a/b.py</code> <code>{parts}</code></p>'
    for block in (
        f"<pre><span></span><code>{long}\n</code></pre>",
        f"<pre><code>{long}</code></pre>",
    ):
        assert site.on_page_content(block, None, None, None) == block


def test_links_of_pages_lead_where_the_site_has_their_targets() -> None:
    """Up and out of docs/, into pages that lie elsewhere, and between those."""
    site = importlib.import_module("docs.build_site")

    class Page:
        class file:
            src_uri = "quickstart.md"

    def moved(uri: str, text: str) -> str:
        Page.file.src_uri = uri
        return str(site.on_page_markdown(text, Page, None, None))

    assert moved("quickstart.md", "[b](../bench/README.md#run)") == "[b](benchmarks.md#run)"
    assert moved("compare.md", "[r](../README.md) [h](#here)") == "[r](index.md) [h](#here)"
    assert moved("benchmarks.md", "[s](../docs/speed.md)") == "[s](speed.md)"
    assert moved("examples.md", "[e](dora.py)") == "[e](examples/dora.py)"
    assert moved("index.md", "[o](https://x.org/a.md)") == "[o](https://x.org/a.md)"


def test_the_readme_has_its_ways_in() -> None:
    """A mixed batch, patch, `fastlora train` and `fastlora serve`, in at most 130 lines."""
    text = PAGES[0].read_text(encoding="utf-8")
    assert re.findall(r"```(\w+)\n", text) == ["sh", "python", "python", "toml", "sh"]
    assert len(text.splitlines()) <= 130
    for line in text.splitlines():
        assert len(without_targets(line)) <= WIDTH or line.startswith(("|", "!")), line


def test_the_home_has_the_comparison_of_the_readme() -> None:
    """The same table and notes, so that they change together."""
    readme, home = (
        page.read_text(encoding="utf-8").partition("## Comparison\n")[2].partition("\n## ")[0]
        for page in (PAGES[0], ROOT / "docs" / "index.md")
    )
    assert readme.replace("](docs/", "](") == home != ""


WIDTH = 100


def test_no_line_of_prose_is_too_wide() -> None:
    """Links, images, tables and code may be wider."""
    wide = {
        page.relative_to(ROOT).as_posix(): lines
        for page in (*PAGES, ROOT / "CONTRIBUTING.md")
        if (lines := wide_lines(page.read_text(encoding="utf-8")))
    }
    assert not wide


def test_wide_prose_is_found() -> None:
    words = "word " * 21
    link = f"{'word ' * 15}[here](https://pytorch.org/docs/stable/generated/torch.nn.Linear)"
    fine = (
        f"# A\n\n{link}\n\n| {words} |\n\n![{words}](a.png)\n\n```\n{words}\n```\n\n    {words}\n"
    )
    assert wide_lines(fine) == []
    for prose in (words, f"# {words}", f"* {words}", f"* a\n\n    {words}", f"* a\n    * {words}"):
        assert len(wide_lines(f"{fine}\n{prose}\n")) == 1, prose


def without_targets(line: str) -> str:
    """A line with its links' texts alone."""
    return re.sub(r"\[([^]]*)\]\([^)\s]*\)", r"\1", line)


def wide_lines(text: str) -> list[str]:
    """Lines of prose wider than WIDTH."""
    found, fenced, listed = [], False, False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
            continue
        indented = line.startswith("    ")
        if re.match(r"\s*([*-]|\d+\.) ", line):
            listed = True
        elif line and not line.startswith(" "):
            listed = False
        skipped = fenced or line.startswith(("|", "![")) or (indented and not listed)
        if not skipped and len(without_targets(line)) > WIDTH:
            found.append(line)
    return found


def test_the_features_name_every_field_and_tests_that_are_there() -> None:
    """A new field, or a test that moves, changes the page."""
    text = (ROOT / "docs" / "features.md").read_text(encoding="utf-8")
    fields = re.findall(r"^\| `(\w+)` \|", text.partition("## Initializations")[0], re.M)
    assert fields == [field.name for field in dataclasses.fields(LoraConfig)]
    files = re.findall(r"(?:tests|fastlora)/[\w/]+\.py", text)
    assert files and [name for name in files if not (ROOT / name).is_file()] == []


def test_the_page_of_caches_names_every_cache_and_its_proof() -> None:
    """Each row has tests and faults that are there, and each file that keeps something is named."""
    text = (ROOT / "docs" / "dev" / "caches.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    sentences = {fault.sentence for fault in all_faults()}
    for row in rows[1:]:
        *_, tests, faults = row
        assert len(row) == 5, row[0]
        assert set(faults.split("<br>")) <= sentences, row[0]
        for test in tests.split("<br>"):
            file, _, name = test.strip("`").partition("::")
            assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), test
    keeps = (
        r"functools\.(lru_cache|cache\b|cached_property)|WeakValueDictionary\("
        r"|\(UncopiedCache\)|threading\.local|stamp_tensors\("
    )
    files = [
        path.relative_to(ROOT).as_posix()
        for folder in ("fastlora", "kernels")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if re.search(keeps, path.read_text(encoding="utf-8"))
    ]
    assert len(files) > 20
    assert [name for name in files if f"`{name}`" not in text] == []
