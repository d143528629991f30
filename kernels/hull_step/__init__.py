"""One Frank-Wolfe step in the vocabulary hull: combine two gradients, oracle, gap, step, projection, fused."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..dispatch import Call, choose, implementation
from ..numerics import Combination, accumulation_dtype
from ..registration import register
from ..vertex_oracle import check_candidates, check_found

COMBINE = ("sum", "normalized")


class HullStep(NamedTuple):
    """What one Frank-Wolfe step leaves behind."""

    ids: Tensor  # [T, A], dtype of the incoming ids
    weights: Tensor  # [T, A] float32
    z: Tensor  # [T, d], dtype of E: what the new atoms say
    vertex: Tensor  # [T] int64
    gap: Tensor  # [T] float32, at the incoming mixture


def hull_step(
    G_gold: Tensor,
    G_away: Tensor | None,
    E: Tensor,
    ids: Tensor,
    weights: Tensor,
    gamma: Tensor | float,
    *,
    slot: int,
    alpha: float = 1.0,
    beta: float = 0.0,
    combine: str = "sum",
    allowed: Tensor | None = None,
    candidates: Tensor | None = None,
    backend: str | None = None,
) -> HullStep:
    """Move mixtures toward the vertex that the combined gradient points at (Frank-Wolfe step of arXiv 2606.29938).

    ``g = alpha * G_gold + beta * G_away``; vertex ``v = vertex_oracle(g)``; gap ``sum_a w_a <g, E_{i_a} - E_v>``,
    which is ``<g, z> - <g, E_v>`` without the cancellation; weights become ``(1 - gamma) w``, and ``gamma`` goes to
    the atom that already is ``v``, or else to a new atom in column ``slot``. Combining normalised gradients is our
    own decision.

    Args:
        G_gold: ``[T, d]`` gradient of the gold branch, any floating dtype.
        G_away: ``[T, d]`` gradient of the failed branch, or None.
        E: ``[V, d]`` table, rows contiguous.
        ids: ``[T, A]`` int32 or int64 atoms; unused slots have weight 0 and any valid id.
        weights: ``[T, A]`` float32 on the simplex.
        gamma: step in [0, 1], one number or ``[T]`` float32. A position with gamma 0 keeps its mixture; vertex and
            gap are still given.
        slot: column for new atoms; its incoming weights must be 0.
        alpha, beta: signed coefficients of the two gradients.
        combine: "sum", or "normalized": each gradient row is divided by its 2-norm first (zero rows stay zero).
        allowed, candidates: as in :func:`latentrevise.kernels.vertex_oracle`.
        backend: overrides the dispatch.

    Returns:
        :class:`HullStep`; the inputs are not modified. The gap is >= 0 up to rounding when every atom is itself
        allowed. No gradient flows through this op.

    Raises:
        ValueError, TypeError: an argument breaks the contract, column ``slot`` is in use, an id is outside the table,
            or a position has no allowed vertex (the last three for CPU tensors; on a GPU the vertex is then -1, and
            ``z`` and gap are NaN where an atom of weight > 0 is outside the table).
        BackendError: the backend asked for cannot serve the call.
    """
    T, A = check_mixture_step(G_gold, G_away, E, ids, weights, combine, alpha, beta)
    if not 0 <= slot < A:
        raise ValueError(f"slot must be a column of ids, in [0, {A}), got {slot}; widen the atom record")
    if allowed is not None:
        checks.tensor("allowed", allowed, (E.shape[0],), (torch.bool,))
    if candidates is not None:
        checks.tensor("candidates", candidates, (T, None), checks.IDS)
    if isinstance(gamma, Tensor):
        checks.tensor("gamma", gamma, (T,), (torch.float32, torch.float64))
    else:
        gamma = torch.full((T,), gamma, dtype=weights.dtype, device=weights.device)
    checks.same_device(G_gold=G_gold, G_away=G_away, E=E, ids=ids, weights=weights, gamma=gamma, allowed=allowed,
                       candidates=candidates)  # fmt: skip
    how = Combination(alpha, beta, combine)
    step = _hull_step(G_gold, G_away, E, ids, weights, gamma, slot, how, allowed, candidates, backend)
    return HullStep(*step)


@register(
    "hull_step",
    lambda G_gold, G_away, E, ids, weights: (
        ids.new_empty(ids.shape),
        weights.new_empty(weights.shape),
        E.new_empty(ids.shape[0], E.shape[1]),
        ids.new_empty(ids.shape[0], dtype=torch.int64),
        weights.new_empty(ids.shape[0], dtype=accumulation_dtype(G_gold, G_away)),
    ),
)
@torch.no_grad()
def _hull_step(
    G_gold: Tensor,
    G_away: Tensor | None,
    E: Tensor,
    ids: Tensor,
    weights: Tensor,
    gamma: Tensor,
    slot: int,
    combination: Combination,
    allowed: Tensor | None,
    candidates: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if candidates is not None:
        check_candidates(candidates, E.shape[0])
    checks.ids_in_table("ids", ids, E.shape[0])
    if gamma.device.type == "cpu":
        if len(gamma) and not bool(((gamma >= 0) & (gamma <= 1)).all()):
            raise ValueError(f"gamma must be in [0, 1], got values from {float(gamma.min())} to {float(gamma.max())}")
        if bool((weights[:, slot] != 0).any()):
            raise ValueError(f"column {slot} of weights is in use; pass the first column whose weights are all 0")
    choice = choose("hull_step", Call.of(E=E, G_gold=G_gold, G_away=G_away, weights=weights), backend)
    module = implementation("hull_step", choice.backend)
    step = module.hull_step(G_gold, G_away, E, ids, weights, gamma, slot, combination, allowed, candidates)
    check_found(step[3])
    return step


def check_mixture_step(
    G_gold: Tensor,
    G_away: Tensor | None,
    E: Tensor,
    ids: Tensor,
    weights: Tensor,
    combine: str,
    alpha: float,
    beta: float,
) -> tuple[int, int]:
    """The part of the contract that hull_step and entropic_step share; returns (T, A)."""
    checks.table("E", E)
    d = E.shape[1]
    checks.tensor("ids", ids, (None, None), checks.IDS)
    T, A = ids.shape
    if A == 0:
        raise ValueError("ids must have at least one column, got shape [T, 0]")
    checks.tensor("weights", weights, (T, A), (torch.float32, torch.float64))
    checks.tensor("G_gold", G_gold, (T, d), checks.FLOATS)
    if G_away is not None:
        checks.tensor("G_away", G_away, (T, d), checks.FLOATS)
    elif beta != 0:
        raise ValueError(f"beta is {beta} but G_away is None; pass the gradient of the failed branch or beta=0")
    checks.one_of("combine", combine, COMBINE)
    checks.finite("alpha", alpha)
    checks.finite("beta", beta)
    return T, A
