"""What the C++ library promises beyond the contracts: the same bits under any number of threads, every instruction set,
little extra memory."""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from latentrevise.kernels import (
    entropic_step,
    hull_step,
    linear_logprob,
    native,
    plausible_vertices,
    softmax_mixture,
    vertex_oracle,
)

pytestmark = pytest.mark.skipif(native.unavailable("cpu") is not None, reason="the CPU library was not built")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


Operands = tuple[torch.Tensor, ...]


def operands(dtype: torch.dtype, T: int = 45, V: int = 3001, d: int = 40) -> Operands:
    """``G [T, d]``, ``E [V, d]``, ``y [T]``, ``theta [T, V]``: drawn, not computed, so no bit depends on a product of
    torch's, whose order of summation depends on the number of threads."""
    g = torch.Generator().manual_seed(7)
    G, E = torch.randn(T, d, generator=g).to(dtype), torch.randn(V, d, generator=g).to(dtype)
    return G, E, torch.randint(V, (T,), generator=g), d**0.5 * torch.randn(T, V, generator=g)


def gradient(G: torch.Tensor, E: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    H = G.clone().requires_grad_()
    linear_logprob(H, E, y, backend="cpu").sum().backward()
    return H.grad


def theta_gradient(G: torch.Tensor, E: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    theta = theta.clone().requires_grad_()
    softmax_mixture(theta, E, backend="cpu").backward(G.to(E.dtype))
    return theta.grad


def atoms(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([y, y.flip(0), y], 1), torch.tensor([[0.25, 0.75, 0.0]]).expand(len(y), -1).contiguous()


CALLS: dict[str, Callable[..., object]] = {
    "vertex_oracle": lambda G, E, y, theta: vertex_oracle(G, E, backend="cpu"),
    "linear_logprob": lambda G, E, y, theta: linear_logprob(G, E, y, entropy=True, softcap=9.0, backend="cpu"),
    "gradient": lambda G, E, y, theta: (gradient(G, E, y),),
    "plausible_vertices": lambda G, E, y, theta: plausible_vertices(G, E, 0.01, 50, backend="cpu"),
    "softmax_mixture": lambda G, E, y, theta: (softmax_mixture(theta, E, backend="cpu"),),
    "theta_gradient": lambda G, E, y, theta: (theta_gradient(G, E, theta),),
    "hull_step": lambda G, E, y, theta: hull_step(G, None, E, *atoms(y), 0.3, slot=2, backend="cpu"),
    "entropic_step": lambda G, E, y, theta: entropic_step(G, None, E, *atoms(y), 0.3, backend="cpu"),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [5, 45])
def test_the_same_bits_under_any_number_of_threads(threads, name, dtype, T):
    G, E, y, theta = operands(dtype, T)
    found = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        found.append(CALLS[name](G, E, y, theta))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_neighbours(dtype):
    G, E, *_ = operands(dtype)
    E[-1] = E[0]  # in the last block of rows, which is not a whole one: a tie, and the lowest id
    ids, values = vertex_oracle(G, E, backend="cpu")
    assert not (ids == len(E) - 1).any()
    only = torch.zeros(len(E), dtype=torch.bool)
    only[[0, -1]] = True
    assert vertex_oracle(G, E, only, backend="cpu")[0].tolist() == [0] * len(G)
    for rows in (slice(0, 1), slice(3, 20), slice(7, 45)):
        part = vertex_oracle(G[rows], E, backend="cpu")
        assert torch.equal(part[0], ids[rows])
        assert torch.equal(part[1], values[rows])


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ was not found in PATH")
def test_the_pool(tmp_path):
    """A region in a region throws; regions of several callers run side by side (each waits for all others there)."""
    root = Path(__file__).resolve().parents[2]
    sources = [Path(__file__).with_name("thread_pool.cpp"), root / "csrc/cpu/thread_pool.cpp"]
    command = ["g++", "-std=c++17", "-O1", "-pthread", f"-I{root}/csrc", *map(str, sources), "-o", f"{tmp_path}/pool"]
    subprocess.run(command, check=True)
    done = subprocess.run([f"{tmp_path}/pool"], capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout == "held\n", (done.returncode, done.stderr)


def test_calls_of_several_python_threads(threads):
    G, E, y, theta = operands(torch.float32)
    torch.set_num_threads(2)
    names = ["vertex_oracle", "gradient", "plausible_vertices", "softmax_mixture"]
    alone = [CALLS[name](G, E, y, theta) for name in names]
    with ThreadPoolExecutor(len(names)) as pool:
        found = [pool.submit(CALLS[name], G, E, y, theta) for name in names * 5]
    for i, future in enumerate(found):
        for a, b in zip(alone[i % len(names)], future.result(), strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("kind", ["normal", "integers", "heavy tails", "zero rows", "duplicates", "infinite"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_screening_changes_no_bit(kind, dtype):
    """Many tokens are screened by 8-bit products where the CPU has them; few are not. Same rows, same bits."""
    g = torch.Generator().manual_seed(len(kind))
    G, E = torch.randn(70, 67, generator=g), torch.randn(5003, 67, generator=g)
    if kind == "integers":
        G, E = G.round(), E.round()
    elif kind == "heavy tails":
        E *= torch.exp(3 * torch.randn(5003, 1, generator=g))
    elif kind == "zero rows":
        G[3], E[7] = 0, 0
    elif kind == "duplicates":
        E[2502:] = E[:2501]
    elif kind == "infinite":
        E[9, 2], E[11, 5] = torch.inf, torch.nan
    G, E = G.to(dtype), E.to(dtype)
    for allowed in (None, torch.rand(5003, generator=g) > 0.5):
        ids, values = vertex_oracle(G, E, allowed, backend="cpu")
        parts = [vertex_oracle(part, E, allowed, backend="cpu") for part in G.split(30)]
        assert torch.equal(ids, torch.cat([part[0] for part in parts]))
        assert torch.equal(values.view(torch.int32), torch.cat([part[1] for part in parts]).view(torch.int32))


@pytest.mark.parametrize("column", [0, 39])  # in a whole register and in what is left of a row
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_nan_is_found_among_many_tokens(dtype, column):
    G, E, y, _ = operands(dtype, T=64, V=4100)
    plain = torch.where(torch.arange(4100) == 100, False, True)
    usual, _ = vertex_oracle(G, E, plain, backend="reference")

    def found(G, E, allowed=None):
        ids, values = vertex_oracle(G, E, allowed, backend="cpu")
        step = hull_step(G, None, E, *atoms(y), 0.3, slot=2, allowed=allowed, backend="cpu")
        assert torch.equal(step.vertex, ids)
        return ids, values.isnan()

    bad = E.clone()
    bad[100, column] = torch.nan
    ids, nan = found(G, bad)
    assert ids.tolist() == [100] * 64
    assert nan.all()
    ids, nan = found(G, bad, plain)
    assert torch.equal(ids, usual)
    assert not nan.any()
    bad = G.clone()
    bad[5, column] = torch.nan
    ids, nan = found(bad, E, plain)
    assert ids[5] == 0
    assert nan.nonzero().tolist() == [[5]]
    assert torch.equal(ids[6:], usual[6:])


@pytest.mark.parametrize(("d", "most"), [(128, 8), (2048, 20)])
def test_what_screening_leaves_is_reported(d, most):
    """Few rows a token on random data; -1 for a full pass: few tokens, or no 8-bit products."""
    module = native.load("cpu")
    g = torch.Generator().manual_seed(0)
    G, E = torch.randn(70, d, generator=g), torch.randn(8192, d, generator=g)
    vertex_oracle(G, E, backend="cpu")
    left = module.rescored()
    assert 70 <= left < 70 * most if module.isa() in ("avx512vnni", "avx512bf16", "amx") else left == -1
    vertex_oracle(G[:5], E, backend="cpu")
    assert module.rescored() == -1


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "avx512vnni", "avx512bf16", "amx"])
def test_every_instruction_set(isa):
    """In a process of its own, since the choice is made once: the contract tests of the vocabulary-sized ops.

    torch's threads sleep while they wait: on a busy machine most of the time would go into waiting for each other.
    """
    if isa == native.load("cpu").isa():
        pytest.skip("is what this process runs")
    code = (
        "import sys, pytest; from latentrevise.kernels import BackendError, native\n"
        "try: native.load('cpu')\n"
        "except BackendError as why: print(why); sys.exit(77)\n"
        "sys.exit(pytest.main(['-q', '-x', '-p', 'no:cacheprovider', *sys.argv[1:]]))"
    )
    here = os.path.dirname(__file__)
    files = [os.path.join(here, f"test_{op}.py") for op in ("vertex_oracle", "linear_logprob", "softmax_mixture")]
    files.append(f"{__file__}::{test_a_single_nan_is_found_among_many_tokens.__name__}")
    command = [sys.executable, "-c", code, "-k", "cpu and not bad_input", *files]
    env = os.environ | {"LATENTREVISE_ISA": isa, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is set by means of Linux")
def test_too_little_memory_is_an_error_and_the_pool_lives_on():
    """Tasks allocate: what one of them throws in a worker must reach the caller, after the others are done."""
    code = """
import resource, torch
from latentrevise.kernels import plausible_vertices
torch.set_num_threads(2)
W, H = torch.zeros(40000, 8), torch.zeros(128, 8)  # flat: every token of every position is listed, 80 MB
def listed(rows): return plausible_vertices(H[:rows], W, 1e-9, 1, backend="cpu")[2].tolist()
for _ in range(50):  # so that every thread has its thread-local data, without which glibc aborts: a busy machine
    assert listed(16) == [40000] * 16  # gives all tasks of one call to one thread
pages = int(open("/proc/self/statm").read().split()[0])
_, hard = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (16 << 20), hard))
try:
    listed(128)
except MemoryError:
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    assert listed(128) == [40000] * 128
    print("and on")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "and on\n", (done.returncode, done.stderr)


def test_memory_does_not_grow_with_the_vocabulary():
    """Peak resident memory over that with the inputs in place, at V = 151,936, where the scores alone are 156 MB."""
    code = """
import resource, torch
from tests.kernels import test_cpu
torch.set_num_threads(2)
g = torch.Generator().manual_seed(0)
E = torch.empty(151936, 32).normal_(generator=g)
G, y = torch.randn(256, 32, generator=g), torch.arange(256)
names = ["vertex_oracle", "linear_logprob", "gradient", "plausible_vertices", "hull_step"]
for name in names:
    test_cpu.CALLS[name](G[:2], E, y[:2], None)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in names:
    test_cpu.CALLS[name](G, E, y, None)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64 * 1024, f"{done.stdout} KiB"


def test_offsets_beyond_32_bits():
    """A table of 2.2 * 2**31 bytes, untouched but for the rows that matter (the rest stays unmapped zeros)."""
    V, d = 600_000, 2048
    room = mmap.mmap(-1, V * d * 4)
    E = torch.frombuffer(room, dtype=torch.float32).view(V, d)
    E[V - 1, 3] = -5.0
    allowed = torch.zeros(V, dtype=torch.bool)
    allowed[[0, V - 1]] = True
    candidates = torch.tensor([[0, V - 1, V // 2]])
    G = torch.zeros(1, d)
    G[0, 3] = 1.0
    assert vertex_oracle(G, E, candidates=candidates, backend="cpu")[0].tolist() == [V - 1]
    step = hull_step(G, None, E, torch.tensor([[0, 0]]), torch.tensor([[1.0, 0.0]]), 0.5, slot=1, allowed=allowed,
                     candidates=candidates, backend="cpu")  # fmt: skip
    assert step.vertex.tolist() == [V - 1]
    assert step.z[0, 3] == -2.5
