"""What an answer can be: a number, a quantity, a list, an interval, a date ... and nothing but text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from fractions import Fraction
from typing import Literal as Kind

from latentrevise.verify import plainforms
from latentrevise.verify.grammar import Expression, expression
from latentrevise.verify.plainforms import Literal, Number, Residue, Time
from latentrevise.verify.units import Unit


@dataclass(frozen=True)
class Quantity:
    """A value with a unit. compound: several units together (3 hours 20 minutes), ``value`` in the first."""

    value: Number | Expression
    unit: Unit
    compound: bool = False


@dataclass(frozen=True)
class Choice:
    """A letter of a multiple choice, and what stands behind it."""

    letter: str
    content: Form | None


@dataclass(frozen=True)
class Several:
    """``list``: 1, 2; in any order. ``bracket``: [1, 2, 3]; ``tuple``: (1, 2); ``set``: {1, 2}."""

    kind: Kind["list", "bracket", "tuple", "set"]
    items: tuple[Form, ...]


@dataclass(frozen=True)
class Span:
    """From low to high; None is infinite."""

    low: Number | Expression | None
    high: Number | Expression | None
    low_open: bool
    high_open: bool


@dataclass(frozen=True)
class Region:
    """A union of spans; of which variable, where that is said."""

    variable: str | None
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Labelled:
    """``x = 5``. worded: the label is no symbol (Area = 5), so it says nothing."""

    label: str
    value: Form
    worded: bool


@dataclass(frozen=True)
class Relation:
    """An equation or inequality that is not solved: ``left - right`` is 0, or at least or less than 0."""

    operator: Kind["=", "<", "<=", "!="]
    left: Expression
    right: Expression


@dataclass(frozen=True)
class Matrix:
    rows: tuple[tuple[Form, ...], ...]


Scalar = Number | Expression
Form = (
    Number | Expression | Literal | Time | Residue | Quantity | Choice | Several | Region | Labelled | Relation | Matrix
)
Reader = Callable[[str], Form | None]
"""Reads a part of a text."""

REALS = Region(None, (Span(None, None, True, True),))


def scalar(text: str) -> Scalar | None:
    """A number or an expression, nothing else."""
    found = plainforms.read_plain(text)
    if found is not None:
        return found if isinstance(found, Number) else None
    return expression(text)


def negative(value: Scalar) -> Scalar:
    if isinstance(value, Number):
        return Number(-value.value, value.digits)
    return Expression(rf"-\left({value.latex}\right)", value.symbols)


def scaled(value: Scalar, factor: Fraction) -> Scalar:
    if isinstance(value, Number):
        return Number(value.value * factor, value.digits)
    return scaled_expression(value, factor)


def scaled_expression(value: Expression, factor: Fraction) -> Expression:
    latex = rf"\frac{{{factor.numerator}}}{{{factor.denominator}}} \cdot \left({value.latex}\right)"
    return Expression(latex, value.symbols)


def as_expression(value: Scalar) -> Expression:
    if isinstance(value, Expression):
        return value
    top, bottom = value.value.numerator, value.value.denominator
    latex = rf"\frac{{{abs(top)}}}{{{bottom}}}" if bottom != 1 else str(abs(top))
    return Expression(f"-{latex}" if top < 0 else latex, frozenset())


def as_span(pair: Several) -> Span | None:
    """``(0, 1)`` and ``[0, 1]`` as intervals."""
    if pair.kind not in ("tuple", "bracket") or len(pair.items) != 2:
        return None
    low, high = pair.items
    if not isinstance(low, (Number, Expression)) or not isinstance(high, (Number, Expression)):
        return None
    return Span(low, high, pair.kind == "tuple", pair.kind == "tuple")


def expressions(form: object) -> Iterator[Expression]:
    """All that has to be computed in a form."""
    if isinstance(form, Expression):
        yield form
    elif isinstance(form, tuple):
        for item in form:
            yield from expressions(item)
    elif is_dataclass(form):
        for field in fields(form):
            yield from expressions(getattr(form, field.name))
