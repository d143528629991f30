"""One step of entropic mirror descent on mixture weights: scores, multiplicative update, projection, fused."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..dispatch import Call, choose, implementation
from ..hull_step import check_mixture_step
from ..numerics import Combination, accumulation_dtype
from ..registration import register


class EntropicStep(NamedTuple):
    """What one mirror-descent step leaves behind."""

    weights: Tensor  # [T, C] float32
    z: Tensor  # [T, d], dtype of E: what the new weights say
    gap: Tensor  # [T] float32, at the incoming weights


def entropic_step(
    G_gold: Tensor,
    G_away: Tensor | None,
    E: Tensor,
    ids: Tensor,
    weights: Tensor,
    eta: float,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    combine: str = "sum",
    segments: Tensor | None = None,
    backend: str | None = None,
) -> EntropicStep:
    """Exponentiated-gradient step over candidate sets (our own decision: the solver of the plausible hull).

    With ``g = alpha * G_gold + beta * G_away`` and ``s_i = <g, E_i>`` over the candidates of positive weight:
    ``rel = s - sum w s``; ``scale = max |rel|`` over the row, or over all rows of its segment; then
    ``w' = w * exp(-eta * rel / scale)``, renormalised. A row whose scale is 0 keeps its weights.

    Args:
        G_gold, G_away, E, alpha, beta, combine: as in :func:`latentrevise.kernels.hull_step`.
        ids: ``[T, C]`` int32 or int64 candidates; padding has weight 0 and any valid id.
        weights: ``[T, C]`` float32 on the simplex; a candidate of weight 0 stays at 0.
        eta: step, >= 0: the largest log-ratio change relative to the mean.
        segments: ``[T]`` int64 labels; rows with the same label (one rollout) share their scale, so that positions
            where the gradient says little move little. None: each row by itself.
        backend: overrides the dispatch.

    Returns:
        :class:`EntropicStep`; gap is ``sum w s - min s`` over candidates of positive weight, >= 0. No gradient flows
        through this op. A row whose weights are all 0 keeps them, with z = 0 and gap = 0.

    Raises:
        ValueError, TypeError: an argument breaks the contract, or an id is outside the table (CPU tensors; on a GPU
            ``z`` and gap become NaN where the weight is > 0).
        BackendError: the backend asked for cannot serve the call.
    """
    T, _ = check_mixture_step(G_gold, G_away, E, ids, weights, combine, alpha, beta)
    if segments is not None:
        checks.tensor("segments", segments, (T,), (torch.int64,))
    checks.same_device(G_gold=G_gold, G_away=G_away, E=E, ids=ids, weights=weights, segments=segments)
    checks.finite("eta", eta)
    if eta < 0:
        raise ValueError(f"eta must be >= 0, got {eta}; to ascend, change the signs of alpha and beta")
    how = Combination(alpha, beta, combine)
    step = _entropic_step(G_gold, G_away, E, ids, weights, eta, how, segments, backend)
    return EntropicStep(*step)


@register(
    "entropic_step",
    lambda G_gold, G_away, E, ids, weights: (
        weights.new_empty(weights.shape),
        E.new_empty(ids.shape[0], E.shape[1]),
        weights.new_empty(ids.shape[0], dtype=accumulation_dtype(G_gold, G_away)),
    ),
)
@torch.no_grad()
def _entropic_step(
    G_gold: Tensor,
    G_away: Tensor | None,
    E: Tensor,
    ids: Tensor,
    weights: Tensor,
    eta: float,
    combination: Combination,
    segments: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    checks.ids_in_table("ids", ids, E.shape[0])
    choice = choose("entropic_step", Call.of(E=E, G_gold=G_gold, G_away=G_away, weights=weights), backend)
    module = implementation("entropic_step", choice.backend)
    return module.entropic_step(G_gold, G_away, E, ids, weights, eta, combination, segments)
