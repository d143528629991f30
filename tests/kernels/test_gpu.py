"""What only a GPU can show: no op waits for the device, every op can be captured in a CUDA graph and replayed on other
values, tables may be larger than 2**31 elements and lie on any device, and torch's own checks of the registered ops
hold for CUDA tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_torch_ops import cases, ops

from latentrevise.kernels import (
    dispatch,
    entropic_step,
    hull_step,
    linear_logprob,
    mixture_embed,
    plausible_vertices,
    softmax_mixture,
    vertex_oracle,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

Inputs = dict[str, torch.Tensor]
BF16 = torch.bfloat16


def inputs(seed: int) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    T, V, d = 70, 3000, 64
    weights = torch.rand(T, 4, generator=g)
    weights[:, -1] = 0
    x = {
        "G": torch.randn(T, d, generator=g).to(BF16),
        "E": torch.randn(V, d, generator=g).mul(0.3).to(BF16),
        "allowed": torch.rand(V, generator=g) > 0.3,
        "y": torch.randint(V, (T,), generator=g),
        "ids": torch.randint(V, (T, 4), generator=g),
        "weights": weights / weights.sum(1, keepdim=True),
        "theta": torch.randn(T, V, generator=g).to(BF16),
        "segments": torch.randint(7, (T,), generator=g),
    }
    return {name: tensor.cuda() for name, tensor in x.items()}


def logprob(x: Inputs, backend: str) -> tuple[torch.Tensor, ...]:
    H = x["G"].detach().requires_grad_()
    logp = linear_logprob(H, x["E"], x["y"], softcap=5.0, backend=backend)
    return logp.detach(), *torch.autograd.grad(logp.sum(), H)


def logprob_entropy(x: Inputs, backend: str) -> tuple[torch.Tensor, ...]:
    H = x["G"].detach().requires_grad_()
    logp, entropy = linear_logprob(H, x["E"], x["y"], entropy=True, backend=backend)
    return logp.detach(), entropy.detach(), *torch.autograd.grad(logp.sum() + entropy.sum(), H)


def projection(x: Inputs, backend: str) -> tuple[torch.Tensor, ...]:
    theta = x["theta"].detach().requires_grad_()
    z = softmax_mixture(theta, x["E"], 0.7, backend=backend)
    return z.detach(), *torch.autograd.grad(z.sum(), theta)


def mixture(x: Inputs, backend: str) -> tuple[torch.Tensor, ...]:
    weights = x["weights"].detach().requires_grad_()
    z = mixture_embed(x["ids"], weights, x["E"], backend=backend)
    return z.detach(), *torch.autograd.grad(z.sum(), weights)


CALLS: dict[str, Callable[[Inputs, str], tuple[torch.Tensor, ...]]] = {
    "vertex_oracle": lambda x, backend: vertex_oracle(x["G"], x["E"], x["allowed"], backend=backend),
    "plausible_vertices": lambda x, backend: plausible_vertices(x["G"], x["E"], 0.01, 9, backend=backend),
    "linear_logprob": logprob,
    "linear_logprob entropy": logprob_entropy,
    "softmax_mixture": projection,
    "mixture_embed": mixture,
    "hull_step": lambda x, backend: hull_step(
        x["G"], x["G"], x["E"], x["ids"], x["weights"], 0.3, slot=3, beta=0.5, combine="normalized",
        allowed=x["allowed"], backend=backend),
    "entropic_step": lambda x, backend: entropic_step(
        x["G"], None, x["E"], x["ids"], x["weights"], 1.0, segments=x["segments"], backend=backend),
}  # fmt: skip
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
PAIRS = [
    (name, backend)
    for name in CALLS
    for backend in dispatch.IMPLEMENTATIONS[name.split()[0]]
    if backend in ("triton", "cuda") or (backend == "hopper" and HOPPER)
]


@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_nothing_waits_for_the_device(name, backend):
    x = inputs(0)
    CALLS[name](x, backend)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        CALLS[name](x, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_a_cuda_graph_of_it_replays_on_other_values(name, backend):
    x = inputs(0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            CALLS[name](x, backend)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = CALLS[name](x, backend)
    for key, value in inputs(1).items():
        x[key].copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    for replayed, eager in zip(captured, CALLS[name](x, backend), strict=True):
        assert torch.equal(replayed, eager)


@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_offsets_beyond_two_to_the_31(name, backend):
    x = inputs(0)
    stride = 2**31 // 2048  # the last third of the rows lies behind 2**31 elements, 4 GiB
    far = torch.empty(len(x["E"]) * stride, dtype=BF16, device="cuda").as_strided(x["E"].shape, (stride, 1))
    far.copy_(x["E"])
    for a, b in zip(CALLS[name](x | {"E": far}, backend), CALLS[name](x, backend), strict=True):
        assert torch.equal(a, b)


def test_ids_outside_the_table_are_no_error_and_read_nothing():
    x = inputs(0)
    V = len(x["E"])
    x["y"][:2] = torch.tensor([-100, V])
    x["ids"][:2, 0] = torch.tensor([-1, V])
    wrong = torch.arange(70, device="cuda") < 2
    names = ("linear_logprob", "linear_logprob entropy", "mixture_embed", "entropic_step")
    for name, backend in (pair for pair in PAIRS if pair[0] in names):
        found = CALLS[name](x, backend)
        z = found[1] if name == "entropic_step" else found[0]
        assert torch.equal(z.flatten(1).isnan().all(1) if z.dim() > 1 else z.isnan(), wrong), (name, backend)
    step = CALLS["hull_step"](x, "triton")
    assert torch.equal(step[2].isnan().any(1), wrong)
    assert torch.equal(step[4].isnan(), wrong)
    candidates = torch.where(wrong[:, None], V, x["ids"])
    ids, values = vertex_oracle(x["G"], x["E"], candidates=candidates, backend="triton")
    assert torch.equal(ids == -1, wrong)
    assert torch.equal(values == torch.inf, wrong)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_tensors_on_another_device_than_the_current_one(name, backend):
    x = inputs(0)
    there = CALLS[name]({key: value.to("cuda:1") for key, value in x.items()}, backend)
    for a, b in zip(there, CALLS[name](x, backend), strict=True):
        assert a.device.index == 1
        assert torch.equal(a.cpu(), b.cpu())


@pytest.mark.parametrize("name", cases())
def test_opcheck(name):
    arguments = tuple(a.cuda() if isinstance(a, torch.Tensor) else "triton" if a == "cpu" else a for a in cases()[name])
    torch.library.opcheck(getattr(ops, name).default, arguments)
