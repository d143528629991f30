"""Which LaTeX is an expression, and how it is meant: written again with every product and argument explicit.

A parser that guesses finds a number in anything. Here a text is an expression as a whole or not at all: what is
ambiguous (``x2``, ``1/2x``, ``2(3)``, ``f(x)``, ``\\sin(x)^2``) is none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_TOKEN = re.compile(r"\\[A-Za-z]+|\d+(?:\.\d*)?|\.\d+|[A-Za-z]+|[-+*/^_!()\[\]{}|]|\s+|.", re.DOTALL)
_FUNCTIONS = frozenset(
    re.findall(
        r"\S+",
        "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp lg",
    )
)
_GREEK = frozenset(
    re.findall(
        r"\S+",
        "pi alpha beta gamma delta epsilon varepsilon theta lambda mu nu rho sigma tau phi varphi omega psi chi xi eta"
        " zeta kappa hbar ell vartheta varrho iota Xi Pi Delta Gamma Omega Theta Phi Psi Sigma Lambda",
    )
)
_DEEPEST = 40


@dataclass(frozen=True)
class Expression:
    """latex: with explicit products and coded names. symbols: the codes of its variables (e, i and pi are none)."""

    latex: str
    symbols: frozenset[str]


def _coded(symbol: str) -> str:
    """A name that the parser cannot take for anything else: to it E is e, I is i, and d, O, N and T are operators."""
    return f"x_{{{''.join(f'{ord(c):04d}' for c in symbol)}}}"


CONSTANTS = {_coded("e"): "e", _coded("i"): "i"}


class _NoExpression(Exception):
    pass


def expression(text: str) -> Expression | None:
    """The normal text read as one expression; None where it is none."""
    if re.search(r"\\frac\{\s*d[^{}]*\}\{\s*d\s*[A-Za-z]", text):  # no quotient
        return None
    try:
        parser = _Parser(_tokens(text))
        latex = parser.sum(0)
        if parser.at < len(parser.tokens):
            return None
    except _NoExpression:
        return None
    return Expression(latex, frozenset(parser.symbols))


def _tokens(text: str) -> list[str]:
    text = re.sub(r"\\text\s*\{\s*([A-Za-z])\s*\}", r" \1 ", text)
    text = re.sub(r"\\text\s*\{\s*(" + "|".join(_FUNCTIONS) + r")\s*\}", r"\\\1 ", text)
    out = []
    for token in _TOKEN.findall(text):
        if token.isspace():
            continue
        if re.fullmatch(r"[A-Za-z]{2,}", token):
            if token in _FUNCTIONS or token in _GREEK:
                out.append("\\" + token)
            elif len(token) <= 3:
                out += token
            else:
                raise _NoExpression
        else:
            out.append({"*": r"\cdot"}.get(token, token))
    # Digits with hyphens are scores, numbers of telephones, years: nobody knows.
    if not out or re.fullmatch(r"\(?\d+(?:-\d+)+\)?", "".join(out)):
        raise _NoExpression
    return out


@dataclass
class _Parser:
    tokens: list[str]
    at: int = 0
    symbols: set[str] = field(default_factory=set)
    bars: int = 0

    def peek(self, ahead: int = 0) -> str:
        return self.tokens[self.at + ahead] if self.at + ahead < len(self.tokens) else ""

    def take(self, *wanted: str) -> str:
        token = self.peek()
        if not token or (wanted and token not in wanted):
            raise _NoExpression
        self.at += 1
        return token

    def sum(self, depth: int) -> str:
        if depth > _DEEPEST:
            raise _NoExpression
        out = self.signed(depth)
        while self.peek() in ("+", "-"):
            out += self.take() + self.term(depth)
        return out

    def signed(self, depth: int) -> str:
        sign = self.take() if self.peek() in ("+", "-") else ""
        return ("-" if sign == "-" else "") + self.term(depth)

    def term(self, depth: int) -> str:
        out = self.power(depth)
        divided = False
        while True:
            if self.peek() in (r"\cdot", "/"):
                operator = self.take()
                sign = "-" if self.peek() == "-" and self.take() else ""
                factor = f"\\left({sign}{self.power(depth)}\\right)"
                divided = operator == "/"
                out = rf"\frac{{{out}}}{{{factor}}}" if divided else rf"{out} \cdot {factor}"
            elif self.starts():
                # 1/2x: half of x, or one over 2x? And 2(3), x2, 1 000, 2\frac{1}{2} have readings of their own.
                if divided or self.peek()[0].isdigit() or self.mixed():
                    raise _NoExpression
                out = rf"{out} \cdot {self.power(depth)}"
            else:
                return out

    def starts(self) -> bool:
        token = self.peek()
        if token == "|":
            return not self.bars
        return bool(token) and (token[0].isalnum() or token in ("(", "[", "{") or token in _OPENERS)

    def mixed(self) -> bool:
        """Whether what comes may be the fraction of a mixed number, a repeating decimal, or another cycle."""
        rest = "".join(self.tokens[self.at : self.at + 7])
        if self.tokens[self.at - 1] == ")":
            return bool(re.match(r"\(\d+\)", rest))
        if not re.fullmatch(r"[\d.]+", self.tokens[self.at - 1]) or (self.at > 1 and self.peek(-2) in ("^", "_")):
            return False
        return bool(re.match(r"\\frac\{\d+\}\{\d+\}|\(\d+\)", rest))

    def power(self, depth: int) -> str:
        function = self.peek() in _COMMANDS
        simple = self.peek()[:1].isdigit() or self.peek().isalpha()
        out = self.atom(depth)
        if function and self.peek() == "^":  # \sin(x)^2
            raise _NoExpression
        while self.peek() in ("!", "^", r"\degree"):
            token = self.take()
            if token == "!":
                if self.peek() == "!":
                    raise _NoExpression  # every second factor, or a factorial's factorial
                out = rf"{out}!" if simple else rf"\left({out}\right)!"
            elif token == "^":
                out = (
                    rf"{{{out}}}^{{{self.argument(depth)}}}"
                    if simple
                    else rf"\left({out}\right)^{{{self.argument(depth)}}}"
                )
            else:
                out = rf"\left({out} \cdot \frac{{\pi}}{{180}}\right)"
            simple = False
        return out

    def argument(self, depth: int) -> str:
        """Of ``^``: one token or a group."""
        if self.peek() == "{":
            return self.group("{", "}", depth)
        sign = self.take() if self.peek() == "-" else ""
        if re.fullmatch(r"[\d.]+|[A-Za-z]", self.peek()) or self.peek()[1:] in _GREEK:
            return sign + self.atom(depth)
        raise _NoExpression

    def group(self, opening: str, end: str, depth: int) -> str:
        self.take(opening)
        bars, self.bars = self.bars, 0
        out = self.sum(depth + 1)
        self.bars = bars
        self.take(end)
        return out

    def atom(self, depth: int) -> str:
        token = self.peek()
        if token in ("(", "[", "{"):
            return rf"\left({self.group(token, {'(': ')', '[': ']', '{': '}'}[token], depth)}\right)"
        self.take()
        if token[0].isdigit() or token[0] == ".":
            # A decimal is exact here; the parser would make a float of it.
            whole, _, places = token.partition(".")
            return rf"\frac{{{int(whole + places)}}}{{{10 ** len(places)}}}" if places else whole
        if token == "|":
            self.bars += 1
            out = self.sum(depth + 1)
            self.take("|")
            self.bars -= 1
            return rf"\left|{out}\right|"
        if token.isalpha():
            # A value of a function, where it may be one: f(x+1), P(3), I(0).
            if self.peek() == "(" and (token in "fgh" or self.peek(2) == ")"):
                raise _NoExpression
            return self.symbol(token)
        name = token[1:]
        if name in _GREEK:
            return self.symbol(token)
        if name in _FUNCTIONS:
            return self.function(name, depth)
        if name == "infty":
            return token
        if name in ("frac", "binom"):
            return rf"\{name}{{{self.group('{', '}', depth)}}}{{{self.group('{', '}', depth)}}}"
        if name == "sqrt":
            root = f"[{self.group('[', ']', depth)}]" if self.peek() == "[" else ""
            return rf"\sqrt{root}{{{self.group('{', '}', depth)}}}"
        if name in ("lfloor", "lceil"):
            out = self.sum(depth + 1)
            self.take(rf"\r{name[1:]}")
            return rf"\{name} {out} \r{name[1:]}"
        raise _NoExpression

    def symbol(self, name: str) -> str:
        index = self.subscript() if self.peek() == "_" else ""
        if name == r"\pi" and not index:
            return r"\pi "
        code = _coded(name + index)
        if code not in CONSTANTS:
            self.symbols.add(code)
        return code

    def subscript(self) -> str:
        self.take("_")
        if self.peek() != "{":
            found = self.take()
        else:
            self.take("{")
            found = self.take()
            while self.peek() not in ("}", ""):
                found += self.take()
            self.take("}")
        if not re.fullmatch(r"\w+", found):
            raise _NoExpression
        return found

    def function(self, name: str, depth: int) -> str:
        base = power = ""
        if self.peek() == "_":
            if name != "log":
                raise _NoExpression
            self.take()
            base = self.group("{", "}", depth) if self.peek() == "{" else self.atom(depth)
        if self.peek() == "^":
            self.take()
            power = self.argument(depth)
        inner = self.atom(depth) if self.peek() in ("(", "{", "[") else self.signed_product(depth)
        inverse = {"sin": "arcsin", "cos": "arccos", "tan": "arctan"}
        if power == "-1":
            if name not in inverse:
                raise _NoExpression
            name, power = inverse[name], ""
        name = "ln" if name == "log" and not base else name  # as in the competitions' answers, and math-verify
        if name == "lg":
            name, base = "log", "10"
        out = (
            rf"{{{_coded('e')}}}^{{{inner}}}"
            if name == "exp"
            else rf"\{name}{f'_{{{base}}}' if base else ''}\left({inner}\right)"
        )
        return rf"\left({out}\right)^{{{power}}}" if power else out

    def signed_product(self, depth: int) -> str:
        """The argument of a function without brackets: factors side by side, up to the next function."""
        sign = self.take() if self.peek() == "-" else ""
        if not self.starts() or self.peek() in _COMMANDS:
            raise _NoExpression
        out = self.power(depth + 1)
        while self.starts() and self.peek() not in _COMMANDS and self.peek() not in ("(", "[", "{"):
            if self.peek()[0].isdigit() or self.mixed():
                raise _NoExpression
            out = rf"{out} \cdot {self.power(depth + 1)}"
        return sign + out


_COMMANDS = frozenset("\\" + name for name in _FUNCTIONS)
_OPENERS = (
    _COMMANDS | {"\\" + name for name in _GREEK} | {r"\frac", r"\binom", r"\sqrt", r"\lfloor", r"\lceil", r"\infty"}
)
