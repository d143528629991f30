"""Log-probs of given tokens straight from hidden states, without a ``[N, V]`` matrix.

For any loss that is a function of per-token log-probs, ``dL/dH_n = c_n * (softmax attention over W - W_y)``: the
loss only sets the scalar ``c_n``. NLL, ascent, unlikelihood and policy-gradient losses are coefficients on this one op.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from .. import checks
from ..dispatch import Call, chosen, implementation
from ..numerics import Transform
from ..registration import differentiable_once, register
from . import blocked, reference


class _Options(TypedDict, total=False):
    bias: Tensor | None
    scale: float
    softcap: float | None
    temperature: float
    ignore_index: int | None
    backend: str | None


@overload
def linear_logprob(
    H: Tensor, W: Tensor, y: Tensor, *, entropy: Literal[False] = ..., **options: Unpack[_Options]
) -> Tensor: ...
@overload
def linear_logprob(
    H: Tensor, W: Tensor, y: Tensor, *, entropy: Literal[True], **options: Unpack[_Options]
) -> tuple[Tensor, Tensor]: ...
@overload
def linear_logprob(
    H: Tensor, W: Tensor, y: Tensor, *, entropy: bool, **options: Unpack[_Options]
) -> Tensor | tuple[Tensor, Tensor]: ...
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
    ignore_index: int | None = -100,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``log p(y_n | H_n)`` under ``logits = softcap * tanh(scale * (H W^T + bias) / softcap) / temperature``.

    Args:
        H: ``[N, d]`` or ``[B, S, d]`` final hidden states, any floating dtype.
        W: ``[V, d]`` output head, any floating dtype, rows contiguous. Padded rows stay in the softmax, as in the
            model itself.
        y: ``[N]`` or ``[B, S]`` int64 targets in [0, V), or ``ignore_index``. Position n of H predicts ``y_n``: shift
            the labels of a causal model by one before.
        bias: ``[V]`` or None.
        scale: logit multiplier (Cohere, Granite: its inverse divisor).
        softcap: > 0 or None for no tanh (Gemma 2).
        temperature: > 0.
        entropy: also return the entropy of each distribution, in nats.
        ignore_index: rows with this target give log-prob 0 and entropy 0 and no gradient, whatever is in H (NaN, too).
            They cost what others cost; where many are ignored, pass ``H[keep], y[keep]``. None: every target counts.
        backend: overrides the dispatch.

    Returns:
        ``logp`` in the shape of y, float32 (float64 if an operand is) in nats, or ``(logp, entropy)``. Differentiable
        once in ``H``, and in ``W`` and ``bias`` if they require it; on the reference any number of times.

    Raises:
        ValueError, TypeError: an argument breaks the contract, or a target is outside the table (CPU
            tensors; on a GPU its row becomes NaN instead).
        BackendError: the backend asked for cannot serve the call, or the call is inside a transform of torch.func and
            does not ask for the reference.
        RuntimeError: in the backward pass of a gradient of this op (a second derivative).

    Examples:
        The loss of a trainer, labels of -100 ignored::

            labels = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]  # [B, S]: what each position predicts
            hidden = model.model(batch["input_ids"]).last_hidden_state  # [B, S, d]
            loss = -linear_logprob(hidden, model.lm_head.weight, labels).sum() / (labels != -100).sum()
    """
    checks.table("W", W)
    if isinstance(H, Tensor) and isinstance(y, Tensor) and H.dim() == 3:
        checks.tensor("H", H, (None, None, W.shape[1]), checks.FLOATS)
        checks.tensor("y", y, (H.shape[0], H.shape[1]), (torch.int64,))
    else:
        checks.tensor("H", H, (None, W.shape[1]), checks.FLOATS)
        checks.tensor("y", y, (H.shape[0],), (torch.int64,))
    if bias is not None:
        checks.tensor("bias", bias, (W.shape[0],), checks.FLOATS)
    checks.same_device(H=H, W=W, y=y, bias=bias)
    checks.finite("scale", scale)
    checks.positive("softcap", softcap)
    checks.positive("temperature", temperature)
    shape, H, y = y.shape, H.reshape(-1, W.shape[1]), y.reshape(-1)
    kept = None if ignore_index is None else y != ignore_index
    # Asked of a GPU, or while tracing, this would be a wait.
    if kept is not None and not (_known(y) and bool(kept.all())):
        H, y = torch.where(kept[:, None], H, 0), torch.where(kept, y, 0)
    else:
        kept = None
    logp, entropies = _logprob(H, W, y, bias, Transform(scale, softcap, temperature), entropy, backend)
    if kept is not None:
        logp = torch.where(kept, logp, 0)
        entropies = None if entropies is None else torch.where(kept, entropies, 0)
    return logp.view(shape) if entropies is None else (logp.view(shape), entropies.view(shape))


