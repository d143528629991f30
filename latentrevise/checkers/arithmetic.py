"""Derivations of arithmetic word problems: ``checker: latentrevise.checkers.arithmetic:check``.

A derivation is valid when it holds at least one equation, every equation is true, the last one gives the answer, and
every operand comes from somewhere: the question, an earlier result, 1, 2 or 100, or a constant of everyday life that
the question's words call for (days of a week, minutes of an hour). The last rule catches what true equations alone do
not show: where the question has no 83, ``83 + 6 = 89. 89 - 6 = 83`` is true and derives nothing. Our own decision; it
needs no worked solution.

Where the data has one, ``check_against`` asks besides that its equations be there, in any order and with operands of
sums and products swapped. Where the data has a formula of the question's numbers, ``computes`` asks whether a
derivation is right whatever these numbers are: so it may take the operations in another order.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product

from latentrevise.checkers.equations import SHARES, Equation, Operand, equations, number_texts, plain

_NUMBER_WORDS = {
    word: Fraction(value)
    for value, words in {
        0: "zero none",
        1: "one a an once single",
        2: "two twice both double doubles doubled pair pairs couple twin",
        3: "three thrice triple triples tripled",
        4: "four quadruple quadruples",
        5: "five",
        6: "six",
        7: "seven",
        8: "eight",
        9: "nine",
        10: "ten",
        11: "eleven",
        12: "twelve dozen dozens",
        13: "thirteen",
        14: "fourteen",
        15: "fifteen",
        16: "sixteen",
        17: "seventeen",
        18: "eighteen",
        19: "nineteen",
        20: "twenty score",
        30: "thirty",
        40: "forty",
        50: "fifty",
        60: "sixty",
        70: "seventy",
        80: "eighty",
        90: "ninety",
        100: "hundred",
        1000: "thousand",
    }.items()
    for word in words.split()
}
_SHARES = SHARES | {f"{word}s": of for word, of in SHARES.items()} | {"halves": 2, "halved": 2}
_PLACES, _MOST_READINGS = 3, 4096
_Reading = tuple[Fraction, ...]  # a function of the question's numbers, by its values at some places
ALWAYS = {Fraction(1), Fraction(2), Fraction(100)}  # a whole, a double or a half, per cent
# What a question calls for without writing it: word -> numbers.
_CALLED_FOR = {
    "week": (7,),
    "day": (24, 7),
    "daily": (7, 30, 365),
    "hour": (60, 24),
    "minute": (60,),
    "second": (60,),
    "month": (12, 30, 4),
    "year": (12, 52, 365),
    "annual": (12,),
    "dozen": (12,),
    "cent": (100,),
    "dollar": (100,),
    "percent": (100,),
    "alphabet": (26,),
    "meter": (100, 1000),
    "kilometer": (1000,),
    "gram": (1000,),
    "foot": (12, 3),
    "feet": (12, 3),
    "yard": (3,),
}


@dataclass(frozen=True)
class Step:
    """One equation as text; ok: it is true and its operands are founded."""

    text: str
    ok: bool


@dataclass(frozen=True)
class ArithmeticDerivation:
    """What was found. reason: None if valid, else the first that holds of ``no_equation``, ``no_number`` (the answer is
    none), ``false_equation``, ``unfounded_operand``, ``answer_not_derived``, ``missing_step``."""

    valid: bool
    steps: tuple[Step, ...]
    reason: str | None


def check(prompt: str, prefix: str, continuation: str, answer: str) -> ArithmeticDerivation:
    """Whether prefix and continuation together derive ``answer`` from the numbers of ``prompt``."""
    return _check(prompt, prefix + continuation, answer, ())


def check_against(
    prompt: str, prefix: str, continuation: str, answer: str, solution: str | Iterable[str]
) -> ArithmeticDerivation:
    """As ``check``, and every equation of ``solution`` (a worked one, or its equations) must be among those found."""
    text = solution if isinstance(solution, str) else ". ".join(solution)
    return _check(prompt, prefix + continuation, answer, equations(text))


def _check(prompt: str, derivation: str, answer: str, needed: Iterable[Equation]) -> ArithmeticDerivation:
    found = equations(_before_answer(derivation))
    founded = _founded(prompt, found)
    steps = tuple(Step(equation.text, equation.ok and good) for equation, good in zip(found, founded, strict=True))
    goal = value_of(answer)
    if not found:
        reason: str | None = "no_equation"
    elif goal is None:
        reason = "no_number"
    elif not all(equation.ok for equation in found):
        reason = "false_equation"
    elif not all(founded):
        reason = "unfounded_operand"
    elif goal not in (found[-1].result, 100 * found[-1].result if found[-1].percent else None):
        reason = "answer_not_derived"
    elif not {_key(equation) for equation in needed} <= {_key(equation) for equation in found}:
        reason = "missing_step"
    else:
        reason = None
    return ArithmeticDerivation(reason is None, steps, reason)


def check_step(question: str, before: str, step: str) -> bool | None:
    """Whether a step holds, by the question and what was written before: ``step_checker:
    latentrevise.checkers.arithmetic:check_step``.

    It holds when all its equations are true and all their operands are in the question, results before, or such
    constants as above; None where it has no equation. It reads no answer.
    """
    earlier, found = equations(before), equations(step, before)
    if not found:
        return None
    founded = _founded(question, [*earlier, *found])[len(earlier) :]
    return all(equation.ok for equation in found) and all(founded)


def check_step_once(question: str, before: str, step: str) -> bool | None:
    """As ``check_step``, and no number of the question is an operand more often than the question tells it, in digits
    or in words ("triples").

    For problems that use each fact once; a number that is a result as well, or a constant, may stand anywhere.
    """
    holds = check_step(question, before, step)
    if holds is not True:
        return holds
    earlier, found = equations(before), equations(step, before)
    given = told(question)
    results = {equation.result for equation in [*earlier, *found]} | ALWAYS
    used = Counter(operand for equation in [*earlier, *found] for operand in equation.operands)
    new = {operand for equation in found for operand in equation.operands}
    return all(used[number] <= given[number] for number in new if number in given and number not in results)


def computes(question: str, derivation: str, formula: Callable[[Sequence[Fraction]], Fraction]) -> bool:
    """Whether the last equation of a derivation is the same function of the question's numbers as ``formula``, which is
    given those written in digits, in their order.

    An operand may be any of them that has its value, a result before, or a constant as above; one reading of the
    derivation that is the formula is enough. Equal are functions that agree at three random places. More than 4,096
    readings of an equation are not looked at: then it is not.
    """
    given, draw = number_texts(question), random.Random(0)
    places = [[Fraction(draw.randrange(10**3, 10**6)) for _ in given] for _ in range(_PLACES)]
    known: dict[Fraction, set[_Reading]] = {}
    for number in numbers_of(re.sub(r"\d+(?:\.\d+)?", "", plain(question))) | ALWAYS:
        known.setdefault(number, set()).add((number,) * _PLACES)
    for i, number in enumerate(given):
        known.setdefault(number, set()).add(tuple(place[i] for place in places))
    last: set[_Reading] = set()
    for equation in equations(_before_answer(derivation)):
        ways = [_readings(term, known) for term in equation.terms] if equation.side else [set[_Reading]()]
        if math.prod(map(len, ways)) > _MOST_READINGS:
            return False
        computed = [tuple(map(equation.at, zip(*chosen, strict=True))) for chosen in product(*ways)]
        last = {tuple(value for value in values if value is not None) for values in computed if None not in values}
        known.setdefault(equation.result, set()).update(last)
    return tuple(map(formula, places)) in last


def _readings(term: Operand, known: Mapping[Fraction, set[_Reading]]) -> set[_Reading]:
    """What an operand can stand for: ``20%`` also for a hundredth of a 20, ``3/4`` for the quotient of a 3 and a 4."""
    found = set(known.get(term.value, ()))
    if len(term.parts) == 2:
        above, below = (known.get(part, ()) for part in term.parts)
        found |= {tuple(a / b for a, b in zip(x, y, strict=True)) for x in above for y in below if all(y)}
    elif term.value != term.parts[0]:
        found |= {tuple(a / 100 for a in x) for x in known.get(term.parts[0], ())}
    return found


def value_of(answer: str) -> Fraction | None:
    """The number that an answer is, units, currency and separators aside; None where it is no single number."""
    text = plain(answer).strip().strip("$€£").rstrip(".")
    match = re.fullmatch(r"[$€£]?\s*(-?\d+(?:\.\d+)?(?:\s*/\s*\d+)?)\s*(%|[A-Za-z ]*)", text)
    if match is None:
        return None
    try:
        return Fraction(match[1].replace(" ", ""))
    except ZeroDivisionError:
        return None


def told(question: str) -> Counter[Fraction]:
    """How often a question tells each number, in digits or in words from two on: ``triples`` tells 3, ``half`` 2."""
    words = re.findall(r"[a-z]+", plain(question).lower())
    values = [_NUMBER_WORDS.get(word, Fraction(_SHARES.get(word, 0))) for word in words]
    return Counter(number_texts(question)) + Counter(value for value in values if value >= 2)


def uses_all(question: str, derivation: str) -> bool:
    """Whether each number that the question tells is an operand as often as it is told."""
    used = Counter(operand for equation in equations(_before_answer(derivation)) for operand in equation.operands)
    return told(question) <= used


def numbers_of(question: str) -> set[Fraction]:
    """Every number that a question gives: digits, words, shares (a third: 1/3 and 3), and what its words call for."""
    text = plain(question).lower()
    found = set(number_texts(text))
    found |= {Fraction(a) / int(b) for a, b in re.findall(r"(?<![\w.])(\d+)\s*/\s*(\d+)", text) if int(b)}
    for word in re.findall(r"[a-z]+(?:-[a-z]+)?", text):
        parts = word.split("-")
        if all(part in _NUMBER_WORDS for part in parts):
            found.add(sum((_NUMBER_WORDS[part] for part in parts), Fraction(0)))
        for part in parts:
            if part in _SHARES:
                found |= {Fraction(1, _SHARES[part]), Fraction(_SHARES[part])}
            for stem, values in _CALLED_FOR.items():
                if part in (stem, f"{stem}s", f"{stem}ly"):
                    found |= {Fraction(value) for value in values}
    for number, _ in re.findall(r"(\d+(?:\.\d+)?)\s*(%|cents?\b)", text):
        found |= {Fraction(number) / 100, 1 - Fraction(number) / 100}  # a share, what it leaves, and an amount of money
    if "round" in text or "nearest" in text:
        found |= {Fraction(math.floor(number + Fraction(1, 2))) for number in found}
    return found


def _founded(question: str, found: Iterable[Equation]) -> list[bool]:
    """For each equation whether all its operands are in the question or a result before it."""
    known = numbers_of(question) | ALWAYS
    verdicts = []
    for equation in found:
        verdicts.append(equation.founded(known))
        known.add(equation.result)
    return verdicts


def _key(equation: Equation) -> tuple[tuple[Fraction, ...], Fraction]:
    return tuple(sorted(equation.operands)), equation.result


def _before_answer(text: str) -> str:
    """The text without its last box and what follows: an answer is no step of its own derivation."""
    at = text.rfind("\\boxed")
    return text if at < 0 else text[:at]
