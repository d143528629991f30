from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrevise.kernels import vertex_oracle

OP = "vertex_oracle"


def brute(G, E, allowed=None, Q2=None, W2=None, candidates=None):
    """argmin by a loop over Python floats, float64 scores."""
    ids = []
    for t in range(G.shape[0]):
        best, chosen = None, -1
        pool = range(E.shape[0]) if candidates is None else sorted(i for i in candidates[t].tolist() if i >= 0)
        for v in pool:
            if allowed is not None and not allowed[v]:
                continue
            score = float(G[t].double() @ E[v].double())
            if Q2 is not None:
                score += float(Q2[t].double() @ W2[v].double())
            if best is None or score < best:
                best, chosen = score, v
        ids.append(chosen)
    return torch.tensor(ids, dtype=torch.int64)


def rand(rng, device, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=rng, device=device).to(dtype)


def score(G, E, ids):
    return (G.double() * E[ids].double()).sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("T", "V", "d"), [(1, 1, 1), (3, 17, 5), (127, 301, 67), (16, 1187, 128), (65, 4099, 33)])
def test_the_chosen_vertex_is_the_float64_minimum(backend, device, rng, T, V, d, dtype):
    G, E = rand(rng, device, T, d, dtype=dtype), rand(rng, device, V, d, dtype=dtype)
    allowed = torch.rand(V, generator=rng, device=device) > 0.3
    allowed[V // 2] = True
    ids, values = vertex_oracle(G, E, allowed, backend=backend)
    assert ids.dtype == torch.int64
    assert values.dtype == torch.float32
    assert allowed[ids].all()
    exact = (G.double() @ E.double().T).masked_fill(~allowed, torch.inf).amin(1)
    bound = 2**-23 * (d + 8) * (G.double().abs() @ E.double().abs().T).amax(1)
    assert (score(G, E, ids) - exact <= bound).all()
    assert ((values.double() - exact).abs() <= bound).all()


def test_ties_go_to_the_lowest_allowed_id(backend, device):
    E = torch.tensor([[1.0, 0], [-1, 0], [-1, 0], [0, -1], [-1, 0]], device=device)
    G = torch.tensor([[1.0, 0], [0, 0], [0, 1]], device=device)
    assert vertex_oracle(G, E, backend=backend)[0].tolist() == [1, 0, 3]
    allowed = torch.tensor([False, False, True, True, True], device=device)
    assert vertex_oracle(G, E, allowed, backend=backend)[0].tolist() == [2, 2, 3]
    order = torch.tensor([[4, 2, -1], [4, 3, -1], [3, -1, -1]], device=device)
    assert vertex_oracle(G, E, allowed, candidates=order, backend=backend)[0].tolist() == [2, 3, 3]


def test_negative_zero_ties_with_zero(backend, device):
    E = torch.tensor([[0.0], [1.0], [-0.0]], device=device)
    G = torch.tensor([[0.0], [-0.0]], device=device)
    assert vertex_oracle(G, E, backend=backend)[0].tolist() == [0, 0]


def test_infinities_and_nan(backend, device):
    inf, nan = float("inf"), float("nan")
    E = torch.tensor([[inf], [inf], [1.0], [-inf], [-inf]], device=device)
    G = torch.tensor([[1.0]], device=device)
    ids, values = vertex_oracle(G, E, backend=backend)
    assert (ids.tolist(), values.tolist()) == ([3], [-inf])
    only = torch.tensor([False, True, False, False, False], device=device)
    ids, values = vertex_oracle(G, E, only, backend=backend)
    assert (ids.tolist(), values.tolist()) == ([1], [inf])
    E = torch.tensor([[1.0], [nan], [-inf], [nan]], device=device)
    ids, values = vertex_oracle(G, E, backend=backend)
    assert ids.tolist() == [1]
    assert values.isnan().all()
    masked = torch.tensor([True, False, True, False], device=device)
    assert vertex_oracle(G, E, masked, backend=backend)[0].tolist() == [2]


def test_second_table_and_candidates(backend, device, rng):
    T, V, d, d2 = 9, 57, 8, 5
    G, E, Q2, W2 = (rand(rng, device, *s) for s in ((T, d), (V, d), (T, d2), (V, d2)))
    allowed = torch.rand(V, generator=rng, device=device) > 0.2
    ids, values = vertex_oracle(G, E, allowed, Q2=Q2, W2=W2, backend=backend)
    assert ids.tolist() == brute(G, E, allowed, Q2, W2).tolist()
    assert torch.allclose(values.double(), score(G, E, ids) + score(Q2, W2, ids), atol=1e-5)
    candidates = torch.randint(-1, V, (T, 12), generator=rng, device=device)
    candidates[:, 0] = allowed.nonzero()[0]
    for dtype in (torch.int32, torch.int64):
        ids, _ = vertex_oracle(G, E, allowed, Q2=Q2, W2=W2, candidates=candidates.to(dtype), backend=backend)
        assert ids.tolist() == brute(G, E, allowed, Q2, W2, candidates).tolist()


def test_no_rows(backend, device):
    ids, values = vertex_oracle(torch.zeros(0, 4, device=device), torch.ones(3, 4, device=device), backend=backend)
    assert ids.shape == values.shape == (0,)


def test_blocks_do_not_change_the_result(monkeypatch):
    from latentrevise.kernels.vertex_oracle import reference

    g = torch.Generator().manual_seed(3)
    G, E = torch.randint(-2, 3, (50, 4), generator=g).float(), torch.randint(-2, 3, (97, 4), generator=g).float()
    whole = vertex_oracle(G, E, backend="reference")
    for block in (1, 7, 96):
        monkeypatch.setattr(reference, "BLOCK", block)
        for a, b in zip(whole, vertex_oracle(G, E, backend="reference"), strict=True):
            assert torch.equal(a, b)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_small_integer_tables_match_brute_force(data):
    """Integers make every score exact and ties frequent."""
    T, V, d = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 12)), data.draw(st.integers(1, 3))
    seed = data.draw(st.integers(0, 2**31))
    g = torch.Generator().manual_seed(seed)
    G, E = torch.randint(-2, 3, (T, d), generator=g).float(), torch.randint(-2, 3, (V, d), generator=g).float()
    allowed = torch.rand(V, generator=g) > 0.4
    allowed[data.draw(st.integers(0, V - 1))] = True
    assert vertex_oracle(G, E, allowed)[0].tolist() == brute(G, E, allowed).tolist()


