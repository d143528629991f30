"""No kernel spills registers in a configuration that ships, on either architecture, as the compilers themselves say."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # benchmarks/ is not installed

from benchmarks import cubins

pytestmark = pytest.mark.timeout(0)  # what a compiler takes on a busy machine says nothing


def check(found: list[cubins.Resources], kernels: set[str]) -> None:
    assert {r.kernel for r in found} >= kernels
    assert {r.arch.rstrip("a") for r in found} == {"sm_80", "sm_90"}
    assert all(0 < r.registers <= 255 for r in found)
    assert all(r.shared <= (227 if "90" in r.arch else 163) * 1024 for r in found)  # what a block may have
    assert [r for r in found if not r.fine] == []


MAIN = {"oracle_parts", "oracle_finish", "score_tiles", "weighted_rows", "merge_tiles", "gradient_rows"}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_triton_kernels_of_a_usual_call():
    """The rest is compiled by ``python -m benchmarks cubins``: two hundred forms, minutes."""
    usual = (
        "linear_logprob bfloat16 from bfloat16 V=151936 gradient",
        "vertex_oracle bfloat16 from bfloat16 V=151936 T=2048",
        "hull_step bfloat16 from float32 V=151936 T=2048",
    )
    found = [
        r
        for arch in cubins.ARCHITECTURES
        for r in cubins.compile_triton(arch, lambda op, what: f"{op} {what}" in usual)
    ]
    check(found, {f"triton {name}" for name in MAIN | {"rescore", "round_rows", "finish_step", "combine_rows"}})
    loops = {r.kernel: r for r in found if r.arch == "sm_90"}
    assert loops["triton score_tiles"].multiplications >= 4  # wgmma, of a loop that was found


# Of each kernel a form that once spilled, or in float32 on sm_90 changed its accumulator's layout (but list_tiles).
RARE = {
    "vertex_oracle bfloat16 from bfloat16 V=50257 T=2048 allowed second": "oracle_parts",
    "linear_logprob bfloat16 from float32 V=50257 bias softcap entropy gradient": "score_tiles",
    "linear_logprob float32 from float32 V=50257 bias softcap entropy gradient": "weighted_rows",
    "softmax_mixture bfloat16 from bfloat16 V=50257 backward": "gradient_tiles",
    "softmax_mixture float32 from float32 V=50257": "mixture_tiles",
    "plausible_vertices float32 from float32 V=50257 bias softcap allowed": "list_tiles",
}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("call", RARE)
def test_the_triton_kernels_of_rare_forms(call):
    found = [
        r for arch in cubins.ARCHITECTURES for r in cubins.compile_triton(arch, lambda *what: " ".join(what) == call)
    ]
    check(found, {f"triton {RARE[call]}"})


def test_faults_of_compiled_code_are_seen():
    loop = """scf.for {
      %x = ttg.convert_layout %acc : tensor<64x64xf32, #a> -> tensor<64x64xf32, #b>
      %y = tt.dot %p, %q, %x, inputPrecision = tf32 : tensor<64x64xf32, #b>
    }
    %z = ttg.convert_layout %y : tensor<64x64xf32, #b> -> tensor<64x64xf32, #a>"""
    assert cubins.converted_sums(loop) == 1
    assert cubins.converted_sums(loop.replace("%q, %x,", "%q, %acc,")) == 1  # of what a dot adds to
    assert cubins.converted_sums(loop.replace("layout %acc", "layout %other").replace("%q, %x,", "%q, %acc,")) == 0
    assert cubins.read_loop("""
        /*0010*/ HGMMA.64x256x16.F32.BF16 R24, gdesc[UR16], R24 ;
        /*0020*/ @!P1 MEMBAR.ALL.GPU ;
        /*0030*/ @P0 BRA 0x10 ;
        /*0040*/ MEMBAR.ALL.GPU ;""") == (3, 1, 1, 1)
    assert not cubins.Resources("cuda k", "", "sm_90a", 168, 0, 0, 0, fences=1).fine
    assert cubins.bad_warnings("ptxas info : (C7515) Potential Performance Loss") == ("C7515",)
    assert cubins.count_spills("8 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads") == 20


@pytest.mark.slow
@pytest.mark.skipif(cubins.find_nvcc() is None, reason="nvcc was not found")
def test_cuda_kernels():
    names = ("linear_logprob", "mixture_embed", "vertex_oracle")
    found = list(cubins.compile_cuda(cubins.find_nvcc()))
    check(found, {f"cuda {name}" for name in names})
    loops = {r.variant.removeprefix("void "): r for r in found if r.arch == "sm_90a" and "hopper_loop" in r.variant}
    forms = ("Oracle", "LogProbs<false> ", "LogProbs<true> ", "Means")
    assert set(loops) == {f"hopper_loop<{cluster}, {form}>" for cluster in (1, 2) for form in forms}
    assert all(r.multiplications >= 4 for r in loops.values()) or cubins.find_cuobjdump(cubins.find_nvcc()) is None
