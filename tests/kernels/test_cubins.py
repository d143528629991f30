"""No kernel spills registers in a configuration that ships, on either architecture, as the compilers themselves say."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # benchmarks/ is not installed

from benchmarks import cubins


def check(found: list[cubins.Resources], kernels: set[str]) -> None:
    assert {r.kernel for r in found} >= kernels
    assert {r.arch.rstrip("a") for r in found} == {"sm_80", "sm_90"}
    assert all(0 < r.registers <= 255 for r in found)
    assert all(r.shared <= 160 * 1024 for r in found)  # what an sm_80 block may have, less a little
    assert [r for r in found if r.spills] == []


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_triton_kernels():
    names = ("oracle_parts", "oracle_finish", "score_tiles", "weighted_rows", "mixture_forward", "mixture_backward",
             "combine_rows", "finish_step", "entropic_scores", "entropic_spans", "entropic_update", "list_tiles",
             "row_normalisers", "mixture_tiles", "gradient_tiles", "merge_tiles", "gradient_rows",
             "candidate_parts")  # fmt: skip
    check(list(cubins.compile_triton()), {f"triton {name}" for name in names})


@pytest.mark.slow
@pytest.mark.skipif(cubins.find_nvcc() is None, reason="nvcc was not found")
def test_cuda_kernels():
    names = ("linear_logprob", "mixture_embed", "vertex_oracle", "vertex_oracle_sm90")
    found = list(cubins.compile_cuda(cubins.find_nvcc()))
    check(found, {f"cuda {name}" for name in names})
