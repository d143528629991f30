from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from latentrevise import kernels
from latentrevise.kernels import dispatch, native
from latentrevise.kernels.dispatch import Call, choose

ROOT = str(Path(dispatch.__file__).resolve().parents[1])
CPU = Call(torch.device("cpu"), (torch.float32,))


def mixture():
    return torch.tensor([[0, 1]]), torch.tensor([[0.25, 0.75]]), torch.eye(3)


def test_every_op_has_a_reference_last():
    for op, backends in dispatch.IMPLEMENTATIONS.items():
        assert backends[-1] == "reference"
        for backend in backends:
            if backend == "triton" and find_spec("triton") is None:
                continue
            module = dispatch.implementation(op, backend)
            assert callable(getattr(module, op))
            assert backend == "reference" or callable(module.unsupported)


def test_a_reference_is_at_most_thirty_lines():
    for op in dispatch.IMPLEMENTATIONS:
        assert len(Path(dispatch.implementation(op, "reference").__file__).read_text().splitlines()) <= 30


def test_available_names_what_runs():
    assert "reference" in kernels.available()
    assert "cpu" in kernels.available()
    assert ("cuda" in kernels.available()) == torch.cuda.is_available()


def test_explain_says_why_the_others_were_passed_over():
    (choice,) = kernels.explain("mixture_embed", "cpu", torch.float16)
    assert choice.backend == "reference"
    assert "float16" in choice.rejected["cpu"]
    assert "cuda" in choice.rejected
    assert len(kernels.explain()) == len(dispatch.IMPLEMENTATIONS)
    with pytest.raises(ValueError, match="unknown op 'attention'"):
        kernels.explain("attention")


def test_order_of_overrides(monkeypatch):
    assert choose("mixture_embed", CPU).backend == "cpu"
    monkeypatch.setenv("LATENTREVISE_BACKEND", "reference")
    assert choose("mixture_embed", CPU).backend == "reference"
    with kernels.use_backend("cpu"):
        assert choose("mixture_embed", CPU).backend == "cpu"
        assert choose("mixture_embed", CPU, "reference").backend == "reference"
        with kernels.use_backend(None):
            assert choose("mixture_embed", CPU).backend == "reference"  # the environment again
    assert choose("mixture_embed", CPU).backend == "reference"


@pytest.mark.parametrize("name", ["fastest", "CPU", ""])
def test_unknown_backend(name):
    with pytest.raises(kernels.BackendError, match="unknown backend"), kernels.use_backend(name):
        pass


def test_a_forced_backend_never_becomes_another(monkeypatch):
    ids, weights, E = mixture()
    with pytest.raises(kernels.BackendError, match=r"float16.*It can on: reference"):
        kernels.mixture_embed(ids, weights, E.half(), backend="cpu")
    monkeypatch.setenv("LATENTREVISE_BACKEND", "warp")
    with pytest.raises(kernels.BackendError, match="unknown backend 'warp'"):
        kernels.mixture_embed(ids, weights, E)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_is_a_clear_error():
    with pytest.raises(kernels.BackendError, match="cuda"), kernels.use_backend("cuda"):
        pass
    assert dispatch.unavailable("cuda")


def test_a_call_on_a_cpu_asks_no_other_backend(monkeypatch):
    def unavailable(backend):
        assert backend == "cpu"

    monkeypatch.setattr(dispatch, "unavailable", unavailable)
    for op in dispatch.IMPLEMENTATIONS:
        assert choose(op, CPU).backend == "cpu"


def gpu_call(*present: str, aligned: bool = True) -> Call:
    return Call(torch.device("cuda"), (torch.bfloat16,), arguments=frozenset(present), aligned=aligned)


def test_without_triton_the_cuda_kernels_get_what_they_can_serve(monkeypatch):
    """What they cannot is known before one is chosen: the automatic choice goes on, nothing is raised."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(dispatch, "unavailable", lambda backend: "not here" if backend == "triton" else None)
    assert choose("vertex_oracle", gpu_call("E", "G")).backend == "hopper"
    assert choose("linear_logprob", gpu_call("W", "H")).backend == "hopper"
    for call in (gpu_call("E", "candidates"), gpu_call("E", "W2", "Q2"), gpu_call("E", aligned=False)):
        assert choose("vertex_oracle", call).backend == "reference"
    assert choose("linear_logprob", gpu_call("W", "H", aligned=False)).backend == "reference"
    with pytest.raises(kernels.BackendError, match="no candidate sets"):
        choose("vertex_oracle", gpu_call("E", "candidates"), "hopper")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(kernels.BackendError, match=r"needs compute capability 9\.0, this is 8\.0"):
        choose("linear_logprob", gpu_call("W", "H"), "hopper")


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_triton_comes_first_on_a_gpu(monkeypatch):
    """Until a measurement says that a CUDA form is faster."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(dispatch, "unavailable", lambda backend: None)
    assert {choose(op, gpu_call()).backend for op in dispatch.IMPLEMENTATIONS} == {"triton"}


