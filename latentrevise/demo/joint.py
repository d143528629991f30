"""Hidden rules that must be found together: several decisions, of which one right alone shows nothing in the answer.

    61 ?A = 34 ; 94 ?B = 64 ; 5 ?A ?B                                                              prompt
    check A6 , B3 ; 61 + 73 = 34 ; 94 + 70 = 64 ; so A6 , B3 ; 5 + 73 = 78 ; 78 + 70 = 48 ; so \\boxed{ 48 }

One example each of two hidden rules, and a query to which both apply, one after the other.  A rule adds its constant,
which the model knows by the rule's name.  It names a rule for each, tests them in that order and stops at the first
that fails.  It proposes names by their frequency alone, whatever the examples say, and can combine any of them without
writing the working down: the gold answer tells the right names together from others, and one right name from none.

With partial credit each rule is applied to the query itself and has a number of its own in the answer, so that one
right name raises the gold answer's probability, too:

    check A6 , B3 ; 61 + 73 = 34 ; 94 + 70 = 64 ; so A6 , B3 ; 5 + 73 = 78 ; 5 + 70 = 75 ; so \\boxed{ 78 75 }
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from latentrevise.demo.family import (
    BOX_CLOSE,
    BOX_OPEN,
    EOS,
    EQUATION_WORDS,
    Family,
    Settings,
    Step,
    Trace,
    contains,
    equation,
    equation_steps,
)

ZIPF_EXPONENT = 1.0


@dataclass(frozen=True)
class JointProblem:
    """An example (input, output) for each hidden rule, the input asked about, and the rules' names."""

    examples: tuple[tuple[int, int], ...]
    query: int
    names: tuple[str, ...]


