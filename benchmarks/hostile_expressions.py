"""Pathological expressions among ordinary ones, for ``python -m benchmarks fuzz``."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from latentrevise.verify.verifier import Verifier

Pair = tuple[str, str, bool]  # gold, answer, whether they are equal


def good_pairs(count: int) -> list[Pair]:
    """Ordinary ones that need computing, each once; every third differs."""
    forms: list[Callable[[int], tuple[str, str, str]]] = [
        lambda n: (f"(x+{n})^2", f"x^2+{2 * n}x+{n * n}", f"x^2+{2 * n}x+{n * n + 1}"),
        lambda n: (rf"\frac{{{n}\sqrt{{3}}}}{{3}}", rf"\frac{{{n}}}{{\sqrt{{3}}}}", rf"\frac{{{n}}}{{\sqrt{{2}}}}"),
        lambda n: (rf"\sqrt{{{n * n * 2}}}", rf"{n}\sqrt{{2}}", rf"{n + 1}\sqrt{{2}}"),
        lambda n: (rf"\left({n}, \frac{{\pi}}{{{n}}}\right)", rf"({n}, \pi/{n})", rf"({n}, \pi/{n + 1})"),
        lambda n: (rf"{n}\pi", rf"\pi\cdot{n}", rf"\pi+{n}"),
    ]
    pairs = []
    for i in range(count):
        gold, same, other = forms[i % len(forms)](i // len(forms) + 2)
        pairs.append((gold, other if i % 3 == 0 else same, i % 3 != 0))
    return pairs


# Each with a number that makes it another; the answer asked about is one more, so that none is correct.
PATHOLOGICAL: dict[str, Callable[[int], str]] = {
    "tower": lambda n: "9^{" * (n % 6 + 2) + str(n) + "}" * (n % 6 + 2),
    "factorial": lambda n: f"({n}^{{7}})!",
    "factorials": lambda n: f"(({n % 9 + 5}!)!)!+{n}",
    "binomial": lambda n: rf"\binom{{{n + 2}0^{{9}}}}{{{n + 1}^{{8}}}}",
    "power of a sum": lambda n: f"(x+y+z+{n})^{{{300 + n}}}",
    "roots": lambda n: r"\sqrt{1+" * (n % 60 + 5) + str(n) + "}" * (n % 60 + 5),
    "fractions": lambda n: r"\frac{1}{1+" * (n % 60 + 5) + str(n) + "}" * (n % 60 + 5),
    "functions": lambda n: r"\sin(\log(" * (n % 30 + 2) + f"x+{n}" + "))" * (n % 30 + 2),
    "long sum": lambda n: "+".join(rf"\sqrt{{{n + k}}}" for k in range(150)),
    "long product": lambda n: r"\cdot".join(f"(x^{{{k}}}+{n})" for k in range(1, 80)),
    "zero": lambda n: rf"\frac{{{n}}}{{\sin(\pi)\cdot 10^{{{n}}}}}",
    "parentheses": lambda n: "(" * (200 + n) + "1" + ")" * (200 + n),
    "open": lambda n: r"\frac{\sqrt{" * (n % 50 + 1) + str(n),
    "digits": lambda n: "7" * 200 + str(n) + r"\cdot\pi",
    "words": lambda n: ("aa' " * (60 + n))[: 200 + n] + "!",
    "small": lambda n: rf"10^{{-{n}0000}}\pi",
    "code": lambda n: f"__import__('os').system('touch /tmp/latentrevise-executed-{n}')",
    "lambda": lambda n: f"(lambda:0).__class__.__mro__[{n}]",
    "control": lambda n: f"{n}\x00\x1b[2J\\pi\u202e",
    "backslashes": lambda n: "\\" * (300 + n) + r"\pi",
    "spaces": lambda n: r"\pi" + r"\ \, " * (150 + n % 100) + str(n),
    "integral": lambda n: rf"\int_0^{{\infty}} e^{{-x^{n}}} dx",
    "sum": lambda n: rf"\sum_{{k=1}}^{{\infty}} \frac{{1}}{{k^{{{n + 2}}}}}",
    "matrix": lambda n: r"\begin{pmatrix}" + r"\\".join(["&".join(["x^9"] * 12)] * (n % 12 + 1)) + r"\end{pmatrix}",
    "union": lambda n: r"\cup".join(f"({k},{k + 1})" for k in range(n, n + 100)),
    "signs": lambda n: "-" * (100 + n) + r"\pi",
}  # fmt: skip


def pathological(count: int) -> list[tuple[str, str, str]]:
    """Kind, gold, answer."""
    kinds = list(PATHOLOGICAL.items())
    found = []
    for i in range(count):
        name, make = kinds[i % len(kinds)]
        gold = make(i // len(kinds) + 1)
        found.append((name, gold, gold + "+1"))
    return found


def expressions(bad_count: int, good_count: int, timeout: float, workers: int, batch: int = 64) -> dict[str, Any]:
    """The good ones alone, then in batches with the bad ones among them. Raises AssertionError for a wrong verdict."""
    good, bad = good_pairs(good_count), pathological(bad_count)

    own = [("", *pair) for pair in good]
    alone, judged = _timed(own, timeout, workers, batch)
    undecided = [_as_expected(own, judged)]
    mixed = own + [(*three, False) for three in bad]
    random.Random(0).shuffle(mixed)
    together, judged = _timed(mixed, timeout, workers, batch)
    undecided.append(_as_expected(mixed, judged))
    verdicts: dict[str, Counter[str]] = {}
    for (kind, *_), verdict in zip(mixed, judged, strict=True):
        if kind:
            verdicts.setdefault(kind, Counter())[verdict] += 1
    assert not any(Path("/tmp").glob("latentrevise-executed-*")), "an expression was executed"
    return {
        "good": len(good),
        "bad": len(bad),
        "timeout": timeout,
        "workers": workers,
        "good_per_second_alone": len(good) / alone,
        "good_per_second_among_bad": len(good) / together,
        "good_undecided": {"alone": undecided[0], "among_bad": undecided[1]},
        "seconds_a_bad_pair": (together - alone) / len(bad),
        "verdicts": {name: dict(count) for name, count in sorted(verdicts.items())},
        "false_positives": {name: count["correct"] for name, count in verdicts.items() if count["correct"]},
    }


def _timed(
    rows: Sequence[tuple[str, str, str, bool]], timeout: float, workers: int, batch: int
) -> tuple[float, list[str]]:
    """Seconds and verdicts of new processes, which have started."""
    found: list[str] = []
    with Verifier(timeout, workers) as verifier:
        verifier.check_golds([rf"\frac{{x+{i}}}{{3}}" for i in range(2 * workers)])
        began = time.perf_counter()
        for i in range(0, len(rows), batch):
            pairs = [(gold, rf"so it is \boxed{{{answer}}}") for _, gold, answer, _ in rows[i : i + batch]]
            found += [judgement.verdict for judgement in verifier.verify(pairs)]
        return time.perf_counter() - began, found


def _as_expected(rows: Sequence[tuple[str, str, str, bool]], verdicts: Sequence[str]) -> int:
    """How many good pairs were not decided in time. Raises AssertionError where one was, and wrongly."""
    own = [(row, verdict) for row, verdict in zip(rows, verdicts, strict=True) if not row[0]]
    for (_, gold, answer, equal), verdict in own:
        assert verdict in ("unknown", "correct" if equal else "wrong"), f"{gold} and {answer}: {verdict}"
    return sum(verdict == "unknown" for _, verdict in own)
