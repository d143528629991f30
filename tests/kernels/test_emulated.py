"""The CUDA kernels without a GPU: csrc/cuda compiled for the CPU, with tensor-core fragments, asynchronous copies and
barriers written from the PTX manual (tests/kernels/cuda_on_cpu), under test_cuda.py and the contract tests."""

from __future__ import annotations

import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import emulated_cuda
import pytest

HERE = Path(__file__).resolve().parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ was not found in PATH"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulation uses x86 instructions"),
]


@pytest.mark.parametrize("copies", ["late", "early"])
def test_kernels(emulated_library, copies):
    """Copies carried out as late and as early as they may be: a missing wait or barrier shows in one of the two."""
    run(emulated_library, copies, "test_cuda.py")


def test_contracts(emulated_library):
    run(emulated_library, "late", "test_mixture_embed.py", "-k", "cuda and not beyond_two_to_the_31 and not gpu")


@pytest.mark.parametrize("copies", ["late", "early"])
def test_a_cluster_that_ends_without_its_last_barrier_is_seen(emulated_library, copies):
    """A block of it may then be written to when it has ended."""
    chosen = ("-s", "-k", "test_oracle and 260")
    done = execute(emulated_library, copies, "test_cuda.py", *chosen, LATENTREVISE_EMULATED_FAULT="1")
    assert done.returncode == -signal.SIGABRT
    assert "a block may have ended before" in done.stderr or "a block that has ended is written to" in done.stderr


def execute(module: Path, copies: str, file: str, *options: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / file), *options]
    env = emulated_cuda.environment(module, copies) | more
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def run(module: Path, copies: str, file: str, *options: str) -> None:
    done = execute(module, copies, file, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
