"""C++ implementation: scores, online softmax and the gradient's mean row, block of the table by block (csrc/cpu).

4NVd FLOP with the gradient, 2NVd without. Tiles as in vertex_oracle, but the table is read once for every 256 tokens,
serving both products while a block is in cache; 4 bytes a token are written, 4 for its entropy and 4d for its gradient.
The target is left out of the online sums: with ``odds = logsumexp(z_v, v != y) - z_y``, ``logp = -softplus(odds)`` and
``dlogp/dH = (1 - p_y) (W_y - mean of W_v under the rest)``, all accurate for ``p_y`` near 1 as well as near 0. The
vocabulary is cut into parts that follow from the shapes alone and are merged in order, in float64; their sums take at
most 24 MiB. Where the CPU has AMX and both operands are bfloat16, scores and mean row are tile products, the weights of
the latter as two bfloat16 terms (2^-17 of each). Limits: float32 and bfloat16, V < 2^31; gradients of W, bias and
entropy are blocked.py's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..dispatch import Call, only_dtypes


def unsupported(call: Call) -> str | None:
    return only_dtypes(call, (torch.float32, torch.bfloat16))


def linear_logprob(
    H: Tensor,
    W: Tensor,
    y: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    temperature: float,
    entropy: bool,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    module = native.load("cpu")
    N, d = H.shape
    H, y = native.rows(H), y.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    logp = torch.empty(N)
    entropies = torch.empty(N if entropy else 0)
    gradients = torch.empty(N if gradient else 0, d)
    module.linear_logprob(
        **native.matrix(module, "queries", H),
        **native.matrix(module, "table", W),
        bias=native.pointer(bias),
        targets=y.data_ptr(),
        logp=logp.data_ptr(),
        entropy=entropies.data_ptr() if entropy and N else None,
        gradient=gradients.data_ptr() if gradient and N else None,
        rows=N,
        vocab=W.shape[0],
        dim=d,
        scale=scale,
        softcap=softcap or 0.0,
        temperature=temperature,
        where=native.where("cpu", W.device),
    )
    return logp, entropies, gradients
