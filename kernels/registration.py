"""The ops as ``torch.ops.latentrevise.*``, which is how ``torch.compile`` sees them.

Eager calls go straight to the Python function: torch's dispatcher would cost more than a small kernel takes. While
``torch.compile`` traces, the same call becomes one opaque node with the shapes of its ``fake``. Autograd stays outside
(:class:`torch.autograd.Function` around the op), so no op here has a gradient of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import torch

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
