"""The kernels against float64 on this machine, without a test runner: ``python -m benchmarks.check``."""

from __future__ import annotations

import sys

import torch

from latentrevise import kernels

TRANSFORM = {"softcap": 9.0, "scale": 0.9, "temperature": 1.1}


def main() -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bad = 0
    for op in ("vertex_oracle", "linear_logprob", "mixture_embed", "hull_step"):
        for backend in kernels.available():
            if backend == "reference" or (backend == "cpu") != (device.type == "cpu"):
                continue
            for dtype in (torch.float32, torch.bfloat16):
                for T, V, d in ((1, 300, 64), (33, 4099, 72), (300, 20011, 896)):
                    try:
                        error, limit = CHECKS[op](device, dtype, backend, T, V, d)
                    except kernels.BackendError as why:
                        print(f"{op} {backend} {dtype}: not served ({why})")
                        break
                    fine = error <= limit
                    bad += not fine
                    sizes, verdict = f"T={T} V={V} d={d}", "ok" if fine else "WRONG"
                    print(f"{op} {backend} {dtype} {sizes}: {error:.2e} <= {limit:.2e} {verdict}")
    print("all right" if not bad else f"{bad} WRONG")
    return int(bool(bad))


def vertex_oracle(device, dtype, backend, T, V, d):  # type: ignore[no-untyped-def]
    G, E = torch.randn(T, d, device=device).to(dtype), torch.randn(V, d, device=device).to(dtype)
    allowed = torch.rand(V, device=device) > 0.3
    ids, values = kernels.vertex_oracle(G, E, allowed, backend=backend)
    scores = (G.double() @ E.double().T).masked_fill(~allowed, torch.inf)
    chosen = scores.gather(1, ids[:, None])[:, 0]
    bound = 2**-23 * (d + 8) * float((G.double().abs() @ E.double().abs().T).max())
    return max(float((chosen - scores.amin(1)).max()), float((values.double() - chosen).abs().max())), bound


def linear_logprob(device, dtype, backend, T, V, d):  # type: ignore[no-untyped-def]
    H, W = torch.randn(T, d, device=device).to(dtype), (torch.randn(V, d, device=device) / d**0.5).to(dtype)
    y, c = torch.randint(V, (T,), device=device), torch.randn(T, device=device)
    grads = []
    for x, table in ((H.clone(), W), (H.double(), W.double())):
        x.requires_grad_()
        where = backend if x.dtype == dtype else "reference"
        (c * kernels.linear_logprob(x, table, y, backend=where, **TRANSFORM)).sum().backward()
        grads.append(x.grad.double())
    return float((grads[0] - grads[1]).norm() / grads[1].norm()), 1e-4 if dtype == torch.float32 else 8e-3


def mixture_embed(device, dtype, backend, T, V, d):  # type: ignore[no-untyped-def]
    ids, weights = torch.randint(V, (T, 7), device=device), torch.rand(T, 7, device=device)
    E = torch.randn(V, d, device=device).to(dtype)
    z = kernels.mixture_embed(ids, weights, E, backend=backend).double()
    exact = torch.einsum("ta,tad->td", weights.double(), E[ids].double())
    return float((z - exact).norm() / exact.norm()), 1e-6 if dtype == torch.float32 else 4e-3


def hull_step(device, dtype, backend, T, V, d):  # type: ignore[no-untyped-def]
    gold, away = (torch.randn(T, d, device=device).to(dtype) for _ in range(2))
    E, ids = torch.randn(V, d, device=device).to(dtype), torch.randint(V, (T, 3), device=device)
    weights = torch.tensor([0.5, 0.5, 0.0], device=device).expand(T, 3).contiguous()
    steps = [
        kernels.hull_step(gold, away, E, ids, weights, 0.3, slot=2, beta=-0.5, combine="normalized", backend=name)
        for name in (backend, "reference")
    ]
    z, exact = (step.z.double() for step in steps)
    return float((z - exact).norm() / exact.norm()), 1e-4 if dtype == torch.float32 else 8e-3


CHECKS = {
    "vertex_oracle": vertex_oracle,
    "linear_logprob": linear_logprob,
    "mixture_embed": mixture_embed,
    "hull_step": hull_step,
}

if __name__ == "__main__":
    sys.exit(main())
