"""The ops as ``torch.ops.latentrevise.*``, which is how ``torch.compile`` sees them.

Eager calls go straight to the Python function: torch's dispatcher would cost more than a small kernel takes. While
``torch.compile`` traces, the same call becomes one opaque node with the shapes of its ``fake``. Autograd stays outside
(:class:`torch.autograd.Function` around the op), so no op here has a gradient of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import signature
from itertools import islice
from typing import Any, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor

NAMESPACE = "latentrevise"
_library = torch.library.Library(NAMESPACE, "DEF")

Function = TypeVar("Function", bound=Callable)


_SCHEMA = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "SymInt", bool: "bool", str: "str", str | None: "str?",
           float: "float", float | None: "float?"}  # fmt: skip


def register(name: str, fake: Callable) -> Callable[[Function], Function]:
    """Register the decorated function under ``name``, with the schema of its signature; it returns no input.

    An argument of a NamedTuple is one of the op for each of its fields. ``fake`` takes those of the op's arguments that
    it needs, by name, and gives outputs of the right shape and dtype.

    The first argument is a tensor; the function runs on that tensor's device (kernels are launched on the current one)
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

        types = get_type_hints(implementation)
        outputs = get_args(types.pop("return")) or (Tensor,)
        tuples = {argument for argument, kind in types.items() if hasattr(kind, "_fields")}
        leaves: dict[str, Any] = {}  # the op's arguments
        for argument, kind in types.items():
            leaves |= get_type_hints(kind) if argument in tuples else {argument: kind}
        arguments = ", ".join(f"{_SCHEMA[kind]} {argument}" for argument, kind in leaves.items())
        wanted = signature(fake).parameters

        def run(*given):  # type: ignore[no-untyped-def]
            rest = iter(given)
            return function(*(
                kind._make(islice(rest, len(kind._fields))) if argument in tuples else next(rest)
                for argument, kind in types.items()
            ))  # fmt: skip

        def shapes(*given):  # type: ignore[no-untyped-def]
            return fake(**{argument: x for argument, x in zip(leaves, given, strict=True) if argument in wanted})

        _library.define(f"{name}({arguments}) -> ({', '.join('Tensor' for _ in outputs)})")
        _library.impl(name, run if tuples else function, "CompositeExplicitAutograd")
        _library.impl(name, torch.library.fallthrough_kernel, "Autograd")  # outputs need no gradient
        torch.library.register_fake(f"{NAMESPACE}::{name}", shapes, lib=_library)
        op = getattr(getattr(torch.ops, NAMESPACE), name).default

        def call(*args):  # type: ignore[no-untyped-def]
            if not torch.compiler.is_compiling():
                return function(*args)
            return op(*(x for given, argument in zip(args, types, strict=True)
                        for x in (given if argument in tuples else (given,))))  # fmt: skip

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
