from __future__ import annotations

import pytest
import torch

from latentrevise.kernels import hull_step, mixture_embed, vertex_oracle

OP = "hull_step"


def start(rng, device, T=7, V=53, d=12, A=5, dtype=torch.float32):
    E = torch.randn(V, d, generator=rng, device=device).to(dtype)
    ids = torch.randint(V, (T, 1), generator=rng, device=device).expand(T, A).contiguous()
    weights = torch.zeros(T, A, device=device)
    weights[:, 0] = 1
    gold, away = (torch.randn(T, d, generator=rng, device=device) for _ in range(2))
    return E, ids, weights, gold, away


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("combine", ["sum", "normalized"])
def test_steps_keep_what_a_frank_wolfe_step_promises(backend, device, rng, combine, dtype):
    E, ids, weights, _, _ = start(rng, device, dtype=dtype)
    T, A = ids.shape
    for k in range(1, A):
        gold, away = (torch.randn(T, E.shape[1], generator=rng, device=device) for _ in range(2))
        gamma = torch.rand(T, generator=rng, device=device)
        kept = (ids.clone(), weights.clone())
        step = hull_step(gold, away, E, ids, weights, gamma, slot=k, alpha=0.7, beta=-0.4, combine=combine,
                         backend=backend)  # fmt: skip
        assert torch.equal(ids, kept[0])
        assert torch.equal(weights, kept[1])
        if combine == "normalized":
            gold, away = gold / gold.norm(dim=1, keepdim=True), away / away.norm(dim=1, keepdim=True)
        g = 0.7 * gold - 0.4 * away
        vertex, value = vertex_oracle(g, E, backend="reference")
        assert torch.equal(step.vertex, vertex)
        z = mixture_embed(ids, weights, E.double(), backend="reference")
        assert torch.allclose(step.gap.double(), (g.double() * z).sum(1) - value.double(), atol=1e-4)
        assert (step.gap >= -1e-6).all()
        # the same move in the dense representation
        dense = torch.zeros(T, E.shape[0], device=device).scatter_add(1, ids, weights)
        moved = (1 - gamma[:, None]) * dense + gamma[:, None] * torch.nn.functional.one_hot(vertex, E.shape[0])
        assert torch.allclose(torch.zeros_like(dense).scatter_add(1, step.ids, step.weights), moved, atol=1e-6)
        assert step.z.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 5e-2
        assert torch.allclose(step.z.double(), moved.double() @ E.double(), atol=tolerance)
        ids, weights = step.ids, step.weights
    assert torch.allclose(weights.sum(1), torch.ones(T, device=device), atol=1e-6)


def test_a_vertex_that_is_an_atom_already_takes_the_weight(backend, device):
    E = torch.eye(3, device=device)
    ids = torch.tensor([[0, 2, 0]], device=device)
    weights = torch.tensor([[0.5, 0.5, 0.0]], device=device)
    step = hull_step(torch.tensor([[1.0, 0, -1]], device=device), None, E, ids, weights, 0.2, slot=2, backend=backend)
    assert step.vertex.tolist() == [2]
    assert step.ids.tolist() == [[0, 2, 0]]
    assert torch.allclose(step.weights, torch.tensor([[0.4, 0.6, 0.0]], device=device))
    assert step.gap.tolist() == [1.0]  # 0.5 * (1 - -1)
    # the same id in a slot of weight 0 is not an atom
    step = hull_step(torch.tensor([[-1.0, 0, 1]], device=device), None, E, torch.tensor([[2, 0, 0]], device=device),
                     torch.tensor([[1.0, 0.0, 0.0]], device=device), 0.25, slot=2, backend=backend)  # fmt: skip
    assert step.ids.tolist() == [[2, 0, 0]]
    assert step.weights.tolist() == [[0.75, 0.0, 0.25]]


def test_gamma_zero_keeps_the_mixture_and_one_replaces_it(backend, device, rng):
    E, ids, weights, gold, _ = start(rng, device)
    gamma = torch.tensor([0.0, 1.0] * 3 + [0.0], device=device)
    step = hull_step(gold, None, E, ids, weights, gamma, slot=1, backend=backend)
    still = gamma == 0
    assert torch.equal(step.ids[still], ids[still])
    assert torch.equal(step.weights[still], weights[still])
    assert torch.equal(step.vertex, vertex_oracle(gold, E)[0])
    assert torch.allclose(step.z[~still], E[step.vertex[~still]])


def test_a_zero_gradient_row_stays_zero_when_normalised(backend, device):
    E = torch.tensor([[1.0, 0], [0, 1.0]], device=device)
    ids, weights = torch.tensor([[1, 1]], device=device), torch.tensor([[1.0, 0.0]], device=device)
    zero = torch.zeros(1, 2, device=device)
    step = hull_step(zero, zero, E, ids, weights, 0.5, slot=1, beta=1.0, combine="normalized", backend=backend)
    assert (step.vertex.tolist(), step.gap.tolist()) == ([0], [0.0])


def test_allowed_and_candidates(backend, device, rng):
    E, ids, weights, gold, _ = start(rng, device)
    allowed = torch.zeros(E.shape[0], dtype=torch.bool, device=device)
    allowed[::7] = True
    assert (hull_step(gold, None, E, ids, weights, 0.5, slot=1, allowed=allowed, backend=backend).vertex % 7 == 0).all()
    candidates = torch.tensor([[3, 9, -1]], device=device).expand(7, 3)
    step = hull_step(gold, None, E, ids, weights, 0.5, slot=1, candidates=candidates, backend=backend)
    assert torch.equal(step.vertex, vertex_oracle(gold, E, candidates=candidates)[0])


def test_no_rows(backend, device, rng):
    E, ids, weights, gold, away = start(rng, device, T=0)
    step = hull_step(gold, away, E, ids, weights, 0.5, slot=1, beta=1.0, backend=backend)
    assert [tuple(x.shape) for x in step] == [(0, 5), (0, 5), (0, 12), (0,), (0,)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slot": 0}, "column 0 of weights is in use"),
        ({"slot": 2}, r"slot must be a column of ids, in \[0, 2\)"),
        ({"gamma": 1.5}, r"gamma must be in \[0, 1\]"),
        ({"gamma": float("nan")}, "gamma must be"),
        ({"beta": 1.0}, "beta is 1.0 but G_away is None"),
        ({"combine": "mean"}, "combine must be one of sum, normalized"),
        ({"alpha": float("inf")}, "alpha must be"),
        ({"allowed": torch.zeros(4, dtype=torch.bool)}, "no vertex is allowed"),
        ({"G_gold": torch.ones(2, 3)}, r"G_gold must have shape \[1, 3\]"),
    ],
)
def test_bad_input(change, message):
    arguments = {
        "G_gold": torch.ones(1, 3),
        "G_away": None,
        "E": torch.ones(4, 3),
        "ids": torch.zeros(1, 2, dtype=torch.int32),
        "weights": torch.tensor([[1.0, 0.0]]),
        "gamma": 0.5,
        "slot": 1,
    }
    with pytest.raises(ValueError, match=message):
        hull_step(**(arguments | change))
