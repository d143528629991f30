"""Contract tests run on every implementation that this machine can run: a test with a ``backend`` argument in a module
that sets ``OP`` is repeated for each of them. CUDA ones need a GPU and are skipped without it."""

from __future__ import annotations

import pytest
import torch
from latentrevise.kernels import dispatch


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" not in metafunc.fixturenames:
        return
    params = []
    for name in dispatch.IMPLEMENTATIONS[metafunc.module.OP]:
        why = dispatch.unavailable(name)
        marks = [pytest.mark.skip(reason=why)] if why else []
        if name in ("triton", "cuda") and not (name == "triton" and dispatch.interpreting_triton()):
            marks.append(pytest.mark.gpu)
        params.append(pytest.param(name, marks=marks))
    metafunc.parametrize("backend", params)


@pytest.fixture
def device(backend: str) -> torch.device:
    on_gpu = backend in ("triton", "cuda") and not dispatch.interpreting_triton()
    return torch.device("cuda" if on_gpu else "cpu")


@pytest.fixture
def rng(device: torch.device) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(20)
