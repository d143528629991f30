"""What goes into the reviser and what comes out: failed rollouts, settings, evaluations, revisions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from latentrevise.config import require
from latentrevise.errors import ConfigError, InputError
from latentrevise.model.compute import Compute
from latentrevise.revise.hull import Mixture, TextRule, VocabularyHull


@dataclass(frozen=True)
class FailedRollout:
    """One failed rollout, split where its revision ends, and the answer it should have reached.

    Every field of ids is a 1-D sequence of ints (list, array or tensor).

    prompt_ids: the prompt ``x``, chat template applied. Not revised; its keys and values are computed once.
    prefix_ids: the reasoning prefix ``r`` (``T`` tokens) whose input embeddings are revised.
    continuation_ids: the failed continuation ``c``; may be empty when ``explore_weight`` is 0.
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


@dataclass(frozen=True)
class ReviseConfig:
    """How a prefix is revised. ``ReviseConfig()`` is the published method (arXiv 2606.29938: 3.2 to 3.4, Algorithm 1,
    Table 7); everything that departs from it is a setting, and our own decision.

    steps: ``K``.
    guide_weight: weight of the gold answer's NLL behind the template (the paper's alpha). explore_weight: of the failed
        continuation's log-likelihood, which is pushed down. fluency_weight: of the original prefix tokens' NLL behind
        the revised ones (the paper's beta). A term of weight 0 is left out of the pass.
    reduction: ``sum`` over a term's tokens, or their ``mean``, which makes weights independent of lengths.
    explore: ``loglik``, the log-likelihood itself, unbounded; ``unlikelihood``, -log(1 - p) of each token, which stops
        pushing once a token is improbable. explore_tokens: the first tokens of the failed continuation that enter;
        None: all of it.
    stop_guide: stop before a step when the gold answer's NLL, summed and in nats, is below this; None: never.
    special_vertices: whether special tokens are vertices, as every row of the tokenizer is in the paper.
    step_rule, step_size: ``harmonic``, gamma_i = step_size * 2 / (i + 1) for i = 1 .. K, at most 1; ``constant``,
        gamma = step_size. Entropic: step_size is the rate eta; softmax: how far the steepest logit of a position moves,
        in nats; adam: the learning rate.
    solver: ``frank-wolfe`` moves toward one vertex a step; ``entropic`` is mirror descent on the mixture weights over
        the plausible candidates. Ablations: ``random``, toward a random vertex in place of the oracle's; ``adam``, a
        free optimiser on the embeddings, out of the hull (the paper's ablation "without Frank-Wolfe"); ``softmax``,
        gradient descent on the logits of a mixture of the whole vocabulary, of which the ``max_candidates`` heaviest
        atoms are returned.
    hull: ``full``, every vertex; ``plausible``, at each position the tokens with probability of at least ``p_min``
        under the policy after the original prefix (at most ``max_candidates``), and the original one.
    mass: entropic and softmax: the share of weight spread over the candidates at the start, in (0, 1].
    iterate: ``last``, or ``best``: the one with the lowest objective, as it will be continued from.
    rounding: ``none``, continue from the mixture itself; ``argmax``, from each position's heaviest atom, as plain
        tokens.
    token_budget: padded tokens (prefix and branches) in one batch, those of a cached prompt counting as the share of
        one that they take in memory; None: what the free memory allows. Where it does not suffice, half as many are
        tried.
    recompute: activation checkpointing: layers keep only their inputs and run again in the backward pass, about a third
        more work for several times as many tokens in the same memory. The compute counts it.
    cuda_graph: behind its first, all evaluations of a batch replay one CUDA graph: a launch instead of some thousand.
        Not yet measured. For one GPU, sdpa or eager attention, without ``recompute``; a body that waits for the device
        (some mixtures of experts) is refused when it is captured.
    backend: kernel implementation; None lets the dispatch decide.
    seed: of the random choices, where a solver makes any.
    """

    steps: int = 10
    guide_weight: float = 1.0
    explore_weight: float = 1.0
    fluency_weight: float = 0.1
    reduction: Literal["sum", "mean"] = "sum"
    explore: Literal["loglik", "unlikelihood"] = "loglik"
    explore_tokens: int | None = None
    stop_guide: float | None = 1e-3
    special_vertices: bool = True
    step_rule: Literal["harmonic", "constant"] = "harmonic"
    step_size: float = 0.1
    solver: Literal["frank-wolfe", "entropic", "random", "adam", "softmax"] = "frank-wolfe"
    hull: Literal["full", "plausible"] = "full"
    p_min: float = 1e-4
    max_candidates: int = 64
    mass: float = 0.9
    iterate: Literal["last", "best"] = "last"
    rounding: Literal["none", "argmax"] = "none"
    token_budget: int | None = None
    recompute: bool = False
    cuda_graph: bool = False
    backend: str | None = None
    seed: int = 0

    # Names of earlier versions, for the error that an old settings file gets.
    RENAMED: ClassVar[dict[str, str]] = {
        "alpha": "guide_weight",
        "beta": "explore_weight",
        "away": "explore",
        "away_window": "explore_tokens",
        "away_ceiling": "explore ('unlikelihood' is the bounded form)",
        "stop_nll": "stop_guide (summed over the answer's tokens)",
        "stop_gap": "stop_guide",
        "combine": "reduction",
        "update_fraction": "no other: every position moves",
        "line_search_grid": "step_rule ('harmonic' or 'constant')",
    }

    def __post_init__(self) -> None:
        weights = (self.guide_weight, self.explore_weight, self.fluency_weight)
        require(
            self,
            steps=(self.steps >= 1, "at least 1"),
            guide_weight=(0 <= self.guide_weight < math.inf, "0 or more, and finite"),
            explore_weight=(0 <= self.explore_weight < math.inf, "0 or more, and finite"),
            fluency_weight=(0 <= self.fluency_weight < math.inf, "0 or more, and finite"),
            explore_tokens=(self.explore_tokens is None or self.explore_tokens >= 1, "None or at least 1"),
            stop_guide=(self.stop_guide is None or self.stop_guide >= 0, "None or 0 or more"),
            p_min=(0.0 < self.p_min < 1.0, "in (0, 1)"),
            max_candidates=(self.max_candidates >= 1, "at least 1"),
            step_size=(0 < self.step_size < math.inf, "positive and finite"),
            mass=(0.0 < self.mass <= 1.0, "in (0, 1]"),
            token_budget=(self.token_budget is None or self.token_budget >= 1, "None or at least 1"),
        )
        if not any(weights):
            raise ConfigError(
                "ReviseConfig: guide_weight, explore_weight and fluency_weight are all 0, so there is nothing to"
                " optimise; set one of them"
            )
        if self.cuda_graph and self.recompute:
            raise ConfigError(
                "ReviseConfig: recompute keeps the state of the random numbers, which no CUDA graph can; turn recompute"
                " or cuda_graph off"
            )
        if self.solver in ("frank-wolfe", "random") and self.step_size > 1:
            raise ConfigError(
                f"ReviseConfig.step_size = {self.step_size}: a Frank-Wolfe step above 1 leaves the hull; choose a value"
                " in (0, 1]"
            )
        if self.solver == "entropic" and self.hull != "plausible":
            raise ConfigError(
                "ReviseConfig: the entropic solver keeps a weight for every vertex, which the full hull does not allow;"
                " set hull='plausible'"
            )
        if self.solver in ("adam", "softmax") and self.hull != "full":
            raise ConfigError(f"ReviseConfig: the {self.solver} solver knows hull='full' alone")
        if self.solver == "adam" and self.rounding != "none":
            raise ConfigError(
                "ReviseConfig: what the adam solver finds lies outside the hull and has no atoms to round to; set"
                " rounding='none'"
            )

    @classmethod
    def answer_only(cls, **changes: Any) -> ReviseConfig:
        """An objective that is the gold answer's summed NLL and nothing else."""
        return cls(explore_weight=0.0, fluency_weight=0.0, **changes)

    @property
    def atoms(self) -> int:
        """Atoms a position can have after ``steps`` Frank-Wolfe steps."""
        return self.steps + 1


