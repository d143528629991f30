"""The kernels against float64, every op and backend of this machine, without a test runner.

    python -m benchmarks.check [--tiny] [--op NAME] [--backend NAME] [--json FILE]

One line a case: the largest error, and the largest allowed. Seconds of work; the exit status says whether all is right.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import describe
from latentrevise import kernels
from latentrevise.kernels.dispatch import IMPLEMENTATIONS

TRANSFORM = {"softcap": 9.0, "scale": 0.9, "temperature": 1.1}
TINY = (1, 300, 64)
SHAPES = (TINY, (33, 4099, 72), (300, 20011, 896))


@dataclass(frozen=True)
class Case:
    """Where and on what an op is checked: T tokens, V rows of d."""

    backend: str
    device: torch.device
    dtype: torch.dtype
    T: int
    V: int
    d: int

    def rand(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, device=self.device)).to(self.dtype)

    def ids(self, columns: int) -> Tensor:
        return torch.randint(self.V, (self.T, columns), device=self.device)

    @property
    def exact(self) -> bool:
        return self.dtype == torch.float32


@dataclass(frozen=True)
class Result:
    op: str
    backend: str
    dtype: str
    T: int
    V: int
    d: int
    what: str
    error: float
    limit: float

    @property
    def fine(self) -> bool:
        return self.error <= self.limit  # NaN is not


def relative(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).norm() / exact.norm().clamp_min(1e-300))


# Each check yields (what, error, limit).
Errors = Iterator[tuple[str, float, float]]


def vertex_oracle(case: Case) -> Errors:
    G, E = case.rand(case.T, case.d), case.rand(case.V, case.d)
    allowed = torch.rand(case.V, device=case.device) > 0.3
    ids, values = kernels.vertex_oracle(G, E, allowed, backend=case.backend)
    scores = (G.double() @ E.double().T).masked_fill(~allowed, torch.inf)
    chosen = scores.gather(1, ids[:, None])[:, 0]
    bound = 2**-23 * (case.d + 8) * float((G.double().abs() @ E.double().abs().T).max())
    yield "chosen score over the minimum", float((chosen - scores.amin(1)).max()), bound
    yield "value", float((values.double() - chosen).abs().max()), bound


def linear_logprob(case: Case) -> Errors:
    H, W = case.rand(case.T, case.d), case.rand(case.V, case.d, scale=case.d**-0.5)
    y, c = torch.randint(case.V, (case.T,), device=case.device), torch.randn(case.T, device=case.device)
    found = []
    for x, table, backend in ((H, W, case.backend), (H.double(), W.double(), "reference")):
        for trained in (False, True):  # a table that needs a gradient too has its own backward pass
            x, table = x.detach().clone().requires_grad_(), table.detach().clone().requires_grad_(trained)
            logp, entropy = kernels.linear_logprob(x, table, y, entropy=True, backend=backend, **TRANSFORM)
            (c * logp + trained * c * entropy).sum().backward()
            found.append((logp.detach(), entropy.detach(), x.grad, table.grad))
    limit = 1e-4 if case.exact else 8e-3
    (
        (logp, entropy, grad, _),
        (*_, grad_trained, table),
        (exact_logp, exact_entropy, exact, _),
        (*_, both, exact_table),
    ) = found
    yield "logp", float((logp.double() - exact_logp).abs().max()), 1e-4
    yield "entropy", float((entropy.double() - exact_entropy).abs().max()), 1e-4
    yield "gradient", relative(grad, exact), limit
    yield "gradient beside the table's", relative(grad_trained, both), limit
    yield "gradient of the table", relative(table, exact_table), limit


def plausible_vertices(case: Case) -> Errors:
    H, W = case.rand(case.T, case.d), case.rand(case.V, case.d, scale=2 * case.d**-0.5)
    exact = torch.log_softmax(H.double() @ W.double().T, 1)
    floor = float(exact.amax(1).median()) - 2.0
    ids, logps, counts = kernels.plausible_vertices(H, W, math.exp(floor), 32, backend=case.backend)
    listed = ids >= 0
    apart = torch.where(listed, (logps - exact.gather(1, ids.clamp_min(0))).abs(), 0.0)
    yield "logp of the listed", float(apart.max()), 1e-4
    low, high = ((exact >= floor + sign * 1e-4).sum(1) for sign in (1, -1))
    yield "rows with a wrong count", float(((counts < low) | (counts > high)).sum()), 0
    wrong = (listed.sum(1) != counts.clamp_max(32)) | (logps[:, 1:] > logps[:, :-1]).any(1)
    yield "rows cut or sorted wrongly", float(wrong.sum()), 0


def softmax_mixture(case: Case) -> Errors:
    theta, E = case.rand(case.T, case.V, scale=3.0), case.rand(case.V, case.d)
    c, tau, found = case.rand(case.T, case.d), 0.7, []
    for x, table, backend in ((theta.clone(), E, case.backend), (theta.double(), E.double(), "reference")):
        x.requires_grad_()
        z = kernels.softmax_mixture(x, table, tau, backend=backend)
        z.backward(c.to(z.dtype))
        found.append((z.detach().double(), x.grad.double()))
    (z, grad), (exact, exact_grad) = found
    yield "z", relative(z, exact), 1e-5 if case.exact else 8e-3
    yield "gradient", relative(grad, exact_grad), 1e-4 if case.exact else 2e-2


def mixture_embed(case: Case) -> Errors:
    ids, E = case.ids(7), case.rand(case.V, case.d)
    weights = torch.rand(case.T, 7, device=case.device).requires_grad_()
    z, c = kernels.mixture_embed(ids, weights, E, backend=case.backend), case.rand(case.T, case.d)
    z.backward(c)
    rows = E[ids].double()
    exact = torch.einsum("ta,tad->td", weights.detach().double(), rows)
    yield "z", relative(z.detach(), exact), 1e-6 if case.exact else 4e-3
    yield "gradient", relative(weights.grad, torch.einsum("td,tad->ta", c.double(), rows)), 1e-5


def hull_step(case: Case) -> Errors:
    gold, away, E, ids = case.rand(case.T, case.d), case.rand(case.T, case.d), case.rand(case.V, case.d), case.ids(3)
    weights = torch.tensor([0.5, 0.5, 0.0], device=case.device).expand(case.T, 3).contiguous()

    def step(*floats: Tensor, backend: str) -> kernels.HullStep:
        gold, away, E = floats
        return kernels.hull_step(
            gold, away, E, ids, weights, 0.3, slot=2, beta=-0.5, combine="normalized", backend=backend
        )

    mine = step(gold, away, E, backend=case.backend)
    exact = step(gold.double(), away.double(), E.double(), backend="reference")
    yield "positions with another vertex", float((mine.vertex != exact.vertex).sum()), 0
    yield "z", relative(mine.z, exact.z), 1e-5 if case.exact else 4e-3
    yield "gap", relative(mine.gap, exact.gap), 1e-4


def entropic_step(case: Case) -> Errors:
    gold, E, ids = case.rand(case.T, case.d), case.rand(case.V, case.d), case.ids(9)
    weights = torch.rand(case.T, 9, device=case.device)
    weights[:, -1] = 0
    weights /= weights.sum(1, keepdim=True)
    segments = torch.arange(case.T, device=case.device) // 4

    def step(gold: Tensor, E: Tensor, backend: str) -> kernels.EntropicStep:
        return kernels.entropic_step(gold, None, E, ids, weights, 1.5, segments=segments, backend=backend)

    mine, exact = step(gold, E, case.backend), step(gold.double(), E.double(), "reference")
    yield "weights", relative(mine.weights, exact.weights.double()), 1e-4
    yield "z", relative(mine.z, exact.z), 1e-4 if case.exact else 4e-3
    yield "gap", relative(mine.gap, exact.gap), 1e-4


CHECKS: dict[str, Callable[[Case], Errors]] = {
    "vertex_oracle": vertex_oracle,
    "plausible_vertices": plausible_vertices,
    "linear_logprob": linear_logprob,
    "mixture_embed": mixture_embed,
    "softmax_mixture": softmax_mixture,
    "hull_step": hull_step,
    "entropic_step": entropic_step,
}


def cases(op: str, shapes: tuple[tuple[int, int, int], ...]) -> Iterator[Case]:
    for backend in IMPLEMENTATIONS[op]:
        if backend == "reference" or backend not in kernels.available():
            continue
        device = torch.device("cpu" if backend == "cpu" or not torch.cuda.is_available() else "cuda")
        for dtype in (torch.float32, torch.bfloat16):
            for shape in shapes:
                yield Case(backend, device, dtype, *shape)


def run(
    shapes: tuple[tuple[int, int, int], ...] = SHAPES, op: str | None = None, backend: str | None = None
) -> Iterator[Result]:
    for name, check in CHECKS.items():
        for case in cases(name, shapes):
            if op not in (None, name) or backend not in (None, case.backend):
                continue
            dtype = str(case.dtype).removeprefix("torch.")
            torch.manual_seed(case.T)
            try:
                for what, error, limit in check(case):
                    yield Result(name, case.backend, dtype, case.T, case.V, case.d, what, error, limit)
            except kernels.BackendError as why:
                print(f"{name} {case.backend} {dtype}: not served ({str(why).partition(': ')[2]})")
            except Exception as error:  # a kernel that does not run is a result; the others are still worth knowing
                what = f"{type(error).__name__}: {str(error)[:500]}"
                yield Result(name, case.backend, dtype, case.T, case.V, case.d, what, math.nan, 0.0)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="the smallest shape only")
    parser.add_argument("--op", choices=list(CHECKS), help="this one only")
    parser.add_argument("--backend", help="this one only; it is an error if it cannot run here")
    parser.add_argument("--json", type=Path, help="also write the results there, after every op's case")
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results: list[Result] = []
    for r in run((TINY,) if options.tiny else SHAPES, options.op, options.backend):
        results.append(r)
        verdict = "ok" if r.fine else "WRONG"
        sizes = f"T={r.T} V={r.V} d={r.d}"
        print(f"{verdict:5} {r.op} {r.backend} {r.dtype} {sizes}: {r.what} {r.error:.2e} <= {r.limit:.2e}", flush=True)
        if options.json:
            rows = [asdict(x) | {"fine": x.fine} for x in results]
            document = {"name": "check", "device": describe(device), "rows": rows}
            options.json.write_text(json.dumps(document, indent=1))
    bad = sum(not r.fine for r in results)
    print(f"{len(results)} checked, {bad} WRONG" if bad else f"{len(results)} checked, all right")
    return int(bool(bad) or not results)


if __name__ == "__main__":
    sys.exit(main())
