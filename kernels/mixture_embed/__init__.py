"""Sparse mixture of embeddings: ``z_t = sum_a w_ta E[i_ta]``, with the gradient for the weights.

2*T*A*d FLOP over T*A*d gathered table elements: memory-bound everywhere, so the implementations read each gathered
row once, accumulate in float32 registers and write ``z`` once. The table is frozen, hence no scatter into it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..dispatch import Call, chosen, implementation
from ..registration import differentiable_once, register
from . import reference


def mixture_embed(ids: Tensor, weights: Tensor, E: Tensor, *, backend: str | None = None) -> Tensor:
    """Embed mixtures of vocabulary rows (our own decision: the sparse form of a point in the vocabulary hull).

    Args:
        ids: ``[T, A]`` int32 or int64, rows of ``E``. A slot of weight 0 contributes nothing, but its id must be valid.
        weights: ``[T, A]`` float32 (float64 on the reference).
        E: ``[V, d]`` float32, bfloat16 or float16, rows contiguous.
        backend: overrides the dispatch (see :mod:`latentrevise.kernels.dispatch`).

    Returns:
        ``z [T, d]`` in the dtype of ``E``, accumulated in float32. Differentiable in ``weights``; differentiable in
        ``E`` too on the reference, which serves the call if ``E`` requires a gradient.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or the layout of ``E`` break the contract, or an id is outside
            the table (CPU tensors; on a GPU that row becomes NaN instead).
        BackendError: the backend asked for cannot serve the call.
    """
    checks.table("E", E)
    checks.tensor("ids", ids, (None, None), checks.IDS)
    checks.tensor("weights", weights, tuple(ids.shape), (torch.float32, torch.float64))
    checks.same_device(ids=ids, weights=weights, E=E)
    if ids.shape[1] == 0:
        raise ValueError("ids must have at least one atom column, got shape [T, 0]")
    call = Call.of(E=E, weights=weights)
    name = chosen("mixture_embed", call, backend)
    if name == "reference":
        checks.ids_in_table("ids", ids, E.shape[0])
        return reference.mixture_embed(ids, weights, E)
    ids, weights = ids.contiguous(), weights.contiguous()
    # Without a gradient the detour by way of autograd would be a third of a small call's time.
    return _MixtureEmbed.apply(ids, weights, E, name) if call.needs_grad else _forward(ids, weights, E, name)


class _MixtureEmbed(torch.autograd.Function):
    """Gradient of the fused implementations, which provide ``mixture_embed`` and ``mixture_embed_backward``."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weights: Tensor, E: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(ids, E)
        ctx.backend = backend
        return _forward(ids, weights, E, backend)

    @staticmethod
    @differentiable_once("mixture_embed")
    def backward(ctx: Any, grad_z: Tensor) -> tuple[None, Tensor, None, None]:
        ids, E = ctx.saved_tensors
        return None, _backward(ids, grad_z.contiguous(), E, ctx.backend), None, None


@register("mixture_embed", lambda ids, E: E.new_empty(ids.shape[0], E.shape[1]))
def _forward(ids: Tensor, weights: Tensor, E: Tensor, backend: str) -> Tensor:
    checks.ids_in_table("ids", ids, E.shape[0])
    return implementation("mixture_embed", backend).mixture_embed(ids, weights, E)


@register("mixture_embed_backward", lambda ids, E: E.new_empty(ids.shape, dtype=torch.float32))
def _backward(ids: Tensor, grad_z: Tensor, E: Tensor, backend: str) -> Tensor:
    return implementation("mixture_embed", backend).mixture_embed_backward(ids, grad_z, E)
