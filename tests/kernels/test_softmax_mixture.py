from __future__ import annotations

import pytest
import torch

from latentrevise.kernels import softmax_mixture

OP = "softmax_mixture"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("T", "V", "d"), [(0, 3, 2), (1, 1, 1), (9, 131, 33)])
@pytest.mark.parametrize("tau", [1.0, 0.3])
def test_values(backend, device, rng, T, V, d, tau, dtype):
    theta = 3 * torch.randn(T, V, generator=rng, device=device)
    E = torch.randn(V, d, generator=rng, device=device).to(dtype)
    z = softmax_mixture(theta, E, tau, backend=backend)
    exact = torch.softmax(theta.double() / tau, 1) @ E.double()
    assert z.dtype == dtype
    assert torch.allclose(z.double(), exact, rtol=0, atol=2e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("T", "V", "d"), [(1, 5, 3), (37, 301, 20)])
def test_gradient(backend, device, rng, T, V, d, dtype):
    theta = torch.randn(T, V, generator=rng, device=device).to(dtype).requires_grad_()
    E = torch.randn(V, d, generator=rng, device=device).to(dtype)
    c = torch.randn(T, d, generator=rng, device=device)
    (c * softmax_mixture(theta, E, 0.7, backend=backend)).sum().backward()
    exact = theta.detach().double().requires_grad_()
    (c.double() * (torch.softmax(exact / 0.7, 1) @ E.double())).sum().backward()
    assert theta.grad.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert (theta.grad.double() - exact.grad).norm() <= tolerance * exact.grad.norm()


def test_minus_infinity_excludes_a_row(backend, device):
    E = torch.tensor([[1.0], [2.0], [4.0]], device=device)
    theta = torch.tensor([[0.0, 0.0, -torch.inf], [-torch.inf, 5.0, -torch.inf]], device=device)
    assert softmax_mixture(theta, E, backend=backend).flatten().tolist() == [1.5, 2.0]
    assert softmax_mixture(torch.full((1, 3), -torch.inf, device=device), E, backend=backend).isnan().all()


def test_gradcheck_of_the_reference():
    g = torch.Generator().manual_seed(0)
    theta = torch.randn(3, 6, dtype=torch.float64, generator=g).requires_grad_()
    E = torch.randn(6, 4, dtype=torch.float64, generator=g).requires_grad_()
    assert torch.autograd.gradcheck(lambda t, E: softmax_mixture(t, E, 0.7, backend="reference"), (theta, E))


def test_bad_input():
    with pytest.raises(ValueError, match=r"theta must have shape \[\*, 3\]"):
        softmax_mixture(torch.ones(2, 4), torch.ones(3, 2))
    with pytest.raises(ValueError, match="tau must be"):
        softmax_mixture(torch.ones(2, 3), torch.ones(3, 2), 0.0)
