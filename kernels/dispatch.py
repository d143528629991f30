"""Which implementation of an op runs, and why.

The rule, in order:

1. ``backend=`` of the call, else the innermost :func:`use_backend`, else the environment variable
   ``LATENTREVISE_BACKEND``. Whatever is asked for this way runs or raises :class:`BackendError`; it never becomes
   another implementation silently. ``LATENTREVISE_ISA`` is such a request, too.
2. Otherwise the first entry of :data:`IMPLEMENTATIONS` for the op whose requirements the call meets. The reference
   meets every call, so there always is one; :func:`explain` tells why the ones before it were passed over, and where
   that is because a library is missing, a RuntimeWarning says so once.

A backend module ``kernels/<op>/<backend>.py`` has a function named like the op (for the differentiable ops the forward
half, with what its gradient needs) and ``unsupported(call)``, which returns the reason why it cannot serve that call,
or None.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

from . import checks, native
from .native import BackendError

BACKENDS = ("reference", "cpu", "triton", "cuda", "hopper")  # hopper: the CUDA library's kernels for sm_90a

# Implementations that exist, in the order in which they are tried.
IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "vertex_oracle": ("triton", "hopper", "cpu", "reference"),
    "plausible_vertices": ("triton", "cpu", "reference"),
    "linear_logprob": ("triton", "hopper", "cpu", "reference"),
    "mixture_embed": ("triton", "cuda", "cpu", "reference"),
    "softmax_mixture": ("triton", "cpu", "reference"),
    "hull_step": ("triton", "cpu", "reference"),
    "entropic_step": ("triton", "cpu", "reference"),
}

_override: ContextVar[str | None] = ContextVar("latentrevise_backend", default=None)


@dataclass(frozen=True)
class Call:
    """What an implementation may decide by: where the tensors are, what they hold, which there are."""

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    needs_grad: frozenset[str] = frozenset()
    arguments: frozenset[str] = frozenset()  # names of the tensors that were passed
    aligned: bool = True  # every row of the table begins and ends at a multiple of 16 bytes
    transformed: bool = False  # inside torch.func

    @classmethod
    def of(cls, **tensors: torch.Tensor | None) -> Call:
        """Describe a call from its tensors, by argument name, the table first; all are on one device (checked before).

        While ``torch.compile`` traces there is no address yet: alignment is then that of the strides.
        """
        present = {name: x for name, x in tensors.items() if x is not None}
        grads = frozenset(name for name, x in present.items() if x.requires_grad) if torch.is_grad_enabled() else ()
        table = next(iter(present.values()))
        step = 16 // table.element_size()
        whole = table.shape[1] % step == 0 and table.stride(0) % step == 0
        compiling = torch.compiler.is_compiling()
        transformed = not compiling and any(map(checks.transformed, present.values()))
        aligned = whole and (compiling or transformed or table.data_ptr() % 16 == 0)
        dtypes = tuple(x.dtype for x in present.values() if x.is_floating_point())
        return cls(table.device, dtypes, frozenset(grads), frozenset(present), aligned, transformed)


@dataclass(frozen=True)
class Choice:
    """The implementation that serves a call."""

    op: str
    backend: str
    reason: str
    rejected: dict[str, str] = field(default_factory=dict)  # backend -> why it was passed over

    def __str__(self) -> str:
        passed = "".join(f"; {name}: {why}" for name, why in self.rejected.items())
        return f"{self.op}: {self.backend} ({self.reason}{passed})"


@cache
def unavailable(backend: str) -> str | None:
    """Why a backend cannot run on this machine at all, or None if it can. Asked once a process."""
    if backend not in BACKENDS:
        raise BackendError(f"unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    if backend in ("cpu", "cuda", "hopper"):
        why = native.unavailable("cpu" if backend == "cpu" else "cuda")
        if why is None and backend == "hopper":
            devices = range(native.load("cuda").device_count())
            if all(torch.cuda.get_device_capability(device) != (9, 0) for device in devices):
                return "no device of compute capability 9.0"
        return why
    if backend == "triton":
        if find_spec("triton") is None:
            return "triton is not installed (pip install 'triton>=3.5')"
        if not interpreting_triton() and not torch.cuda.is_available():
            return "no CUDA device (TRITON_INTERPRET=1 runs the kernels in Triton's interpreter)"
    return None


def interpreting_triton() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def available() -> tuple[str, ...]:
    """Names of the backends that can run on this machine; ``"reference"`` always can."""
    return tuple(backend for backend in BACKENDS if unavailable(backend) is None)


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run every op inside the block on backend ``name`` (None: back to the automatic choice). Per thread and task.

    Raises:
        BackendError: at once if the backend is unknown or cannot run on this machine; in the op if it has no
            implementation there or cannot serve the call.
    """
    if name is not None and (why := unavailable(name)):
        raise BackendError(f"backend {name!r} cannot run here: {why}. Available: {', '.join(available())}")
    token = _override.set(name)
    try:
        yield
    finally:
        _override.reset(token)


def _requested(backend: str | None) -> tuple[str, str] | None:
    """(backend, who asked for it), or None for the automatic choice."""
    if backend is not None:
        return backend, "asked for by the call"
    if scoped := _override.get():
        return scoped, "asked for by use_backend"
    if named := os.environ.get("LATENTREVISE_BACKEND"):
        return named, "asked for by LATENTREVISE_BACKEND"
    return None


