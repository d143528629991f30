"""The losses: values and gradients against formulas written by hand, on groups of every kind."""

import math
from dataclasses import replace

import pytest
import torch

from latentrevise.errors import ConfigError
from latentrevise.train.losses import REGISTRY, Rollouts, build

GROUPS = {"zero-hit": [0, 0, 0, 0], "all-correct": [1, 1, 1, 1], "mixed": [1, 0, 0, 1], "recovered": [0, 1, 0, 0]}


def batch(outcomes, recovered=(), seed=0, moved=0.3):
    """One group; the rows have 3 to 6 tokens, the first of the second row is masked."""
    g = torch.Generator().manual_seed(seed)
    B, T = len(outcomes), 6
    old = -torch.rand(B, T, generator=g, dtype=torch.float64) * 3 - 0.05
    logp = (old + moved * (torch.rand(B, T, generator=g, dtype=torch.float64) - 0.5)).requires_grad_()
    mask = (torch.arange(T) < torch.tensor([3, 6, 4, 5])[:, None]).double()
    mask[1, 0] = 0
    answer = (torch.arange(T) == torch.tensor([3, 9, 4, 5])[:, None]).double()  # behind the mask; the second has none
    r = torch.tensor(outcomes, dtype=torch.float64)
    std = r.std() if r.std() > 0 else torch.tensor(0.0)
    marked = torch.tensor([i in recovered for i in range(B)])
    gold = torch.where(answer.sum(1) > 0, (old * answer).sum(1), -torch.inf)
    stats = torch.stack([r, (old * mask).sum(1) / mask.sum(1), gold], 1)
    return Rollouts(
        logp=logp,
        old=old,
        mask=mask,
        outcome=r,
        advantage=(r - r.mean()) / (std + 1e-4),
        correct=r.sum().expand(B),
        judged=torch.full((B,), float(B), dtype=torch.float64),
        recovered=marked,
        entropy=torch.rand(B, T, generator=g, dtype=torch.float64),
        behind=torch.where(marked[:, None], old + 0.5 * torch.rand(B, T, generator=g, dtype=torch.float64), old),
        answer=answer,
        peers=torch.stack([stats.roll(-i, 0) for i in range(B)]),
        rows=B,
        tokens=float(mask.sum()),
        correct_tokens=float((mask * r[:, None]).sum()),
        wrong_tokens=float((mask * (1 - r[:, None])).sum()),
    )


def gradient(name, b, **options):
    value = build(name, options)(b)
    return value, torch.autograd.grad(value, b.logp)[0]


@pytest.mark.parametrize("name", REGISTRY)
@pytest.mark.parametrize("group", GROUPS)
def test_finite_on_every_group(name, group):
    for moved in (0.0, 0.3, 60.0):
        b = batch(GROUPS[group], recovered=(1,) if group == "recovered" else (), moved=moved)
        value, grad = gradient(name, b)
        assert torch.isfinite(value)
        assert torch.isfinite(grad).all()
        assert not grad[b.mask + (b.answer if name == "verifree" else 0) == 0].any()


@pytest.mark.parametrize("name", REGISTRY)
def test_micro_batches_add_up(name):
    b = batch(GROUPS["recovered"], recovered=(1,))
    rows = ("logp", "old", "mask", "outcome", "advantage", "correct", "judged", "recovered")
    rows += ("entropy", "behind", "answer", "peers")
    parts = [replace(b, **{key: getattr(b, key)[i : i + 1] for key in rows}) for i in range(4)]
    loss = build(name)
    torch.testing.assert_close(sum(loss(part) for part in parts), loss(b))


SILENT = ("grpo", "dapo", "psr", "redi", "oreal", "luffy", "sft_mix", "oc")
RELATIVE = ("lens", "verifree")  # of rows that all fail, those that do better than the others become more likely


@pytest.mark.parametrize("name", REGISTRY)
def test_what_a_zero_hit_group_teaches(name):
    _, grad = gradient(name, batch(GROUPS["zero-hit"]))
    assert bool(grad.any()) == (name not in SILENT)
    assert (grad >= 0).all() or name in RELATIVE  # if anything, a wrong row becomes less likely
    _, grad = gradient(name, batch(GROUPS["recovered"], recovered=(1,)))
    trained = batch(GROUPS["recovered"]).mask[1] > 0
    assert (grad[1][trained] < 0).all() or name in ("nsr", "verifree")  # a recovered row becomes more likely


def clip_coefficient(b, A, low=0.2, high=0.2):
    """d/dlogp of -min(rho A, clip(rho) A): -A rho where the clip does not bind."""
    rho = (b.logp - b.old).exp()
    binds = ((rho > 1 + high) & (A[:, None] > 0)) | ((rho < 1 - low) & (A[:, None] < 0))
    return torch.where(binds, 0.0, -A[:, None] * rho)


