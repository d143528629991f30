"""Triton implementation: a program a row and slice of ``d``, atoms in order; a program a (row, atom) backward.

Identity: ``z_t = sum_a w_ta E[i_ta]``, ``dw_ta = <dz_t, E[i_ta]>``. FLOPs and bytes: 2*T*A*d each on T*A*d gathered
elements, read once: bound by memory. Tiling: BLOCK columns of a row at a time. Numerics: float32 sums in the order of
the atoms. Limits: float32, bfloat16 and float16; E is frozen. An id outside the table makes its row NaN, as in CUDA.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import Call
from . import _native

BLOCK = 1024


@triton.jit
def mixture_forward(ids, weights, table, z, V, d, A, table_stride, slices, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    t = (program // slices).to(tl.int64)
    j = (program % slices) * BLOCK + tl.arange(0, BLOCK)
    inside = j < d
    acc = tl.zeros((BLOCK,), tl.float32)
    for a in range(A):
        id = tl.load(ids + t * A + a).to(tl.int64)
        w = tl.load(weights + t * A + a)
        # How much of the row is read, as a number: the interpreter cannot combine scalar conditions into a mask.
        reach = tl.where(w != 0.0, tl.where(id >= 0, tl.where(id < V, d, 0), 0), 0)
        row = tl.load(table + id * table_stride + j, mask=j < reach, other=0.0).to(tl.float32)
        acc += w * row + tl.where(w != 0.0, tl.where(reach > 0, 0.0, float("nan")), 0.0)
    tl.store(z + t * d + j, acc.to(z.dtype.element_ty), mask=inside)


@triton.jit
def mixture_backward(ids, grad_z, table, grad_weights, V, d, A, table_stride, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    pair = program.to(tl.int64)
    t = (program // A).to(tl.int64)
    id = tl.load(ids + pair).to(tl.int64)
    reach = tl.where(id >= 0, tl.where(id < V, d, 0), 0)
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, d, BLOCK):
        j = start + tl.arange(0, BLOCK)
        inside = j < reach
        row = tl.load(table + id * table_stride + j, mask=inside, other=0.0).to(tl.float32)
        acc += row * tl.load(grad_z + t * d + j, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_weights + pair, tl.where(reach > 0, tl.sum(acc, axis=0), float("nan")))


def unsupported(call: Call) -> str | None:
    return _native.unsupported(call, (torch.float32, torch.bfloat16, torch.float16))


def mixture_embed(ids: Tensor, weights: Tensor, E: Tensor) -> Tensor:
    (T, A), (V, d) = ids.shape, E.shape
    z = torch.empty(T, d, dtype=E.dtype, device=E.device)
    slices = triton.cdiv(d, BLOCK)
    if T:
        mixture_forward[(T * slices,)](ids, weights, E, z, V, d, A, E.stride(0), slices, BLOCK=BLOCK, num_warps=4)
    return z


def mixture_embed_backward(ids: Tensor, grad_z: Tensor, E: Tensor) -> Tensor:
    (T, A), (V, d) = ids.shape, E.shape
    grad_weights = torch.empty(T, A, dtype=torch.float32, device=E.device)
    if T:
        mixture_backward[(T * A,)](ids, grad_z, E, grad_weights, V, d, A, E.stride(0), BLOCK=BLOCK, num_warps=8)
    return grad_weights
