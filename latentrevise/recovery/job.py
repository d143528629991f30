"""What the stages of a recovery share: policy, engine, verifier, settings, run directory and zero-hit prompts."""

from __future__ import annotations

import json
import logging
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from latentrevise.data.records import (
    Prompt,
    Rollout,
    RowError,
    Start,
    read_jsonl,
    read_records,
    row_seed,
    stable_hash,
    write_json,
    write_jsonl,
)
from latentrevise.engines import Completion, Engine, HFEngine, Request, SamplingParams
from latentrevise.errors import InputError, RunError
from latentrevise.model.policy import Policy
from latentrevise.recovery.cases import Case, chosen_cuts, request_of, tokens_with
from latentrevise.recovery.progress import Progress
from latentrevise.recovery.rundir import RunDirectory, other_prompts, run_header
from latentrevise.recovery.settings import RecoverConfig
from latentrevise.recovery.verdicts import load_checker, warn_of_missing_answers
from latentrevise.revise.hull import Mixture
from latentrevise.strategies import Tools

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class Job:
    """One run's policy, engine, settings and directory; its prompts, rollouts and zero-hit cases as they are on disk.

    model, tokenizer: a causal LM of transformers and its tokenizer; both are only read. out: the run directory.
    engine: where samples come from; by default the model itself, through transformers.
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
        self.verifier = config.verifier()
        self.checker = load_checker(config.checker)
        template = self.verifier.pattern.template(config.answer_template)
        self.template_ids = tuple(tokenizer.encode(template, add_special_tokens=False))
        self.header = run_header(model, config, self.engine)
        self.run.check(self.header)
        self._prompts: list[Prompt] | None = None
        self._cases: list[Case] | None = None
        boundary = config.prefix_boundary
        self.boundary = set() if boundary is None else tokens_with(tokenizer, boundary, self.policy.table.shape[0])

    # Prompts and rollouts

    def take_prompts(self, source: str | os.PathLike[str] | Iterable[Mapping[str, Any]] | None) -> None:
        """Read the prompts of a new run, or hold them against those of the run that is there; None: it has its own."""
        if source is None:
            _ = self.prompts  # raises where there are none
            return
        prompts, errors = self.read_prompts(source)
        with self.run.once():
            if not self.run.check(self.header):  # again: another process may have begun it meanwhile
                self._begin(prompts, errors)
            elif other_prompts(prompts, errors, self.prompts, read_jsonl(self.run.errors)):
                raise RunError(
                    f"{self.run.path} holds a run over other prompts; resume it with its own, or choose another --out"
                )

    def read_prompts(
        self, source: str | os.PathLike[str] | Iterable[Mapping[str, Any]]
    ) -> tuple[list[Prompt], list[RowError]]:
        """The usable rows of a file or of rows, and why the others are not."""
        positions, new = self.tools().left(0), self.config.max_new_tokens
        return self.config.load(source, self.tokenizer, positions, new, self.verifier)

    def _begin(self, prompts: Sequence[Prompt], errors: Sequence[RowError]) -> None:
        for error in errors[:5]:
            log.warning("row %s left out (%s): %s", error.row, error.reason, error.message)
        if len(errors) > 5:
            log.warning("%d more rows left out; all are in %s", len(errors) - 5, self.run.errors)
        self.run.begin(self.header, prompts, errors)

    @property
    def prompts(self) -> list[Prompt]:
        if self._prompts is None:
            if not self.run.prompts.exists():
                raise RunError(f"{self.run.path} has no prompts yet; run `latentrevise mine --prompts FILE` first")
            self._prompts = read_records(self.run.prompts, Prompt)
        return self._prompts

    def rollouts(self) -> dict[str, list[Rollout]]:
        """The mined rollouts of each prompt. Raises RunError while mining is not complete."""
        expected = range(math.ceil(len(self.prompts) / self.config.chunk))
        kept = [i for i in expected if not self.run.aside("rollouts", i).exists()]
        parts = [self.run.part("rollouts", i) for i in kept]
        if missing := sum(not part.exists() for part in parts):
            raise RunError(
                f"{self.run.path}: {len(parts) - missing} of {len(parts)} parts are mined; finish with"
                " `latentrevise mine`"
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
        if self._cases is None:
            rollouts = self.rollouts()
            mined = [p.id for p in self.prompts if p.id in rollouts]  # without those of parts that were given up
            failed = [name for name in mined if all(r.verdict == "wrong" for r in rollouts[name])]
            long = {name: [r for r in rollouts[name] if len(r.completion_ids) >= 2] for name in failed}
            self._cases = [self.case(p, long[p.id]) for p in self.prompts if long.get(p.id)]
            self._take_targets(self._cases)
            self._report_uncut([name for name, own in long.items() if not own])
            warn_of_missing_answers([r for own in rollouts.values() for r in own], self.verifier.pattern)
        return self._cases

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

    # What a stage works with

    def case(self, prompt: Prompt, failed: list[Rollout]) -> Case:
        """A prompt with all that its arms share; failed: the rollouts that may be cut."""
        seed = row_seed(self.config.seed, "case", prompt.id)
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

    def _take_targets(self, cases: list[Case]) -> None:
        """Give every case the wrong target that the run has noted: what is not decided in time may be another time, and
        all processes must aim alike."""
        if not self.run.targets.exists():
            with self.run.once():
                if not self.run.targets.exists():
                    self._aim_wrong(cases)
                    chosen = {case.prompt.id: case.wrong for case in cases}
                    write_json(self.run.targets, {"targets": chosen, "hash": stable_hash(chosen)})
        try:
            noted = json.loads(self.run.targets.read_text(encoding="utf-8"))
            whole = stable_hash(noted["targets"]) == noted["hash"]
        except (ValueError, LookupError, TypeError):
            whole = False
        if not whole or noted["targets"].keys() != {case.prompt.id for case in cases}:
            raise RunError(
                f"{self.run.targets} is damaged, or the rollouts are not those it was made for; restore it, or delete"
                " it and the folders starts, samples and verdicts, and run the command again"
            )
        for case in cases:
            if (wrong := noted["targets"][case.prompt.id]) is not None:
                case.wrong, case.wrong_ids = wrong, self._answer_ids(wrong)

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

    def succeed(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Whether each (answer, text) is verified correct."""
        return [judgement.verdict == "correct" for judgement in self.verifier.verify(pairs)]

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

        return self.engine.generate(requests, params, progress)

    def request(self, prompt: Prompt, start: Start, mixture: Mixture | None, number: int) -> Request:
        """What is fed for a start, in round ``number`` (from 0)."""
        seed = row_seed(self.config.seed, "sample", start.start_id, *([number] if number else []))
        return request_of(self.policy, prompt.ids, start, mixture, seed)

    def tools(self) -> Tools:
        """What a strategy works with."""
        return Tools(
            self.policy,
            self.engine,
            self.tokenizer,
            self.config.sampling(1),
            self.config.token_budget,
            self.config.prefix_boundary,
            self.config.chat_template_kwargs,
        )


def _shuffled(items: Sequence[str], seed: int) -> list[str]:
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))
    return [items[i] for i in order.tolist()]
