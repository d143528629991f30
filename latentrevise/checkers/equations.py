"""Equations in free text: found, read as exact fractions, and judged.

    "She buys 4 packs of 6, so 4 * 6 = 24 eggs. $1,200 / 4 = $300. <<3+4=7>> 20% of 50 is 10."

An equation is an expression with at least one operator, a sign of equality (``=``, or a word such as "is" or "equals"),
and a value. Units, currencies and up to six words behind a number belong to it. ``a + b = c + d = e``, as people
write running totals, is read as ``a + b = c`` and ``c + d = e`` where the literal reading is false.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

# A value written with decimals may be rounded; an integer may not, unless "≈" or "about" says so.
_WORD_OPERATORS = {"plus": "+", "minus": "-", "times": "*", "x": "*", "over": "/"}
_WORD_EQUALS = {"is", "equals", "makes", "gives", "are", "totals"}
_UNITS = 6  # words that may stand between a number and the operator behind it

_REWRITE: tuple[tuple[str, str], ...] = (
    (r"=\s*<<[^<>]*=([^<>=]*)>>\s*[\d.,]*\d", r"= \1 "),  # GSM8K's calculator marks stand between "=" and the result
    (r"<<([^<>]*)>>", r" \1 "),
    (r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))"),
    (r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}", r" \1 "),
    (r"\\times|\\cdot|×|·|∗|⋅", "*"),
    (r"\\div|÷", "/"),
    (r"\\approx|≈|=\s*(?:about|approximately|roughly)\b", "≈"),
    (r"−|–|—", "-"),
    (r"(?m)^\s*[-*]\s+(?=\S)", " "),  # marks of a list
    (r"(?<=[A-Za-z])/(?=[A-Za-z])", "_per_"),  # units such as days/week
    (r"(?<=\d)\s?/(?=[A-Za-z])", " per_"),
    (r"multiplied by", "times"),
    (r"divided by", "over"),
    (r"\\%|\bpercent\b", "%"),
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
class Equation:
    """``text`` as written; ok: it holds; operands: the values on its left; result: the value on its right;
    percent: it is written in per cent.

    start, end: characters of the text in which it was found, of the rewritten form.
    """

    text: str
    ok: bool
    operands: tuple[Fraction, ...]
    result: Fraction
    percent: bool
    start: int
    end: int


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
    numbers: tuple[Fraction, ...]
    operators: int
    decimals: int
    percent: bool
    start: int
    end: int


def plain(text: str) -> str:
    """The text with its signs of arithmetic in one form."""
    for pattern, replacement in _REWRITE:
        text = re.sub(pattern, replacement, text)
    return text


def number_texts(text: str) -> list[Fraction]:
    """Every number that a text writes in digits, in order."""
    return [Fraction(number) for number in re.findall(r"(?<![\w.])\d+(?:\.\d+)?", plain(text))]


def equations(text: str) -> list[Equation]:
    """Every equation of a text, in order."""
    text = plain(text)
    found: list[Equation] = []
    for clause in _clauses(list(_tokens(text))):
        found += _read(clause, text)
    return found


def _tokens(text: str) -> Iterator[_Token]:
    for match in _TOKEN.finditer(text):
        kind, word = str(match.lastgroup), match[0]
        if kind == "word" and word.lower() in _WORD_OPERATORS:
            kind, word = "operator", _WORD_OPERATORS[word.lower()]
        elif kind == "word" and word.lower() in _WORD_EQUALS:
            kind = "is"
        if kind != "currency":
            yield _Token(kind, word, *match.span())


def _clauses(tokens: Sequence[_Token]) -> Iterator[list[_Token]]:
    clause: list[_Token] = []
    for token in tokens:
        if token.kind == "end":
            yield clause
            clause = []
        else:
            clause.append(token)
    yield clause


def _read(clause: Sequence[_Token], text: str) -> list[Equation]:
    """The equations of one clause: each sign of equality with the expression before and the one behind it."""
    found: list[Equation] = []
    for at, token in enumerate(clause):
        if token.kind not in ("equals", "is"):
            continue
        left, right = _before(clause, at), _behind(clause, at)
        if left is None or right is None or not left.operators + right.operators:
            continue
        if token.kind == "is" and (not left.operators or right.operators):
            continue  # "there are 5 + 3 = 8 eggs", "what is 2 + 3": not a statement of this form
        unit = Fraction(1, 100 if right.percent else 1) / 10**right.decimals  # of its last digit
        rounded = right.decimals or token.text == "≈"
        ok = abs(left.value - right.value) <= (unit / 2 if rounded else 0)
        operands, result = left.numbers, right.value
        if right.operators and not left.operators:  # "12 = 3 * 4"
            operands, result = right.numbers, left.value
        elif right.operators and not ok:
            # A running total: what this side equals is the number that the next side begins with.
            result = right.numbers[0]
            ok = left.value == result
        found.append(
            Equation(text[left.start : right.end].strip(), ok, operands, result, right.percent, left.start, right.end)
        )
    return found


def _before(clause: Sequence[_Token], at: int) -> _Side | None:
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
        if token.kind in ("number", "open") or (token.kind == "operator" and token.text == "-"):
            side, used = _expression(clause[start:at])
            if side is not None and used == at - start:
                best = side
    return best


def _behind(clause: Sequence[_Token], at: int) -> _Side | None:
    side, _ = _expression(clause[at + 1 :])
    return side


def _expression(tokens: Sequence[_Token]) -> tuple[_Side | None, int]:
    """The expression that the tokens begin with, and how many of them it takes (units behind it included)."""
    parser = _Parser(tokens)
    try:
        value = parser.sum()
    except (_Unreadable, ZeroDivisionError):
        return None, 0
    decimals = len(parser.last.partition(".")[2]) if parser.operators == 0 else 0
    end = tokens[parser.seen - 1]
    percent = parser.operators == 0 and end.kind == "percent"
    side = _Side(value, tuple(parser.numbers), parser.operators, decimals, percent, tokens[0].start, end.end)
    return side, parser.at


class _Unreadable(Exception):
    pass


class _Parser:
    """Sums of products of signed numbers, powers and parentheses; words behind an operand are its unit."""

    def __init__(self, tokens: Sequence[_Token]) -> None:
        self.tokens, self.at, self.seen = tokens, 0, 0
        self.numbers: list[Fraction] = []
        self.operators, self.last = 0, ""

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
            elif token.kind == "open":  # "3(4)"
                self.operators += 1
                value *= self.factor()
            else:
                break
        return value

    def next_is_operand(self) -> bool:
        follows = self.tokens[self.at + 1] if self.at + 1 < len(self.tokens) else None
        return follows is not None and follows.kind in ("number", "open")

    def factor(self) -> Fraction:
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
            self.take()
            value, self.last = Fraction(token.text if token.text[0] != "." else "0" + token.text), token.text
            self.numbers.append(value)
        else:
            raise _Unreadable
        token = self.peek()
        if token is not None and token.kind == "percent":
            self.take()
            value /= 100
        token = self.peek()
        if token is not None and token.kind == "operator" and token.text == "^":
            self.take()
            self.operators += 1
            power = self.factor()
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
