"""What the compiled kernels can reach on an H100 at most, without one: operations, bytes, and issue slots.

A matmul kernel's tile takes ``2 BM BN d / 4096`` cycles of a processor's tensor cores. Its epilogue (the instructions
around the main loop, :mod:`benchmarks.cubins`) issues on four schedulers, as does the loop itself beside the
multiplications; where nothing else multiplies meanwhile it is added, where the warpgroups run apart (``apart``) a
warpgroup's own may be as long as its own products. L2 hands a processor at most ``L2`` bytes a cycle. The share is that
of the tensor cores' cycles, an upper bound: launches, waves and latency are not in it. A kernel that streams is given
the rate at which its loop could issue its loads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from benchmarks import cubins

PROCESSORS, SCHEDULERS, FLOP_CYCLE, CLOCK = 132, 4, 4096, 1.755e9  # H100 SXM: bfloat16, dense, of a processor
L2 = 5120 / 132  # bytes a cycle and processor: what the A100's white paper gives; the H100's has no figure
MEMORY = 3.0e12  # bytes/s that copies reach
T, V, DIMS = 2048, 151936, (896, 2048, 4096)
BAR = 0.85

CALLS = (
    "vertex_oracle bfloat16 from bfloat16 V=151936 T=2048",
    "hull_step bfloat16 from float32 V=151936 T=2048",
    "linear_logprob bfloat16 from bfloat16 V=151936",
    "linear_logprob bfloat16 from bfloat16 V=151936 entropy gradient",
    "plausible_vertices bfloat16 from bfloat16 V=151936",
    "softmax_mixture bfloat16 from bfloat16 V=151936",
    "mixture_embed bfloat16 from bfloat16 V=151936",
    "entropic_step bfloat16 from bfloat16 V=151936",
)
# The forms of csrc/cuda/hopper.cuh, and the instructions of a tile's epilogue that are taken but for masks, biases,
# targets, softcaps, NaN and infinity, counted in the disassembly from the last wait to the jump back.
HOPPER = {"Oracle": 427, "LogProbs<false>": 1125, "LogProbs<true>": 1815, "Means": 493}


@dataclass(frozen=True)
class Estimate:
    """Of one kernel at one ``d``: cycles of a tile, and the bound; ``rate`` in bytes/s instead for one that streams."""

    kernel: str
    call: str
    d: int
    registers: int
    loop: int
    multiplications: int
    around: int
    main: float = 0.0
    epilogue: float = 0.0
    l2: float = 0.0  # bytes a cycle
    issue: float = 0.0  # share of the cycles by the epilogue alone
    share: float = 0.0  # and by L2
    rate: float = 0.0


def estimate(r: cubins.Resources, d: int) -> Estimate:
    head = (r.kernel, r.variant, d, r.registers, r.loop, r.multiplications, r.around)
    if not r.multiplications:
        return Estimate(*head, rate=r.streamed * 32 * SCHEDULERS * PROCESSORS * CLOCK)
    c = r.constants
    BM, BN, cluster = c["BM"], c["BN"], c.get("cluster", 1)
    # weighted rows walk the vocabulary, and have one epilogue for all of it
    along = V if any(name in r.kernel + r.variant for name in ("weighted", "mixture_tiles", "Means")) else d
    tensor = 2 * BM * BN * along / FLOP_CYCLE
    epilogue = c.get("around", r.around) * c["warps"] / SCHEDULERS
    issued = r.loop * c["warps"] / SCHEDULERS * along / c.get("BK", 16 * r.multiplications)
    main = max(tensor, issued)
    l2 = 2 * along * (BM + BN / cluster)
    busy = max(main, main / 2 + epilogue / 2) if c.get("apart") else main + epilogue
    used = 1.0 if along == d else d / (-(-d // BN) * BN)  # of the columns of a product with the table
    return Estimate(*head, main, epilogue, l2 / tensor, used * tensor / busy, used * tensor / max(busy, l2 / L2))


def compiled() -> Iterator[cubins.Resources]:
    yield from cubins.compile_triton(90, lambda op, what: f"{op} {what}" in CALLS)
    if nvcc := cubins.find_nvcc():
        for r in cubins.compile_cuda(nvcc, architectures=("90a",)):
            for form, around in HOPPER.items():
                if f"hopper_loop<2, {form}" in r.variant:
                    constants = {"BM": 128, "BN": 256, "warps": 8, "apart": 1, "cluster": 2, "around": around}
                    yield replace(r, constants=constants)


def main() -> dict:
    found = []
    print(f"share of the tensor cores' cycles by the epilogue alone, and with L2, at d = {DIMS}; !: below {BAR:.0%}")
    print(f"{'kernel':34} {'call':58} {'regs':>4} {'loop/mma':>9} {'around':>6} {'L2 B/clk':>8}")
    for r in compiled():
        rows = [estimate(r, d) for d in DIMS]
        found += rows
        first = rows[0]
        ends = "  ".join(f"{e.issue:.0%} {e.share:.0%}{'' if e.share >= BAR else '!'}" for e in rows)
        if not first.multiplications:
            ends = f"streams: issues {first.rate / 1e12:.0f} TB/s of loads, memory has {MEMORY / 1e12:.0f}"
        size = f"{r.loop}/{r.multiplications}"
        print(
            f"{r.kernel:34} {r.variant[:58]:58} {r.registers:4} {size:>9} {r.around:6} {first.l2:8.0f} {ends}",
            flush=True,
        )
    return {"name": "estimates", "T": T, "V": V, "kernels": [asdict(e) for e in found]}
