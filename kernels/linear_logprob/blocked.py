"""What the saved gradient of a log-prob does not cover: weights, bias and entropy, by recomputing block after block.

``d/dz_v`` of ``c . logp + e . entropy`` is ``c (1[v = y] - p_v) - e p_v (log p_v + entropy)``; with it ``dH``, ``dW``
and ``dbias`` are two matrix products. Plain torch on a block of the table at a time, on any device.

Numerics: float32 products, but on a GPU bfloat16 hidden states and weights go to the tensor cores as they are, with
float32 sums; for the other two products dL/dz is rounded to bfloat16, as the forward pass rounds the probabilities it
makes ``dlogp/dH`` from: an error of 2^-9 of each of its entries, whatever their size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics import Transform

# Elements of a block of scores, of which two (with an entropy half a dozen) are alive at once, and bounds for its rows
# of the table.
SCORES, FEWEST, MOST = 2**21, 512, 8192


def backward(
    H: Tensor,
    W: Tensor,
    y: Tensor,
    bias: Tensor | None,
    transform: Transform,
    logp: Tensor,
    entropy: Tensor | None,
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    need_H: bool,
    need_W: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dH [N, d] float32, dW [V, d], dbias [V])``, the latter two in the dtypes of W and bias; no rows where not
    needed."""
    (N, _), (V, d) = H.shape, W.shape
    narrow = on_tensor_cores(H, W)
    queries, grad_H = (
        H if narrow else H.float(),
        torch.zeros(N if need_H else 0, d, dtype=torch.float32, device=H.device),
    )
    grad_W = torch.empty(V if need_W else 0, d, dtype=W.dtype, device=W.device)
    grad_bias = torch.empty(V if need_bias else 0, dtype=W.dtype if bias is None else bias.dtype, device=W.device)
    target = _of(H.float(), W, bias, transform, y)
    lse = target - logp
    block = min(max(SCORES // max(len(H), 1), FEWEST), MOST)
    for start in range(0, V, block):
        stop = min(start + block, V)
        rows = W[start:stop] if narrow else W[start:stop].float()
        raw = product(queries, rows.T)
        if bias is not None:
            raw += bias[start:stop].float()
        z, slope = logits(raw, transform)
        del raw
        logps = z.sub_(lse[:, None])
        if grad_entropy is None or entropy is None:
            grad_z = logps.exp_().mul_(-grad_logp[:, None])
        else:
            p = logps.exp()
            grad_z = -grad_logp[:, None] * p
            grad_z -= grad_entropy[:, None] * torch.where(p > 0, p * (logps + entropy[:, None]), 0)
        inside = (y >= start) & (y < stop)
        column = torch.where(inside, y - start, 0)[:, None]
        # 1 - p_y from logp itself: the difference of 1 and a rounded p_y would cancel
        exact = -grad_logp * torch.expm1(logp)
        if grad_entropy is not None and entropy is not None:
            exact = exact - grad_entropy * logp.exp() * (logp + entropy)
        grad_z.scatter_(1, column, torch.where(inside[:, None], exact[:, None], grad_z.gather(1, column)))
        grad_z *= slope
        if need_H:
            grad_H += product(grad_z, rows)
        if need_W:
            grad_W[start:stop] = product(grad_z.T, queries)
        if need_bias:
            grad_bias[start:stop] = grad_z.sum(0)
    return grad_H, grad_W, grad_bias


def on_tensor_cores(H: Tensor, W: Tensor) -> bool:
    """Whether products of these are made of bfloat16 operands; a CPU has none with float32 results."""
    return H.is_cuda and H.dtype == W.dtype == torch.bfloat16 and len(H) > 0


def product(a: Tensor, b: Tensor) -> Tensor:
    """float32 ``a @ b``; ``a`` is rounded where ``b`` is bfloat16."""
    return a @ b if b.dtype == torch.float32 else torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)


def logits(raw: Tensor, transform: Transform) -> tuple[Tensor, Tensor | float]:
    """Logits and their derivative with respect to ``raw`` (bias already added)."""
    scale, softcap, temperature = transform
    if softcap is None:
        return raw * (scale / temperature), scale / temperature
    tanh = torch.tanh(raw * (scale / softcap))
    return tanh * (softcap / temperature), (1 - tanh * tanh) * (scale / temperature)


def _of(H: Tensor, W: Tensor, bias: Tensor | None, transform: Transform, ids: Tensor) -> Tensor:
    """Logits of one id each."""
    ids = ids.clamp(0, len(W) - 1)  # of one outside the table, on a GPU, logp is NaN, and so is what follows from it
    raw = (H * W[ids].float()).sum(1)
    return logits(raw if bias is None else raw + bias[ids].float(), transform)[0]
