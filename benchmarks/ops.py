"""One benchmark an op: its tasks, and the implementations each is run with (ours first)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.harness import Absent, Report, Task, Thunk, add_replays, compare
from latentrevise import kernels
from latentrevise.kernels import native


@dataclass(frozen=True)
class Sizes:
    """What to run: ``T`` tokens, ``d`` dimensions, ``V`` vocabulary rows."""

    T: tuple[int, ...]
    d: tuple[int, ...]
    V: int
    dtypes: tuple[torch.dtype, ...]
    device: torch.device
    budget_s: float
    compile: bool
    backends: tuple[str | None, ...] = (None,)
    only: tuple[str, ...] = ()  # implementations whose names hold one of these; none: all

    def __iter__(self) -> Iterator[tuple[int, int, torch.dtype]]:
        for d in self.d:
            for dtype in self.dtypes:
                for T in self.T:
                    yield T, d, dtype


# An entry makes a callable or raises Absent.
Entries = dict[str, Callable[[], Thunk]]


def run(name: str, sizes: Sizes, report: Report, show: Callable[[str], None] = print) -> None:
    """Run benchmark ``name`` and add its rows to ``report``."""
    for task, dtype, entries in BENCHMARKS[name](sizes):
        ready: dict[str, Thunk] = {}
        for label, make in entries.items():
            if sizes.only and not any(part in label for part in sizes.only):
                continue
            try:
                thunk = make()
                thunk()
                ready[label] = thunk
            except (Absent, kernels.BackendError) as why:
                if label not in report.absent:
                    show(f"skipped {label}: {why}")
                report.absent[label] = str(why)
            except Exception as error:  # out of memory, a peer that breaks: the others are still worth measuring
                report.failed.append(f"{label}, {task.shape} {task.dtype} {task.data}: {type(error).__name__}: {error}")
                show(f"FAILED {report.failed[-1][:500]}")
        add_replays(ready, sizes.device, report.absent)
        rows = compare(task, ready, sizes.device, dtype, budget_s=sizes.budget_s)
        if rows and name in ("vertex_oracle", "hull_step") and rows[0].implementation == "latentrevise cpu":
            left = native.load("cpu").rescored()
            rows[0].rescored = left / task.shape["T"] if left >= 0 else None
        report.rows += rows
        for r in rows:
            left = "" if r.rescored is None else f", {r.rescored:.1f} rows a token rescored"
            show(f"{r.shape} {r.dtype} {r.data} {r.implementation}: {r.median_ms:.2f} ms{left}")


def random(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator(device=device).manual_seed(seed)
    return torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)


def trained(V: int, d: int, T: int, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """A table with what trained ones have and independent normals lack: a mean that all rows share, clusters, a
    spectrum that falls as a power, norms that differ between rows; and gradients of the same spectrum."""
    spread = torch.arange(1, d + 1, device=sizes.device) ** -0.5
    centres = random(max(1, V // 64), d, device=sizes.device, seed=7)
    cluster = torch.arange(V, device=sizes.device) % len(centres)
    E = random(V, d, device=sizes.device).add_(centres[cluster]).add_(2).mul_(spread)
    E *= random(V, 1, device=sizes.device, seed=8).mul_(0.25).exp_()
    return E, random(T, d, device=sizes.device, seed=9) * spread


def compiled(sizes: Sizes, function: Callable, *arguments: object) -> Entries:
    """The entry of ``torch.compile(function)``, if it is to be measured."""
    return {"torch.compile": lambda: partial(peers.compiled(function), *arguments)} if sizes.compile else {}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def ours(op: str, sizes: Sizes, *arguments: object, **keywords: object) -> Entries:
    """Our implementation: what the dispatch chooses, or each of the backends asked for."""

    def make(backend: str | None) -> Thunk:
        if backend is not None and backend not in kernels.available():
            raise Absent(f"backend {backend} cannot run here")
        return lambda: getattr(kernels, op)(*arguments, backend=backend, **keywords)

    (chosen,) = kernels.explain(op, sizes.device, sizes.dtypes[0])
    return {f"latentrevise {backend or chosen.backend}": partial(make, backend) for backend in sizes.backends}


def _oracle(sizes: Sizes) -> Iterator[tuple[Task, torch.dtype, Entries]]:
    for T, d, dtype in sizes:
        for data in ("random", "trained-like"):
            if data == "random":
                E, G = random(sizes.V, d, device=sizes.device), random(T, d, device=sizes.device, seed=1)
            else:
                E, G = trained(sizes.V, d, T, sizes)
            E, G = E.to(dtype), G.to(dtype)
            task = Task(
                "vertex_oracle",
                {"T": T, "V": sizes.V, "d": d},
                name_of(dtype),
                data,
                2.0 * T * sizes.V * d,
                float(E.nbytes + G.nbytes),
            )
            entries = ours("vertex_oracle", sizes, G, E)
            entries["eager matmul + argmin"] = lambda G=G, E=E: lambda: peers.eager_oracle(G, E)
            entries["blocked matmul + min"] = lambda G=G, E=E: lambda: peers.blocked_oracle(G, E)
            yield task, dtype, entries | compiled(sizes, peers.eager_oracle, G, E)


def _logprob(sizes: Sizes) -> Iterator[tuple[Task, torch.dtype, Entries]]:
    for T, d, dtype in sizes:
        W = random(sizes.V, d, device=sizes.device).mul_(d**-0.5).to(dtype)
        y = torch.randint(sizes.V, (T,), device=sizes.device)
        c = random(T, device=sizes.device, seed=1).sign()
        for data in ("flat", "peaked"):
            H = random(T, d, device=sizes.device, seed=2)
            if data == "peaked":  # the target's logit well above the others'
                H = H + 18 * W[y].float()
            H = H.to(dtype)
            task = Task(
                "linear_logprob",
                {"T": T, "V": sizes.V, "d": d},
                name_of(dtype),
                data,
                4.0 * T * sizes.V * d,
                float(W.nbytes + 3 * H.nbytes),
            )

            def own(backend: str | None, a: tuple) -> Thunk:
                function = peers.with_gradient(partial(kernels.linear_logprob, backend=backend))
                return lambda: function(*a)

            a = (H, W, y, c)
            (chosen,) = kernels.explain("linear_logprob", sizes.device, dtype)
            entries: Entries = {}
            for backend in sizes.backends:
                entries[f"latentrevise {backend or chosen.backend}"] = partial(own, backend, a)
            eager = peers.with_gradient(peers.eager_logprob)
            entries["eager matmul + log_softmax + backward"] = lambda f=eager, a=a: partial(f, *a)
            entries["blocked matmul, gradient in forward"] = lambda a=a: partial(peers.blocked_logprob_gradient, *a)
            if sizes.compile:
                entries["torch.compile"] = lambda a=a: partial(
                    peers.with_gradient(peers.compiled(peers.eager_logprob)), *a
                )
            entries["F.linear_cross_entropy"] = partial(_peer, peers.torch_fused, None, a, sizes.device)
            entries["liger"] = partial(_peer, peers.liger, "liger-kernel", a, sizes.device)
            entries["cut-cross-entropy"] = partial(_peer, peers.cut_cross_entropy, "cut-cross-entropy", a, sizes.device)
            entries["quack"] = partial(_peer, peers.quack, "quack-kernels", a, sizes.device)
            yield task, dtype, entries


def _peer(function: Callable, package: str | None, a: tuple, device: torch.device) -> Thunk:
    if package is not None:
        peers.installed(package, device)
    elif not hasattr(torch.nn.functional, "linear_cross_entropy"):
        raise Absent(f"torch {torch.__version__} has no F.linear_cross_entropy")
    return partial(function, *a)


def _plausible(sizes: Sizes) -> Iterator[tuple[Task, torch.dtype, Entries]]:
    def eager(H: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
        logp = (H @ W.T).float().log_softmax(1)
        best, ids = logp.topk(64, dim=1)
        return ids.masked_fill(best < -6.9, -1), (logp >= -6.9).sum(1)

    for T, d, dtype in sizes:
        W = random(sizes.V, d, device=sizes.device).mul_(d**-0.5).to(dtype)
        H = (4 * random(T, d, device=sizes.device, seed=2)).to(dtype)
        task = Task(
            "plausible_vertices",
            {"T": T, "V": sizes.V, "d": d},
            name_of(dtype),
            "flat",
            2.0 * T * sizes.V * d,
            float(W.nbytes + H.nbytes),
        )
        entries = ours("plausible_vertices", sizes, H, W, 1e-3, 64)
        entries["eager matmul + log_softmax + topk"] = lambda H=H, W=W: lambda: eager(H, W)
        yield task, dtype, entries | compiled(sizes, eager, H, W)


def _softmax_mixture(sizes: Sizes) -> Iterator[tuple[Task, torch.dtype, Entries]]:
    def eager(theta: Tensor, E: Tensor) -> Tensor:
        return torch.softmax(theta, 1) @ E

    for T, d, dtype in sizes:
        E = random(sizes.V, d, dtype=dtype, device=sizes.device)
        theta = random(T, sizes.V, dtype=dtype, device=sizes.device, seed=3)
        task = Task(
            "softmax_mixture",
            {"T": T, "V": sizes.V, "d": d},
            name_of(dtype),
            "flat",
            2.0 * T * sizes.V * d,
            float(E.nbytes + theta.nbytes),
        )
        entries = ours("softmax_mixture", sizes, theta, E)
        entries["eager softmax @ E"] = lambda theta=theta, E=E: lambda: eager(theta, E)
        yield task, dtype, entries | compiled(sizes, eager, theta, E)


def _atoms(T: int, A: int, sizes: Sizes) -> tuple[Tensor, Tensor]:
    ids = torch.randint(sizes.V, (T, A), device=sizes.device)
    weights = torch.rand(T, A, device=sizes.device)
    weights[:, -1] = 0
    return ids, weights / weights.sum(1, keepdim=True)


def _mixture_embed(sizes: Sizes) -> Iterator[tuple[Task, torch.dtype, Entries]]:
    def eager(ids: Tensor, weights: Tensor, E: Tensor) -> Tensor:
        return torch.einsum("ta,tad->td", weights.to(E.dtype), E[ids])

    A = 11
    for T, d, dtype in sizes:
        E = random(sizes.V, d, dtype=dtype, device=sizes.device)
        ids, weights = _atoms(T, A, sizes)
        task = Task(
            "mixture_embed",
            {"T": T, "A": A, "d": d},
            name_of(dtype),
            "random",
            2.0 * T * A * d,
            float(T * A * d * E.element_size()),
        )
        entries = ours("mixture_embed", sizes, ids, weights, E)
        entries["eager gather + einsum"] = lambda a=(ids, weights, E): lambda: eager(*a)
        entries["F.embedding_bag"] = lambda i=ids, w=weights, E=E: (
            lambda: torch.nn.functional.embedding_bag(i, E, per_sample_weights=w.to(E.dtype), mode="sum")
        )
        yield task, dtype, entries | compiled(sizes, eager, ids, weights, E)


def _hull_step(sizes: Sizes) -> Iterator[tuple[Task, torch.dtype, Entries]]:
    A = 11
    for T, d, dtype in sizes:
        E = random(sizes.V, d, dtype=dtype, device=sizes.device)
        gold, away = (random(T, d, dtype=dtype, device=sizes.device, seed=s) for s in (5, 6))
        ids, weights = _atoms(T, A, sizes)
        task = Task(
            "hull_step",
            {"T": T, "V": sizes.V, "d": d},
            name_of(dtype),
            "random",
            2.0 * T * sizes.V * d,
            float(E.nbytes),
        )

        def eager(gold=gold, away=away, E=E, ids=ids, weights=weights):  # type: ignore[no-untyped-def]
            g = gold / gold.norm(dim=1, keepdim=True) + 0.5 * away / away.norm(dim=1, keepdim=True)
            vertex = (g @ E.T).argmin(1)
            z = torch.einsum("ta,tad->td", weights.to(E.dtype), E[ids])
            gap = (g * (z - E[vertex])).sum(1)
            return vertex, gap, 0.8 * z + 0.2 * E[vertex]

        entries = ours("hull_step", sizes, gold, away, E, ids, weights, 0.2, slot=A - 1, beta=0.5, combine="normalized")
        entries["eager"] = lambda f=eager: f
        yield task, dtype, entries | compiled(sizes, eager)


def _entropic_step(sizes: Sizes) -> Iterator[tuple[Task, torch.dtype, Entries]]:
    C = 65
    for T, d, dtype in sizes:
        E = random(sizes.V, d, dtype=dtype, device=sizes.device)
        gold = random(T, d, dtype=dtype, device=sizes.device, seed=5)
        ids, weights = _atoms(T, C, sizes)
        task = Task(
            "entropic_step",
            {"T": T, "C": C, "d": d},
            name_of(dtype),
            "random",
            4.0 * T * C * d,
            float(T * C * d * E.element_size()),
        )

        def eager(gold=gold, E=E, ids=ids, weights=weights):  # type: ignore[no-untyped-def]
            rows = E[ids]
            s = torch.einsum("td,tcd->tc", gold, rows).float()
            rel = (s - (weights * s).sum(1, keepdim=True)) * (weights > 0)
            new = torch.softmax(weights.log() - rel / rel.abs().amax(1, keepdim=True), 1)
            return new, torch.einsum("tc,tcd->td", new.to(E.dtype), rows)

        entries = ours("entropic_step", sizes, gold, None, E, ids, weights, 1.0)
        entries["eager"] = lambda f=eager: f
        yield task, dtype, entries | compiled(sizes, eager)


BENCHMARKS: dict[str, Callable[[Sizes], Iterator[tuple[Task, torch.dtype, Entries]]]] = {
    "vertex_oracle": _oracle,
    "linear_logprob": _logprob,
    "plausible_vertices": _plausible,
    "softmax_mixture": _softmax_mixture,
    "mixture_embed": _mixture_embed,
    "hull_step": _hull_step,
    "entropic_step": _entropic_step,
}
