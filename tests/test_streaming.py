"""Memory does not grow with the number of prompts: what a run of four times as many needs at its peak."""

import tracemalloc
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentrevise import RecoverConfig
from latentrevise.data import export, records
from latentrevise.data import prompts as reading
from latentrevise.data.atoms import write_atoms
from latentrevise.data.records import Prompt, Rollout, Sample, Start, Trajectory, Verdict, write_records
from latentrevise.data.storage import write_jsonl
from latentrevise.data.stored import Stored
from latentrevise.recovery import targets
from latentrevise.recovery.pipeline import Recovery
from latentrevise.report import browser, figures
from latentrevise.report.drawing import styles_for
from latentrevise.report.runs import FinishedRun
from tests.tiny import tiny_model, tiny_tokenizer

CHUNK, TOKENS, EACH = 4, 60, 4
FORMATS = ("trl-sft", "trl-pref", "trl-groups", "rl")
CONFIG = RecoverConfig(
    rollouts=EACH, samples=EACH, strategies=("resample",), chunk=CHUNK, equal_compute=False, max_new_tokens=TOKENS,
    chat="never",
)  # fmt: skip


def made(out, count):
    """A run of ``count`` zero-hit prompts of which everything was written but the results."""
    run = Recovery(tiny_model(), tiny_tokenizer(), CONFIG, out, progress=False)
    prompts = [Prompt(f"p{i}", f"{i}+{i}=", (5, 6, 7), str(i % 7)) for i in range(count)]
    run.run.begin(run.job.header, prompts, [])
    for index, first in enumerate(range(0, count, CHUNK)):
        names = [p.id for p in prompts[first : first + CHUNK]]
        rollouts, starts, samples, verdicts = [], [], [], []
        for i, name in enumerate(names):
            ids, start = (
                [tuple((first + i + j + k) % 90 for k in range(TOKENS)) for j in range(EACH)],
                f"resample/{name}/0",
            )
            text, logprobs = "wait " * TOKENS, (-0.5,) * TOKENS
            rollouts += [
                Rollout(name, f"{name}/{j}", ids[j], text, "9", "wrong", "stop", logprobs) for j in range(EACH)
            ]
            starts.append(Start(start, name, None, "1", (), (), False, False, EACH, 3, 0, 0, 0.1))
            samples += [Sample(start, name, f"{start}/{j}", ids[j], text, "stop", logprobs, 0.1) for j in range(EACH)]
            verdicts += [
                Verdict(
                    f"{start}/{j}", start, name, "1", "correct", True, False, None, [], None, logprobs, {"step": -0.1}
                )
                for j in range(EACH)
            ]
        write_records(run.run.part("rollouts", index), rollouts)
        path = run.run.part("starts", index, "resample")
        write_records(path, starts)
        write_atoms(path.with_suffix(".safetensors"), {})
        write_records(run.run.part("samples", index, "resample"), samples)
        write_records(run.run.part("verdicts", index, "resample"), verdicts)
    return run


def peaks(out, count):
    """Bytes at the peak of each step, above what was there before."""
    run, found = made(out, count), {}

    def step(name, work):
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        work()
        found[name] = tracemalloc.get_traced_memory()[1] - before

    def picture():
        finished = FinishedRun.open(out)
        figures.figure_groups(finished, styles_for(["resample"]))
        browser.browsers([finished], [browser.TokenTexts(None)], [["resample"]])

    def read_again():
        assert sum(1 for _ in Stored(run.run.trajectories, Trajectory)) == count * EACH

    tracemalloc.start()
    try:
        with run.session():
            step("zero-hit", lambda: run.job.targets)
            assert len(run.job.targets) == count
            step("collect", run.collect)
        step("rows", read_again)
        step("report", picture)
        for name in FORMATS:
            step(
                name,
                lambda name=name: export.export_run(out, name, out / f"{name}.jsonl", tokenizer=run.job.tokenizer),
            )
    finally:
        tracemalloc.stop()
    return found


@pytest.mark.timeout(900)
def test_four_times_the_prompts_take_no_more_memory(tmp_path, monkeypatch):
    for module in (records, targets, export):
        monkeypatch.setattr(module, "GROUP", CHUNK * EACH)
    monkeypatch.setattr(browser, "MOST", 4)
    monkeypatch.setattr(targets, "_ANSWERS", 4)
    peaks(tmp_path / "first", CHUNK)  # what is imported or compiled once
    small, large = peaks(tmp_path / "small", 4 * CHUNK), peaks(tmp_path / "large", 16 * CHUNK)
    footers = 12 * 16_000  # what a parquet file says of each further row group, here of 16 rows
    assert {name: (small[name], peak) for name, peak in large.items() if peak > 1.2 * small[name] + footers} == {}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("most", [None, 8])
def test_a_file_of_prompts_is_not_held(tmp_path, monkeypatch, kind, most):
    for module, name in ((records, "GROUP"), (reading, "_CHECKED"), (reading, "_HELD")):
        monkeypatch.setattr(module, name, 32)

    def begin(count):
        rows = [{"id": f"p{i}", "prompt": f"{i}+1=", "answer": "2", "note": f"{i:02000}"} for i in range(count)]
        source, out = tmp_path / f"{count}.{kind}", tmp_path / str(count)
        if kind == "jsonl":
            write_jsonl(source, rows)
        else:
            pq.write_table(pa.Table.from_pylist(rows), source, row_group_size=32)
        run = Recovery(tiny_model(), tiny_tokenizer(), replace(CONFIG, max_prompts=most), out, progress=False)
        del rows
        with run.session():
            tracemalloc.start()
            try:
                run.job.take_prompts(source)
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
        assert [prompt.meta["note"] for prompt in run.prompts[-1:]] == [f"{int(run.prompts[-1].id[1:]):02000}"]
        return peak, len(run.prompts)

    begin(40)  # what is imported or compiled once
    (small, _), (large, count) = begin(800), begin(1600)  # either is more than the block that is hashed at a time
    assert count == (most or 1600)
    assert large - small < 800 * 400, "an id and its hash are kept of each, not 2,000 characters"
