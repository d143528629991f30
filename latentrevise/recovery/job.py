"""What the stages of a recovery share: policy, engine, verifier, settings, run directory and zero-hit prompts."""

from __future__ import annotations

import logging
import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from latentrevise.data.boundary import Boundary
from latentrevise.data.parquet import read_table
from latentrevise.data.records import (
    Prompt,
    Rollout,
    RowError,
    read_records,
    records_of,
    row_seed,
    write_records,
)
from latentrevise.data.storage import write_jsonl
from latentrevise.data.stored import Stored
from latentrevise.data.tables import file_hash
from latentrevise.engines import Completion, Engine, HFEngine, Request, SamplingParams
from latentrevise.errors import InputError, RunError
from latentrevise.model.policy import Policy
from latentrevise.recovery.cases import Case, chosen_cuts, request_of
from latentrevise.recovery.progress import Progress
from latentrevise.recovery.rounds import Draw
from latentrevise.recovery.rundir import RunDirectory, other_prompts, run_header
from latentrevise.recovery.settings import RecoverConfig
from latentrevise.recovery.targets import Target, ZeroHit, case_seed
from latentrevise.recovery.verdicts import load_checker, warn_of_missing_answers
from latentrevise.revise.hull import Mixture
from latentrevise.strategies import Tools

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Round:
    """A round of mining: its number from 0, and the rows of each of its parts. Parts are numbered through all rounds,
    and what was part i of c in the first is part i + c in the next: no part hangs on what became of another."""

    number: int
    parts: Mapping[int, Sequence[int]]


