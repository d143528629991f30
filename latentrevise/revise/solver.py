"""One step of the optimisation over the hull (arXiv 2606.29938, Algorithm 1), and what it is compared with.

    v_t = argmin over the vertices of <g_t, E_v>,   z_t <- (1 - gamma_i) z_t + gamma_i E_{v_t}

Besides Frank-Wolfe there is entropic mirror descent over plausible candidates, and the ablations: a random vertex in
place of the oracle's, a free optimiser without a hull, a softmax over the whole vocabulary. A step is given the
gradient at ``z`` and returns the next mixture. It never sees the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latentrevise import kernels
from latentrevise.data.records import row_seed
from latentrevise.revise.hull import Mixture, VocabularyHull
from latentrevise.revise.revision import ReviseConfig

_BETAS, _EPSILON = (0.9, 0.999), 1e-8  # Adam's usual ones


@dataclass(frozen=True)
class Moments:
    """Adam's running means of the gradient and of its square, float32 ``[T, d]``."""

    first: Tensor
    second: Tensor

    def __getitem__(self, rows: Tensor) -> Moments:
        return Moments(self.first[rows], self.second[rows])


@dataclass(frozen=True)
class Move:
    """The mixture after a step; ``gap [T]`` at the point before it; ``step``, the gamma (or rate); moments: Adam's."""

    mixture: Mixture
    gap: Tensor
    step: float
    moments: Moments | None = None


def start(hull: VocabularyHull, token_ids: Tensor, candidates: Tensor | None, config: ReviseConfig) -> Mixture:
    """The first iterate: the prefix's own tokens; for the entropic solver mass spread over the candidates, for the
    softmax over all vertices."""
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
    gradient: Tensor,
    rows: Tensor,
    candidates: Tensor | None,
    k: int,
    config: ReviseConfig,
    moments: Moments | None = None,
) -> Move:
    """Step ``k`` (from 0) of all prefixes of a batch.

    gradient: ``dL/dz [T, d]``. rows: int64 ``[T]``, the rollout of each position; candidates: int64 ``[T, C]`` padded
    with -1, or None for the full hull; moments: of the step before, for Adam.
    """
    if config.solver == "entropic":
        step = kernels.entropic_step(
            gradient, None, hull.table, mixture.ids, mixture.weights, config.step_size, segments=rows
        )
        return Move(Mixture(mixture.ids, step.weights), step.gap, config.step_size)
    if config.solver == "softmax":
        return _softmax(hull, mixture, gradient, config)
    if config.solver == "adam":
        return _adam(hull, mixture, gradient, k, config, moments)
    gamma = schedule(k, config)
    moved = kernels.hull_step(
        gradient,
        None,
        hull.table,
        mixture.ids,
        mixture.weights,
        gamma if config.solver == "frank-wolfe" else 0.0,
        slot=k + 1,
        allowed=hull.allowed if candidates is None else None,
        candidates=candidates,
    )
    if config.solver == "random":
        vertex = _random_vertices(hull, mixture, rows, candidates, k, config)
        return Move(mixture.step(vertex, torch.full_like(moved.gap, gamma), slot=k + 1), moved.gap, gamma)
    return Move(Mixture(moved.ids, moved.weights), moved.gap, gamma)


def schedule(k: int, config: ReviseConfig) -> float:
    """gamma of step ``k`` (from 0): the paper's ``gamma_0 * 2 / (i + 1)`` with i = k + 1, or a constant."""
    return config.step_size if config.step_rule == "constant" else min(1.0, config.step_size * 2.0 / (k + 2.0))


def _gap(hull: VocabularyHull, gradient: Tensor, z: Tensor) -> Tensor:
    _, lowest = kernels.vertex_oracle(gradient, hull.table, hull.allowed)
    return (gradient.float() * z.float()).sum(-1) - lowest


def _softmax(hull: VocabularyHull, mixture: Mixture, gradient: Tensor, config: ReviseConfig) -> Move:
    """Gradient descent on the logits ``theta`` of ``z = softmax(theta) E``: the steepest entry of a row moves by
    ``step_size`` nats."""
    theta = mixture.weights.log()
    with torch.enable_grad():
        leaf = theta.clone().requires_grad_(True)
        z = kernels.softmax_mixture(leaf, hull.table)
        (slope,) = torch.autograd.grad(z, leaf, gradient.to(z.dtype))
    steepest = slope.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    weights = torch.softmax(theta - config.step_size * slope / steepest, -1)
    return Move(Mixture(mixture.ids, weights), _gap(hull, gradient, z.detach()), config.step_size)


def _adam(
    hull: VocabularyHull, mixture: Mixture, gradient: Tensor, k: int, config: ReviseConfig, moments: Moments | None
) -> Move:
    """Adam on the embeddings themselves. Its learning rate is ``step_size`` times the root mean square of the table's
    entries, so that one value fits any model; the schedule is the same as of the hull's steps."""
    g, z = gradient.float(), mixture.embed(hull.table)
    first, second = (torch.zeros_like(g), torch.zeros_like(g)) if moments is None else (moments.first, moments.second)
    first = torch.lerp(g, first, _BETAS[0])
    second = torch.lerp(g.square(), second, _BETAS[1])
    unit = hull.table.float().square().mean().sqrt()
    direction = (first / (1 - _BETAS[0] ** (k + 1))) / ((second / (1 - _BETAS[1] ** (k + 1))).sqrt() + _EPSILON)
    rate = schedule(k, config)
    moved = -rate * unit * direction
    offset = moved if mixture.offset is None else mixture.offset + moved
    after = Mixture(mixture.ids, mixture.weights, offset)
    return Move(after, _gap(hull, gradient, z), rate, Moments(first, second))


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
        draws.append(torch.rand(length, generator=draw, dtype=torch.float64))
    drawn = torch.cat(draws).to(mixture.ids.device).unsqueeze(-1)
    if candidates is None:
        candidates = hull.allowed.nonzero().T.expand(len(drawn), -1)
    count = (candidates >= 0).sum(-1, keepdim=True)
    return candidates.gather(1, (drawn * count).long().clamp(max=count - 1)).squeeze(1)
