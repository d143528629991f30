"""Repairing zero-hit groups during RLVR: a strategy proposes prefixes, continuations are sampled, verified, guarded.

What the pipeline does over a run directory, for the groups of one generation batch and with nothing written.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from accelerate.utils import broadcast_object_list

from latentrevise.config import at_least_one
from latentrevise.data.boundary import Boundary
from latentrevise.data.records import Prompt, Rollout, decoded, original_prefix, row_seed
from latentrevise.engines import Completion, Engine, SamplingParams
from latentrevise.errors import ConfigError
from latentrevise.model.branches import completion_logprobs
from latentrevise.model.compute import Compute
from latentrevise.model.policy import Policy
from latentrevise.recovery.cases import chosen_cuts, request_of
from latentrevise.recovery.guards import Candidate, guard, signals
from latentrevise.recovery.provenance import text_signals
from latentrevise.recovery.settings import CutSettings
from latentrevise.recovery.verdicts import before_answer
from latentrevise.strategies import Proposal, Tools, Work, build, load_step_checker
from latentrevise.verify.verifier import Judgement, VerdictName, Verifier

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RepairSettings(CutSettings):
    """How zero-hit groups are repaired; see also CutSettings.

    strategy: by name; ``none`` repairs nothing (the groups are still counted). replace: failed rows of a group that may
    be replaced, duplicates and then the longest first. rendering: the tokens that stand for a revised prefix, as in
    RecoverConfig; ``auto`` is ``argmax`` where those tokens were fed, and ``continuation`` (they are context, not
    trained) where a mixture was. max_groups: repaired in one generation batch (0: all).
    """

    strategy: str = "pivot"
    replace: int = 1
    rendering: Literal["auto", "argmax", "original", "continuation"] = "auto"
    max_groups: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "replace")
        for name in ("min_agreement", "min_contrast"):
            if getattr(self.guards, name) is not None:
                raise ConfigError(
                    f"repair.guards.{name} = {getattr(self.guards, name)!r}: a repair does not measure it (every"
                    " row would be sampled or scored again at each step); set it to null, or recover with it and train"
                    " by `latentrevise train sft`"
                )
        if self.strategy == "hint":
            raise ConfigError(
                "repair.strategy = hint: no reference solution reaches a trainer; recover with it, and train by"
                " `latentrevise train sft`"
            )
        if self.strategy != "none":
            build(self.strategy, self)


@dataclass(frozen=True)
class Rescue:
    """A row for a group: ``ids`` (prefix as rendered, continuation, end), ``trained`` 0 or 1 for each, the text.

    plain: mean log-prob of the continuation behind plain tokens, nats a token. reliance: that less the one behind what
    was fed: how much of the continuation's likelihood is owed to the revision. sampled: of each id, what it was sampled
    with (temperature 1), NaN for those that nothing sampled.
    """

    ids: tuple[int, ...]
    trained: tuple[int, ...]
    text: str
    plain: float
    reliance: float
    sampled: tuple[float, ...] = ()


@dataclass(frozen=True)
class Repair:
    """What was found for one group: rows, the most plausible first; verified samples, and those whose prefix leaked.

    compute: what finding and sampling them took; ``seconds`` is not measured for a group.
    """

    rescues: list[Rescue] = field(default_factory=list)
    correct: int = 0
    leaked: int = 0
    compute: Compute = field(default_factory=Compute)


class Repairer:
    """policy, engine: of the model as it is now. sampling: as the trainer samples, one sample a request. ended: take
    only rows that came to their end, where the trainer masks the others: it would count one as correct, and teach the
    failed rows alone.

    Where the weights are spread over processes all of them make the same repairs, and what the first one finds counts.
    """

    def __init__(
        self,
        policy: Policy,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        verifier: Verifier,
        settings: RepairSettings,
        sampling: SamplingParams,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        *,
        ended: bool = False,
    ) -> None:
        self.policy, self.engine, self.tokenizer, self.verifier = policy, engine, tokenizer, verifier
        self.settings, self.sampling, self.ended = settings, sampling, ended
        self._boundary = Boundary.of(settings.prefix_boundary, tokenizer)
        self._step_checker = load_step_checker(settings)
        template = verifier.pattern.template(settings.answer_template)
        self._template = tuple(tokenizer.encode(template, add_special_tokens=False))
        self._strategy = build(settings.strategy, settings)
        self._tools = Tools(
            policy,
            engine,
            tokenizer,
            sampling,
            settings.token_budget,
            self._boundary,
            chat_template_kwargs or {},
        )

    def repair(self, groups: Sequence[tuple[Prompt, Sequence[Rollout], int]]) -> tuple[list[Repair], float]:
        """One Repair for each group of (prompt, rollouts verified wrong, seed), in order, and the seconds it took."""
        began = time.perf_counter()
        work = [self._work(prompt, failed, seed) for prompt, failed, seed in groups]
        able = [i for i, item in enumerate(work) if item.cuts]
        samples, asked = self.settings.samples, [work[i] for i in able]
        proposals = self._agreed(self._propose(asked, samples)) if able else []
        # Seeds by a proposal's place in its own group: which groups are repaired together changes nothing.
        flat = [
            (i, p, row_seed(work[i].seed, k))
            for i, own in zip(able, proposals, strict=True)
            for k, p in enumerate(own)
            if self._room(work[i], p) > 0
        ]
        drawn = self._sampled([(work[i], p, seed) for i, p, seed in flat])
        found = [Repair() for _ in groups]
        for (i, proposal, _), completions in zip(flat, drawn, strict=True):
            found[i] = self._judged(work[i], proposal, completions, found[i])
        for i, own in zip(able, proposals, strict=True):
            found[i] = replace(found[i], compute=sum((p.compute for p in own), found[i].compute))
        for i, repair in enumerate(found):
            best = sorted(repair.rescues, key=lambda r: -r.plain)[: self.settings.replace]
            found[i] = replace(repair, rescues=best)
        return self._agreed(found), time.perf_counter() - began

    def _agreed(self, value: T) -> T:
        """The first process's value, where all must run the same passes: a verdict that is in time on one alone, or a
        last bit, would leave the others waiting."""
        if not self.policy.sharded:
            return value
        told = [value]
        broadcast_object_list(told)
        return told[0]

    def _work(self, prompt: Prompt, failed: Sequence[Rollout], seed: int) -> Work:
        s = self.settings
        long = [r for r in failed if len(r.completion_ids) >= 2]
        answer = tuple(self.tokenizer.encode(prompt.answer, add_special_tokens=False))
        cuts = chosen_cuts(long, s.revised_rollouts, s.prefix_fraction, self._boundary, seed)
        return Work(prompt, prompt.answer, tuple(long), cuts, answer, self._template, seed)

    def _propose(self, work: Sequence[Work], samples: int) -> list[list[Proposal]]:
        return self._strategy.propose(self._tools, work, samples)

    def _room(self, item: Work, proposal: Proposal) -> int:
        """Tokens left for a continuation, its end-of-sequence token among them: of a row, and of the model."""
        fed = len(proposal.context_ids or item.prompt.ids) + len(proposal.plain_ids)
        return min(self.sampling.max_new_tokens - len(self._prefix(proposal)[0]), self._tools.left(fed))

    def _prefix(self, proposal: Proposal) -> tuple[tuple[int, ...], bool]:
        """The tokens that stand for what was fed, and whether they are trained."""
        rendering = self.settings.rendering
        if rendering == "auto":
            rendering = "continuation" if proposal.latent else "argmax"
        text = proposal.plain_ids
        if rendering == "original":
            text = original_prefix(proposal.original_ids, text)
        return text, rendering != "continuation"

    def _sampled(self, starts: Sequence[tuple[Work, Proposal, int]]) -> list[list[Completion]]:
        found: list[list[Completion]] = [[] for _ in starts]
        waiting, number = list(range(len(starts))), 0
        while waiting:
            requests, params = [], []
            for i in waiting:
                item, proposal, seed = starts[i]
                requests.append(
                    request_of(self.policy, item.prompt.ids, proposal, proposal.mixture, row_seed(seed, number))
                )
                temperature, room = 0.0 if proposal.greedy else self.sampling.temperature, self._room(item, proposal)
                params.append(replace(self.sampling, n=proposal.n, temperature=temperature, max_new_tokens=room))
            for i, completions in zip(waiting, self.engine.generate(requests, params), strict=True):
                found[i] += completions
            number += 1
            waiting = [
                i for i in waiting if number < starts[i][1].rounds and not any(self._correct(starts[i][0], found[i]))
            ]
        return found

    def _correct(self, item: Work, completions: Sequence[Completion]) -> list[bool]:
        """Which continuations come to the answer by themselves: as in a recovery, a prefix that holds it is no help."""
        pairs = [(item.target, decoded(self.tokenizer, c.ids)) for c in completions]
        return self._agreed([judgement.verdict == "correct" for judgement in self.verifier.verify(pairs)])

    def _judged(self, item: Work, proposal: Proposal, completions: Sequence[Completion], known: Repair) -> Repair:
        prefix, trained = self._prefix(proposal)
        right = [i for i, correct in enumerate(self._correct(item, completions)) if correct]
        contexts = [(*item.prompt.ids, *prefix)] * len(right)
        texts = [completions[i].ids for i in right]
        measured = bool(right) and proposal.latent and self.settings.guards.max_text_nll is not None
        if measured:  # what the mixture was written as, and the failed prefix it came from
            contexts += [item.prompt.ids] * 2
            texts += [proposal.plain_ids, proposal.original_ids]
        plain = completion_logprobs(self.policy, contexts, texts, self.settings.token_budget)
        text_nll = float(plain[-1].mean() - plain[-2].mean()) if measured else None
        fed = len(proposal.context_ids or item.prompt.ids) + len(proposal.plain_ids)
        compute = Compute(
            forward=fed * (len(completions) // proposal.n) + sum(map(len, (*contexts, *texts))),
            decoded=sum(len(c.ids) for c in completions),
        )
        rescues, leaked = [], 0
        for i, logprobs in zip(right, plain[: len(right)], strict=True):
            completion = completions[i]
            text = decoded(self.tokenizer, completion.ids)
            before = before_answer(self.tokenizer, completion.ids, text, self.verifier.pattern)
            found = signals(
                Candidate(
                    prompt_ids=item.prompt.ids,
                    original_ids=proposal.original_ids,
                    plain_ids=proposal.plain_ids,
                    mixture=proposal.mixture if proposal.latent else None,
                    answer_ids=item.answer_ids,
                    completion_ids=completion.ids,
                    completion=text,
                    before_answer=before,
                    plain_logprobs=logprobs.tolist(),
                    aimed=self._strategy.uses_answer,
                    told=self._strategy.uses_answer and bool(proposal.context_ids),
                    text_nll=text_nll,
                    text=text_signals(
                        item.prompt.text,
                        (*prefix, *completion.ids[:before]),
                        self.tokenizer,
                        self._boundary,
                        self._step_checker,
                    ),
                )
            )
            objections = guard(found, self.settings.guards)
            leaked += "prefix-leak" in objections
            if objections or (self.ended and completion.finish_reason != "stop"):
                continue
            end = [] if completion.end is None else [completion.end]
            mean = float(logprobs.mean())
            rescues.append(
                Rescue(
                    ids=(*prefix, *completion.ids, *(token for token, _ in end)),
                    trained=(*[int(trained)] * len(prefix), *[1] * (len(completion.ids) + len(end))),
                    text=decoded(self.tokenizer, (*prefix, *completion.ids)),
                    plain=mean,
                    reliance=mean - fmean(completion.logprobs or [mean]),
                    sampled=(
                        *[math.nan] * len(prefix),
                        *(completion.logprobs or [math.nan] * len(completion.ids)),
                        *(value for _, value in end),
                    ),
                )
            )
        return Repair(
            known.rescues + rescues, known.correct + len(right), known.leaked + leaked, known.compute + compute
        )


def judged_rollouts(
    prompt: Prompt, rows: Sequence[Sequence[int]], judged: Sequence[Judgement], tokenizer: PreTrainedTokenizerBase
) -> list[Rollout]:
    """The rows of a group (ids without their end-of-sequence token) with their verdicts."""
    return [
        Rollout(prompt.id, f"{prompt.id}/{i}", tuple(ids), decoded(tokenizer, ids), j.extracted, j.verdict, "stop", ())
        for i, (ids, j) in enumerate(zip(rows, judged, strict=True))
    ]


def zero_hit(verdicts: Iterable[VerdictName]) -> bool:
    """Whether every row of a group is verified wrong: an undecided one could have been right."""
    return set(verdicts) == {"wrong"}


def replaced(failed: Sequence[Rollout], repair: Repair) -> dict[int, Rescue]:
    """What takes the place of which row of the group: duplicates of other rows go first, then the longest."""
    rows = [r.completion_ids for r in failed]
    duplicate = [ids in rows[:i] for i, ids in enumerate(rows)]
    order = sorted(range(len(rows)), key=lambda i: (not duplicate[i], -len(rows[i]), i))
    return dict(zip(order, repair.rescues, strict=False))


def repair_metrics(
    verdicts: Sequence[Sequence[VerdictName]],
    failed: Mapping[int, Sequence[Rollout]],
    repairs: Mapping[int, Repair],
    seconds: float,
) -> dict[str, float]:
    """What is logged of one generation batch; NaN where there was nothing to measure.

    ``zero_hit/frac_groups``: zero-hit groups of all; ``zero_hit/rescued_frac``: those of them that got a row.
    ``recovered/frac_rows``: recovered rows of all; ``recovered/len_ratio``: their length over that of the failed rows;
    ``recovered/reliance``: plain less sampling log-prob, nats a token (far below 0: said only behind the revision);
    ``recovered/answer_leak_frac``: verified, but the prefix was given an answer token (guard ``prefix-leak``).
    ``verifier/unknown_frac``: rows undecided. ``repair/passes``: token passes of the repairs. ``time/revise_s``:
    seconds of repair on this process.

    Args:
        verdicts: of each group.
        failed: of the groups that were taken on, by their place in ``verdicts``; ``repairs`` too.
    """
    rescues = {g: list(replaced(failed[g], repair).values()) for g, repair in repairs.items() if repair.rescues}
    flat = [rescue for own in rescues.values() for rescue in own]
    rows = [v for group in verdicts for v in group]
    dead = sum(map(zero_hit, verdicts))
    return {
        "zero_hit/frac_groups": _share(dead, len(verdicts)),
        "zero_hit/rescued_frac": _share(len(rescues), dead),
        "recovered/frac_rows": _share(len(flat), len(rows)),
        "recovered/len_ratio": _share(
            _mean(len(r.ids) for r in flat), _mean(len(r.completion_ids) for g in rescues for r in failed[g])
        ),
        "recovered/reliance": _mean(r.reliance for r in flat),
        "recovered/answer_leak_frac": _share(
            sum(r.leaked for r in repairs.values()), sum(r.correct for r in repairs.values())
        ),
        "verifier/unknown_frac": _share(rows.count("unknown"), len(rows)),
        "time/revise_s": seconds,
        "repair/passes": float(sum(r.compute.passes for r in repairs.values())),
    }


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return fmean(found) if found else math.nan


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
