"""The harness: every benchmark runs on a small case and its report holds what is needed to read it later."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import emulated_cuda
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # benchmarks/ is not installed

from benchmarks import __main__ as cli
from benchmarks import harness, peers, tune
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
def test_runs_and_reports(name, tmp_path):
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
    floors = {row["implementation"] for row in report["rows"]} & {harness.MATMUL, harness.READ}
    assert floors == ({harness.READ} if name in ("mixture_embed", "entropic_step") else {harness.MATMUL, harness.READ})
    if name == "linear_logprob":
        assert {row["data"] for row in report["rows"]} == {"flat", "peaked"}
        assert "not installed" in report["absent"].get("liger", "not installed")


def test_the_floor_is_measured_in_the_same_rounds(monkeypatch):
    """Its calls stand beside the others in each round, and count for as much as the task needs."""
    seconds = {"ours": 0.4, harness.MATMUL: 0.1, harness.READ: 0.05}
    order = []

    def clock(thunk, device):
        order.append(thunk())
        return seconds[order[-1]]

    task = harness.Task("op", {"T": 4, "V": 50, "d": 8}, "float32", "random", 2 * 2.0 * 4 * 50 * 8, 1600.0)
    real = harness.floors(task, torch.device("cpu"), torch.float32)
    assert {name: factor for name, (_, factor) in real.items()} == {harness.MATMUL: 2, harness.READ: 1}
    fake = {name: (lambda name=name: name, factor) for name, (_, factor) in real.items()}
    monkeypatch.setattr(harness, "floors", lambda *_: fake)
    monkeypatch.setattr(harness, "clock", clock)
    rows = harness.compare(task, {"ours": lambda: "ours"}, torch.device("cpu"), torch.float32, budget_s=0)
    assert order == ["ours", harness.READ, harness.MATMUL] * 3
    found = {row.implementation: (row.median_ms, row.percent_of_floor) for row in rows}
    assert found == {"ours": (400, 50), harness.MATMUL: (200, 100), harness.READ: (50, 400)}


def test_short_calls_are_replayed_beside(monkeypatch):
    def replay(thunk, device):
        if thunk() == "waits":
            raise RuntimeError("operation not permitted when stream is capturing")
        return thunk

    monkeypatch.setattr(harness, "clock", lambda thunk, device: 1.0 if thunk() == "long" else 1e-5)
    monkeypatch.setattr(harness, "replay", replay)
    ready, absent = {name: lambda name=name: name for name in ("short", "long", "waits")}, {}
    harness.add_replays(ready, torch.device("cuda"), absent)
    assert list(ready) == ["short", "long", "waits", "short, replayed"]
    assert list(absent) == ["waits, replayed"]
    assert "not permitted" in absent["waits, replayed"]


def test_rows_that_screening_leaves(tmp_path):
    """Few of a random table, and never none: the least itself is made again."""
    out = tmp_path / "left.json"
    command = [sys.executable, "-m", "benchmarks", "screening", "--device", "cpu", "--json", str(out)]
    command += ["--T", "5", "--d", "32", "--vocab", "400"]
    root = Path(__file__).resolve().parents[2]
    subprocess.run(command, cwd=root, env=os.environ | {"TRITON_INTERPRET": "1"}, check=True)
    rows = json.loads(out.read_text())["left"]
    assert {(row["data"], row["table"]) for row in rows} == {
        (data, dtype) for data in ("random", "trained-like") for dtype in ("bfloat16", "float32")
    }
    assert all(1 <= row["mean"] <= row["most"] < 400 for row in rows)


def test_an_implementation_that_breaks_leaves_the_others_measured(tmp_path, monkeypatch, capsys):
    def broken(*_: object) -> None:
        raise RuntimeError("no memory")

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


def test_tuning_starts_with_what_ships_then_with_the_likeliest():
    shipped, grid = (128, 256, 64, 8, 4), ((64, 128), (64, 128, 256), (32, 64), (4, 8), (2, 3, 4))
    target = tune.Target("oracle", {"described": shipped}, "described", grid, lambda: None, 1.0)
    configs = tune.order(target)
    assert configs[:4] == [config for config in tune.FIRST if config != shipped]
    assert sorted([*configs, shipped]) == sorted(itertools.product(*grid))
    measured = [row["config"] for row in tune.measure(target, 0, torch.device("cpu"))]
    assert measured == [shipped]  # no time for others
    assert target.table["described"] == shipped


SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "run_gpu.sh"


def run_pieces(*pieces: str, results: Path, **environment: str) -> tuple[int, list[tarfile.TarFile]]:
    """Its exit status, and the one file a piece leaves."""
    names = [word for word in pieces if word in PIECES]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {"OUT": str(results), "PATH": path, "WHEELS": str(results / "none")} | environment
    done = subprocess.run([SCRIPT, *pieces], env=env, capture_output=True, text=True, check=False)
    assert sorted(file.name for file in results.iterdir()) == sorted(f"{name}.tar.gz" for name in names), done.stderr
    return done.returncode, [tarfile.open(results / f"{name}.tar.gz") for name in names]


def steps(results: tarfile.TarFile) -> dict[str, int]:
    if "./summary.jsonl" not in results.getnames():
        return {}
    lines = map(json.loads, results.extractfile("./summary.jsonl").read().splitlines())
    return {line["step"]: line["status"] for line in lines}


PIECES = ["build-check", "kernels", "sizes", "revise", "attention", "sanitize", "engines", "tune", "cubins"]


@pytest.mark.slow
def test_a_rehearsal_of_two_pieces_in_one_call(tmp_path):
    """The steps on this machine as a GPU would run them, in the interpreter: a cut of what ``--rehearse all`` runs."""
    only = "^(check-mixture_embed-triton|mixture_embed)$"
    failed, (check, kernels) = run_pieces("--rehearse", "build-check", "kernels", "--only", only, results=tmp_path)
    assert (failed, steps(check)) == (0, {"check-mixture_embed-triton": 0})
    rows = json.load(check.extractfile("./check-mixture_embed-triton.json"))["rows"]
    assert {row["backend"] for row in rows} == {"triton"}
    assert all(row["fine"] for row in rows)
    assert {"./machine.json", "./check-mixture_embed-triton.log"} <= set(check.getnames())
    assert steps(kernels) == {"mixture_embed": 0}
    measured = json.load(kernels.extractfile("./mixture_embed.json"))
    assert {"latentrevise triton"} < {row["implementation"] for row in measured["rows"]}
    assert measured["failed"] == []


def test_the_gpu_script_says_what_had_no_time(tmp_path):
    failed, (results,) = run_pieces("--rehearse", "revise", results=tmp_path, LIMIT="0")
    names = ("step-graph", "revise-0.5B", "revise-1.5B", "revise-7B")
    assert (failed, steps(results)) == (4, dict.fromkeys(names, -1))
    assert subprocess.run([SCRIPT, "nonsense"], capture_output=True, check=False).returncode == 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ was not found in PATH")
def test_a_rehearsal_checks_the_cuda_kernels_in_the_emulation(tmp_path, emulated_library):
    """And under a sanitizer that finds nothing."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/compute-sanitizer").write_text('#!/bin/sh\nshift 4\nexec "$@"\n')
    (tmp_path / "bin/compute-sanitizer").chmod(0o755)
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    only = "^check-(vertex_oracle|linear_logprob)-hopper|^memcheck-mixture_embed"
    pieces = ("--rehearse", "build-check", "sanitize", "--only", only)
    emulation = {emulated_cuda.VARIABLE: str(emulated_library)}
    failed, (check, sanitize) = run_pieces(*pieces, results=tmp_path / "out", PATH=path, **emulation)
    assert (failed, steps(check)) == (0, {"check-vertex_oracle-hopper": 0, "check-linear_logprob-hopper": 0})
    for op in ("vertex_oracle", "linear_logprob"):
        rows = json.load(check.extractfile(f"./check-{op}-hopper.json"))["rows"]
        assert rows
        assert all(row["backend"] == "hopper" and row["fine"] for row in rows)
    assert steps(sanitize) == {"memcheck-mixture_embed-cuda": 0}
    assert {row["T"] for row in json.load(sanitize.extractfile("./memcheck-mixture_embed-cuda.json"))["rows"]} == {1}


