"""pytest-benchmark entry points, one size an op: ``python -m pytest benchmarks``."""

from __future__ import annotations

import pytest
import torch

from benchmarks.harness import Absent
from benchmarks.ops import BENCHMARKS, Sizes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = Sizes(
    T=(2048,) if DEVICE.type == "cuda" else (64,),
    d=(896,),
    V=151936 if DEVICE.type == "cuda" else 20000,
    dtypes=(torch.bfloat16,),
    device=DEVICE,
    budget_s=0,
    compile=False,
)


@pytest.mark.parametrize("index", range(8))
@pytest.mark.parametrize("name", BENCHMARKS)
def test_op(benchmark, name, index):
    task, _, entries = next(iter(BENCHMARKS[name](SIZES)))
    if index >= len(entries):
        pytest.skip(f"{name} has {len(entries)} implementations")
    label = list(entries)[index]
    try:
        thunk = entries[label]()
    except Absent as why:
        pytest.skip(str(why))
    benchmark.group = f"{task.op} {task.shape} {task.dtype} {task.data}"
    benchmark.name = label

    def call() -> None:
        thunk()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=5, warmup_rounds=1)
