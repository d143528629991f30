"""The verifier's worker process: it computes with expressions, by math-verify's parser and sympy.

One JSON object a line comes on stdin, one goes out on a pipe of its own, whose descriptor ``CHANNEL`` names: what a
library prints is in nobody's way. The process is a plain child, so that it can be killed at any moment without harm,
never imports the caller's ``__main__``, and never forks a process that has threads. math-verify's own timeouts need
signals of the main thread and cannot stop every expression, so they are off: the parent kills instead.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any

from latentrevise.verify.compare import ENOUGH, equal, same_numbers
from latentrevise.verify.forms import Relation, Scalar, expressions
from latentrevise.verify.grammar import CONSTANTS
from latentrevise.verify.plainforms import Number
from latentrevise.verify.reading import read

CHANNEL = "LATENTREVISE_JUDGE_CHANNEL"
MEMORY = 4 << 30  # bytes of address space

DIGITS = 60  # that expressions are computed with
MANY = 300  # where they agreed so far
AGREE = 45  # of them, that equal numbers share

# Where expressions with variables are compared: equal functions agree at all of them. At the first no root or
# logarithm of a plain variable turns complex; at the last, what is complex on both sides has no say.
_POSITIVE = (
    ("0.7390851332", "1.3063778838", "0.5671432904", "2.6854520010", "0.9159655941", "1.6180339887"),
    ("2.2195321688", "0.3275822918", "1.7052111401", "0.8346268416", "3.2758229187", "0.6434105462"),
    ("5", "3", "7", "4", "6", "2"),
)
_NEGATIVE = (
    ("-1.2824271291", "-0.7642236535", "-2.5029078750", "-0.2614972128", "-1.9021605831", "-0.5432589653"),
    ("-0.6601618158", "1.4513692348", "-1.1865691104", "2.2394331040", "-0.3532363718", "1.2020569031"),
)


class NotUnderstood(Exception):
    """The parser cannot read an expression, or reads something else in it."""


class Sympy:
    """Computes; see ``compare.Mathematics``."""

    def same(self, gold: Scalar, answer: Scalar) -> bool:
        from sympy import Expr

        a, b = _parsed(gold), _parsed(answer)
        if a == b:
            return True
        if isinstance(a, Expr) and isinstance(b, Expr) and (apart := a - b).is_Rational:
            return bool(apart == 0)  # next to what is large, no number of digits would show it
        if not a.free_symbols and not b.free_symbols:
            if a.is_Rational and b.is_Rational:
                return False
            return self._constants(a, b) or self._rounded(gold, answer, a, b)
        return self._everywhere(a, b)

    def equivalent(self, gold: Relation, answer: Relation) -> bool:
        """Whether the two differences are proportional; of inequalities by a positive factor."""
        from sympy import Abs

        if gold.operator != answer.operator:
            return False
        a, b = (_parsed(r.left) - _parsed(r.right) for r in (gold, answer))
        if a.free_symbols != b.free_symbols:
            return False
        ratios = []
        for point in _points(a.free_symbols, (*_POSITIVE, *_NEGATIVE)):
            x, y = _value(a, point), _value(b, point)
            if not (_finite(x) and _finite(y)) or Abs(x) < 1e-20 or Abs(y) < 1e-20:
                if x != y:
                    return False
                continue
            ratios.append((y / x).evalf(DIGITS))
        if len(ratios) < 2 or not all(_close(ratio, ratios[0]) for ratio in ratios):
            return False
        return gold.operator in ("=", "!=") or bool(ratios[0].is_real and ratios[0] > 0)

    @staticmethod
    def _constants(a: Any, b: Any) -> bool:
        # 10^50 and 10^50 + 1 share many digits.
        return _close(_value(a), _value(b)) and _close(
            _value(a, digits=MANY), _value(b, digits=MANY), MANY - DIGITS + AGREE
        )

    def _everywhere(self, a: Any, b: Any) -> bool:
        symbols = a.free_symbols | b.free_symbols
        decided = 0
        for points, positive in ((_POSITIVE, True), (_NEGATIVE, False)):
            for point in _points(symbols, points):
                x, y = _value(a, point), _value(b, point)
                if not _finite(x) or not _finite(y):
                    if _finite(x) != _finite(y) and positive:
                        return False
                    continue
                if not positive and ((not x.is_real and not y.is_real) or _outside(a, point) or _outside(b, point)):
                    continue
                x, y = _value(a, point, MANY), _value(b, point, MANY)
                if not _close(x, y, MANY - DIGITS + AGREE):
                    return False
                decided += positive
        if decided:
            return True
        from math_verify import verify

        return bool(verify([a], [b], numeric_precision=DIGITS, strict=True, timeout_seconds=None))

    @staticmethod
    def _rounded(gold: Scalar, answer: Scalar, a: Any, b: Any) -> bool:
        """A decimal of enough digits for a number without end, as in ``compare.same_numbers``."""
        for decimal, other in ((gold, b), (answer, a)):
            if isinstance(decimal, Number) and decimal.digits >= ENOUGH:
                value = _value(other)
                if value.is_real and value.is_finite and not other.is_rational:
                    # Within the digits computed it is as good as the number, and its denominator is no power of ten.
                    near = Fraction(int((value * 3 * 10**DIGITS).round()), 3 * 10**DIGITS)
                    return same_numbers(decimal, Number(near + Fraction(1, 7 * 10 ** (2 * DIGITS))))
        return False


@lru_cache(maxsize=4096)
def _parsed(scalar: Scalar) -> Any:
    """A sympy expression, evaluated."""
    from math_verify import LatexExtractionConfig, parse
    from sympy import Basic, E, Expr, I, Rational, nan, zoo

    if isinstance(scalar, Number):
        return Rational(scalar.value.numerator, scalar.value.denominator)
    found = parse(
        rf"\boxed{{{scalar.latex}}}",
        extraction_config=[LatexExtractionConfig()],
        fallback_mode="no_fallback",
        parsing_timeout=None,
    )
    if not found or not isinstance(found[0], Basic):
        raise NotUnderstood(scalar.latex)
    constants = {"e": E, "i": I}
    value = _evaluated(found[0], {code: constants[name] for code, name in CONSTANTS.items()})
    if not isinstance(value, Expr) or value.has(nan, zoo) or not {s.name for s in value.free_symbols} <= scalar.symbols:
        raise NotUnderstood(scalar.latex)
    return value


def _evaluated(expression: Any, constants: Mapping[str, Any]) -> Any:
    """The parser leaves everything as it was written, powers of integers too."""
    expression = expression.doit()
    if not expression.args:
        return constants.get(expression.name, expression) if expression.is_Symbol else expression
    return expression.func(*(_evaluated(arg, constants) for arg in expression.args))


def _points(symbols: Any, table: tuple[tuple[str, ...], ...]) -> Iterator[dict[Any, Any]]:
    from sympy import Rational

    names = sorted(symbols, key=str)
    for k, row in enumerate(table):
        values = [Rational(row[i % len(row)]) + Rational(i // len(row), k + 2) for i in range(len(names))]
        yield dict(zip(names, values, strict=True))


def _outside(expression: Any, point: Mapping[Any, Any]) -> bool:
    """Whether a root of something negative is taken: nobody means an answer there."""
    from sympy import Pow

    roots = [p.base for p in expression.atoms(Pow) if p.exp.is_Rational and not p.exp.is_Integer]
    values = [_value(base, point) for base in roots]
    return any(value.is_real and value < 0 for value in values)


def _value(expression: Any, point: Mapping[Any, Any] | None = None, digits: int = DIGITS) -> Any:
    return (expression.subs(point) if point else expression).evalf(digits)


def _finite(value: Any) -> bool:
    from sympy import nan, oo, zoo

    return bool(value.is_number) and value not in (nan, zoo, oo, -oo) and not value.has(nan, zoo, oo)


def _close(x: Any, y: Any, agree: int = AGREE) -> bool:
    """Equal to ``agree`` digits, however small they are."""
    from sympy import Abs, Float, oo

    if not _finite(x) or not _finite(y):
        return bool(x == y and x in (oo, -oo))
    size = max(Abs(x).evalf(MANY), Abs(y).evalf(MANY))
    if size == 0:
        return True
    difference = Abs(x - y).evalf(MANY)
    if difference == 0:
        return True
    # What only rounding leaves of a zero has no digits; a small number has.
    if any(v == 0 or getattr(v, "_prec", 99) < 20 for v in (x, y)):
        return all(v == 0 or getattr(v, "_prec", 99) < 20 for v in (x, y))
    return bool(difference <= size * Float(f"1e-{agree}", MANY))


def judge(task: dict[str, Any]) -> dict[str, Any]:
    """``{"gold"}``: is it ``parsed``? ``{"gold", "answer"}``: is the answer ``correct``, or is one ``unparsed``?"""
    gold = read(task["gold"])
    answer = read(task["answer"]) if "answer" in task else gold
    try:
        if gold is None or answer is None:
            raise NotUnderstood(str(task))
        if "answer" not in task:
            for expression in expressions(gold):
                _parsed(expression)
            return {"parsed": True}
        return {"correct": equal(gold, answer, Sympy())}
    except NotUnderstood:
        return {"unparsed": True} if "answer" in task else {"parsed": False}


def limit_memory() -> None:
    """An expression that asks for more fails with a MemoryError, and the machine goes on."""
    try:
        import resource
    except ImportError:  # not on every platform; the time limit still holds
        return
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY if most < 0 else min(MEMORY, most), most))


def die_with_the_parent() -> None:
    """A parent that is killed cannot end its workers, and an expression without end would be computed for ever."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def main() -> None:
    die_with_the_parent()
    logging.disable(logging.CRITICAL)  # math-verify warns of the missing timeouts at every call
    import math_verify  # noqa: F401  (imported now, so that no task's time includes it)
    import sympy  # noqa: F401

    limit_memory()
    with os.fdopen(int(os.environ[CHANNEL]), "w", encoding="utf-8") as replies:
        print(json.dumps({"ready": True}), file=replies, flush=True)
        for line in sys.stdin:
            try:
                reply = judge(json.loads(line))
            except Exception as error:  # what an expression provokes is that expression's verdict, not the worker's end
                reply = {"error": f"{type(error).__name__}: {error}"[:200]}
            print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
