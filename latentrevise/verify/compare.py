"""Do two forms say the same? The rules, without the mathematics of expressions, which is asked for where it is needed.

Our own decision throughout; docs/verifier.md says it for people.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

from latentrevise.verify.forms import (
    Choice,
    Form,
    Labelled,
    Matrix,
    Quantity,
    Region,
    Relation,
    Scalar,
    Several,
    Span,
    as_expression,
    as_span,
    scaled_expression,
)
from latentrevise.verify.grammar import Expression, expression
from latentrevise.verify.plainforms import Literal, Number, Residue, Time
from latentrevise.verify.units import DEGREE, PERCENT, RADIAN

ENOUGH = 6
"""Significant digits from which a decimal may stand for a number that has no end (1/3, pi)."""


class Mathematics(Protocol):
    """Decides where expressions have to be computed."""

    def same(self, gold: Scalar, answer: Scalar) -> bool: ...

    def equivalent(self, gold: Relation, answer: Relation) -> bool: ...


def equal(gold: Form, answer: Form, mathematics: Mathematics) -> bool:
    """Whether the answer is the gold one. The order matters where one of them says less than the other."""
    return _Comparison(mathematics).equal(gold, answer)


def same_numbers(a: Number, b: Number) -> bool:
    """Exactly; or one is a number without end, and the other its decimal, rounded or cut."""
    if a.value == b.value:
        return True
    for decimal, exact in ((a, b), (b, a)):
        if decimal.digits >= ENOUGH and not exact.digits and not _ends(exact.value):
            step = _step(decimal)
            difference = exact.value - decimal.value
            return abs(difference) * 2 <= step or (abs(difference) < step and (difference > 0) == (exact.value > 0))
    return False


def _ends(value: Fraction) -> bool:
    """Whether its decimal expansion ends."""
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


def _step(decimal: Number) -> Fraction:
    """One of the last place of a decimal as it was written, whatever zeros end it."""
    size = abs(decimal.value)
    if not size:
        return Fraction(0)
    power = len(str(size.numerator)) - len(str(size.denominator))
    while Fraction(10) ** power > size:
        power -= 1
    while Fraction(10) ** (power + 1) <= size:
        power += 1
    return Fraction(10) ** (power - decimal.digits + 1)


class _Comparison:
    def __init__(self, mathematics: Mathematics) -> None:
        self.mathematics = mathematics

    def equal(self, gold: Form, answer: Form) -> bool:
        if isinstance(gold, (Number, Expression)) and isinstance(answer, (Number, Expression)):
            return self._scalars(gold, answer)
        if isinstance(gold, Choice) or isinstance(answer, Choice):
            return self._choices(gold, answer)
        if isinstance(gold, Labelled) or isinstance(answer, Labelled):
            return self._labelled(gold, answer)
        if isinstance(gold, Relation) and isinstance(answer, Relation):
            return self.mathematics.equivalent(gold, answer)
        if isinstance(gold, Quantity) or isinstance(answer, Quantity):
            return self._quantities(gold, answer)
        if isinstance(gold, Region) or isinstance(answer, Region):
            return self._regions(gold, answer)
        if isinstance(gold, Several) or isinstance(answer, Several):
            return self._several(gold, answer)
        if isinstance(gold, Matrix) and isinstance(answer, Matrix):
            return len(gold.rows) == len(answer.rows) and all(
                self._in_order(a, b) for a, b in zip(gold.rows, answer.rows, strict=True)
            )
        if isinstance(gold, Residue) or isinstance(answer, Residue):
            return _residues(gold, answer)
        gold, answer = _as_ratio(gold, answer), _as_ratio(answer, gold)
        if isinstance(gold, Time) and isinstance(answer, Time):
            # Said without a.m. or p.m., the gold time may be either; on a clock of 24 hours it is one.
            exact = gold.minutes == answer.minutes
            return exact or (not gold.half and answer.half and gold.minutes % 720 == answer.minutes % 720 < 720)
        return gold == answer

    def _scalars(self, gold: Scalar, answer: Scalar) -> bool:
        if isinstance(gold, Number) and isinstance(answer, Number):
            return same_numbers(gold, answer)
        return gold == answer or self.mathematics.same(gold, answer)

    def _choices(self, gold: Form, answer: Form) -> bool:
        if isinstance(gold, Choice) and isinstance(answer, Choice):
            return gold.letter == answer.letter
        choice, other = (gold, answer) if isinstance(gold, Choice) else (answer, gold)
        assert isinstance(choice, Choice)
        if isinstance(other, (Labelled,)):
            return self._labelled(gold, answer)
        return choice.content is not None and self.equal(choice.content, other)

    def _labelled(self, gold: Form, answer: Form) -> bool:
        if isinstance(gold, Labelled) and isinstance(answer, Labelled):
            # A word says what a letter stands for; two words say two things.
            if gold.label == answer.label or gold.worded != answer.worded:
                return self.equal(gold.value, answer.value)
            first, second = _as_relation(gold), _as_relation(answer)
            both = first is not None and second is not None and len(first.left.symbols | first.right.symbols) > 1
            return both and self.mathematics.equivalent(first, second)  # type: ignore[arg-type]  # y=2x, x=y/2
        labelled, other = (gold, answer) if isinstance(gold, Labelled) else (answer, gold)
        assert isinstance(labelled, Labelled)
        if isinstance(other, Relation):
            own = _as_relation(labelled)
            return own is not None and self.mathematics.equivalent(own, other)
        if isinstance(gold, Labelled):
            return self.equal(gold.value, answer)
        return self.equal(gold, labelled.value)

    def _quantities(self, gold: Form, answer: Form) -> bool:
        if isinstance(gold, Quantity) and isinstance(answer, Quantity):
            if {gold.unit, answer.unit} == {DEGREE, RADIAN}:
                return self._scalars(_radians(gold), _radians(answer))
            if gold.unit.powers != answer.unit.powers:
                return False
            factor = answer.unit.factor / gold.unit.factor
            return self._scalars(gold.value, _times(answer.value, factor))
        quantity, other = (gold, answer) if isinstance(gold, Quantity) else (answer, gold)
        assert isinstance(quantity, Quantity)
        if not isinstance(other, (Number, Expression)) or quantity.compound:
            return False
        if quantity.unit == PERCENT:
            # 50 stands for 50 %, since no share is above 1; 0.5 does not stand for 0.5 %.
            bare = isinstance(other, Number) and other.value > 1 and self._scalars(quantity.value, other)
            return bare or self._scalars(_times(quantity.value, Fraction(1, 100)), other)
        # A unit that is left out is not a wrong one.
        if self._scalars(quantity.value, other):
            return True
        return quantity.unit == DEGREE and isinstance(other, Expression) and self._scalars(_radians(quantity), other)

    def _regions(self, gold: Form, answer: Form) -> bool:
        first, second = _as_region(gold), _as_region(answer)
        if first is None or second is None:
            return False
        if first.variable and second.variable and first.variable != second.variable:
            return False
        return self._matched(_joined(first.spans), _joined(second.spans), self._spans)

    def _spans(self, a: Span, b: Span) -> bool:
        if (a.low is None) != (b.low is None) or (a.high is None) != (b.high is None):
            return False
        if (a.low is not None and a.low_open != b.low_open) or (a.high is not None and a.high_open != b.high_open):
            return False
        ends = [(x, y) for x, y in ((a.low, b.low), (a.high, b.high)) if x is not None and y is not None]
        return all(self._scalars(x, y) for x, y in ends)

    def _several(self, gold: Form, answer: Form) -> bool:
        if not isinstance(gold, Several) or not isinstance(answer, Several):
            several, other = (gold, answer) if isinstance(gold, Several) else (answer, gold)
            assert isinstance(several, Several)
            if isinstance(other, Literal) and other.kind == "row":
                items = [x.value for x in several.items if isinstance(x, Number)]
                return several.kind == "list" and tuple(items) == other.key
            if several is answer and several.kind == "list":  # 1/2 or 0.5
                return all(self.equal(gold, item) for item in several.items)
            if several.kind == "set" and len(several.items) == 1:
                return self.equal(gold, several.items[0]) if several is answer else self.equal(several.items[0], answer)
            return False
        kinds = {gold.kind, answer.kind}
        if kinds <= {"list", "set"}:
            return self._collections(gold, answer)
        if kinds <= {"tuple"} or kinds == {"bracket"}:
            return self._in_order(gold.items, answer.items)
        if kinds == {"list", "bracket"} and len(gold.items) > 2:  # [1, 2] is an interval
            return self._in_order(gold.items, answer.items)
        named = gold if gold.kind == "list" else answer
        if kinds == {"list", "tuple"} and len(_labels(named)) == len(named.items):  # x = 1, y = 2 for (1, 2)
            return self._in_order(gold.items, answer.items)
        return False

    def _collections(self, gold: Several, answer: Several) -> bool:
        first, second = _labels(gold), _labels(answer)
        if first and second and sorted(first) == sorted(second) and len(set(first)) == len(first) == len(gold.items):
            by_name = {x.label: x for x in answer.items if isinstance(x, Labelled)}
            return all(self.equal(x, by_name[x.label]) for x in gold.items if isinstance(x, Labelled))
        for labels, other in ((first, second), (second, first)):
            # x = 2, y = 1 are not any two numbers.
            if len(set(labels)) > 1 and not other:
                return self._in_order(gold.items, answer.items)
        if "set" in (gold.kind, answer.kind):
            return self._matched(self._distinct(gold.items), self._distinct(answer.items), self.equal)
        return self._matched(gold.items, answer.items, self.equal)

    def _distinct(self, items: Sequence[Form]) -> list[Form]:
        found: list[Form] = []
        for item in items:
            if item not in found:
                found.append(item)
        return found

    def _in_order(self, gold: Sequence[Form], answer: Sequence[Form]) -> bool:
        return len(gold) == len(answer) and all(self.equal(a, b) for a, b in zip(gold, answer, strict=True))

    def _matched(self, gold: Sequence, answer: Sequence, same) -> bool:  # type: ignore[no-untyped-def, type-arg]
        """Whether each has its own partner, in any order."""
        if len(gold) != len(answer):
            return False
        left = list(answer)
        for item in gold:
            # The same form first: it asks nobody.
            found = next((i for i, other in enumerate(left) if other == item), None)
            if found is None:
                found = next((i for i, other in enumerate(left) if same(item, other)), None)
            if found is None:
                return False
            left.pop(found)
        return True


def _radians(angle: Quantity) -> Scalar:
    if angle.unit != DEGREE:
        return angle.value
    own = as_expression(angle.value)
    return Expression(rf"\frac{{\pi}}{{180}} \cdot \left({own.latex}\right)", own.symbols)


def _labels(several: Several) -> list[str]:
    return [x.label for x in several.items if isinstance(x, Labelled) and not x.worded]


def _as_relation(labelled: Labelled) -> Relation | None:
    left = expression(labelled.label)
    if left is None or labelled.worded or not isinstance(labelled.value, (Number, Expression)):
        return None
    return Relation("=", left, as_expression(labelled.value))


def _as_region(form: Form) -> Region | None:
    if isinstance(form, Region):
        return form
    span = as_span(form) if isinstance(form, Several) else None
    return None if span is None else Region(None, (span,))


def _joined(spans: Sequence[Span]) -> list[Span]:
    """In order and without seams, where all ends are numbers: (1, 2] with (2, 3) is (1, 3)."""

    def value(end: Scalar | None, infinite: int) -> tuple[int, Fraction] | None:
        if end is None:
            return (infinite, Fraction(0))
        return (0, end.value) if isinstance(end, Number) else None

    keyed = [(value(s.low, -1), value(s.high, 1), s) for s in spans]
    if any(low is None or high is None for low, high, _ in keyed):
        return list(spans)
    known = sorted(((lo, hi, s) for lo, hi, s in keyed if lo and hi), key=lambda k: (k[0], k[2].low_open))
    out: list[tuple[tuple[int, Fraction], Span]] = []
    for low, high, s in known:
        if out:
            end, last = out[-1]
            if low < end or (low == end and not (s.low_open and last.high_open)):
                top, opened = max((end, not last.high_open), (high, not s.high_open))
                other = last.high if top == end else s.high
                out[-1] = (top, Span(last.low, other, last.low_open, not opened))
                continue
        out.append((high, s))
    return [s for _, s in out]


def _times(value: Scalar, factor: Fraction) -> Scalar:
    if factor == 1:
        return value
    return Number(value.value * factor, value.digits) if isinstance(value, Number) else scaled_expression(value, factor)


def _residues(gold: Form, answer: Form) -> bool:
    if isinstance(gold, Residue) and isinstance(answer, Residue):
        named = gold.variable and answer.variable and gold.variable != answer.variable
        return not named and gold.modulus == answer.modulus and (gold.value - answer.value) % gold.modulus == 0
    # "What is the remainder": the modulus is known.
    return isinstance(gold, Number) and isinstance(answer, Residue) and gold.value == answer.value


def _as_ratio(form: Form, other: Form) -> Form:
    """``3:10`` read as a time, where the other one is a ratio."""
    if isinstance(form, Time) and not form.half and isinstance(other, Literal) and other.kind == "ratio":
        hours, minutes = divmod(form.minutes, 60)
        return Literal("ratio", (Fraction(1), Fraction(minutes, hours))) if hours else form
    return form
