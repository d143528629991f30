"""The ops as ``torch.ops.latentrevise.*``, which is how ``torch.compile`` sees them.

Eager calls go straight to the Python function: torch's dispatcher would cost more than a small kernel takes. While
``torch.compile`` traces, the same call becomes one opaque node with the shapes of its ``fake``. Autograd stays outside
(:class:`torch.autograd.Function` around the op), so no op here has a gradient of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

NAMESPACE = "latentrevise"
_library = torch.library.Library(NAMESPACE, "DEF")

Function = TypeVar("Function", bound=Callable)


def register(schema: str, fake: Callable) -> Callable[[Function], Function]:
    """Register the decorated function under ``schema`` (``name(Tensor G, ...) -> ...``); it returns no input.

    Its first argument is a tensor; the function runs on that tensor's device (kernels are launched on the current one)
    and without autocast, which would make half-precision products of the float32 ones it asks for.
    """

    def decorate(implementation: Function) -> Function:
        @wraps(implementation)
        def function(first, *rest):  # type: ignore[no-untyped-def]
            kind = first.device.type
            if kind == "cuda" and first.device.index != torch.cuda.current_device():
                with torch.cuda.device(first.device):
                    return function(first, *rest)
            if torch.is_autocast_enabled(kind):
                with torch.autocast(kind, enabled=False):
                    return function(first, *rest)
            return implementation(first, *rest)

        name = schema.partition("(")[0]
        _library.define(schema)
        _library.impl(name, function, "CompositeExplicitAutograd")
        _library.impl(name, torch.library.fallthrough_kernel, "Autograd")  # outputs need no gradient
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
        op = getattr(getattr(torch.ops, NAMESPACE), name).default

        def call(*args):  # type: ignore[no-untyped-def]
            return op(*args) if torch.compiler.is_compiling() else function(*args)

        return call  # type: ignore[return-value]

    return decorate


class _Last(torch.autograd.Function):
    """The identity of a gradient, tied to what it was made from, so that differentiating it again is noticed."""

    @staticmethod
    def forward(ctx: Any, op: str, gradient: Tensor, *sources: Tensor) -> Tensor:
        ctx.op = op
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            f"{ctx.op} has a first derivative only, and a second was asked for (a gradient penalty, a Hessian); "
            "backend='reference' has all of them, with the [N, V] matrix in memory"
        )


def differentiable_once(op: str) -> Callable[[Function], Function]:
    """For the ``backward`` of an autograd Function that gives plain numbers: a second derivative raises.

    torch's own ``once_differentiable`` raises only where the incoming gradient needs one; the second derivative with
    respect to the inputs would silently be zero.
    """

    def decorate(backward: Function) -> Function:
        @wraps(backward)
        def last(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
            with torch.no_grad():
                gradients = backward(ctx, *incoming)
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return gradients
            sources = [x for x in (*ctx.saved_tensors, *incoming) if x is not None and x.requires_grad]
            return tuple(None if x is None else _Last.apply(op, x, *sources) for x in gradients)

        return last  # type: ignore[return-value]

    return decorate
