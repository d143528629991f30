"""The batched reviser: failed rollouts in, revised prefixes out, model frozen (arXiv 2606.29938, Algorithm 1).

One step for a whole batch: one packed forward pass over all prefixes and both branches of each, the loss and ``dL/dH``
from ``linear_logprob``, the body's backward pass to ``dL/dz``, and the update of the atoms. The prompts' keys and
values are computed once and reused by all steps; a prefix that is finished leaves the batch. What a step reports comes
to the host in one copy.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from latentrevise import kernels
from latentrevise.errors import InputError, ModelError
from latentrevise.model import memory
from latentrevise.model.cache import PromptCache
from latentrevise.model.compute import Compute
from latentrevise.model.packing import Packing, pack
from latentrevise.model.policy import Policy, Ready
from latentrevise.revise import graph, objective, solver
from latentrevise.revise.hull import Mixture, VocabularyHull
from latentrevise.revise.objective import Terms
from latentrevise.revise.revision import Evaluation, FailedRollout, ReviseConfig, Revision, Trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class _Batch:
    """Rollouts under revision together, with what does not change between steps."""

    index: list[int]  # places in the caller's list
    rollouts: list[FailedRollout]
    packing: Packing
    prompt: PromptCache
    ready: Ready
    candidates: Tensor | None


@dataclass
class _Progress:
    """One rollout's way through its revision; ``point`` is the iterate to return, as far as it is known."""

    trace: Trace = field(default_factory=Trace)
    compute: Compute = field(default_factory=Compute)
    point: Mixture = field(default_factory=lambda: Mixture(torch.empty(0, 1), torch.empty(0, 1)))