def _known(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not checks.transformed(x)


def _logprob(
    H: Tensor, W: Tensor, y: Tensor, bias: Tensor | None, transform: Transform, entropy: bool, backend: str | None
) -> tuple[Tensor, Tensor | None]:
    call = Call.of(W=W, H=H, bias=bias)
    name = chosen("linear_logprob", call, backend)
    if name == "reference":
        checks.ids_in_table("y", y, W.shape[0])
        found = reference.linear_logprob(H, W, y, bias, transform, entropy)
        return found if isinstance(found, tuple) else (found, None)
    gradient = call.needs_grad == {"H"}  # or else the backward pass has the scores anew, and dlogp/dH with them
    run = _LinearLogprob.apply if call.needs_grad else _forward
    logp, entropies, *_ = run(H, W, y, bias, transform, entropy, gradient, name)
    return logp, entropies if entropy else None


class _LinearLogprob(torch.autograd.Function):
    """Gradient of the fused implementations, which give ``logp``, ``entropy`` and ``dlogp/dH``."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        """Those of ``_forward``."""
        logp, entropies, gradients = _forward(*args)
        H, W, y, bias, ctx.transform, ctx.entropy, *_ = args
        ctx.save_for_backward(H, W, y, bias, logp, entropies, gradients)
        ctx.set_materialize_grads(False)
        return logp, entropies

    @staticmethod
    @differentiable_once("linear_logprob")
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        H, W, y, bias, logp, entropies, gradients = ctx.saved_tensors
        need_H, need_W, _, need_bias = ctx.needs_input_grad[:4]
        if not ctx.entropy:
            grad_entropy = None
        grad_H: Tensor | None = None
        grad_W: Tensor | None = None
        grad_bias: Tensor | None = None
        if need_W or need_bias or grad_entropy is not None or not len(gradients):
            grad_H, grad_W, grad_bias = _backward(
                H, W, y, bias, ctx.transform, logp, entropies if ctx.entropy else None,
                torch.zeros_like(logp) if grad_logp is None else grad_logp, grad_entropy, need_H, need_W, need_bias
            )  # fmt: skip
        elif need_H and grad_logp is not None:
            grad_H = grad_logp[:, None] * gradients
        return (
            grad_H.to(H.dtype) if need_H and grad_H is not None else None,
            grad_W if need_W else None,
            None,
            grad_bias if need_bias else None,
            *[None] * 4,
        )


@register(
    "linear_logprob",
    lambda H, W, entropy, gradient: (
        W.new_empty(H.shape[0], dtype=torch.float32),
        W.new_empty(H.shape[0] if entropy else 0, dtype=torch.float32),
        W.new_empty((H.shape[0] if gradient else 0, H.shape[1]), dtype=torch.float32),
    ),
)
def _forward(
    H: Tensor,
    W: Tensor,
    y: Tensor,
    bias: Tensor | None,
    transform: Transform,
    entropy: bool,
    gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    checks.ids_in_table("y", y, W.shape[0])
    return implementation("linear_logprob", backend).linear_logprob(H, W, y, bias, transform, entropy, gradient)


_backward = register(
    "linear_logprob_backward",
    lambda H, W, bias, need_H, need_W, need_bias: (
        H.new_empty(H.shape[0] if need_H else 0, H.shape[1], dtype=torch.float32),
        W.new_empty(W.shape[0] if need_W else 0, W.shape[1]),
        W.new_empty(W.shape[0] if need_bias else 0, dtype=W.dtype if bias is None else bias.dtype),
    ),
)(blocked.backward)


def table_gradient(
    H: Tensor,
    W: Tensor,
    y: Tensor,
    logp: Tensor,
    grad_logp: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    entropy: Tensor | None = None,
    grad_entropy: Tensor | None = None,
) -> Tensor:
    """The gradient of ``W`` alone, for who calls ``linear_logprob`` on a detached ``W`` and wants it later.

    Args:
        H, W, y, bias, scale, softcap, temperature: as they were.
        logp, entropy: ``[N]``, what they gave.
        grad_logp, grad_entropy: ``[N]``, the loss's derivatives by these.

    Returns:
        ``[V, d]`` in the dtype of W. 4NVd operations.
    """
    transform = Transform(scale, softcap, temperature)
    grads = _backward(H, W, y, bias, transform, logp, entropy, grad_logp, grad_entropy, False, True, False)
    return grads[1]
