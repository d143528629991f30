"""What a checkable task family provides: problems, traces to train on, and a checker that needs nothing but text.

Both families of the demo are our own; they are not part of the method's paper (arXiv 2606.29938).  A family writes
every problem, trace and answer as words separated by single spaces; one word is one token of the family's model.
"""

from __future__ import annotations

import random
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from latentrevise.errors import InputError

EOS = "<eos>"
BOX_OPEN = "\\boxed{"
BOX_CLOSE = "}"

EQUATION_WORDS = 6

_EQUATION = re.compile(r"(\d+) ([+*-]) (\d+) = (\d+) ;")


@dataclass(frozen=True, slots=True)
class Step:
    """One statement found in a derivation.

    ``start`` and ``end`` (exclusive) count words, which are tokens, from the first word of the prefix on through the
    continuation.  ``ok`` says whether the statement is true of the problem.
    """

    text: str
    ok: bool
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Derivation:
    """What a checker found.

    Attributes:
        valid: the right answer, reached by a written derivation whose needed steps are all present and true.
        correct: the stated answer is the right one, however it was reached.
        answer: the answer stated in the continuation, None if there is none.
        steps: every statement before the answer, in order, true or not.
        reason: None if valid, otherwise the first of ``no_answer``, ``wrong_answer``, ``missing_step``, ``false_step``,
            ``rule_not_checked``, ``wrong_rule``, ``not_applied`` that holds.
    """

    valid: bool
    correct: bool
    answer: str | None
    steps: tuple[Step, ...]
    reason: str | None


@dataclass(frozen=True, slots=True)
class Trace:
    """Words to train on and, for each, whether it is predicted (``loss``) or only read."""

    words: tuple[str, ...]
    loss: tuple[bool, ...]

    def __post_init__(self) -> None:
        if len(self.words) != len(self.loss):
            raise ValueError(f"a trace needs one loss flag a word: {len(self.words)} words, {len(self.loss)} flags")


@dataclass(frozen=True, slots=True)
class Settings:
    """Recommended settings of the recovery pipeline for a family, as plain data.

    Attributes:
        answer_template: text between the (revised) prefix and the answer whose tokens are scored.
        step_boundary: the word that ends a step.
        temperature: sampling temperature.
        max_new_tokens: enough for every trace the model was trained on.
        prefix_fraction: the prefix of a failed rollout ends just after the step boundary nearest to this share of its
            tokens (the earlier one on ties); 0 therefore means just after the first boundary.
    """

    answer_template: str
    step_boundary: str
    temperature: float
    max_new_tokens: int
    prefix_fraction: float


P = TypeVar("P")


