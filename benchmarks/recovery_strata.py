"""How hard a zero-hit prompt is, and what each strategy recovers of the hard ones.

The rollouts of the equal-compute control say which zero-hit prompts more sampling would have solved: *within reach* is
a prompt with a right answer among them, *beyond* one without. They are drawn for every study anyway.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from latentrevise.data.records import Verdict, read_records
from latentrevise.recovery.guards import wilson
from latentrevise.recovery.metrics import POOL
from latentrevise.recovery.rundir import RunDirectory

WITHIN, BEYOND = "within", "beyond"


def strata(runs: Iterable[Path], strategies: Sequence[str]) -> dict[str, Any]:
    """Of finished runs: ``rollouts``, the fewest that a prompt's stratum rests on besides the mined ones, and for each
    stratum its number of prompts and, a strategy, those with a right answer and with a valid derivation (rate, 95 %
    Wilson interval). Nothing where no control was drawn."""
    prompts, hits = Counter[str](), defaultdict[tuple[str, str], Counter[str]](Counter)
    drawn: list[int] = []
    for path in runs:
        run = RunDirectory(path)
        pool = _right(run, POOL)
        drawn += pool.samples.values()
        stratum = {name: WITHIN if pool.right[name] else BEYOND for name in pool.samples}
        prompts.update(stratum.values())
        for strategy in strategies:
            found = _right(run, strategy)
            for key, of in (("answer", found.right), ("valid", found.valid)):
                hits[strategy, key].update(stratum[name] for name in stratum if of[name])
    return {"rollouts": min(drawn, default=0), "prompts": dict(prompts)} | {
        stratum: {
            strategy: {key: wilson(hits[strategy, key][stratum], of) for key in ("answer", "valid")}
            for strategy in strategies
        }
        for stratum, of in prompts.items()
    }


class _Counts:
    """Of each prompt its samples, the right ones and the valid ones."""

    def __init__(self) -> None:
        self.samples, self.right, self.valid = Counter[str](), Counter[str](), Counter[str]()


def _right(run: RunDirectory, arm: str) -> _Counts:
    counts = _Counts()
    for part in run.parts("verdicts", arm):
        for verdict in read_records(part, Verdict):
            counts.samples[verdict.prompt_id] += 1
            counts.right[verdict.prompt_id] += verdict.verdict == "correct"
            counts.valid[verdict.prompt_id] += bool(verdict.valid)
    return counts
