"""``python -m benchmarks screening``: rows a token that certified screening leaves to be scored in float64.

The Triton oracle's pass over the table is bfloat16 whatever the operands; what it costs beside is these rows. Gradients
are float32 (``hull_step`` combines them so), tables bfloat16 or float32, random or trained-like (:func:`ops.trained`).
The numbers are those of any machine but for how a float32 sum is ordered. Without a GPU (TRITON_INTERPRET=1) rounding
and pass are torch's: the interpreter takes hours for it and cuts where hardware rounds. The finaliser's kernel counts.
"""

from __future__ import annotations

import argparse
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor

from benchmarks import harness, ops
from latentrevise.kernels import dispatch


@dataclass
class Left:
    """Rows a token that were scored again: mean, 95th percentile and most."""

    data: str
    table: str
    T: int
    V: int
    d: int
    mean: float
    p95: float
    most: int
    seconds: float  # of the call


def by_torch(oracle: ModuleType) -> AbstractContextManager[object]:
    """The pass over the table and the measurement of its rows without their kernels."""

    def rounded(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = []
        for rows in x.split(8192):
            rest = (rows.double() - rows.bfloat16().double()).norm(dim=1)
            parts.append((rows.bfloat16(), rows.double().norm(dim=1) + rest, rest))
        half, norms, rests = (torch.cat(part) for part in zip(*parts, strict=True))
        return half, norms, rests

    def scores(x: Tensor, E: Tensor, *_: object, screen: bool) -> tuple[None, tuple[Tensor, Tensor, Tensor], int]:
        BN = oracle._config(x, E, None, None)[1]
        product = torch.cat([x.float() @ rows.float().T for rows in E.split(8192)], 1)
        product = torch.nn.functional.pad(product, (0, -len(E) % BN), value=torch.inf)
        two = product.view(len(x), -1, BN).topk(2, largest=False)
        first = torch.arange(two.indices.shape[1])[None, :] * BN
        lows, seconds = (two.values[..., i].T.contiguous() for i in (0, 1))
        return None, (lows, (two.indices[..., 0] + first).T.int().contiguous(), seconds), 1

    return mock.patch.multiple(oracle, rounded=rounded, _pass=scores)


def main(options: argparse.Namespace) -> dict:
    """``python -m benchmarks screening``: see ``--help`` for the options it reads (T, d, vocab, dtype of the table)."""
    if (why := dispatch.unavailable("triton")) is not None:
        raise SystemExit(f"screening cannot run here: {why}")
    from latentrevise.kernels.vertex_oracle import triton as oracle

    device, rows = torch.device(options.device), []
    report = harness.Report.start("screening", device)
    for d in options.d or (896, 2048):
        for data in ("random", "trained-like"):
            for T in options.T or (64,):
                sizes = ops.Sizes((T,), (d,), options.vocab, (torch.float32,), device, 0.0, False)
                E, G = (
                    (ops.random(options.vocab, d, device=device), ops.random(T, d, device=device, seed=1))
                    if data == "random"
                    else ops.trained(options.vocab, d, T, sizes)
                )
                for dtype in options.dtype or ("bfloat16", "float32"):
                    begin = time.perf_counter()
                    with by_torch(oracle) if device.type == "cpu" else nullcontext():
                        _, count = oracle.screened_keys(G, E.to(getattr(torch, dtype)), None, None, None)
                    left = count.double().cpu()
                    seconds = time.perf_counter() - begin
                    facts = (float(left.mean()), float(left.quantile(0.95)), int(left.max()), seconds)
                    rows.append(Left(data, dtype, T, options.vocab, d, *facts))
                    print(rows[-1], flush=True)
    return report.to_json() | {"left": [asdict(row) for row in rows]}
