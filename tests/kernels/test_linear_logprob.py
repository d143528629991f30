from __future__ import annotations

import pytest
import torch

from latentrevise.kernels import linear_logprob, mixture_embed, softmax_mixture, table_gradient
from latentrevise.kernels.linear_logprob import blocked
from latentrevise.kernels.numerics import Transform

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


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "V", "d"), [(3, 131, 17), (40, 507, 64)])
def test_gradient_for_any_upstream(backend, device, rng, N, V, d, dtype, transform):
    H = rand(rng, device, N, d, dtype=dtype).requires_grad_()
    W = rand(rng, device, V, d, dtype=dtype)
    y = torch.randint(V, (N,), generator=rng, device=device)
    c = rand(rng, device, N)
    (c * linear_logprob(H, W, y, backend=backend, **transform)).sum().backward()
    exact = H.detach().double().requires_grad_()
    (c.double() * truth(exact, W, y, **transform)[0]).sum().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    assert H.grad.dtype == dtype
    assert (H.grad.double() - exact.grad).norm() <= tolerance * exact.grad.norm()


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradients_of_entropy_table_and_bias(backend, device, rng, with_bias, transform):
    N, V, d = 21, 211, 12
    inputs = [rand(rng, device, N, d), rand(rng, device, V, d)] + [rand(rng, device, V)] * with_bias
    y = torch.randint(V, (N,), generator=rng, device=device)
    c, e = rand(rng, device, N), rand(rng, device, N)
    mine = [x.clone().requires_grad_() for x in inputs]
    logp, entropy = linear_logprob(
        mine[0], mine[1], y, bias=mine[2] if with_bias else None, entropy=True, backend=backend, **transform
    )
    (c * logp + e * entropy).sum().backward()
    exact = [x.double().requires_grad_() for x in inputs]
    logp, entropy = truth(exact[0], exact[1], y, exact[2] if with_bias else None, **transform)
    (c * logp + e * entropy).sum().backward()
    for a, b in zip(mine, exact, strict=True):
        assert (a.grad.double() - b.grad).norm() <= 2e-5 * b.grad.norm()


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_tables_gradient_made_later(backend, device, rng, transform):
    """What ``linear_logprob`` gives a table that needs a gradient, bit by bit, from its log-probs of a detached one."""
    H, W = rand(rng, device, 5, 17).requires_grad_(), rand(rng, device, 131, 17).requires_grad_()
    bias, y = rand(rng, device, 131), torch.randint(131, (5,), generator=rng, device=device)
    c, e = rand(rng, device, 5), rand(rng, device, 5)
    logp, entropy = linear_logprob(H, W, y, bias=bias, entropy=True, backend=backend, **transform)
    (c * logp + e * entropy).sum().backward()
    later = table_gradient(
        H.detach(), W.detach(), y, logp.detach(), c, bias=bias, entropy=entropy.detach(), grad_entropy=e, **transform
    )
    if backend == "reference":  # whose gradient is autograd's
        torch.testing.assert_close(later, W.grad, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(later, W.grad)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_gradients_from_bfloat16_products(monkeypatch, transform):
    """What a GPU does for a trained head, with torch's product of bfloat16 operands and a float32 result emulated; one
    target is nearly certain, and its small derivatives keep their digits."""

    def mm(a, b, *, out_dtype):
        assert (a.dtype, b.dtype, out_dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
        return a.float() @ b.float()

    monkeypatch.setattr(blocked, "on_tensor_cores", lambda H, W: True)
    monkeypatch.setattr(blocked.torch, "mm", mm)
    monkeypatch.setattr(blocked, "FEWEST", 64)  # several blocks
    monkeypatch.setattr(blocked, "SCORES", 0)
    rng = torch.Generator().manual_seed(3)
    H, W = (rand(rng, "cpu", n, 64, dtype=torch.bfloat16) for n in (40, 211))
    y, bias = torch.randint(211, (40,), generator=rng), rand(rng, "cpu", 211)
    H[0] = W[y[0]] * 0.3
    for only in (slice(None), slice(0, 1)):
        queries, targets = H[only], y[only]
        c, e = rand(rng, "cpu", len(targets)), rand(rng, "cpu", len(targets))
        exact = [x.double().requires_grad_() for x in (queries, W, bias)]
        logp, entropy = truth(exact[0], exact[1], targets, exact[2], **transform)
        (c * logp + e * entropy).sum().backward()
        settings = {"scale": 1.0, "softcap": None, "temperature": 1.0} | transform
        found = blocked.backward(
            queries, W, targets, bias, Transform(**settings), logp.detach().float(), entropy.detach().float(), c, e,
            True, True, True,
        )  # fmt: skip
        for mine, right, bound in zip(found, exact, (2**-8, 2**-8, 1e-4), strict=True):
            assert (mine.double() - right.grad).norm() <= bound * right.grad.norm()
    for dtypes in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)):
        monkeypatch.undo()
        assert not blocked.on_tensor_cores(*(torch.empty(2, 8, dtype=dtype) for dtype in dtypes))  # of a CPU


