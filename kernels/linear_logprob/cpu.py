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
from ..numerics import Transform


def unsupported(call: Call) -> str | None:
    return only_dtypes(call, (torch.float32, torch.bfloat16))


def linear_logprob(
    H: Tensor, W: Tensor, y: Tensor, bias: Tensor | None, transform: Transform, entropy: bool, gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    N, d = H.shape
    logp = torch.empty(N)
    entropies = torch.empty(N if entropy else 0)
    gradients = torch.empty(N if gradient else 0, d)
    native.call(
        "cpu", "linear_logprob", W, queries=native.rows(H), bias=None if bias is None else bias.float().contiguous(),
        targets=y.contiguous(), logp=logp, entropy=entropies if entropy else None,
        gradient=gradients if gradient else None, rows=N, scale=transform.scale, softcap=transform.softcap or 0.0,
        temperature=transform.temperature,
    )  # fmt: skip
    return logp, entropies, gradients