def _rejection(op: str, backend: str, call: Call) -> str | None:
    """Why ``backend`` does not serve this call of ``op``, or None if it does."""
    if backend not in IMPLEMENTATIONS[op]:
        return unavailable(backend) or f"{op} has no {backend} implementation"
    if backend == "reference":
        return None
    anywhere = backend == "triton" and interpreting_triton()  # the interpreter takes tensors of any device
    # Before anything is loaded or asked of a driver: a call on a CPU pays for neither.
    if not anywhere and call.device.type != ("cpu" if backend == "cpu" else "cuda"):
        return f"the tensors are on {call.device.type}"
    if why := unavailable(backend):
        return why
    if call.device.type == "cuda" and not anywhere:
        capability = torch.cuda.get_device_capability(call.device)
        if backend == "hopper" and capability != (9, 0):
            return f"needs compute capability 9.0, this is {capability[0]}.{capability[1]}"
        if capability < (8, 0):
            return "needs compute capability 8.0 or newer"
    return implementation(op, backend).unsupported(call)


@cache
def implementation(op: str, backend: str) -> ModuleType:
    """The module ``kernels/<op>/<backend>.py``, imported when it is first needed."""
    return import_module(f"{__package__}.{op}.{backend}")


def choose(op: str, call: Call, backend: str | None = None) -> Choice:
    """Decide which implementation of ``op`` serves ``call``; warn once where a missing library leaves the reference.

    Raises:
        BackendError: a backend was asked for by name and cannot serve it.
    """
    choice = _decide(op, call, backend)
    if call.transformed and choice.backend != "reference":
        raise BackendError(
            f"{op}: the transforms of torch.func (grad, vmap, jvp ...) cannot see through its kernels; use "
            "torch.autograd, and rows in place of a batch dimension, or backend='reference', which is plain torch"
        )
    if choice.backend == "reference" and choice.rejected:
        _say_what_is_missing(call.device.type, call.dtypes)
    return choice


def _decide(op: str, call: Call, backend: str | None = None) -> Choice:
    if request := _requested(backend):
        name, reason = request
        if why := _rejection(op, name, call):
            others = [other for other in IMPLEMENTATIONS[op] if _rejection(op, other, call) is None]
            raise BackendError(f"{op} cannot run on backend {name!r} ({reason}): {why}. It can on: {', '.join(others)}")
        return Choice(op, name, reason)
    rejected: dict[str, str] = {}
    for name in IMPLEMENTATIONS[op]:
        why = _rejection(op, name, call)
        if why is None:
            return Choice(op, name, "first that serves this call", rejected)
        rejected[name] = why
    raise AssertionError(f"{op} lists no reference implementation")


def _say_what_is_missing(device: str, dtypes: tuple[torch.dtype, ...]) -> None:
    if torch.float64 in dtypes or (device == "cpu" and torch.float16 in dtypes):
        return  # the reference's own
    missing = {name: unavailable(name) for name in (("cpu",) if device == "cpu" else ("triton", "cuda"))}
    if device in ("cpu", "cuda") and all(missing.values()):
        _warn_once(device, "; ".join(f"{name}: {why}" for name, why in missing.items()))


@cache
def _warn_once(device: str, why: str) -> None:
    warnings.warn(
        f"the kernels run on their plain torch references on {device}, several times slower and with the [N, V] matrix "
        f"in memory. {why}. LATENTREVISE_BACKEND=reference asks for them without this warning",
        RuntimeWarning,
        stacklevel=2,
    )


def chosen(op: str, call: Call, backend: str | None = None) -> str:
    """Name of the backend that serves ``call``; while ``torch.compile`` traces, a constant of the graph."""
    if not torch.compiler.is_compiling():
        return choose(op, call, backend).backend
    dtypes = ",".join(str(dtype).removeprefix("torch.") for dtype in call.dtypes)
    grads, arguments = ",".join(call.needs_grad), ",".join(call.arguments)
    return _chosen_while_tracing(op, str(call.device), dtypes, grads, arguments, call.aligned, backend)


def _chosen_while_tracing(
    op: str, device: str, dtypes: str, needs_grad: str, arguments: str, aligned: bool, backend: str | None
) -> str:
    grads, names = (frozenset(filter(None, given.split(","))) for given in (needs_grad, arguments))
    call = Call(
        torch.device(device), tuple(getattr(torch, dtype) for dtype in dtypes.split(",")), grads, names, aligned
    )
    return choose(op, call, backend).backend


# What torch.compiler.assume_constant_result sets; calling it here would import the whole compiler with this package.
_chosen_while_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def only_dtypes(call: Call, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """The reason to pass a call over if one of its tensors has another dtype."""
    for dtype in call.dtypes:
        if dtype not in dtypes:
            return f"no kernel for {str(dtype).removeprefix('torch.')} tensors"
    return None


def explain(
    op: str | None = None, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> list[Choice]:
    """Which implementation would serve ``op`` (every op if None) for tensors of ``dtype`` on ``device``, and why."""
    if op is not None and op not in IMPLEMENTATIONS:
        raise ValueError(f"unknown op {op!r}; choose one of {', '.join(IMPLEMENTATIONS)}")
    call = Call(torch.device(device), (dtype,))
    return [_decide(name, call) for name in ([op] if op else IMPLEMENTATIONS)]
