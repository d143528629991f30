"""The contract tests again on the Triton kernels, in Triton's interpreter: it has to be chosen before the kernels are
defined, so they run in a process of their own. Tests that launch thousands of programs are left out for time."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

HERE = os.path.dirname(__file__)
LEFT_OUT = (
    "test_a_long_run_finds_the_best_candidate",
    "test_thread_count_does_not_change_a_bit",
    "test_offsets_beyond_two_to_the_31",
    "65-4099-33",
    "127-301-67",
    "129-507-64",
)


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("op", ["vertex_oracle", "linear_logprob", "hull_step", "entropic_step", "mixture_embed"])
def test_contracts_in_the_interpreter(op):
    wanted = " and not ".join(("triton", *LEFT_OUT))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", wanted]
    command.append(os.path.join(HERE, f"test_{op}.py"))
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
