"""What an arm came to, counted part by part: no row is kept, so the counts of a million prompts take no more memory
than those of ten."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from fractions import Fraction
from statistics import fmean
from typing import Any

from latentrevise.data.records import Sample, Start, Verdict, row_seed
from latentrevise.model.compute import Compute
from latentrevise.recovery.guards import MarkerCounts

Result = tuple[Start, Sample, Verdict]

JUDGED = 16384
"""Samples that the curves of the guards are drawn from, at most: all, or so many by hash; our own decision."""


class Mean:
    """Of numbers as they come, exactly: their order and number of parts change no digit."""

    def __init__(self) -> None:
        self.total, self.count = Fraction(0), 0

    def add(self, value: float, times: int = 1) -> None:
        self.total += Fraction(value) * times
        self.count += times

    @property
    def value(self) -> float | None:
        """None: there was no number."""
        return float(self.total) / self.count if self.count else None


class Judged:
    """Right samples whose derivation was checked, of all strategies: how many were admitted and valid, and of at most
    JUDGED of them the signals."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[bool, bool]] = Counter()
        self._kept: list[tuple[int, int, Mapping[str, Any], bool]] = []

    def add(self, verdict: Verdict) -> None:
        self.counts[verdict.guard is None, bool(verdict.valid)] += 1
        number = self.counts.total()
        row = (-row_seed(0, "judged", verdict.sample_id), number, verdict.signals or {}, bool(verdict.valid))
        if len(self._kept) < JUDGED:
            heapq.heappush(self._kept, row)
        else:
            heapq.heappushpop(self._kept, row)

    @property
    def samples(self) -> list[tuple[Mapping[str, Any], bool]]:
        """Signals, and whether it is valid, as they came."""
        return [(signals, valid) for _, _, signals, valid in sorted(self._kept, key=lambda row: row[1])]


class Outcome:
    """One arm's results. ``wrong``: it aimed at a random wrong answer. judged: where its right samples are counted too.
    chained: keep the ids of the prompts it recovered, since those of other arms may be the same. in_rounds: its samples
    of a prompt ended when enough were right, so they do not say how often it comes to another answer.

    prompts: those it was given; aimed: those of them with a wrong target. hit, hits_wrong, valid, admitted_prompts:
    prompts with such a sample; kept: trajectories that the selection left of its admitted samples. by_prompt: how many
    prompts have so many right and so many valid samples; fewest: samples of any prompt.
    """

    def __init__(
        self,
        arm: str,
        strategy: str,
        uses_answer: bool,
        wrong: bool,
        judged: Judged,
        chained: bool = False,
        in_rounds: bool = False,
    ) -> None:
        self.arm, self.strategy, self.uses_answer, self.wrong = arm, strategy, uses_answer, wrong
        self.judged, self.chained, self.in_rounds = judged, chained, in_rounds
        self.compute = Compute()
        self.prompts = self.aimed = self.samples = self.kept = 0
        self.hit = self.hits_wrong = self.valid = self.admitted_prompts = 0
        self.correct = self.admitted = self.admitted_valid = 0
        self.fewest: int | None = None
        self.by_prompt: Counter[tuple[int, int]] = Counter()
        self.guarded: Counter[tuple[bool, bool]] = Counter()
        self.rejections: Counter[str] = Counter()
        self.length, self.reliance = Mean(), Mean()
        self.markers, self.markers_right = MarkerCounts(), MarkerCounts()
        self.recovered_ids: set[str] = set()
        self.valid_ids: set[str] = set()

    def add(self, prompts: Sequence[str], aimed: int, compute: Compute, rows: Sequence[Result], kept: int = 0) -> None:
        """A part: its prompts, what it cost, and its samples with their starts and verdicts. Every prompt's samples
        come in one part."""
        self.prompts += len(prompts)
        self.aimed += aimed
        self.kept += kept
        self.samples += len(rows)
        self.compute += compute
        by_prompt: dict[str, list[Verdict]] = defaultdict(list)
        for start, sample, verdict in rows:
            by_prompt[verdict.prompt_id].append(verdict)
            self.markers.add(sample.completion)
            if verdict.verdict == "correct" and not self.wrong:
                self._add_right(start, sample, verdict)
        self._add_prompts(prompts, by_prompt)

    def _add_right(self, start: Start, sample: Sample, verdict: Verdict) -> None:
        self.correct += 1
        self.guarded[verdict.guard is None, bool(verdict.valid)] += 1
        self.rejections.update((verdict.guard or "").split(",") if verdict.guard else ())
        self.admitted += verdict.guard is None
        self.admitted_valid += verdict.guard is None and bool(verdict.valid)
        self.length.add(len(start.plain_ids) + len(sample.completion_ids))
        self.markers_right.add(sample.completion)
        if verdict.plain_logprobs and sample.sampling_logprobs:
            self.reliance.add(fmean(verdict.plain_logprobs) - fmean(sample.sampling_logprobs))
        if verdict.valid is not None:
            self.judged.add(verdict)

    def _add_prompts(self, prompts: Sequence[str], by_prompt: Mapping[str, Sequence[Verdict]]) -> None:
        for name in prompts:
            own = by_prompt.get(name, ())
            right = [v for v in own if v.verdict == "correct"]
            valid = sum(bool(v.valid) for v in own)
            self.by_prompt[len(right), valid] += 1
            self.fewest = len(own) if self.fewest is None else min(self.fewest, len(own))
            self.hit += any(v.hits_target for v in own)
            self.hits_wrong += any(v.hits_wrong for v in own)
            self.valid += any(v.valid for v in right)
            self.admitted_prompts += any(v.guard is None for v in right)
            if self.chained and right:
                self.recovered_ids.add(name)
                self.valid_ids.update([name] if any(v.valid for v in right) else [])
