"""Every Triton and CUDA kernel compiled for sm_80 and sm_90 without a GPU, and what the compiler made of it.

Triton kernels are compiled as the ops launch them (:mod:`benchmarks.launches`), CUDA ones by nvcc from csrc/cuda.
Registers, stack, shared memory and the instructions of the main loop are read from the cubins (cuobjdump, which triton
brings along), spills and warnings from ptxas, changes of layout from Triton's intermediate form.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

from benchmarks import launches
from benchmarks.harness import version

ARCHITECTURES = (80, 90)
# ptxas: wgmma is serialised (C7510 and its kin), waits are inserted (C7514, C7515), registers do not suffice (C7508)
BAD_WARNINGS = ("C7508", "C7510", "C7514", "C7515")
ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Resources:
    """What one compiled kernel takes; bytes, but for registers (a thread)."""

    kernel: str
    variant: str
    arch: str
    registers: int
    stack: int
    spills: int
    shared: int
    warnings: tuple[str, ...] = ()  # codes of ptxas, of those in BAD_WARNINGS
    converted: int = 0  # changes of an accumulator's layout in a loop that multiplies
    loop: int = 0  # instructions of the main loop, matrix instructions in it, instructions around it
    multiplications: int = 0
    around: int = 0
    fences: int = 0  # in the main loop: each waits for all that a thread has stored
    streamed: float = 0.0  # bytes a thread loads from global memory for each instruction of the loop that loads most
    constants: dict[str, int] = field(default_factory=dict)  # tile sizes and the like; warps

    @property
    def fine(self) -> bool:
        # Triton puts a fence of its own where an operand goes to the tensor cores by shared memory.
        fenced = self.fences and not self.kernel.startswith("triton ")
        return not (self.spills or self.warnings or self.converted or fenced)


def compile_triton(arch: int, wanted: Callable[[str, str], bool] = lambda op, what: True) -> Iterator[Resources]:
    """The Triton kernels of the calls of :mod:`benchmarks.launches` that are ``wanted``."""
    with ThreadPoolExecutor() as pool:  # what one kernel takes is read while the next is compiled
        reading: deque[Future[Resources]] = deque()
        for launch in launches.compiled(arch, wanted):
            reading.append(pool.submit(read_launch, launch))
            while reading and reading[0].done():
                yield reading.popleft().result()
        for future in reading:
            yield future.result()


def read_launch(launch: launches.Launch) -> Resources:
    import triton

    tools, asm = Path(triton.__file__).parent / "backends/nvidia/bin", launch.compiled.asm
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        ((_, registers, stack, _),) = read_cubin(str(tools / "cuobjdump"), file.name)
        command = [str(tools / "cuobjdump"), "-sass", file.name]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    spills, warnings = assemble(asm["ptx"], launch.arch)
    constants = {name: int(value) for name, value in launch.constants.items() if isinstance(value, int)}
    return Resources(
        f"triton {launch.kernel}", launch.variant, f"sm_{launch.arch}", registers, stack, spills,
        launch.compiled.metadata.shared, warnings, converted_sums(asm["ttgir"]), *read_loop(sass), read_stream(sass),
        constants | {"warps": launch.compiled.metadata.num_warps},
    )  # fmt: skip


def assemble(ptx: str, arch: int) -> tuple[int, tuple[str, ...]]:
    """Bytes of spill stores and loads, and the codes of the warnings of BAD_WARNINGS, that ptxas reports."""
    from triton.backends.nvidia.compiler import get_ptxas

    ptxas = get_ptxas(arch).path  # the one that triton itself uses for this PTX
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "k.ptx").write_text(ptx)
        target = re.search(r"\.target (sm_\w+)", ptx)
        name = target.group(1) if target else f"sm_{arch}"
        command = [str(ptxas), "-v", f"-arch={name}", "-o", str(Path(folder, "k.cubin")), str(Path(folder, "k.ptx"))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return count_spills(done.stderr), bad_warnings(done.stderr)


def count_spills(log: str) -> int:
    return sum(int(x) for x in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))


def bad_warnings(log: str) -> tuple[str, ...]:
    return tuple(sorted(set(re.findall("|".join(BAD_WARNINGS), log))))


def converted_sums(ttgir: str) -> int:
    """Changes of an accumulator's layout inside a loop that multiplies: each takes all of it through shared memory.

    A loop that multiplies is an innermost one with a dot; its sums are what a dot adds to and gives, and what a wait
    hands on of that.
    """
    found = 0
    open_loops: list[list[str]] = [[]]
    for line in ttgir.splitlines():
        line = line.strip()
        if line.startswith("}") and len(open_loops) > 1:
            body = open_loops.pop()
            found += _converted(body)
            if not _dots(body):  # or else the loop around it is not the one that multiplies
                open_loops[-1] += body
        if line.endswith("{"):
            open_loops.append([])
        elif not line.startswith("}"):
            open_loops[-1].append(line)
    return found


def _dots(body: list[str]) -> list[str]:
    return [line for line in body if re.search(r"= (?:tt\.dot|ttng\.warp_group_dot) ", line)]


def _converted(body: list[str]) -> int:
    sums = set()
    for line in _dots(body):
        result, _, _, added, *_ = re.findall(r"%[\w#]+", line.split(" : ")[0])
        sums |= {result, added}
    for line in body:
        if "warp_group_dot_wait" in line:
            given, taken = line.split(" = ")[0].split(":")[0], re.findall(r"%[\w#]+", line.split(" = ")[1])
            if sums & set(taken):
                sums |= {given, *(f"{given}#{i}" for i in range(len(taken)))}
    changes = [re.match(r"(%[\w]+) = ttg\.convert_layout (%[\w#]+)", line) for line in body]
    return sum(bool(m) and bool({m.group(1), m.group(2)} & sums) for m in changes)


def disassembled(sass: str) -> tuple[list[tuple[int, str]], set[tuple[int, int]]]:
    """(address, instruction) of a kernel, and the loops in it as (first, last) addresses."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]+?)\s*;", sass)]
    # Loops end with a branch that may not be taken; one that always is comes back from code out of the way (waits).
    back = re.compile(r"^@\S+\s+BRA(?:\.\w+)*\s+(?:\S+,\s*)?0x([0-9a-f]+)|^BRA\.U\S*\s+\S+,\s*0x([0-9a-f]+)")
    ends = [(int(m.group(1) or m.group(2), 16), at) for at, text in code if (m := back.search(text))]
    return code, {(to, at) for to, at in ends if to < at}


