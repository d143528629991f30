"""Installed as strangers do it: in trees and environments of their own; torch is never installed again.

The whole takes minutes and is run by ``make test-install``; what is not marked ``install`` is part of ``make test``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOOK = "import sys, setuptools.build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"
PURE = {"LATENTREVISE_CPU": "0", "LATENTREVISE_CUDA": "0"}
NEITHER = ("LATENTREVISE_CPU", "LATENTREVISE_CUDA", "LATENTREVISE_BUILD_DIR", "PYTHONPATH", "LATENTREVISE_ISA")
IGNORED = ("*.so", ".git", "build", "dist", "*.egg-info", ".venv", "__pycache__", "*-study", "*-quick")


def copy_as_cloned(to: Path) -> Path:
    """The working tree as a clone has it: nothing built."""
    return Path(shutil.copytree(ROOT, to, symlinks=True, ignore=shutil.ignore_patterns(*IGNORED)))


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    return copy_as_cloned(tmp_path / "clone")


def run(command: list[str], where: Path, fails: bool = False, **environment: str) -> str:
    env = {name: value for name, value in os.environ.items() if name not in NEITHER} | environment
    done = subprocess.run(command, cwd=where, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def build(
    hook: str, source: Path, out: Path, python: str = sys.executable, **environment: str
) -> tuple[Path, list[str]]:
    """What the hook made, and the names in it."""
    shutil.rmtree(out, ignore_errors=True)
    run([python, "-c", HOOK, hook, str(out)], source, **environment)
    (made,) = out.iterdir()
    with zipfile.ZipFile(made) as archive:
        return made, archive.namelist()


def libraries(names: list[str]) -> set[str]:
    return {Path(name).name.split(".")[0] for name in names if name.endswith(".so")}


def test_a_pure_wheel_holds_the_sources_once_and_nothing_of_an_earlier_build(clone, tmp_path):
    (gone := clone / "latentrevise" / "gone.py").touch()
    (clone / "kernels" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}").touch()
    assert "latentrevise/gone.py" in build("build_wheel", clone, tmp_path / "1", **PURE)[1]
    stale = next((clone / "build").glob("lib*")) / "latentrevise" / "kernels"
    (stale / "_cuda.so").touch()
    gone.unlink()
    wheel, names = build("build_wheel", clone, tmp_path / "2", **PURE)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "latentrevise/gone.py" not in names
    assert not libraries(names)
    assert names.count("latentrevise/kernels/dispatch.py") == len(set(names)) / len(names) == 1
    assert {name.split("/")[0].split("-")[0] for name in names} == {"latentrevise"}


def test_an_editable_install_is_a_path(clone, tmp_path):
    old = clone / "kernels" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    old.touch()
    wheel, names = build("build_editable", clone, tmp_path / "out", **PURE)
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (archive.read(name).decode().strip() for name in names if name.endswith(".pth"))
    assert Path(path).samefile(clone)
    assert not [name for name in names if name.endswith(".py")]
    assert not old.exists()


def test_a_clone_without_a_build_works_from_everywhere_and_gives_way_to_other_kernels(clone, tmp_path):
    """The references, said once; and the folder at the top is not taken for the distribution of its name."""
    code = (
        "import torch, latentrevise.kernels as k; k.vertex_oracle(torch.eye(2), torch.eye(2));"
        "from latentrevise import Reviser; from transformers.utils import import_utils as u;"
        "print(u.is_kernels_available())"
    )
    second = tmp_path / "second"
    shutil.copytree(clone / "kernels", second / "kernels")
    two_clones = {"PYTHONPATH": f"{clone}{os.pathsep}{second}"}
    for where, environment in ((clone, {}), (tmp_path, two_clones)):
        said = run([sys.executable, "-c", code], where, **environment)
        assert said.count("RuntimeWarning") == 1, said
        assert "no file of it in this installation" in said
        assert "False" in said.split()
    other = tmp_path / "site" / "kernels"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("from .inner import get_kernel\n__version__ = '9'\n")
    (other / "inner.py").write_text("get_kernel = 'theirs'\n")
    code = "import kernels, sys; from kernels import get_kernel; print(get_kernel, kernels.__version__)"
    assert "theirs 9" in run([sys.executable, "-c", code], clone, PYTHONPATH=str(tmp_path / "site"))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "80-real;90a-real;80-virtual"),
        ({"TORCH_CUDA_ARCH_LIST": "7.5 8.0;8.6,9.0+PTX"}, "80-real;86-real;90a-real;90-virtual"),
        ({"TORCH_CUDA_ARCH_LIST": "8.0", "LATENTREVISE_CUDA_ARCHS": "86-real,90a-real"}, "86-real;90a-real"),
        ({"TORCH_CUDA_ARCH_LIST": "Hopper"}, "'Hopper', which is not understood"),
        ({"TORCH_CUDA_ARCH_LIST": "6.1"}, "nothing from 8.0 on"),
    ],
)
def test_lists_of_architectures(environment, expected):
    code = "import setuptools; setuptools.setup = lambda **_: None; import setup; print(setup.cuda_archs())"
    assert expected in run([sys.executable, "-c", code], ROOT, "not" in expected, **environment)


def test_switches_that_are_not_understood(tmp_path):
    code = "import setuptools; setuptools.setup = lambda **_: None; import setup; setup.jobs()"
    assert "LATENTREVISE_CPU='yes'" in run([sys.executable, "-c", code], ROOT, True, LATENTREVISE_CPU="yes")
    assert "MAX_JOBS='all'" in run([sys.executable, "-c", code], ROOT, True, MAX_JOBS="all")


def test_without_a_compiler_the_error_names_the_way_without_one(clone, tmp_path):
    """A PATH that holds CMake and Ninja alone: the build fails and says what to set, and with that it succeeds."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("cmake", "ninja"):
        if (found := shutil.which(name)) is None:
            pytest.skip(f"{name} is not on PATH")
        (tools / name).symlink_to(found)
    bare = {"PATH": str(tools), "CC": "", "CXX": "", "CUDACXX": ""}
    command = [sys.executable, "-c", HOOK, "build_wheel", str(tmp_path / "out")]
    said = run(command, clone, True, LATENTREVISE_CUDA="0", **bare)
    assert "compiler" in said.lower()
    assert "LATENTREVISE_CPU=0 LATENTREVISE_CUDA=0" in said
    assert not libraries(build("build_wheel", clone, tmp_path / "pure", **PURE, **bare)[1])