def test_nothing_allowed_is_an_error():
    G, E = torch.ones(2, 3), torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"no vertex is allowed at position 0 \(2 such positions\)"):
        vertex_oracle(G, E, torch.zeros(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="position 1 "):
        vertex_oracle(G, E, candidates=torch.tensor([[2], [-1]]))
    with pytest.raises(ValueError, match="no vertex is allowed"):
        vertex_oracle(G, E, candidates=torch.zeros(2, 0, dtype=torch.int64))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"G": torch.ones(2, 5)}, ValueError, r"G must have shape \[\*, 3\], got \[2, 5\]"),
        ({"E": torch.ones(3, 4).T}, ValueError, "E must be laid out row by row"),
        ({"allowed": torch.ones(4)}, TypeError, "allowed must be bool"),
        ({"allowed": torch.ones(3, dtype=torch.bool)}, ValueError, "allowed must have shape"),
        ({"Q2": torch.ones(2, 3)}, ValueError, "Q2 and W2 belong together"),
        ({"Q2": torch.ones(2, 2), "W2": torch.ones(5, 2)}, ValueError, r"W2 must have shape \[4, \*\]"),
        ({"candidates": torch.tensor([[0], [4]])}, ValueError, r"candidates must be in \[0, 4\) or -1"),
        ({"candidates": torch.tensor([[0], [-2]])}, ValueError, "from -2 to 0"),
        ({"candidates": torch.tensor([[0]])}, ValueError, "candidates must have shape"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        vertex_oracle(**({"G": torch.ones(2, 3), "E": torch.ones(4, 3)} | change))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_of_tied_tables_are_added(dtype):
    """One product instead of two: the bits of <G + Q2, E>, for the table itself and for another view of it."""
    g = torch.Generator().manual_seed(3)
    G, Q2, E = (torch.randn(n, 40, generator=g).to(dtype) for n in (9, 9, 300))
    ids, values = vertex_oracle(G.float() + Q2.float(), E)
    for W2, same in ((E, True), (E.detach().view(300, 40), True), (E.clone(), False)):
        found = vertex_oracle(G, E, Q2=Q2, W2=W2)
        assert torch.equal(found[0], ids)
        assert torch.equal(found[1], values) == same
