"""The zero-hit prompts of a run, and the wrong answer that each is aimed at.

They are found once, from the mined parts, and noted in one file that all processes read: what is not decided in time
may be another time, and all must aim alike. Of the parts no more than one is held.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import torch

from latentrevise.data.parquet import GROUP
from latentrevise.data.prompts import evenly
from latentrevise.data.records import RowError, row_seed
from latentrevise.recovery.mined import Glance, glances
from latentrevise.recovery.rundir import RunDirectory
from latentrevise.verify.verifier import Verifier

log = logging.getLogger(__name__)
_ANSWERS = 1024  # of other prompts, among which a wrong target is drawn: a draw costs as much as there are


@dataclass(frozen=True)
class Target:
    """A zero-hit prompt. row: its place among the prompts. wrong: the audit's target; None where no other answer
    exists. rollouts, decoded: how many were mined, and the tokens that they took."""

    prompt_id: str
    row: int
    wrong: str | None
    rollouts: int
    decoded: int


class ZeroHit:
    """Looks through the mined parts ``mined``: those of each ``chunk`` prompts, one a round.

    Zero-hit is a prompt of which every rollout was verified wrong; with an undecided one it may have been solved. Those
    without a rollout that can be cut are left out, in ``uncut``. without, cut, rollouts: how many rollouts give no
    answer, how many of those ended at their length, how many there are.
    """

    def __init__(
        self, run: RunDirectory, mined: Mapping[int, Sequence[int]], chunk: int, prompt_ids: pa.ChunkedArray
    ) -> None:
        self.uncut: list[RowError] = []
        self.without = self.cut = self.rollouts = 0
        self.found: list[tuple[str, int, int, int]] = []  # id, row, rollouts, decoded
        for index, parts in mined.items():
            own = glances(run, parts)
            for row, name in enumerate(prompt_ids.slice(index * chunk, chunk).to_pylist(), index * chunk):
                self._count(row, name, own.get(name, ()))

    def _count(self, row: int, name: str, rollouts: Sequence[Glance]) -> None:
        self.rollouts += len(rollouts)
        without = [r for r in rollouts if r.extracted is None]
        self.without += len(without)
        self.cut += sum(r.finish_reason == "length" for r in without)
        if not rollouts or any(r.verdict != "wrong" for r in rollouts):
            return
        if max(r.tokens for r in rollouts) >= 2:
            self.found.append((name, row, len(rollouts), sum(r.decoded for r in rollouts)))
        else:
            self.uncut.append(RowError(row, name, "short-rollouts", _SHORT))

    def aimed(self, seed: int, answers: pa.ChunkedArray, verifier: Verifier) -> Iterator[Target]:
        """Each with a wrong target: another prompt's answer, drawn by the case's seed and verified to differ. answers:
        of all prompts."""
        others = evenly(sorted(pc.unique(answers).to_pylist()), _ANSWERS)
        for first in range(0, len(self.found), GROUP):
            some = self.found[first : first + GROUP]
            golds = answers.take(pa.array([row for _, row, _, _ in some])).to_pylist()
            seeds = [case_seed(seed, name) for name, _, _, _ in some]
            for (name, row, count, decoded), wrong in zip(some, _aim(golds, seeds, others, verifier), strict=True):
                yield Target(name, row, wrong, count, decoded)


_SHORT = "no failed rollout has two tokens, so there is no prefix to revise; check the stop tokens and the template"


def case_seed(seed: int, prompt_id: str) -> int:
    """Of all that is drawn for a zero-hit prompt, in a run of this seed."""
    return row_seed(seed, "case", prompt_id)


def _aim(golds: Sequence[str], seeds: Sequence[int], others: Sequence[str], verifier: Verifier) -> list[str | None]:
    wrong: list[str | None] = [None] * len(golds)
    waiting = [(i, _shuffled(others, seed)) for i, seed in enumerate(seeds)]
    while waiting:
        tried = [(i, rest.pop()) for i, rest in waiting if rest]
        judged = verifier.compare([(golds[i], answer) for i, answer in tried])
        for (i, answer), judgement in zip(tried, judged, strict=True):
            if judgement.verdict == "wrong":
                wrong[i] = answer
        waiting = [(i, rest) for i, rest in waiting if rest and wrong[i] is None]
    return wrong


def _shuffled(items: Sequence[str], seed: int) -> list[str]:
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))
    return [items[i] for i in order.tolist()]
