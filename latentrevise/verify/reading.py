"""An answer is read as a whole, or not at all.

``read`` gives one of the forms, or None: the answer is then not understood, and only the same text equals it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fractions import Fraction
from functools import lru_cache
from typing import Literal as Kind

from latentrevise.verify import plainforms
from latentrevise.verify.forms import (
    Choice,
    Expression,
    Form,
    Matrix,
    Number,
    Quantity,
    Reader,
    Region,
    Relation,
    Several,
    negative,
    scalar,
    scaled,
)
from latentrevise.verify.grammar import expression
from latentrevise.verify.plainforms import NUMERAL, flat
from latentrevise.verify.regions import SYMBOL, common, membership, name_of, relation, rounded, spans_of
from latentrevise.verify.splitting import balanced, split
from latentrevise.verify.text import LONGEST, closing, normal
from latentrevise.verify.units import CURRENCIES, SCALES, Unit, read_unit

_DEEPEST = 6


@lru_cache(maxsize=1 << 14)
def read(text: str) -> Form | None:
    """The form of an answer; None where it is not understood."""
    if len(text) > LONGEST:
        return None
    if text.isascii() and text.isdigit():  # most answers of most sets
        return Number(Fraction(int(text)))
    try:
        return _read(normal(text), 0)
    except RecursionError:
        return None


def _read(text: str, depth: int) -> Form | None:
    text = text.strip()
    if not text or depth > _DEEPEST:
        return None

    def part(text: str) -> Form | None:
        return _read(text, depth + 1)

    whole = re.match(r"\\text\s*(?=\{)", text)
    if whole and closing(text, whole.end()) == len(text) - 1:
        inner = normal(text[whole.end() + 1 : -1])
        # One letter is a word here, not a variable; so is everything that is no other form.
        return _choice(inner, part) or part(inner)
    simple = plainforms.read_plain(text)
    if simple is not None:
        return simple
    for reader in _READERS:
        found = reader(text, part)
        if found is not None:
            return found
    return plainforms.words(text) or expression(text)


_OR, _AND = (
    r"(?:\\text\s*\{\s*(?:or)\s*\}|\bor\b|\\lor(?![A-Za-z]))",
    r"(?:\\text\s*\{\s*,?\s*(?:and)\s*\}|\band\b|\\land(?![A-Za-z])|&)",
)
_COMMA = r"(?:,(?!\d{3}(?!\d))|(?<!\d),|,(?=\s)|;)"


def _logic(text: str, read: Reader) -> Form | None:
    """Parts that ``or``, ``and``, commas or semicolons join: a list, or regions put together."""
    text = re.sub(r"\\text\s*\{([^{}]*\S)\s+(or|and)\s+(\S[^{}]*)\}", r"\\text{\1} \\text{\2} \\text{\3}", text)
    alternatives = [p for p in split(text, _OR) if p]
    joined = [p for p in split(text, rf"{_AND}|{_COMMA}") if p]
    parts = [q for p in alternatives for q in split(p, rf"{_AND}|{_COMMA}") if q]
    if len(parts) < 2 or len(parts) > 200:
        return None
    found = [read(part) for part in parts]
    if any(item is None for item in found):
        return None
    items = [item for item in found if item is not None]
    if any(isinstance(item, (Region, Relation)) for item in items):
        regions = [item for item in items if isinstance(item, Region) and item.variable is not None]
        if len(regions) < len(items) or len({r.variable for r in regions}) > 1:
            return None
        if len(joined) == 1:  # only "or"
            return Region(regions[0].variable, tuple(s for r in regions for s in r.spans))
        return common(regions) if len(alternatives) == 1 else None
    return _compound(items, text) or Several("list", _opened(items))


def _opened(items: Iterable[Form]) -> tuple[Form, ...]:
    """With the two values of ``\\pm 1`` in its place."""
    return tuple(
        x for item in items for x in (item.items if isinstance(item, Several) and item.kind == "list" else (item,))
    )


def _compound(items: list[Form], text: str) -> Quantity | None:
    """``3 dollars and 50 cents`` is one amount."""
    quantities = [q for q in items if isinstance(q, Quantity)]
    if len(quantities) < len(items) or len(items) > 3 or not re.search(_AND, text):
        return None
    return _together(quantities)


def _together(quantities: list[Quantity]) -> Quantity | None:
    first = quantities[0]
    factors = [q.unit.factor for q in quantities]
    if len({q.unit.powers for q in quantities}) > 1 or sorted(set(factors), reverse=True) != factors:
        return None
    total = Fraction(0)
    for q in quantities:
        if not isinstance(q.value, Number):
            return None
        total += q.value.value * q.unit.factor / first.unit.factor
    return Quantity(Number(total), first.unit, compound=True)


_LETTER = re.compile(r"\(\s*([A-J])\s*\)|([A-J])\s*[).:]?")
_LETTERED = re.compile(
    r"\\text\s*\{\s*\(([A-J])\)[.:]?\s*\}|\\text\s*\{\s*([A-J])[).:]\s*\}|\(([A-J])\)(?=\s*[\d\\])|([A-J])\)|([A-J])[.:](?=\s)"
)


def _choice(text: str, read: Reader) -> Form | None:
    alone = _LETTER.fullmatch(flat(text))
    if alone:
        return Choice(alone[1] or alone[2], None)
    found = _LETTERED.match(text)
    content = read(text[found.end() :]) if found else None
    if found is None or content is None:
        return None
    return Choice(next(group for group in found.groups() if group), content)


def _money(text: str, read: Reader) -> Form | None:
    found = re.match(r"(-?)\s*(?:US\s*)?(\\\$|[€£¥₹])\s*(?=[\d.\\])", text)
    if not found:
        return None
    value = read(text[found.end() :])
    if isinstance(value, Quantity) and value.unit == CURRENCIES[found[2]]:  # "$5 dollars"
        value = value.value
    if isinstance(value, Quantity) and not value.compound and all(p < 0 for _, p in value.unit.powers):  # "$5 per hour"
        own = CURRENCIES[found[2]]
        unit = Unit(own.factor * value.unit.factor, own.powers | value.unit.powers)
        return Quantity(value.value, unit)
    if not isinstance(value, (Number, Expression)):
        return None
    if found[1]:
        value = negative(value)
    return Quantity(value, CURRENCIES[found[2]])


def _matrix(text: str, read: Reader) -> Form | None:
    found = re.fullmatch(r"\\begin\{([pbB]?(?:small)?matrix)\}(.*)\\end\{\1\}", text)
    if not found or r"\begin" in found[2]:
        return None
    rows = [row for row in found[2].split(r"\newline") if row.strip()]
    read_rows = [tuple(read(cell) for cell in row.split("&")) for row in rows]
    if not rows or any(cell is None for row in read_rows for cell in row) or len({len(r) for r in read_rows}) > 1:
        return None
    return Matrix(tuple(tuple(c for c in row if c is not None) for row in read_rows))


_BRACKETS: tuple[tuple[str, str, Kind["set", "tuple", "bracket"]], ...] = (
    (r"\{", r"\}", "set"),
    ("{", "}", "set"),
    (r"\langle", r"\rangle", "tuple"),
    ("(", ")", "tuple"),
    ("[", "]", "bracket"),
)


def _bracketed(text: str, read: Reader) -> Form | None:
    for opening, end, kind in _BRACKETS:
        if not (text.startswith(opening) and text.endswith(end)) or len(text) <= len(opening + end):
            continue
        inner = text[len(opening) : -len(end)].strip()
        if not balanced(inner):
            return None
        if kind == "set":
            builder = re.fullmatch(rf"({SYMBOL})(?:\s*\\in\s*\\mathbb\{{R\}})?\s*(?:\||:)\s*(.*)", inner)
            if builder:
                found = read(builder[2])
                return found if isinstance(found, Region) and found.variable == name_of(builder[1]) else None
        parts = split(inner, r",|;")
        items = [read(part) for part in parts]
        if any(item is None for item in items) or len(items) > 200:
            return None
        if len(items) == 1 and kind != "set":
            return None  # (5) is an expression
        known = tuple(item for item in items if item is not None)
        return Several(kind, _opened(known) if kind == "set" else known)
    return None


def _plus_minus(text: str, read: Reader) -> Form | None:
    if text.count(r"\pm") != 1 or r"\mp" in text:
        return None
    both = [read(text.replace(r"\pm", sign)) for sign in ("+", "-")]
    if not all(isinstance(item, (Number, Expression, Quantity)) for item in both):
        return None
    return Several("list", tuple(item for item in both if item is not None))


def _quantity(text: str, read: Reader) -> Form | None:
    """A value with what it is of: a unit, a noun, percent, degrees, millions."""
    many = re.findall(rf"({NUMERAL})\s*([A-Za-z]+)\.?(?:,?\s*(?:and\s+)?)", bare := flat(text))
    if len(many) in (2, 3) and re.fullmatch(rf"(?:{NUMERAL}\s*[A-Za-z]+\.?(?:,?\s*(?:and\s+)?)?)+", bare):
        parts = [(plainforms.read_plain(n), read_unit(u)) for n, u in many]
        quantities = [Quantity(n, u) for n, u in parts if isinstance(n, Number) and u is not None]
        return _together(quantities) if len(quantities) == len(many) else None
    places = [m.start() for m in re.finditer(r"\\text\s*\{|\\degree(?![A-Za-z])|\\%|[€£¥₹]|\\\$|\\Omega\s*$", text)]
    places += [m.start(1) for m in re.finditer(r"[\d}!)]\s*((?<=\s)[A-Za-z]{2,}|(?<=\d)[A-Za-z]{2,})", text)]
    for place in sorted(places):
        value = scalar(text[:place].strip()) if text[:place].strip() else None
        if value is None or (text.startswith(r"\degree", place) and re.search("sin|cos|tan|cot|sec|csc", text[:place])):
            continue
        behind = flat(text[place:])
        word, _, others = behind.partition(" ")
        if word in SCALES:
            value = scaled(value, Fraction(SCALES[word]))
            if not others.strip():
                return value
            behind = others.strip()
        unit = read_unit(behind)
        if unit is not None:
            return Quantity(value, unit)
    return None


# In this order: what separates parts comes before what the parts are.
_READERS = (
    _choice, _money, _logic, _matrix, rounded, membership, relation, spans_of, _bracketed, _plus_minus, _quantity,
)  # fmt: skip
