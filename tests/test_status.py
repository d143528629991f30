"""How far a run is: told by the process that works on it, and to any other terminal."""

import json
import os
import time

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from latentrevise import RecoverConfig
from latentrevise.cli import app
from latentrevise.engines import HFEngine
from latentrevise.errors import RunError
from latentrevise.recovery import progress
from latentrevise.recovery.leases import kernel
from latentrevise.recovery.pipeline import Recovery
from latentrevise.recovery.progress import Progress
from latentrevise.recovery.schedule import Joint
from latentrevise.recovery.status import holders, stages, status
from tests.tiny import tiny_model, tiny_tokenizer

ROWS = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(5)]
CONFIG = RecoverConfig(
    rollouts=2, samples=2, max_new_tokens=4, strategies=("latent",), chunk=2, chat="never", equal_compute_cap=2
)


def test_status_says_what_is_there_and_who_is_at_it(tmp_path, monkeypatch):
    out = tmp_path / "run"
    told, own = [], HFEngine.generate

    def generate(*args, **kwargs):
        found = own(*args, **kwargs)
        run = recovery.run
        told.append([(s.name, s.prompts, s.parts) for s in stages(run)] + holders(run))
        return found

    monkeypatch.setattr(HFEngine, "generate", generate)
    recovery = Recovery(tiny_model(), tiny_tokenizer(), CONFIG, out, progress=False, scheduler=Joint(0, 1))
    with recovery.session():
        recovery.work(ROWS)
    me = f"process {os.getpid()} on "
    for i, (stage, holder) in enumerate(told[:3]):
        assert stage == ("mine", (2 * i, 5), (i, 3))
        assert holder.startswith(me)
        assert f"on mine..0000{i}, silent for 0:00:0" in holder
    assert told[3][:2] == [("mine", (5, 5), (3, 3)), ("revise", (10, 10), (6, 6))], "the strategy and its wrong target"
    result = CliRunner().invoke(app, ["status", str(out)])
    assert result.exit_code == 0, result.exception
    lines = result.output.splitlines()
    assert lines[1] == "mine              5 of 5 prompts, 3 of 3 parts"
    assert [line.split()[0] for line in lines[1:]] == ["mine", "revise", "continue", "control", "verify"]
    with pytest.raises(RunError, match="holds no run"):
        status(tmp_path)


def test_rate_and_time_left_follow_from_the_times_of_the_files(tmp_path):
    run = Recovery(tiny_model(), tiny_tokenizer(), CONFIG, tmp_path / "run", progress=False)
    with run.session():
        run.mine(ROWS)
    now = time.time()
    os.utime(run.run.plan("rollouts"), (now - 60,) * 2)
    for i, ago in enumerate((50, 40)):
        os.utime(run.run.part("rollouts", i), (now - ago,) * 2)
    run.run.part("rollouts", 2).unlink()
    (stage,) = stages(run.run)
    assert (stage.prompts, stage.parts) == ((4, 5), (2, 3))
    assert stage.rate == pytest.approx(4 / 20)
    assert stage.eta == pytest.approx(1 / (4 / 20))
    assert stage.last == pytest.approx(40, abs=5)
    assert "0.2 prompts/s, 0:00:05 left; last part 0:00:4" in str(stage)
    run.run.leases.mkdir()
    holder = {"pid": 7, "host": "there", "kernel": kernel()}
    (run.run.leases / "mine..00002.0.lease").write_text(json.dumps(holder) + "\n")
    (run.run.leases / "mine..00003.0.lease").write_text(json.dumps(holder | {"kernel": "other"}) + "\n")
    metrics = CliRunner().invoke(app, ["status", str(tmp_path / "run"), "--open-metrics"]).output
    assert metrics.endswith("# EOF\n")
    labels = f'run="{tmp_path / "run"}"'
    values = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))
    assert values[f'latentrevise_prompts_done{{{labels},stage="mine"}}'] == "4"
    assert values[f'latentrevise_parts_planned{{{labels},stage="mine"}}'] == "3"
    assert float(values[f'latentrevise_left_seconds{{{labels},stage="mine"}}']) == pytest.approx(stage.eta)
    assert values[f"latentrevise_leases{{{labels}}}"] == "2"
    dead, other = holders(run.run)
    assert dead == "process 7 on there on mine..00002, dead"
    assert other == "process 7 on there on mine..00003, silent for 0:00:00 (another machine)"


def test_lines_of_json_move_while_a_part_runs(capsys, monkeypatch):
    monkeypatch.setitem(progress._SECONDS, "json", 0.05)
    body = nn.Linear(3, 3)
    with Progress("mine", 10, 2, "json").showing(body) as bar:
        bar.begin("latent", 4)
        bar.within(0.5)
        bar.within(0.25)  # another round: nothing goes back
        body(torch.zeros(2, 5, 3))
        until, lines = time.monotonic() + 60, []
        while not any(line["done"] == 4 for line in lines):
            assert time.monotonic() < until
            time.sleep(0.02)
            lines += [json.loads(line) for line in capsys.readouterr().err.splitlines()]
        bar.end(4)
    lines += [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert all(line["stage"] == "mine" and line["total"] == 10 for line in lines)
    assert any(line["tokens_per_second"] > 0 for line in lines), "2 x 5 passed through the body"
    assert lines[-1]["done"] == 6
    assert lines[-1]["eta_seconds"] == pytest.approx(4 / lines[-1]["rate"], abs=0.06)
    assert not body._forward_pre_hooks


def test_a_run_tells_its_stages_as_json(tmp_path, capsys):
    Recovery(tiny_model(), tiny_tokenizer(), CONFIG, tmp_path / "run", progress="json").recover(ROWS)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    assert {line["stage"] for line in lines} == {"mine", "revise", "continue", "control", "verify"}
    assert [line for line in lines if line["stage"] == "mine"][-1]["done"] == 5
