"""Equations, inequalities, intervals: what is said of a variable, and of a piece of the line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from latentrevise.verify.forms import (
    REALS,
    Form,
    Labelled,
    Reader,
    Region,
    Relation,
    Scalar,
    Several,
    Span,
    as_expression,
    as_span,
    scalar,
)
from latentrevise.verify.grammar import Expression, expression
from latentrevise.verify.plainforms import Number, flat
from latentrevise.verify.splitting import split

SYMBOL = (
    r"(?:[A-Za-z]|\\(?:alpha|beta|gamma|delta|theta|lambda|mu|phi|omega|sigma|rho|tau|epsilon|Delta))"
    r"(?:_(?:\w|\{\w+\}))?'*"
)
_LABEL = re.compile(
    rf"{SYMBOL}|{SYMBOL}\s*\(\s*(?:{SYMBOL}|\d+)(?:\s*,\s*{SYMBOL})*\s*\)|(?:m\s*)?\\angle\s*[A-Z]{{1,3}}|"
    rf"\(\s*{SYMBOL}(?:\s*,\s*{SYMBOL})+\s*\)|\\overline\s*\{{[A-Z]{{2}}\}}|[A-Z]{{2}}|"
    rf"\\text\s*\{{[^{{}}\d]*\}}(?:\s*\(\w+\))?|"
    rf"\[[A-Z]{{3,6}}\]|[A-Za-z]{{3,}}(?: [A-Za-z]{{2,}}){{0,3}}|\\frac\s*\{{d{SYMBOL}\}}\{{d{SYMBOL}\}}|S_\{{?\w+\}}?"
)


def _label(text: str) -> bool:
    return bool(_LABEL.fullmatch(text)) and text not in ("e", "i")


def _worded(label: str) -> bool:
    return not re.fullmatch(rf"{SYMBOL}(?:\s*\(.*\))?", label)


def name_of(label: str) -> str:
    return re.sub(r"\s|[{}]", "", flat(label).lower() if _worded(label) else label)


def membership(text: str, read: Reader) -> Form | None:
    parts = split(text, r"\\in(?![A-Za-z])")
    if len(parts) != 2 or not _label(parts[0]):
        return None
    value = read(parts[1])
    if isinstance(value, Several) and value.kind in ("tuple", "bracket") and (span := as_span(value)):
        value = Region(None, (span,))
    if isinstance(value, Region) and value.variable is None:
        return Region(name_of(parts[0]), value.spans)
    return Labelled(name_of(parts[0]), value, False) if isinstance(value, Several) and value.kind == "set" else None


def rounded(text: str, read: Reader) -> Form | None:
    """``2/3 \\approx 0.667`` is 2/3; of ``x \\approx 3.14`` there is no more than 3.14."""
    parts = split(text, r"\\(?:approx|simeq)(?![A-Za-z])")
    if len(parts) != 2 or not all(parts):
        return None
    left, right = read(parts[0]), read(parts[1])
    if left is None or right is None:
        return None
    if _label(parts[0]):
        return Labelled(name_of(parts[0]), right, _worded(parts[0]))
    return left


_OPERATORS = {"=": "=", "<": "<", ">": ">", r"\leq": "<=", r"\geq": ">=", r"\neq": "!="}


def relation(text: str, read: Reader) -> Form | None:
    pattern = r"\\leq(?![A-Za-z])|\\geq(?![A-Za-z])|\\neq(?![A-Za-z])|[=<>]"
    parts = split(text, pattern)
    if len(parts) < 2 or len(parts) > 8 or not all(parts):
        return None
    signs, rest = [], text
    for part in parts[:-1]:
        rest = rest[rest.index(part) + len(part) :].lstrip()
        found = re.match(pattern, rest)
        if found is None:
            return None
        signs.append(_OPERATORS[found[0]])
        rest = rest[found.end() :]
    if set(signs) == {"="}:
        return _equation(parts, read)
    return _inequality(parts, signs)


def _equation(parts: list[str], read: Reader) -> Form | None:
    if len(parts) == 2 and _label(parts[1]) and not _label(parts[0]):
        parts = parts[::-1]
    if _label(parts[0]):
        if len(parts) == 2 and _label(parts[1]) and not expression(parts[1]):
            return None
        value = read(parts[-1])
        if value is None or isinstance(value, (Labelled, Relation)):
            return None
        return Labelled(name_of(parts[0]), value, _worded(parts[0]))
    sides = [expression(part) for part in parts]
    if any(side is None for side in sides):
        return None
    known = [side for side in sides if side is not None]
    if not any(side.symbols for side in known):
        values = tuple(value for part in parts if (value := scalar(part)) is not None)
        return Several("list", values) if len(values) == len(parts) else None  # 2 + 3 = 5: all of them
    return Relation("=", known[0], known[1]) if len(known) == 2 else None


def _inequality(parts: list[str], signs: list[str]) -> Form | None:
    if signs == ["!="]:
        sides = parts if _label(parts[0]) else parts[::-1]
        value = scalar(sides[1])
        if value is None:
            return None
        if not _label(sides[0]) or _worded(sides[0]):
            left = expression(sides[0])
            return Relation("!=", left, as_expression(value)) if left else None
        return Region(name_of(sides[0]), (Span(None, value, True, True), Span(value, None, True, True)))
    if {">", ">="} & set(signs):
        if {"<", "<=", "=", "!="} & set(signs):
            return None
        parts, signs = parts[::-1], [{">": "<", ">=": "<="}[sign] for sign in signs[::-1]]
    if "=" in signs or "!=" in signs:
        return None
    names = [i for i, part in enumerate(parts) if _label(part)]
    if len(parts) <= 3 and len(names) == 1 and not _worded(parts[names[0]]):
        i = names[0]
        low, high = (parts[:i], parts[i + 1 :]) if len(parts) < 3 or i == 1 else ([], [])
        bounds = [None if not side else bound(side[0]) for side in (low, high)]
        if (low or high) and all(b is not None for b, side in zip(bounds, (low, high), strict=True) if side):
            ends = [b[0] if b else None for b in bounds]
            return Region(
                name_of(parts[i]), (Span(ends[0], ends[1], not low or signs[0] == "<", not high or signs[-1] == "<"),)
            )
    if len(parts) == 2:
        left, right = expression(parts[0]), expression(parts[1])
        if left and right and (left.symbols | right.symbols):
            return Relation("<" if signs[0] == "<" else "<=", left, right)
    return None


def bound(text: str) -> tuple[Scalar | None] | None:
    """An end of an interval in a tuple, (None,) for an infinite one; None where it is no end."""
    if re.fullmatch(r"[+-]?\s*\\infty|[+-]?(?:inf|infinity|oo)", text.strip()):
        return (None,)
    value = scalar(text.strip())
    return None if value is None else (value,)


_PARTS = r"\\cup(?![A-Za-z])|\bU\b"


def spans_of(text: str, read: Reader) -> Form | None:
    """Intervals that are no pairs, their unions, the reals, and these without points."""
    if text == r"\mathbb{R}" or re.fullmatch(r"(?:all )?real(?: number)?s", flat(text)):
        return REALS
    holes = split(text, r"\\setminus(?![A-Za-z])|(?<=\{R\})\s*-")
    if len(holes) == 2:
        whole, points = read(holes[0]), read(holes[1])
        if isinstance(whole, Several) and (span := as_span(whole)):
            whole = Region(None, (span,))
        if (
            not isinstance(whole, Region)
            or len(whole.spans) != 1
            or not isinstance(points, Several)
            or points.kind != "set"
        ):
            return None
        return _without(whole.spans[0], points.items)
    parts = split(text, _PARTS)
    if len(parts) > 1:
        found = [read(part) for part in parts]
        if all(isinstance(item, Several) and item.kind == "set" for item in found):
            return Several("set", tuple(x for item in found if isinstance(item, Several) for x in item.items))
        spans: list[Span] = []
        for item in found:
            if isinstance(item, Several) and (span := as_span(item)):
                spans.append(span)
            elif isinstance(item, Several) and item.kind == "set":
                spans += [Span(x, x, False, False) for x in item.items if isinstance(x, (Number, Expression))]
                if not all(isinstance(x, (Number, Expression)) for x in item.items):
                    return None
            elif isinstance(item, Region) and item.variable is None:
                spans += item.spans
            else:
                return None
        return Region(None, tuple(spans))
    foreign = re.fullmatch(r"\](.*)\[|\](.*)\]|\[(.*)\[", text)
    if foreign:
        inner = next(group for group in foreign.groups() if group is not None)
        opened, closed = text[0] == "]", text[-1] == "["
    elif (text[:1], text[-1:]) in (("(", "]"), ("[", ")"), ("(", ")"), ("[", "]")) and len(text) > 2:
        inner, opened, closed = text[1:-1], text[0] == "(", text[-1] == ")"
    else:
        return None
    sides = split(inner, r",|;")
    ends = [bound(side) for side in sides]
    if len(ends) != 2 or ends[0] is None or ends[1] is None:
        return None
    infinite = ends[0][0] is None or ends[1][0] is None
    if (text[0], text[-1]) in (("(", ")"), ("[", "]")) and not infinite:
        return None  # a pair as well: see _bracketed
    return Region(None, (Span(ends[0][0], ends[1][0], opened or ends[0][0] is None, closed or ends[1][0] is None),))


def _without(whole: Span, items: Sequence[Form]) -> Region | None:
    """A span without points in its inside."""
    points: list[Scalar] = [p for p in items if isinstance(p, (Number, Expression))]
    if len(points) == len(items) == 1 and whole.low is None and whole.high is None:
        return Region(None, (Span(None, points[0], True, True), Span(points[0], None, True, True)))
    numbers = sorted({p.value for p in points if isinstance(p, Number)})
    low, high = whole.low, whole.high
    if not numbers or len(points) < len(items) or not all(isinstance(p, Number) for p in points):
        return None
    inside = (low is None or (isinstance(low, Number) and low.value < numbers[0])) and (
        high is None or (isinstance(high, Number) and numbers[-1] < high.value)
    )
    if not inside:
        return None
    ends: list[Scalar | None] = [low, *map(Number, numbers), high]
    last = len(ends) - 2
    return Region(
        None,
        tuple(
            Span(a, b, whole.low_open if not i else True, whole.high_open if i == last else True)
            for i, (a, b) in enumerate(pairwise(ends))
        ),
    )


def common(regions: list[Region]) -> Region | None:
    """What two bounds on one variable have in common: ``x > 1 and x < 3``."""
    spans = [r.spans[0] for r in regions if len(r.spans) == 1]
    if len(spans) != 2 or len(regions) != 2:
        return None
    for a, b in (spans, spans[::-1]):
        if a.high is None and b.low is None and a.low is not None and b.high is not None:
            if not isinstance(a.low, Number) or not isinstance(b.high, Number) or a.low.value >= b.high.value:
                return None
            return Region(regions[0].variable, (Span(a.low, b.high, a.low_open, b.high_open),))
    return None
