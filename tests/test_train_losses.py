"""The losses: values and gradients against formulas written by hand, on groups of every kind."""

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
    r = torch.tensor(outcomes, dtype=torch.float64)
    std = r.std() if r.std() > 0 else torch.tensor(0.0)
    return Rollouts(
        logp=logp,
        old=old,
        mask=mask,
        outcome=r,
        advantage=(r - r.mean()) / (std + 1e-4),
        correct=r.sum().expand(B),
        judged=torch.full((B,), float(B), dtype=torch.float64),
        recovered=torch.tensor([i in recovered for i in range(B)]),
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
        assert not grad[b.mask == 0].any()


@pytest.mark.parametrize("name", REGISTRY)
def test_micro_batches_add_up(name):
    b = batch(GROUPS["recovered"], recovered=(1,))
    rows = ("logp", "old", "mask", "outcome", "advantage", "correct", "judged", "recovered")
    parts = [replace(b, **{key: getattr(b, key)[i : i + 1] for key in rows}) for i in range(4)]
    loss = build(name)
    torch.testing.assert_close(sum(loss(part) for part in parts), loss(b))


SILENT = ("grpo", "dapo", "psr", "redi", "oreal", "luffy", "sft_mix")


@pytest.mark.parametrize("name", REGISTRY)
def test_what_a_zero_hit_group_teaches(name):
    _, grad = gradient(name, batch(GROUPS["zero-hit"]))
    assert bool(grad.any()) == (name not in SILENT)
    assert (grad >= 0).all()  # if anything, a wrong row becomes less likely
    _, grad = gradient(name, batch(GROUPS["recovered"], recovered=(1,)))
    trained = batch(GROUPS["recovered"]).mask[1] > 0
    assert (grad[1][trained] < 0).all() or name == "nsr"  # a recovered row becomes more likely


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
    if name in ("dapo", "psr", "nsr", "w_reinforce"):
        A = {"dapo": b.advantage, "psr": r, "nsr": r - 1, "w_reinforce": torch.where(r > 0, 0.1, -1.0).double()}[name]
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
    raise AssertionError(name)


@pytest.mark.parametrize("name", REGISTRY)
@pytest.mark.parametrize("group", ["mixed", "recovered"])
@pytest.mark.parametrize("moved", [0.0, 1.2])
def test_gradients_are_the_hand_formulas(name, group, moved):
    b = batch(GROUPS[group], recovered=(1,) if group == "recovered" else (), moved=moved)
    _, grad = gradient(name, b)
    torch.testing.assert_close(grad, (hand_formula(name, b) * b.mask).detach())


def test_a_row_without_verdict_is_not_trained():
    b = batch(GROUPS["mixed"])
    b = replace(b, outcome=torch.tensor([1.0, float("nan"), 0.0, 1.0], dtype=torch.float64))
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