def test_what_a_call_knows():
    x = torch.zeros(40, 24, dtype=torch.bfloat16)
    call = Call.of(E=x, Q2=None, candidates=torch.zeros(1, 2, dtype=torch.int32), G=x.float())
    assert call.arguments == {"E", "candidates", "G"}
    assert call.dtypes == (torch.bfloat16, torch.float32)
    assert call.aligned
    assert Call.of(E=x[:, :16]).aligned
    for table in (x[:, :12], x[:, 1:17], torch.zeros(40, 25)[:, :16], x.flatten()[4:-20].view(39, 24)):
        assert not Call.of(E=table).aligned


@pytest.mark.parametrize(("capability", "there"), [((8, 0), False), ((9, 0), True), ((10, 0), False)])
def test_hopper_is_available_on_hopper(monkeypatch, capability, there):
    monkeypatch.setattr(native, "unavailable", lambda backend: None)
    monkeypatch.setattr(native, "load", lambda backend: SimpleNamespace(device_count=lambda: 1))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert (dispatch.unavailable.__wrapped__("hopper") is None) == there


def test_the_override_is_per_thread():
    with kernels.use_backend("reference"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: choose("mixture_embed", CPU).backend).result() == "cpu"


def test_kernels_import_no_transformers_and_the_folder_itself_is_empty():
    code = "import sys, latentrevise.kernels; print(sorted({'transformers', 'triton', 'pandas'} & set(sys.modules)))"
    assert run(code) == "[]"
    # A probe for the unrelated distribution `kernels` from the source tree finds an empty module, loaded once.
    code = "import sys, kernels; print(hasattr(kernels, '__version__'), [m for m in sys.modules if 'kernels.' in m])"
    assert run(code, cwd=ROOT) == "False []"


def run(code: str, cwd: str | None = None) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, check=True)
    return done.stdout.strip()


CALL = "import torch; from latentrevise import kernels; kernels.vertex_oracle(torch.eye(3), torch.eye(3))\n"


def test_an_instruction_set_that_does_not_exist_is_an_error():
    code = "import os; os.environ['LATENTREVISE_ISA'] = 'sse9'\n"
    caught = f"try: {CALL}except RuntimeError as e: print(type(e).__name__, e)"
    found = run(code + caught)
    assert found.startswith("BackendError LATENTREVISE_ISA=sse9 is unknown; choose one of scalar")
    assert found.removeprefix("BackendError ") in run(
        code + "from latentrevise.doctor import diagnosis; print(diagnosis())"
    )


@pytest.mark.parametrize("kind", ["missing", "of another Python", "does not load", "of earlier sources"])
def test_a_missing_library_is_said_once_with_reason_and_remedy(tmp_path, kind):
    """And where LATENTREVISE_ISA asks for it, it is an error."""
    package = Path(dispatch.__file__).parent
    shutil.copytree(package, tmp_path / "latentrevise" / "kernels", ignore=shutil.ignore_patterns("*.so"))
    (tmp_path / "latentrevise" / "__init__.py").touch()
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    name = {"of another Python": "_cpu.cpython-399-x86_64-linux-gnu.so", "does not load": f"_cpu{suffix}"}.get(kind)
    if name:
        (tmp_path / "latentrevise" / "kernels" / name).write_bytes(b"no library")
    if kind == "of earlier sources":
        (tmp_path / "latentrevise" / "kernels" / "_cpu.py").write_text("def isa(): return 'avx2'")
    done = subprocess.run([sys.executable, "-c", CALL * 2], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stderr.count("RuntimeWarning") == 1
    why = {
        "missing": "no file of it",
        "of another Python": "cpython-399",
        "does not load": "does not load here",
        "of earlier sources": "of an earlier version",
    }[kind]
    assert why in done.stderr
    assert "pip install ." in done.stderr
    env = os.environ | {"LATENTREVISE_ISA": "avx2"}
    failed = subprocess.run(
        [sys.executable, "-c", CALL], capture_output=True, text=True, cwd=tmp_path, env=env, check=False
    )
    said = failed.stderr.splitlines()[-1]
    assert said.startswith("latentrevise.kernels.native.BackendError: LATENTREVISE_ISA=avx2 asks for"), said
    assert why in said
    asked = CALL.replace("torch.eye(3))", "torch.eye(3), backend='reference')")
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stderr == ""


def test_transforms_of_torch_func_are_refused_in_a_sentence_and_run_on_the_reference():
    H, W, y = torch.randn(4, 8), torch.randn(20, 8), torch.tensor([0, 5, 19, 2])

    def loss(H, backend=None):
        return kernels.linear_logprob(H, W, y, backend=backend).sum()

    with pytest.raises(kernels.BackendError, match=r"torch\.func.*backend='reference'"):
        torch.func.grad(loss)(H)
    with pytest.raises(kernels.BackendError, match=r"vertex_oracle: the transforms of torch\.func"):
        torch.func.vmap(lambda g: kernels.vertex_oracle(g, W))(H[None])
    H.requires_grad_()
    (expected,) = torch.autograd.grad(loss(H), H)
    found = torch.func.grad(lambda H: loss(H, "reference"))(H.detach())
    torch.testing.assert_close(found, expected)
    each = torch.func.vmap(lambda h, t: kernels.linear_logprob(h, W, t, backend="reference"))
    torch.testing.assert_close(each(H[:, None], y[:, None])[:, 0], kernels.linear_logprob(H, W, y))
