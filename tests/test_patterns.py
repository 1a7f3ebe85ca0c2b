"""The patterns of a config match as in PEFT, and within a bound where a folder brings them."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from fastlora import LoraConfig, patterns
from fastlora.patterns import (
    bounded_matching,
    check_pattern,
    first_pattern_matching_name_suffix,
    layer_index_after_match,
    matches_consecutive_components,
    matches_whole_name,
    patterns_matching_no_suffix,
)
from fastlora.validation import CheckpointError, ConfigError

pytest.importorskip("pcre2", reason="bounded matching needs it")

NAMES = (
    *(f"model.layers.{i}.self_attn.{x}_proj" for i in (0, 1, 10, 31) for x in "qkvo"),
    *(f"model.layers.{i}.mlp.{x}_proj" for i in (0, 10) for x in ("gate", "up", "down")),
    *(f"model.layers.3.mlp.experts.{i}.w{i}" for i in (1, 2)),
    *("lm_head", "model.embed_tokens", "model.norm", "score", "model.score.out"),
    *("transformer.h.2.attn.c_attn", "transformer.h.12.mlp.c_proj"),
    *("model.visual.blocks.7.attn.qkv", "model.language_model.layers.2.self_attn.q_proj"),
    *("down_blocks.1.attentions.0.to_out.0", "text_model.encoder.layers.4.fc1", "layersX1Xq"),
)
# From PEFT's documentation and tests, and from configs that ms-swift, Unsloth and diffusers write.
REAL = (
    *("q_proj", "layers.1.self_attn.q_proj", "model.layers.10.mlp.up_proj", "layers.1.q", "score"),
    *("h", "layers", "blocks", "to_out.0", "self-attn"),
    r".*\.(q_proj|v_proj)",
    r".*(self_attn|mlp).*",
    r"^model\.layers\.\d+\.self_attn\.q_proj$",
    r"model\.layers\.(0|1|2|3)\.self_attn\.(q|k|v|o)_proj",
    r"^(model.language_model(?=\.).*\.(q_proj|k_proj))$",
    r"^(?!.*lm_head).*proj",
    r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
    r"(?:.*\.)?(?:h|layers)\.[0-9]+\.(?:attn|mlp)\.c_(?:attn|proj)",
    r"(?i).*Q_PROJ",
    r"(?:model\.embed_tokens|^lm_head$)",
    r"layers.1\d?",
    r"h|blocks",
    r"(?:.*?(?:visual|language|text).*?(?:self_attn|attn|mlp).*?(?:k_proj|v_proj|q_proj|fc1|qkv).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:k_proj|q_proj|gate_proj|up_proj)))",
    r"\w+\.\d\.attentions\.(?P<n>\d)\.to_out\.(?P=n)",
)
# Each takes ``re`` longer than any test may take, on names of these lengths.
SLOW = (r"(\w|\w\w|.|\.)*[!?]", r"(([a-z_.0-9]*)*)*\1[!?]", r"(?:(.+)\1?)*[!?]")
NAME = NAMES[8]


def matches_end(field: str, pattern: str, name: str) -> bool:
    """Returns whether a single pattern matches the end of a name, as both functions say."""
    matches = first_pattern_matching_name_suffix(field, (pattern,), name) == pattern
    assert patterns_matching_no_suffix(field, (pattern,), [name]) == ([] if matches else [pattern])
    return matches


@pytest.fixture(params=["re", "bounded"])
def engine(request: pytest.FixtureRequest) -> Iterator[None]:
    """Matching as `get_peft_model` does it, and as a pool does it."""
    with bounded_matching() if request.param == "bounded" else contextlib.nullcontext():
        yield


@pytest.mark.parametrize("pattern", REAL)
def test_real_patterns_match_as_in_peft(pattern: str, engine: None) -> None:
    """Names by the very functions of PEFT that adapters are made with."""
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    check_pattern("target_modules", pattern)
    for name in NAMES:
        whole = check_target_module_exists(peft.LoraConfig(target_modules=pattern), name)
        assert matches_whole_name("target_modules", pattern, name) == bool(whole), name
        excluded = peft.LoraConfig(target_modules=".*", exclude_modules=pattern)
        kept = bool(check_target_module_exists(excluded, name))
        assert matches_whole_name("exclude_modules", pattern, name) != kept, name
        if not pattern.startswith("(?i)"):  # inside of an expression ``re`` refuses such a flag
            end = get_pattern_key([pattern], name) == pattern if pattern != name else True
            assert matches_end("rank_pattern", pattern, name) == end, name


def test_the_first_of_many_patterns_counts_as_in_peft(engine: None) -> None:
    """Order decides, between names, expressions, and names with a dot for any character."""
    peft = pytest.importorskip("peft")
    from peft.utils.other import get_pattern_key

    del peft
    several = [p for p in REAL if not p.startswith("(?i)")] + ["X1Xq", "layersX1.q", "3.mlp", "fc."]
    for shift in range(len(several)):
        keys = several[shift:] + several[:shift]
        for name in NAMES:
            found = first_pattern_matching_name_suffix("rank_pattern", keys, name)
            assert (found or name) == get_pattern_key(keys, name), (keys, name)
        lost = {k for k in keys if all(re.match(rf"(.*\.)?({k})$", n) is None for n in NAMES)}
        assert set(patterns_matching_no_suffix("rank_pattern", keys, NAMES)) == lost


def test_a_pattern_for_each_module_of_a_large_model_is_no_attack() -> None:
    """PEFT's EVA writes the rank of each module, by its full name."""
    leaves = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    names = [f"model.layers.{i}.self_attn.{leaf}" for i in range(80) for leaf in leaves]
    ranks = {name.removeprefix("model."): i + 1 for i, name in enumerate(names)}
    config = LoraConfig(r=1, target_modules=leaves, rank_pattern=ranks, alpha_pattern=ranks)
    with bounded_matching():
        assert [config.rank_for(name) for name in names] == list(ranks.values())
        assert {config.scaling_for(name) for name in names} == {1}
        assert patterns_matching_no_suffix("rank_pattern", config.rank_pattern, names) == []


