"""What every registered op is run in: its tensors' device, no autocast."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from latentrevise.kernels import hull_step, linear_logprob, mixture_embed, softmax_mixture, vertex_oracle
from latentrevise.kernels.registration import register


def test_an_op_runs_on_the_device_of_its_tensors(monkeypatch):
    current = 0

    @contextmanager
    def switch(device):
        nonlocal current
        before, current = current, device.index
        yield
        current = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", switch)

    @register("test_where", lambda x: x)
    def where(x: torch.Tensor) -> torch.Tensor:
        return current

    assert [where(SimpleNamespace(device=torch.device("cuda", i))) for i in (0, 1)] == [0, 1]
    assert current == 0


@pytest.mark.parametrize("backend", ["reference", None])
def test_autocast_changes_nothing(backend):
    g = torch.Generator().manual_seed(0)
    G, E, W = (torch.randn(*shape, generator=g) for shape in ((5, 32), (200, 32), (200, 32)))
    ids, weights = torch.randint(200, (5, 3), generator=g), torch.tensor([[0.7, 0.3, 0.0]]).expand(5, 3).contiguous()
    theta, y, H = torch.randn(5, 200, generator=g), torch.arange(5), G.clone().requires_grad_()

    def everything():
        return (
            *linear_logprob(H, W, y, entropy=True, backend=backend),
            *vertex_oracle(G, E, backend=backend),
            *hull_step(G, None, E, ids, weights, 0.5, slot=2, backend=backend),
            mixture_embed(ids, weights, E, backend=backend),
            softmax_mixture(theta, E, backend=backend),
        )

    plain = everything()
    with torch.autocast("cpu", torch.bfloat16):
        cast = everything()
    for a, b in zip(plain, cast, strict=True):
        assert torch.equal(a, b)
    (one,), (two,) = (torch.autograd.grad(logp.sum() + entropy.sum(), H) for logp, entropy, *_ in (plain, cast))
    assert torch.equal(one, two)
