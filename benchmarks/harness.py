"""Timing of several implementations of one task, side by side.

Every round calls each implementation once, in turn, so that a change of clock or load meets all of them; reported are
the median and the 20th and 80th percentiles over the rounds. Extra memory is the peak over what the inputs hold. The
floor is measured in the same rounds: torch's matmul of the task's shape, for as many of its operations as the task
needs at least, or a read of its fewest bytes, whichever takes longer.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

Thunk = Callable[[], object]


class Absent(Exception):
    """An implementation that cannot run here; the message says why."""


def command_line(words: Sequence[str]) -> str:
    """The command as anyone would give it: without where its results went and how many runs went side by side."""
    places = ("--out", "--json", "--jobs")
    before = ("", *words)
    kept = [w for w, last in zip(words, before, strict=False) if not w.startswith(places) and last not in places]
    return shlex.join(["python", "-m", "benchmarks", *kept])


NOT_RECORDED = "not recorded"


@cache
def commit() -> str:
    """The commit of this code, ``-dirty`` where files differ from it; without git the package's version."""
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return f"version {version('latentrevise')}"


def heading(name: str) -> dict[str, Any]:
    """What every document of a study on the CPU begins with: what was run, when, where, and of which commit."""
    return {
        "name": name,
        "command": command_line(sys.argv[1:]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": describe(torch.device("cpu")),
        "load_average": os.getloadavg()[0],
    }


def provenance(what: str, commits: Mapping[str, int]) -> str:
    """A line for a document: by the commits of the code, how many of its runs (or cells) come from each."""
    known = ", ".join(f"{n} from {name}" for name, n in commits.items() if name != NOT_RECORDED)
    rest = f"{commits[NOT_RECORDED]} {NOT_RECORDED}" if NOT_RECORDED in commits else ""
    several = " (several, side by side in one table)" if len(commits) > 1 else ""
    return f"Commit of the {what}{several}: {', '.join(part for part in (known, rest) if part)}."


@dataclass(frozen=True)
class Task:
    """One line of a benchmark: sizes, dtype and what must be done at least."""

    op: str
    shape: dict[str, int]
    dtype: str
    data: str  # "flat" or "peaked" softmax, or "random"
    flops: float
    bytes: float


@dataclass
class Measurement:
    """Times in milliseconds; memory in MiB."""

    op: str
    shape: dict[str, int]
    dtype: str
    data: str
    implementation: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int
    tflops: float
    percent_of_floor: float
    extra_mib: float
    rescored: float | None = None  # of our CPU oracle: rows a token that screening left to be scored exactly


@dataclass
class Report:
    """What a run leaves behind: enough to repeat it."""

    name: str
    command: str
    date: str
    device: str
    threads: int
    load_average: list[float]
    versions: dict[str, str]
    floor: dict[str, float]
    rows: list[Measurement] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)  # implementation and task: error

    @classmethod
    def start(cls, name: str, device: torch.device) -> Report:
        packages = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "quack-kernels", "latentrevise")
        versions = {"python": platform.python_version()} | {p: v for p in packages if (v := version(p))}
        versions["os"] = platform.platform()
        return cls(
            name=name,
            command=command_line(sys.argv[1:]),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            device=describe(device),
            threads=torch.get_num_threads(),
            load_average=[round(x, 2) for x in os.getloadavg()],
            versions=versions,
            floor={},
        )

    def to_json(self) -> dict:
        return asdict(self)


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        return f"{p.name}, {p.multi_processor_count} SMs, {p.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    with open("/proc/cpuinfo") as file:
        model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "CPU")
    return f"{model}, {os.cpu_count()} cores, torch {torch.backends.cpu.get_cpu_capability()}"


@cache
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of torch's matmul on a large product, best of several runs; on a CPU the faster of dtype and float32."""
    kinds = {dtype, torch.float32} if device.type == "cpu" else {dtype}
    return max(product_rate(device, kind) for kind in kinds)


@cache
def product_rate(device: torch.device, kind: torch.dtype) -> float:
    m, n, k = (8192, 8192, 4096) if device.type == "cuda" else (512, 8192, 1024)
    a, b = torch.randn(m, k, device=device).to(kind), torch.randn(n, k, device=device).to(kind)
    return 2.0 * m * n * k / min(clock(lambda: a @ b.T, device) for _ in range(8))


MATMUL, READ = "matmul of the shape", "read of the bytes"


