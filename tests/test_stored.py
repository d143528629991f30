"""Rows that are read where they are asked for, and the zero-hit prompts of a run, found part by part."""

import os
import pickle
import tracemalloc
from collections import Counter
from dataclasses import replace

import pyarrow as pa
import pytest

from latentrevise import RecoverConfig
from latentrevise.data.parquet import GROUP
from latentrevise.data.records import Prompt, Rollout, write_records
from latentrevise.data.storage import write_jsonl
from latentrevise.data.stored import Stored
from latentrevise.errors import InputError, RunError
from latentrevise.recovery.job import Job
from latentrevise.recovery.pipeline import Recovery
from latentrevise.recovery.rundir import RunDirectory
from latentrevise.recovery.stages import Mine, Part, Propose, settled, unsettled
from latentrevise.recovery.targets import Target, ZeroHit
from latentrevise.verify.verifier import Verifier
from tests.tiny import tiny_model, tiny_tokenizer

COUNT = 3 * GROUP + 5


def prompts():
    return (Prompt(f"p{i}", f"{i} + 1 =", (1, 2, i), str(i + 1), {"i": i}) for i in range(COUNT))


def test_rows_are_those_that_were_written_and_only_a_group_is_held(tmp_path):
    write_records(tmp_path / "p.parquet", prompts(), Prompt)
    stored, expected = Stored(tmp_path / "p.parquet", Prompt), list(prompts())
    assert len(stored) == COUNT
    assert [stored[i] for i in (0, GROUP - 1, GROUP, COUNT - 1, -1)] == [
        expected[i] for i in (0, GROUP - 1, GROUP, COUNT - 1, -1)
    ]
    assert stored[GROUP - 2 : GROUP + 2] == expected[GROUP - 2 : GROUP + 2]
    assert stored.column("answer").to_pylist() == [p.answer for p in expected]
    assert list(stored) == expected
    with pytest.raises(IndexError):
        stored[COUNT]
    del expected
    tracemalloc.start()
    for _ in Stored(tmp_path / "p.parquet", Prompt):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    held = list(Stored(tmp_path / "p.parquet", Prompt))
    assert peak < tracemalloc.get_traced_memory()[0] * 0.75, f"all {len(held)} rows were held"
    tracemalloc.stop()


def test_no_rows_and_other_rows(tmp_path):
    write_records(tmp_path / "none.parquet", [], Prompt)
    assert list(Stored(tmp_path / "none.parquet", Prompt)) == []
    write_records(tmp_path / "p.parquet", prompts(), Prompt)
    with pytest.raises(InputError, match=r"not Rollout rows"):
        Stored(tmp_path / "p.parquet", Rollout)[0]
    with pytest.raises(InputError, match=r"absent\.parquet: not a readable parquet file"):
        Stored(tmp_path / "absent.parquet", Prompt)


def rollout(name, j, verdict, ids=(5, 6), extracted="9", end="stop"):
    return Rollout(name, f"{name}/{j}", ids, "text", extracted, verdict, end, (0.0,) * len(ids))


def test_zero_hit_prompts_are_found_and_aimed(tmp_path):
    run, answers = RunDirectory(tmp_path), ["1", "2", "2", "3", "4"]
    write_records(
        run.part("rollouts", 0),
        [
            *(rollout("a", j, "wrong", ids=(5,) * (j + 1), end="length") for j in range(2)),
            *(rollout("b", j, ("wrong", "unknown")[j]) for j in range(2)),
        ],
    )
    write_records(
        run.part("rollouts", 2),
        [rollout("e", 0, "wrong", extracted=None, end="length"), rollout("e", 1, "wrong", extracted=None)],
    )
    ids = pa.chunked_array([["a", "b", "c"], ["d", "e"]])
    found = ZeroHit(run, {0: [0], 2: [2]}, 2, ids)  # the part with c and d was given up
    with Verifier() as verifier:
        first, second = found.aimed(0, pa.chunked_array([answers]), verifier)
    assert (first.prompt_id, first.row, first.rollouts, first.decoded) == ("a", 0, 2, 3)
    assert (second.prompt_id, second.row, second.rollouts, second.decoded) == ("e", 4, 2, 5)
    assert first.wrong in {"2", "3", "4"}
    assert second.wrong in {"1", "2", "3"}
    assert (found.without, found.cut, found.rollouts, found.uncut) == (2, 1, 6, [])


