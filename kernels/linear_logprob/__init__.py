"""Log-probs of given tokens straight from hidden states, without a ``[N, V]`` matrix.

For any loss that is a function of per-token log-probs, ``dL/dH_n = c_n * (softmax attention over W - W_y)``: the
loss only sets the scalar ``c_n``. NLL, ascent, unlikelihood and policy-gradient losses are coefficients on this one op.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..dispatch import Call, choose, implementation


def linear_logprob(
    H: Tensor,
    W: Tensor,
    y: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``log p(y_n | H_n)`` under ``logits = softcap * tanh(scale * (H W^T + bias) / softcap) / temperature``.

    Args:
        H: ``[N, d]`` final hidden states, any floating dtype.
        W: ``[V, d]`` output head, any floating dtype, rows contiguous. Padded rows stay in the softmax, as in the
            model itself.
        y: ``[N]`` int64 targets in [0, V).
        bias: ``[V]`` or None.
        scale: logit multiplier (Cohere, Granite: its inverse divisor).
        softcap: > 0 or None for no tanh (Gemma 2).
        temperature: > 0.
        entropy: also return the entropy of each distribution, in nats.
        backend: overrides the dispatch.

    Returns:
        ``logp [N]`` float32 in nats, or ``(logp, entropy)``. Differentiable in ``H``, and in ``W`` and ``bias`` if
        they require it.

    Raises:
        ValueError, TypeError: an argument breaks the contract, or a target is outside the table (CPU tensors).
        BackendError: the backend asked for cannot serve the call.
    """
    checks.table("W", W)
    checks.tensor("H", H, (None, W.shape[1]), checks.FLOATS)
    checks.tensor("y", y, (H.shape[0],), (torch.int64,))
    if bias is not None:
        checks.tensor("bias", bias, (W.shape[0],), checks.FLOATS)
    checks.same_device(H=H, W=W, y=y, bias=bias)
    checks.ids_in_table("y", y, W.shape[0])
    checks.finite("scale", scale)
    checks.positive("softcap", softcap)
    checks.positive("temperature", temperature)
    choice = choose("linear_logprob", Call.of(W=W, H=H, bias=bias), backend)
    module = implementation("linear_logprob", choice.backend)
    return module.linear_logprob(H, W, y, bias, scale, softcap, temperature, entropy)
