"""Regular expressions from files: the matches of `re`, in bounded time."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from torchgraft import patterns
from torchgraft.adapter_files import peft_names
from torchgraft.errors import PairingError

NAME = "model.layers.0.self_attn.q_proj"
EVIL = [
    "(.+)+[YZ]",
    "(.?.?)*[YZ]",
    "(?x)(.+) +[YZ]",
    "(.+)(?#)+[YZ]",
    ".*" * 12 + "[YZ]",
    ".?" * 60 + "[YZ]",
    "(.+){,20}[YZ]",
    "(.|.)*[YZ]",
    r"(\w+\.?)+!",
    r"(a|a)*b",
    r"(.*)*\1[YZ]",
    r"(?=(.+)+[YZ]).*",
    r"(?:(?:.+)?){40}[YZ]",
    "(" * 5000 + "a" + ")" * 5000,
    "(?:a|" * 3000 + "b" + ")" * 3000,
    "(((a{1000}){1000}){1000})",
    "a{99999999999999999999}",
    "((.*){99}){99}[YZ]",
    "(?i)" + "[\0-\U0010ffff]" * 200 + "[YZ]",
    "(.+)+" * 500 + "[YZ]",
    "[" * 20_000,
    "|".join(["(.+)+[YZ]"] * 500),
]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    patterns._slow.clear()
    yield
    patterns._slow.clear()


@pytest.mark.parametrize("expression", EVIL, ids=lambda expression: expression[:20])
@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "rank_pattern"])
def test_an_expression_is_matched_or_refused_within_seconds(expression: str, key: str) -> None:
    start = time.monotonic()
    name = ".".join(["model.layers.0", *["self_attn"] * 8, "q_proj"])
    layer = peft_names.Layer(name, "Linear", (2, 2), "float32", 4, 16)
    value = [expression] if key in ("modules_to_save", "layers_pattern") else expression
    refusal = ""
    try:
        if key == "rank_pattern":
            peft_names.pattern_value({expression: 1}, name, 2)
        else:
            peft_names.is_target({"target_modules": ["q_proj"], "layers_to_transform": [0], key: value}, layer)
    except PairingError as error:
        refusal = str(error)
    assert time.monotonic() - start < 5
    assert re.fullmatch(
        r"|adapter_config\.json: .*(takes too long|not a regular expression|nested too deeply|repeats too often).*", refusal
    )


def test_slow_expressions_share_the_time() -> None:
    patterns._slow.append((time.monotonic(), patterns.ALLOWED))
    with pytest.raises(PairingError, match="takes too long"):
        peft_names.pattern_value({".+": 1}, NAME, 2)
    patterns._slow[0] = time.monotonic() - patterns.WINDOW - 1, patterns.ALLOWED
    assert peft_names.pattern_value({".+": 1}, NAME, 2) == 1
    assert not patterns._slow


atoms = st.sampled_from(
    [
        "a",
        "b",
        ".",
        r"\.",
        r"\d",
        r"\w",
        "[ab]",
        "[^a]",
        "x",
        "^",
        "$",
        r"\b",
        "{e}",
        "{",
        "{,2}",
        "{1}",
        "{1,2}",
        "a{e<=1}",
        "(?!b)",
        "(?=a)",
    ]
)
expressions = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.lists(inner, min_size=2, max_size=3).map("|".join),
        st.tuples(inner, st.sampled_from(["(%s)", "(?:%s)", "(?:%s)*", "(?:%s)?", "(?:%s)+?", "(%s){1,2}", "(?i:%s)", "(?>%s)"])).map(
            lambda pair: pair[1] % pair[0]
        ),
    ),
    max_leaves=8,
)


@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(expressions, st.lists(st.sampled_from("abxAB.1{e}<=\n"), max_size=10).map("".join))
def test_the_matches_are_those_of_re(expression: str, text: str) -> None:
    for around in (None, (r"(.*\.)?(", ")$")):
        complete = expression.join(around or ("", ""))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                expected = re.match(complete, text) if around else re.fullmatch(complete, text)
        except (re.error, FutureWarning):
            with pytest.raises(PairingError):
                patterns.match(expression, text, around=around)
            continue
        found = patterns.match(expression, text, around=around)
        assert (found and found.groups()) == (expected and expected.groups())
        assert (found and found.span()) == (expected and expected.span())


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("(?:q_proj){e<=1}", "q_proi"),
        ("[[:alpha:]]", "a"),
        ("[a--b]", "a"),
        (r"\p{L}", "a"),
        ("(?V1)a", "a"),
        (r"\Lx", "a"),
        ("(?|a|b)", "a"),
    ],
)
def test_extensions_of_the_package_are_not_taken(expression: str, text: str) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            expected = re.fullmatch(expression, text)
    except (re.error, FutureWarning):
        with pytest.raises(PairingError, match="is not a regular expression"):
            patterns.match(expression, text)
    else:
        assert (patterns.match(expression, text) is None) == (expected is None)


def test_plain_names_are_matched_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_compiled", None)
    assert peft_names.pattern_value({r"q_proj|v_proj": 1, r"layers\.1": 3}, NAME, 2) == 1
    assert patterns.match(r"model\.a-b|x", "model.a-b")
