"""What counts as equal: the pairs, and that nothing is read out of a text which is not the text."""

import json
import random
import re
from pathlib import Path

import pytest

from latentrevise.demo import families, get_family
from latentrevise.verify.compare import same_numbers
from latentrevise.verify.forms import Quantity, Region, Several
from latentrevise.verify.plainforms import number
from latentrevise.verify.reading import read
from latentrevise.verify.text import LONGEST, normal, plain
from latentrevise.verify.verifier import Verifier

HERE = Path(__file__).parent


def pairs(name):
    rows = [json.loads(line) for line in (HERE / name).read_text(encoding="utf-8").splitlines()]
    return [(r["kind"], r["gold"], r.get("completion") or rf"\boxed{{{r['answer']}}}", r["equal"]) for r in rows]


@pytest.fixture(scope="module")
def verifier():
    with Verifier(timeout=60, workers=1) as it:
        yield it


@pytest.mark.parametrize("name", ["pairs.jsonl", "held_out.jsonl", "further.jsonl"])
def test_pairs(verifier, name):
    rows = pairs(name)
    found = verifier.verify([(gold, completion) for _, gold, completion, _ in rows])
    wrong = [row for row, j in zip(rows, found, strict=True) if (j.verdict == "correct") != row[3]]
    falsely = [row for row in wrong if not row[3]]
    assert falsely == []
    assert len(wrong) <= 0.02 * sum(equal for *_, equal in rows), wrong


def test_the_examples_of_the_document_hold(verifier):
    text = (HERE.parent.parent / "docs" / "verifier.md").read_text(encoding="utf-8")
    table = text.split("## What counts as equal")[1].split("## ")[0]
    rows = []
    for clause in re.split(r";|\bbut\b|\bwhich\b|\n", table):
        (_, gold), *others = re.findall(r"([=≠])?\s*`([^`]+)`", clause.replace("\\|", "|")) or [("", "")]
        rows += [(gold, answer, sign == "=") for sign, answer in others if sign]
    assert len(rows) > 60
    found = verifier.compare([(gold, answer) for gold, answer, _ in rows])
    assert [row for row, j in zip(rows, found, strict=True) if (j.verdict == "correct") != row[2]] == []


@pytest.mark.parametrize("name", sorted(families()))
def test_the_bundled_families_are_judged_as_by_their_own_checkers(name):
    """They compare texts of numbers, nothing else: which prompts are zero-hit depends on no rule of ours."""
    family, rng = get_family(name), random.Random(0)
    rows, wanted = [], []
    for problem in [family.sample_problem(rng) for _ in range(60)]:
        prompt, gold = family.prompt_text(problem), family.answer(problem)
        numbers = [str((int(n) + rng.choice((0, 0, 1, 10))) % family.modulus) for n in gold.split()]
        rng.shuffle(numbers)
        texts = [
            " ".join(family.solution(problem)),
            " ".join(family.sample_trace(problem, rng).words),
            rf"so \boxed{{ {' '.join(numbers)} }}",
            rf"so \boxed{{ {gold} {numbers[0]} }}",
            f"so {gold}",
        ]
        for text in texts:
            rows.append((gold, text))
            wanted.append("correct" if family.check(prompt, "", text, gold).correct else "wrong")
    with Verifier(command=["/nonexistent"]) as it:
        found = it.verify(rows)
    assert [(j.verdict, j.unparsed) for j in found] == [(verdict, False) for verdict in wanted]
    assert {"correct", "wrong"} == set(wanted)


# What a parser that searches would read something out of.
OBSCURE = [
    r"1, 2, \ldots, n",
    r"2, 4, 6, \ldots",
    r"1+2+\cdots+n",
    r"a_1, \dots, a_n",
    r"f(x",
    "x2",
    "1/2x",
    r"\sin(x)^2",
    r"2\frac{5}{3}",
    "2(3)",
    "f(x)",
    r"\angle ABC",
    r"2^n \text{ if } n > 3",
    "?",
    "x^",
    r"\frac{",
    "1 2 x",
    "abcd + 1",
    r"\sqrt{1, 2}",
    "3..5",
    "5%%",
    "x'",
    r"\int_0^1 x dx",
    r"\begin{cases} 1 \\ 2 \end{cases}",
    "5 = 2x = y",
]


