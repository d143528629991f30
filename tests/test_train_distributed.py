"""Two processes over gloo on CPUs, by accelerate's launcher, with DDP and with FSDP2: what one process does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
LAUNCH = (
    "-m accelerate.commands.launch --num_machines 1 --num_processes 2 --mixed_precision no"
    " --num_cpu_threads_per_process 1 --dynamo_backend no --main_process_port 0"
)
COMMANDS = {
    "one": "",
    "ddp": f"{LAUNCH} --multi_gpu",
    "fsdp2": f"{LAUNCH} --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP",
}
LIMIT = 600  # seconds; it takes half a minute, and has taken four on a machine that others used
CHECKS = ("sft", "evaluated", "rlvr", "rlvr-registry", "whole", "resumed", "skewed")
# Not compared: times, and what TRL averages over micro-batches, whose rows it shuffles on each process.
UNLIKE = {"entropy", "step_time", "time/revise_s"}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The folder of each way to run, made when it is first asked for."""
    made = {}

    def place(mode):
        if mode not in made:
            out = tmp_path_factory.mktemp(mode)
            own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(HERE.parent)}
            made[mode] = (
                out,
                subprocess.run(
                    [
                        *(sys.executable, *COMMANDS[mode].split()),
                        *(str(HERE / "distributed_worker.py"), mode, str(out), str(LIMIT)),
                    ],
                    capture_output=True,
                    text=True,
                    cwd=HERE.parent,
                    env=os.environ | own,
                    timeout=LIMIT + 30,  # they end by themselves before
                ),
            )
        out, result = made[mode]
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
        return out

    return place


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
@pytest.mark.parametrize("check", CHECKS)
def test_two_processes_do_what_one_does(places, mode, check):
    one, two = (torch.load(places(m) / f"{check}.pt", weights_only=True) for m in ("one", mode))
    assert len(one["log"]) == len(two["log"]) == 3
    for a, b in zip(one["log"], two["log"], strict=True):
        names = [name for name in a if name not in UNLIKE]
        assert set(names) <= set(b)
        for name in names:
            assert b[name] == (a[name] if a[name] is None else pytest.approx(a[name], abs=1e-5, rel=1e-5)), name
    assert one["evaluations"] == two["evaluations"]
    assert [e["step"] for e in one["evaluations"]] == ([0, 3] if check == "evaluated" else [])
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, atol=1e-5, rtol=1e-5, msg=name)
    assert len(one["batches"]) == len(two["batches"])
    for a, b in zip(one["batches"], two["batches"], strict=True):
        assert b["completion_ids"] == a["completion_ids"]
        for name in ("recovered", "outcome", "correct"):
            assert b[name] == a[name]
        assert b["advantages"] == pytest.approx(a["advantages"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_a_group_on_both_processes_is_one_group(places, mode):
    """Of 12 rows each process has 6: the second group of 4 has two on either side."""
    batches = torch.load(places(mode) / "rlvr.pt", weights_only=True)["batches"]
    assert all(len(batch["recovered"]) == 12 for batch in batches)
    repaired = [batch for batch in batches if any(batch["recovered"][4:8])]
    assert repaired
    for batch in repaired:
        assert sum(batch["recovered"][4:8]) == 1
        assert batch["correct"][4:8] == [1.0] * 4
        high = batch["advantages"][4:8][batch["recovered"][4:8].index(True)]
        assert high == pytest.approx(1.5, abs=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["one", "ddp", "fsdp2"])
def test_the_saved_model_is_the_trained_one(places, mode):
    saved = AutoModelForCausalLM.from_pretrained(places(mode) / "whole" / "model")
    trained = torch.load(places("one") / "whole.pt", weights_only=True)["weights"]
    for name, weight in saved.named_parameters():
        torch.testing.assert_close(weight.detach(), trained[name], atol=1e-5, rtol=1e-5, msg=name)
