from __future__ import annotations

import math

import pytest
import torch

from latentrevise.kernels import entropic_step, mixture_embed

OP = "entropic_step"


def start(rng, device, T=6, V=41, d=8, C=5):
    E = torch.randn(V, d, generator=rng, device=device)
    ids = torch.stack([torch.randperm(V, generator=rng, device=device)[:C] for _ in range(T)])
    weights = torch.rand(T, C, generator=rng, device=device)
    weights[torch.rand(T, C, generator=rng, device=device) < 0.3] = 0
    weights[:, 0] += 0.1
    weights /= weights.sum(1, keepdim=True)
    gold, away = (torch.randn(T, d, generator=rng, device=device) for _ in range(2))
    return E, ids, weights, gold, away


def by_hand(g, E, ids, weights, eta, scales=None):
    """The definition, one candidate at a time."""
    rows, gaps, spans = [], [], []
    for t in range(len(ids)):
        alive = [c for c in range(ids.shape[1]) if weights[t, c] > 0]
        s = {c: float(g[t].double() @ E[ids[t, c]].double()) for c in alive}
        mean = sum(float(weights[t, c]) * s[c] for c in alive)
        spans.append(max(abs(s[c] - mean) for c in alive))
        scale = spans[-1] if scales is None else scales[t]
        new = {c: float(weights[t, c]) * (math.exp(-eta * (s[c] - mean) / scale) if scale else 1) for c in alive}
        rows.append([new.get(c, 0.0) / sum(new.values()) for c in range(ids.shape[1])])
        gaps.append(mean - min(s.values()))
    return torch.tensor(rows), torch.tensor(gaps), spans


def test_matches_the_definition(backend, device, rng):
    E, ids, weights, gold, away = start(rng, device)
    step = entropic_step(gold, away, E, ids, weights, 1.5, alpha=0.8, beta=-0.3, backend=backend)
    rows, gaps, _ = by_hand((0.8 * gold - 0.3 * away).cpu(), E.cpu(), ids.cpu(), weights.cpu(), 1.5)
    assert torch.allclose(step.weights.cpu(), rows, atol=1e-5)
    assert torch.allclose(step.gap.cpu(), gaps, atol=1e-5)
    assert torch.allclose(step.z, mixture_embed(ids, step.weights, E), atol=1e-6)
    assert (step.weights[weights == 0] == 0).all()
    assert torch.allclose(step.weights.sum(1), torch.ones(6, device=device), atol=1e-6)


def test_rows_of_a_segment_share_their_scale(backend, device, rng):
    E, ids, weights, gold, _ = start(rng, device)
    segments = torch.tensor([70, 70, 5, 70, 5, 9], device=device)
    step = entropic_step(gold, None, E, ids, weights, 2.0, segments=segments, backend=backend)
    _, _, spans = by_hand(gold.cpu(), E.cpu(), ids.cpu(), weights.cpu(), 2.0)
    labels = segments.tolist()
    scales = [max(span for span, other in zip(spans, labels, strict=True) if other == label) for label in labels]
    rows, _, _ = by_hand(gold.cpu(), E.cpu(), ids.cpu(), weights.cpu(), 2.0, scales)
    assert torch.allclose(step.weights.cpu(), rows, atol=1e-5)


def test_normalised_gradients(backend, device, rng):
    E, ids, weights, gold, away = start(rng, device)
    away[0] = 0
    a = entropic_step(5 * gold, away, E, ids, weights, 1.0, beta=2.0, combine="normalized", backend=backend)
    g = gold / gold.norm(dim=1, keepdim=True) + 2 * away / away.norm(dim=1, keepdim=True).clamp_min(1e-30)
    b = entropic_step(g, None, E, ids, weights, 1.0, backend=backend)
    assert torch.allclose(a.weights, b.weights, atol=1e-5)


def test_a_long_run_finds_the_best_candidate(backend, device, rng):
    E, ids, weights, gold, _ = start(rng, device)
    weights = torch.full_like(weights, 1 / 5)
    first = entropic_step(gold, None, E, ids, weights, 1.0, backend=backend).gap
    for _ in range(200):
        weights, _, gap = entropic_step(gold, None, E, ids, weights, 1.0, backend=backend)
    best = torch.einsum("td,tcd->tc", gold, E[ids]).argmin(1)
    assert torch.equal(weights.argmax(1), best)
    assert (gap <= 1e-3 * first).all()


@pytest.mark.parametrize("eta", [0.0, 1e4])
def test_extreme_steps_stay_finite(backend, device, rng, eta):
    E, ids, weights, gold, _ = start(rng, device)
    step = entropic_step(gold, None, E, ids, weights, eta, backend=backend)
    assert step.weights.isfinite().all()
    assert torch.allclose(step.weights.sum(1), torch.ones(6, device=device), atol=1e-6)
    if eta == 0:
        assert torch.allclose(step.weights, weights, atol=1e-7)


def test_rows_that_cannot_move(backend, device):
    E = torch.eye(3, device=device)
    ids = torch.tensor([[0, 1], [2, 2], [0, 1]], device=device)
    weights = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.0, 0.0]], device=device)
    gold = torch.tensor([[1.0, 1, 0], [3.0, 2, 1], [1.0, 2, 3]], device=device)
    step = entropic_step(gold, None, E, ids, weights, 1.0, backend=backend)
    assert torch.equal(step.weights, weights)
    assert step.gap.tolist() == [0.0, 0.0, 0.0]
    assert step.z[2].tolist() == [0.0, 0.0, 0.0]


def test_no_rows(backend, device, rng):
    E, ids, weights, gold, _ = start(rng, device)
    step = entropic_step(gold[:0], None, E, ids[:0], weights[:0], 1.0, segments=ids[:0, 0], backend=backend)
    assert [tuple(x.shape) for x in step] == [(0, 5), (0, 8), (0,)]


def test_bad_input():
    arguments = {"G_gold": torch.ones(1, 3), "G_away": None, "E": torch.ones(4, 3),
                 "ids": torch.zeros(1, 2, dtype=torch.int64), "weights": torch.tensor([[1.0, 0.0]])}  # fmt: skip
    with pytest.raises(ValueError, match="eta must be >= 0"):
        entropic_step(**arguments, eta=-1.0)
    with pytest.raises(TypeError, match="segments must be int64"):
        entropic_step(**arguments, eta=1.0, segments=torch.tensor([0.0]))
    with pytest.raises(ValueError, match=r"segments must have shape \[1\]"):
        entropic_step(**arguments, eta=1.0, segments=torch.tensor([0, 1]))
