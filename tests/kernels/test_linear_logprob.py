from __future__ import annotations

import pytest
import torch
from latentrevise.kernels import linear_logprob

OP = "linear_logprob"

TRANSFORMS = [
    {},
    {"scale": 0.0625, "temperature": 0.7},
    {"softcap": 5.0},
    {"softcap": 3.0, "scale": 1.5, "temperature": 1.3},
]


def rand(rng, device, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=rng, device=device).to(dtype)


def truth(H, W, y, bias=None, scale=1.0, softcap=None, temperature=1.0):
    """The definition, term by term, in float64."""
    logits = H.double() @ W.double().T
    logits = scale * (logits if bias is None else logits + bias.double())
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logits = logits / temperature
    lse = torch.logsumexp(logits, 1)
    logp = logits[torch.arange(len(y), device=y.device), y] - lse
    p = torch.exp(logits - lse[:, None])
    return logp, -(p * (logits - lse[:, None])).sum(1)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("N", "V", "d"), [(1, 1, 1), (3, 131, 17), (129, 507, 64)])
def test_values(backend, device, rng, N, V, d, with_bias, transform):
    H, W = rand(rng, device, N, d), rand(rng, device, V, d)
    bias = rand(rng, device, V) if with_bias else None
    y = torch.randint(V, (N,), generator=rng, device=device)
    logp, entropy = linear_logprob(H, W, y, bias=bias, entropy=True, backend=backend, **transform)
    expected, expected_entropy = truth(H, W, y, bias, **transform)
    assert logp.dtype == torch.float32
    assert torch.allclose(logp.double(), expected, rtol=1e-5, atol=2e-5)
    assert torch.allclose(entropy.double(), expected_entropy, rtol=1e-4, atol=2e-5)
    alone = linear_logprob(H, W, y, bias=bias, backend=backend, **transform)
    assert torch.allclose(alone, logp, rtol=1e-6, atol=1e-6)


def test_no_rows(backend, device):
    H, W = torch.zeros(0, 4, device=device, requires_grad=True), torch.ones(7, 4, device=device)
    logp = linear_logprob(H, W, torch.zeros(0, dtype=torch.int64, device=device), backend=backend)
    assert logp.shape == (0,)
    logp.sum().backward()
    assert H.grad.shape == (0, 4)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_gradcheck_of_the_reference(transform):
    g = torch.Generator().manual_seed(0)
    H = torch.randn(3, 4, dtype=torch.float64, generator=g).requires_grad_()
    W = torch.randn(6, 4, dtype=torch.float64, generator=g).requires_grad_()
    bias = torch.randn(6, dtype=torch.float64, generator=g).requires_grad_()
    y = torch.tensor([0, 5, 2])

    def op(H, W, bias):
        return linear_logprob(H, W, y, bias=bias, entropy=True, backend="reference", **transform)

    assert torch.autograd.gradcheck(op, (H, W, bias))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"y": torch.tensor([0, 4])}, ValueError, r"y must be in \[0, 4\)"),
        ({"y": torch.tensor([0, 1], dtype=torch.int32)}, TypeError, "y must be int64"),
        ({"y": torch.tensor([0])}, ValueError, r"y must have shape \[2\]"),
        ({"bias": torch.ones(3)}, ValueError, r"bias must have shape \[4\]"),
        ({"temperature": 0.0}, ValueError, "temperature must be a finite number > 0"),
        ({"softcap": -1.0}, ValueError, "softcap must be"),
        ({"scale": float("nan")}, ValueError, "scale must be"),
        ({"W": torch.ones(3, 4).T}, ValueError, "W must be laid out row by row"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        linear_logprob(**({"H": torch.ones(2, 3), "W": torch.ones(4, 3), "y": torch.tensor([0, 1])} | change))