class Reviser:
    """Revise the reasoning prefixes of failed rollouts inside the hull of the vocabulary's embeddings.

    model: a causal LM of transformers, on any device; its parameters, gradients, modes and hooks are left as they are.
    config: see ``ReviseConfig``; its defaults are the published method. tokenizer: says which rows of the table are
    tokens, and which of them special. Source: arXiv 2606.29938.
    """

    def __init__(
        self,
        model: PreTrainedModel | Policy,
        config: ReviseConfig | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.policy = model if isinstance(model, Policy) else Policy(model, tokenizer)
        self.config = config or ReviseConfig()
        if self.config.cuda_graph:
            graph.check(self.policy)
        vertices = self.policy.known if self.config.special_vertices else self.policy.allowed
        self.hull = VocabularyHull(self.policy.table, vertices)

    def value_and_grad(
        self, rollouts: Sequence[FailedRollout], mixtures: Sequence[Mixture] | None = None
    ) -> list[Evaluation]:
        """The objective and ``dL/dz`` of each rollout, at the plain prefix or at the given mixtures.

        mixtures: one a rollout, ``T`` positions each. Returns one ``Evaluation`` a rollout, in order.
        """
        self._check(rollouts)
        if mixtures is not None:
            self._check_mixtures(rollouts, mixtures)
        results: dict[int, Evaluation] = {}

        def evaluate(index: list[int]) -> None:
            batch = self._batch(index, [rollouts[i] for i in index])
            if mixtures is None:
                point = Mixture.from_tokens(batch.packing.prefix_ids)
            else:
                point = _concatenate([mixtures[i] for i in index], self.policy.device)
            terms, gradient = self._value_and_grad(batch, point)
            values = self._numbers(batch, terms)
            for i, row, own in zip(index, values, gradient.float().split(batch.packing.lengths), strict=True):
                loss, explore, guide, fluency, _ = row
                results[i] = Evaluation(loss, explore, guide, fluency, own.clone())

        self._in_batches(rollouts, evaluate)
        return [results[i] for i in range(len(rollouts))]

    def revise(self, rollouts: Sequence[FailedRollout]) -> list[Revision]:
        """Revise each rollout's prefix by up to ``config.steps`` steps; one ``Revision`` a rollout, in order.

        Raises InputError for rollouts the model cannot read, ModelError when an objective or gradient is not finite.
        """
        self._check(rollouts)
        done: dict[int, Revision] = {}
        self._in_batches(rollouts, lambda index: self._revise_batch(index, [rollouts[i] for i in index], done))
        return [done[i] for i in range(len(rollouts))]

    def tokens(self, rollout: FailedRollout) -> int:
        """Tokens of a rollout that go through the model in one pass; the cached prompt is not among them."""
        return objective.suffix(rollout, self.config).fed

    def _in_batches(self, rollouts: Sequence[FailedRollout], work: Callable[[list[int]], None]) -> None:
        sizes = [(len(rollout.prompt_ids), self.tokens(rollout)) for rollout in rollouts]
        with self._scope():
            recompute = self.config.recompute
            budget = self.config.token_budget or memory.token_budget(self.policy, recompute)
            memory.in_batches(self.policy, sizes, budget, memory.cached_share(self.policy, recompute), work, "rollout")

    @contextmanager
    def _scope(self) -> Iterator[None]:
        """Model frozen and kernel backend chosen for the duration of a call."""
        backend = nullcontext() if self.config.backend is None else kernels.use_backend(self.config.backend)
        with backend, self.policy.frozen():
            yield

    def _revise_batch(self, index: list[int], rollouts: list[FailedRollout], done: dict[int, Revision]) -> None:
        config = self.config
        began = time.perf_counter()
        batch = self._batch(index, rollouts, candidates=config.hull == "plausible")
        mixture = solver.start(self.hull, batch.packing.prefix_ids, batch.candidates, config)
        progress = {i: _Progress() for i in index}
        if batch.candidates is not None:
            self._charge(batch, progress, 1, 0)
        move: solver.Move | None = None
        evaluate = self._evaluation(batch)
        for k in range(config.steps):
            terms, gradient = evaluate(mixture)
            self._charge(batch, progress, 1 + config.recompute, 1)
            staying = self._record(batch, progress, mixture, terms, move)
            moments = None if move is None else move.moments
            if len(staying) < len(batch.index):
                keep = torch.isin(batch.packing.prefix_row, torch.tensor(staying, device=self.policy.device))
                batch, mixture, gradient = self._leave(batch, staying, keep), mixture[keep], gradient[keep]
                moments = None if moments is None else moments[keep]
                evaluate = self._evaluation(batch)
            if not staying:
                break
            move = solver.advance(
                self.hull, mixture, gradient, batch.packing.prefix_row, batch.candidates, k, config, moments
            )
            mixture = move.mixture
        if batch.index:
            self._charge(batch, progress, 1, 0)
            self._record(batch, progress, mixture, self._value(batch, mixture), move, last=True)
        share = (time.perf_counter() - began) / len(rollouts)
        for i, rollout in zip(index, rollouts, strict=True):
            state = progress[i]
            state.compute.seconds = share
            point = state.point.to("cpu").compact(config.max_candidates if config.solver == "softmax" else None)
            name = rollout.id if rollout.id is not None else str(i)
            done[i] = Revision(
                name, tuple(rollout.prefix_ids), point.ids, point.weights, state.trace, state.compute, point.offset
            )

    def _record(
        self,
        batch: _Batch,
        progress: dict[int, _Progress],
        mixture: Mixture,
        terms: Terms,
        move: solver.Move | None,
        last: bool = False,
    ) -> list[int]:
        """Append an iterate and the move that led to it to the traces, keep it where it is the one to return, and say
        which rows of the batch go on."""
        config, packing, count = self.config, batch.packing, len(batch.rollouts)
        extra = [_mean_by_row(mixture.entropy(), packing.prefix_row, count)]
        if move is not None:
            extra.append(_sum_by_row(move.gap, packing.prefix_row, count))
        if config.iterate == "best" and config.rounding == "argmax":
            extra.append(self._value(batch, Mixture.from_tokens(mixture.argmax_ids())).loss)
            self._charge(batch, progress, 1, 0)
        values = self._numbers(batch, terms, *extra)
        parts = _split(mixture, packing)
        staying = []
        for b, i in enumerate(batch.index):
            trace = progress[i].trace
            loss, explore, guide, fluency, answer, entropy, *rest = values[b]
            if move is not None:
                trace.gap.append(rest.pop(0))
                trace.step.append(move.step)
            trace.loss.append(loss)
            trace.explore.append(explore)
            trace.guide.append(guide)
            trace.fluency.append(fluency)
            trace.entropy.append(entropy)
            trace.rounded_loss += rest
            judged = trace.rounded_loss if rest else trace.loss
            if config.iterate == "last" or judged[-1] < min(judged[:-1], default=float("inf")):
                trace.chosen = len(trace.loss) - 1
                progress[i].point = parts[b]
            if config.stop_guide is not None and config.guide_weight > 0 and answer < config.stop_guide and not last:
                trace.stopped = "guide"
            else:
                staying.append(b)
        return staying

    def _numbers(self, batch: _Batch, terms: Terms, *extra: Tensor) -> list[list[float]]:
        """What a step says of each rollout, in one copy to the host: the terms, then the others.

        Raises ModelError when an objective is not finite.
        """
        columns = (terms.loss, terms.explore, terms.guide, terms.fluency, terms.answer, *extra)
        values = torch.stack([column.detach().float() for column in columns], 1).tolist()
        bad = [b for b, row in enumerate(values) if not math.isfinite(row[0])]
        if bad:
            names = ", ".join(repr(batch.rollouts[b].id or str(batch.index[b])) for b in bad[:5])
            raise ModelError(
                f"the objective of rollout {names} is not finite: the model gives NaN or infinite logits on it; check"
                " the weights and the dtype (float16 overflows where bfloat16 does not)"
            )
        return values

    @staticmethod
    def _charge(batch: _Batch, progress: dict[int, _Progress], forward: int, backward: int) -> None:
        for i, tokens in zip(batch.index, batch.packing.suffix_tokens, strict=True):
            progress[i].compute.forward += forward * tokens
            progress[i].compute.backward += backward * tokens

    def _leave(self, batch: _Batch, staying: list[int], keep: Tensor) -> _Batch:
        """The batch of the rollouts that go on; keep: bool ``[T]``, their positions."""
        if not staying:
            return _Batch([], [], batch.packing, batch.prompt, batch.ready, batch.candidates)
        rollouts = [batch.rollouts[b] for b in staying]
        packing = self._pack(rollouts)
        prompt = batch.prompt.select(torch.tensor(staying, dtype=torch.long, device=self.policy.device))
        candidates = None if batch.candidates is None else batch.candidates[keep]
        ready = self._ready(packing, prompt)
        return _Batch([batch.index[b] for b in staying], rollouts, packing, prompt, ready, candidates)

    def _pack(self, rollouts: Sequence[FailedRollout]) -> Packing:
        rows = [objective.suffix(rollout, self.config) for rollout in rollouts]
        return pack(rows, self.policy.device, self.policy.buckets)

    def _ready(self, packing: Packing, prompt: PromptCache) -> Ready:
        return self.policy.prepare(
            packing.tokens, packing.offset + prompt.lengths.unsqueeze(1), packing.segment, prompt
        )

    def _batch(self, index: list[int], rollouts: list[FailedRollout], *, candidates: bool = False) -> _Batch:
        packing = self._pack(rollouts)
        prompt = self.policy.prompt_cache([r.prompt_ids for r in rollouts])
        ready = self._ready(packing, prompt)
        listed = self._plausible(packing, prompt, ready) if candidates else None
        return _Batch(list(index), rollouts, packing, prompt, ready, listed)

    def _plausible(self, packing: Packing, prompt: PromptCache, ready: Ready) -> Tensor:
        """Candidates ``[T, C + 1]``: what the policy finds plausible at each position of the plain prefix."""
        with torch.no_grad():
            hidden = self.policy.hidden(ready)
            first = torch.ones_like(packing.prefix_row, dtype=torch.bool)
            first[1:] = packing.prefix_row[1:] != packing.prefix_row[:-1]
            before = hidden[(packing.prefix_index - 1).clamp_min(0)]
            before = torch.where(first.unsqueeze(-1), prompt.last_hidden[packing.prefix_row], before)
            ids, _, _ = self.policy.head.plausible(
                before, self.config.p_min, self.config.max_candidates, self.policy.allowed
            )
        return self.hull.plausible(packing.prefix_ids, ids)

    def _terms(self, batch: _Batch, prefix: Tensor) -> Terms:
        packing = batch.packing
        recompute = self.config.recompute and prefix.requires_grad
        hidden = self.policy.hidden(batch.ready, packing.prefix_index, prefix, recompute=recompute)
        scored = packing.scored(hidden, batch.prompt.last_hidden)
        logprobs = self.policy.head.logprob(scored, packing.targets).to(self.policy.device)
        return objective.terms(logprobs, packing.score_row, packing.score_kind, len(batch.rollouts), self.config)

    def _value(self, batch: _Batch, mixture: Mixture) -> Terms:
        with torch.no_grad():
            return self._terms(batch, mixture.embed(self.hull.table))

    def _value_and_grad(self, batch: _Batch, mixture: Mixture) -> tuple[Terms, Tensor]:
        with torch.enable_grad():
            prefix = mixture.embed(self.hull.table).detach().requires_grad_(True)
            terms = self._terms(batch, prefix)
            (gradient,) = torch.autograd.grad(terms.loss.sum(), prefix)
        return terms.detach(), gradient

    def _evaluation(self, batch: _Batch) -> graph.Evaluate:
        """Objective and ``dL/dz`` of a batch, for the steps of a revision."""
        evaluate = partial(self._value_and_grad, batch)
        return graph.Graphed(evaluate) if self.config.cuda_graph else evaluate

    def _check(self, rollouts: Sequence[FailedRollout]) -> None:
        seen: set[str] = set()
        for i, rollout in enumerate(rollouts):
            name = f"rollout {rollout.id if rollout.id is not None else i!r}"
            for part in ("prompt_ids", "prefix_ids", "continuation_ids", "template_ids", "answer_ids"):
                self.policy.check_ids(getattr(rollout, part), f"{name}: {part}")
            if self.config.explore_weight > 0 and not rollout.continuation_ids:
                raise InputError(
                    f"{name}: continuation_ids is empty, so there is no failed continuation to move away from; cut the"
                    " prefix earlier or set explore_weight=0"
                )
            row = objective.suffix(rollout, self.config)
            length = len(rollout.prompt_ids) + len(rollout.prefix_ids) + max(len(row.failed), len(row.gold))
            self.policy.check_length(length, name)
            if rollout.id is not None and rollout.id in seen:
                raise InputError(f"{name}: the id appears twice; give each rollout an id of its own, or none")
            seen.add(rollout.id or "")

    def _check_mixtures(self, rollouts: Sequence[FailedRollout], mixtures: Sequence[Mixture]) -> None:
        if len(mixtures) != len(rollouts):
            raise InputError(f"{len(rollouts)} rollouts but {len(mixtures)} mixtures; pass one a rollout, or none")
        for i, (rollout, mixture) in enumerate(zip(rollouts, mixtures, strict=True)):
            if len(mixture) != len(rollout.prefix_ids):
                raise InputError(
                    f"mixture {i} has {len(mixture)} positions, its rollout's prefix {len(rollout.prefix_ids)} tokens"
                )


def _concatenate(mixtures: list[Mixture], device: torch.device) -> Mixture:
    width = max(m.ids.shape[1] for m in mixtures)
    ids, weights = [], []
    for mixture in mixtures:
        free = width - mixture.ids.shape[1]
        ids.append(torch.cat([mixture.ids, mixture.ids[:, :1].expand(-1, free)], 1))
        weights.append(torch.nn.functional.pad(mixture.weights, (0, free)))
    offset = None
    if any(m.offset is not None for m in mixtures):
        width = next(m.offset.shape[1] for m in mixtures if m.offset is not None)
        offset = torch.cat([torch.zeros(len(m), width) if m.offset is None else m.offset.cpu() for m in mixtures])
    joined = Mixture(torch.cat([i.cpu() for i in ids]), torch.cat([w.cpu() for w in weights]), offset)
    return joined.to(device)


def _split(mixture: Mixture, packing: Packing) -> list[Mixture]:
    return [mixture[rows] for rows in torch.arange(len(mixture), device=mixture.ids.device).split(packing.lengths)]


def _sum_by_row(values: Tensor, rows: Tensor, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.float32, device=values.device).index_add(0, rows, values.float())


def _mean_by_row(values: Tensor, rows: Tensor, count: int) -> Tensor:
    return _sum_by_row(values, rows, count) / _sum_by_row(torch.ones_like(values), rows, count).clamp_min(1)
