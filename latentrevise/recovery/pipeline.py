"""The main job: mine zero-hit prompts, revise their failed rollouts, continue, verify, and keep what holds.

    mine      sample rollouts of every prompt and verify them; a prompt none of whose rollouts is correct is zero-hit
    revise    each strategy proposes prefixes to continue from
    continue  sample from them, all strategies alike
    verify    judge the samples, check derivations where the task can, let the guards decide what may become a label

Every strategy that reads the answer also runs on a random *wrong* one (the arm ``NAME@wrong``), and plain resampling is
sampled until it has cost as much as the dearest strategy (the arm ``resample@equal``). All of it lives in a
``RunDirectory``.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from latentrevise.data.records import (
    Prompt,
    Rollout,
    RowError,
    Sample,
    Start,
    Trajectory,
    Verdict,
    decoded,
    read_atoms,
    read_jsonl,
    read_offsets,
    read_records,
    row_seed,
    write_atoms,
    write_json,
    write_jsonl,
    write_records,
)
from latentrevise.engines import Completion, Engine, HFEngine, Request, SamplingParams
from latentrevise.errors import InputError, RunError
from latentrevise.model.compute import Compute
from latentrevise.model.policy import Policy
from latentrevise.recovery.cases import Case, chosen_cuts, request_of, tokens_with
from latentrevise.recovery.gate import implicit_value
from latentrevise.recovery.metrics import POOL, WRONG, Outcome, run_metrics
from latentrevise.recovery.rundir import RunDirectory, other_prompts, run_header
from latentrevise.recovery.selection import select
from latentrevise.recovery.settings import RecoverConfig
from latentrevise.recovery.verdicts import Judge, load_checker, warn_of_missing_answers
from latentrevise.revise.hull import Mixture
from latentrevise.strategies import Proposal, Strategy, Tools, Work, build

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recovered:
    """What ``recover`` gives back: the admitted trajectories, the metrics, and the directory everything is in."""

    trajectories: list[Trajectory]
    metrics: dict[str, Any]
    out: Path


@dataclass(frozen=True)
class _Arm:
    name: str
    strategy: Strategy
    wrong: bool
    samples: int


_Result = tuple[Start, Sample, Verdict]


class Recovery:
    """One run: the policy, the engine, the settings and the directory. Every stage skips the parts that exist.

    model, tokenizer: a causal LM of transformers and its tokenizer; both are only read.
    out: the run directory. engine: where samples come from; by default the model itself, through transformers.
    progress: show progress bars on stderr.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: RecoverConfig,
        out: str | os.PathLike[str],
        *,
        engine: Engine | None = None,
        progress: bool = True,
    ) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.run = RunDirectory(out)
        self.policy = Policy(model, tokenizer)
        self.engine = engine or HFEngine(model, tokenizer)
        self.verifier = config.verifier()
        self.checker = load_checker(config.checker)
        self.progress = progress
        self.template_ids = tuple(
            tokenizer.encode(self.verifier.pattern.template(config.answer_template), add_special_tokens=False)
        )
        self.header = run_header(model, config, self.engine)
        self.run.check(self.header)
        self._prompts: list[Prompt] | None = None
        self._work: list[Case] | None = None
        self._pool: _Arm | None = None
        self._recovered: dict[str, set[str]] = {}
        boundary = config.prefix_boundary
        self._boundary = set() if boundary is None else tokens_with(tokenizer, boundary, self.policy.table.shape[0])

    # The stages

    def mine(self, prompts: str | os.PathLike[str] | Iterable[Mapping[str, Any]] | None = None) -> None:
        """Sample and verify ``config.rollouts`` rollouts of every prompt.

        prompts: a file, or rows with a prompt and an answer; None when the run has its prompts already.
        """
        self._take_prompts(prompts)
        with self._bar("mine", len(self.prompts)) as bar:
            for index, chunk in enumerate(_chunks(self.prompts, self.config.chunk)):
                path = self.run.part("rollouts", index)
                if not path.exists():
                    write_records(path, self._mined(chunk, bar), Rollout)
                bar.update(len(chunk))

    def revise(self) -> None:
        """Let every strategy propose its prefixes, for the right target and for a wrong one.

        With ``stop_at_success`` a strategy must know what those before it recovered, so each is run to its verdicts.
        """
        if self.config.stop_at_success:
            for arm in self.arms():
                for name, work in (("revise", self._propose), ("continue", self._continue), ("verify", self._judge)):
                    self._stage(name, [arm], work)
            return
        self.engine.sleep()
        self._stage("revise", self.arms(), self._propose)

    def sample(self) -> None:
        """Sample from all proposals; then the equal-compute control, whose size follows from what the strategies
        cost."""
        self._stage("continue", self.arms(), self._continue)
        self._pool = None  # what the strategies cost is known only now
        pool = self.pool()
        if pool is not None:
            self._stage("control", [pool], self._propose)
            self._stage("control", [pool], self._continue)

    def verify(self) -> None:
        """Judge every sample, check derivations, compute plain log-probs, apply the guards."""
        self.engine.sleep()
        self._stage("verify", self.all_arms(), self._judge)

    def collect(self) -> Recovered:
        """Gather the admitted trajectories and the metrics, and write both."""
        arms = self.all_arms()
        results = {arm.name: self._results(arm) for arm in arms}
        trajectories, mixtures = self._trajectories(results)
        _write_mixtures(self.run.atoms, mixtures)
        write_records(self.run.trajectories, trajectories, Trajectory)
        kept = Counter(t.strategy for t in trajectories)
        metrics = run_metrics(
            [
                Outcome(
                    arm.name,
                    arm.strategy.name,
                    arm.strategy.uses_answer,
                    arm.wrong,
                    [case.prompt.id for case in self._cases_of(arm)],
                    self._cost(arm),
                    results[arm.name],
                    0 if arm.wrong else kept[arm.name],
                )
                for arm in arms
            ],
            rollouts=self.rollouts(),
            zero_hit=[case.prompt.id for case in self.cases()],
            aimed_wrong=[case.prompt.id for case in self.cases() if case.wrong is not None],
            left_out=len(read_jsonl(self.run.errors)),
            checked=self.checker is not None,
            chained=self.config.stop_at_success,
            label=self.config.label,
        )
        write_json(self.run.metrics, metrics)
        return Recovered(trajectories, metrics, self.run.path)

    def recover(self, prompts: str | os.PathLike[str] | Iterable[Mapping[str, Any]] | None = None) -> Recovered:
        """All stages, one after another."""
        with self.session():
            self.mine(prompts)
            self.revise()
            self.sample()
            self.verify()
            return self.collect()

    @contextmanager
    def session(self) -> Iterator[None]:
        """The run locked for this process, and the verifier's workers alive as long as they are needed."""
        with self.run.locked(), self.verifier:
            yield

    # What there is

    @property
    def prompts(self) -> list[Prompt]:
        if self._prompts is None:
            if not self.run.prompts.exists():
                raise RunError(f"{self.run.path} has no prompts yet; run `latentrevise mine --prompts FILE` first")
            self._prompts = read_records(self.run.prompts, Prompt)
        return self._prompts

    def rollouts(self) -> dict[str, list[Rollout]]:
        """The mined rollouts of each prompt. Raises RunError while mining is not complete."""
        expected = math.ceil(len(self.prompts) / self.config.chunk)
        parts = self.run.parts("rollouts")
        if len(parts) != expected:
            raise RunError(
                f"{self.run.path}: {len(parts)} of {expected} parts are mined; finish with `latentrevise mine`"
            )
        found: dict[str, list[Rollout]] = defaultdict(list)
        for part in parts:
            for rollout in read_records(part, Rollout):
                found[rollout.prompt_id].append(rollout)
        return found

    def cases(self) -> list[Case]:
        """The zero-hit prompts: every rollout verified wrong, at least one of them long enough to be cut.

        A prompt with an undecided rollout is left out: it may have been solved.
        """
        if self._work is None:
            rollouts = self.rollouts()
            failed = [p.id for p in self.prompts if all(r.verdict == "wrong" for r in rollouts[p.id])]
            long = {name: [r for r in rollouts[name] if len(r.completion_ids) >= 2] for name in failed}
            self._work = [self._case(p, long[p.id]) for p in self.prompts if long.get(p.id)]
            self._aim_wrong(self._work)
            self._report_uncut([name for name, own in long.items() if not own])
            warn_of_missing_answers([r for own in rollouts.values() for r in own], self.verifier.pattern)
        return self._work

    def _report_uncut(self, prompts: Sequence[str]) -> None:
        """Zero-hit prompts of which nothing can be cut go to the file of left-out rows."""
        code = "short-rollouts"
        kept = [row for row in read_jsonl(self.run.errors) if row["reason"] != code]
        place = {prompt.id: i for i, prompt in enumerate(self.prompts)}
        told = (
            "no failed rollout has two tokens, so there is no prefix to revise; check the stop tokens and the template"
        )
        rows = [asdict(RowError(place[name], name, code, told)) for name in prompts]
        if rows:
            log.warning("%d zero-hit prompts left out: %s", len(rows), told)
            write_jsonl(self.run.errors, [*kept, *rows])

    def gate(self) -> dict[str, Any]:
        """Measure on the solved prompts whether the answer's score knows which branches succeed (see ``gate``); once
        measured, it is read from ``gate.json``. Needs the mined rollouts alone."""
        if not self.run.gate.exists():
            rollouts, work = self.rollouts(), []
            for prompt in self.prompts:
                own = [r for r in rollouts[prompt.id] if len(r.completion_ids) >= 2]
                if any(r.verdict == "correct" for r in own):
                    # A failed rollout is what a recovery leaves; the prompts that have one come first.
                    failed = [r for r in own if r.verdict == "wrong"]
                    work.append((not failed, self._case(prompt, failed or own).work(False)))
            work.sort(key=lambda pair: pair[0])
            config = self.config
            write_json(
                self.run.gate,
                implicit_value(self._tools(), [item for _, item in work], self._succeed, config.forks, config.gate),
            )
        return dict(json.loads(self.run.gate.read_text(encoding="utf-8")))

    def arms(self) -> list[_Arm]:
        """The strategies, and behind each one that reads the answer its wrong-target arm."""
        arms = []
        for name in self.config.strategies:
            strategy = build(name, self.config)
            arms.append(_Arm(name, strategy, False, self.config.samples))
            if self.config.audit and strategy.uses_answer:
                arms.append(_Arm(name + WRONG, strategy, True, self.config.samples))
        return arms

    def pool(self) -> _Arm | None:
        """The equal-compute control: as many fresh rollouts a prompt as the dearest strategy, or all of a chain
        together, could have paid for."""
        if self._pool is not None or not self.config.equal_compute or not self.cases():
            return self._pool
        costs = [self._cost(arm).passes for arm in self.arms() if not arm.wrong]
        dearest = (sum(costs) if self.config.stop_at_success else max(costs)) / len(self.cases())
        rollouts = self.rollouts()
        lengths = [
            _decoded(r.completion_ids, r.finish_reason) for case in self.cases() for r in rollouts[case.prompt.id]
        ]
        fresh = sum(lengths) / len(lengths)
        count = min(self.config.equal_compute_cap, math.ceil(dearest / fresh))
        self._pool = _Arm(POOL, build("resample", self.config), False, max(count, self.config.samples))
        return self._pool

    def all_arms(self) -> list[_Arm]:
        pool = self.pool()
        return [*self.arms(), *([] if pool is None else [pool])]

    # One part of one arm, stage by stage

    def _mined(self, prompts: Sequence[Prompt], bar: tqdm) -> list[Rollout]:
        requests = [Request(p.ids, seed=row_seed(self.config.seed, "mine", p.id)) for p in prompts]
        found = self._generate(requests, [self.config.sampling(self.config.rollouts)] * len(requests), bar)
        flat = [
            (p, j, c, decoded(self.tokenizer, c.ids))
            for p, own in zip(prompts, found, strict=True)
            for j, c in enumerate(own)
        ]
        judged = self.verifier.verify([(prompt.answer, text) for prompt, _, _, text in flat])
        return [
            Rollout(
                prompt_id=prompt.id,
                sample_id=f"{prompt.id}/{j}",
                completion_ids=completion.ids,
                completion=text,
                extracted=judgement.extracted,
                verdict=judgement.verdict,
                finish_reason=completion.finish_reason,
                sampling_logprobs=completion.logprobs or (),
            )
            for (prompt, j, completion, text), judgement in zip(flat, judged, strict=True)
        ]

    def _stage(self, name: str, arms: Sequence[_Arm], work: Callable[[_Arm, tqdm], None]) -> None:
        with self._bar(name, sum(len(self._cases_of(arm)) for arm in arms)) as bar:
            for arm in arms:
                bar.set_description(f"{name} ({arm.name})")
                work(arm, bar)
            bar.set_description(name)

    def _propose(self, arm: _Arm, bar: tqdm) -> None:
        for index, chunk in self._todo("starts", arm, bar):
            work = [case.work(arm.wrong) for case in chunk]
            began = time.perf_counter()
            proposals = arm.strategy.propose(self._tools(), work, arm.samples)
            spare = time.perf_counter() - began - sum(p.compute.seconds for own in proposals for p in own)
            rows, mixtures = [], {}
            count = sum(len(own) for own in proposals)
            for item, own in zip(work, proposals, strict=True):
                for j, proposal in enumerate(own):
                    start = _start(f"{arm.name}/{item.prompt.id}/{j}", item, proposal, max(spare, 0.0) / count)
                    rows.append(start)
                    if proposal.mixture is not None:
                        mixtures[start.start_id] = proposal.mixture
            path = self.run.part("starts", index, arm.name)
            _write_mixtures(path.with_suffix(".safetensors"), mixtures)
            write_records(path, rows, Start)

    def _continue(self, arm: _Arm, bar: tqdm) -> None:
        by_id = {case.prompt.id: case.prompt for case in self.cases()}
        for index, _ in self._todo("samples", arm, bar):
            starts, mixtures = self._starts(arm, index)
            began = time.perf_counter()
            found = self._continuations(starts, mixtures, by_id, bar)
            seconds = (time.perf_counter() - began) / max(sum(map(len, found)), 1)
            rows = [
                Sample(
                    start_id=start.start_id,
                    prompt_id=start.prompt_id,
                    sample_id=f"{start.start_id}/{j}",
                    completion_ids=completion.ids,
                    completion=decoded(self.tokenizer, completion.ids),
                    finish_reason=completion.finish_reason,
                    sampling_logprobs=completion.logprobs or (),
                    seconds=seconds,
                )
                for start, completions in zip(starts, found, strict=True)
                for j, completion in enumerate(completions)
            ]
            write_records(self.run.part("samples", index, arm.name), rows, Sample)

    def _continuations(
        self, starts: Sequence[Start], mixtures: Mapping[str, Mixture], prompts: Mapping[str, Prompt], bar: tqdm
    ) -> list[list[Completion]]:
        """What is sampled from each start: one round, or several, until one brings a correct continuation. Where the
        model has no position left behind a start, nothing."""
        found: list[list[Completion]] = [[] for _ in starts]
        tools = self._tools()
        left = [tools.left(len(s.context_ids or prompts[s.prompt_id].ids) + len(s.plain_ids)) for s in starts]
        waiting, number = [i for i, room in enumerate(left) if room > 0], 0
        if len(waiting) < len(starts):
            log.warning(
                "%d of %d starts fill all positions of the model; nothing is sampled from them",
                len(starts) - len(waiting),
                len(starts),
            )
        while waiting:
            own = [starts[i] for i in waiting]
            requests = [self._request(prompts[s.prompt_id], s, mixtures.get(s.start_id), number) for s in own]
            params = [self.config.sampling(starts[i].n, starts[i].greedy, left[i]) for i in waiting]
            drawn = self._generate(requests, params, bar)
            for i, completions in zip(waiting, drawn, strict=True):
                found[i] += completions
            number += 1
            going = [(i, new) for i, new in zip(waiting, drawn, strict=True) if number < starts[i].rounds]
            pairs = [
                (prompts[starts[i].prompt_id].answer, decoded(self.tokenizer, c.ids)) for i, new in going for c in new
            ]
            judged = iter(self.verifier.verify(pairs))
            correct = [[next(judged).verdict == "correct" for _ in new] for _, new in going]
            waiting = [i for (i, _), hits in zip(going, correct, strict=True) if not any(hits)]
        return found

    def _judge(self, arm: _Arm, bar: tqdm) -> None:
        cases = {case.prompt.id: case for case in self.cases()}
        judge = Judge(self._tools(), self.verifier, self.checker, self.config, self._boundary)
        for index, _ in self._todo("verdicts", arm, bar):
            starts, mixtures = self._starts(arm, index)
            path = self.run.part("samples", index, arm.name)
            if not path.exists():
                raise RunError(
                    f"{self.run.path} has no {path.relative_to(self.run.path)} yet; run `latentrevise continue` first"
                )
            samples = read_records(path, Sample)
            rows = judge.verdicts(
                arm.strategy, arm.wrong, cases, starts, mixtures, samples, partial(self._generate, bar=bar)
            )
            write_records(self.run.part("verdicts", index, arm.name), rows, Verdict)

    # Details

    def _succeed(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        return [judgement.verdict == "correct" for judgement in self.verifier.verify(pairs)]

    def _take_prompts(self, source: str | os.PathLike[str] | Iterable[Mapping[str, Any]] | None) -> None:
        if source is None:
            _ = self.prompts  # raises where there are none
            return
        room = self._tools().left(self.config.max_new_tokens)
        prompts, errors = self.config.load(source, self.tokenizer, room, self.verifier)
        if self.run.prompts.exists():
            if other_prompts(prompts, errors, self.prompts, read_jsonl(self.run.errors)):
                raise RunError(
                    f"{self.run.path} holds a run over other prompts; resume it with its own, or choose another --out"
                )
            return
        for error in errors[:5]:
            log.warning("row %s left out (%s): %s", error.row, error.reason, error.message)
        if len(errors) > 5:
            log.warning("%d more rows left out; all are in %s", len(errors) - 5, self.run.errors)
        self.run.begin(self.header, prompts, errors)

    def _case(self, prompt: Prompt, failed: list[Rollout]) -> Case:
        seed = row_seed(self.config.seed, "case", prompt.id)
        config = self.config
        return Case(
            prompt=prompt,
            failed=tuple(failed),
            cuts=chosen_cuts(failed, config.revised_rollouts, config.prefix_fraction, self._boundary, seed),
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

    def _aim_wrong(self, cases: list[Case]) -> None:
        """Give every case a wrong target: another prompt's answer, drawn by the case's seed and verified to differ."""
        answers = sorted({p.answer for p in self.prompts})
        waiting = [(case, _shuffled(answers, case.seed)) for case in cases]
        while waiting:
            tried = [(case, rest.pop()) for case, rest in waiting if rest]
            judged = self.verifier.compare([(case.prompt.answer, answer) for case, answer in tried])
            for (case, answer), judgement in zip(tried, judged, strict=True):
                if judgement.verdict == "wrong":
                    case.wrong, case.wrong_ids = answer, self._answer_ids(answer)
            waiting = [(case, rest) for case, rest in waiting if rest and case.wrong is None]

    def _cases_of(self, arm: _Arm) -> list[Case]:
        """The prompts an arm is given; a wrong-target arm gets those of its strategy that have a wrong target."""
        done: set[str] = set()
        if self.config.stop_at_success and arm.name != POOL:
            before = self.config.strategies[: self.config.strategies.index(arm.strategy.name)]
            done = set().union(*(self._recovered_by(name) for name in before))
        return [
            case for case in self.cases() if case.prompt.id not in done and (case.wrong is not None or not arm.wrong)
        ]

    def _recovered_by(self, name: str) -> set[str]:
        """The prompts of which this strategy brought an admitted trajectory. Raises RunError before it is verified."""
        if name not in self._recovered:
            arm = next(arm for arm in self.arms() if arm.name == name)
            self._recovered[name] = {v.prompt_id for _, _, v in self._results(arm) if _admitted(v)}
        return self._recovered[name]

    def _todo(self, stage: str, arm: _Arm, bar: tqdm) -> Iterator[tuple[int, list[Case]]]:
        """The parts of an arm's stage that are not there yet; the bar advances over all of them."""
        for index, chunk in enumerate(_chunks(self._cases_of(arm), self.config.chunk)):
            if not self.run.part(stage, index, arm.name).exists():
                yield index, chunk
            bar.update(len(chunk))

    @contextmanager
    def _bar(self, what: str, total: int) -> Iterator[tqdm]:
        with tqdm(total=total, desc=what, unit="prompt", disable=not self.progress, dynamic_ncols=True) as bar:
            yield bar

    def _starts(self, arm: _Arm, index: int) -> tuple[list[Start], dict[str, Mixture]]:
        path = self.run.part("starts", index, arm.name)
        if not path.exists():
            raise RunError(
                f"{self.run.path} has no {path.relative_to(self.run.path)} yet; run `latentrevise revise` first"
            )
        return read_records(path, Start), _read_mixtures(path.with_suffix(".safetensors"))

    def _generate(
        self, requests: Sequence[Request], params: Sequence[SamplingParams], bar: tqdm
    ) -> list[list[Completion]]:
        """Sample, with the rate in tokens shown on the bar: a part of long rollouts takes a while."""
        began = shown = time.perf_counter()
        tokens = 0

        def progress(_: int, new: int) -> None:
            nonlocal shown, tokens
            tokens += new
            now = time.perf_counter()
            if now - shown > 1.0:
                shown = now
                bar.set_postfix_str(f"{tokens / (now - began):,.0f} tokens/s")

        return self.engine.generate(requests, params, progress)

    def _request(self, prompt: Prompt, start: Start, mixture: Mixture | None, number: int) -> Request:
        """The request of round ``number`` (from 0)."""
        seed = row_seed(self.config.seed, "sample", start.start_id, *([number] if number else []))
        return request_of(self.policy, prompt.ids, start, mixture, seed)

    def _tools(self) -> Tools:
        return Tools(
            self.policy,
            self.engine,
            self.tokenizer,
            self.config.sampling(1),
            self.config.token_budget,
            self.config.prefix_boundary,
            self.config.chat_template_kwargs,
        )

    def _results(self, arm: _Arm) -> list[_Result]:
        count = math.ceil(len(self._cases_of(arm)) / self.config.chunk)
        rows = []
        for index in range(count):
            path = self.run.part("verdicts", index, arm.name)
            if not path.exists():
                step = "revise" if self.config.stop_at_success else "verify"
                raise RunError(f"{self.run.path}: {arm.name} is not verified yet; run `latentrevise {step}` first")
            starts = {s.start_id: s for s in self._starts(arm, index)[0]}
            samples = read_records(self.run.part("samples", index, arm.name), Sample)
            verdicts = read_records(path, Verdict)
            rows += [(starts[s.start_id], s, v) for s, v in zip(samples, verdicts, strict=True)]
        return rows

    def _cost(self, arm: _Arm) -> Compute:
        """What an arm cost, from its starts and samples on disk."""
        total = Compute()
        for part in self.run.parts("starts", arm.name):
            for start in read_records(part, Start):
                total += Compute(start.forward_tokens, start.backward_tokens, start.decoded_tokens, start.seconds)
        for part in self.run.parts("samples", arm.name):
            for sample in read_records(part, Sample):
                total += Compute(0, 0, _decoded(sample.completion_ids, sample.finish_reason), sample.seconds)
        return total

    def _trajectories(self, results: Mapping[str, Sequence[_Result]]) -> tuple[list[Trajectory], dict[str, Mixture]]:
        config, prompts = self.config, {p.id: p for p in self.prompts}
        header = self.run.read_header()
        rows: list[Trajectory] = []
        kept_mixtures: dict[str, Mixture] = {}
        for arm in self.arms():
            if arm.wrong:
                continue
            kept = [(start, s, v) for start, s, v in results[arm.name] if _admitted(v)]
            by_prompt: dict[str, list[Trajectory]] = defaultdict(list)
            mixtures: dict[str, Mixture] = {}
            for part in self.run.parts("starts", arm.name):
                mixtures.update(_read_mixtures(part.with_suffix(".safetensors")))
            for start, sample, verdict in kept:
                prompt = prompts[sample.prompt_id]
                by_prompt[prompt.id].append(
                    Trajectory(
                        prompt_id=prompt.id,
                        sample_id=sample.sample_id,
                        start_id=start.start_id,
                        parent_sample_id=start.parent_sample_id,
                        strategy=arm.strategy.name,
                        prompt=prompt.text,
                        prompt_ids=prompt.ids,
                        prefix_ids=start.prefix_ids,
                        plain_prefix_ids=config.rendered(start),
                        prefix_rendering=config.rendering,
                        completion_ids=sample.completion_ids,
                        completion=sample.completion,
                        answer=prompt.answer,
                        extracted_answer=verdict.extracted,
                        verdict=verdict.verdict,
                        valid=verdict.valid,
                        reward=1.0,
                        finish_reason=sample.finish_reason,
                        model=header["model"]["path"],
                        seed=config.seed,
                        temperature=config.temperature,
                        top_p=config.top_p,
                        steps=verdict.steps,
                        trace=start.trace,
                        sampling_logprobs=sample.sampling_logprobs,
                        plain_logprobs=verdict.plain_logprobs,
                        backend=arm.strategy.backend,
                        config_hash=header["config_hash"],
                    )
                )
            for found in by_prompt.values():
                for rank, trajectory in enumerate(select(found, config.select, config.keep)):
                    rows.append(replace(trajectory, rank=rank))
                    if trajectory.start_id in mixtures:
                        kept_mixtures[trajectory.start_id] = mixtures[trajectory.start_id]
        return rows, kept_mixtures


def recover(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    config: RecoverConfig | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    engine: Engine | None = None,
    progress: bool = False,
) -> Recovered:
    """Recover zero-hit prompts: mine, revise, continue, verify.

    model, tokenizer: a causal LM of transformers and its tokenizer. prompts: a file or rows, each with a prompt and an
    answer under one of the usual names, see ``load_prompts``. out: the run directory, resumed where it holds this run;
    a new temporary one when left out. Returns the admitted trajectories, the metrics and the directory.

    Raises ConfigError, InputError, ModelError or RunError; what was computed before stays in ``out``.
    Source: arXiv 2606.29938; the audit, the controls and the guards are our own decision.
    """
    place = tempfile.mkdtemp(prefix="latentrevise-") if out is None else out
    return Recovery(model, tokenizer, config or RecoverConfig(), place, engine=engine, progress=progress).recover(
        prompts
    )


def _start(start_id: str, item: Work, proposal: Proposal, seconds: float) -> Start:
    compute = proposal.compute
    return Start(
        start_id=start_id,
        prompt_id=item.prompt.id,
        parent_sample_id=proposal.parent,
        target=item.target,
        prefix_ids=proposal.original_ids,
        plain_ids=proposal.plain_ids,
        latent=proposal.latent,
        greedy=proposal.greedy,
        n=proposal.n,
        forward_tokens=compute.forward + proposal.uncached,
        backward_tokens=compute.backward,
        decoded_tokens=compute.decoded,
        seconds=compute.seconds + seconds,
        trace=None if proposal.trace is None else asdict(proposal.trace),
        context_ids=proposal.context_ids,
        rounds=proposal.rounds,
    )


def _write_mixtures(path: Path, mixtures: Mapping[str, Mixture]) -> None:
    offsets = {name: m.offset for name, m in mixtures.items() if m.offset is not None}
    write_atoms(path, {name: (m.ids, m.weights) for name, m in mixtures.items()}, offsets)


def _read_mixtures(path: Path) -> dict[str, Mixture]:
    offsets = read_offsets(path)
    return {name: Mixture(ids, weights, offsets.get(name)) for name, (ids, weights) in read_atoms(path).items()}


def _admitted(verdict: Verdict) -> bool:
    return verdict.verdict == "correct" and verdict.guard is None


def _decoded(ids: Sequence[int], finish_reason: str) -> int:
    """Tokens that were decoded: the end-of-sequence token is not among the ids, but was paid for."""
    return len(ids) + (finish_reason == "stop")


def _chunks(items: Sequence[Any], size: int) -> list[Any]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _shuffled(items: Sequence[str], seed: int) -> list[str]:
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))
    return [items[i] for i in order.tolist()]
