"""What a row's text says of itself: where its numbers come from, whether the question's go into it, and whether a step
checker calls a step false. Signals of three guards.

Arithmetic that is true can still derive nothing: ``83 + 6 = 89. 89 - 6 = 83`` where the question has no 83, or a test
of something else than the question's example. Whether equations are true is not looked at here, so that arithmetic of
another kind (modulo a number) can be read too. Our own decision.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING

from latentrevise.checkers.arithmetic import ALWAYS, numbers_of, told
from latentrevise.checkers.equations import equations
from latentrevise.checkers.loading import StepChecker
from latentrevise.data.boundary import Boundary
from latentrevise.data.records import decoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def text_signals(
    question: str,
    ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    boundary: Boundary | None,
    step_checker: StepChecker | None,
) -> dict[str, float]:
    """``provenance`` of a row's ids in front of its answer, and ``true``: the share of the steps that the step checker
    holds for true, of those that it judges; left out without a checker, or where it judges none. A row without a
    boundary is one step."""
    found = provenance(question, decoded(tokenizer, ids))
    if step_checker is None:
        return found
    ends = [0, *(boundary.ends(ids) if boundary is not None else ()), len(ids)]
    judged = [
        holds
        for first, end in pairwise(ends)
        if first < end
        and (holds := step_checker(question, decoded(tokenizer, ids[:first]), decoded(tokenizer, ids[first:end])))
        is not None
    ]
    return found | ({"true": sum(judged) / len(judged)} if judged else {})


def provenance(question: str, steps: str) -> dict[str, float]:
    """``founded``: the share of the steps' equations all of whose operands are in the question, a result before, or 1,
    2 or 100; left out without an equation. ``used``: the share of the question's numbers, in digits or words (see
    ``told``), that are an operand or a result, each as often as it is told; left out where the question has none.
    """
    found = equations(steps)
    known, seen, founded = numbers_of(question) | ALWAYS, Counter[Fraction](), 0
    for equation in found:
        founded += equation.founded(known)
        known.add(equation.result)
        seen.update((*equation.operands, equation.result))
    signals = {"founded": founded / len(found)} if found else {}
    if given := told(question):
        signals["used"] = (given & seen).total() / given.total()
    return signals
