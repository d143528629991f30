"""What goes into the reviser and what comes out: failed rollouts, settings, evaluations, revisions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from latentrevise.errors import ConfigError, InputError
from latentrevise.model.compute import Compute
from latentrevise.revise.hull import Mixture, VocabularyHull


@dataclass(frozen=True)
class FailedRollout:
    """One failed rollout, split where its revision ends, and the answer it should have reached.

    Every field of ids is a 1-D sequence of ints (list, array or tensor).

    prompt_ids: the prompt ``x``, chat template applied. Not revised; its keys and values are computed once.
    prefix_ids: the reasoning prefix ``r`` (``T`` tokens) whose input embeddings are revised.
    continuation_ids: the failed continuation ``c``. Only its first ``away_window`` tokens enter the objective; may be
        empty when ``beta`` is 0.
    answer_ids: the gold answer's tokens; they alone are scored.
    template_ids: tokens between the prefix and the answer (say "The answer is \\boxed{"), read but not scored.
    id: any string; the position in the list when left out.
    """

    prompt_ids: Sequence[int]
    prefix_ids: Sequence[int]
    continuation_ids: Sequence[int]
    answer_ids: Sequence[int]
    id: str | None = None
    template_ids: Sequence[int] = ()

    def __post_init__(self) -> None:
        for name in ("prompt_ids", "prefix_ids", "continuation_ids", "answer_ids", "template_ids"):
            object.__setattr__(self, name, _ids(getattr(self, name), name, self.id))
        empty = {
            "prompt_ids": "a causal model needs at least one prompt token; put the BOS token there",
            "prefix_ids": "there is nothing to revise; cut the rollout at its first token or later",
            "answer_ids": "there is nothing to move toward; check the gold answer and the tokenizer",
        }
        for name, remedy in empty.items():
            if not getattr(self, name):
                raise InputError(f"rollout {self.id!r}: {name} is empty: {remedy}")


def _ids(value: Sequence[int], name: str, rollout: str | None) -> tuple[int, ...]:
    tensor = torch.as_tensor(value)
    if tensor.ndim != 1 or (tensor.numel() and (tensor.is_floating_point() or tensor.dtype == torch.bool)):
        raise InputError(
            f"rollout {rollout!r}: {name} has shape {tuple(tensor.shape)} and dtype {tensor.dtype};"
            " pass one flat sequence of token ids"
        )
    ids = tuple(int(i) for i in tensor.tolist())
    if any(i < 0 for i in ids):
        raise InputError(f"rollout {rollout!r}: {name} holds a negative id; drop padding before building the rollout")
    return ids


StepRule = Literal["constant", "harmonic", "short", "line-search"]


@dataclass(frozen=True)
class ReviseConfig:
    """How a prefix is revised. The defaults are the published method as far as the public record fixes it
    (arXiv 2606.29938: two gradients, full hull, Frank-Wolfe, K = 10); the rest is our own decision.

    steps: ``K``.
    solver: ``frank-wolfe`` moves toward one vertex a step; ``entropic`` is mirror descent on the mixture weights over
        the plausible candidates. Ablations: ``random``, toward a random vertex in place of the oracle's;
        ``unconstrained``, a step against the gradient of the length that the Frank-Wolfe step would have, out of the
        hull; ``softmax``, gradient descent on the logits of a mixture of the whole vocabulary, of which the
        ``max_candidates`` heaviest atoms are returned.
    hull: ``full``, every allowed token; ``plausible``, at each position the tokens with probability of at least
        ``p_min`` under the policy after the original prefix (at most ``max_candidates``), and the original one.
    step_rule, step_size: Frank-Wolfe: ``constant`` gamma = step_size; ``harmonic`` gamma = step_size * 2 / (k + 2), at
        most 1; ``short`` gamma = min(1, step_size * gap / ||E_v - z||^2), step_size being the inverse smoothness
        constant; ``line-search`` the best of ``line_search_grid`` for the whole prefix, or none. Entropic: step_size
        is the rate eta. Softmax: step_size is how far the steepest logit of a position moves, in nats.
    mass: entropic and softmax: the share of weight spread over the candidates at the start, in (0, 1].
    alpha, beta: weights of the gold and of the away gradient.
    away: ``unlikelihood``, -log(1 - p); ``clipped``, -min(NLL, away_ceiling). Both bounded where it matters.
    away_window: the first tokens of the failed continuation that are pushed away.
    combine: ``sum``; or ``normalized``, each gradient divided by its norm at each position (two backward passes).
    update_fraction: share of the positions, those with the largest gaps, that move in a step.
    stop_gap, stop_nll: a prefix is finished when its summed gap, or its gold NLL per token, is at most this.
    iterate: ``last``, or ``best``: the iterate with the lowest objective, taken at what is continued from: with
        ``rounding="argmax"`` that is the rounded prefix, at one more forward pass an iterate.
    rounding: ``none`` keeps the latent; ``argmax`` continues from the heaviest atoms, as plain tokens.
    token_budget: padded tokens (prefix and branches) in one batch, those of a cached prompt counting as the share of
        one that they take in memory; None: what the free memory allows. Where it does not suffice, half as many are
        tried.
    recompute: activation checkpointing: layers keep only their inputs and run again in the backward pass, about a third
        more work for several times as many tokens in the same memory. The compute counts it.
    backend: kernel implementation; None lets the dispatch decide.
    seed: of the random choices, where a solver makes any.
    """

    steps: int = 10
    solver: Literal["frank-wolfe", "entropic", "random", "unconstrained", "softmax"] = "frank-wolfe"
    hull: Literal["full", "plausible"] = "full"
    p_min: float = 1e-4
    max_candidates: int = 64
    step_rule: StepRule = "constant"
    step_size: float = 0.1
    line_search_grid: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
    mass: float = 0.9
    alpha: float = 1.0
    beta: float = 0.3
    away: Literal["unlikelihood", "clipped"] = "unlikelihood"
    away_window: int = 8
    away_ceiling: float = 3.0
    combine: Literal["sum", "normalized"] = "sum"
    update_fraction: float = 1.0
    stop_gap: float | None = None
    stop_nll: float | None = None
    iterate: Literal["last", "best"] = "last"
    rounding: Literal["none", "argmax"] = "none"
    token_budget: int | None = None
    recompute: bool = False
    backend: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {
            "steps": (self.steps >= 1, "at least 1"),
            "p_min": (0.0 < self.p_min < 1.0, "in (0, 1)"),
            "max_candidates": (self.max_candidates >= 1, "at least 1"),
            "step_size": (self.step_size > 0, "positive"),
            "mass": (0.0 < self.mass <= 1.0, "in (0, 1]"),
            "alpha": (self.alpha >= 0, "0 or more"),
            "beta": (self.beta >= 0, "0 or more"),
            "away_window": (self.away_window >= 1, "at least 1"),
            "away_ceiling": (self.away_ceiling > 0, "positive"),
            "update_fraction": (0.0 < self.update_fraction <= 1.0, "in (0, 1]"),
            "token_budget": (self.token_budget is None or self.token_budget >= 1, "None or at least 1"),
        }
        for name, (good, wanted) in checks.items():
            if not good:
                raise ConfigError(f"ReviseConfig.{name} = {getattr(self, name)!r}: it must be {wanted}")
        if self.alpha == 0 and self.beta == 0:
            raise ConfigError(
                "ReviseConfig: alpha and beta are both 0, so there is nothing to optimise; set one of them"
            )
        scheduled = self.step_rule in ("constant", "harmonic")
        if self.solver in ("frank-wolfe", "random") and scheduled and self.step_size > 1:
            raise ConfigError(
                f"ReviseConfig.step_size = {self.step_size}: a {self.step_rule} Frank-Wolfe step above 1 leaves the"
                " hull;"
                " choose a value in (0, 1]"
            )
        if self.step_rule == "line-search" and not (
            self.line_search_grid and all(0 < g <= 1 for g in self.line_search_grid)
        ):
            raise ConfigError("ReviseConfig.line_search_grid: give one or more step sizes in (0, 1]")
        if self.solver == "entropic" and self.hull != "plausible":
            raise ConfigError(
                "ReviseConfig: the entropic solver keeps a weight for every vertex, which the full hull does not allow;"
                " set hull='plausible'"
            )
        if self.solver in ("unconstrained", "softmax") and (
            self.hull != "full" or not scheduled or self.update_fraction < 1.0
        ):
            raise ConfigError(
                f"ReviseConfig: the {self.solver} solver knows hull='full', step_rule='constant' or 'harmonic' and"
                " update_fraction=1 alone"
            )
        if self.solver == "unconstrained" and self.rounding != "none":
            raise ConfigError(
                "ReviseConfig: what the unconstrained solver finds lies outside the hull and has no atoms to round to;"
                " set rounding='none'"
            )

    @property
    def atoms(self) -> int:
        """Atoms a position can have after ``steps`` Frank-Wolfe steps."""
        return self.steps + 1


@dataclass(frozen=True)
class Evaluation:
    """The objective at one point, for one rollout.

    loss = alpha * gold_nll + beta * away. gold_nll: mean NLL of the answer tokens, nats a token. away: mean of the
    away form over the window. grad: ``dL/dz [T, d]`` in float32 on the model's device, without normalisation.
    """

    loss: float
    gold_nll: float
    away: float
    grad: Tensor


@dataclass
class Trace:
    """One value an iterate (loss, gold_nll, away, entropy: ``K + 1``) or a step (gap, step: ``K``) of a revision.

    rounded_loss: the objective at the rounded prefix, where the choice of the iterate needed it; else empty.
    gap: Frank-Wolfe gap summed over the positions; step: mean gamma, or the rate of an entropic step; entropy: mean
    over the positions, nats; chosen: the iterate that was returned; stopped: why it ended (``steps``, ``gap`` or
    ``nll``).
    """

    loss: list[float] = field(default_factory=list)
    rounded_loss: list[float] = field(default_factory=list)
    gold_nll: list[float] = field(default_factory=list)
    away: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    gap: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    chosen: int = 0
    stopped: Literal["steps", "gap", "nll"] = "steps"


@dataclass(frozen=True)
class Revision:
    """A revised prefix: its atoms, how it got there, what it cost.

    ids: int32 ``[T, A]``; weights: float32 ``[T, A]``, both on the CPU, heaviest atom first; A is at most K + 1 for
    Frank-Wolfe, and the number of candidates for the entropic solver. offset: see ``Mixture``.
    """

    id: str
    prefix_ids: tuple[int, ...]
    ids: Tensor
    weights: Tensor
    trace: Trace
    compute: Compute
    offset: Tensor | None = None

    @property
    def mixture(self) -> Mixture:
        return Mixture(self.ids, self.weights, self.offset)

    def embeddings(self, hull: VocabularyHull) -> Tensor:
        """``z [T, d]`` in the table's dtype and on its device."""
        return self.mixture.to(hull.table.device).embed(hull.table)

    def argmax_ids(self) -> Tensor:
        """The heaviest atom of each position, int64 ``[T]``."""
        return self.mixture.argmax_ids()
