"""Every Triton and CUDA kernel compiled for sm_80 and sm_90 without a GPU, and what the compiler made of it.

Triton kernels are compiled in their default configurations; CUDA ones by nvcc from csrc/cuda. Registers, stack, spills
and shared memory are read from the cubins (cuobjdump, which triton brings along) and, for spills, from ptxas -v.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import version

ARCHITECTURES = (80, 90)
# Multiples of 16 in the models this is for, as all pointers are, which is what lets loads be wide.
WIDE = ("d", "d2", "exps_stride", "theta_stride", "grad_stride", "gold_stride", "away_stride")
WIDE += ("table_stride", "x_stride", "x_term", "table2_stride", "x2_stride", "x2_term")
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


def triton_variants() -> Iterator[tuple[object, str, dict[str, str], dict[str, object], dict[str, int]]]:
    """(kernel, variant, signature, constants, options) of every Triton kernel in its default configurations."""
    from latentrevise.kernels.entropic_step import triton as entropic
    from latentrevise.kernels.hull_step import triton as hull
    from latentrevise.kernels.linear_logprob import triton as logprob
    from latentrevise.kernels.mixture_embed import triton as mixture
    from latentrevise.kernels.plausible_vertices import triton as plausible
    from latentrevise.kernels.softmax_mixture import triton as softmax
    from latentrevise.kernels.vertex_oracle import triton as oracle

    element = {"bfloat16": "*bf16", "float32": "*fp32"}
    for dtype, tokens in oracle.CONFIGS:
        p = element[dtype]
        signature = {"x": p, "table": p, "x2": p, "table2": p, "allowed": "*i1", "keys": "*i64"}
        for terms, second, described in itertools.product((1, 3), (False, True), (False, True)):
            if (terms == 3 and dtype == "float32") or (second and described):
                continue
            T = 32 if tokens == "few" else 2048
            BM, BN, BK, warps, stages, _ = oracle.config(getattr(torch, dtype), T, terms, second)
            constants = {"HAS_ALLOWED": True, "HAS_SECOND": second, "TERMS": terms, "TERMS2": terms, "WIDEN": False}
            constants |= {"BM": BM, "BN": BN, "BK": BK, "DESCRIPTORS": described}
            blocks = {"x": f"tensordesc<{p[1:]}[{BM}, {BK}]>", "table": f"tensordesc<{p[1:]}[{BN}, {BK}]>"}
            name = f"{dtype} {tokens} terms={terms}{' second' * second}{' descriptors' * described}"
            types = signature | blocks if described else signature
            yield oracle.oracle_parts, name, types, constants, {"num_warps": warps, "num_stages": stages}
    four, eight = ({"num_warps": warps, "num_stages": 3} for warps in (4, 8))
    for dtype, query in (("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")):
        signature = {"x": element[query], "x2": element[query], "candidates": "*i64", "allowed": "*i1", "keys": "*i64"}
        signature |= dict.fromkeys(("table", "table2"), element[dtype])
        constants = {"HAS_ALLOWED": True, "HAS_SECOND": True, "ROWS": oracle.CANDIDATES, "BLOCK": oracle.BLOCK}
        yield oracle.candidate_parts, f"{dtype} queries {query}", signature, constants, four
    finish = {"keys": "*i64", "ids": "*i64", "values": "*fp32"}
    yield oracle.oracle_finish, "", finish, {"BP": 256}, {"num_warps": 1, "num_stages": 1}
    scores = ("exponents", "sums", "moments", "target_logits", "target_slopes", "stats", "logps", "entropies", "rate")
    signature = dict.fromkeys(scores, "*fp32") | {"rate": "fp32"}
    for entropy in (False, True):
        constants = {"ENTROPY": entropy, "LANES": logprob.LANES, "BM": logprob.MERGED}
        yield logprob.merge_tiles, f"entropy={entropy}", signature, constants, four
    for dtype, p in element.items():
        for terms, transformed in itertools.product((1, 3) if dtype == "bfloat16" else (1,), (False, True)):
            BM, BN, BK, warps, stages = logprob.config(getattr(torch, dtype), terms)
            tile = {"TERMS": terms, "BM": BM, "BN": BN, "BK": BK, "WIDEN": False}
            tile |= {"HAS_BIAS": transformed, "HAS_SOFTCAP": transformed}
            options = {"num_warps": warps, "num_stages": stages}
            floats = dict.fromkeys(scores[:5], "*fp32")
            floats |= dict.fromkeys(("scale", "softcap", "inverse_temperature", "log_p_min"), "fp32")
            signature = {"x": p, "table": p, "bias": "*fp32", "targets": "*i64", "exps": p} | floats
            name = f"{dtype} terms={terms}{' bias softcap' * transformed}"
            for moment, store in ((False, False), (False, True), (True, True)):
                flags = {"STORE": store, "MOMENT": moment}
                yield logprob.score_tiles, f"{name} entropy={moment} store={store}", signature, tile | flags, options
            signature = {"x": p, "table": p, "bias": "*fp32", "allowed": "*i1", "keys": "*i64", "counts": "*i32"}
            signature |= floats | {"lse": "*fp32"}
            yield plausible.list_tiles, name, signature, tile | {"HAS_ALLOWED": True}, options
        CM, CN, warps, stages = logprob.MEANS[dtype]
        signature = {"exps": p, "exponents": "*fp32", "row_exponents": "*fp32", "table": p, "out": "*fp32"}
        constants = {"BM": CM, "BN": CN, "BK": logprob.config(getattr(torch, dtype))[1], "WIDEN": False}
        yield logprob.weighted_rows, dtype, signature, constants, {"num_warps": warps, "num_stages": stages}
        signature = {"means": "*fp32", "stats": "*fp32", "table": p, "targets": "*i64", "out": "*fp32"}
        yield logprob.gradient_rows, dtype, signature, {"BLOCK": logprob.BLOCK}, four

        BM, BN, BK, warps, stages = logprob.config(getattr(torch, dtype))
        floats = dict.fromkeys(("lse", "dots", "sums"), "*fp32") | {"inverse_tau": "fp32"}
        signature = {"grad_z": p, "table": p, "theta": "*fp32", "out": "*fp32"} | floats
        constants = {"BM": BM, "BN": BN, "BK": BK, "WIDEN": False}
        yield softmax.gradient_tiles, dtype, signature, constants, {"num_warps": warps, "num_stages": stages}
        BM, BN, BK, warps, stages = softmax.MIXTURES[dtype]
        constants = {"BM": BM, "BN": BN, "BK": BK, "WIDEN": False}
        yield softmax.mixture_tiles, dtype, signature, constants, {"num_warps": warps, "num_stages": stages}
        signature = {"theta": p, "lse": "*fp32", "inverse_tau": "fp32"}
        yield softmax.row_normalisers, dtype, signature, {"BLOCK": softmax.BLOCK}, eight

        signature = {"ids": "*i64", "weights": "*fp32", "table": p, "z": p}
        yield mixture.mixture_forward, dtype, signature, {"BLOCK": mixture.BLOCK}, four
        signature = {"ids": "*i64", "grad_z": p, "table": p, "grad_weights": "*fp32"}
        yield mixture.mixture_backward, dtype, signature, {"BLOCK": mixture.BLOCK}, eight

        for out, terms in {dtype: 1 if dtype == "float32" else 3, "float32": 1}.items():  # for candidates
            signature = {"gold": p, "away": p, "out": element[out], "alpha": "fp32", "beta": "fp32"}
            constants = {"HAS_AWAY": True, "NORMALIZED": True, "TERMS": terms, "BLOCK": hull.BLOCK}
            yield hull.combine_rows, f"{dtype} to {out}", signature, constants, four
            signature = dict.fromkeys(("keys", "ids", "new_ids", "vertices"), "*i64") | {"table": p, "z": p}
            signature |= dict.fromkeys(("weights", "gamma", "new_weights", "gaps"), "*fp32") | {"g": element[out]}
            constants = {"TERMS": terms, "BP": 256, "BA": 16, "BLOCK": hull.BLOCK}
            yield hull.finish_step, f"{dtype} g {out}", signature, constants, four

        signature = {"g": "*fp32", "ids": "*i64", "weights": "*fp32", "table": p, "scores": "*fp32"}
        constants = {"ROWS": oracle.CANDIDATES, "BLOCK": oracle.BLOCK}
        yield entropic.entropic_scores, dtype, signature, constants, four
        signature = dict.fromkeys(("rel", "gaps", "scales", "weights", "new_weights"), "*fp32")
        signature |= {"ids": "*i64", "table": p, "z": p, "eta": "fp32"}
        yield entropic.entropic_update, dtype, signature, {"BC": 128, "BLOCK": entropic.SLICE}, four
    spans = dict.fromkeys(("scores", "weights", "rel", "gaps", "spans"), "*fp32")
    yield entropic.entropic_spans, "", spans, {"BC": 128}, {"num_warps": 1, "num_stages": 1}


def compile_triton(only: str = "") -> Iterator[Resources]:
    """Triton kernels whose name contains ``only``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def read(done: Any, kernel: Any, variant: str, arch: int) -> list[Resources]:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(done.asm["cubin"])
            file.flush()
            found = list(read_cubin(str(tool), file.name))
        spills, shared = spilled(done.asm["ptx"], arch), done.metadata.shared
        name = f"triton {kernel.fn.__name__}"
        return [
            Resources(name, variant, f"sm_{arch}", registers, stack, spills, shared) for _, registers, stack, _ in found
        ]

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with ThreadPoolExecutor() as pool:  # what one kernel takes is read while the next is compiled
        reading: deque[Future[list[Resources]]] = deque()
        for kernel, variant, types, constants, options in triton_variants():
            if only not in kernel.fn.__name__:
                continue
            signature = {
                name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names
            }
            wide = {
                (i,): [["tt.divisibility", 16]]
                for i, name in enumerate(kernel.arg_names)
                if signature[name].startswith("*") or name in WIDE
            }
            for arch in ARCHITECTURES:
                if arch < 90 and any(kind.startswith("tensordesc") for kind in signature.values()):
                    continue  # never launched there
                source = ASTSource(kernel, signature, constexprs=constants, attrs=wide)
                done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
                reading.append(pool.submit(read, done, kernel, variant, arch))
                while reading and reading[0].done():
                    yield from reading.popleft().result()
        for future in reading:
            yield from future.result()


