"""The CUDA kernels in the dtypes and layouts they must serve: on a GPU, or in the emulation of test_emulated.py."""

from __future__ import annotations

import emulated_cuda
import pytest
import torch

from latentrevise.kernels import dispatch, linear_logprob, vertex_oracle

WHY = dispatch.unavailable("cuda")
DEVICE = torch.device("cpu" if emulated_cuda.installed() else "cuda")
pytestmark = [pytest.mark.skipif(WHY is not None, reason=str(WHY))]
if not emulated_cuda.installed():
    pytestmark.append(pytest.mark.gpu)
    if WHY is None and torch.cuda.get_device_capability() != (9, 0):
        pytestmark.append(pytest.mark.skip(reason="needs compute capability 9.0"))

BF16 = torch.bfloat16
TRANSFORM = {"scale": 0.7, "softcap": 3.0, "temperature": 1.3}
# one tile and less, several tiles and parts, an odd vocabulary, dimensions that end inside a 64-wide step; clusters,
# one of them with a block of no tokens, consumers two stages apart
SHAPES = [(1, 3, 8), (37, 130, 40), (70, 1100, 72), (260, 520, 328)]


def rand(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    g = torch.Generator(device=DEVICE).manual_seed(seed)
    return (scale * torch.randn(*shape, generator=g, device=DEVICE)).to(BF16)


@pytest.mark.parametrize(("T", "V", "d"), SHAPES)
def test_oracle(T, V, d):
    G, E = rand(T, d), rand(V, d, seed=1)
    E[V // 2 :] = E[: V - V // 2].clone()  # ties
    allowed = torch.rand(V, generator=torch.Generator().manual_seed(2)).to(DEVICE) > 0.3
    allowed[0] = True
    scores = (G.double() @ E.double().T).masked_fill(~allowed, torch.inf)
    ids, values = vertex_oracle(G, E, allowed, backend="hopper")
    assert torch.allclose(values.double(), scores.amin(1), rtol=1e-5, atol=1e-4)
    close = scores <= scores.amin(1, keepdim=True) + 1e-9  # equal rows have equal scores
    assert (ids <= torch.where(close, torch.arange(V, device=DEVICE), V).amin(1)).all()
    assert torch.allclose(scores.gather(1, ids[:, None])[:, 0], scores.amin(1), rtol=1e-5, atol=1e-4)


def test_oracle_nan_and_nothing_allowed():
    G, E = rand(5, 16), rand(300, 16, seed=1)
    E[7] = E[140] = torch.nan
    ids, values = vertex_oracle(G, E, backend="hopper")
    assert ids.tolist() == [7] * 5
    assert values.isnan().all()
    if DEVICE.type == "cuda":
        ids, values = vertex_oracle(G, E, torch.zeros(300, dtype=torch.bool, device=DEVICE), backend="hopper")
        assert ids.tolist() == [-1] * 5
        assert (values == torch.inf).all()


@pytest.mark.parametrize(("N", "V", "d"), SHAPES)
@pytest.mark.parametrize(
    "transform", [{}, {"scale": 0.7, "softcap": 3.0, "temperature": 1.3}], ids=["plain", "softcap"]
)
def test_logprob(N, V, d, transform):
    H, W, bias = rand(N, d), rand(V, d, seed=1, scale=2 * d**-0.5), rand(V, seed=3) if transform else None
    y = torch.randint(V, (N,), generator=torch.Generator().manual_seed(4)).to(DEVICE)
    H[0] = 3 * W[y[0]]  # a target that stands out; much more and float64 itself cancels
    c = rand(N, seed=5).float()
    grads = []
    for x, table, where in ((H, W, "hopper"), (H.double(), W.double(), "reference")):
        x = x.clone().requires_grad_()
        logp, entropy = linear_logprob(x, table, y, bias=bias, entropy=True, **transform, backend=where)
        (c * logp).sum().backward()
        grads.append((logp.detach().double(), entropy.detach().double(), x.grad.double()))
    (logp, entropy, grad), (exact_logp, exact_entropy, exact_grad) = grads
    assert torch.allclose(logp, exact_logp, rtol=1e-5, atol=2e-5)
    assert torch.allclose(entropy, exact_entropy, rtol=1e-5, atol=2e-5)
    assert (grad - exact_grad).norm() <= 6e-3 * exact_grad.norm()
    with torch.no_grad():  # without the gradient the numbers are the same
        assert torch.equal(linear_logprob(H, W, y, bias=bias, **transform, backend="hopper").double(), logp)


def test_logprob_infinities():
    H, W = rand(4, 16), rand(200, 16, seed=1)
    y = torch.tensor([3, 3, 150, 199], device=DEVICE)
    bias = torch.zeros(200, device=DEVICE)
    bias[:199] = -torch.inf  # only the last token is left
    logp, entropy = linear_logprob(H, W, y, bias=bias, entropy=True, backend="hopper")
    assert logp.tolist() == [-torch.inf] * 3 + [0.0]
    assert (entropy.abs() < 1e-6).all()
    W[40] = torch.nan
    assert linear_logprob(H, W, y, backend="hopper").isnan().all()


def test_parts_do_not_change_the_oracle(monkeypatch):
    G, E = rand(3, 24), rand(2000, 24, seed=1)
    whole = vertex_oracle(G, E, backend="hopper")
    other = type("Properties", (), {"multi_processor_count": 1})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: other)
    for a, b in zip(whole, vertex_oracle(G, E, backend="hopper"), strict=True):
        assert torch.equal(a, b)
