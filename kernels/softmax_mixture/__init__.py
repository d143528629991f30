"""Dense mixture projection: ``z_t = softmax(theta_t / tau) @ E``, soft attention over the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..dispatch import Call, chosen, implementation
from ..registration import differentiable_once, register
from . import reference


def softmax_mixture(theta: Tensor, E: Tensor, tau: float = 1.0, *, backend: str | None = None) -> Tensor:
    """Project logits over the vocabulary to a point in the vocabulary hull (our own decision: the dense form).

    Args:
        theta: ``[T, V]`` float32, bfloat16 or float16; an entry of -inf excludes its row.
        E: ``[V, d]`` float32, bfloat16 or float16, rows contiguous.
        tau: temperature, > 0.
        backend: overrides the dispatch.

    Returns:
        ``z [T, d]`` in the dtype of ``E``, accumulated in float32. Differentiable in ``theta`` (and ``E`` on the
        reference). A row of ``theta`` that is -inf throughout, or holds NaN, gives NaN.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or layouts break the contract.
        BackendError: the backend asked for cannot serve the call.
    """
    checks.table("E", E)
    checks.tensor("theta", theta, (None, E.shape[0]), checks.FLOATS)
    checks.same_device(theta=theta, E=E)
    checks.positive("tau", tau)
    call = Call.of(E=E, theta=theta)
    name = chosen("softmax_mixture", call, backend)
    if name == "reference":
        return reference.softmax_mixture(theta, E, tau)
    return (_SoftmaxMixture.apply(theta, E, tau, name) if call.needs_grad else _forward(theta, E, tau, name))[0]


class _SoftmaxMixture(torch.autograd.Function):
    """Gradient of the fused implementations, which provide ``softmax_mixture`` (z and lse) and its ``_backward``."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, E: Tensor, tau: float, backend: str) -> tuple[Tensor, Tensor]:
        z, lse = _forward(theta, E, tau, backend)
        ctx.save_for_backward(theta, E, z, lse)
        ctx.tau, ctx.backend = tau, backend
        ctx.mark_non_differentiable(lse)
        return z, lse

    @staticmethod
    @differentiable_once("softmax_mixture")
    def backward(ctx: Any, grad_z: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        theta, E, z, lse = ctx.saved_tensors
        grad_z = grad_z.float().contiguous()
        dots = (grad_z * z.float()).sum(1)
        return _backward(theta, E, ctx.tau, lse, grad_z, dots, ctx.backend), None, None, None


@register(
    "softmax_mixture",
    lambda theta, E: (
        E.new_empty(theta.shape[0], E.shape[1]),
        E.new_empty(theta.shape[0], dtype=torch.float32),
    ),
)
def _forward(theta: Tensor, E: Tensor, tau: float, backend: str) -> tuple[Tensor, Tensor]:
    return implementation("softmax_mixture", backend).softmax_mixture(theta, E, tau)


@register("softmax_mixture_backward", lambda theta: theta.new_empty(theta.shape))
def _backward(theta: Tensor, E: Tensor, tau: float, lse: Tensor, grad_z: Tensor, dots: Tensor, backend: str) -> Tensor:
    """``p * (<grad_z, E_v> - <grad_z, z>) / tau``; ``dots`` is the second product."""
    return implementation("softmax_mixture", backend).softmax_mixture_backward(theta, E, tau, lse, grad_z, dots)