def spilled(ptx: str, arch: int) -> int:
    """Bytes of spill stores and loads that ptxas reports."""
    from triton.backends.nvidia.compiler import get_ptxas

    ptxas = get_ptxas(arch).path  # the one that triton itself uses for this PTX
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "k.ptx").write_text(ptx)
        target = re.search(r"\.target (sm_\w+)", ptx)
        name = target.group(1) if target else f"sm_{arch}"
        command = [str(ptxas), "-v", f"-arch={name}", "-o", str(Path(folder, "k.cubin")), str(Path(folder, "k.ptx"))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return sum(int(x) for x in re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr))


def read_cubin(tool: str, path: str) -> Iterator[tuple[str, int, int, int]]:
    """(function, registers, stack, shared) of a cubin."""
    text = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    pattern = r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)"
    for name, registers, stack, shared in re.findall(pattern, text):
        yield name, int(registers), int(stack), int(shared)


def compile_cuda(nvcc: str) -> Iterator[Resources]:
    """nvcc with -Xptxas -v, each file and architecture by itself."""

    def log(work: tuple[Path, str]) -> str:
        source, arch = work
        include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}"]
        with tempfile.TemporaryDirectory() as folder:
            command = [nvcc, "-std=c++17", "-O3", "-Xptxas", "-v", *include]
            command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}", "-c", str(source), "-o", f"{folder}/k.o"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{source.name} does not compile for sm_{arch}:\n{done.stderr}")
        return done.stderr

    work = [(source, arch) for source in sorted((ROOT / "csrc/cuda").glob("*.cu")) for arch in ("80", "90a")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (source, arch), text in zip(work, pool.map(log, work), strict=True):
            yield from read_ptxas(source.stem, text, f"sm_{arch}")


def read_ptxas(stem: str, log: str, arch: str) -> Iterator[Resources]:
    pattern = (
        r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers(?:, used \d+ barriers)?(?:.*?(\d+) bytes smem)?[^\n]*"
    )
    for name, stack, stores, loads, registers, shared in re.findall(pattern, log, re.DOTALL):
        yield Resources(
            f"cuda {stem}", demangle(name), arch, int(registers), int(stack), int(stores) + int(loads), int(shared or 0)
        )


def demangle(name: str) -> str:
    tool = shutil.which("c++filt")
    text = name if tool is None else subprocess.run([tool, name], capture_output=True, text=True).stdout.strip()
    return re.sub(r"\(.*$", "", text.replace("latentrevise::cuda::", "").replace("(anonymous namespace)::", ""))


def find_nvcc() -> str | None:
    """Where the build looks for it (setup.py)."""
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    paths = ("nvcc", *(str(Path(home, "bin/nvcc")) for home in homes if home))
    return next((found for path in (os.environ.get("CUDACXX"), *paths) if path and (found := shutil.which(path))), None)


def measure(absent: dict[str, str]) -> Iterator[Resources]:
    """All kernels; the reasons why some are left out go to ``absent``."""
    if find_spec("triton") is None:
        absent["triton"] = "triton is not installed"
    else:
        yield from compile_triton()
    nvcc = find_nvcc()
    if nvcc is None:
        absent["cuda"] = "nvcc was not found"
    else:
        yield from compile_cuda(nvcc)


def main() -> tuple[dict, int]:
    absent: dict[str, str] = {}
    found = []
    print(f"{'kernel':34} {'variant':50} {'arch':7} {'regs':>5} {'stack':>6} {'spills':>7} {'shared':>7}")
    for r in measure(absent):
        found.append(r)
        numbers = f"{r.registers:5} {r.stack:6} {r.spills:7} {r.shared:7}"
        print(f"{r.kernel:34} {r.variant[:50]:50} {r.arch:7} {numbers}", flush=True)
    for name, why in absent.items():
        print(f"skipped {name}: {why}")
    bad = [r for r in found if r.spills]
    print(f"{len(found)} compiled, {len(bad)} spill")
    document = {
        "name": "cubins",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: v for name in ("torch", "triton") if (v := version(name))},
        "absent": absent,
        "kernels": [asdict(r) for r in found],
    }
    return document, int(bool(bad))