def hand_formula(name, b):
    r, q = b.outcome, (b.correct / b.judged)[:, None].clamp(0.02, 0.98)
    rho, p = (b.logp - b.old).exp(), b.logp.exp()
    n, tokens, rows = b.mask.sum(1, keepdim=True), b.tokens, b.rows
    wrong = (1 - r).sum()
    if name == "grpo":
        return clip_coefficient(b, b.advantage) / n / rows
    if name in ("dapo", "psr", "nsr", "w_reinforce", "sign"):
        A = {"dapo": b.advantage, "psr": r, "nsr": r - 1, "w_reinforce": torch.where(r > 0, 0.1, -1.0).double()}
        A = (A | {"sign": 2 * r - 1})[name]
        return clip_coefficient(b, A, high=0.28 if name == "dapo" else 0.2) / tokens
    if name == "topr":
        sequence = ((b.logp - b.old) * b.mask).sum(1, keepdim=True).exp().clamp(max=1)
        return torch.where(r[:, None] > 0, -1.0, sequence) / rows
    if name == "redi":
        return torch.where(r[:, None] > 0, -1 / r.sum(), 0.8 / wrong) / n  # one group
    if name == "nft":
        implicit = ((1 - q * rho) / (1 - q)).clamp(min=1)
        return torch.where(r[:, None] > 0, -(1 - q), q * rho / implicit) / tokens
    if name == "oreal":
        A = torch.stack([r[i] - (r.sum() - r[i]) / (len(r) - 1) for i in range(len(r))])[:, None]
        return torch.where(r[:, None] > 0, -A / b.correct_tokens, -0.5 * A * rho / b.wrong_tokens)
    A = b.advantage[:, None]
    if name == "luffy":
        return torch.where(b.recovered[:, None], -A * 0.1 * p / (p + 0.1) ** 2, -A * rho) / tokens
    if name == "sft_mix":
        return torch.where(b.recovered[:, None], -0.5, clip_coefficient(b, b.advantage, high=0.28)) / tokens
    if name == "oc":
        return clip_coefficient(replace(b, old=b.behind), b.advantage) / n / rows
    if name == "rl_zvp":  # neither group is of one outcome
        return clip_coefficient(b, b.advantage, high=0.28) / tokens
    if name == "lens":
        G, r = len(r), r.tolist()
        own = [float((b.old[i] * b.mask[i]).sum() / n[i]) for i in range(G)]
        p = [math.exp(v) for v in own]
        D = max(2 * max(p), 1 / (sum(r[i] / p[i] for i in range(G)) / G))
        c = torch.tensor([r[i] - (1 - r[i]) / G * p[i] / (D - p[i]) for i in range(G)], dtype=torch.float64)
        return clip_coefficient(b, (c - c.mean()) / (c.std() + 1e-4)) / n / rows
    if name == "verifree":
        R = torch.tensor(
            [float(b.old[i][b.answer[i] > 0].exp().prod()) if b.answer[i].any() else 0.0 for i in range(4)]
        )
        R = R.double()
        A = torch.stack([R[i] - (R.sum() - R[i]) / 3 for i in range(4)])[:, None]
        return (-A * b.mask - R[:, None] * b.answer) / rows
    raise AssertionError(name)


@pytest.mark.parametrize("name", REGISTRY)
@pytest.mark.parametrize("group", ["mixed", "recovered"])
@pytest.mark.parametrize("moved", [0.0, 1.2])
def test_gradients_are_the_hand_formulas(name, group, moved):
    b = batch(GROUPS[group], recovered=(1,) if group == "recovered" else (), moved=moved)
    _, grad = gradient(name, b)
    learned = b.mask + b.answer if name == "verifree" else b.mask
    torch.testing.assert_close(grad, (hand_formula(name, b) * learned).detach())


def test_rl_zvp_on_groups_of_one_outcome():
    for outcome in (0, 1):
        b = batch([outcome] * 4, moved=0.0)
        _, grad = gradient("rl_zvp", b)
        for i in range(4):
            H = b.entropy[i][b.mask[i] > 0]
            A = 0.1 * H if outcome else -0.1 * (H.max() - H)
            torch.testing.assert_close(grad[i][b.mask[i] > 0], -A / b.tokens)


def test_lens_on_a_group_that_fails_throughout():
    """The surest row becomes less likely, by alpha times how far its calibrated reward is below the mean."""
    b = batch([0, 0, 0, 0], moved=0.0)
    _, grad = gradient("lens", b)
    p = [math.exp(float((b.old[i] * b.mask[i]).sum() / b.mask[i].sum())) for i in range(4)]
    c = [-p[i] / (2 * max(p) - p[i]) / 4 for i in range(4)]
    A = [0.25 * (c[i] - sum(c) / 4) for i in range(4)]
    assert min(A) == A[p.index(max(p))] < 0
    for i in range(4):
        expected = -A[i] * b.mask[i] / b.mask[i].sum() / 4
        torch.testing.assert_close(grad[i], expected)


def test_oc_is_grpo_where_nothing_was_recovered():
    b = batch(GROUPS["mixed"], moved=1.2)
    torch.testing.assert_close(gradient("oc", b), gradient("grpo", b))
    b = replace(b, recovered=torch.tensor([True] * 4), behind=b.behind + 2.0)
    assert gradient("oc", b)[1][0].abs().sum() < gradient("grpo", b)[1][0].abs().sum() / 5  # said behind the hint alone


def test_a_row_without_verdict_is_not_trained():
    b = batch(GROUPS["mixed"])
    peers = b.peers.clone()
    peers[..., 0] = torch.where(torch.arange(4) == (1 - torch.arange(4)[:, None]) % 4, torch.nan, peers[..., 0])
    b = replace(b, outcome=torch.tensor([1.0, float("nan"), 0.0, 1.0], dtype=torch.float64), peers=peers)
    for name in REGISTRY:
        value, grad = gradient(name, b)
        assert torch.isfinite(value)
        assert torch.isfinite(grad).all()
        assert not grad[1].any()


def test_options_and_errors():
    b = batch(GROUPS["mixed"])
    _, plain = gradient("redi", b)
    _, half = gradient("redi", b, positive=0.5, negative=0.4)
    torch.testing.assert_close(half, plain / 2)
    with pytest.raises(ConfigError, match="choose from grpo"):
        build("ppo")
    with pytest.raises(ConfigError, match="has no option 'lambda'; it has positive, clip"):
        build("w_reinforce", {"lambda": 1})
    with pytest.raises(ConfigError, match="must be a number"):
        build("redi", {"negative": "a lot"})
