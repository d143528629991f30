"""The harness: every benchmark runs on a small case and its report holds what is needed to read it later."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # benchmarks/ is not installed

from benchmarks import __main__ as cli
from benchmarks import harness, peers
from benchmarks.ops import BENCHMARKS


def test_kernels_are_measured_without_transformers():
    code = "import sys; from benchmarks import __main__ as m; m.main([]); assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)


def test_the_list_names_every_benchmark(capsys):
    assert cli.main([]) == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert listed == set(cli.DESCRIPTIONS) >= set(BENCHMARKS) | {"cubins"}
    with pytest.raises(SystemExit):
        cli.main(["matmul"])


def test_the_blocked_peer_is_blocked_in_tokens_too():
    g = torch.Generator().manual_seed(0)
    G, E = torch.randn(7, 8, generator=g), torch.randn(50, 8, generator=g)
    assert torch.equal(peers.blocked_oracle(G, E, rows=20, tokens=3), peers.eager_oracle(G, E))


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


SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "run_gpu.sh"


def run_piece(piece: str, results: Path, **environment: str) -> tuple[int, tarfile.TarFile]:
    """Its exit status, and the one file it leaves."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {"OUT": str(results), "PATH": path} | environment
    done = subprocess.run([SCRIPT, piece], env=env, capture_output=True, text=True, check=False)
    assert [file.name for file in results.iterdir()] == [f"{piece}.tar.gz"], done.stderr
    return done.returncode, tarfile.open(results / f"{piece}.tar.gz")


def steps(results: tarfile.TarFile) -> dict[str, int]:
    lines = map(json.loads, results.extractfile("./summary.jsonl").read().splitlines())
    return {line["step"]: line["status"] for line in lines}


def test_the_gpu_script_says_what_failed(tmp_path):
    """Its steps on this machine, tiny: build-check passes; with no time left each step is recorded as failed."""
    failed, results = run_piece("build-check", tmp_path / "a", TINY="1")
    checks = ["check-vertex_oracle-cpu", "check-hull_step-cpu"]
    assert (failed, steps(results)) == (0, dict.fromkeys([*checks, "tests"], 0))
    for check in checks:
        assert all(row["fine"] for row in json.load(results.extractfile(f"./{check}.json"))["rows"])
    assert {f"./{name}" for name in ("machine.json", f"{checks[0]}.log", "tests.xml")} <= set(results.getnames())
    failed, results = run_piece("revise", tmp_path / "b", TINY="1", LIMIT="0")
    assert (failed, steps(results)) == (3, {"revise-0.5B": -1, "revise-1.5B": -1, "revise-7B": -1})
    assert subprocess.run([SCRIPT, "nonsense"], capture_output=True, check=False).returncode == 2


def test_a_failed_build_and_a_hang_cost_nothing_else(tmp_path):
    """Where the build fails and a kernel faults, every other op and backend is still checked, Hopper after all."""
    fakes = tmp_path / "bin"
    fakes.mkdir()
    fault = 'case "$*" in *"pip install"*|*hopper*) exit 1;; *"--op linear_logprob --backend cuda"*) exit 124;; esac'
    for name, script in (("python3", '[ "$1" != -c ]'), ("timeout", fault)):
        (fakes / name).write_text(f"#!/bin/sh\n{script}\n")
        (fakes / name).chmod(0o755)
    failed, results = run_piece("build-check", tmp_path / "out", PATH=f"{fakes}:{os.environ['PATH']}")
    status = steps(results)
    assert failed == 3
    assert {name for name, code in status.items() if code} == {
        "build", "check-linear_logprob-cuda", "check-vertex_oracle-hopper",
    }  # fmt: skip
    assert len([name for name in status if name.startswith("check-")]) == 11
    assert list(status)[-1] == "check-vertex_oracle-hopper"


@pytest.mark.parametrize("piece", ["build-check", "kernels", "sizes", "revise", "attention", "tune", "cubins"])
def test_the_steps_of_a_piece_and_the_build_fit_its_time(tmp_path, piece):
    """Every limit, as ``timeout`` is told it on a machine where nothing takes time and nothing is built yet."""
    fakes, limits = tmp_path / "bin", tmp_path / "limits"
    fakes.mkdir()
    for name, script in (("python3", '[ "$1" != -c ]'), ("timeout", f"echo $3 >> {limits}")):
        (fakes / name).write_text(f"#!/bin/sh\n{script}\n")
        (fakes / name).chmod(0o755)
    failed, results = run_piece(piece, tmp_path / "out", PATH=f"{fakes}:{os.environ['PATH']}")
    assert failed == 0
    assert "build" in steps(results)
    seconds = [int(line) for line in limits.read_text().splitlines()]
    assert len(seconds) == len(steps(results))
    assert sum(seconds) <= 550  # of 560: torch is imported a few times beside
