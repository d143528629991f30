"""``gsm``: word problems in English, for a real language model; the number of steps is the dial of their difficulty.

    Anna has 12 shells. Then Anna buys 5 more. Then Anna doubles the number of shells.
    How many shells does Anna have now?
    12 + 5 = 17. 17 * 2 = 34. The answer is \\boxed{34}.

Every intermediate result is known, and a problem can be read back from its text, so a derivation is checked against the
needed equations by ``latentrevise.checkers.arithmetic``. Our own, seeded; nothing is downloaded.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

from latentrevise.checkers.arithmetic import ArithmeticDerivation, check_against, computes, uses_all
from latentrevise.demo.data import Split, split_of
from latentrevise.errors import InputError

NAME = "gsm"
TAUGHT_STEPS = (1, 2, 2, 3, 3, 4)  # how long the problems are that the bundled adapter was taught, by their shares
_NAMES = ("Tom", "Anna", "Ben", "Lucy", "Omar", "Mia", "Sam", "Nina", "Paul", "Rosa", "Ivan", "Aisha")
_ITEMS = ("apples", "marbles", "stickers", "books", "coins", "pencils", "shells", "cards", "buttons", "stamps")
_MOST = 150  # what is owned stays below it, but for packs
_KEPT = "Then {n} shares them equally among {b} boxes and keeps one box."
# What can happen, and how it is told. {b} and {c} are numbers.
_EVENTS: dict[str, tuple[str, ...]] = {
    "add": ("Then {n} buys {b} more.", "A friend gives {n} {b} {it}.", "Later {n} finds {b} more {it}."),
    "take": ("Then {n} gives away {b}.", "After that {n} loses {b} {it}.", "Then {n} sells {b} of them."),
    "double": ("Then {n} doubles the number of {it}.", "By the next week {n} has twice as many {it}."),
    "triple": ("Then {n} triples the number of {it}.",),
    "halve": ("Then {n} gives half of the {it} to a friend.", "Half of the {it} get lost."),
    "share": (_KEPT,),
    "packs": ("Then {n} gets {b} packs with {c} {it} each.", "Then {n} buys {b} bags of {c} {it}."),
}
_OPENING, _QUESTION = "{n} has {x} {it}.", "How many {it} does {n} have now?"


def _pattern(template: str) -> str:
    named = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
    return re.sub(r"\{(\w)\}", r"(?P<\1>\\d+)", named.replace("{n}", r"\w+").replace("{it}", r"\w+"))


_READ = [(kind, re.compile(_pattern(text))) for kind, texts in _EVENTS.items() for text in texts]
_WHOLE = re.compile(r"(?P<n>\w+) has (?P<x>\d+) (?P<it>\w+)\. (?P<events>.*) How many \w+ does \w+ have now\?")


@dataclass(frozen=True)
class WordProblem:
    """A story: ``start`` things, and what happens to them as ``(kind, b, c)``, 0 where a number is not told."""

    start: int
    events: tuple[tuple[str, int, int], ...]

    @cached_property
    def equations(self) -> tuple[tuple[int, str, int, int], ...]:
        """The needed equations ``(left, operator, right, result)`` in order; their number is that of the steps."""
        owned, found = self.start, []
        for kind, b, c in self.events:
            if kind == "packs":
                found.append((b, "*", c, b * c))
            operator, right = {
                "add": ("+", b),
                "take": ("-", b),
                "double": ("*", 2),
                "triple": ("*", 3),
                "halve": ("/", 2),
                "share": ("/", b),
                "packs": ("+", b * c),
            }[kind]
            result = {"+": owned + right, "-": owned - right, "*": owned * right, "/": owned // right}[operator]
            found.append((owned, operator, right, result))
            owned = result
        return tuple(found)

    @property
    def answer(self) -> int:
        return self.equations[-1][3] if self.equations else self.start

    @property
    def derivation(self) -> str:
        return " ".join(f"{left} {operator} {right} = {result}." for left, operator, right, result in self.equations)

    def formula(self, numbers: Sequence[Fraction]) -> Fraction:
        """The answer where the text's numbers, as digits and in their order, were these."""
        own = iter(numbers)
        owned = next(own)
        for kind, _, _ in self.events:
            match kind:
                case "add":
                    owned += next(own)
                case "take":
                    owned -= next(own)
                case "share":
                    owned /= next(own)
                case "packs":
                    owned += next(own) * next(own)
                case _:
                    owned *= {"double": Fraction(2), "triple": Fraction(3), "halve": Fraction(1, 2)}[kind]
        return owned

    @property
    def solution(self) -> str:
        return f"{self.derivation} The answer is \\boxed{{{self.answer}}}."