def test_only_what_needs_a_gradient_gets_one(backend, device, rng):
    H, W = rand(rng, device, 4, 8).requires_grad_(), rand(rng, device, 30, 8).requires_grad_()
    y = torch.arange(4, device=device)
    (grad_W,) = torch.autograd.grad(linear_logprob(H, W, y, backend=backend).sum(), [W])
    (again,) = torch.autograd.grad(linear_logprob(H.detach(), W, y, backend=backend).sum(), [W])
    assert torch.allclose(grad_W, again)
    assert not linear_logprob(H.detach(), W.detach(), y, backend=backend).requires_grad
    logp, entropy = linear_logprob(H, W.detach(), y, entropy=True, backend=backend)
    (one,) = torch.autograd.grad(logp.sum(), [H])
    (two,) = torch.autograd.grad(linear_logprob(H, W.detach(), y, backend=backend).sum(), [H])
    assert torch.allclose(one, two, atol=1e-6)
    assert entropy.requires_grad


@pytest.mark.parametrize("margin", [3.0, 8.0, 16.0])
def test_confident_targets_do_not_cancel(backend, device, rng, margin):
    """p_y up to 1 - 1e-6: log p and its gradient keep their relative precision; a sum over all tokens would not."""
    N, V, d = 8, 400, 32
    W = rand(rng, device, V, d) / d**0.5
    y = torch.arange(N, device=device)
    H = (W[y] * (margin + 3) / (W[y] * W[y]).sum(1, keepdim=True)).requires_grad_()
    logp = linear_logprob(H, W, y, backend=backend)
    logp.sum().backward()
    exact_H = H.detach().double().requires_grad_()
    logits = exact_H @ W.double().T
    rest = torch.logsumexp(logits.scatter(1, y[:, None], -torch.inf), 1)
    exact = -torch.nn.functional.softplus(rest - logits.gather(1, y[:, None])[:, 0])
    exact.sum().backward()
    limit = 5e-5 if backend != "reference" else 0.5  # the reference is the plain formula
    assert ((logp.double() - exact) / exact).abs().max() <= limit
    assert (H.grad.double() - exact_H.grad).norm() <= limit * exact_H.grad.norm()


@pytest.mark.parametrize("odds", [-2.0, 3.0, 8.0, 13.9])
def test_within_twice_the_error_of_torchs_bfloat16_path(backend, device, rng, odds):
    """Against float64 on the same bfloat16 inputs, for p_y up to 1 - 1e-6; eps is the rounding of the result."""
    N, V, d = 24, 1500, 64
    W = rand(rng, device, V, d, dtype=torch.bfloat16)
    y = torch.randint(V, (N,), generator=rng, device=device)
    direction = W[y].double() / W[y].double().square().sum(1, keepdim=True)
    H = torch.zeros(N, d, dtype=torch.float64, device=device)
    for _ in range(20):  # along W_y until the log odds of y are as asked for
        logp = truth(H, W, y)[0]
        H += (odds - (logp - torch.log(-torch.expm1(logp))))[:, None] * direction
    H = H.to(torch.bfloat16)

    def with_gradient(logprob, dtype):
        queries = H.to(dtype).requires_grad_()
        logp = logprob(queries)
        logp.sum().backward()
        return logp.detach().double(), queries.grad.double()

    def eager(queries):
        return (queries @ W.T).float().log_softmax(1).gather(1, y[:, None])[:, 0]

    def exact(queries):  # without the target in the sum: float64 would lose what 1 - 1e-6 leaves
        logits = queries @ W.double().T
        rest = torch.logsumexp(logits.scatter(1, y[:, None], -torch.inf), 1)
        return -torch.nn.functional.softplus(rest - logits.gather(1, y[:, None])[:, 0])

    logp, gradient = with_gradient(exact, torch.float64)
    assert (torch.logit(logp.exp()) - odds).abs().max() < 0.3
    mine = with_gradient(lambda queries: linear_logprob(queries, W, y, backend=backend), torch.bfloat16)
    theirs = with_gradient(eager, torch.bfloat16)
    for a, b, right, eps in zip(mine, theirs, (logp, gradient), (2**-23, 2**-9), strict=True):
        error, bound = (a - right).norm(), 2 * (b - right).norm() + eps * right.norm()
        assert error <= bound, f"{error:.3g}, torch's {(b - right).norm():.3g} of {right.norm():.3g}"