def test_only_matching_counts() -> None:
    """A large file of tensors takes its time to read, whatever its patterns are."""
    with bounded_matching():
        start = time.thread_time()
        while time.thread_time() - start < 1.2 * patterns.MATCHING_SECONDS:
            pass
        assert matches_whole_name("target_modules", ".*q_proj", NAME)


@pytest.mark.parametrize("pattern", ["layers", "h", "blocks", r"(?:h|layers)", r"bl\w+s"])
def test_layer_patterns_match_as_in_peft(pattern: str, engine: None) -> None:
    """The same layers are chosen, by a name or an expression for the list that holds them."""
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import check_target_module_exists

    seen = set()
    for name in (name for name in NAMES if "experts" not in name):  # PEFT counts those of experts
        found = layer_index_after_match("layers_pattern", pattern, name)
        for index in range(13):
            leaf = name.rpartition(".")[2]
            fields = {"layers_to_transform": [index], "layers_pattern": [pattern]}
            config = peft.LoraConfig(target_modules=[leaf], **fields)
            chosen = bool(check_target_module_exists(config, name)) and name != leaf
            assert (found == index) == chosen, (name, index)
        seen.add(found)
    assert len(seen) > 1


@pytest.mark.parametrize("pattern", ["score", "norm", r"(?:score|lm_head)", r"embed\w*"])
def test_saved_modules_match_by_components(pattern: str, engine: None) -> None:
    found = {
        name for name in NAMES if matches_consecutive_components("modules_to_save", pattern, name)
    }
    words = {"score": ("score",), "norm": ("norm",)}.get(pattern, ("score", "lm_head"))
    words = ("embed_tokens",) if pattern.startswith("embed") else words
    assert found == {name for name in NAMES if {*words} & {*name.split(".")}}


@pytest.mark.parametrize("pattern", SLOW)
@pytest.mark.parametrize(
    "match",
    [matches_whole_name, matches_end, matches_consecutive_components, layer_index_after_match],
)
def test_a_pattern_that_backtracks_raises_at_once(
    match: Callable[[str, str, str], object], pattern: str
) -> None:
    """E2: ``re`` would hold the interpreter's lock for ever, and so stop every other thread."""
    start = time.thread_time()
    with bounded_matching(), pytest.raises(CheckpointError, match="rank_pattern: .*takes too long"):
        match("rank_pattern", pattern, NAME)
    assert time.thread_time() - start < 0.05


