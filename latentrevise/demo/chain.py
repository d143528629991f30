"""Chained arithmetic modulo 1000: the negative control.

    q = 862 ; V = q + 924 ; w = V * 7 ; ? w        prompt
    V = 862 + 924 = 786 ; w = 786 * 7 = 502 ; so \\boxed{ 502 }

The answer follows from the last intermediate result only, so until the last step nothing in the model knows it and the
gold answer gives revision no honest signal: what answer-driven revision gains here, it gains by smuggling the answer.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property

from latentrevise.demo.family import (
    BOX_CLOSE,
    BOX_OPEN,
    EOS,
    Family,
    Settings,
    Step,
    Trace,
    equation,
    equation_holds,
    evaluate,
)

NAMES = tuple("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
MAX_STEPS = 6
MINING_STEPS = (4, 6)

_MAX_FACTOR = 9
_SLIPS = (1, -1, 2, -2, 5, 10, -10, 20, -20, 50, 100, -100, 200, 500)


@dataclass(frozen=True)
class Given:
    """``name = value ;``"""

    name: str
    value: int


@dataclass(frozen=True)
class Derived:
    """``name = left op right ;`` with ``left`` a name, ``right`` a name or a number."""

    name: str
    left: str
    op: str
    right: str | int


@dataclass(frozen=True)
class ChainProblem:
    """Statements in an order in which they can be evaluated, and the variable that is asked for."""

    statements: tuple[Given | Derived, ...]
    query: str

    @cached_property
    def values(self) -> dict[str, int]:
        known: dict[str, int] = {}
        for s in self.statements:
            known[s.name] = s.value if isinstance(s, Given) else evaluate(*operands(s, known), ChainFamily.modulus)
        return known

    @cached_property
    def derived(self) -> tuple[Derived, ...]:
        return tuple(s for s in self.statements if isinstance(s, Derived))

    @cached_property
    def needed(self) -> tuple[Derived, ...]:
        """The derived statements the query depends on."""
        names = {self.query}
        for s in reversed(self.derived):
            if s.name in names:
                names |= {s.left, str(s.right)}
        return tuple(s for s in self.derived if s.name in names)


def operands(statement: Derived, values: dict[str, int]) -> tuple[int, str, int]:
    """``(left, op, right)`` with names replaced by their values."""
    right = statement.right
    return values[statement.left], statement.op, values[right] if isinstance(right, str) else right


class ChainFamily(Family[ChainProblem]):
    """Chains of 1 to 6 operations; see the module's docstring."""

    name = "chain"
    modulus = 1000
    about = "Chained arithmetic modulo 1000, the negative control: the answer says nothing about the next step."
    settings = Settings(
        answer_template=f"so {BOX_OPEN}", step_boundary=";", temperature=1.0, max_new_tokens=96, prefix_fraction=0.5
    )

    def vocabulary(self) -> list[str]:
        words = ["=", "+", "-", "*", ";", "?", "so", "wait", ",", "check", BOX_OPEN, BOX_CLOSE]
        return words + list(NAMES) + [str(i) for i in range(self.modulus)]

    def sample_problem(self, rng: random.Random, *, mining: bool = False, steps: int | None = None) -> ChainProblem:
        """As Family.sample_problem; ``steps`` fixes the number of operations."""
        if steps is None:
            steps = rng.randint(*MINING_STEPS) if mining else rng.randint(1, MAX_STEPS)
        givens = 1 if steps == 1 or rng.random() < 0.5 else 2
        names = rng.sample(NAMES, givens + steps)
        statements: list[Given | Derived] = [Given(n, rng.randrange(2, self.modulus)) for n in names[:givens]]
        for i in range(givens, givens + steps):
            last, older = names[i - 1], names[: i - 1]
            right: str | int
            if rng.random() < 0.35:
                op, right = "*", rng.randint(2, _MAX_FACTOR)
            else:
                op = rng.choice("+-")
                right = rng.choice(older) if older and rng.random() < 0.4 else rng.randrange(2, self.modulus)
            statements.append(Derived(names[i], last, op, right))
        return ChainProblem(tuple(statements), names[-1])

    def prompt_text(self, problem: ChainProblem) -> str:
        words: list[str] = []
        for s in problem.statements:
            words += [s.name, "=", str(s.value), ";"] if isinstance(s, Given) else [
                s.name, "=", s.left, s.op, str(s.right), ";"
            ]  # fmt: skip
        return " ".join([*words, "?", problem.query])

    def parse(self, prompt: str) -> ChainProblem:
        body, question, query = prompt.strip().rpartition(" ? ")
        if not question:
            raise self._not_mine(prompt, "it doesn't end in '? NAME'")
        statements: list[Given | Derived] = []
        known: set[str] = set()
        for part in body.removesuffix(";").split(" ; "):
            match part.split():
                case [name, "=", value] if name in NAMES and self._is_number(value):
                    statements.append(Given(name, int(value)))
                case [name, "=", left, ("+" | "-" | "*") as op, right] if (
                    name in NAMES and left in known and (right in known or self._is_number(right))
                ):
                    statements.append(Derived(name, left, op, right if right in known else int(right)))
                case _:
                    raise self._not_mine(prompt, f"{part.strip()!r} is no statement over earlier names and 0..999")
            if name in known:
                raise self._not_mine(prompt, f"{name!r} is defined twice")
            known.add(name)
        if query not in known:
            raise self._not_mine(prompt, f"{query!r} is not defined")
        return ChainProblem(tuple(statements), query)

    def answer(self, problem: ChainProblem) -> str:
        return str(problem.values[problem.query])

    def solution(self, problem: ChainProblem) -> list[str]:
        words: list[str] = []
        for s in problem.needed:
            words += self._step(s, problem.values, problem.values[s.name])
        return [*words, "so", BOX_OPEN, self.answer(problem), BOX_CLOSE]

    def sample_trace(self, problem: ChainProblem, rng: random.Random) -> Trace:
        """15 % answer one to three steps early; 25 % of the rest make a slip, notice it at once or up to two steps
        later, and redo the work from there.  The slip and what is derived from it carry no loss."""
        todo = problem.derived
        words: list[str] = []
        loss: list[bool] = []
        values = {s.name: s.value for s in problem.statements if isinstance(s, Given)}

        def write(s: Derived, result: int, *, upto: int) -> None:
            step = self._step(s, values, result)
            words.extend(step)
            loss.extend(i < upto for i in range(len(step)))
            values[s.name] = result

        if len(todo) > 1 and rng.random() < 0.15:
            skipped = 1 + (rng.random() < 0.4) + (rng.random() < 0.15)
            todo = todo[: max(1, len(todo) - skipped)]
        elif rng.random() < 0.25:
            at = rng.randrange(len(todo))
            noticed = at + 1 + (0 if rng.random() < 0.5 else rng.choice((1, 1, 2)))
            for s in todo[:at]:
                write(s, problem.values[s.name], upto=8)
            write(todo[at], self._slip(problem.values[todo[at].name], rng), upto=6)
            for s in todo[at + 1 : noticed]:
                write(s, evaluate(*operands(s, values), self.modulus), upto=0)
            words += ["wait", ",", "check"]
            loss += [True] * 3
            todo = todo[at:]
        for s in todo:
            write(s, problem.values[s.name], upto=8)
        tail = ["so", BOX_OPEN, self.answer(problem), BOX_CLOSE, EOS]
        return Trace((*words, *tail), (*loss, *[True] * len(tail)))

    def drill(self, rng: random.Random) -> Trace:
        """One equation; only its result is predicted."""
        op, left = rng.choice("+-**"), rng.randrange(self.modulus)
        right = rng.randint(2, _MAX_FACTOR) if op == "*" else rng.randrange(self.modulus)
        words = equation(left, op, right, evaluate(left, op, right, self.modulus))
        return Trace(tuple(words), (False, False, False, False, True, False))

    def _judge(self, problem: ChainProblem, words: list[str], revised: int) -> tuple[list[Step], str | None]:
        # A later statement about a variable replaces an earlier one: that is how the traces correct themselves.
        steps: list[Step] = []
        last: dict[str, bool] = {}
        truth = {s.name: self._step(s, problem.values, problem.values[s.name]) for s in problem.derived}
        i = 0
        while i + 8 <= len(words):
            step = words[i : i + 8]
            if step[0] in NAMES and step[1] == "=" and equation_holds(step[2:], self.modulus) is not None:
                last[step[0]] = step == truth.get(step[0])
                steps.append(Step(" ".join(step), last[step[0]], i, i + 8))
                i += 8
            else:
                i += 1
        needed = [s.name for s in problem.needed]
        if not all(name in last for name in needed):
            return steps, "missing_step"
        return steps, None if all(last[name] for name in needed) else "false_step"

    def _step(self, s: Derived, values: dict[str, int], result: int) -> list[str]:
        return [s.name, "=", *equation(*operands(s, values), result)]

    def _slip(self, result: int, rng: random.Random) -> int:
        if rng.random() < 0.75:
            return (result + rng.choice(_SLIPS)) % self.modulus
        return (result + rng.randrange(1, self.modulus)) % self.modulus

    def _is_number(self, word: str) -> bool:
        return word.isdecimal() and str(int(word)) == word and int(word) < self.modulus