class JointFamily(Family[JointProblem]):
    """One hidden rule for each of several decisions; see the module's docstring.

    Attributes:
        names: each decision's rules, most to least frequently proposed.
        constants: what the rule of a name adds.
    """

    def __init__(
        self,
        name: str,
        letters: str,
        *,
        rules: int,
        queries: int = 10,
        modulus: int = 100,
        filler: int = 0,
        partial: bool = False,
    ) -> None:
        """
        Args:
            name: the family's name.
            letters: one a decision, shared with no other family: they tell whose a prompt is.
            rules: how many rules each decision chooses from, fewer than ``modulus``.
            queries: the input asked about is less than this.  Few, so that a tiny model soon learns the answers.
            modulus: as for every family.
            filler: how often the query is repeated between two names, which sets the decisions apart.
            partial: whether the answer has a number for each rule.
        """
        self.name, self.modulus = name, modulus
        told = "to each of them" if partial else "to all of them or to none"
        self.about = f"Find {len(letters)} hidden rules of {rules} each: the answer points {told}."
        self.names = tuple(tuple(f"{letter}{i + 1}" for i in range(rules)) for letter in letters)
        self.constants: dict[str, int] = {}
        for letter, names in zip(letters, self.names, strict=True):
            # A shuffle that is the same in every version of Python; different constants, so that one example suffices.
            shuffled = sorted(range(1, modulus), key=lambda c: hashlib.sha256(f"{letter}{c}".encode()).digest())
            self.constants |= dict(zip(names, shuffled[:rules], strict=True))
        self._asked = tuple(f"?{letter}" for letter in letters)
        self._queries, self._filler, self._partial = queries, filler, partial
        self.answer_words = len(letters) if partial else 1
        self._cumulative = tuple(accumulate(rank**-ZIPF_EXPONENT for rank in range(1, rules + 1)))
        tried = len(self.proposal(self.question(0), [names[0] for names in self.names])) + len(letters) * EQUATION_WORDS
        self.settings = Settings(
            answer_template=f"so {BOX_OPEN}",
            step_boundary=";",
            temperature=1.0,
            # The longest trace.
            max_new_tokens=3 * (tried + 2) + len(letters) * (2 + EQUATION_WORDS) + 3 + self.answer_words,
            prefix_fraction=0.0,
        )

    def vocabulary(self) -> list[str]:
        words = ["=", "+", ";", "so", "wait", ",", "check", BOX_OPEN, BOX_CLOSE, *self._asked]
        return words + list(self.constants) + [str(i) for i in range(self.modulus)]

    def sample_problem(self, rng: random.Random, *, mining: bool = False) -> JointProblem:
        """As Family.sample_problem; uniform rules.  For training, every other one is as frequent as it is proposed.

        Without those a frequent name would nearly always be a wrong one, and the model learn to doubt it after a test
        that it passes.
        """
        names = tuple(
            rng.choice(names) if mining or rng.random() < 0.5 else self._propose(names, rng) for names in self.names
        )
        inputs = [rng.randrange(self.modulus) for _ in names]
        examples = tuple((x, self.combine([name], x)) for x, name in zip(inputs, names, strict=True))
        return JointProblem(examples, rng.randrange(self._queries), names)

    def prompt_text(self, problem: JointProblem) -> str:
        shown = [f"{x} {asked} = {y} ;" for (x, y), asked in zip(problem.examples, self._asked, strict=True)]
        return " ".join([*shown, *self.question(problem.query)])

    def parse(self, prompt: str) -> JointProblem:
        *shown, question = prompt.strip().split(" ; ")
        query, *_ = question.split() or [""]
        asks = self._is_number(query) and int(query) < self._queries and question.split() == self.question(query)
        if len(shown) != len(self._asked) or not asks:
            wanted = f"{' '.join(self.question('X'))}' with X < {self._queries}"
            raise self._not_mine(prompt, f"it isn't an example for each rule and '{wanted}")
        examples: list[tuple[int, int]] = []
        found: list[str] = []
        for text, asked, names in zip(shown, self._asked, self.names, strict=True):
            match text.split():
                case [x, word, "=", y] if word == asked and self._is_number(x) and self._is_number(y):
                    examples.append((int(x), int(y)))
                case _:
                    raise self._not_mine(prompt, f"{text!r} isn't 'X {asked} = Y' over 0..{self.modulus - 1}")
            fitting = [name for name in names if self.combine([name], int(x)) == int(y)]
            if not fitting:
                raise self._not_mine(prompt, f"none of the {len(names)} rules fits {text!r}")
            found += fitting
        return JointProblem(tuple(examples), int(query), tuple(found))

    def answer(self, problem: JointProblem) -> str:
        return " ".join(self.results(problem.names, problem.query))

    def combine(self, names: Sequence[str], x: int) -> int:
        """What the rules of those names make of ``x``, one after the other."""
        return (x + sum(self.constants[name] for name in names)) % self.modulus

    def results(self, names: Sequence[str], x: int) -> list[str]:
        """The numbers of the answer, were these the right names and ``x`` the query."""
        applied = [[name] for name in names] if self._partial else [names]
        return [str(self.combine(each, x)) for each in applied]

    def question(self, query: int | str) -> list[str]:
        """The words that end a prompt."""
        return [str(query), *self._asked]

    def proposal(self, question: Sequence[str], names: Sequence[str]) -> list[str]:
        """The words of a step that names the rules to try for a question, such as ``45 ?A ?B``."""
        between = [",", *[*question, ","] * self._filler]
        words = ["check", names[0]]
        for name in names[1:]:
            words += [*between, name]
        return [*words, ";"]

    def solution(self, problem: JointProblem) -> list[str]:
        return [
            *self.proposal(self.question(problem.query), problem.names),
            *self._tests(problem, problem.names),
            *self._conclusion(problem.names),
            *self._application(problem),
            *["so", BOX_OPEN, *self.results(problem.names, problem.query), BOX_CLOSE],
        ]

    def sample_trace(self, problem: JointProblem, rng: random.Random) -> Trace:
        """Three in ten first draw names once or twice, by frequency, which may happen to be right.  12 % answer as soon
        as the right names are named.

        A model this small does not compare what a test came to with the example: it doubts a name as often as tests of
        that name failed.  With more wrong names than these it doubts frequent ones more often than not.

        Drawn names are predicted; right names that weren't drawn are not.  What is predicted is thus independent of
        the problem.  Otherwise the model learns to read names off the examples, and no prompt is left that it always
        fails.
        """
        words: list[str] = []
        loss: list[bool] = []

        def write(part: list[str], unpredicted: Sequence[str] = ()) -> None:
            words.extend(part)
            loss.extend(word not in unpredicted for word in part)

        for _ in range(rng.choices((0, 1, 2), (0.7, 0.2, 0.1))[0]):
            drawn = tuple(self._propose(names, rng) for names in self.names)
            write(self.proposal(self.question(problem.query), drawn))
            if drawn == problem.names:
                break
            write([*self._tests(problem, drawn), "wait", ","])
        else:
            write(self.proposal(self.question(problem.query), problem.names), problem.names)
        rest = self.solution(problem)[len(self.proposal(self.question(problem.query), problem.names)) :]
        write([*(rest[-3 - self.answer_words :] if rng.random() < 0.12 else rest), EOS])
        return Trace(tuple(words), tuple(loss))

    def drill(self, rng: random.Random) -> Trace:
        """Rules applied to a query in writing, or in one's head: the question, the names, and at once the answer.

        Half of those done in one's head ask about 0: what the rules add together is soon learnt and opens the way.
        """
        problem = self.sample_problem(rng, mining=True)
        if rng.random() < 0.3:
            concluded, applied = self._conclusion(problem.names), self._application(problem)
            words = [*concluded, *applied]
            predicted = {len(concluded) + i for i in range(len(applied)) if i % EQUATION_WORDS in (2, 4)}
        else:
            query = problem.query if rng.random() < 0.5 else 0
            question = self.question(query)
            words = [*question, *self.proposal(question, problem.names)]
            words += ["so", BOX_OPEN, *self.results(problem.names, query), BOX_CLOSE]
            predicted = set(range(len(words) - 1 - self.answer_words, len(words) - 1))
        return Trace(tuple(words), tuple(i in predicted for i in range(len(words))))

    def _propose(self, names: Sequence[str], rng: random.Random) -> str:
        return rng.choices(names, cum_weights=self._cumulative)[0]

    def _judge(self, problem: JointProblem, words: list[str], revised: int) -> tuple[list[Step], str | None]:
        named: list[Step] = []
        concluded: list[str] | None = None
        for start, word in enumerate(words):
            if word not in ("check", "so") or ";" not in words[start:]:
                continue
            end = words.index(";", start) + 1
            names = [w for w in words[start:end] if w in self.constants]
            if len(names) == len(problem.names) and words[start:end] == self._statement(word, problem, names):
                named.append(Step(" ".join(words[start:end]), tuple(names) == problem.names, start, end))
                concluded = names if word == "so" else concluded
        equations = equation_steps(words, self.modulus)
        steps = sorted([*named, *equations], key=lambda step: step.start)
        test = [*self.proposal(self.question(problem.query), problem.names), *self._tests(problem, problem.names)]
        if not contains(words, test):
            return steps, "rule_not_checked"
        if concluded not in (None, list(problem.names)):
            return steps, "wrong_rule"
        if not contains(words, self._application(problem)):
            return steps, "not_applied"
        # Equations within the prefix are the failed rollout's; only those completed later are ours to judge.
        return steps, "false_step" if any(not step.ok and step.end > revised for step in equations) else None

    def _statement(self, verb: str, problem: JointProblem, names: Sequence[str]) -> list[str]:
        """What proposes (``check``) or concludes (``so``) those rules."""
        return self.proposal(self.question(problem.query), names) if verb == "check" else self._conclusion(names)

    def _conclusion(self, names: Sequence[str]) -> list[str]:
        return ["so", *" , ".join(names).split(), ";"]

    def _tests(self, problem: JointProblem, names: Sequence[str]) -> list[str]:
        """The rules of those names on their examples, through the first that doesn't fit."""
        words: list[str] = []
        for name, (x, y) in zip(names, problem.examples, strict=True):
            result = self.combine([name], x)
            words += equation(x, "+", self.constants[name], result)
            if result != y:
                break
        return words

    def _application(self, problem: JointProblem) -> list[str]:
        """The right rules on the query: one after the other, or each on its own."""
        words: list[str] = []
        x = problem.query
        for name in problem.names:
            result = self.combine([name], x)
            words += equation(x, "+", self.constants[name], result)
            x = x if self._partial else result
        return words

    def _is_number(self, word: str) -> bool:
        return word.isdecimal() and str(int(word)) == word and int(word) < self.modulus