def sample(rng: random.Random, steps: int) -> tuple[str, WordProblem]:
    """A problem of so many steps and its text. Raises InputError for less than one."""
    if steps < 1:
        raise InputError(f"a problem of {steps} steps: it needs at least one")
    name, items, start = rng.choice(_NAMES), rng.choice(_ITEMS), rng.randint(4, 30)
    story, problem = [_OPENING.format(n=name, x=start, it=items)], WordProblem(start, ())
    while left := steps - len(problem.equations):
        kind, b, c = _event(rng, problem.answer, left)
        problem = WordProblem(start, (*problem.events, (kind, b, c)))
        story.append(rng.choice(_EVENTS[kind]).format(n=name, it=items, b=b, c=c))
    return " ".join([*story, _QUESTION.format(n=name, it=items)]), problem


def _event(rng: random.Random, owned: int, left: int) -> tuple[str, int, int]:
    shares = [d for d in (3, 4, 5) if owned % d == 0 and owned // d > 1]
    possible = [
        "add",
        *(["take"] if owned > 4 else []),
        *(["double"] if 2 * owned <= _MOST else []),
        *(["triple"] if 3 * owned <= _MOST else []),
        *(["halve"] if owned % 2 == 0 and owned > 4 else []),
        *(["share"] if shares else []),
        *(["packs"] if left > 1 and owned < _MOST else []),
    ]
    kind = rng.choice(possible)
    if kind == "packs":
        return kind, rng.randint(2, 6), rng.randint(3, 7)
    number = {"add": lambda: rng.randint(3, 25), "take": lambda: rng.randint(2, owned - 2)}
    number["share"] = lambda: rng.choice(shares)
    return kind, number[kind]() if kind in number else 0, 0


def parse(prompt: str) -> WordProblem:
    """The problem that a text states. Raises InputError if it is none of this family."""
    whole = _WHOLE.fullmatch(prompt.strip())
    if whole is None:
        raise _not_mine(prompt, f"it does not read {_OPENING!r} ... {_QUESTION!r}")
    events = []
    for sentence in re.findall(r"[^.]+\.", whole["events"]):
        found = [(kind, match) for kind, text in _READ if (match := text.fullmatch(sentence.strip()))]
        if not found:
            raise _not_mine(prompt, f"{sentence.strip()!r} is none of its sentences")
        kind, match = found[0]
        numbers = match.groupdict()
        events.append((kind, int(numbers.get("b") or 0), int(numbers.get("c") or 0)))
    return WordProblem(int(whole["x"]), tuple(events))


def _not_mine(prompt: str, why: str) -> InputError:
    return InputError(f"prompt {prompt[:80]!r} is no word problem of {NAME}: {why}")


def check(prompt: str, prefix: str, continuation: str, answer: str) -> ArithmeticDerivation:
    """``checker: latentrevise.demo.wordproblems:check``: true and founded equations, and either the needed ones among
    them or, as where operations are taken in another order, the same formula of the question's numbers, each of which
    is an operand as often as it is told."""
    problem, text = parse(prompt), prefix + continuation
    found = check_against(prompt, prefix, continuation, answer, problem.derivation)
    if found.reason == "missing_step" and uses_all(prompt, text) and computes(prompt, text, problem.formula):
        return replace(found, valid=True, reason=None)
    return found


def word_problems(n: int, steps: int, *, split: Split = "report", seed: int = 0) -> list[dict[str, Any]]:
    """``n`` different prompts of so many steps: rows of ``id``, ``prompt``, ``answer`` and ``solution``."""
    rng = random.Random(f"{NAME}/{steps}/{split}/{seed}")
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < n:
        prompt, problem = sample(rng, steps)
        if split_of(prompt) == split and prompt not in rows:
            name = f"{NAME}{steps}-{split}-{seed}-{len(rows):05d}"
            rows[prompt] = {"id": name, "prompt": prompt, "answer": str(problem.answer), "solution": problem.solution}
    return list(rows.values())


def lessons(n: int, seed: int = 0) -> list[dict[str, str]]:
    """``n`` rows ``prompt``, ``completion`` of the train split for ``latentrevise train sft --rows``."""
    rng = random.Random(f"{NAME}/lessons/{seed}")
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < n:
        prompt, problem = sample(rng, rng.choice(TAUGHT_STEPS))
        if split_of(prompt) == "train":
            rows[prompt] = {"prompt": prompt, "completion": problem.solution}
    return list(rows.values())