@pytest.mark.install
@pytest.mark.timeout(900)
def test_a_failed_compiler_is_explained_and_forgotten(clone, tmp_path):
    cpu = {"LATENTREVISE_CUDA": "0", "MAX_JOBS": "2"}
    for tree in ({}, {"LATENTREVISE_BUILD_DIR": str(tmp_path / "tree")}):
        command = [sys.executable, "-c", HOOK, "build_wheel", str(tmp_path / "out")]
        said = run(command, clone, True, CXX="/bin/false", **cpu, **tree)
        assert "LATENTREVISE_CPU=0 LATENTREVISE_CUDA=0" in said
        assert libraries(build("build_wheel", clone, tmp_path / "out", **cpu, **tree)[1]) == {"_cpu"}


@pytest.mark.install
@pytest.mark.timeout(900)
def test_wheels_of_other_pythons_from_an_sdist_outside_git(clone, tmp_path):
    """Compiled and loaded; the op itself needs a torch of that Python, which is not at hand."""
    run([sys.executable, "-c", HOOK, "build_sdist", str(tmp_path / "sdist")], clone)
    (archive,) = (tmp_path / "sdist").iterdir()
    shutil.unpack_archive(archive, tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    assert (source / "latentrevise" / "kernels").is_symlink()
    pythons = [path for v in ("3.12", "3.13") for path in Path.home().glob(f".pyenv/versions/{v}*/bin/python")]
    if not pythons:
        pytest.skip("no other Python from 3.11 on is at hand")
    for python in map(str, pythons):
        env = {"PYTHONPATH": sysconfig.get_path("purelib"), "LATENTREVISE_CUDA": "0", "MAX_JOBS": "2"}
        wheel, _ = build("build_wheel", source, tmp_path / "out", python, **env)
        site = tmp_path / wheel.name
        shutil.unpack_archive(wheel, site, "zip")
        code = "import sys; sys.path.insert(0, sys.argv[1]); import _cpu; print('isa', _cpu.isa())"
        assert "isa " in run([python, "-c", code, str(site / "latentrevise" / "kernels")], tmp_path)
