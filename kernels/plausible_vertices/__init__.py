"""The tokens that a model finds plausible at each position: all above a probability floor, from hidden states."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import checks
from ..dispatch import Call, choose, implementation
from ..numerics import Transform, accumulation_dtype
from ..registration import register


def plausible_vertices(
    H: Tensor,
    W: Tensor,
    p_min: float,
    max_candidates: int,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    allowed: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """List the tokens with ``p(v | H_t) >= p_min``, most probable first (vertices of our plausible hull).

    Args:
        H: ``[T, d]`` final hidden states, any floating dtype.
        W: ``[V, d]`` output head, any floating dtype, rows contiguous.
        p_min: floor in (0, 1]; compared as ``log p >= log p_min`` in float32.
        max_candidates: C >= 1, how many are returned at most.
        bias, scale, softcap, temperature: head transform, see :func:`latentrevise.kernels.linear_logprob`.
        allowed: ``[V]`` bool, which tokens are listed. The probabilities are those of the full softmax regardless.
        backend: overrides the dispatch.

    Returns:
        ``ids [T, C]`` int64 padded with -1; ``logps [T, C]`` float32 (float64 if H or W is) padded with -inf, falling,
        equal ones by rising id; ``counts [T]`` int64, how many tokens are above the floor (may exceed C). No gradient
        flows through this op. A row with NaN logits lists nothing (count 0).

    Raises:
        ValueError, TypeError: an argument breaks the contract.
        BackendError: the backend asked for cannot serve the call.
    """
    checks.table("W", W)
    checks.tensor("H", H, (None, W.shape[1]), checks.FLOATS)
    if bias is not None:
        checks.tensor("bias", bias, (W.shape[0],), checks.FLOATS)
    if allowed is not None:
        checks.tensor("allowed", allowed, (W.shape[0],), (torch.bool,))
    checks.same_device(H=H, W=W, bias=bias, allowed=allowed)
    if not 0 < p_min <= 1:
        raise ValueError(f"p_min must be in (0, 1], got {p_min}")
    if max_candidates < 1:
        raise ValueError(f"max_candidates must be >= 1, got {max_candidates}")
    checks.finite("scale", scale)
    checks.positive("softcap", softcap)
    checks.positive("temperature", temperature)
    transform = Transform(scale, softcap, temperature)
    return _plausible_vertices(H, W, math.log(p_min), max_candidates, bias, transform, allowed, backend)


@register(
    "plausible_vertices",
    lambda H, W, max_candidates: (
        W.new_empty((H.shape[0], max_candidates), dtype=torch.int64),
        W.new_empty((H.shape[0], max_candidates), dtype=accumulation_dtype(H, W)),
        W.new_empty(H.shape[0], dtype=torch.int64),
    ),
)
@torch.no_grad()
def _plausible_vertices(
    H: Tensor,
    W: Tensor,
    log_p_min: float,
    max_candidates: int,
    bias: Tensor | None,
    transform: Transform,
    allowed: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    choice = choose("plausible_vertices", Call.of(W=W, H=H, bias=bias), backend)
    module = implementation("plausible_vertices", choice.backend)
    return module.plausible_vertices(H, W, log_p_min, max_candidates, bias, transform, allowed)