def within(first: int, last: int, places: list[int]) -> int:
    return sum(first <= at <= last for at in places)


def innermost(loops: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]


def read_stream(sass: str) -> float:
    """Bytes that a thread loads from global memory for each instruction, in the innermost loop that loads most."""
    code, loops = disassembled(sass)
    loads = [(at, int(m.group(1) or 32) // 8) for at, text in code if (m := re.search(r"\bLDG\.E(?:\.(\d+))?", text))]
    rates = [
        (sum(size for at, size in loads if first <= at <= last), within(first, last, [at for at, _ in code]))
        for first, last in innermost([loop for loop in loops if within(*loop, [at for at, _ in loads])])
    ] or [(sum(size for _, size in loads), len(code))]
    loaded, size = max(rates)
    return loaded / size


def read_loop(sass: str) -> tuple[int, int, int, int]:
    """(instructions of the main loop, matrix instructions in it, instructions of what is around it, fences in it).

    The main loop is the innermost loop with the most matrix instructions; around it is the loop over tiles that
    contains it, or the kernel.
    """
    code, loops = disassembled(sass)
    multiplies = [at for at, text in code if re.search(r"\b(?:HGMMA|HMMA|IMMA|DMMA)\b", text)]
    places = [at for at, _ in code]
    busy = [loop for loop in loops if within(*loop, multiplies)]
    inner = innermost(busy)
    if not inner:
        return 0, 0, len(code), 0
    main = max(inner, key=lambda loop: within(*loop, multiplies))
    outer = [loop for loop in busy if loop != main and loop[0] <= main[0] and main[1] <= loop[1]]
    around = min(outer, key=lambda loop: loop[1] - loop[0], default=(places[0], places[-1]))
    size = within(*main, places)
    fences = [at for at, text in code if "MEMBAR" in text]
    return size, within(*main, multiplies), within(*around, places) - size, within(*main, fences)


def read_cubin(tool: str, path: str) -> Iterator[tuple[str, int, int, int]]:
    """(function, registers, stack, shared) of a cubin."""
    text = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    pattern = r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)"
    for name, registers, stack, shared in re.findall(pattern, text):
        yield name, int(registers), int(stack), int(shared)


def compile_cuda(
    nvcc: str, only: Sequence[str] = (), architectures: Sequence[str] = ("80", "90a")
) -> Iterator[Resources]:
    """nvcc with -Xptxas -v, each file (whose name starts with one of ``only``) and architecture by itself."""

    def log(work: tuple[Path, str]) -> tuple[str, str]:
        source, arch = work
        include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}"]
        with tempfile.TemporaryDirectory() as folder:
            command = [nvcc, "-std=c++17", "-O3", "-Xptxas", "-v", *include]
            command += [f"-arch=sm_{arch}", "-cubin", str(source), "-o", f"{folder}/k.cubin"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{source.name} does not compile for sm_{arch}:\n{done.stderr}")
            tool = find_cuobjdump(nvcc)
            sass = [tool, "-sass", f"{folder}/k.cubin"]
            text = subprocess.run(sass, capture_output=True, text=True, check=True).stdout if tool else ""
        return done.stderr, text

    sources = [path for path in sorted((ROOT / "csrc/cuda").glob("*.cu")) if path.name.startswith(tuple(only or [""]))]
    work = [(source, arch) for source in sources for arch in architectures]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (source, arch), (text, sass) in zip(work, pool.map(log, work), strict=True):
            yield from read_ptxas(source.stem, text, f"sm_{arch}", sass)


def find_cuobjdump(nvcc: str) -> str | None:
    """The toolkit's, or the one that triton brings along."""
    triton = find_spec("triton")
    packages = triton.submodule_search_locations or [] if triton else []
    homes = [str(Path(nvcc).resolve().parent), *(str(Path(path, "backends/nvidia/bin")) for path in packages)]
    return shutil.which("cuobjdump", path=os.pathsep.join(homes))


def read_ptxas(stem: str, log: str, arch: str, sass: str = "") -> Iterator[Resources]:
    functions = dict(re.findall(r"Function : (\S+)(.*?)(?=Function : |\Z)", sass, re.DOTALL))
    pattern = (
        r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers(?:, used \d+ barriers)?(?:.*?(\d+) bytes smem)?[^\n]*"
    )
    for name, stack, stores, loads, registers, shared in re.findall(pattern, log, re.DOTALL):
        yield Resources(
            f"cuda {stem}", demangle(name), arch, int(registers), int(stack), int(stores) + int(loads),
            int(shared or 0), bad_warnings(log), 0, *read_loop(functions.get(name, "")),
            read_stream(functions.get(name, "")) if name in functions else 0.0,
        )  # fmt: skip


def demangle(name: str) -> str:
    tool = shutil.which("c++filt")
    text = name if tool is None else subprocess.run([tool, name], capture_output=True, text=True).stdout.strip()
    return re.sub(r"\(.*$", "", text.replace("latentrevise::cuda::", "").replace("(anonymous namespace)::", ""))


def find_nvcc() -> str | None:
    """Where the build looks for it (setup.py)."""
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    paths = ("nvcc", *(str(Path(home, "bin/nvcc")) for home in homes if home))
    return next((found for path in (os.environ.get("CUDACXX"), *paths) if path and (found := shutil.which(path))), None)


def measure(absent: dict[str, str], only: Sequence[str] = ()) -> Iterator[Resources]:
    """All kernels, or those of the ops ``only``; the reasons why some are left out go to ``absent``."""
    if find_spec("triton") is None:
        absent["triton"] = "triton is not installed"
    else:
        for arch in ARCHITECTURES:
            yield from compile_triton(arch, lambda op, what: not only or op in only)
    nvcc = find_nvcc()
    if nvcc is None:
        absent["cuda"] = "nvcc was not found"
    else:
        yield from compile_cuda(nvcc, only)


def main(only: Sequence[str] = ()) -> tuple[dict, int]:
    absent: dict[str, str] = {}
    found = []
    heads = f"{'regs':>5} {'stack':>6} {'spills':>7} {'shared':>7} {'loop':>6} {'mma':>5} {'around':>7}"
    print(f"{'kernel':34} {'variant':60} {'arch':7} {heads}")
    for r in measure(absent, only):
        found.append(r)
        numbers = f"{r.registers:5} {r.stack:6} {r.spills:7} {r.shared:7} {r.loop:6} {r.multiplications:5} {r.around:7}"
        faults = " ".join((
            *r.warnings,
            *[f"{r.converted} accumulators change layout in the loop"] * bool(r.converted),
            *[f"{r.fences} fences in the loop"] * bool(r.fences),
        ))  # fmt: skip
        print(f"{r.kernel:34} {r.variant[:60]:60} {r.arch:7} {numbers} {faults}".rstrip(), flush=True)
    for name, why in absent.items():
        print(f"skipped {name}: {why}")
    bad = [r for r in found if not r.fine]
    print(f"{len(found)} compiled, {len(bad)} with spills, warnings of ptxas, or a layout changed or a fence in a loop")
    document = {
        "name": "cubins",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: v for name in ("torch", "triton") if (v := version(name))},
        "absent": absent,
        "kernels": [asdict(r) for r in found],
    }
    return document, int(bool(bad))
