"""Measure other tile configurations of the Triton kernels: ``python -m benchmarks.tune`` on a GPU.

Each target is a table of configurations in the kernels (CONFIGS, SCORES, MEANS, MIXTURES); the shipped entry is
measured first, then those that a look at the compiled code says are best (FIRST), then others in a fixed random order
until the share of ``--seconds`` of its target is used up. The fastest come first in the output and the JSON. What wins
goes into the table by hand, then ``python -m benchmarks cubins`` must still find no spills.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.harness import clock, describe
from latentrevise import kernels

# (BM, BN, BK, warps, stages) of large bfloat16 tiles: most operations a byte from L2, with and without a stage that
# leaves room for a second block's shared memory.
FIRST = ((128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 8, 4), (128, 128, 64, 4, 4), (64, 256, 64, 4, 4))


@dataclass(frozen=True)
class Target:
    """A table of configurations, the entry to vary, what to vary it over, and the call that uses it."""

    name: str
    table: dict
    key: object
    grid: tuple[tuple[int, ...], ...]
    call: Callable[[], object]
    flops: float


def targets(T: int, d: int, V: int, dtype: torch.dtype, device: torch.device) -> Iterator[Target]:
    from latentrevise.kernels.linear_logprob import triton as logprob
    from latentrevise.kernels.softmax_mixture import triton as softmax
    from latentrevise.kernels.vertex_oracle import triton as oracle

    name = str(dtype).removeprefix("torch.")
    size = "few" if T <= 32 else "described" if oracle.has_copy_engine(device) else "many"
    X, W = torch.randn(T, d, device=device).to(dtype), torch.randn(V, d, device=device).mul_(d**-0.5).to(dtype)
    y, theta = torch.randint(V, (T,), device=device), torch.randn(T, V, device=device).to(dtype)
    queries = X.clone().requires_grad_()
    BM, work = ((16, 32) if T <= 32 else (64, 128)), 2.0 * T * V * d

    def logprobs() -> object:
        return kernels.linear_logprob(queries, W, y, backend="triton")

    def grid(BM: tuple[int, ...], BN: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        return BM, BN, (32, 64, 128), (4, 8), (2, 3, 4, 5)

    tiles = grid(BM, (64, 128, 256))
    yield Target("vertex_oracle", oracle.CONFIGS, size, tiles,
                 lambda: kernels.vertex_oracle(X, W, backend="triton"), work)  # fmt: skip
    yield Target(
        "linear_logprob scores",
        logprob.SCORES,
        name + " plain" * (name == "bfloat16" and oracle.has_copy_engine(device)),
        tiles,
        logprobs,
        2 * work,
    )
    yield Target("linear_logprob means", logprob.MEANS, name,
                 ((64, 128), (64, 128, 256), (32, 64), (4, 8), (2, 3, 4, 5)), logprobs, 2 * work)  # fmt: skip
    yield Target("softmax_mixture", softmax.MIXTURES, name, grid((64, 128), (64, 128, 256)),
                 lambda: kernels.softmax_mixture(theta, W, backend="triton"), work)  # fmt: skip


def order(target: Target) -> list[tuple[int, ...]]:
    """The configurations of the grid but for the one that ships, as they are measured."""
    grid = [config for config in itertools.product(*target.grid) if config != target.table[target.key]]
    random.Random(0).shuffle(grid)
    return sorted(grid, key=lambda config: FIRST.index(config) if config in FIRST else len(FIRST))


def measure(target: Target, seconds: float, device: torch.device) -> Iterator[dict]:
    shipped, begin = target.table[target.key], time.perf_counter()
    others = order(target)
    try:
        for config in (shipped, *others):
            if config != shipped and time.perf_counter() - begin > seconds:
                return
            target.table[target.key] = config
            row = {"target": target.name, "config": config, "shipped": config == shipped}
            try:
                target.call()
                times = [clock(target.call, device) for _ in range(10)]
            except Exception as error:  # a tile that does not fit this GPU is a result, not a failure
                yield row | {"error": f"{type(error).__name__}: {str(error)[:200]}"}
                continue
            median = statistics.median(times)
            yield row | {"ms": 1e3 * median, "tflops": target.flops / median / 1e12}
    finally:
        target.table[target.key] = shipped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--T", type=int, default=2048)
    parser.add_argument("--d", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--seconds", type=float, default=600, help="for all targets together")
    parser.add_argument("--tiny", action="store_true", help="the shipped configurations only, on a tiny problem")
    parser.add_argument("--json", type=Path, help="also write the results there, after every measurement")
    options = parser.parse_args()
    if "triton" not in kernels.available():
        raise SystemExit("tuning needs a GPU and triton")
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    T, d, V = (16, 32, 300) if options.tiny else (options.T, options.d, options.vocab)
    document = {"name": "tune", "device": describe(device), "T": T, "d": d, "V": V, "dtype": options.dtype, "rows": []}
    for target in targets(T, d, V, getattr(torch, options.dtype), device):
        rows = []
        for row in measure(target, 0 if options.tiny else options.seconds / 4, device):
            rows.append(row)
            print(row, flush=True)
            if options.json:
                options.json.write_text(json.dumps(document | {"rows": document["rows"] + rows}, indent=1))
        rows.sort(key=lambda row: row.get("ms", float("inf")))
        document["rows"] = document["rows"] + rows
        for row in rows[:10]:
            mark = "  <- shipped" if row["shipped"] else ""
            print(f"{row.get('ms', 0):8.3f} ms {row.get('tflops', 0):7.1f} TFLOP/s  {row['config']}{mark}")
    if options.json:
        options.json.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
