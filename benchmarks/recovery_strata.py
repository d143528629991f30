"""How hard a zero-hit prompt is, what each strategy recovers of the hard ones, and what it gains over resampling.

The rollouts of the equal-compute control say which zero-hit prompts more sampling would have solved: *within reach* is
a prompt with a right answer among them, *beyond* one without. They are drawn for every study anyway. *far* are the
prompts beyond reach that as many further rollouts as the study draws for this alone do not solve either.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from latentrevise.data.records import Rollout, Verdict, read_records, row_seed
from latentrevise.errors import InputError
from latentrevise.recovery.guards import bootstrap_mean, pass_at_k, wilson
from latentrevise.recovery.metrics import POOL
from latentrevise.recovery.pipeline import Recovery
from latentrevise.recovery.rundir import RunDirectory
from latentrevise.recovery.settings import RoundsConfig

WITHIN, BEYOND, FAR = "within", "beyond", "far"
_ROUNDS = 6  # that further rollouts are drawn in: a prompt is left at its first right one


def finished(runs: Sequence[Path]) -> list[Path]:
    """The runs again. Raises InputError for one that is no finished run of a recovery study."""
    for run in runs:
        if not RunDirectory(run).metrics.is_file() or not run.name.rpartition("-p")[2].isdigit():
            raise InputError(f"{run}: no finished run of the recovery study (FAMILY-mMODEL-pSEED); leave it out")
    return list(runs)


def further(run: Path) -> Path:
    """Where the further rollouts of a run's prompts lie."""
    return run.with_name(f"{run.name}-further")


def draw_further(recovery: Recovery, prompts: Sequence[dict[str, Any]], count: int) -> None:
    """Up to ``count`` more rollouts of each of a finished run's prompts that are beyond reach; taken up where it
    stopped. prompts: the run's rows."""
    run, config = recovery.run, recovery.config
    pool = _right(run, POOL)
    beyond = [row for row in prompts if row["id"] in pool.samples and not pool.right[row["id"]]]
    if not beyond:
        return
    more = replace(
        config,
        rollouts=count,
        mine=RoundsConfig(rounds=_ROUNDS),
        seed=row_seed(config.seed, "further") % 2**31,  # none of the mined rollouts' draws
        label=further(run.path).name,
    )
    Recovery(recovery.job.model, recovery.job.tokenizer, more, further(run.path), progress=False).mine(beyond)


def strata(runs: Iterable[Path], strategies: Sequence[str]) -> dict[str, Any]:
    """Of finished runs: ``rollouts``, the fewest that a prompt's stratum rests on besides the mined ones, ``far`` the
    same of the prompts that are far, and for each stratum its number of prompts and, a strategy, those with a right
    answer and with a valid derivation (rate, 95 % Wilson interval). Nothing where no control was drawn; nothing is far
    where no further rollouts were."""
    prompts, hits = Counter[str](), defaultdict[tuple[str, str, str], int](int)
    drawn, drawn_far = list[int](), list[int]()
    for path in runs:
        run = RunDirectory(path)
        pool, more = _right(run, POOL), _further(further(path))
        drawn += pool.samples.values()
        members = {name: [WITHIN if pool.right[name] else BEYOND] for name in pool.samples}
        for name, own in members.items():
            if own == [BEYOND] and more.samples[name] and not more.right[name]:
                own.append(FAR)
                drawn_far.append(pool.samples[name] + more.samples[name])
        prompts.update(stratum for own in members.values() for stratum in own)
        for strategy in strategies:
            found = _right(run, strategy)
            for key, of in (("answer", found.right), ("valid", found.valid)):
                for name, own in members.items():
                    for stratum in own:
                        hits[strategy, key, stratum] += bool(of[name])
    fewest = {"rollouts": min(drawn, default=0)} | ({"far_rollouts": min(drawn_far)} if drawn_far else {})
    return (
        fewest
        | {"prompts": dict(prompts)}
        | {
            stratum: {
                strategy: {key: wilson(hits[strategy, key, stratum], of) for key in ("answer", "valid")}
                for strategy in strategies
            }
            for stratum, of in prompts.items()
        }
    )


def gains(runs: Sequence[Path], strategies: Sequence[str]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Of finished runs: for each strategy the share of prompts with a right answer and with a valid derivation less
    that of plain resampling in its seconds, prompt by prompt (mean, 95 % bootstrap interval over prompts). Nothing
    where no control was drawn."""
    differences = defaultdict[tuple[str, str], list[float]](list)
    for path in runs:
        run = RunDirectory(path)
        pool, arms = _right(run, POOL), json.loads(run.metrics.read_text(encoding="utf-8"))["arms"]
        for strategy in strategies if pool.samples else ():
            bought, found = arms[strategy]["control_seconds"]["samples"], _right(run, strategy)
            for key, own, fresh in (("answer", found.right, pool.right), ("valid", found.valid, pool.valid)):
                differences[strategy, key] += [
                    bool(own[name]) - pass_at_k(drawn, fresh[name], bought) for name, drawn in pool.samples.items()
                ]
    gained = defaultdict[str, dict[str, tuple[float, float, float]]](dict)
    for (strategy, key), values in differences.items():
        gained[strategy][key] = bootstrap_mean(values)
    return dict(gained)


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


def _further(path: Path) -> _Counts:
    counts = _Counts()
    for part in RunDirectory(path).parts("rollouts"):
        for rollout in read_records(part, Rollout):
            counts.samples[rollout.prompt_id] += 1
            counts.right[rollout.prompt_id] += rollout.verdict == "correct"
    return counts
