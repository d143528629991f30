"""From samples to verdicts: right or wrong, whether the derivation holds, and what the guards say."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from latentrevise.checkers.loading import Checker, Derivation, load
from latentrevise.data.boundary import Boundary
from latentrevise.data.records import Prompt, Sample, Start, Verdict, decoded, row_seed
from latentrevise.engines import Completion, Request, SamplingParams
from latentrevise.model.branches import Branch, completion_logprobs, score_branches
from latentrevise.recovery.cases import Case
from latentrevise.recovery.guards import Candidate, guard, signals
from latentrevise.recovery.provenance import text_signals
from latentrevise.revise.hull import Mixture
from latentrevise.strategies import Strategy, Tools, load_step_checker
from latentrevise.verify.patterns import AnswerPattern
from latentrevise.verify.verifier import Verifier

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from latentrevise.recovery.settings import RecoverConfig

log = logging.getLogger(__name__)

Generate = Callable[[Sequence[Request], Sequence[SamplingParams]], list[list[Completion]]]


class Judge:
    """Judges the samples of any arm of a run.

    checker: reads derivations; None: the task cannot check them. boundary: what ends a step.
    """

    def __init__(
        self,
        tools: Tools,
        verifier: Verifier,
        checker: Checker | None,
        config: RecoverConfig,
        boundary: Boundary | None,
    ) -> None:
        self.tools, self.policy, self.tokenizer = tools, tools.policy, tools.tokenizer
        self.verifier, self.checker, self.config, self.boundary = verifier, checker, config, boundary
        self.step_checker = load_step_checker(config)

    def verdicts(
        self,
        strategy: Strategy,
        wrong: bool,
        cases: Mapping[str, Case],
        starts: Sequence[Start],
        mixtures: Mapping[str, Mixture],
        samples: Sequence[Sample],
        generate: Generate,
    ) -> list[Verdict]:
        """One verdict a sample. wrong: the arm was aimed at a wrong answer, so nothing of it can become a label.

        cases, mixtures: by prompt and by start. generate: where the guard ``unstable`` samples anew.
        """
        by_start = {s.start_id: s for s in starts}
        gold = self.verifier.verify([(cases[s.prompt_id].prompt.answer, s.completion) for s in samples])
        targets = [(cases[s.prompt_id].wrong, s.completion) for s in samples]
        reached = iter(self.verifier.verify([(target, text) for target, text in targets if target is not None]))
        hits_wrong = [target is not None and next(reached).verdict == "correct" for target, _ in targets]
        correct = [i for i, judgement in enumerate(gold) if judgement.verdict == "correct" and not wrong]
        judged = [(cases[samples[i].prompt_id].prompt, by_start[samples[i].start_id], samples[i]) for i in correct]
        plain_of = dict(zip(correct, self._plain_logprobs(judged), strict=True))
        agreement_of = dict(zip(correct, self._agreement(judged, generate), strict=True))
        contrast_of = dict(zip(correct, self._contrast(judged, cases), strict=True))
        text_of = self._text_nll({start.start_id: (prompt, start) for prompt, start, _ in judged if start.latent})
        rows = []
        for i, (sample, judgement) in enumerate(zip(samples, gold, strict=True)):
            case, start = cases[sample.prompt_id], by_start[sample.start_id]
            derivation = self._check(case.prompt, start, sample) if judgement.verdict == "correct" else None
            found = None
            if i in plain_of:
                before = self._before_answer(sample)
                candidate = Candidate(
                    prompt_ids=case.prompt.ids,
                    original_ids=start.prefix_ids,
                    plain_ids=start.plain_ids,
                    mixture=mixtures.get(start.start_id),
                    answer_ids=case.answer_ids,
                    completion_ids=sample.completion_ids,
                    completion=sample.completion,
                    before_answer=before,
                    plain_logprobs=plain_of[i],
                    aimed=strategy.uses_answer,
                    told=strategy.uses_answer and bool(start.context_ids),
                    agreement=agreement_of[i],
                    text_nll=text_of.get(start.start_id),
                    text=text_signals(
                        case.prompt.text,
                        (*self.config.rendered(start), *sample.completion_ids[:before]),
                        self.tokenizer,
                        self.boundary,
                        self.step_checker,
                    ),
                    contrast=contrast_of[i],
                )
                found = signals(candidate)
            rows.append(
                Verdict(
                    sample_id=sample.sample_id,
                    start_id=sample.start_id,
                    prompt_id=sample.prompt_id,
                    extracted=judgement.extracted,
                    verdict=judgement.verdict,
                    hits_target=hits_wrong[i] if wrong else judgement.verdict == "correct",
                    hits_wrong=hits_wrong[i],
                    valid=None if derivation is None else derivation.valid,
                    steps=[] if derivation is None else _steps(derivation),
                    guard=None if found is None else ",".join(guard(found, self.config.guards)) or None,
                    plain_logprobs=plain_of.get(i),
                    signals=found,
                )
            )
        return rows

    def _plain_logprobs(self, rows: Sequence[tuple[Prompt, Start, Sample]]) -> list[tuple[float, ...]]:
        contexts = [(*prompt.ids, *self.config.rendered(start)) for prompt, start, _ in rows]
        completions = [sample.completion_ids for _, _, sample in rows]
        found = completion_logprobs(self.policy, contexts, completions, self.config.token_budget)
        return [tuple(x.tolist()) for x in found]

    def _text_nll(self, starts: Mapping[str, tuple[Prompt, Start]]) -> dict[str, float]:
        """By how much less likely than its failed prefix each start's text is behind the prompt, nats a token."""
        contexts = [prompt.ids for prompt, _ in starts.values() for _ in range(2)]
        texts = [ids for _, start in starts.values() for ids in (start.plain_ids, start.prefix_ids)]
        scores = completion_logprobs(self.policy, contexts, texts, self.config.token_budget)
        nll = [-float(logprobs.sum()) / max(len(logprobs), 1) for logprobs in scores]
        return {name: nll[2 * i] - nll[2 * i + 1] for i, name in enumerate(starts)}

    def _check(self, prompt: Prompt, start: Start, sample: Sample) -> Derivation | None:
        if self.checker is None:
            return None
        return self.checker(prompt.text, decoded(self.tokenizer, start.plain_ids), sample.completion, prompt.answer)

    def _agreement(self, rows: Sequence[tuple[Prompt, Start, Sample]], generate: Generate) -> list[float | None]:
        """The share of new continuations, behind the plain prefix and the first steps of each sample, that come to its
        answer; None where no guard asks for it."""
        guards = self.config.guards
        if guards.min_agreement is None:
            return [None] * len(rows)
        requests, params = [], []
        for prompt, start, sample in rows:
            before, ids = self.config.rendered(start), sample.completion_ids
            cut = int(guards.agreement_cut * self._before_answer(sample))
            if self.boundary is not None:
                ends = (end - len(before) for end in self.boundary.ends((*before, *ids)))
                cut = max((end for end in ends if 0 < end <= cut), default=cut)
            context = (*prompt.ids, *before, *ids[:cut])
            left = self.tools.left(len(context))
            requests.append(Request(context))
            params.append(self.config.sampling(1, greedy=True, left=left))
            if guards.agreement_samples > 1:
                requests.append(Request(context, seed=row_seed(self.config.seed, "agreement", sample.sample_id)))
                params.append(self.config.sampling(guards.agreement_samples - 1, left=left))
        found = iter(generate(requests, params))
        rounds = 1 + (guards.agreement_samples > 1)
        texts = [[decoded(self.tokenizer, c.ids) for _ in range(rounds) for c in next(found)] for _ in rows]
        pairs = [(row[0].answer, text) for row, own in zip(rows, texts, strict=True) for text in own]
        judged = iter(self.verifier.verify(pairs))
        return [sum(next(judged).verdict == "correct" for _ in own) / len(own) for own in texts]

    def _before_answer(self, sample: Sample) -> int:
        return before_answer(self.tokenizer, sample.completion_ids, sample.completion, self.verifier.pattern)

    def _contrast(self, rows: Sequence[tuple[Prompt, Start, Sample]], cases: Mapping[str, Case]) -> list[float | None]:
        """By how much the answer's log-probability behind each sample's steps exceeds the highest of the wrong answers
        at hand; None without any, or where no guard asks for it."""
        if self.config.guards.min_contrast is None:
            return [None] * len(rows)
        trunks: list[tuple[int, ...]] = []
        branches, counts = [], []
        for prompt, start, sample in rows:
            case, steps = cases[prompt.id], list(sample.completion_ids[: self._before_answer(sample)])
            while steps and steps[-1] in case.template_ids:  # what opens the answer is in the template
                steps.pop()
            trunk = (*prompt.ids, *self.config.rendered(start), *steps)
            wrong = {rollout.extracted for rollout in case.failed} | {case.wrong}
            encoded = {tuple(self.tokenizer.encode(text, add_special_tokens=False)) for text in wrong if text}
            answers = [case.answer_ids, *sorted(encoded - {()})]
            if self.tools.left(len(trunk) + len(case.template_ids) + max(map(len, answers))) < 0:
                answers = []  # there is no room behind this row for an answer
            branches += [
                Branch(len(trunks), len(trunk), (*case.template_ids, *ids), scored_from=len(case.template_ids))
                for ids in answers
            ]
            trunks.append(trunk)
            counts.append(len(answers))
        scored = score_branches(self.policy, trunks, branches, token_budget=self.config.token_budget)
        totals = iter(scored.total.tolist())
        found = [[next(totals) for _ in range(count)] for count in counts]
        return [own[0] - max(own[1:]) if len(own) > 1 else None for own in found]


def _steps(derivation: Derivation) -> list[dict[str, Any]]:
    return [{"text": step.text, "ok": step.ok} for step in derivation.steps]


def before_answer(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str, pattern: AnswerPattern) -> int:
    """Tokens of a continuation (ids, and their text) in front of its final answer; all where it gives none."""
    found = pattern.find(text)
    head = text if found is None else text[: found.start]
    return min(len(tokenizer.encode(head, add_special_tokens=False)), len(ids))


def warn_of_missing_answers(without: int, cut: int, rollouts: int, pattern: AnswerPattern) -> None:
    """A model that does not know where the answer goes seems to fail everywhere. without: rollouts that give none;
    cut: those of them that ended at their length; rollouts: all."""
    if 2 * without > rollouts:
        log.warning(
            "%d of %d rollouts hold no answer by answer_pattern = %r and count as wrong (%d of them ended at"
            " max_new_tokens); ask for one in the prompts or with `instruction`, choose the pattern that the model"
            " answers in, or raise max_new_tokens",
            without,
            rollouts,
            pattern.name,
            cut,
        )


def load_checker(name: str | None) -> Checker | None:
    """The checker that the setting names; None for None. Raises ConfigError if it cannot be imported."""
    return None if name is None else load(name, "checker")
