"""Contract tests run on every implementation that this machine can run: a test with a ``backend`` argument in a module
that sets ``OP`` is repeated for each of them. CUDA ones need a GPU, or the emulation of test_cuda.py, and are skipped
without it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from latentrevise.kernels import BackendError, dispatch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # helpers beside the tests

import emulated_cuda

if emulated_cuda.installed():
    emulated_cuda.install(os.environ[emulated_cuda.VARIABLE])


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CUDA library for the CPU, built once for all tests and all of their processes, as its command builds it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "emulated"
    with FileLock(f"{folder}.lock"):
        if not any(folder.glob("_cuda*.so")):
            folder.mkdir(exist_ok=True)
            environment = {name: value for name, value in os.environ.items() if name != emulated_cuda.VARIABLE}
            command = [sys.executable, emulated_cuda.__file__, str(folder), "platform"]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
    (library,) = folder.glob("_cuda*.so")
    return library


ON_GPU = ("triton", "cuda", "hopper")


def emulated(backend: str) -> bool:
    return dispatch.interpreting_triton() if backend == "triton" else emulated_cuda.installed()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" not in metafunc.fixturenames or not hasattr(metafunc.module, "OP"):
        return
    params = []
    for name in dispatch.IMPLEMENTATIONS[metafunc.module.OP]:
        why = dispatch.unavailable(name)
        marks = [pytest.mark.skip(reason=why)] if why else []
        if name in ON_GPU and not emulated(name):
            marks.append(pytest.mark.gpu)
        params.append(pytest.param(name, marks=marks))
    metafunc.parametrize("backend", params)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """The CUDA kernels may refuse a call (a dtype, a layout): test_cuda.py tests what they must not refuse."""
    try:
        return (yield)
    except BackendError as why:
        if getattr(item, "callspec", None) is None or item.callspec.params.get("backend") not in ("cuda", "hopper"):
            raise
        pytest.skip(str(why))


@pytest.fixture
def device(backend: str) -> torch.device:
    on_gpu = backend in ON_GPU and not emulated(backend)
    return torch.device("cuda" if on_gpu else "cpu")


@pytest.fixture
def rng(device: torch.device) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(20)