def test_infinite_and_nan_logits(backend, device):
    W = torch.tensor([[1.0], [2.0], [-torch.inf]], device=device)
    y = torch.tensor([0, 1], device=device)
    logp = linear_logprob(torch.ones(2, 1, device=device), W, y, backend=backend)
    assert torch.allclose(logp, torch.log_softmax(torch.tensor([1.0, 2.0], device=device), 0))
    for bad in (torch.nan, torch.inf):
        W = torch.tensor([[1.0], [bad], [0.0]], device=device)
        assert linear_logprob(torch.ones(2, 1, device=device), W, y, backend=backend).isnan().all()


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


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_labels_as_a_trainer_has_them(backend, device, rng, dtype, entropy):
    """[B, S] labels with ignored ones give what the rest alone give, whatever stands in their rows."""
    H = rand(rng, device, 3, 5, 8, dtype=dtype)
    W = rand(rng, device, 40, 8, dtype=dtype).requires_grad_()
    y = torch.randint(40, (3, 5), generator=rng, device=device)
    y[0, :2] = y[2, 4] = -100
    H[0, 0], H[2, 4] = torch.nan, torch.inf
    kept = y != -100
    H.requires_grad_()
    alone = H[kept]
    found = linear_logprob(H, W, y, entropy=entropy, backend=backend)
    expected = linear_logprob(alone, W, y[kept], entropy=entropy, ignore_index=None, backend=backend)
    c = rand(rng, device, 3, 5)
    pairs = list(zip(found, expected, strict=True)) if entropy else [(found, expected)]
    for ours, theirs in pairs:
        assert ours.shape == (3, 5)
        assert (ours[~kept] == 0).all()
        torch.testing.assert_close(ours[kept], theirs, rtol=1e-5, atol=1e-5)
    grad_H, grad_W = torch.autograd.grad(sum((c * ours).sum() for ours, _ in pairs), [H, W])
    want_H, want_W = torch.autograd.grad(sum((c[kept] * theirs).sum() for _, theirs in pairs), [H, W])
    assert (grad_H[~kept] == 0).all()
    near = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(grad_H[kept], want_H[kept], **near)
    torch.testing.assert_close(grad_W, want_W, **near)


def test_another_ignore_index_and_none(backend, device, rng):
    H, W = rand(rng, device, 2, 4), rand(rng, device, 9, 4)
    y = torch.tensor([3, 7], device=device)
    full = linear_logprob(H, W, y, backend=backend)
    assert linear_logprob(H, W, y, ignore_index=7, backend=backend).tolist() == [float(full[0]), 0]
    y[1] = -100
    if device.type == "cpu":
        with pytest.raises((ValueError, IndexError), match="y must be in"):
            linear_logprob(H, W, y, ignore_index=None, backend=backend)
    assert linear_logprob(H, W, torch.full_like(y, -100), backend=backend).tolist() == [0, 0]
    assert linear_logprob(H[:0], W, y[:0], backend=backend).shape == (0,)
    with pytest.raises(ValueError, match=r"y must have shape \[1, 2\]"):
        linear_logprob(H[None], W, y, backend=backend)


def test_float64_comes_back_as_float64():
    H, W, y = torch.randn(3, 4, dtype=torch.float64), torch.randn(9, 4), torch.tensor([0, 8, -100])
    assert linear_logprob(H, W, y).dtype == torch.float64


def penalty(function, x):
    """A gradient penalty, which needs a second derivative."""
    (gradient,) = torch.autograd.grad(function(x), x, create_graph=True)
    return (gradient.square().sum() + function(x)).backward()


def test_a_second_derivative_raises_or_is_right():
    g = torch.Generator().manual_seed(4)
    H, W, y = torch.randn(3, 4, generator=g), torch.randn(9, 4, generator=g), torch.tensor([0, 8, 5])
    theta, ids = torch.randn(3, 9, generator=g), torch.tensor([[0, 2], [1, 1], [8, 3]])
    cases = [
        ("linear_logprob", H, lambda x, b: linear_logprob(x, W, y, backend=b).sum()),
        ("softmax_mixture", theta, lambda x, b: softmax_mixture(x, W, backend=b).square().sum()),
        ("mixture_embed", theta[:, :2], lambda x, b: mixture_embed(ids, x, W, backend=b).square().sum()),
    ]
    for name, x, function in cases:
        x = x.clone().requires_grad_()
        with pytest.raises(RuntimeError, match=f"{name} has a first derivative only"):
            penalty(lambda x, function=function: function(x, "cpu"), x)
        x.grad = None
        penalty(lambda x, function=function: function(x, "reference"), x)
        double = x.detach().double().requires_grad_()
        penalty(lambda x, function=function: function(x, "reference"), double)
        torch.testing.assert_close(x.grad.double(), double.grad, rtol=1e-4, atol=1e-4)
        # create_graph alone, without a use of the graph, is no second derivative
        torch.autograd.grad(function(x, "cpu"), x, create_graph=True)
