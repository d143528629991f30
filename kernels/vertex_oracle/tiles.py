"""What several Triton kernels share: tiles and gathered rows of scores, their keys, and how the work is divided."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..dispatch import interpreting_triton

LOWEST = tl.constexpr(-(2**31))
NOTHING = tl.constexpr(2**63 - 1)


@triton.jit
def row_minimum(x, INTERPRETED: tl.constexpr):
    """Of each row, NaN where it has one."""
    if INTERPRETED:  # which takes seconds for a function that it does not know
        low = tl.min(tl.where(x == x, x, float("inf")), axis=1)
        return tl.where(tl.max((x != x).to(tl.int32), axis=1) > 0, float("nan"), low)
    else:
        return tl.reduce(x, 1, minimum_or_nan)


@triton.jit
def minimum_or_nan(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def score_keys(scores, ids, valid):
    """Order-preserving 64-bit keys of scores and ids."""
    scores = tl.where(scores == 0.0, 0.0, scores)  # -0.0 ties with 0.0
    bits = scores.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ordered = tl.where(scores != scores, LOWEST, ordered)
    keys = (ordered.to(tl.int64) << 32) | ids.to(tl.int64)
    return tl.where(valid, keys, NOTHING)


@triton.jit
def add_scores(acc, x, table, rows, valid_rows, tokens, valid_tokens, d, x_stride, x_term, table_stride,
               TERMS: tl.constexpr, BK: tl.constexpr, WIDEN: tl.constexpr):  # fmt: skip
    """``acc += sum over terms of x_term[tokens] @ table[rows]^T``."""
    k = tl.arange(0, BK)
    for start in range(0, d, BK):
        inside = start + k < d
        e = tl.load(
            table + rows.to(tl.int64)[:, None] * table_stride + (start + k)[None, :],
            mask=valid_rows[:, None] & inside[None, :],
            other=0.0,
        )
        if WIDEN:
            e = e.to(tl.float32)
        for term in tl.static_range(TERMS):
            q = tl.load(
                x + tl.cast(x_term, tl.int64) * term + tokens.to(tl.int64)[:, None] * x_stride + (start + k)[None, :],
                mask=valid_tokens[:, None] & inside[None, :],
                other=0.0,
            )
            if WIDEN:  # the interpreter multiplies the bits of a bfloat16
                q = q.to(tl.float32)
            acc = tl.dot(q, tl.trans(e), acc, input_precision="tf32x3")
    return acc


@triton.jit
def add_described_scores(acc, x, table, row, token, T, d, TERMS: tl.constexpr, BK: tl.constexpr, WIDEN: tl.constexpr):
    """The same from descriptors of ``x [TERMS * T, d]`` and the table; rows from ``row`` and tokens from ``token``."""
    for start in range(0, d, BK):
        e = table.load([row, start])
        if WIDEN:
            e = e.to(tl.float32)
        for term in tl.static_range(TERMS):
            q = x.load([token + term * T, start])
            if WIDEN:
                q = q.to(tl.float32)
            acc = tl.dot(q, tl.trans(e), acc, input_precision="tf32x3")
    return acc


@triton.jit
def tile_scores(x, table, rows, valid_rows, tokens, valid_tokens, row, token, T, d, x_stride, x_term, table_stride,
                TERMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr,
                WIDEN: tl.constexpr):  # fmt: skip
    """A tile of scores; ``d > 0`` must be known, or the zeros of an empty loop are merged into sums that the tensor
    cores are still adding to, and each product is waited for."""
    tl.assume(d > 0)
    acc = tl.zeros((BM, BN), tl.float32)
    if DESCRIPTORS:
        return add_described_scores(acc, x, table, row, token, T, d, TERMS, BK, WIDEN)
    else:
        return add_scores(acc, x, table, rows, valid_rows, tokens, valid_tokens, d, x_stride, x_term, table_stride,
                          TERMS, BK, WIDEN)  # fmt: skip


@triton.jit
def gathered_scores(x, table, ids, there, d, table_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                    KIND: tl.constexpr):  # fmt: skip
    """Products of one row ``x`` with the rows ``ids`` of the table; 0 where one is not ``there``."""
    acc = tl.zeros((ROWS, BLOCK), KIND)
    for start in range(0, d, BLOCK):
        j = start + tl.arange(0, BLOCK)
        q = tl.load(x + j, mask=j < d, other=0.0).to(KIND)
        row = tl.load(
            table + ids[:, None] * table_stride + j[None, :], mask=there[:, None] & (j < d)[None, :], other=0.0
        )
        acc += tl.where(there[:, None], q[None, :] * row.to(KIND), 0.0)
    return tl.sum(acc, axis=1)


def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def has_copy_engine(device: torch.device) -> bool:
    """Whether tensor descriptors are served by hardware; the interpreter has them too."""
    return interpreting_triton() or torch.cuda.get_device_capability(device) >= (9, 0)


def narrowed(config: tuple[int, int, int, int, int], device: torch.device) -> tuple[int, int, int, int, int]:
    """(BM, BN, BK, warps, stages) where each entry sums several products (terms, TF32 in three): before Hopper half as
    many columns at a time, for the operands of a product are in registers there, which do not suffice."""
    BM, BN, BK, warps, stages = config
    return config if has_copy_engine(device) else (BM, BN, BK // 2, warps, stages + 1)


def split(blocks: int, V: int, BN: int, device: torch.device) -> tuple[int, int]:
    """(parts, rows a part) of the vocabulary: enough programs to fill the device twice, whole tiles of BN rows."""
    programs = 2 * processors(device)
    tiles = triton.cdiv(V, BN)
    parts = max(1, min(tiles, programs // max(1, blocks)))
    rows = triton.cdiv(tiles, parts) * BN
    return triton.cdiv(V, rows), rows


def describable(x: Tensor) -> bool:
    """Whether the rows start at multiples of 16 bytes, as those of a descriptor must."""
    return x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0


def describe(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A descriptor of blocks of a matrix."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])
