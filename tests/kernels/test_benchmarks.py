"""The harness: every benchmark runs on a small case and its report holds what is needed to read it later."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # benchmarks/ is not installed

from benchmarks import __main__ as cli
from benchmarks import harness
from benchmarks.ops import BENCHMARKS


def test_the_list_names_every_benchmark(capsys):
    assert cli.main([]) == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert listed == set(cli.DESCRIPTIONS) >= set(BENCHMARKS) | {"cubins"}
    with pytest.raises(SystemExit):
        cli.main(["matmul"])


@pytest.mark.parametrize("name", BENCHMARKS)
def test_runs_and_reports(name, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "matmul_rate", lambda device, dtype: 1e11)
    monkeypatch.setattr(harness, "read_rate", lambda device: 1e10)
    out = tmp_path / "results" / "one.json"
    sizes = ["--device", "cpu", "--T", "20", "--d", "24", "--vocab", "300", "--dtype", "float32", "--budget", "0"]
    assert cli.main([name, *sizes, "--no-compile", "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["name"] == name
    assert report["versions"]["torch"]
    assert report["threads"] >= 1
    assert len({row["implementation"] for row in report["rows"]}) >= 2
    for row in report["rows"]:
        assert row["rounds"] >= 3
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
    if name == "linear_logprob":
        assert {row["data"] for row in report["rows"]} == {"flat", "peaked"}
        assert "not installed" in report["absent"].get("liger", "not installed")


def test_an_implementation_that_breaks_leaves_the_others_measured(tmp_path, monkeypatch, capsys):
    def broken(*_: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(harness, "matmul_rate", lambda device, dtype: 1e11)
    monkeypatch.setattr(harness, "read_rate", lambda device: 1e10)
    monkeypatch.setattr("benchmarks.peers.blocked_oracle", broken)
    out = tmp_path / "one.json"
    sizes = ["--device", "cpu", "--T", "5", "--d", "8", "--vocab", "40", "--dtype", "float32", "--budget", "0"]
    assert cli.main(["vertex_oracle", *sizes, "--no-compile", "--json", str(out)]) == 0  # a peer, not ours
    report = json.loads(out.read_text())
    assert [line for line in report["failed"] if "blocked" in line and "no memory" in line] == report["failed"] != []
    assert any(row["implementation"].startswith("latentrevise") for row in report["rows"])
    monkeypatch.setattr("latentrevise.kernels.vertex_oracle", broken)
    assert cli.main(["vertex_oracle", *sizes, "--no-compile"]) == 1
    assert "FAILED latentrevise" in capsys.readouterr().out


def test_the_gpu_script_says_what_failed(tmp_path):
    """Its steps on this machine, tiny: build-check passes; with no time left each step is recorded as failed."""
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "run_gpu.sh"

    def run(piece: str, **environment: str) -> tuple[int, dict[str, int]]:
        out = tmp_path / "-".join([piece, *environment])
        env = os.environ | {"TINY": "1", "OUT": str(out), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        done = subprocess.run([script, piece], env=env | environment, capture_output=True, text=True, check=False)
        assert (out / "machine.json").exists(), done.stderr
        lines = map(json.loads, (out / "summary.jsonl").read_text().splitlines())
        return done.returncode, {line["step"]: line["status"] for line in lines}

    assert run("build-check") == (0, {"check": 0, "tests": 0})
    rows = json.loads((tmp_path / "build-check" / "check.json").read_text())["rows"]
    assert all(row["fine"] for row in rows)
    failed, steps = run("revise", LIMIT="0")
    assert (failed, steps) == (1, {"revise-tiny": -1})
    assert subprocess.run([script, "nonsense"], capture_output=True, check=False).returncode == 2
