"""The harness: every benchmark runs on a small case and its report holds what is needed to read it later."""

from __future__ import annotations

import json
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
