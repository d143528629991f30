"""The step checker of the recovery study: what a program can tell of a step by the question, the answer unread."""

from __future__ import annotations

from latentrevise.demo import family_of
from latentrevise.demo.chain import ChainFamily
from latentrevise.demo.family import equation_steps
from latentrevise.demo.rule import RuleFamily
from latentrevise.errors import InputError


def check_step(prompt: str, before: str, step: str) -> bool | None:
    """Whether a step of a demo family holds; None where it says nothing that can be checked.

    Equations must be true and compute with a number of the prompt or an earlier result (of *chain*, both numbers; the
    other families' second ones are the rules' constants, which no prompt gives). A rule may be concluded only behind
    a test that gives an example's output (of *pair*, behind tests of all examples).
    """
    family = family_of(prompt)
    if family is None:
        raise InputError(f"prompt {prompt!r} is of no demo family; choose the step checker of your own task")
    written, found = (equation_steps(text.split(), family.modulus) for text in (before, step))
    known = {word for word in prompt.split() if word.isdigit()} | {e.text.split()[4] for e in written}
    for equation in found:
        left, _, right, _, result, _ = equation.text.split()
        if not equation.ok or left not in known or (isinstance(family, ChainFamily) and right not in known):
            return False
        known.add(result)
    if found or isinstance(family, ChainFamily) or step.split()[:1] != ["so"]:
        return True if found else None
    tests = {(words[0], words[4]) for words in (equation.text.split() for equation in written)}
    passed = [(str(x), str(y)) in tests for x, y in family.parse(prompt).examples]
    return any(passed) if isinstance(family, RuleFamily) else all(passed)
