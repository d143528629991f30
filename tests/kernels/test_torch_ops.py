"""The ops as torch sees them: schemas and fakes agree with what runs, ``torch.compile`` finds no graph break."""

from __future__ import annotations

import pytest
import torch

from latentrevise.kernels import (
    entropic_step,
    hull_step,
    linear_logprob,
    mixture_embed,
    plausible_vertices,
    softmax_mixture,
    vertex_oracle,
)

ops = torch.ops.latentrevise


def operands() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    T, V, d = 6, 70, 8
    weights = torch.tensor([[0.25, 0.75, 0.0]]).expand(T, -1).contiguous()
    return {
        "G": torch.randn(T, d, generator=g),
        "E": torch.randn(V, d, generator=g),
        "y": torch.randint(V, (T,), generator=g),
        "ids": torch.randint(V, (T, 3), generator=g),
        "weights": weights,
        "theta": torch.randn(T, V, generator=g),
        "gamma": torch.full((T,), 0.3),
    }


def cases() -> dict[str, tuple]:
    x = operands()
    G, E, y, ids, weights, theta = (x[name] for name in ("G", "E", "y", "ids", "weights", "theta"))
    logp = torch.log_softmax(G @ E.T, 1)[torch.arange(6), y]
    entropy = torch.ones(6)
    return {
        "vertex_oracle": (G, E, None, None, None, None, None),
        "plausible_vertices": (G, E, -4.0, 5, None, 1.0, None, 1.0, None, None),
        "linear_logprob": (G, E, y, None, 1.0, 5.0, 1.0, True, True, "cpu"),
        "linear_logprob_backward": (G, E, y, None, 1.0, 5.0, 1.0, logp, entropy, logp, entropy, True, True, True),
        "mixture_embed": (ids, weights, E, "cpu"),
        "mixture_embed_backward": (ids, G, E, "cpu"),
        "softmax_mixture": (theta, E, 0.7, "cpu"),
        "softmax_mixture_backward": (theta, E, 0.7, torch.ones(6), G, torch.ones(6), "cpu"),
        "hull_step": (G, G, E, ids, weights, x["gamma"], 2, 1.0, 0.5, "normalized", None, None, None),
        "entropic_step": (G, None, E, ids, weights, 1.0, 1.0, 0.0, "sum", y, None),
    }


@pytest.mark.parametrize("name", cases())
def test_opcheck(name):
    torch.library.opcheck(getattr(ops, name).default, cases()[name])


@pytest.mark.parametrize("name", ["vertex_oracle", "plausible_vertices", "hull_step", "entropic_step"])
def test_opcheck_in_float64(name):
    double = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in cases()[name]]
    torch.library.opcheck(getattr(ops, name).default, tuple(double))


def everything(G, E, y, ids, weights, theta, gamma):
    """Every op once, differentiable ones into one loss."""
    vertex, _ = vertex_oracle(G, E)
    listed, _, _ = plausible_vertices(G, E, 0.01, 5)
    step = hull_step(G, None, E, ids, weights, gamma, slot=2)
    moved = entropic_step(G, None, E, ids, weights, 1.0)
    logp, entropy = linear_logprob(G, E, y, entropy=True, softcap=6.0)
    loss = (2 * logp).sum() + entropy.sum() + linear_logprob(G, E, vertex).sum()
    loss = loss + mixture_embed(ids, weights, E).square().sum() + softmax_mixture(theta, E).square().sum()
    return loss, step.z + moved.z, listed


ALL = {
    "vertex_oracle": lambda x, E: vertex_oracle(x["G"], E),
    "plausible_vertices": lambda x, E: plausible_vertices(x["G"], E, 0.01, 5),
    "linear_logprob": lambda x, E: linear_logprob(x["G"], E, x["y"], entropy=True, softcap=6.0),
    "labels": lambda x, E: (linear_logprob(x["G"][None], E, torch.where(x["y"] < 30, -100, x["y"])[None]),),
    "mixture_embed": lambda x, E: (mixture_embed(x["ids"], x["weights"], E),),
    "softmax_mixture": lambda x, E: (softmax_mixture(x["theta"], E),),
    "hull_step": lambda x, E: hull_step(x["G"], None, E, x["ids"], x["weights"], x["gamma"], slot=2),
    "entropic_step": lambda x, E: entropic_step(x["G"], None, E, x["ids"], x["weights"], 1.0),
}


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks_and_with_gradients(dynamic):
    torch._dynamo.reset()
    results = []
    for function in (everything, torch.compile(everything, fullgraph=True, dynamic=dynamic, backend="aot_eager")):
        x = operands()
        for name in ("G", "weights", "theta"):
            x[name].requires_grad_()
        loss, z, listed = function(**x)
        loss.backward()
        results.append((loss.detach(), z, listed, x["G"].grad, x["weights"].grad, x["theta"].grad))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("kind", ["parameters", "tensors"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("op", ALL)
def test_each_op_alone_compiles_for_any_number_of_rows(op, dynamic, kind):
    """Tables that are parameters or not; one graph serves all rows (but torch guards the base of a view)."""
    torch._dynamo.reset()
    function = ALL[op]
    table = operands()["E"]
    table = torch.nn.Parameter(table) if kind == "parameters" else table

    compiled = torch.compile(lambda x: function(x, table), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (6, 4):
        x = {name: value if name == "E" else value[:rows].clone() for name, value in operands().items()}
        with torch._dynamo.config.patch(error_on_recompile=dynamic):
            eager, traced = function(x, table), compiled(x)
        for a, b in zip(eager, traced, strict=True):
            assert torch.equal(a, b)
        differentiable = [a for a in traced if a.requires_grad]
        if differentiable:
            found = torch.autograd.grad(sum(a.sum() for a in differentiable), table)
            expected = torch.autograd.grad(sum(a.sum() for a in eager if a.requires_grad), table)
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_references_compile_without_graph_breaks(dtype):
    """Those that serve dtypes without a kernel are plain torch, traced whole: gradients reach the table too."""
    torch._dynamo.reset()

    def differentiable(G, E, y, ids, weights, theta):
        z = mixture_embed(ids, weights, E).float() + softmax_mixture(theta, E).float()
        return linear_logprob(G, E, y).sum() + z.square().sum()

    compiled = torch.compile(differentiable, fullgraph=True, backend="aot_eager")
    x = {name: operands()[name] for name in ("G", "E", "y", "ids", "weights", "theta")}
    x["G"], x["E"] = x["G"].to(dtype).requires_grad_(), x["E"].to(dtype).requires_grad_()
    results = [(loss, *torch.autograd.grad(loss, [x["G"], x["E"]])) for loss in (differentiable(**x), compiled(**x))]
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)
    for name in ("ids", "y"):
        for wrong in (-1, 70):
            with pytest.raises(RuntimeError, match=f"{name} must be rows of the table"):
                compiled(**x | {name: torch.full_like(x[name], wrong)})
