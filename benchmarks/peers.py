"""What the kernels are compared with, and the reason where one of them is not on this machine."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Absent, version


def compiled(function: Callable) -> Callable:
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


# --------------------------------------------------------------------------------------------------- vertex oracle


def eager_oracle(G: Tensor, E: Tensor) -> Tensor:
    return (G @ E.T).argmin(1)


def blocked_oracle(G: Tensor, E: Tensor, rows: int = 8192, tokens: int = 2048) -> Tensor:
    """Matmul on parts of tokens and table whose scores (32 MiB of bfloat16) stay in cache, and a running minimum."""
    if len(G) > tokens:
        return torch.cat([blocked_oracle(part, E, rows, tokens) for part in G.split(tokens)])
    best = torch.full((G.shape[0],), torch.inf, device=G.device)
    ids = torch.zeros(G.shape[0], dtype=torch.int64, device=G.device)
    for start in range(0, E.shape[0], rows):
        value, index = (G @ E[start : start + rows].T).min(1)
        better = value < best
        best = torch.where(better, value.float(), best)
        ids = torch.where(better, index + start, ids)
    return ids


# -------------------------------------------------------------------------------------- log-probs with their gradient


def eager_logprob(H: Tensor, W: Tensor, y: Tensor) -> Tensor:
    return (H @ W.T).float().log_softmax(1).gather(1, y[:, None]).squeeze(1)


def with_gradient(logprob: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable:
    """logp and ``d sum(c * logp) / dH`` for coefficients c of either sign."""

    def run(H: Tensor, W: Tensor, y: Tensor, c: Tensor) -> Tensor | None:
        H = H.detach().requires_grad_()
        (logprob(H, W, y).float() * c).sum().backward()
        return H.grad

    return run


def blocked_logprob_gradient(H: Tensor, W: Tensor, y: Tensor, c: Tensor, rows: int = 256) -> Tensor:
    """Chunks of tokens, logits of a chunk at a time, gradient made in the forward pass."""
    grad = torch.empty_like(H)
    for start in range(0, H.shape[0], rows):
        part = slice(start, start + rows)
        p = (H[part] @ W.T).float().softmax(1)
        p.scatter_add_(1, y[part, None], -torch.ones_like(p[:, :1]))
        grad[part] = (p.mul_(-c[part, None])).to(W.dtype) @ W
    return grad


def torch_fused(H: Tensor, W: Tensor, y: Tensor, c: Tensor) -> Tensor | None:
    """``F.linear_cross_entropy``: mean loss only, so without the coefficients."""
    H = H.detach().requires_grad_()
    F.linear_cross_entropy(H, W, y).backward()
    return H.grad


def liger(H: Tensor, W: Tensor, y: Tensor, c: Tensor) -> Tensor | None:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    H = H.detach().requires_grad_()
    LigerFusedLinearCrossEntropyFunction.apply(H, W, y)[0].backward()
    return H.grad


def cut_cross_entropy(H: Tensor, W: Tensor, y: Tensor, c: Tensor) -> Tensor | None:
    from cut_cross_entropy import linear_cross_entropy

    H = H.detach().requires_grad_()
    (linear_cross_entropy(H, W, y, reduction="none") * -c).sum().backward()
    return H.grad


def quack(H: Tensor, W: Tensor, y: Tensor, c: Tensor) -> Tensor | None:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    H = H.detach().requires_grad_()
    chunked_linear_cross_entropy(H, W, y).backward()
    return H.grad


def installed(package: str, device: torch.device) -> None:
    """Raise Absent unless the peer is installed and there is a GPU for it."""
    if version(package) is None:
        raise Absent(f"{package} is not installed")
    if device.type != "cuda":
        raise Absent(f"{package} needs a GPU")