@pytest.mark.parametrize(
    "pattern",
    [
        ".*?" * 6 + r"\b" * 20_000 + "[!?]",
        r"(?:.?){30}(?:\b){9000}[!?]",
        r"(?:\w?){9}X|" + ".*?" * 6 + r"(?:(?:\b){90}){ 90 }[!?]",
    ],
    ids=["long", "repeated", "cheap at first"],
)
def test_a_long_way_between_two_steps_is_bounded(pattern: str) -> None:
    """E2: PCRE2 counts no step of most parts of a pattern, and 100,000 steps then take seconds."""
    start = time.thread_time()
    with bounded_matching(), pytest.raises(CheckpointError, match="target_modules: .*too long"):
        matches_whole_name("target_modules", pattern, NAME)
    assert time.thread_time() - start < 2 * patterns.MATCHING_SECONDS


@pytest.mark.parametrize(
    "pattern",
    [
        "(?:(?:(?:(?:a?b){50}){50}){50}){50}",  # PyPI's regex takes 18 s and 2.8 GB for it
        "(?:(a?){4000}){4000}",
        "(" * 5000 + "a" + ")*" * 5000,
        "(?:a|b|cd|ef)" * 5000,
        "a" * 100_000 + "*",
        "(*LIMIT_MATCH=1000000000)" + SLOW[0],
        "(*NO_START_OPT).*",
        r"(?P<idx>a",
    ],
    ids=["nested", "groups", "deep", "wide", "long", "own limit", "verb", "no pattern"],
)
def test_a_pattern_that_is_no_pattern_raises_at_once(pattern: str) -> None:
    """E2: neither compiling a pattern nor a limit of its own gets around the bound."""
    start = time.thread_time()
    for match in (
        matches_whole_name,
        matches_end,
        matches_consecutive_components,
        layer_index_after_match,
    ):
        with bounded_matching(), pytest.raises(CheckpointError, match="alpha_pattern"):
            match("alpha_pattern", pattern, NAME)
    assert time.thread_time() - start < 4 * patterns.MATCHING_SECONDS


@pytest.mark.parametrize("plain", [True, False], ids=["names", "expressions"])
def test_many_patterns_on_many_names_share_one_bound(plain: bool) -> None:
    """E2: none of them is slow, but a folder may hold any number."""
    keys = ["a" * (i % 90) + "." + "b" * (i // 90) for i in range(8000)]
    keys = keys if plain else [rf"{key}\d" for key in keys]
    for match in (
        lambda name: first_pattern_matching_name_suffix("rank_pattern", keys, name),
        lambda name: patterns_matching_no_suffix("rank_pattern", keys, [name]),
    ):
        start = time.thread_time()
        with (
            bounded_matching(),
            pytest.raises(CheckpointError, match=r"patterns took longer than the limit of 0.25"),
        ):
            for number in range(10_000):
                match(f"{NAME}.{number}")
        assert time.thread_time() - start < 2 * patterns.MATCHING_SECONDS
    with bounded_matching():  # the next folder has its own
        assert matches_end("rank_pattern", r"q_pro\w", NAME)


def test_the_bound_covers_the_loop_over_many_patterns() -> None:
    """E2: all time of a config of 3,000 cheap expressions counts, the loops' own time too."""
    ranks = {f"(a|b|c)*x{i}$": 2 for i in range(3000)}
    start = time.thread_time()
    with (
        bounded_matching(),
        pytest.raises(
            CheckpointError, match=r"rank_pattern: .* took longer than the limit of 0.25"
        ),
    ):
        config = LoraConfig(target_modules=["q_proj"], rank_pattern=ranks)
        for number in range(10_000):
            config.rank_for(f"{NAME}.{number}")
    assert time.thread_time() - start < 1.2 * patterns.MATCHING_SECONDS


def test_without_pcre2_names_match_and_expressions_raise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """E2: an expression of a folder is never matched without a bound."""
    monkeypatch.setitem(sys.modules, "pcre2", None)
    with bounded_matching():
        assert matches_end("rank_pattern", "self_attn.q_proj", NAME)
        assert layer_index_after_match("layers_pattern", "layers", NAME) == 10
        for pattern in (r".*q_proj", *SLOW):
            with pytest.raises(CheckpointError, match="needs pcre2; install it with: pip install"):
                matches_whole_name("target_modules", pattern, NAME)
    assert matches_whole_name("target_modules", r".*q_proj", NAME)


def test_what_re_cannot_compile_is_one_clear_error() -> None:
    for pattern in ("(", "a{1,99999999999999999999}", "(" * 5000 + ")" * 5000):
        with pytest.raises(ConfigError, match="must contain valid regular expressions"):
            check_pattern("target_modules", pattern)
