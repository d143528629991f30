"""Cheaper passes through a frozen body: what only a body without weight gradients, or a slow CPU, makes possible.

**Half precision on a CPU without half-precision products.** Where the instructions are missing (AVX512-BF16, AMX, ...)
torch multiplies bfloat16 at about a quarter of the float32 rate. Frozen weights can be widened instead, one layer at a
time, and multiplied in float32: operands and result are the same half-precision numbers, sums are float32 as before
and rounded once, so nothing is lost. A widened weight lives for one product; the backward pass makes it again.

**Activations that are not kept.** In a gated product ``act(gate) * up`` autograd keeps gate, act(gate) and up; with
frozen weights they are most of what a layer keeps. act(gate) is made again from gate.
"""

from __future__ import annotations

import math
import platform
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

_X86 = ("x86_64", "AMD64")
_INSTRUCTIONS = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}


@cache
def slow(dtype: torch.dtype) -> bool:
    """Whether this CPU lacks products of that dtype. Known of x86 alone; others are left to torch."""
    names = _INSTRUCTIONS.get(dtype, ())
    found = torch.cpu.get_capabilities()
    return bool(names) and platform.machine() in _X86 and not any(found.get(name, False) for name in names)


class Widened(TorchFunctionMode):
    """While it is active, frozen linear layers and attention in a ``slow`` dtype on the CPU multiply in float32."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.linear and not kwargs and _slow(*args) and not any(_trained(x) for x in args[1:]):
            return _Linear.apply(*args)
        if func is nn.functional.scaled_dot_product_attention and _slow(*args) and not kwargs.get("dropout_p"):
            query, key, value = args
            mask = kwargs.pop("attn_mask", None)
            return _Attention.apply(query, key, value, mask, kwargs)
        return func(*args, **kwargs)


def _slow(*operands: Tensor | None) -> bool:
    # A tensor of another class (DTensor, quantised) knows itself how it is multiplied.
    return all(
        x is None or (type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and slow(x.dtype)) for x in operands
    )


def _trained(x: Tensor | None) -> bool:
    return x is not None and x.requires_grad


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(weight)
        return _product(x, weight.T, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _product(grad, weight, None), None, None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x [.., k] @ weight [k, n] + bias``, in float32, rounded to the dtype of ``x``."""
    rows = x.reshape(-1, x.shape[-1])
    out = _workspace("out", (rows.shape[0], weight.shape[1]))
    torch.mm(_workspace("x", rows.shape).copy_(rows), _workspace("weight", weight.T.shape).copy_(weight.T).T, out=out)
    if bias is not None:
        out += bias
    return out.to(x.dtype).view(*x.shape[:-1], -1)


# Float32 operands of one product after the other lie in the same memory. Allocated one by one between tensors that are
# kept, they leave the heap in pieces that nothing fits into again: several times the memory.
_space = threading.local()


def _workspace(name: str, shape: Sequence[int]) -> Tensor:
    size, held = math.prod(shape), getattr(_space, name, None)
    if held is None or held.numel() < size:
        held = torch.empty(size)
        setattr(_space, name, held)
    return held[:size].view(*shape)


def release() -> None:
    """Give the workspace of this thread back."""
    vars(_space).clear()


class _Attention(torch.autograd.Function):
    """Keeps its inputs as they came, whose float32 copies are twice as large, and runs again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, settings: dict[str, Any]
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.settings = settings
        return _attention(query.float(), key.float(), value.float(), mask, settings).to(query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, mask = ctx.saved_tensors
        with torch.enable_grad():
            wide = [x.float().requires_grad_(needed) for x, needed in zip(inputs, ctx.needs_input_grad, strict=False)]
            query, key, value = wide
            out = _attention(query, key, value, mask, ctx.settings)
        found = iter(torch.autograd.grad(out, [x for x in wide if x.requires_grad], grad.float()))
        return *(next(found).to(grad.dtype) if x.requires_grad else None for x in wide), None, None


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, settings: dict[str, Any]) -> Tensor:
    if mask is not None and mask.is_floating_point():
        mask = mask.float()
    return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, **settings)


# By the node that made a tensor, how to make it again from what that node keeps anyway.
_AGAIN: dict[str, Callable[[Any], Tensor]] = {
    "SiluBackward0": lambda node: nn.functional.silu(node._saved_self),
    "GeluBackward0": lambda node: nn.functional.gelu(node._saved_self, approximate=node._saved_approximate),
}


def activations_made_again() -> saved_tensors_hooks:
    """While it is open, the outputs of activation functions are not kept for the backward pass."""
    return saved_tensors_hooks(_pack, _unpack)


def _pack(tensor: Tensor) -> Any:
    node = tensor.grad_fn
    return node if node is not None and node.name() in _AGAIN else tensor.detach()


def _unpack(kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    with torch.no_grad():
        return _AGAIN[kept.name()](kept)
