"""Dense mixture projection: ``z_t = softmax(theta_t / tau) @ E``, soft attention over the vocabulary."""

from __future__ import annotations

from torch import Tensor

from .. import checks
from ..dispatch import Call, choose, implementation


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
    choice = choose("softmax_mixture", Call.of(E=E, theta=theta), backend)
    return implementation("softmax_mixture", choice.backend).softmax_mixture(theta, E, tau)