class Job:
    """One run's policy, engine, settings and directory; its prompts, rollouts and zero-hit cases as they are on disk.

    model, tokenizer: a causal LM of transformers and its tokenizer; both are only read. out: the run directory.
    engine: where samples come from; by default the model itself, through transformers.
    sampling_seconds: that ``generate`` took so far.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: RecoverConfig,
        out: str | os.PathLike[str],
        engine: Engine | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.config = config
        self.run = RunDirectory(out)
        self.policy = Policy(model, tokenizer)
        self.engine = engine or HFEngine(model, tokenizer)
        self.sampling_seconds = 0.0
        self.verifier = config.verifier()
        self.checker = load_checker(config.checker)
        template = self.verifier.pattern.template(config.answer_template)
        self.template_ids = tuple(tokenizer.encode(template, add_special_tokens=False))
        self.header = run_header(model, config, self.engine)
        self.run.check(self.header)
        self._prompts: Stored[Prompt] | None = None
        self._targets: pa.Table | None = None
        self._stage = ""
        self.boundary = Boundary.of(config.prefix_boundary, tokenizer)

    # Prompts and rollouts

    def take_prompts(self, source: str | os.PathLike[str] | Iterable[Mapping[str, Any]] | None) -> None:
        """Read the prompts of a new run, or hold them against those of the run that is there; None: it has its own."""
        if source is None:
            _ = self.prompts  # raises where there are none
            return
        known = file_hash(source) if isinstance(source, (str, os.PathLike)) and Path(source).exists() else None
        if not self.run.check(self.header):
            with self.run.once():
                if not self.run.check(self.header):  # again: another process may have begun it meanwhile
                    self._begin(source, known)
                    return
        if known is not None and self.run.read_header().get("source") == known:
            return  # the same bytes by the same settings
        errors: list[RowError] = []
        prompts = list(self.read_prompts(source, errors))
        if other_prompts(prompts, errors, self.prompts, self.run.read_errors()):
            raise RunError(
                f"{self.run.path} holds a run over other prompts; resume it with its own, or choose another --out"
            )

    def read_prompts(
        self, source: str | os.PathLike[str] | Iterable[Mapping[str, Any]], errors: list[RowError]
    ) -> Iterator[Prompt]:
        """The usable rows of a file or of rows; why the others are not, in ``errors``."""
        positions, new = self.tools().left(0), self.config.max_new_tokens
        return self.config.stream(source, errors, self.tokenizer, positions, new, self.verifier)

    def _begin(self, source: str | os.PathLike[str] | Iterable[Mapping[str, Any]], known: str | None) -> None:
        errors: list[RowError] = []
        try:
            self.run.begin({**self.header, "source": known}, self.read_prompts(source, errors), errors)
        finally:
            for error in errors[:5]:
                log.warning("row %s left out (%s): %s", error.row, error.reason, error.message)
            if len(errors) > 5:
                log.warning("%d more rows left out; all are in %s", len(errors) - 5, self.run.errors)

    @property
    def prompts(self) -> Stored[Prompt]:
        if self._prompts is None:
            if not self.run.prompts.exists():
                raise RunError(f"{self.run.path} has no prompts yet; run `latentrevise mine --prompts FILE` first")
            self._prompts = Stored(self.run.prompts, Prompt, "restore it, or recover into a new directory")
        return self._prompts

    @property
    def chunks(self) -> int:
        """Parts of a stage that has all prompts."""
        return math.ceil(len(self.prompts) / self.config.chunk)

    def rounds(self) -> Iterator[Round]:
        """The rounds of mining: first all prompts, then of each part those that the rounds before left open.

        The parts of a round must be there before the next one is asked for: RunError where they are not.
        """
        rows, size, last = range(len(self.prompts)), self.config.chunk, self.config.mine.rounds - 1
        parts: dict[int, Sequence[int]] = {i: rows[i * size : (i + 1) * size] for i in range(self.chunks)}
        found, correct = Round(0, parts), Counter[str]()
        while found.parts:
            yield found
            if found.number == last:
                return
            left: dict[int, Sequence[int]] = {}
            for index in self._kept(found):
                columns, right = ("prompt_id", "verdict"), pc.field("verdict") == "correct"
                found_right = read_table(self.run.part("rollouts", index), columns, where=right)
                correct.update(found_right["prompt_id"].to_pylist())
                stop = self.config.mine.stop_after_correct
                if own := [row for row in found.parts[index] if correct[self.prompts[row].id] < stop]:
                    left[index + self.chunks] = own
            found = Round(found.number + 1, left)

    def _kept(self, found: Round) -> list[int]:
        """The parts of a round without those that were given up. Raises RunError while some are missing."""
        there, aside = self.run.there("rollouts"), self.run.given_up("rollouts")
        kept = [i for i in found.parts if i not in aside]
        if missing := sum(i not in there for i in kept):
            of = f" of round {found.number + 1}" if self.config.mine.rounds > 1 else ""
            raise RunError(
                f"{self.run.path}: {len(kept) - missing} of {len(kept)} parts{of} are mined; finish with"
                " `latentrevise mine`"
            )
        return kept

    def mined(self) -> dict[int, list[int]]:
        """The parts that are mined of each chunk of prompts, one a round, without chunks of which one was given up.
        Raises RunError while some are missing."""
        parts: dict[int, list[int]] = {}
        for found in self.rounds():
            self._kept(found)
            for index in found.parts:
                parts.setdefault(index % self.chunks, []).append(index)
        aside = self.run.given_up("rollouts")
        return {chunk: own for chunk, own in parts.items() if aside.isdisjoint(own)}

    def rollouts(self) -> Iterator[tuple[Prompt, list[Rollout]]]:
        """Each prompt that was mined with its rollouts, in order. Raises RunError while mining is not complete."""
        size = self.config.chunk
        for chunk, parts in self.mined().items():
            own: dict[str, list[Rollout]] = defaultdict(list)
            for rollout in (r for index in parts for r in read_records(self.run.part("rollouts", index), Rollout)):
                own[rollout.prompt_id].append(rollout)
            prompts = self.prompts[chunk * size : (chunk + 1) * size]
            yield from ((prompt, own[prompt.id]) for prompt in prompts if prompt.id in own)

    @property
    def targets(self) -> pa.Table:
        """The zero-hit prompts, rows of ``Target``: every rollout verified wrong, at least one long enough to be cut.
        Found when they are first asked for. Raises RunError while mining is not complete."""
        if self._targets is None:
            if not self.run.targets.exists():
                with self.run.once():
                    if not self.run.targets.exists():
                        self._find_targets()
            remedy = "restore it, or delete it and the folders starts, samples and verdicts, and run the command again"
            self._targets = read_table(self.run.targets, remedy=remedy).combine_chunks()
        return self._targets

    def _find_targets(self) -> None:
        prompts, config = self.prompts, self.config
        found = ZeroHit(self.run, self.mined(), config.chunk, prompts.column("prompt_id"))
        if found.uncut:  # they go to the file of left-out rows
            log.warning("%d zero-hit prompts left out: %s", len(found.uncut), found.uncut[0].message)
            before = [row for row in self.run.read_errors() if row["reason"] != found.uncut[0].reason]
            write_jsonl(self.run.errors, [*before, *map(asdict, found.uncut)], signed=True)
        warn_of_missing_answers(found.without, found.cut, found.rollouts, self.verifier.pattern)
        write_records(self.run.targets, found.aimed(config.seed, prompts.column("answer"), self.verifier), Target)

    def zero_hit_at(self, rows: Sequence[int]) -> list[Prompt]:
        """The prompts in these rows of ``targets``."""
        return [self.prompts[row] for row in self.targets["row"].take(pa.array(rows, pa.int64())).to_pylist()]

    def cases_at(self, rows: Sequence[int]) -> list[Case]:
        """The zero-hit prompts in these rows of ``targets``, with their rollouts."""
        chosen = self.targets.take(pa.array(rows, pa.int64())).to_pylist()
        names: dict[int, list[str]] = defaultdict(list)
        for target in chosen:
            names[target["row"] // self.config.chunk].append(target["prompt_id"])
        failed: dict[str, list[Rollout]] = defaultdict(list)
        drawn = range(self.config.mine.rounds)  # none was solved, so each was in all rounds
        for index, own in ((chunk + i * self.chunks, own) for chunk, own in names.items() for i in drawn):
            path = self.run.part("rollouts", index)
            for rollout in records_of(read_table(path, where=pc.field("prompt_id").isin(own)), Rollout, path):
                if len(rollout.completion_ids) >= 2:
                    failed[rollout.prompt_id].append(rollout)
        prompts = self.zero_hit_at(rows)
        cases = [self.case(prompt, failed[prompt.id]) for prompt in prompts]
        for case, target in zip(cases, chosen, strict=True):
            if (wrong := target["wrong"]) is not None:
                case.wrong, case.wrong_ids = wrong, self._answer_ids(wrong)
        return cases

    # What a stage works with

    def case(self, prompt: Prompt, failed: list[Rollout]) -> Case:
        """A prompt with all that its arms share; failed: the rollouts that may be cut."""
        seed = case_seed(self.config.seed, prompt.id)
        config = self.config
        return Case(
            prompt=prompt,
            failed=tuple(failed),
            cuts=chosen_cuts(failed, config.revised_rollouts, config.prefix_fraction, self.boundary, seed),
            seed=seed,
            template_ids=self.template_ids,
            answer_ids=self._answer_ids(prompt.answer),
        )

    def _answer_ids(self, answer: str) -> tuple[int, ...]:
        ids = tuple(self.tokenizer.encode(answer, add_special_tokens=False))
        if not ids:
            raise InputError(
                f"the answer {answer!r} has no token under this tokenizer; correct the answer or drop the row"
            )
        return ids

    def succeed(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Whether each (answer, text) is verified correct."""
        return [judgement.verdict == "correct" for judgement in self.verifier.verify(pairs)]

    def enter(self, stage: str) -> None:
        """A part of this stage is run next: where it is another stage, the engine gives up what only sampling needs."""
        if stage != self._stage:
            self._stage = stage
            self.engine.sleep()

    def generate(
        self, requests: Sequence[Request], params: Sequence[SamplingParams], bar: Progress
    ) -> list[list[Completion]]:
        """Sample, with the share of finished sequences shown: a part of long rollouts takes a while."""
        finished, wanted = 0, sum(own.n for own in params)
        elsewhere = not isinstance(self.engine, HFEngine)  # its tokens do not pass through the policy

        def progress(sequences: int, tokens: int) -> None:
            nonlocal finished
            finished += sequences
            bar.within(finished / wanted)
            bar.passed(tokens if elsewhere else 0)

        began = time.perf_counter()
        try:
            return self.engine.generate(requests, params, progress)
        finally:
            self.sampling_seconds += time.perf_counter() - began

    def request(self, prompt: Prompt, mixture: Mixture | None, draw: Draw) -> Request:
        """What is fed for samples of a start."""
        repeat = [draw.repeat] if draw.repeat else []
        seed = row_seed(self.config.seed, "sample", draw.start.start_id, *repeat)
        return replace(request_of(self.policy, prompt.ids, draw.start, mixture, seed), first=draw.first)

    def tools(self) -> Tools:
        """What a strategy works with."""
        return Tools(
            self.policy,
            self.engine,
            self.tokenizer,
            self.config.sampling(1),
            self.config.token_budget,
            self.boundary,
            self.config.chat_template_kwargs,
        )
