from __future__ import annotations

import math

import pytest
import torch

from latentrevise.kernels import linear_logprob, plausible_vertices

OP = "plausible_vertices"


def brute(H, W, p_min, C, allowed=None):
    rows = []
    for t in range(H.shape[0]):
        p = torch.softmax(W.double() @ H[t].double(), 0)
        listed = [v for v in range(W.shape[0]) if p[v] >= p_min and (allowed is None or allowed[v])]
        listed.sort(key=lambda v: (-float(p[v]), v))
        rows.append((listed[:C] + [-1] * (C - len(listed)), len(listed)))
    return rows


@pytest.mark.parametrize(("T", "V", "d", "C"), [(1, 1, 1, 3), (70, 131, 9, 5), (5, 40, 4, 64)])
@pytest.mark.parametrize("masked", [False, True])
def test_matches_brute_force(backend, device, rng, T, V, d, C, masked):
    H = 1.5 * torch.randn(T, d, generator=rng, device=device)
    W = torch.randn(V, d, generator=rng, device=device)
    allowed = torch.rand(V, generator=rng, device=device) > 0.3 if masked else None
    ids, logps, counts = plausible_vertices(H, W, 0.01, C, allowed=allowed, backend=backend)
    assert ids.shape == logps.shape == (T, C)
    assert [(row, n) for row, n in zip(ids.tolist(), counts.tolist(), strict=True)] == brute(H, W, 0.01, C, allowed)
    for t in range(T):
        n = min(C, int(counts[t]))
        assert (logps[t, n:] == -torch.inf).all()
        exact = torch.log_softmax(W.double() @ H[t].double(), 0)[ids[t, :n]]
        assert torch.allclose(logps[t, :n].double(), exact, atol=1e-5)


def test_ties_by_id_and_the_floor_is_inclusive(backend, device):
    H, W = torch.zeros(2, 3, device=device), torch.randn(4, 3, device=device)  # every token has p = 1/4
    ids, _, counts = plausible_vertices(H, W, 0.25 - 1e-6, 3, backend=backend)
    assert ids.tolist() == [[0, 1, 2]] * 2
    assert counts.tolist() == [4, 4]
    ids, logps, counts = plausible_vertices(H, W, 0.25 + 1e-6, 3, backend=backend)
    assert ids.tolist() == [[-1] * 3] * 2
    assert (logps == -torch.inf).all()
    assert counts.tolist() == [0, 0]


def test_the_head_transform_is_that_of_linear_logprob(backend, device, rng):
    H, W = torch.randn(4, 8, generator=rng, device=device), torch.randn(30, 8, generator=rng, device=device)
    bias = torch.randn(30, generator=rng, device=device)
    transform = {"scale": 0.8, "softcap": 4.0, "temperature": 1.7}
    ids, logps, _ = plausible_vertices(H, W, 1e-3, 30, bias=bias, **transform, backend=backend)
    for t in range(4):
        listed = ids[t][ids[t] >= 0]
        exact = linear_logprob(H[t].expand(len(listed), -1), W, listed, bias=bias, **transform, backend="reference")
        assert torch.allclose(logps[t, : len(listed)], exact, atol=1e-5)
        assert (logps[t, : len(listed)].diff() <= 0).all()
        assert logps[t, len(listed) - 1] >= math.log(1e-3)


def test_no_rows(backend, device):
    ids, logps, counts = plausible_vertices(
        torch.zeros(0, 4, device=device), torch.ones(3, 4, device=device), 0.1, 5, backend=backend
    )
    assert (ids.shape, logps.shape, counts.shape) == ((0, 5), (0, 5), (0,))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"p_min": 0.0}, "p_min must be in"), ({"p_min": 1.5}, "p_min"), ({"max_candidates": 0}, "max_candidates")],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        plausible_vertices(
            **({"H": torch.ones(1, 2), "W": torch.ones(3, 2), "p_min": 0.1, "max_candidates": 2} | change)
        )
