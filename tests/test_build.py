"""The build itself: what is in an sdist, that a wheel from it works without the source tree, and the CUDA switch."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD = "import sys, setuptools.build_meta as b; print(b.{hook}(sys.argv[1]))"


def build(hook: str, source: Path, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Call a PEP 517 hook in ``source``; torch cannot be imported meanwhile, since the build must not need it."""
    (out / "poison").mkdir(parents=True, exist_ok=True)
    (out / "poison" / "torch.py").write_text("raise ImportError('the build must not import torch')")
    env = os.environ | {"PYTHONPATH": str(out / "poison")} | environment
    command = [sys.executable, "-c", BUILD.format(hook=hook), str(out)]
    return subprocess.run(command, cwd=source, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    out = tmp_path_factory.mktemp("sdist")
    done = build("build_sdist", ROOT, out)
    assert done.returncode == 0, done.stderr
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(out, filter="data")
    return next(path for path in out.iterdir() if path.name.startswith("latentrevise-") and path.is_dir())


def test_the_sdist_has_everything_a_build_needs(sdist):
    for needed in ("setup.py", "pyproject.toml", "CMakeLists.txt", "kernels/dispatch.py", "latentrevise/__init__.py"):
        assert (sdist / needed).is_file(), needed
    tracked = {path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert {path.relative_to(sdist) for path in (sdist / "csrc").rglob("*") if path.is_file()} == tracked
    assert not list(sdist.rglob("*.so"))


@pytest.mark.slow
def test_a_wheel_from_the_sdist_works_elsewhere(sdist, tmp_path):
    """Compiled with -O1, which takes a third of -O3; the wheels of a release are built with -O3, warnings as errors."""
    (tmp_path / "quick.cmake").write_text('set(CMAKE_CXX_FLAGS_RELEASE "-O1 -DNDEBUG" CACHE STRING "")\n')
    quick = {"CMAKE_TOOLCHAIN_FILE": str(tmp_path / "quick.cmake")}
    done = build("build_wheel", sdist, tmp_path, LATENTREVISE_CUDA="0", LATENTREVISE_WERROR="1", **quick)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    tops = {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert tops == {"latentrevise"}
    assert any(name.startswith("latentrevise/kernels/_cpu.") for name in names)
    assert not any("_cuda." in name and name.endswith(".so") for name in names)
    code = (
        "import torch, latentrevise.kernels as k; assert k.__file__.startswith({site!r}), k.__file__;"
        "print(k.mixture_embed(torch.tensor([[0, 2]]), torch.tensor([[.5, .5]]), torch.eye(3), backend='cpu').tolist())"
    ).format(site=str(tmp_path / "site"))
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[[0.5, 0.0, 0.5]]"


def test_cuda_demanded_without_nvcc_is_a_clear_error(monkeypatch):
    setup = load_setup(monkeypatch)
    monkeypatch.setattr(setup, "find_nvcc", lambda: None)
    monkeypatch.setenv("LATENTREVISE_CUDA", "1")
    with pytest.raises(SystemExit, match=r"nvcc was not found.*LATENTREVISE_CUDA=0"):
        setup.cuda_compiler()
    monkeypatch.setenv("LATENTREVISE_CUDA", "yes")
    with pytest.raises(SystemExit, match="'yes' is not understood"):
        setup.cuda_compiler()


def test_the_cuda_switch_decides_which_modules_are_built(monkeypatch):
    setup = load_setup(monkeypatch)
    monkeypatch.setattr(setup, "find_nvcc", lambda: "/toolkit/bin/nvcc")
    for value, cuda in (("0", False), ("1", True), (None, True)):
        if value is None:
            monkeypatch.delenv("LATENTREVISE_CUDA")
        else:
            monkeypatch.setenv("LATENTREVISE_CUDA", value)
        names = [module.name for module in setup.modules()]
        assert names == ["latentrevise.kernels._cpu"] + ["latentrevise.kernels._cuda"] * cuda
        assert setup.cuda_compiler() == ("/toolkit/bin/nvcc" if cuda else None)
    monkeypatch.setattr(setup, "find_nvcc", lambda: None)
    assert [module.name for module in setup.modules()] == ["latentrevise.kernels._cpu"]


def load_setup(monkeypatch: pytest.MonkeyPatch):
    """setup.py as a module, without running setup()."""
    import importlib.util

    import setuptools

    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("latentrevise_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_cuda_library_imports_without_a_gpu_and_says_so():
    from latentrevise.kernels import native

    try:
        from latentrevise.kernels import _cuda
    except ImportError:
        assert "LATENTREVISE_CUDA=1" in native.unavailable("cuda")
        pytest.skip("built without CUDA")
    import torch

    if torch.cuda.is_available():
        assert _cuda.device_count() >= 1
    else:
        with pytest.raises(RuntimeError, match=r"(?i)cuda"):
            _cuda.device_count()
        assert native.unavailable("cuda").startswith("no usable CUDA device")
