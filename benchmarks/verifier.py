"""Verdicts against the field's graders: false positives, false negatives, what is not understood, pairs a second.

The pairs are our own (``tests/verify``); every grader gets a completion with the answer in a box, and the gold answer
in the form that its documentation asks for. ``held_out`` was written when the rules stood, and counts apart.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks import harness
from latentrevise.verify.verifier import Verifier

SETS = {"pairs": "pairs.jsonl", "held_out": "held_out.jsonl"}
RESULTS = Path(__file__).parent / "results" / "verifier.json"
FOLDER = Path(__file__).parent.parent / "tests" / "verify"

Row = dict[str, Any]
Grader = Callable[[Sequence[tuple[str, str]]], list[str]]
"""Takes (gold, completion); gives ``correct``, ``wrong``, ``unparsed`` (wrong, since not understood) for each."""


def add_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--failures", action="store_true", help="list the pairs that each grader gets wrong")


def ours(pairs: Sequence[tuple[str, str]]) -> list[str]:
    found = _verifier().verify(pairs)
    return ["unparsed" if j.unparsed and j.verdict == "wrong" else j.verdict for j in found]


@cache
def _verifier() -> Verifier:
    """One process, as the others have."""
    return Verifier(timeout=30, workers=1)


def math_verify(pairs: Sequence[tuple[str, str]]) -> list[str]:
    from math_verify import parse, verify

    out = []
    for gold, completion in pairs:
        known, found = parse(rf"\boxed{{{gold}}}"), parse(completion)
        equal = verify(known, found)
        out.append("correct" if equal else "wrong" if known and found else "unparsed")
    return out


def trl(pairs: Sequence[tuple[str, str]]) -> list[str]:
    from trl.rewards import accuracy_reward

    completions = [[{"role": "assistant", "content": completion}] for _, completion in pairs]
    rewards = accuracy_reward(completions, [rf"$\boxed{{{gold}}}$" for gold, _ in pairs])
    return ["unparsed" if reward is None else "correct" if reward else "wrong" for reward in rewards]


GRADERS: dict[str, tuple[Grader, str]] = {
    "latentrevise": (ours, "latentrevise"),
    "math-verify": (math_verify, "math-verify"),
    "TRL accuracy_reward": (trl, "trl"),
}


def rows_of(name: str) -> list[Row]:
    return [json.loads(line) for line in (FOLDER / SETS[name]).read_text(encoding="utf-8").splitlines()]


def measure(grade: Grader, rows: Sequence[Row]) -> dict[str, Any]:
    pairs = [(row["gold"], row.get("completion") or rf"\boxed{{{row['answer']}}}") for row in rows]
    grade([(r"\frac{1}{3}", r"\boxed{x+1}")])  # imports and the start of a process are not what is timed
    began = time.perf_counter()
    verdicts = grade(pairs)
    seconds = time.perf_counter() - began
    failures: list[dict[str, Any]] = []
    by_kind: dict[str, Counter[str]] = {}
    for row, (_, text), verdict in zip(rows, pairs, verdicts, strict=True):
        found = by_kind.setdefault(row["kind"], Counter(equal=0, different=0, false_positive=0, false_negative=0))
        found["equal" if row["equal"] else "different"] += 1
        if (verdict == "correct") != row["equal"]:
            found["false_negative" if row["equal"] else "false_positive"] += 1
            failures.append({"gold": row["gold"], "completion": text, "equal": row["equal"], "verdict": verdict})
    total = sum(by_kind.values(), Counter())
    return {
        "equal": total["equal"],
        "different": total["different"],
        "false_positives": total["false_positive"],
        "false_negatives": total["false_negative"],
        "unparsed": verdicts.count("unparsed"),
        "unknown": verdicts.count("unknown"),
        "pairs_per_second": round(len(rows) / seconds, 1),
        "kinds": {kind: dict(found) for kind, found in by_kind.items()},
        "failures": failures,
    }


def main(options: argparse.Namespace) -> dict[str, Any]:
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    document: dict[str, Any] = {
        "name": "verifier",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": harness.commit(),
        "versions": {package: harness.version(package) for _, package in GRADERS.values()},
        "absent": {},
        "sets": {},
    }
    for name in SETS:
        rows, found = rows_of(name), {}
        for grader, (grade, package) in GRADERS.items():
            if harness.version(package) is None and package != "latentrevise":
                document["absent"][grader] = f"{package} is not installed"
                continue
            found[grader] = measure(grade, rows)
        document["sets"][name] = found
        print(f"\n{name}: {len(rows)} pairs\n{table(found)}")
        if name == "pairs":
            print(f"\nfalse positives + false negatives by kind\n{kinds(found)}")
        if options.failures:
            for grader, result in found.items():
                for failure in result["failures"]:
                    print(f"{grader}: {json.dumps(failure, ensure_ascii=False)}")
    _verifier().close()
    for grader, why in document["absent"].items():
        print(f"left out: {grader} ({why})")
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written to {RESULTS.relative_to(Path(__file__).parent.parent)}")
    return document


def table(found: dict[str, dict[str, Any]]) -> str:
    lines = ["| grader | wrong passed | right failed | unparsed | undecided | pairs/s |", "|---|---|---|---|---|---|"]
    for grader, r in found.items():
        share = [
            f"{r['false_positives']} of {r['different']} ({r['false_positives'] / r['different']:.1%})",
            f"{r['false_negatives']} of {r['equal']} ({r['false_negatives'] / r['equal']:.1%})",
        ]
        lines.append(f"| {grader} | {' | '.join(share)} | {r['unparsed']} | {r['unknown']} | {r['pairs_per_second']} |")
    return "\n".join(lines)


def kinds(found: dict[str, dict[str, Any]]) -> str:
    names = list(next(iter(found.values()))["kinds"])
    lines = [f"| kind | pairs | {' | '.join(found)} |", "|---" * (len(found) + 2) + "|"]
    for kind in names:
        cells = [r["kinds"][kind] for r in found.values()]
        size = cells[0]["equal"] + cells[0]["different"]
        shown = " | ".join(f"{c['false_positive']} + {c['false_negative']}" for c in cells)
        lines.append(f"| {kind} | {size} | {shown} |")
    return "\n".join(lines)