def floors(task: Task, device: torch.device, dtype: torch.dtype) -> dict[str, tuple[Thunk, float]]:
    """What a task is held against: calls, and by what their seconds are to be multiplied, as they are cut to what
    memory bears."""
    most = 2**31 if device.type == "cuda" else 2**28
    x = torch.ones(max(1, min(int(task.bytes), most) // 4), device=device)
    found: dict[str, tuple[Thunk, float]] = {READ: (x.sum, task.bytes / x.nbytes)}
    if {"T", "V", "d"} <= task.shape.keys():
        T, V, d = (task.shape[name] for name in ("T", "V", "d"))
        kinds = (dtype, torch.float32) if device.type == "cpu" and dtype != torch.float32 else (dtype,)
        kind = kinds[0] if len(kinds) == 1 else max(kinds, key=lambda kind: product_rate(device, kind))
        rows = max(1, min(T, most // (V * kind.itemsize)))
        a, b = torch.randn(rows, d, device=device).to(kind), torch.randn(V, d, device=device).to(kind)
        product = torch.empty(rows, V, dtype=kind, device=device)
        found[MATMUL] = (lambda: torch.mm(a, b.T, out=product), task.flops / (2.0 * rows * V * d))
    return found


LAUNCHES_MATTER = 1e-3  # seconds


def replay(thunk: Thunk, device: torch.device) -> Thunk:
    """The call as a CUDA graph: its kernels without Python and launches between them."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):  # what is made at a first call is not made while the graph is captured
            thunk()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        thunk()
    return graph.replay


def add_replays(ready: dict[str, Thunk], device: torch.device, absent: dict[str, str]) -> None:
    """Beside each call that is short on a GPU its replay from a graph; why there is none goes to ``absent``."""
    if device.type != "cuda":
        return
    for label, thunk in list(ready.items()):
        if min(clock(thunk, device) for _ in range(3)) < LAUNCHES_MATTER:
            try:
                ready[f"{label}, replayed"] = replay(thunk, device)
            except Exception as why:  # a peer that waits for the device cannot be captured
                absent[f"{label}, replayed"] = f"{type(why).__name__}: {why}"


def clock(thunk: Thunk, device: torch.device) -> float:
    """Seconds of one call."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        thunk()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    thunk()
    return time.perf_counter() - begin


def extra_memory(thunk: Thunk, device: torch.device) -> float:
    """Peak MiB over what was held before the call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        thunk()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # VmHWM starts over at the present resident size
    before = status("VmRSS")
    thunk()
    return max(0, status("VmHWM") - before) / 2**10


def status(key: str) -> int:
    """A line of /proc/self/status in KiB."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))


def compare(
    task: Task,
    implementations: dict[str, Thunk],
    device: torch.device,
    dtype: torch.dtype,
    *,
    budget_s: float = 20.0,
    most_rounds: int = 50,
) -> list[Measurement]:
    """Measure each implementation on ``task``: memory in a call each, then rounds until the budget is used up: at
    least three, unless one takes half a minute. They have run once before. The floors are the last rows."""
    memory: dict[str, float] = {}
    flush = torch.empty(2**28, dtype=torch.int8, device=device) if device.type == "cuda" else None
    for name, thunk in implementations.items():
        memory[name] = extra_memory(thunk, device)
    beside = floors(task, device, dtype) if implementations else {}
    calls = implementations | {name: thunk for name, (thunk, _) in beside.items()}
    for thunk, _ in beside.values():
        thunk()
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin, rounds, spent = time.perf_counter(), 0, 0.0
    while rounds < most_rounds and spent < 30 * max(1, rounds) and (rounds < 3 or spent < budget_s):
        for name, thunk in calls.items():
            if flush is not None:
                flush.zero_()  # nothing of the table stays in L2
            times[name].append(clock(thunk, device) * (beside[name][1] if name in beside else 1))
        rounds, spent = rounds + 1, time.perf_counter() - begin
    floor = max((statistics.median(times[name]) for name in beside), default=math.nan)
    rows = []
    for name, seconds in times.items():
        p20, median, p80 = quantiles(seconds)
        rows.append(
            Measurement(
                task.op,
                task.shape,
                task.dtype,
                task.data,
                name,
                1e3 * median,
                1e3 * p20,
                1e3 * p80,
                rounds,
                task.flops / median / 1e12,
                100 * floor / median,
                memory.get(name, 0.0),
            )
        )
    return rows


def quantiles(values: list[float]) -> tuple[float, float, float]:
    ordered = sorted(values)
    return (
        ordered[round(0.2 * (len(ordered) - 1))],
        statistics.median(ordered),
        ordered[round(0.8 * (len(ordered) - 1))],
    )


def table(rows: list[Measurement]) -> str:
    """The rows as text; ``vs first`` is time over that of the task's first implementation."""
    head = [
        "shape",
        "dtype",
        "data",
        "implementation",
        "median ms",
        "p20",
        "p80",
        "TFLOP/s",
        "% floor",
        "extra MiB",
        "vs first",
    ]
    lines, first = [head], {}
    for r in rows:
        shape = " ".join(f"{k}={v}" for k, v in r.shape.items())
        base = first.setdefault((shape, r.dtype, r.data), r.median_ms)
        lines.append(
            [
                shape,
                r.dtype,
                r.data,
                r.implementation,
                f"{r.median_ms:.2f}",
                f"{r.p20_ms:.2f}",
                f"{r.p80_ms:.2f}",
                f"{r.tflops:.3f}",
                f"{r.percent_of_floor:.0f}",
                f"{r.extra_mib:.0f}",
                f"x{r.median_ms / base:.2f}",
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    out = []
    for line in lines:
        cells = [c.ljust(w) if i < 4 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        out.append("  ".join(cells).rstrip())
    return "\n".join(out)
