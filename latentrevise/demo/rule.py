"""Find the hidden rule: the positive family, purpose-built to suit answer-driven revision.

    32 ? = 90 ; 94 ? = 52 ; 45 ?                                          prompt
    check T ; 32 - 42 = 90 ; so T ; 45 - 42 = 3 ; so \\boxed{ 3 }

Two examples and one query of one of 24 fixed rules modulo 100.  One decision, which rule to try first, settles a
rollout.  The rules in the training traces follow a Zipf law and the prompts that are mined don't, so the model seldom
proposes a rare rule although it can apply it, even without writing the working down.  That implicit knowledge is what
makes the gold answer informative about the decision; a task without it (see chain.py) gives revision nothing to follow.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import accumulate

from latentrevise.demo.family import (
    BOX_CLOSE,
    BOX_OPEN,
    EOS,
    Family,
    Settings,
    Step,
    Trace,
    contains,
    equation,
    equation_steps,
    evaluate,
)

# Most to least frequent in the traces.  Factors are coprime to 100, so that every rule is a bijection.
RULES: dict[str, tuple[str, int]] = {
    "A": ("-", 50), "B": ("+", 78), "C": ("+", 31), "D": ("+", 19), "E": ("*", 51), "F": ("+", 34),
    "G": ("*", 89), "H": ("-", 27), "I": ("-", 94), "J": ("+", 81), "K": ("*", 77), "L": ("-", 89),
    "M": ("+", 49), "N": ("+", 21), "O": ("*", 69), "P": ("-", 86), "Q": ("+", 74), "R": ("-", 12),
    "S": ("*", 13), "T": ("-", 42), "U": ("+", 7), "V": ("-", 73), "W": ("+", 56), "X": ("-", 48),
}  # fmt: skip
ZIPF_EXPONENT = 1.6

_NAMES = tuple(RULES)
_CUMULATIVE = tuple(accumulate(rank**-ZIPF_EXPONENT for rank in range(1, len(RULES) + 1)))


@dataclass(frozen=True)
class RuleProblem:
    """Two examples (input, output), the input asked about, and the only rule that fits the examples."""

    examples: tuple[tuple[int, int], tuple[int, int]]
    query: int
    rule: str


def apply(rule: str, x: int) -> int:
    """The rule's output for input ``x``."""
    op, constant = RULES[rule]
    return evaluate(x, op, constant, RuleFamily.modulus)


def fitting(examples: tuple[tuple[int, int], ...]) -> list[str]:
    """The rules that map every example's input to its output."""
    return [r for r in RULES if all(apply(r, x) == y for x, y in examples)]