def test_what_cannot_be_cut_is_told(tmp_path):
    run = RunDirectory(tmp_path)
    write_records(run.part("rollouts", 0), [rollout("a", 0, "wrong", ids=(5,)), rollout("b", 0, "correct")])
    found = ZeroHit(run, {0: [0]}, 2, pa.chunked_array([["a", "b"]]))
    assert not found.found
    assert [(error.row, error.id, error.reason) for error in found.uncut] == [(0, "a", "short-rollouts")]


def test_of_any_number_of_answers_as_many_are_drawn_from(tmp_path):
    """Else the wrong targets of n prompts would cost n * n."""
    run, n = RunDirectory(tmp_path), 5000
    write_records(run.part("rollouts", 0), [rollout(f"p{i}", 0, "wrong") for i in range(n)])
    found = ZeroHit(run, {0: [0]}, n, pa.chunked_array([[f"p{i}" for i in range(n)]]))
    with Verifier() as verifier:
        aimed = list(found.aimed(0, pa.chunked_array([[str(i) for i in range(n)]]), verifier))
    assert len(aimed) == n
    assert all(target.wrong != str(target.row) for target in aimed)
    times = Counter(target.wrong for target in aimed)
    assert 900 < len(times) <= 1024, "spread over many answers"
    assert max(times.values()) < 30


def test_a_part_beyond_99999_counts(tmp_path):
    run, parts = RunDirectory(tmp_path), [Part(i, range(1)) for i in (99_999, 100_000, 100_001)]
    for part in parts[:2]:
        write_records(run.part("rollouts", part.index), [], Rollout)
    assert [settled(run, Mine(), part) for part in parts] == [True, True, False]
    assert unsettled(run, Mine(), parts) == parts[2:]
    assert [path.name for path in run.parts("rollouts")] == ["part-99999.parquet", "part-100000.parquet"]


def test_the_file_that_a_run_began_with_is_not_read_again(tmp_path, monkeypatch):
    path, config = tmp_path / "p.jsonl", RecoverConfig(strategies=("resample",), chat="never")
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(3)]

    def job():
        return Job(tiny_model(), tiny_tokenizer(), config, tmp_path / "run")

    write_jsonl(path, rows)
    with (first := job()).verifier:
        first.take_prompts(path)
    again = job()
    monkeypatch.setattr(again, "read_prompts", None)
    again.take_prompts(str(path))
    assert [prompt.text for prompt in again.prompts] == [row["prompt"] for row in rows]
    write_jsonl(path, [*rows, {"prompt": "8+1=", "answer": "9"}])
    with (other := job()).verifier, pytest.raises(RunError, match="over other prompts"):
        other.take_prompts(path)
    write_jsonl(path, [row | {"further": None} for row in rows][::-1])
    with (other := job()).verifier, pytest.raises(RunError, match="over other prompts"):
        other.take_prompts(path)


def test_a_thousand_parts_are_planned_without_their_rows(tmp_path, monkeypatch):
    """A part is its place, and what is done is one look at a folder: a plan costs as much whatever stands in the
    parts, and no process opens them."""
    run = Recovery(tiny_model(), tiny_tokenizer(), RecoverConfig(strategies=("resample",), chunk=1), tmp_path)
    targets = [Target(f"p{i}", i, None if i % 2 else "7", 16, 32) for i in range(1000)]
    write_records(run.run.targets, targets)
    (arm,) = run.arms()
    parts = run.parts(arm)
    assert [part.rows for part in parts[:2]] == [range(1), range(1, 2)]
    assert len(pickle.dumps(parts)) < 500 * len(parts)
    for part in parts[::3]:
        path = run.run.part("starts", part.index, arm.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    looks = []
    listed = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: looks.append(path) or listed(path))
    assert [part.index for part in unsettled(run.run, Propose(), parts)] == [i for i in range(1000) if i % 3]
    assert len(looks) <= 4
    wrong = run.parts(replace(arm, name="resample@wrong", wrong=True))
    assert [row for part in wrong for row in part.rows] == list(range(0, 1000, 2))