def fake_machine(tmp_path: Path, **scripts: str) -> str:
    """PATH of a machine where Python's answers are no, and commands (names without a dash) do what is given."""
    fakes = tmp_path / "bin"
    fakes.mkdir()
    for name, script in ({"python3": '[ "$1" != -c ]'} | scripts).items():
        (fakes / name.replace("_", "-")).write_text(f"#!/bin/sh\n{script}\n")
        (fakes / name.replace("_", "-")).chmod(0o755)
    return f"{fakes}:{os.environ['PATH']}"


def test_a_failed_build_and_a_hang_cost_nothing_else(tmp_path):
    """No build with CUDA, nor one without it, tried once for both pieces; every op and backend is still checked."""
    fault = 'case "$*" in *"pip install"*|*hopper*) exit 1;; *"--op mixture_embed --backend cuda"*) exit 124;; esac'
    path = fake_machine(tmp_path, timeout=fault)
    failed, (check, kernels) = run_pieces("build-check", "kernels", results=tmp_path / "out", PATH=path)
    status = steps(check)
    assert failed == 7
    assert {name for name, code in status.items() if code} == {
        "build", "build-cpu", "check-mixture_embed-cuda", "check-vertex_oracle-hopper", "check-linear_logprob-hopper",
    }  # fmt: skip
    assert len([name for name in status if name.startswith("check-")]) == 10
    assert list(status)[-1] == "check-linear_logprob-hopper"
    assert {name for name, code in steps(kernels).items() if code} == {"vertex_oracle_hopper", "linear_logprob_hopper"}


def test_a_build_without_cuda_stands_in(tmp_path):
    path = fake_machine(tmp_path, timeout='[ "$LATENTREVISE_CUDA" != 1 ] || exit 1')
    failed, (results,) = run_pieces("tune", results=tmp_path / "out", PATH=path)
    assert (failed, steps(results)) == (1, {"build": 1, "build-cpu": 0, "tune": 0})


@pytest.mark.parametrize("piece", PIECES)
def test_the_steps_of_a_piece_and_the_build_fit_its_time(tmp_path, piece):
    """Every limit, as ``timeout`` is told it on a machine where nothing takes time and nothing is built yet."""
    limits = tmp_path / "limits"
    path = fake_machine(tmp_path, timeout=f"echo $3 >> {limits}", compute_sanitizer="")
    failed, (results,) = run_pieces(piece, results=tmp_path / "out", PATH=path)
    assert failed == 0
    assert "build" in steps(results)
    if piece == "engines":  # no vLLM in Python that says no
        assert "vLLM cannot be imported" in results.extractfile("./left_out.log").read().decode()
    seconds = [int(line) for line in limits.read_text().splitlines()]
    assert len(seconds) == len(steps(results))
    assert sum(seconds) <= 550  # of 560: torch is imported a few times beside