@dataclass(frozen=True)
class Evaluation:
    """The objective at one point, for one rollout, in nats.

    loss = explore_weight * explore + guide_weight * guide + fluency_weight * fluency. explore: log-likelihood of the
    failed continuation (of ``unlikelihood``: that form). guide: NLL of the gold answer. fluency: NLL of the original
    prefix. Each is a sum or a mean over its tokens, as the settings say. grad: ``dL/dz [T, d]`` in float32 on the
    model's device.
    """

    loss: float
    explore: float
    guide: float
    fluency: float
    grad: Tensor


@dataclass
class Trace:
    """One value an iterate (loss, explore, guide, fluency, entropy: ``K + 1``) or a step (gap, step: ``K``).

    Terms: see ``Evaluation``. rounded_loss: the objective at the rounded prefix, where the choice of the iterate needed
    it; else empty. gap: Frank-Wolfe gap summed over the positions; step: gamma, or the rate of the other solvers;
    entropy: mean over the positions, nats; chosen: the iterate that was returned; stopped: why it ended (``steps`` or
    ``guide``).
    """

    loss: list[float] = field(default_factory=list)
    rounded_loss: list[float] = field(default_factory=list)
    explore: list[float] = field(default_factory=list)
    guide: list[float] = field(default_factory=list)
    fluency: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    gap: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    chosen: int = 0
    stopped: Literal["steps", "guide"] = "steps"


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

    def text_ids(self, hull: VocabularyHull, rule: TextRule = "inner-product") -> Tensor:
        """The prefix as tokens, int64 ``[T]`` on the CPU; see ``VocabularyHull.text_ids``."""
        return hull.text_ids(self.mixture.to(hull.table.device), rule).cpu()
