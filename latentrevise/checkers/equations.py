"""Equations in free text: found, read as exact fractions, and judged.

    "She buys 4 packs of 6, so 4 * 6 = 24 eggs. $1,200 / 4 = $300. <<3+4=7>> 20% of 50 is 10."

An equation is an expression with at least one operator, a sign of equality (``=``, or a word such as "is" or "equals"),
and a value. Units, currencies and up to six words behind a number belong to it. ``a + b = c + d = e``, as people
write running totals, is read as ``a + b = c`` and ``c + d = e`` where the literal reading is false. A fraction without
spaces is one number behind a sign of division: ``14 / 1/2`` is 28.

A letter that a text introduces ("let x be", ``x =``, ``+ x``) is an unknown. An equation that is linear in one unknown
holds where it is an identity, where it is the first to say the unknown's value, or where it says the same as the first;
one with two unknowns, or not linear, is not read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise

# A value written with decimals may be rounded; an integer may not, unless "≈" or "about" says so.
_WORD_OPERATORS = {"plus": "+", "minus": "-", "times": "*", "x": "*", "over": "/"}
_WORD_EQUALS = {"is", "equals", "makes", "gives", "are", "totals"}
_UNITS = 6  # words that may stand between a number and the operator behind it
_FLOAT = 10  # decimals from which on a number is a computer's: its last digits are nobody's
SHARES = {"half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "eighth": 8, "tenth": 10}
_TIMES = {"twice": 2, "double": 2, "thrice": 3, "triple": 3}
_INTRODUCED = re.compile(r"\b[Ll]et ([B-Zb-z])\b|(?<![\w.])(?<!\d )([B-Zb-z])\s*=|[-+=(]\s*([B-Zb-z])\b")

_REWRITE: tuple[tuple[str, str], ...] = (
    (r"=\s*<<[^<>]*=([^<>=]*)>>\s*[\d.,]*\d", r"= \1 "),  # GSM8K's calculator marks stand between "=" and the result
    (r"<<([^<>]*)>>", r" \1 "),
    (r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))"),
    (r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}", r" \1 "),
    (r"\\times|\\cdot|×|·|∗|⋅", "*"),
    (r"\\div|÷", " / "),
    (r"\\approx|≈|=\s*(?:about|approximately|roughly)\b", "≈"),
    (r"−|–|—", "-"),
    (r"(?m)^\s*[-*]\s+(?=\S)", " "),  # marks of a list
    (r"(?<=[A-Za-z])/(?=[A-Za-z])", "_per_"),  # units such as days/week
    (r"(?<=\d)\s?/(?=[A-Za-z])", " per_"),
    (r"multiplied by", "times"),
    (r"divided by", "over"),
    (r"\\%|\bper ?cent\b", "%"),
    (r"\\[()\[\]]|\\\$|[$€£*]{2}|\\left|\\right|\\,|\\ ", " "),
    (r"(?<=\d),(?=\d{3}\b)", ""),
    (r"\{,\}", ""),
)
_TOKEN = re.compile(
    r"(?P<number>(?<![\w.])\d+(?:\.\d+)?|(?<![\w.])\.\d+)"
    r"|(?P<operator>[-+*/^])|(?P<equals>[=≈])|(?P<open>\()|(?P<close>\))|(?P<percent>%)|(?P<currency>[$€£])"
    r"|(?P<end>[.;:!?\n,])|(?P<word>[A-Za-z_][\w'-]*)|(?P<other>\S)"
)


@dataclass(frozen=True)
class Operand:
    """A value, and the numbers it is written by: ``20%`` is 1/5 by 20, ``3/4`` by 3 and 4."""

    value: Fraction
    parts: tuple[Fraction, ...]


@dataclass(frozen=True)
class Equation:
    """``text`` as written; ok: it holds; terms: the operands on its left; result: the value on its right; percent: it
    is written in per cent. Of an unknown ``result`` is the value, and ``terms`` are those of both sides where this
    equation is the first to say it, none where it follows from that one.

    start, end: characters of the text in which it was found, of the rewritten form. side: the tokens that its terms are
    the operands of; none of an equation with an unknown.
    """

    text: str
    ok: bool
    terms: tuple[Operand, ...]
    result: Fraction
    percent: bool
    start: int
    end: int
    side: tuple[_Token, ...] = field(default=(), repr=False, compare=False)

    @property
    def operands(self) -> tuple[Fraction, ...]:
        """The numbers that its operands are written by."""
        return tuple(part for term in self.terms for part in term.parts)

    def at(self, values: Sequence[Fraction]) -> Fraction | None:
        """What its operands' side comes to with these values in their places; None where it can't be computed, or of an
        equation with an unknown."""
        side, _ = _expression(self.side, Fraction(1), values) if self.side else (None, 0)
        return None if side is None else side.value

    def founded(self, known: Set[Fraction]) -> bool:
        """Whether each operand is known, or all numbers that it is written by are."""
        return all(term.value in known or set(term.parts) <= known for term in self.terms)


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    start: int
    end: int


@dataclass(frozen=True)
class _Side:
    """One side of an equation: its value, the numbers in it, how many operators, and the decimals it is given with."""

    value: Fraction
    terms: tuple[Operand, ...]
    unknowns: frozenset[str]
    operators: int
    decimals: int
    exact: bool
    percent: bool
    start: int
    end: int
    tokens: tuple[_Token, ...]


def plain(text: str) -> str:
    """The text with its signs of arithmetic in one form."""
    for pattern, replacement in _REWRITE:
        text = re.sub(pattern, replacement, text)
    return text


def number_texts(text: str) -> list[Fraction]:
    """Every number that a text writes in digits, in order."""
    return [Fraction(number) for number in re.findall(r"(?<![\w.])\d+(?:\.\d+)?", plain(text))]


def equations(text: str, before: str = "") -> list[Equation]:
    """Every equation of a text, in order. before: what was written earlier, where it may have said an unknown."""
    both = [plain(before), plain(text)]
    letters = {letter for part in both for found in _INTRODUCED.findall(part) for letter in found if letter}
    solved: dict[str, Fraction] = {}
    found: list[Equation] = []
    for part in both:
        found = [e for clause in _clauses(list(_tokens(part, letters))) for e in _read(clause, part, solved)]
    return found


def _tokens(text: str, letters: Set[str]) -> Iterator[_Token]:
    """The tokens of a text; letters: those that are unknowns."""
    found = [match for match in _TOKEN.finditer(text) if match.lastgroup != "currency"]
    kinds = [*(str(match.lastgroup) for match in found), "end", "end"]
    for i, match in enumerate(found):
        kind, word, span = kinds[i], match[0], match.span()
        name = word.lower() if kind == "word" else ""
        before_number = kinds[i + 1] in ("number", "open")
        if name in _WORD_OPERATORS and before_number:  # "3 times a year" is none
            kind, word = "operator", _WORD_OPERATORS[name]
        elif kind == "word" and word in letters:
            kind = "unknown"
        elif name in _WORD_EQUALS:
            kind = "is"
        elif name in _TIMES and before_number:
            yield _Token("number", str(_TIMES[name]), *span)
            kind, word = "operator", "*"
        elif name in SHARES and kinds[i + 2] in ("number", "open") and found[i + 1][0].lower() in ("of", "*", "x"):
            kind, word = "number", f"1/{SHARES[name]}"
        yield _Token(kind, word, *span)


def _clauses(tokens: Sequence[_Token]) -> Iterator[list[_Token]]:
    clause: list[_Token] = []
    for token in tokens:
        if token.kind == "end":
            yield clause
            clause = []
        else:
            clause.append(token)
    yield clause


def _read(clause: Sequence[_Token], text: str, solved: dict[str, Fraction]) -> list[Equation]:
    """The equations of one clause: each sign of equality with the expression before and the one behind it.

    solved: the values of unknowns, as far as they are said; those that are said here are added.
    """
    found: list[Equation] = []
    for at, token in enumerate(clause):
        if token.kind not in ("equals", "is"):
            continue
        left, right = _before(clause, at), _behind(clause, at)
        if left is None or right is None:
            continue
        if left.unknowns or right.unknowns:
            if (equation := _of_unknown(clause, at, text, solved)) is not None:
                found.append(equation)
            continue
        if not left.operators + right.operators:
            continue
        if token.kind == "is" and (not left.operators or right.operators):
            continue  # "there are 5 + 3 = 8 eggs", "what is 2 + 3": not a statement of this form
        ok = abs(left.value - right.value) <= _tolerance(left, right, token)
        side, result = left, right.value
        if right.operators and not left.operators:  # "12 = 3 * 4"
            side, result = right, left.value
        elif right.operators and not ok:
            # A running total: what this side equals is the number that the next side begins with.
            result = right.terms[0].parts[0]
            ok = left.value == result
        found.append(_equation(text, left, right, ok, side.terms, result, side.tokens))
    return found


def _equation(
    text: str,
    left: _Side,
    right: _Side,
    ok: bool,
    terms: tuple[Operand, ...],
    result: Fraction,
    side: tuple[_Token, ...] = (),
) -> Equation:
    written = text[left.start : right.end].strip()
    return Equation(written, ok, terms, result, right.percent, left.start, right.end, side)


def _tolerance(left: _Side, right: _Side, sign: _Token) -> Fraction:
    """By how much the sides may differ: half a unit of the last digit where the right one is rounded."""
    unit = Fraction(1, 100 if right.percent else 1) / 10**right.decimals
    rounded = unit / 2 if right.decimals or sign.text == "≈" else Fraction(0)
    return rounded if left.exact and right.exact else max(rounded, Fraction(1, 10 ** (_FLOAT - 1)))


def _of_unknown(clause: Sequence[_Token], at: int, text: str, solved: dict[str, Fraction]) -> Equation | None:
    """The equation at this sign, by its sides' difference where the unknown is 1, 2 and 3: what is linear is known by
    two values, and the third tells whether it is. None for what is not read."""
    lefts = [_before(clause, at, Fraction(t)) for t in (1, 2, 3)]
    rights = [_behind(clause, at, Fraction(t)) for t in (1, 2, 3)]
    sides = [side for side in (*lefts, *rights) if side is not None]
    letters = frozenset().union(*(side.unknowns for side in sides))
    if len(sides) < 6 or len(letters) > 1:
        return None
    (letter,) = letters
    left, right = sides[0], sides[3]
    first, second, third = (a.value - b.value for a, b in zip(sides[:3], sides[3:], strict=True))
    slope = second - first
    if third - second != slope:
        return None
    allowed = _tolerance(left, right, clause[at])
    if slope == 0:
        return _equation(text, left, right, abs(first) <= allowed, left.terms, 2 * right.value - sides[4].value)
    value = 1 - first / slope
    named = left.unknowns != right.unknowns and not (left if left.unknowns else right).operators
    if named and (letter not in solved or left.operators + right.operators):
        return None  # it gives a value a name; where that is computed ("x = 5 + 3 = 8"), the next sign reads it
    if letter in solved:
        ok = abs(value - solved[letter]) <= allowed / abs(slope)
        return _equation(text, left, right, ok, (), value)
    solved[letter] = value
    return _equation(text, left, right, True, (*left.terms, *right.terms), value)


def _before(clause: Sequence[_Token], at: int, unknown: Fraction = Fraction(1)) -> _Side | None:
    """The longest expression that ends at the sign of equality."""
    best = None
    words = 0
    for start in range(at - 1, -1, -1):
        token = clause[start]
        if token.kind in ("equals", "is", "other"):
            break
        words = words + 1 if token.kind == "word" else 0
        if words > _UNITS:
            break
        if token.kind in ("number", "open", "unknown") or (token.kind == "operator" and token.text == "-"):
            side, used = _expression(clause[start:at], unknown)
            if side is not None and used == at - start:
                best = side
    return best


def _behind(clause: Sequence[_Token], at: int, unknown: Fraction = Fraction(1)) -> _Side | None:
    side, _ = _expression(clause[at + 1 :], unknown)
    return side


def _expression(
    tokens: Sequence[_Token], unknown: Fraction, values: Sequence[Fraction] | None = None
) -> tuple[_Side | None, int]:
    """The expression that the tokens begin with, and how many of them it takes (units behind it included). unknown: the
    value of every unknown. values: in place of the operands' own."""
    parser = _Parser(tokens, unknown, values)
    try:
        value = parser.sum()
    except (_Unreadable, ZeroDivisionError):
        return None, 0
    decimals = len(parser.last.partition(".")[2]) if parser.operators == 0 else 0
    end = tokens[parser.seen - 1]
    percent = parser.operators == 0 and end.kind == "percent"
    side = _Side(
        value,
        tuple(parser.terms),
        frozenset(parser.unknowns),
        parser.operators,
        decimals,
        parser.exact,
        percent,
        tokens[0].start,
        end.end,
        tuple(tokens[: parser.at]),
    )
    return side, parser.at


