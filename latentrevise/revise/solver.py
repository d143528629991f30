"""One step of the optimisation over the hull: Frank-Wolfe with its step rules, and entropic mirror descent; beside them
the ablations: a random vertex in place of the oracle's, no hull at all, a softmax over the whole vocabulary.

A step is given the branch gradients at ``z`` and returns the next mixture. It never sees the model: where a rule
needs the objective (line search), it is handed a function that evaluates mixtures.

Which rules exist is our own decision; the public record (arXiv 2606.29938) says Frank-Wolfe in the vocabulary's hull.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from latentrevise import kernels
from latentrevise.data.records import row_seed
from latentrevise.revise.hull import Mixture, VocabularyHull
from latentrevise.revise.revision import ReviseConfig


@dataclass(frozen=True)
class Gradients:
    """Branch gradients at ``z``, ``[T, d]`` each. With ``combine="sum"`` they were summed, weights included, by one
    backward pass: ``away`` is None and ``alpha`` is 1."""

    gold: Tensor
    away: Tensor | None
    alpha: float
    beta: float
    combine: str


@dataclass(frozen=True)
class Move:
    """The mixture after a step; ``gap [T]`` at the point before it; ``step [T]``, the gamma (or rate) of each
    position."""

    mixture: Mixture
    gap: Tensor
    step: Tensor


Evaluate = Callable[[Mixture], Tensor]  # the objective of each rollout at a mixture, float32 [B]


def start(hull: VocabularyHull, token_ids: Tensor, candidates: Tensor | None, config: ReviseConfig) -> Mixture:
    """The first iterate: the prefix's own tokens; for the entropic solver mass spread over the candidates, for the
    softmax over all allowed vertices."""
    if config.solver == "entropic":
        assert candidates is not None  # ReviseConfig ties the entropic solver to the plausible hull
        return Mixture.spread(token_ids, candidates, config.mass)
    if config.solver == "softmax":
        every = torch.arange(hull.vocabulary, device=token_ids.device).expand(len(token_ids), -1)
        listed = hull.allowed | (every == token_ids.unsqueeze(-1))
        return Mixture.spread(token_ids, every.masked_fill(~listed, -1), config.mass)
    return Mixture.from_tokens(token_ids, config.atoms)


def advance(
    hull: VocabularyHull,
    mixture: Mixture,
    gradients: Gradients,
    rows: Tensor,
    candidates: Tensor | None,
    loss: Tensor,
    evaluate: Evaluate,
    k: int,
    config: ReviseConfig,
) -> Move:
    """Step ``k`` (from 0) of all prefixes of a batch.

    rows: int64 ``[T]``, the rollout of each position; candidates: int64 ``[T, C]`` padded with -1, or None for the
    full hull;
    loss: ``[B]``, the objective at ``mixture``.
    """
    if config.solver == "entropic":
        return _entropic(hull, mixture, gradients, rows, config)
    if config.solver == "softmax":
        return _softmax(hull, mixture, gradients, config)
    if config.solver == "unconstrained":
        return _unconstrained(hull, mixture, gradients, k, config)
    gamma = _known_step(k, config)
    if gamma is not None:
        step = _hull_step(hull, mixture, gradients, candidates, gamma, k)
        return Move(Mixture(step.ids, step.weights), step.gap, torch.full_like(step.gap, gamma))
    probe = _hull_step(hull, mixture, gradients, candidates, 0.0, k)
    moving = _largest_gaps(probe.gap, rows, config.update_fraction)
    vertex = probe.vertex
    if config.solver == "random":
        vertex = _random_vertices(hull, mixture, rows, candidates, k, config)
    if config.step_rule == "short":
        distance = (hull.table[vertex].float() - probe.z.float()).square().sum(-1)
        size = (config.step_size * probe.gap / distance.clamp_min(1e-12)).clamp(0.0, 1.0)
    elif config.step_rule == "line-search":
        size = _line_search(mixture, vertex, moving, rows, loss, evaluate, k, config)[rows]
    else:
        size = torch.full_like(probe.gap, _schedule(k, config))
    size = size * moving
    return Move(mixture.step(vertex, size, slot=k + 1), probe.gap, size)


def _schedule(k: int, config: ReviseConfig) -> float:
    return config.step_size if config.step_rule == "constant" else min(1.0, config.step_size * 2.0 / (k + 2.0))


def _known_step(k: int, config: ReviseConfig) -> float | None:
    """The step size, where it depends neither on the gap nor on the objective: then one fused kernel makes the step."""
    if (
        config.solver == "frank-wolfe"
        and config.step_rule in ("constant", "harmonic")
        and config.update_fraction == 1.0
    ):
        return _schedule(k, config)
    return None


def _hull_step(
    hull: VocabularyHull, mixture: Mixture, gradients: Gradients, candidates: Tensor | None, gamma: float, k: int
) -> kernels.HullStep:
    return kernels.hull_step(
        gradients.gold,
        gradients.away,
        hull.table,
        mixture.ids,
        mixture.weights,
        gamma,
        slot=k + 1,
        alpha=gradients.alpha,
        beta=gradients.beta,
        combine=gradients.combine,
        allowed=hull.allowed if candidates is None else None,
        candidates=candidates,
    )


def _entropic(hull: VocabularyHull, mixture: Mixture, gradients: Gradients, rows: Tensor, config: ReviseConfig) -> Move:
    step = kernels.entropic_step(
        gradients.gold,
        gradients.away,
        hull.table,
        mixture.ids,
        mixture.weights,
        config.step_size,
        alpha=gradients.alpha,
        beta=gradients.beta,
        combine=gradients.combine,
        segments=rows,
    )
    weights = step.weights
    if config.update_fraction < 1.0:
        weights = torch.where(
            _largest_gaps(step.gap, rows, config.update_fraction).unsqueeze(-1), weights, mixture.weights
        )
    return Move(Mixture(mixture.ids, weights), step.gap, torch.full_like(step.gap, config.step_size))


def _combined(gradients: Gradients) -> Tensor:
    """``alpha * gold + beta * away`` in float32, ``[T, d]``; each normalised first, where the settings say so."""

    def part(weight: float, gradient: Tensor) -> Tensor:
        gradient = gradient.float()
        return weight * (normalize(gradient, dim=-1) if gradients.combine == "normalized" else gradient)

    total = part(gradients.alpha, gradients.gold)
    return total if gradients.away is None else total + part(gradients.beta, gradients.away)


def _softmax(hull: VocabularyHull, mixture: Mixture, gradients: Gradients, config: ReviseConfig) -> Move:
    """Gradient descent on the logits ``theta`` of ``z = softmax(theta) E``: the steepest entry of a row moves by
    ``step_size`` nats."""
    gradient = _combined(gradients)
    theta = mixture.weights.log()
    with torch.enable_grad():
        leaf = theta.clone().requires_grad_(True)
        z = kernels.softmax_mixture(leaf, hull.table)
        (slope,) = torch.autograd.grad(z, leaf, gradient.to(z.dtype))
    steepest = slope.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    weights = torch.softmax(theta - config.step_size * slope / steepest, -1)
    _, lowest = kernels.vertex_oracle(gradient, hull.table, hull.allowed)
    gap = (gradient * z.detach().float()).sum(-1) - lowest
    return Move(Mixture(mixture.ids, weights), gap, torch.full_like(gap, config.step_size))


def _unconstrained(hull: VocabularyHull, mixture: Mixture, gradients: Gradients, k: int, config: ReviseConfig) -> Move:
    """A step against the gradient, as long as the Frank-Wolfe step would have been: only the hull is gone."""
    gradient, z = _combined(gradients), mixture.embed(hull.table).float()
    vertex, lowest = kernels.vertex_oracle(gradient, hull.table, hull.allowed)
    gap = (gradient * z).sum(-1) - lowest
    gamma = _schedule(k, config)
    length = gamma * (hull.table[vertex].float() - z).norm(dim=-1, keepdim=True)
    moved = -length * normalize(gradient, dim=-1)
    offset = moved if mixture.offset is None else mixture.offset + moved
    return Move(Mixture(mixture.ids, mixture.weights, offset), gap, torch.full_like(gap, gamma))


def _random_vertices(
    hull: VocabularyHull, mixture: Mixture, rows: Tensor, candidates: Tensor | None, k: int, config: ReviseConfig
) -> Tensor:
    """A uniformly drawn vertex of each position, int64 ``[T]``. A rollout's draws depend on its own tokens and the
    seed, so that no batch changes them."""
    tokens = mixture.ids[:, 0].tolist()  # the original ones: atoms are only ever added behind them
    draws = []
    for length in torch.bincount(rows).tolist():
        own, tokens = tokens[:length], tokens[length:]
        draw = torch.Generator().manual_seed(row_seed(config.seed, "vertex", k, *own))
        draws.append(torch.rand(length, generator=draw))
    drawn = torch.cat(draws).to(mixture.ids.device).unsqueeze(-1)
    if candidates is None:
        candidates = hull.allowed.nonzero().T.expand(len(drawn), -1)
    count = (candidates >= 0).sum(-1, keepdim=True)
    return candidates.gather(1, (drawn * count).long().clamp(max=count - 1)).squeeze(1)


def _largest_gaps(gap: Tensor, rows: Tensor, fraction: float) -> Tensor:
    """bool ``[T]``: the ``ceil(fraction * T_b)`` positions of each rollout with the largest gaps; first ones on
    ties."""
    if fraction == 1.0:
        return torch.ones_like(gap, dtype=torch.bool)
    by_gap = gap.argsort(descending=True, stable=True)
    order = by_gap[rows[by_gap].argsort(stable=True)]
    length = torch.bincount(rows)
    first = length.cumsum(0) - length
    rank = torch.arange(len(gap), device=gap.device) - first[rows[order]]
    chosen = torch.zeros_like(gap, dtype=torch.bool)
    chosen[order] = rank < (fraction * length).ceil()[rows[order]]
    return chosen


def _line_search(
    mixture: Mixture,
    vertex: Tensor,
    moving: Tensor,
    rows: Tensor,
    loss: Tensor,
    evaluate: Evaluate,
    k: int,
    config: ReviseConfig,
) -> Tensor:
    """The step size of the grid, or 0, with the lowest objective for each rollout, float32 ``[B]``."""
    best, size = loss.clone(), torch.zeros_like(loss)
    for gamma in config.line_search_grid:
        tried = evaluate(mixture.step(vertex, gamma * moving.float(), slot=k + 1))
        better = tried < best
        best, size = torch.where(better, tried, best), torch.where(better, gamma, size)
    return size
