"""The CUDA library on a CPU: csrc/cuda compiled by the host compiler against tests/kernels/cuda_on_cpu.

``build`` makes the module; ``install`` puts it where the kernels look for ``_cuda``, so that backend "cuda" takes CPU
tensors. conftest.py installs the one that LATENTREVISE_EMULATED_CUDA names; test_cuda.py runs the tests that way.

    python tests/kernels/emulated_cuda.py FOLDER MODULE [ARGUMENT...]    (python -m MODULE, on a library in FOLDER)
"""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
VARIABLE = "LATENTREVISE_EMULATED_CUDA"
PROCESSORS = 3  # few, so that small tests cut the vocabulary into few parts of several tiles


def translate(source: str) -> str:
    """CUDA's launches, which are no syntax of C++."""
    return re.sub(
        r"(\w+(?:<[\w, ]+>)?)<<<(.+?), (\w+), \w+, \w+>>>\((.*?)\);",
        r"emulated::launch(\2, \3, [=] { \1(\4); });",
        source,
        flags=re.DOTALL,
    )


def build(folder: Path) -> Path:
    """Compile the module into ``folder``; its path."""
    import pybind11

    module = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    fields = [sys.executable, str(ROOT / "csrc/fields.py"), str(ROOT / "csrc/include/latentrevise/kernels.h")]
    (folder / "fields.inc").write_text(subprocess.run(fields, check=True, capture_output=True, text=True).stdout)
    includes = [HERE / "cuda_on_cpu", ROOT / "csrc", ROOT / "csrc/include", pybind11.get_include()]
    command = ["g++", "-std=c++17", "-O2", "-mf16c", "-fPIC", "-w", "-DLATENTREVISE_CUDA"]
    command += [f"-I{path}" for path in [*includes, sysconfig.get_paths()["include"]]]

    def compile_one(path: Path) -> str:
        translated = folder / f"{path.stem}.cpp"
        translated.write_text(translate(path.read_text()))
        made = str(translated.with_suffix(".o"))
        run([*command, "-fvisibility=hidden", "-c", str(translated), "-o", made])
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, [*(ROOT / "csrc/cuda").glob("*.cu"), ROOT / "csrc/bindings.cpp"]))
    run(["g++", "-shared", *objects, "-o", str(module)])
    return module


def run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def install(path: str) -> None:
    from latentrevise.kernels import dispatch, native

    name = f"{native.__package__}._cuda"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    native.unavailable.cache_clear()
    native.load.cache_clear()
    where, rejection = native.where, dispatch._rejection

    def emulated_where(backend: str, device: torch.device) -> int:
        return 0 if backend == "cuda" else where(backend, device)

    def emulated_rejection(op: str, backend: str, call: dispatch.Call) -> str | None:
        if backend in ("cuda", "hopper") and backend in dispatch.IMPLEMENTATIONS[op]:
            return dispatch.implementation(op, backend).unsupported(call)
        return rejection(op, backend, call)

    torch.cuda.get_device_capability = lambda device=None: (9, 0)  # type: ignore[assignment]
    native.where, dispatch._rejection = emulated_where, emulated_rejection
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=PROCESSORS)  # type: ignore[assignment]


def installed() -> bool:
    return VARIABLE in os.environ


def environment(module: Path, copies: str) -> dict[str, str]:
    return os.environ | {VARIABLE: str(module), "LATENTREVISE_EMULATED_COPIES": copies, "OMP_NUM_THREADS": "1"}


def main() -> None:
    """Run a module of Python on the emulation: the one that the variable names, or else the folder's, which is built
    when it is not there yet."""
    folder, name = Path(sys.argv[1]), sys.argv[2]
    library = Path(os.environ.get(VARIABLE) or folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}")
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        build(folder)
    os.environ.setdefault("LATENTREVISE_EMULATED_COPIES", "late")
    sys.path.insert(0, str(ROOT))
    install(str(library))
    sys.argv = sys.argv[2:]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
