"""Linear minimisation oracle over the vocabulary's vertices: hard attention of gradients over the embedding table.

``v_t = argmin over allowed v of <G_t, E_v>``, 2*T*V*d FLOP. Scores are accumulated and compared in float32 whatever
the dtype of the operands: rounded scores make ties that are not there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..dispatch import Call, choose, implementation
from ..numerics import accumulation_dtype
from ..registration import register


def vertex_oracle(
    G: Tensor,
    E: Tensor,
    allowed: Tensor | None = None,
    *,
    Q2: Tensor | None = None,
    W2: Tensor | None = None,
    candidates: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the vertex of the vocabulary hull that a linear function is smallest at, for each position.

    The Frank-Wolfe oracle of arXiv 2606.29938; the second pair of tables (a soft prior) and the candidate sets are
    our own.

    Args:
        G: ``[T, d]`` gradients, any floating dtype.
        E: ``[V, d]`` table, any floating dtype, rows contiguous.
        allowed: ``[V]`` bool, the rows that may be chosen; None: all.
        Q2, W2: ``[T, d2]`` and ``[V, d2]``, both or neither: ``<Q2_t, W2_v>`` is added to the score. Where ``W2`` is
            ``E`` itself (tied tables) the queries are added instead, which halves the work.
        candidates: ``[T, C]`` int32 or int64 ids, padded with -1: only these compete at position t (and must be
            allowed).
        backend: overrides the dispatch.

    Returns:
        ``ids [T]`` int64 and ``values [T]`` float32 (float64 if an operand is): the chosen rows and their scores.
        Ties go to the lowest id, bitwise the same under any number of threads or splits. NaN orders below everything,
        as in ``torch.min``: a row with NaN scores returns the lowest id that has one, with value NaN. No gradient
        flows through this op.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or layouts break the contract; a position has no allowed
            vertex or a candidate is outside the table (CPU tensors; on a GPU such a candidate counts as padding, and a
            position without a vertex returns id -1 and value +inf).
        BackendError: the backend asked for cannot serve the call.
    """
    checks.table("E", E)
    V, d = E.shape
    checks.tensor("G", G, (None, d), checks.FLOATS)
    if allowed is not None:
        checks.tensor("allowed", allowed, (V,), (torch.bool,))
    if (Q2 is None) != (W2 is None):
        raise ValueError("Q2 and W2 belong together: pass both or neither")
    if Q2 is not None and W2 is not None:
        checks.table("W2", W2, (V, None))
        checks.tensor("Q2", Q2, (G.shape[0], W2.shape[1]), checks.FLOATS)
    if candidates is not None:
        checks.tensor("candidates", candidates, (G.shape[0], None), checks.IDS)
    checks.same_device(G=G, E=E, allowed=allowed, Q2=Q2, W2=W2, candidates=candidates)
    return _vertex_oracle(G, E, allowed, Q2, W2, candidates, backend)


@register(
    "vertex_oracle",
    lambda G, E, Q2, W2: (
        E.new_empty(G.shape[0], dtype=torch.int64),
        E.new_empty(G.shape[0], dtype=accumulation_dtype(G, E, Q2, W2)),
    ),
)
@torch.no_grad()
def _vertex_oracle(
    G: Tensor,
    E: Tensor,
    allowed: Tensor | None,
    Q2: Tensor | None,
    W2: Tensor | None,
    candidates: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    if candidates is not None:
        check_candidates(candidates, E.shape[0])
    # A float32 sum costs a GPU three products with a bfloat16 table, the pair two.
    pays = E.dtype != torch.bfloat16 or E.device.type != "cuda"
    if pays and Q2 is not None and W2 is not None and W2.dtype == E.dtype and W2.is_set_to(E):
        dtype = accumulation_dtype(G, E, Q2)
        G, Q2, W2 = G.to(dtype) + Q2.to(dtype), None, None
    choice = choose("vertex_oracle", Call.of(E=E, G=G, W2=W2, Q2=Q2, candidates=candidates), backend)
    module = implementation("vertex_oracle", choice.backend)
    ids, values = module.vertex_oracle(G, E, allowed, Q2, W2, candidates)
    check_found(ids)
    return ids, values


def check_candidates(candidates: Tensor, V: int) -> None:
    """Ids padded with -1, inside the table (checked for CPU tensors)."""
    if candidates.device.type == "cpu" and candidates.numel():
        low, high = int(candidates.min()), int(candidates.max())
        if low < -1 or high >= V:
            raise ValueError(f"candidates must be in [0, {V}) or -1 for padding, got values from {low} to {high}")


def check_found(ids: Tensor) -> None:
    """A position without any allowed vertex is an error (CPU tensors; on a GPU its id stays -1)."""
    if ids.device.type == "cpu" and bool((ids < 0).any()):
        row = int((ids < 0).nonzero()[0])
        raise ValueError(
            f"no vertex is allowed at position {row} ({int((ids < 0).sum())} such positions): allowed masks everything "
            "there, or its candidates are all padding; allow at least one vertex a position"
        )