class _Unreadable(Exception):
    pass


class _Parser:
    """Sums of products of signed numbers, powers and parentheses; words behind an operand are its unit."""

    def __init__(self, tokens: Sequence[_Token], unknown: Fraction, values: Sequence[Fraction] | None) -> None:
        self.tokens, self.at, self.seen = tokens, 0, 0
        self.values = values
        self.terms: list[Operand] = []
        self.unknown, self.unknowns = unknown, set[str]()
        self.operators, self.last, self.exact = 0, "", True

    def peek(self) -> _Token | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def take(self) -> _Token:
        token = self.tokens[self.at]
        self.at += 1
        self.seen = self.at
        return token

    def sum(self) -> Fraction:
        value = self.product()
        while (token := self.peek()) is not None and token.kind == "operator" and token.text in "+-":
            self.take()
            self.operators += 1
            other = self.product()
            value = value + other if token.text == "+" else value - other
        return value

    def product(self) -> Fraction:
        value = self.factor()
        while (token := self.peek()) is not None:
            if token.kind == "operator" and token.text in "*/":
                self.take()
                self.operators += 1
                other = self.factor()
                value = value * other if token.text == "*" else value / other
            elif token.kind == "word" and token.text.lower() == "of" and self.next_is_operand():
                self.take()  # "20% of 50", "1/2 of 8"
                self.operators += 1
                value *= self.factor()
            elif token.kind in ("open", "unknown"):  # "3(4)", "2x"
                self.operators += 1
                value *= self.factor()
            else:
                break
        return value

    def next_is_operand(self) -> bool:
        follows = self.tokens[self.at + 1] if self.at + 1 < len(self.tokens) else None
        return follows is not None and follows.kind in ("number", "open")

    def tight(self, *kinds: str) -> bool:
        """Whether tokens of these kinds follow the last one and each other without a space."""
        near = self.tokens[self.at - 1 : self.at + len(kinds)]
        touching = all(a.end == b.start for a, b in pairwise(near))
        return touching and [token.kind for token in near[1:]] == list(kinds)

    def number(self, fraction: bool) -> Fraction:
        """A number, a fraction without spaces (where one may stand), or so many per cent."""
        token = self.take()
        value, self.last = Fraction(token.text if token.text[0] != "." else "0" + token.text), token.text
        self.exact &= len(token.text.partition(".")[2]) < _FLOAT
        parts: tuple[Fraction, ...] = (Fraction(value.denominator) if "/" in token.text else value,)
        if fraction and self.tight("operator", "number") and self.tokens[self.at].text == "/":
            self.take()
            self.operators += 1
            below = Fraction(self.take().text)
            value, parts = value / below, (*parts, below)
        following = self.peek()
        if following is not None and following.kind == "percent":
            self.take()
            value /= 100
        if self.values is not None:
            value = self.values[len(self.terms)]
        self.terms.append(Operand(value, parts))
        return value

    def factor(self, fraction: bool = True) -> Fraction:
        token = self.peek()
        if token is None:
            raise _Unreadable
        if token.kind == "operator" and token.text == "-":
            self.take()
            return -self.factor()
        if token.kind == "open":
            self.take()
            value = self.sum()
            closing = self.peek()
            if closing is None or closing.kind != "close":
                raise _Unreadable
            self.take()
        elif token.kind == "number":
            value = self.number(fraction)
        elif token.kind == "unknown":
            self.unknowns.add(self.take().text)
            value = self.unknown
        else:
            raise _Unreadable
        token = self.peek()
        if token is not None and token.kind == "operator" and token.text == "^":
            self.take()
            self.operators += 1
            power = self.factor(fraction=False)
            if power.denominator != 1 or not 0 <= power <= 64 or abs(value) > 10**6:
                raise _Unreadable
            value **= int(power)
        self.skip_unit()
        return value

    def skip_unit(self) -> None:
        """Words behind an operand, where an operator, a sign of equality or the end follows them."""
        ahead = self.at
        while ahead < len(self.tokens) and self.tokens[ahead].kind == "word" and ahead - self.at < _UNITS:
            if self.tokens[ahead].text.lower() == "of" and ahead == self.at and self.next_is_operand():
                return
            ahead += 1
        if ahead > self.at and (
            ahead == len(self.tokens) or self.tokens[ahead].kind in ("operator", "equals", "is", "close")
        ):
            self.at = ahead