class RuleFamily(Family[RuleProblem]):
    """One hidden rule out of 24; see the module's docstring."""

    name = "rule"
    modulus = 100
    about = "Find the hidden rule, the positive family: purpose-built, one rare decision that the answer can point to."
    settings = Settings(
        answer_template=f"so {BOX_OPEN}", step_boundary=";", temperature=1.0, max_new_tokens=60, prefix_fraction=0.0
    )

    def vocabulary(self) -> list[str]:
        words = ["=", "+", "-", "*", ";", "?", "so", "wait", ",", "check", BOX_OPEN, BOX_CLOSE]
        return words + list(_NAMES) + [str(i) for i in range(self.modulus)]

    def sample_problem(self, rng: random.Random, *, mining: bool = False, rule: str | None = None) -> RuleProblem:
        """As Family.sample_problem; rules are uniform for mining, Zipf for training, or the one given."""
        while True:
            name = rule or (rng.choice(_NAMES) if mining else _by_frequency(rng))
            first, second, query = (rng.randrange(self.modulus) for _ in range(3))
            examples = (first, apply(name, first)), (second, apply(name, second))
            if fitting(examples) == [name]:
                return RuleProblem(examples, query, name)

    def prompt_text(self, problem: RuleProblem) -> str:
        shown = " ".join(f"{x} ? = {y} ;" for x, y in problem.examples)
        return f"{shown} {problem.query} ?"

    def parse(self, prompt: str) -> RuleProblem:
        match prompt.split():
            case [x1, "?", "=", y1, ";", x2, "?", "=", y2, ";", query, "?"] if all(
                w.isdecimal() and str(int(w)) == w and int(w) < self.modulus for w in (x1, y1, x2, y2, query)
            ):
                examples = (int(x1), int(y1)), (int(x2), int(y2))
            case _:
                raise self._not_mine(prompt, "it isn't 'X ? = Y ; X ? = Y ; X ?' over 0..99")
        rules = fitting(examples)
        if len(rules) != 1:
            raise self._not_mine(prompt, f"{len(rules)} of the {len(RULES)} rules fit its examples, not exactly one")
        return RuleProblem(examples, int(query), rules[0])

    def answer(self, problem: RuleProblem) -> str:
        return str(apply(problem.rule, problem.query))

    def solution(self, problem: RuleProblem) -> list[str]:
        return [
            *self._test(problem.rule, problem.examples[0][0]),
            *["so", problem.rule, ";", *self._application(problem.rule, problem.query)],
            *["so", BOX_OPEN, self.answer(problem), BOX_CLOSE],
        ]

    def sample_trace(self, problem: RuleProblem, rng: random.Random) -> Trace:
        """10 % answer as soon as they have named the rule.  Of the rest, 40 % first try one or two wrong rules (which
        they needn't predict) and 10 % answer after the check, without writing the query's equation.

        Only one trace in five predicts which rule to check.  That teaches how frequent each rule is; predicted in all,
        the model soon learns to read the rule off the examples, and no prompt is left that it always fails.
        """
        proposes = rng.random() < 0.2
        boxed = ["so", BOX_OPEN, self.answer(problem), BOX_CLOSE, EOS]
        if rng.random() < 0.1:
            words = ["check", problem.rule, ";", *boxed]
            return Trace(tuple(words), (True, proposes, *[True] * (len(words) - 2)))
        words, loss = [], []
        tried = [problem.rule]
        for _ in range(rng.choices((0, 1, 2), (0.6, 0.25, 0.15))[0]):
            wrong = next(r for r in iter(lambda: _by_frequency(rng), None) if r not in tried)
            tried.append(wrong)
            attempt = self._test(wrong, problem.examples[0][0])
            if apply(wrong, problem.examples[0][0]) == problem.examples[0][1]:
                attempt += self._application(wrong, problem.examples[1][0])
            attempt += ["wait", ","]
            words += attempt
            loss += [True, False] + [True] * (len(attempt) - 2)
        rest = [*self._test(problem.rule, problem.examples[0][0]), "so", problem.rule, ";"]
        if rng.random() >= 0.1:
            rest += self._application(problem.rule, problem.query)
        rest += boxed
        return Trace((*words, *rest), (*loss, True, proposes, *[True] * (len(rest) - 2)))

    def drill(self, rng: random.Random) -> Trace:
        """A rule spelt out on an input, or applied in one's head: the question, the rule, and at once the answer."""
        rule, x = rng.choice(_NAMES), rng.randrange(self.modulus)
        if rng.random() < 0.4:
            words = self._test(rule, x)
            predicted = {4, 5, 7}
        else:
            words = [str(x), "?", "check", rule, ";", "so", BOX_OPEN, str(apply(rule, x)), BOX_CLOSE]
            predicted = {7}
        return Trace(tuple(words), tuple(i in predicted for i in range(len(words))))

    def _judge(self, problem: RuleProblem, words: list[str], revised: int) -> tuple[list[Step], str | None]:
        named: list[Step] = []
        concluded: str | None = None
        for i in range(len(words)):
            match words[i : i + 3]:
                case [("check" | "so") as verb, rule, ";"] if rule in RULES:
                    named.append(Step(f"{verb} {rule} ;", rule == problem.rule, i, i + 3))
                    concluded = rule if verb == "so" else concluded
        equations = equation_steps(words, self.modulus)
        steps = sorted([*named, *equations], key=lambda step: step.start)
        if not any(contains(words, self._test(problem.rule, x)) for x, _ in problem.examples):
            return steps, "rule_not_checked"
        if concluded not in (None, problem.rule):
            return steps, "wrong_rule"
        if not contains(words, self._application(problem.rule, problem.query)):
            return steps, "not_applied"
        # Equations within the prefix are the failed rollout's; only those completed later are ours to judge.
        return steps, "false_step" if any(not step.ok and step.end > revised for step in equations) else None

    def _application(self, rule: str, x: int) -> list[str]:
        return equation(x, *RULES[rule], apply(rule, x))

    def _test(self, rule: str, x: int) -> list[str]:
        return ["check", rule, ";", *self._application(rule, x)]


def _by_frequency(rng: random.Random) -> str:
    return rng.choices(_NAMES, cum_weights=_CUMULATIVE)[0]
