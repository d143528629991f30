"""The simulation of many workers: every part once, by the scheduler of joint processes, in simulated time."""

import pytest

from benchmarks import scale
from latentrevise.data.storage import write_jsonl


def test_simulated_workers_share_a_run_and_another_process_finds_nothing_left(tmp_path):
    prompts, out, rate = tmp_path / "p.jsonl", tmp_path / "run", 1000.0
    write_jsonl(prompts, map(scale.row, range(200)))
    scale.begin(out, prompts)
    found = scale.simulate(out, 3, rate)
    parts = list(out.rglob("part-*.parquet"))
    assert found["parts"] == len(parts) == 4 + 2 * 3, "each once: mined, and of two arms proposed, continued, judged"
    assert {path.parent.name for path in parts} == {"rollouts", "resample", "resample@equal"}
    tokens = scale.TOKENS * 200 * scale.CONFIG.rollouts
    assert tokens / rate / 2 < found["work"] < 3 * tokens / rate
    spent = found["work"] + found["idle"] + found["scheduling"]
    assert found["work"] / 3 < found["makespan"] <= spent
    assert found["idle"] > found["makespan"] / 4, "four parts for three workers, then one part for all"
    assert [path for path in out.rglob("*") if path.suffix in (".lease", ".tmp")] == []
    before = {path: path.stat().st_mtime_ns for path in parts}
    scale.plan_again(out, prompts)
    assert {path: path.stat().st_mtime_ns for path in parts} == before


def test_what_a_simulated_worker_raises_is_raised(tmp_path):
    def fails():
        raise ValueError("of worker 1")

    with pytest.raises(ValueError, match="of worker 1"):
        scale.Clock().run([lambda: None, fails])