class Family(ABC, Generic[P]):
    """A family of problems over words, checkable from text alone.  ``P`` is its problem type.

    Attributes:
        name: short lower-case name; also the name of its bundled model.
        modulus: all arithmetic is modulo this number; every residue is one token.
        about: one sentence saying what the family is for.
        settings: recommended settings of the recovery pipeline.
        answer_words: how many numbers an answer holds.
    """

    name: str
    modulus: int
    about: str
    settings: Settings
    answer_words: int = 1

    @abstractmethod
    def vocabulary(self) -> list[str]:
        """All words the family uses, without the tokenizer's special tokens, in a fixed order."""

    @abstractmethod
    def sample_problem(self, rng: random.Random, *, mining: bool = False) -> P:
        """A problem from the distribution that is trained on or, with ``mining``, the harder one the demo mines."""

    @abstractmethod
    def prompt_text(self, problem: P) -> str:
        """The problem as text."""

    @abstractmethod
    def parse(self, prompt: str) -> P:
        """The problem a prompt states.  Raises InputError if it isn't one of this family's."""

    @abstractmethod
    def answer(self, problem: P) -> str:
        """The right answer as text."""

    @abstractmethod
    def solution(self, problem: P) -> list[str]:
        """The words of the straight derivation, through the boxed answer (no ``<eos>``)."""

    @abstractmethod
    def sample_trace(self, problem: P, rng: random.Random) -> Trace:
        """A completion to train on, through ``<eos>``; at times it corrects a mistake or answers early."""

    @abstractmethod
    def drill(self, rng: random.Random) -> Trace:
        """One short exercise of a single skill; the trainer strings several together."""

    @abstractmethod
    def _judge(self, problem: P, words: list[str], revised: int) -> tuple[list[Step], str | None]:
        """The steps in ``words`` and the first reason against the derivation; the first ``revised`` words were fed."""

    def accepts(self, prompt: str) -> bool:
        """Whether ``prompt`` is one of this family's."""
        try:
            self.parse(prompt)
        except InputError:
            return False
        return True

    def check(self, prompt: str, prefix: str, continuation: str, answer: str) -> Derivation:
        """Check a derivation, knowing only text.

        Args:
            prompt: the problem's prompt.
            prefix: rendering of the (revised) prefix the continuation was sampled from; empty for a fresh rollout.
            continuation: what was sampled.  Its last complete box of numbers is the answer; the rest is ignored.
            answer: the gold answer, as in the prompts file.  A derivation can only be valid if it proves this answer.

        Raises:
            InputError: the prompt isn't one of this family's.
        """
        problem = self.parse(prompt)
        fed, sampled = prefix.split(), continuation.split()
        stated, end = _last_box(sampled, self.answer_words)
        steps, fault = self._judge(problem, fed + sampled[:end], len(fed))
        correct = stated is not None and stated == answer.strip()
        if stated is None:
            reason: str | None = "no_answer"
        elif not correct or stated != self.answer(problem):
            reason = "wrong_answer"
        else:
            reason = fault
        return Derivation(reason is None, correct, stated, tuple(steps), reason)

    def _not_mine(self, prompt: str, why: str) -> InputError:
        return InputError(
            f"prompt {prompt!r} is not a problem of the demo family {self.name!r}: {why}. "
            f"Use prompts made by latentrevise.demo.make_prompts, or leave the derivation check off."
        )


def evaluate(left: int, op: str, right: int, modulus: int) -> int:
    """``left op right`` modulo ``modulus``; ``op`` is one of ``+ - *``."""
    if op == "+":
        return (left + right) % modulus
    if op == "-":
        return (left - right) % modulus
    if op == "*":
        return (left * right) % modulus
    raise ValueError(f"unknown operator {op!r}")


def equation(left: int, op: str, right: int, result: int) -> list[str]:
    """The words of ``left op right = result ;``."""
    return [str(left), op, str(right), "=", str(result), ";"]


def equation_holds(words: Sequence[str], modulus: int) -> bool | None:
    """Whether six words are a true equation; None if they aren't an equation."""
    match = _EQUATION.fullmatch(" ".join(words))
    if match is None:
        return None
    left, op, right, result = match.groups()
    return evaluate(int(left), op, int(right), modulus) == int(result)


def equation_steps(words: list[str], modulus: int) -> list[Step]:
    """Every equation in ``words``; ``ok`` says whether it is true, whatever it is about."""
    steps: list[Step] = []
    for start in range(len(words)):
        written = words[start : start + EQUATION_WORDS]
        holds = equation_holds(written, modulus)
        if holds is not None:
            steps.append(Step(" ".join(written), holds, start, start + EQUATION_WORDS))
    return steps


def contains(words: list[str], part: list[str]) -> bool:
    """Whether ``part`` is in ``words``, one word after the other."""
    return any(words[i : i + len(part)] == part for i in range(len(words) - len(part) + 1))


def _last_box(words: list[str], count: int) -> tuple[str | None, int]:
    """The ``count`` numbers in the last complete box and where it opens; (None, number of words) without one."""
    for i in range(len(words) - count - 2, -1, -1):
        inside = words[i + 1 : i + 1 + count]
        if words[i] == BOX_OPEN and all(word.isdigit() for word in inside) and words[i + 1 + count] == BOX_CLOSE:
            return " ".join(inside), i
    return None, len(words)
