"""The contract tests again on the Triton kernels, in Triton's interpreter: it has to be chosen before the kernels are
defined, so they run in a process of their own, and with them the tests below that call these kernels directly. Tests
that launch thousands of programs are left out for time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from latentrevise.kernels import vertex_oracle
from latentrevise.kernels.dispatch import IMPLEMENTATIONS, interpreting_triton
from latentrevise.kernels.entropic_step import reference as entropic_reference
from latentrevise.kernels.linear_logprob import blocked
from latentrevise.kernels.numerics import Combination, Transform

HERE = os.path.dirname(__file__)
LEFT_OUT = (
    "test_a_long_run_finds_the_best_candidate",
    "test_thread_count_does_not_change_a_bit",
    "test_offsets_beyond_two_to_the_31",
    "65-4099-33",
    "127-301-67",
    "129-507-64",
)


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(interpreting_triton(), reason="this is the interpreter")
@pytest.mark.parametrize("names", [tuple(IMPLEMENTATIONS), ("triton",)], ids=["contracts", "triton"])
def test_in_the_interpreter(names):
    wanted = " and not ".join(("triton", *LEFT_OUT))
    command = [sys.executable, "-m", "pytest", "-v", "-x", "-p", "no:cacheprovider", "-k", wanted]
    command += [os.path.join(HERE, f"test_{name}.py") for name in names]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in names:
        assert re.search(rf"test_{name}\.py::.* PASSED", done.stdout), done.stdout


interpreted = pytest.mark.skipif(not interpreting_triton(), reason="run by test_in_the_interpreter")
NAN, INF = float("nan"), float("inf")


def rand(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@interpreted
@pytest.mark.parametrize(
    ("table", "queries"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
)
def test_many_tokens_and_descriptors(monkeypatch, table, queries):
    from latentrevise.kernels.vertex_oracle import triton

    G, E = rand(37, 24, dtype=queries), rand(300, 24, dtype=table, seed=1)
    exact = G.double() @ E.double().T
    ids, values = pointers = vertex_oracle(G, E, backend="triton")
    assert torch.equal(ids, exact.argmin(1))
    assert torch.allclose(values.double(), exact.amin(1), atol=1e-5)
    monkeypatch.setattr(triton, "has_copy_engine", lambda device: False)
    for a, b in zip(pointers, vertex_oracle(G, E, backend="triton"), strict=True):
        assert torch.equal(a, b)
    monkeypatch.undo()
    assert vertex_oracle(G[:, :23], E[:, :23], backend="triton")[0].shape == (37,)  # rows that a descriptor cannot have


def screened(G, E, allowed=None, Q2=None, W2=None):
    """Ids that screening finds, and rows that it scored again; compared with float64."""
    from latentrevise.kernels.vertex_oracle import triton

    keys, rescored = triton.screened_keys(G, E, Q2, W2, allowed)
    exact = G.double() @ E.double().T
    if Q2 is not None:
        exact += Q2.double() @ W2.double().T
    if allowed is not None:
        exact.masked_fill_(~allowed, INF)
    assert torch.equal(keys[0] & 0xFFFFFFFF, exact.argmin(1))  # torch's first of equal ones is the lowest here
    return rescored


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_screening_finds_the_float64_minimum(dtype):
    """Of random tables, with ties, duplicates, a mask, a second table, heavy tails, and near-ties far below the
    rounding of bfloat16: many rows within 2**-20 of each other, spread over tiles."""
    G, E = rand(6, 24), rand(600, 24, dtype=dtype, seed=1)
    assert (screened(G, E) < 20).all()
    E[300:600] = E[:300]  # each minimum twice, in other tiles
    assert (screened(G, E) >= 2).all()
    screened(G, E, torch.rand(600, generator=torch.Generator().manual_seed(2)) > 0.5)
    screened(G, E, None, rand(6, 8, seed=3), rand(600, 8, dtype=dtype, seed=4))
    heavy = (rand(600, 24, seed=5) * torch.exp(2 * rand(600, 1, seed=6))).to(dtype)
    screened(G, heavy)
    near = torch.zeros(600, 24)
    near[:, :2] = torch.tensor([-1.0, 1.0])
    near[:, 2] = rand(600, seed=7)
    G = torch.ones(3, 24)
    G[:, 2] = torch.tensor([2.0**-18, 2.0**-20, -(2.0**-22)])
    assert (screened(G, near.to(dtype)) > 300).all()  # nothing is certain: all is made again, and right


@interpreted
def test_screening_of_what_is_not_finite_and_of_zeros():
    from latentrevise.kernels.vertex_oracle import triton

    G = torch.tensor([[NAN, 1.0], [INF, 1.0], [0.0, 0.0], [1.0, 1.0]])
    E = torch.tensor([[1.0, 2.0], [0.5, 1.0], [-1.0, 2.0], [-1.0, 2.0]])
    keys, rescored = triton.screened_keys(G, E, None, None, None)
    assert (keys[0] & 0xFFFFFFFF).tolist() == [0, 2, 0, 2]
    assert rescored.tolist()[2] == 0
    E[1, 0] = NAN
    assert (triton.screened_keys(G[3:], E, None, None, None)[0] & 0xFFFFFFFF).tolist() == [[1]]


@interpreted
def test_a_table_that_changes_is_measured_again():
    from latentrevise.kernels.vertex_oracle import triton

    E = rand(40, 8, dtype=torch.bfloat16)
    first = triton.rounded_table(E, 128)[1]
    assert triton.rounded_table(E.detach(), 128)[1] is first
    E.mul_(4)
    again = triton.rounded_table(E, 128)[1]
    assert torch.equal(again, 4 * first)
    assert len([key for key in triton._measured if key[0] == E.untyped_storage()._cdata]) <= 1


@interpreted
def test_candidates_are_scored_where_they_are():
    """In parts of several rows; what is no row of the table counts as padding, as on a GPU, where nobody checked."""
    from latentrevise.kernels.vertex_oracle import triton

    G, E, Q2, W2 = rand(3, 9), rand(50, 9, seed=1), rand(3, 4, seed=2), rand(50, 4, seed=3)
    candidates = torch.stack([torch.randperm(50, generator=torch.Generator().manual_seed(t))[:19] for t in range(3)])
    exact = torch.gather(G.double() @ E.double().T + Q2.double() @ W2.double().T, 1, candidates)
    best = candidates.gather(1, exact.argmin(1, keepdim=True))[:, 0]
    candidates = torch.cat([torch.tensor([[50, -7, 2**31]]).expand(3, -1), candidates], 1)
    ids, values = triton.vertex_oracle(G, E, None, Q2, W2, candidates)
    assert torch.equal(ids, best)
    assert torch.allclose(values.double(), exact.amin(1), atol=1e-5)
    ids, values = triton.vertex_oracle(G, E, None, None, None, candidates[:, :3])
    assert (ids.tolist(), values.tolist()) == ([-1] * 3, [INF] * 3)
    ids, _ = triton.vertex_oracle(G, E, None, None, None, candidates[:, :0])
    assert ids.tolist() == [-1] * 3


@interpreted
def test_log_probs_of_more_tiles_than_a_merging_program_has_lanes():
    from latentrevise.kernels.linear_logprob import triton

    H, W = 4 * rand(2, 4), rand(64 * triton.LANES + 70, 4, seed=1)
    y = torch.tensor([3, len(W) - 1])
    logp, entropy, gradient = triton.linear_logprob(H, W, y, None, Transform(1.0, None, 1.0), True, True)
    exact = H.double().requires_grad_()
    logps = (exact @ W.double().T).log_softmax(1)
    (grad,) = torch.autograd.grad(logps[[0, 1], y].sum(), exact)
    assert torch.allclose(logp.double(), logps[[0, 1], y], rtol=1e-5)
    assert torch.allclose(entropy.double(), -(logps.exp() * logps).sum(1), rtol=1e-5)
    assert torch.allclose(gradient.double(), grad, atol=1e-5)


@interpreted
def test_targets_outside_the_table_are_nan():
    """As on a GPU, where nobody checked, and in no other row."""
    from latentrevise.kernels.linear_logprob import triton

    H, W, y = rand(4, 6), rand(150, 6, seed=1), torch.tensor([-100, 7, 150, 149])
    transform = Transform(1.0, 5.0, 1.0)
    logp, entropy, gradient = triton.linear_logprob(H, W, y, None, transform, True, True)
    again = blocked.backward(H, W, y, None, transform, logp, None, torch.ones(4), None, True, False, False)[0]
    for x in (logp, entropy, gradient[:, 0], again[:, 0]):
        assert x.isnan().tolist() == [True, False, True, False]
    torch.testing.assert_close(again[[1, 3]], gradient[[1, 3]], rtol=1e-4, atol=1e-5)


@interpreted
@pytest.mark.parametrize("op", ["hull_step", "entropic_step"])
def test_atoms_outside_the_table_are_nan(op):
    from latentrevise.kernels.entropic_step import triton as entropic
    from latentrevise.kernels.hull_step import triton as hull

    G, E, gamma = rand(3, 8), rand(30, 8, seed=1), torch.full((3,), 0.2)
    ids, weights = torch.tensor([[3, 30, 0], [3, 4, -1], [-9, 5, 0]]), torch.tensor([[0.5, 0.5, 0.0]]).repeat(3, 1)
    if op == "hull_step":
        _, _, z, _, gap = hull.hull_step(G, None, E, ids, weights, gamma, 2, Combination(1.0, 0.0, "sum"), None, None)
    else:
        _, z, gap = entropic.entropic_step(G, None, E, ids, weights, 1.0, Combination(1.0, 0.0, "sum"), None)
    assert gap.isnan().tolist() == z.isnan().all(1).tolist() == z.isnan().any(1).tolist() == [True, False, True]


@interpreted
def test_nan_and_infinite_gradients():
    """NaN is in the gap though a slot of weight 0 has a score of 0; infinity stays infinity."""
    from latentrevise.kernels.entropic_step import triton as entropic

    G = torch.tensor([[NAN, 1.0], [INF, 1.0], [2.0, 1.0]])
    E, ids = torch.tensor([[1.0, 2.0], [3.0, 1.0], [0.5, 1.0]]), torch.tensor([[0, 1, 2]]).expand(3, -1).contiguous()
    weights = torch.tensor([[0.5, 0.5, 0.0]]).repeat(3, 1)
    arguments = (G, None, E, ids, weights, 1.0, Combination(1.0, 0.0, "sum"))
    for segments in (None, torch.tensor([0, 1, 0])):
        mine, reference = (x.entropic_step(*arguments, segments) for x in (entropic, entropic_reference))
        for a, b in zip(mine, reference, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)
        assert mine[2].isnan().tolist() == [True, True, False]
