"""The interface of a recovery strategy.

A strategy turns a zero-hit prompt and its failed rollouts into *proposals*: prefixes to sample continuations from, as
plain tokens or as a mixture of embeddings. Sampling, verifying, guarding and accounting are the pipeline's and are
the same for all, so that strategies are compared and charged alike.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from latentrevise.data.records import shared_head
from latentrevise.model.compute import Compute
from latentrevise.revise.hull import Mixture
from latentrevise.revise.revision import FailedRollout, Trace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from latentrevise.data.boundary import Boundary
    from latentrevise.data.records import Prompt, Rollout
    from latentrevise.engines import Engine, SamplingParams
    from latentrevise.model.policy import Policy


@dataclass(frozen=True)
class Tools:
    """What a strategy works with, the same for all.

    policy: gradients, log-probs and branch scores. engine: samples, should finding a proposal need any. sampling: how
    the run samples (temperature, lengths, stop strings), one sample a request. token_budget: padded tokens in one batch
    of branch scores. boundary: what ends a step; None where the run names none. chat_template_kwargs: what the
    run's chat template reads beside the messages.
    """

    policy: Policy
    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    sampling: SamplingParams
    token_budget: int | None
    boundary: Boundary | None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def left(self, length: int) -> int:
        """Positions left behind ``length`` of them; without end where nobody knows a limit."""
        limits = [limit for limit in (self.policy.limit, self.engine.limit) if limit is not None]
        return min(limits, default=sys.maxsize) - length


@dataclass(frozen=True)
class Cut:
    """A failed rollout split in two: ``prefix_ids`` (what may be revised) and ``continuation_ids`` (what failed)."""

    sample_id: str
    prefix_ids: tuple[int, ...]
    continuation_ids: tuple[int, ...]


def recut(cut: Cut, share: float) -> Cut:
    """The same rollout, cut behind this share of its tokens; both sides keep a token."""
    ids = (*cut.prefix_ids, *cut.continuation_ids)
    at = min(max(1, round(len(ids) * share)), len(ids) - 1)
    return Cut(cut.sample_id, ids[:at], ids[at:])


@dataclass(frozen=True)
class Work:
    """One zero-hit prompt to recover.

    target: the answer aimed at: the gold one, or, in the audit, a wrong one. failed: the rollouts verified wrong.
    cuts: the failed rollouts chosen for revision, already split. answer_ids, template_ids: the target's tokens behind
    the answer template. seed: of everything random about this prompt.
    """

    prompt: Prompt
    target: str
    failed: tuple[Rollout, ...]
    cuts: tuple[Cut, ...]
    answer_ids: tuple[int, ...]
    template_ids: tuple[int, ...]
    seed: int

    def rollout(self, cut: Cut, kept_ids: Sequence[int] = ()) -> FailedRollout:
        """What the reviser is given; ``kept_ids``, of the rollout before the cut's prefix, go with the prompt."""
        return FailedRollout(
            (*self.prompt.ids, *kept_ids),
            cut.prefix_ids,
            cut.continuation_ids,
            self.answer_ids,
            template_ids=self.template_ids,
        )


@dataclass(frozen=True)
class Choice:
    """Tokens that a strategy forced on a failed rollout, and what was known of them; none where it found none.

    positions: in the rollout's completion; tokens; logprobs: of each, given the failed rollout before it. entropy: of
    the policy at the first position; mass: log-probability of a fresh rollout that gets there and takes the tokens;
    value: of the target behind the tokens and the step they stand in. All in nats, None where it was not computed.
    candidates: among how many the choice was made.
    """

    positions: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    entropy: float | None = None
    mass: float | None = None
    value: float | None = None
    candidates: int = 0


@dataclass(frozen=True)
class Proposal:
    """Sample ``n`` continuations of the prompt and this prefix.

    plain_ids: the prefix as tokens (empty: from the prompt itself). mixture: what it was before rounding; it is what
    is fed when ``latent``. kept: the prefix's first positions that need no pass: of a mixture those that are the
    rollout's own tokens, of tokens those that were decoded behind the prompt to find the proposal. parent and
    original_ids: the rollout that was revised, and its own prefix. greedy: continue with the most probable token, so
    ``n`` is 1. context_ids: fed in place of the prompt, for a sample that is to be
    drawn with more knowledge than the policy will have; it is judged and trained behind the prompt all the same.
    rounds: sample ``n`` so many times over, until one of them is verified correct. compute: what finding the proposal
    took; sampling from it is charged by the pipeline.
    """

    n: int
    plain_ids: tuple[int, ...] = ()
    mixture: Mixture | None = None
    latent: bool = False
    kept: int = 0
    parent: str | None = None
    original_ids: tuple[int, ...] = ()
    greedy: bool = False
    context_ids: tuple[int, ...] = ()
    rounds: int = 1
    compute: Compute = field(default_factory=Compute)
    trace: Trace | Choice | None = None

    @property
    def uncached(self) -> int:
        """Tokens that no cache holds: of the prefix, all from the first one that differs from the rollout's own; a
        context's, and whatever stands behind it."""
        if self.latent or self.context_ids:
            return len(self.context_ids) + len(self.plain_ids) - self.kept
        return len(self.plain_ids) - max(self.kept, shared_head(self.plain_ids, self.original_ids))


class Strategy(Protocol):
    """``propose`` returns a list of proposals for each piece of work, with at most ``samples`` continuations in all (in
    a round, where a proposal has several).

    uses_answer: it reads ``Work.target``, so that the audit also runs it on a wrong one. backend: the kernel
    implementation that revises (``auto``: the dispatch chooses; ``none``: nothing is revised).
    """

    @property
    def name(self) -> str: ...

    @property
    def uses_answer(self) -> bool: ...

    @property
    def backend(self) -> str: ...

    def propose(self, tools: Tools, work: Sequence[Work], samples: int) -> list[list[Proposal]]: ...


def shares(samples: int, parts: int) -> list[int]:
    """``samples`` (at least ``parts``) split over ``parts`` as evenly as it goes, the first ones larger."""
    return [samples // parts + (i < samples % parts) for i in range(parts)]
