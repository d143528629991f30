"""Where the numbers of a derivation come from, and whether the question's go into it: signals of two guards.

Arithmetic that is true can still derive nothing: ``83 + 6 = 89. 89 - 6 = 83`` where the question has no 83, or a test
of something else than the question's example. Whether equations are true is not looked at here, so that arithmetic of
another kind (modulo a number) can be read too. Our own decision.
"""

from __future__ import annotations

from latentrevise.checkers.arithmetic import ALWAYS, numbers_of
from latentrevise.checkers.equations import equations, number_texts


def provenance(question: str, steps: str) -> dict[str, float]:
    """``founded``: the share of the steps' equations all of whose operands are in the question, a result before, or 1,
    2 or 100; left out without an equation. ``used``: the share of the question's numbers, as digits, that are an
    operand or a result; left out where the question has none.
    """
    found = equations(steps)
    known, seen, founded = numbers_of(question) | ALWAYS, set(), 0
    for equation in found:
        founded += equation.founded(known)
        known.add(equation.result)
        seen |= {*equation.operands, equation.result}
    signals = {"founded": founded / len(found)} if found else {}
    if given := set(number_texts(question)):
        signals["used"] = len(given & seen) / len(given)
    return signals
