"""Losses over groups of verified rollouts, each a few lines on per-token log-probs.

Notation: ``r`` the verified outcome (1 correct, 0 wrong), ``y`` a row's trained tokens, ``rho_t = pi / pi_old`` of a
token, ``A`` the advantage, ``q`` the share of correct rows in a group, ``sg`` stop-gradient. All are finite on groups
without a correct row, without a wrong one, and on mixed ones. Formulas that papers leave open are our own decision, and
marked so.

From a group without a correct row ``grpo``, ``dapo``, ``psr``, ``redi``, ``oreal``, ``luffy``, ``sft_mix`` and ``oc``
learn nothing until a row is recovered, and ``nft`` hardly anything; ``nsr``, ``w_reinforce``, ``sign``, ``topr``,
``rl_zvp`` and ``lens`` make its rows less likely; ``verifree`` makes reasonings to the gold answer likelier, without
repair.

A loss sees one micro-batch and divides by counts of the whole optimizer batch, so that the losses of its micro-batches
add up to the loss of the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from latentrevise.errors import ConfigError


@dataclass(frozen=True)
class Rollouts:
    """One micro-batch of B rows, T completion positions.

    logp, old: ``[B, T]`` log-probs of the sampled tokens, nats; ``old`` detached, of the policy that sampled, behind
    *plain* tokens. mask: ``[B, T]``, 1 where a token is trained. outcome: ``[B]`` verified, 1 or 0. advantage: ``[B]``.
    correct, judged: ``[B]`` rows of the row's group that are correct, and that are verified at all. recovered: ``[B]``
    bool, rows that a strategy put in place of a failed one.
    entropy: ``[B, T]`` of the policy now, nats, detached. behind: ``[B, T]`` log-probs of what sampled the tokens, as
    it sampled them: behind the revision or the hint for those of a recovered row, else ``old``.
    answer: ``[B, T]``, 1 on tokens of the gold answer that stand in place of the sampled one; they are not in ``mask``.
    peers: ``[B, G, 3]``, of every row of the row's group, itself first: outcome, mean log-prob of its trained tokens by
    the policy that sampled (NaN without one), and log-prob of the gold answer behind its reasoning (-inf without one).
    rows, tokens, correct_tokens, wrong_tokens: of the whole optimizer batch, the denominators.
    """

    logp: Tensor
    old: Tensor
    mask: Tensor
    outcome: Tensor
    advantage: Tensor
    correct: Tensor
    judged: Tensor
    recovered: Tensor
    entropy: Tensor
    behind: Tensor
    answer: Tensor
    peers: Tensor
    rows: Tensor | float
    tokens: Tensor | float
    correct_tokens: Tensor | float
    wrong_tokens: Tensor | float

    @property
    def ratio(self) -> Tensor:
        """``rho [B, T]``; log-ratios beyond 10 are cut (a token whose probability grew 22,000-fold)."""
        return (self.logp - self.old).clamp(max=10.0).exp()

    @property
    def lengths(self) -> Tensor:
        return self.mask.sum(1).clamp(min=1)

    def sum(self, values: Tensor) -> Tensor:
        """``[B]``: over the trained tokens of each row."""
        return (values * self.mask).sum(1)

    def token_mean(self, values: Tensor) -> Tensor:
        return self.sum(values).sum() / max(float(self.tokens), 1.0)

    def row_mean(self, values: Tensor) -> Tensor:
        """Of ``[B]`` values."""
        return values.sum() / max(float(self.rows), 1.0)


Loss = Callable[[Rollouts], Tensor]


def clipped(b: Rollouts, advantage: Tensor, low: float, high: float) -> Tensor:
    """``-min(rho A, clip(rho, 1 - low, 1 + high) A)``, ``[B, T]`` (PPO, arXiv 1707.06347); advantage: ``[B]`` or
    ``[B, T]``."""
    A = advantage if advantage.ndim == 2 else advantage[:, None]
    return -torch.min(b.ratio * A, b.ratio.clamp(1 - low, 1 + high) * A)


def grpo(b: Rollouts, *, clip: float = 0.2) -> Tensor:
    """GRPO (arXiv 2402.03300): ``A = (r - mean) / std`` in the group, clipped, mean over a row's tokens, then rows.

    A group without a correct row has ``A = 0``: nothing is learned from it.
    """
    return b.row_mean(b.sum(clipped(b, b.advantage, clip, clip)) / b.lengths)


def dapo(b: Rollouts, *, clip_low: float = 0.2, clip_high: float = 0.28) -> Tensor:
    """DAPO (arXiv 2503.14476): GRPO with a higher upper clip and one mean over all tokens of the batch.

    DAPO samples anew for groups of one outcome; here they are left with ``A = 0``, and the trainer's
    ``drop_unrescued`` takes them out of the denominator.
    """
    return b.token_mean(clipped(b, b.advantage, clip_low, clip_high))


def psr(b: Rollouts, *, clip: float = 0.2) -> Tensor:
    """Positive-sample reinforcement (arXiv 2506.01347): ``A = r``. Learns from correct rows alone."""
    return b.token_mean(clipped(b, b.outcome, clip, clip))


def nsr(b: Rollouts, *, clip: float = 0.2) -> Tensor:
    """Negative-sample reinforcement (arXiv 2506.01347): ``A = r - 1``. Learns from every wrong row, also in a group
    without a correct one: pure unlikelihood, the clip is its only bound."""
    return b.token_mean(clipped(b, b.outcome - 1, clip, clip))


def w_reinforce(b: Rollouts, *, positive: float = 0.1, clip: float = 0.2) -> Tensor:
    """Weighted-REINFORCE (arXiv 2506.01347): ``A = positive`` for correct rows, -1 for wrong ones (``positive`` = 0:
    NSR)."""
    return b.token_mean(clipped(b, (1 + positive) * b.outcome - 1, clip, clip))


def sign(b: Rollouts, *, clip: float = 0.2) -> Tensor:
    """The fixed reference of arXiv 2605.07689: ``A = 2 r - 1``, whatever the group. Learns from every row."""
    return w_reinforce(b, positive=1.0, clip=clip)


def topr(b: Rollouts, *, baseline: float = 0.0) -> Tensor:
    """Tapered off-policy REINFORCE (arXiv 2503.14286): ``-sg(w) R log pi(y)`` with ``R = 2 r - 1 - baseline``.

    ``w = 1`` for ``R >= 0``, else the sequence's ratio ``pi / mu`` cut to [0, 1].

    Recovered rows are positive, so they need no importance weight. A group without a correct row is pushed away, the
    less the further it is already gone. Mean over rows, whole sequences: our own decision.
    """
    R = 2 * b.outcome - 1 - baseline
    weight = torch.where(R >= 0, torch.ones_like(R), b.sum(b.logp.detach() - b.old).clamp(max=0).exp())
    return b.row_mean(-weight * R * b.sum(b.logp))


def redi(b: Rollouts, *, positive: float = 1.0, negative: float = 0.8) -> Tensor:
    """REDI (arXiv 2505.24850): ``-positive mean log pi(y+) + negative mean log pi(y-)``, means over tokens.

    Published for pairs; here the pair of a group is the mean over its correct and over its wrong rows. A group with one
    kind only is no pair and adds nothing, so a group without a correct row learns only once a row was recovered.
    """
    wrong = b.judged - b.correct
    share = torch.where(b.outcome > 0, -positive / b.correct.clamp(min=1), negative / wrong.clamp(min=1))
    pairs = (b.correct > 0) & (wrong > 0)
    # A row's share of its group, so that the sum over rows is a sum over groups, then a mean over groups.
    return b.row_mean(torch.where(pairs, share * b.judged * b.sum(b.logp) / b.lengths, 0.0))


def nft(b: Rollouts, *, q_min: float = 0.02, floor: float = 1.0) -> Tensor:
    """Negative-aware fine-tuning (arXiv 2505.18116): ``-log rho`` for correct rows, ``-log max(n, floor)`` for wrong
    ones, with the implicit negative policy ``n = (1 - q rho) / (1 - q)``; both times ``1 - q``.

    The maximum is straight-through (the gradient is that of ``log n`` at the floored value). ``q`` is cut to
    [q_min, 1 - q_min]: the published code asserts 0 < q < 1 and so dies on a group without a correct row; here such a
    group is pushed away with weight about ``q_min``.
    """
    q = (b.correct / b.judged.clamp(min=1)).clamp(q_min, 1 - q_min)[:, None]
    implicit = (1 - q * b.ratio) / (1 - q)
    implicit = implicit + (implicit.clamp(min=floor) - implicit).detach()
    per_token = torch.where(b.outcome[:, None] > 0, -(b.logp - b.old).clamp(max=10.0), -implicit.log())
    return b.token_mean((1 - q) * per_token)


def oreal(b: Rollouts, *, negative: float = 0.5) -> Tensor:
    """OREAL (arXiv 2502.06781): ``-A log pi`` over the correct tokens, ``-negative A rho`` over the wrong ones, each a
    mean over tokens of its kind; ``A`` is leave-one-out, ``r - (mean of the others)``.

    Published with one correct and one wrong row a prompt; here with all of them. Its KL term on wrong rows is the
    trainer's ``beta``; the optional weights of a token-level reward model are left out. A group of one outcome has
    ``A = 0``.
    """
    A = b.outcome - (b.correct - b.outcome) / (b.judged - 1).clamp(min=1)
    A = torch.where(b.judged > 1, A, 0.0)
    good = b.sum(-b.logp) * A * b.outcome / max(float(b.correct_tokens), 1.0)
    bad = b.sum(-b.ratio) * negative * A * (1 - b.outcome) / max(float(b.wrong_tokens), 1.0)
    return (good + bad).sum()


def luffy(b: Rollouts, *, gamma: float = 0.1) -> Tensor:
    """LUFFY's mixed-policy loss (arXiv 2504.14945): ``-A f(pi)`` on recovered tokens, ``-A rho`` on others, no clip.

    ``f(p) = p / (p + gamma)``; the behaviour policy of a recovered token counts as 1. Published over a constant length;
    here one mean over the tokens of the batch. The shaping keeps unlikely tokens of a recovered row learnable: their
    gradient is ``f'(p) p = gamma p / (p + gamma)^2``, not ``p``.
    """
    p = b.logp.exp()
    per_token = torch.where(b.recovered[:, None], p / (p + gamma), b.ratio)
    return b.token_mean(-b.advantage[:, None] * per_token)


def sft_mix(b: Rollouts, *, weight: float = 0.5, clip_low: float = 0.2, clip_high: float = 0.28) -> Tensor:
    """The policy gradient on sampled rows, ``weight`` times cross-entropy on recovered ones, one mean over all tokens.

    What prime-rl calls ``rl_weights`` 0 and ``ce_weights`` on samples of another policy.
    """
    sampled = clipped(b, b.advantage, clip_low, clip_high)
    return b.token_mean(torch.where(b.recovered[:, None], -weight * b.logp, sampled))


def oc(b: Rollouts, *, clip_low: float = 0.2, clip_high: float = 0.2) -> Tensor:
    """Off-context GRPO (arXiv 2607.19313): GRPO with ``rho_t = pi(y_t | x) / pi_old(y_t | x, hint)`` on recovered rows.

    The numerator is the policy behind the plain row, the denominator what the continuation was sampled with, behind the
    revision or the hint; of the tokens that nothing sampled (a prefix that was fed, the end) ``pi_old`` is the plain
    one. A token that the policy says only behind the hint so weighs little, where every other loss here takes ``rho``
    of a recovered row for 1. The ratio of each token by itself, clipped as in GRPO, is our own reading: only the
    abstract was at hand. A group without a correct row has ``A = 0``.
    """
    off_context = replace(b, old=b.behind)
    return b.row_mean(b.sum(clipped(off_context, b.advantage, clip_low, clip_high)) / b.lengths)


def rl_zvp(b: Rollouts, *, alpha: float = 0.1, clip_low: float = 0.2, clip_high: float = 0.28) -> Tensor:
    """RL-ZVP (arXiv 2509.21880, Eq. 5): in a group of one outcome ``A_t = alpha H_t`` for its correct rows and
    ``A_t = -alpha (max_k H_k - H_t)`` for its wrong ones, ``H`` the entropy, the maximum over the row; GRPO's ``A``
    elsewhere.

    A wrong row is so pushed away most where the policy was sure. DAPO's clip and mean: our own decision.
    """
    H = b.entropy * b.mask
    shaped = torch.where(b.outcome[:, None] > 0, H, H - H.max(1, keepdim=True).values)
    one_outcome = (b.correct == 0) | (b.correct == b.judged)
    A = torch.where(one_outcome[:, None], alpha * shaped, b.advantage[:, None])
    return b.token_mean(clipped(b, A, clip_low, clip_high))


def lens(b: Rollouts, *, alpha: float = 0.25, clip: float = 0.2) -> Tensor:
    """LENS (arXiv 2510.08696, 5.1): GRPO on calibrated rewards ``c = r - (1 - r) / G * p / (D - p)``, ``p`` a row's
    ``pi_old`` to the power 1 / length.

    ``D`` is twice the largest ``p`` of the group, or, if that is more and the group has a correct row, the inverse of
    the mean of ``r / p``. ``A`` is ``(c - mean) / std`` in a group with a correct row, else ``alpha (c - mean)``: of a
    group that fails throughout the confident rows become less likely, and the doubtful ones more. Undecided rows are
    left out of ``G``.
    """
    r, p = b.peers[..., 0], b.peers[..., 1].exp()
    known = r.isfinite() & p.isfinite()
    r, p = torch.where(known, r, 0.0), torch.where(known, p, 0.0)
    count = known.sum(1, keepdim=True).clamp(min=1)
    inverse = count / (r / p.clamp(min=1e-30)).sum(1, keepdim=True)  # infinite in a group without a correct row
    D = (2 * p.amax(1, keepdim=True)).clamp(min=1e-30)
    D = torch.where(inverse.isfinite(), torch.maximum(D, inverse), D)
    c = torch.where(known, r - (1 - r) / count * p / (D - p), 0.0)
    mean = c.sum(1, keepdim=True) / count
    std = (torch.where(known, (c - mean) ** 2, 0.0).sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    scale = torch.where(r.sum(1, keepdim=True) > 0, 1 / (std + 1e-4), alpha)
    A = torch.where(known, scale * (c - mean), 0.0)[:, 0]
    return b.row_mean(b.sum(clipped(b, A, clip, clip)) / b.lengths)


def verifree(b: Rollouts, *, answer_weight: float = 1.0) -> Tensor:
    """VeriFree (arXiv 2505.21493): ``-A log pi(z) - answer_weight R log pi(a | z)``, ``z`` a row's reasoning, ``a`` the
    gold answer in place of its own, ``R = pi_old(a | z)``, ``A = R - (mean of the others' R)``.

    No verdict is read. A row that comes to no answer has ``R = 0`` (our own decision). Learns from a group without a
    correct row as far as its reasonings make the gold answer likelier or less likely than one another.
    """
    R = b.peers[..., 2].exp()
    own, others = R[:, 0], R[:, 1:].sum(1) / max(R.shape[1] - 1, 1)
    return b.row_mean(-(own - others) * b.sum(b.logp) - answer_weight * own * (b.logp * b.answer).sum(1))


REGISTRY: dict[str, Callable[..., Tensor]] = {
    loss.__name__: loss
    for loss in (
        *(grpo, dapo, psr, nsr, w_reinforce, sign, topr, redi, nft, oreal, luffy, sft_mix),
        *(oc, rl_zvp, lens, verifree),
    )
}


OF_PEERS = ("lens", "verifree")
"""The losses that read ``Rollouts.peers``."""


def build(name: str, options: Mapping[str, Any] | None = None) -> Loss:
    """The loss of that name with its keyword options set. Raises ConfigError for a name or an option that is none."""
    if name not in REGISTRY:
        raise ConfigError(f"unknown loss {name!r}; choose from {', '.join(REGISTRY)}")
    known = [p.name for p in inspect.signature(REGISTRY[name]).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for key, value in (options or {}).items():
        if key not in known:
            raise ConfigError(f"loss {name} has no option {key!r}; it has {', '.join(known)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"loss {name}: {key} = {value!r} must be a number")
    loss = partial(REGISTRY[name], **(options or {}))
    return lambda batch: loss(_unjudged_masked(batch))


def _unjudged_masked(b: Rollouts) -> Rollouts:
    """Rows without a verdict (a timeout is unknown, never wrong) are not trained on."""
    known = torch.isfinite(b.outcome)
    return replace(
        b,
        mask=b.mask * known[:, None],
        answer=b.answer * known[:, None],
        outcome=torch.where(known, b.outcome, 0.0),
        advantage=torch.where(known, b.advantage, 0.0),
    )
