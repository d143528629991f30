"""Build of the native libraries with CMake and Ninja; metadata is in pyproject.toml.

Environment variables:

``LATENTREVISE_CUDA``        unset: build the CUDA library where nvcc is found; ``1``: demand it; ``0``: leave it out.
``LATENTREVISE_CUDA_ARCHS``  CMake architecture list, default ``80-real;90a-real;80-virtual`` (commas are accepted too).
``LATENTREVISE_WERROR``      ``1``: a warning of the compiler is an error.
``LATENTREVISE_BUILD_DIR``   keep the CMake build tree there (incremental builds); default: a temporary directory.

torch is not needed to build: the libraries take raw pointers (csrc/include/latentrevise/kernels.h).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_CUDA_ARCHS = "80-real;90a-real;80-virtual"


def find_nvcc() -> str | None:
    """The CUDA compiler, looked for where CMake and PyTorch look: CUDACXX, PATH, CUDA_HOME, /usr/local/cuda."""
    candidates = [os.environ.get("CUDACXX"), shutil.which("nvcc")]
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates += [str(Path(home, "bin", "nvcc")) for home in homes if home]
    return next((path for path in candidates if path and shutil.which(path)), None)


def cuda_compiler() -> str | None:
    """The nvcc to build with, or None for a build without CUDA; raises if LATENTREVISE_CUDA=1 can't be met."""
    setting = os.environ.get("LATENTREVISE_CUDA", "")
    if setting not in ("", "0", "1"):
        raise SystemExit(f"LATENTREVISE_CUDA={setting!r} is not understood; set it to 0 or 1, or leave it unset")
    if setting == "0":
        return None
    nvcc = find_nvcc()
    if setting == "1" and nvcc is None:
        raise SystemExit(
            "LATENTREVISE_CUDA=1 demands the CUDA library, but nvcc was not found in CUDACXX, PATH, "
            "CUDA_HOME/bin or /usr/local/cuda/bin. Install the CUDA toolkit or point CUDACXX at nvcc, "
            "or set LATENTREVISE_CUDA=0 to build for CPUs only."
        )
    return nvcc


class CMakeExtension(Extension):
    """A Python module that one CMake target of the same name builds."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    def run(self) -> None:
        self.nvcc = cuda_compiler()
        self.configured: Path | None = None
        super().run()

    def build_extension(self, ext: Extension) -> None:
        if not isinstance(ext, CMakeExtension):
            return super().build_extension(ext)
        tree = self.configured or self.configure()
        target = ext.name.rsplit(".", 1)[-1]
        command = ["cmake", "--build", str(tree), "--target", target]
        if self.parallel or os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL"):
            command += ["--parallel", str(self.parallel or os.environ["CMAKE_BUILD_PARALLEL_LEVEL"])]
        self.call(command)
        destination = Path(self.get_ext_fullpath(ext.name))
        destination.parent.mkdir(parents=True, exist_ok=True)
        # By a rename: a process that has the old module loaded keeps it.
        new = destination.with_name(destination.name + ".new")
        shutil.copyfile(tree / "modules" / destination.name, new)
        new.replace(destination)

    def configure(self) -> Path:
        import pybind11

        kept = os.environ.get("LATENTREVISE_BUILD_DIR")
        tree = Path(kept or Path(self.build_temp) / "cmake").resolve()
        tree.mkdir(parents=True, exist_ok=True)
        arguments = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "CMAKE_COMPILE_WARNING_AS_ERROR": os.environ.get("LATENTREVISE_WERROR", "0"),
            "LATENTREVISE_CUDA": "ON" if self.nvcc else "OFF",
        }
        if ninja := shutil.which("ninja"):
            arguments["CMAKE_MAKE_PROGRAM"] = ninja
        if self.nvcc:
            archs = os.environ.get("LATENTREVISE_CUDA_ARCHS") or DEFAULT_CUDA_ARCHS
            arguments["CMAKE_CUDA_COMPILER"] = self.nvcc
            arguments["CMAKE_CUDA_ARCHITECTURES"] = archs.replace(",", ";")
        flags = [f"-D{key}={value}" for key, value in arguments.items()]
        self.call(["cmake", "-S", str(ROOT), "-B", str(tree), "-G", "Ninja", *flags])
        self.configured = tree
        return tree

    def call(self, command: list[str]) -> None:
        try:
            subprocess.run(command, check=True)
        except FileNotFoundError as error:
            raise SystemExit(f"{command[0]} was not found; `pip install cmake ninja` or install it") from error
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"building the native libraries failed: {' '.join(command)}") from error


def modules() -> list[Extension]:
    names = ["latentrevise.kernels._cpu"]
    if os.environ.get("LATENTREVISE_CUDA") != "0" and (find_nvcc() or os.environ.get("LATENTREVISE_CUDA") == "1"):
        names.append("latentrevise.kernels._cuda")
    return [CMakeExtension(name) for name in names]


# latentrevise/kernels is a link to kernels/, so that the package is whole wherever it stands: installed, in an editable
# install (by a plain path, which type checkers follow), and in a clone that was never built.
setup(
    packages=find_packages(include=["latentrevise", "latentrevise.*"]),
    package_dir={"": "."},
    ext_modules=modules(),
    cmdclass={"build_ext": CMakeBuild},
)
