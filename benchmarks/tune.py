"""Measure other tile configurations of the Triton kernels: ``python -m benchmarks.tune [--T N] [--d N]`` on a GPU.

Prints the fastest first. What wins goes into CONFIGS (vertex_oracle/triton.py) and SCORES, MEANS
(linear_logprob/triton.py) by hand, then ``python -m benchmarks cubins`` must still find no spills.
"""

from __future__ import annotations

import argparse
import itertools

import torch

from benchmarks.harness import clock
from latentrevise import kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--T", type=int, default=2048)
    parser.add_argument("--d", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tuning needs a GPU")
    from latentrevise.kernels.vertex_oracle import triton as oracle

    device, dtype = torch.device("cuda"), getattr(torch, options.dtype)
    G = torch.randn(options.T, options.d, device=device).to(dtype)
    E = torch.randn(options.vocab, options.d, device=device).to(dtype)
    key = (options.dtype, "few" if options.T <= 32 else "many")
    shipped, results = oracle.CONFIGS[key], []
    tiles = ((16, 32) if options.T <= 32 else (64, 128), (64, 128, 256), (32, 64), (4, 8), (2, 3, 4))
    for config in {shipped, *itertools.product(*tiles)}:
        oracle.CONFIGS[key] = config
        try:
            kernels.vertex_oracle(G, E, backend="triton")
        except Exception as error:  # a tile that does not fit this GPU is a result, not a failure
            print(f"{config}: {type(error).__name__}")
            continue
        torch.cuda.synchronize()
        times = sorted(clock(lambda: kernels.vertex_oracle(G, E, backend="triton"), device) for _ in range(10))
        results.append((times[5], config))
    for seconds, config in sorted(results)[:15]:
        rate = 2 * options.T * options.d * options.vocab / seconds / 1e12
        print(f"{1e3 * seconds:8.3f} ms {rate:7.1f} TFLOP/s  {config}{'  <- shipped' if config == shipped else ''}")


if __name__ == "__main__":
    main()
