"""The batched reviser: failed rollouts in, revised prefixes out, model frozen.

One step for a whole batch: one packed forward pass over all prefixes and both branches of each, the loss and ``dL/dH``
from ``linear_logprob``, the body's backward pass to ``dL/dz``, and the update of the atoms. The prompts' keys and
values are computed once and reused by all steps; a prefix that is finished leaves the batch.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from latentrevise import kernels
from latentrevise.errors import InputError, ModelError
from latentrevise.model import memory
from latentrevise.model.compute import Compute
from latentrevise.model.packing import Packing, pack, suffix_length
from latentrevise.model.policy import Policy, PromptCache, Ready
from latentrevise.revise import solver
from latentrevise.revise.hull import Mixture, VocabularyHull
from latentrevise.revise.objective import branch_losses
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


@dataclass(frozen=True)
class _Losses:
    total: Tensor  # [B]
    gold: Tensor
    away: Tensor


@dataclass
class _Progress:
    """One rollout's way through its revision; ``point`` is the iterate to return, as far as it is known."""

    trace: Trace = field(default_factory=Trace)
    compute: Compute = field(default_factory=Compute)
    point: Mixture = field(default_factory=lambda: Mixture(torch.empty(0, 1), torch.empty(0, 1)))


class Reviser:
    """Revise the reasoning prefixes of failed rollouts inside the hull of the vocabulary's embeddings.

    model: a causal LM of transformers, on any device; its parameters, gradients, modes and hooks are left as they are.
    config: see ``ReviseConfig``. tokenizer: keeps special tokens and padded rows of the table out of the hull.
    Source: arXiv 2606.29938.
    """

    def __init__(
        self,
        model: PreTrainedModel | Policy,
        config: ReviseConfig | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.policy = model if isinstance(model, Policy) else Policy(model, tokenizer)
        self.config = config or ReviseConfig()
        self.hull = VocabularyHull.from_policy(self.policy)

    def value_and_grad(
        self, rollouts: Sequence[FailedRollout], mixtures: Sequence[Mixture] | None = None
    ) -> list[Evaluation]:
        """The objective and ``dL/dz`` of each rollout, at the plain prefix or at the given mixtures.

        mixtures: one a rollout, ``T`` positions each. The gradient is that of ``alpha * gold + beta * away`` whatever
        ``config.combine`` says. Returns one ``Evaluation`` a rollout, in order.
        """
        self._check(rollouts)
        if mixtures is not None:
            self._check_mixtures(rollouts, mixtures)
        config = dataclasses.replace(self.config, combine="sum")
        results: dict[int, Evaluation] = {}

        def evaluate(index: list[int]) -> None:
            batch = self._batch(index, [rollouts[i] for i in index], config)
            if mixtures is None:
                point = Mixture.from_tokens(batch.packing.prefix_ids)
            else:
                point = _concatenate([mixtures[i] for i in index], self.policy.device)
            losses, gradients, _ = self._value_and_grad(batch, point, config)
            parts = gradients.gold.float().split(batch.packing.lengths)
            for b, i in enumerate(index):
                results[i] = Evaluation(
                    float(losses.total[b]), float(losses.gold[b]), float(losses.away[b]), parts[b].clone()
                )

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

    def _in_batches(self, rollouts: Sequence[FailedRollout], work: Callable[[list[int]], None]) -> None:
        sizes = [(len(rollout.prompt_ids), suffix_length(rollout, self.config)) for rollout in rollouts]
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
        batch = self._batch(index, rollouts, config, candidates=config.hull == "plausible")
        mixture = solver.start(self.hull, batch.packing.prefix_ids, batch.candidates, config)
        progress = {i: _Progress() for i in index}
        if batch.candidates is not None:
            self._charge(batch, progress, 1, 0)

        def evaluate(point: Mixture) -> Tensor:
            self._charge(batch, progress, 1, 0)
            return self._value(batch, point, config).total

        for k in range(config.steps):
            losses, gradients, passes = self._value_and_grad(batch, mixture, config)
            self._charge(batch, progress, 1 + passes * config.recompute, passes)
            self._record(batch, progress, mixture, losses)
            rows = batch.packing.prefix_row
            move = solver.advance(
                self.hull, mixture, gradients, rows, batch.candidates, losses.total, evaluate, k, config
            )
            gap = _sum_by_row(move.gap, rows, len(batch.rollouts))
            size = _mean_by_row(move.step, rows, len(batch.rollouts))
            staying = []
            for b, i in enumerate(batch.index):
                trace = progress[i].trace
                trace.gap.append(float(gap[b]))
                stopped = self._stopped(trace)
                trace.step.append(0.0 if stopped else float(size[b]))
                if stopped:
                    trace.stopped = stopped
                else:
                    staying.append(b)
            mixture = move.mixture
            if len(staying) < len(batch.index):
                batch, mixture = self._leave(batch, mixture, staying)
            if not staying:
                break
        if batch.index:
            self._charge(batch, progress, 1, 0)
            self._record(batch, progress, mixture, self._value(batch, mixture, config))
        share = (time.perf_counter() - began) / len(rollouts)
        for i, rollout in zip(index, rollouts, strict=True):
            state = progress[i]
            state.compute.seconds = share
            point = state.point.compact(config.max_candidates if config.solver == "softmax" else None).to("cpu")
            name = rollout.id if rollout.id is not None else str(i)
            done[i] = Revision(
                name, tuple(rollout.prefix_ids), point.ids, point.weights, state.trace, state.compute, point.offset
            )

    def _record(self, batch: _Batch, progress: dict[int, _Progress], mixture: Mixture, losses: _Losses) -> None:
        """Append an iterate to the traces, and keep it where it is the one to return."""
        entropy = _mean_by_row(mixture.entropy(), batch.packing.prefix_row, len(batch.rollouts))
        parts = _split(mixture, batch.packing)
        rounded = None
        if self.config.iterate == "best" and self.config.rounding == "argmax":
            rounded = self._value(batch, Mixture.from_tokens(mixture.argmax_ids()), self.config).total
            self._charge(batch, progress, 1, 0)
        for b, i in enumerate(batch.index):
            trace = progress[i].trace
            trace.loss.append(float(losses.total[b]))
            trace.gold_nll.append(float(losses.gold[b]))
            trace.away.append(float(losses.away[b]))
            trace.entropy.append(float(entropy[b]))
            judged = trace.loss
            if rounded is not None:
                trace.rounded_loss.append(float(rounded[b]))
                judged = trace.rounded_loss
            if self.config.iterate == "last" or judged[-1] < min(judged[:-1], default=float("inf")):
                trace.chosen = len(trace.loss) - 1
                progress[i].point = parts[b]

    @staticmethod
    def _charge(batch: _Batch, progress: dict[int, _Progress], forward: int, backward: int) -> None:
        for i, tokens in zip(batch.index, batch.packing.suffix_tokens, strict=True):
            progress[i].compute.forward += forward * tokens
            progress[i].compute.backward += backward * tokens

    def _stopped(self, trace: Trace) -> Literal["gap", "nll"] | None:
        config = self.config
        if config.stop_nll is not None and trace.gold_nll[-1] <= config.stop_nll:
            return "nll"
        if config.stop_gap is not None and trace.gap[-1] <= config.stop_gap:
            return "gap"
        return None

    def _leave(self, batch: _Batch, mixture: Mixture, staying: list[int]) -> tuple[_Batch, Mixture]:
        rows = torch.tensor(staying, dtype=torch.long, device=self.policy.device)
        keep = torch.isin(batch.packing.prefix_row, rows)
        rollouts = [batch.rollouts[b] for b in staying]
        packing = pack(rollouts, self.config, self.policy.device, self.policy.buckets) if rollouts else batch.packing
        prompt = batch.prompt.select(rows)
        ready = self._ready(packing, prompt) if rollouts else batch.ready
        candidates = None if batch.candidates is None else batch.candidates[keep]
        return _Batch([batch.index[b] for b in staying], rollouts, packing, prompt, ready, candidates), mixture[keep]

    def _ready(self, packing: Packing, prompt: PromptCache) -> Ready:
        return self.policy.prepare(
            packing.tokens, packing.offset + prompt.lengths.unsqueeze(1), packing.segment, prompt
        )

    def _batch(
        self, index: list[int], rollouts: list[FailedRollout], config: ReviseConfig, *, candidates: bool = False
    ) -> _Batch:
        packing = pack(rollouts, config, self.policy.device, self.policy.buckets)
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

    def _losses(self, batch: _Batch, prefix: Tensor, config: ReviseConfig) -> _Losses:
        packing = batch.packing
        recompute = config.recompute and prefix.requires_grad
        hidden = self.policy.hidden(batch.ready, packing.prefix_index, prefix, recompute=recompute)
        logprobs = self.policy.head.logprob(hidden.index_select(0, packing.score_index), packing.targets)
        gold, away = branch_losses(logprobs, packing.score_row, packing.score_gold, len(batch.rollouts), config)
        losses = _Losses(config.alpha * gold + config.beta * away, gold, away)
        bad = (~torch.isfinite(losses.total)).nonzero().flatten().tolist()
        if bad:
            names = ", ".join(repr(batch.rollouts[b].id or str(batch.index[b])) for b in bad[:5])
            raise ModelError(
                f"the objective of rollout {names} is not finite: the model gives NaN or infinite logits on it;"
                " check the"
                " weights and the dtype (float16 overflows where bfloat16 does not)"
            )
        return losses

    def _value(self, batch: _Batch, mixture: Mixture, config: ReviseConfig) -> _Losses:
        with torch.no_grad():
            return self._losses(batch, mixture.embed(self.hull.table), config)

    def _value_and_grad(
        self, batch: _Batch, mixture: Mixture, config: ReviseConfig
    ) -> tuple[_Losses, solver.Gradients, int]:
        """Losses, gradients and the number of backward passes they took."""
        with torch.enable_grad():
            prefix = mixture.embed(self.hull.table).detach().requires_grad_(True)
            losses = self._losses(batch, prefix, config)
            if config.combine == "sum" or config.alpha == 0 or config.beta == 0:
                (gradient,) = torch.autograd.grad(losses.total.sum(), prefix)
                gradients = solver.Gradients(gradient, None, 1.0, 0.0, config.combine)
                passes = 1
            else:
                (gold,) = torch.autograd.grad(losses.gold.sum(), prefix, retain_graph=True)
                (away,) = torch.autograd.grad(losses.away.sum(), prefix)
                gradients = solver.Gradients(gold, away, config.alpha, config.beta, config.combine)
                passes = 2
        detached = _Losses(losses.total.detach(), losses.gold.detach(), losses.away.detach())
        return detached, gradients, passes

    def _check(self, rollouts: Sequence[FailedRollout]) -> None:
        seen: set[str] = set()
        for i, rollout in enumerate(rollouts):
            name = f"rollout {rollout.id if rollout.id is not None else i!r}"
            for part in ("prompt_ids", "prefix_ids", "continuation_ids", "template_ids", "answer_ids"):
                self.policy.check_ids(getattr(rollout, part), f"{name}: {part}")
            if self.config.beta > 0 and not rollout.continuation_ids:
                raise InputError(
                    f"{name}: continuation_ids is empty, so there is no failed continuation to move away from; cut"
                    " the prefix"
                    " earlier or set beta=0"
                )
            branch = max(
                len(rollout.template_ids) + len(rollout.answer_ids),
                min(len(rollout.continuation_ids), self.config.away_window),
            )
            length = len(rollout.prompt_ids) + len(rollout.prefix_ids) + branch
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
    return Mixture(torch.cat(ids).to(device), torch.cat(weights).to(device))


def _split(mixture: Mixture, packing: Packing) -> list[Mixture]:
    return [mixture[rows] for rows in torch.arange(len(mixture), device=mixture.ids.device).split(packing.lengths)]


def _sum_by_row(values: Tensor, rows: Tensor, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.float32, device=values.device).index_add(0, rows, values.float())


def _mean_by_row(values: Tensor, rows: Tensor, count: int) -> Tensor:
    return _sum_by_row(values, rows, count) / torch.bincount(rows, minlength=count).clamp_min(1)