@pytest.mark.parametrize("text", OBSCURE)
def test_what_is_not_understood_equals_only_its_own_text(verifier, text):
    assert read(text) is None
    others = ["1", "2", "3", "5", "0", "x", "n", "6", "1/2", r"\frac{x}{2}", r"\text{no}"]
    found = verifier.compare([(text, other) for other in others] + [(other, text) for other in others])
    assert {(j.verdict, j.unparsed) for j in found} == {("wrong", True)}
    (same,) = verifier.compare([(text, f" {text} ")])
    assert (same.verdict, same.unparsed) == ("correct", True)
    assert "no answer is understood" in verifier.check_golds([text])[0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1 000", "1000"),
        (r"1\,000", "1000"),
        ("1 1/2", "3/2"),
        (r"1{,}000{,}000", "1000000"),
        ("1.2e3", "1200"),
        (r"0.1\overline{6}", "1/6"),
        ("1e+20", "1e20"),
        ("２５", "25"),
        ("−5", "-5"),
        ("1½", "3/2"),
        ("forty-two", "42"),
        ("two hundred and five", "205"),
        ("52_8", "42"),
        ("1,00,000", "100000"),
        ("3 million", "3000000"),
    ],
)
def test_numbers(text, value):
    assert read(text).value == read(value).value


@pytest.mark.parametrize("text", ["1,00", "1.2.3", "one two", "hundred", "1e999999999", "1 00", "--5", "1,2,3"])
def test_no_numbers(text):
    assert number(normal(text)) is None


def test_a_decimal_stands_for_a_number_without_end_from_six_digits_on():
    third = read(r"\frac13")
    assert same_numbers(third, read("0.333333"))
    assert not same_numbers(third, read("0.33333"))
    assert not same_numbers(third, read("0.333334"))
    assert same_numbers(read(r"\frac{1}{3000000}"), read("0.000000333333"))
    assert not same_numbers(read(r"\frac18"), read("0.125001"))
    assert not same_numbers(read("0.333333"), read("0.3333333"))


def test_forms_say_their_kind():
    assert isinstance(read("5 cm"), Quantity)
    assert isinstance(read("x < 5"), Region)
    assert read("(1, 2)") == Several("tuple", read("1, 2").items)


@pytest.mark.parametrize("text", [r"\frac{1}{2}", "x_1 + 2", r"\text{A} \cup B", "1 1/2", r"\{1, 2\}", "5 cm", "½"])
def test_the_normal_text_is_normal(text):
    assert normal(normal(text)) == normal(text)
    assert plain(normal(text)) == plain(text)


def test_plain_text_keeps_numbers_apart():
    assert plain("1 1/2") != plain("11/2")
    assert plain("3 0") != plain("30")
    assert plain(r"5\text{ cm}") == plain("5 cm")
    assert plain(r"\pi r") != plain(r"\pir")


HOSTILE = [
    "(" * 1500,
    "{" * 1900 + "}" * 50,
    "1," * 900,
    "\\frac" * 400,
    "\\text{" * 300,
    "9" * 5000,
    "1e" + "9" * 300,
    "x" * 1999,
    "((" * 200 + "x" + "))" * 200,
    "-" * 1500 + "1",
    "1 " * 900,
    "|" * 500 + "x",
    "a and " * 300,
    "\\sqrt{" * 200 + "2" + "}" * 200,
    "1/" * 700 + "3",
    "$" * 1500,
    "*" * 1999,
    "\\{" * 900,
    "=" * 1000,
    "x<" * 600 + "1",
    "\\pm " * 500 + "1",
    "1:" * 900 + "2",
    "\u0000\ud7ff" * 50,
    "\\mathbf{" * 250 + "1" + "}" * 250,
    "²" * 1900,
    "½" * 500,
    " " * 100_000 + "5",
    "a" * 200_000,
    "\\boxed{" * 5000,
]


def test_hostile_text_is_read_within_moments():
    import time

    for text in HOSTILE:
        began = time.perf_counter()
        read(text), plain(text)
        Verifier(command=["/nonexistent"]).pattern.find(text + r"\boxed{" + text + "}")
        assert time.perf_counter() - began < 2, text[:20]


def test_long_answers_are_compared_as_text(verifier):
    long = "+".join(["x"] * LONGEST)
    found = verifier.compare([(long, long), (long, "x")])
    assert [(j.verdict, j.unparsed) for j in found] == [("correct", True), ("wrong", True)]
