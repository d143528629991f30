"""Build of the native libraries with CMake and Ninja; metadata is in pyproject.toml, every switch in docs/install.md.

A build takes what it made itself and nothing else: what an earlier one left in ``build/`` or beside the sources is
removed first. torch is not needed: the libraries take raw pointers (csrc/include/latentrevise/kernels.h).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import editable_wheel
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
LINK = "latentrevise/kernels"  # to ../kernels
LIBRARIES = ("_cpu", "_cuda")
DEFAULT_CUDA_ARCHS = "80-real;90a-real;80-virtual"


def switch(name: str) -> str:
    """An environment variable that is "0", "1" or "" (unset)."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name}={value!r} is not understood; set it to 0 or 1, or leave it unset")
    return value


def jobs() -> str | None:
    """How many compilers may run side by side, by the variables that are in use for it; None: one a core."""
    for name in ("MAX_JOBS", "CMAKE_BUILD_PARALLEL_LEVEL"):
        value = os.environ.get(name, "")
        if value and not (value.isdecimal() and int(value) > 0):
            raise SystemExit(f"{name}={value!r} is not understood; set it to a number of jobs >= 1, or leave it unset")
        if value:
            return value
    return None


def cuda_archs() -> str:
    """CMake's list of architectures: LATENTREVISE_CUDA_ARCHS as it is, else TORCH_CUDA_ARCH_LIST translated."""
    if given := os.environ.get("LATENTREVISE_CUDA_ARCHS"):
        return given.replace(",", ";")
    archs: list[str] = []
    entries = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip("; ,"))
    for entry in filter(None, entries):
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if found is None:
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST has {entry!r}, which is not understood here (8.0, 9.0a, 10.0+PTX are); "
                f"set LATENTREVISE_CUDA_ARCHS to CMake's list, such as {DEFAULT_CUDA_ARCHS!r}"
            )
        major, minor, feature, ptx = found.groups()
        if int(major) < 8:
            print(f"TORCH_CUDA_ARCH_LIST: {entry} is left out, the kernels need compute capability 8.0", flush=True)
            continue
        number = major + minor
        archs.append(f"{number}{feature or ('a' if number == '90' else '')}-real")  # wgmma and TMA are in sm_90a alone
        archs += [f"{number}-virtual"] if ptx else []
    if any(entries) and not archs:
        raise SystemExit(
            "TORCH_CUDA_ARCH_LIST names nothing from 8.0 on, which the kernels need; set LATENTREVISE_CUDA=0"
        )
    return ";".join(dict.fromkeys(archs)) or DEFAULT_CUDA_ARCHS


def find_nvcc() -> str | None:
    """The CUDA compiler, looked for where CMake and PyTorch look: CUDACXX, PATH, CUDA_HOME, /usr/local/cuda."""
    candidates = [os.environ.get("CUDACXX"), shutil.which("nvcc")]
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates += [str(Path(home, "bin", "nvcc")) for home in homes if home]
    return next((path for path in candidates if path and shutil.which(path)), None)


def cuda_compiler() -> str | None:
    """The nvcc to build with, or None for a build without CUDA; raises if LATENTREVISE_CUDA=1 can't be met."""
    setting = switch("LATENTREVISE_CUDA")
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


class Build(build):
    def run(self) -> None:
        # What an earlier build left there would be packed: a library that is switched off now, a module that is gone.
        if Path(self.build_base).resolve() in Path(self.build_lib).resolve().parents:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    def run(self) -> None:
        self.nvcc = cuda_compiler()
        self.configured: Path | None = None
        if self.inplace:  # libraries of this Python; those of another are not ours
            suffix = sysconfig.get_config_var("EXT_SUFFIX")
            for name in set(LIBRARIES) - {ext.name.rpartition(".")[2] for ext in self.extensions or ()}:
                (ROOT / LINK / f"{name}{suffix}").unlink(missing_ok=True)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        if not isinstance(ext, CMakeExtension):
            return super().build_extension(ext)
        tree = self.configured or self.configure()
        target = ext.name.rsplit(".", 1)[-1]
        command = ["cmake", "--build", str(tree), "--target", target]
        if side_by_side := self.parallel or jobs():
            command += ["--parallel", str(side_by_side)]
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
        if not kept:
            shutil.rmtree(tree, ignore_errors=True)
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
            arguments["CMAKE_CUDA_COMPILER"] = self.nvcc
            arguments["CMAKE_CUDA_ARCHITECTURES"] = cuda_archs()
        flags = [f"-D{key}={value}" for key, value in arguments.items()]
        try:
            self.call(["cmake", "-S", str(ROOT), "-B", str(tree), "-G", "Ninja", *flags])
        except SystemExit as error:
            (tree / "CMakeCache.txt").unlink(missing_ok=True)  # it remembers a compiler that failed, and would for ever
            raise SystemExit(
                f"{error}\nThe native libraries need a C++17 compiler (g++ 11 or newer), which CXX may name. To "
                "install without one: LATENTREVISE_CPU=0 LATENTREVISE_CUDA=0; GPUs are then served by Triton, CPUs by "
                "the plain torch references, which hold [N, V] in memory."
            ) from error
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
    names = [] if switch("LATENTREVISE_CPU") == "0" else ["_cpu"]
    if switch("LATENTREVISE_CUDA") == "1" or (switch("LATENTREVISE_CUDA") == "" and find_nvcc()):
        names.append("_cuda")
    return [CMakeExtension(f"latentrevise.kernels.{name}") for name in names]


class Editable(editable_wheel):
    """An editable install by a plain path in a .pth file, which type checkers and editors follow as Python does.

    setuptools writes one where all packages lie in one folder; the link resolves to another, so it is left to the path.
    """

    def run(self) -> None:
        kernels = LINK.replace("/", ".")
        packages = self.distribution.packages or []
        self.distribution.packages = [name for name in packages if not f"{name}.".startswith(f"{kernels}.")]
        if self.distribution.ext_modules:
            return super().run()
        for name in LIBRARIES:  # build_ext does it where there is something to build
            (ROOT / LINK / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}").unlink(missing_ok=True)
        super().run()


class Sdist(sdist):
    """kernels/ once, and the link to it as a link: what a clone has."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        inside = f"{LINK}/"
        super().make_release_tree(base_dir, [file for file in files if not os.path.normpath(file).startswith(inside)])
        link = Path(base_dir, LINK)
        link.symlink_to(os.path.relpath(Path(base_dir, "kernels"), link.parent), target_is_directory=True)


# latentrevise/kernels is a link to kernels/, so that the package is whole wherever it stands: installed, in an editable
# install, and in a clone that was never built.
setup(
    packages=find_packages(include=["latentrevise", "latentrevise.*"]),
    package_dir={"": "."},
    ext_modules=modules(),
    cmdclass={"build": Build, "build_ext": CMakeBuild, "editable_wheel": Editable, "sdist": Sdist},
)
