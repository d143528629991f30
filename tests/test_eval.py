"""Evaluation: the estimator, its intervals, benchmarks of the hub's form in local files, the command."""

import json
import math
from itertools import combinations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from latentrevise.cli import app
from latentrevise.data.records import Prompt, Rollout, read_records
from latentrevise.data.storage import write_jsonl
from latentrevise.demo import get_family, make_prompts, model_dir
from latentrevise.engines import HFEngine
from latentrevise.errors import ConfigError, InputError
from latentrevise.model.loading import load_model
from latentrevise.recovery.evaluate import (
    BENCHMARKS,
    INSTRUCTION,
    EvalConfig,
    EvalRunConfig,
    Score,
    benchmark_rows,
    evaluate,
    evaluate_run,
    summary,
)
from latentrevise.verify.verifier import Verifier
from tests.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def verifier():
    with Verifier(timeout=30, workers=1) as it:
        yield it


def test_pass_at_k_is_the_chance_over_all_draws():
    scores = [Score("a", 6, 2, 0, None), Score("b", 6, 0, 1, None), Score("c", 6, 6, 0, None)]
    found = summary(scores, EvalConfig(samples=6, k=(1, 2, 5), resamples=50))
    for k in (1, 2, 5):
        chances = [np.mean([any(i < s.correct for i in draw) for draw in combinations(range(6), k)]) for s in scores]
        assert found[f"pass@{k}"][0] == pytest.approx(np.mean(chances))
        assert found[f"pass@{k}"][1] <= found[f"pass@{k}"][0] <= found[f"pass@{k}"][2]
    assert found["zero_hit"] == pytest.approx(1 / 3)
    assert found["unknown"] == pytest.approx(1 / 18)
    assert "valid@1" not in found


def test_k_and_empty_input_are_checked():
    with pytest.raises(ConfigError, match="between 1 and samples"):
        EvalConfig(samples=2, k=(4,))
    with pytest.raises(InputError, match="nothing was evaluated"):
        summary([], EvalConfig())


ROWS = {
    "math-500": {
        "problem": "1+1",
        "solution": "so \\boxed{2}",
        "answer": "2",
        "subject": "x",
        "level": 1,
        "unique_id": "a/1",
    },
    "aime24": {"id": 60, "problem": "x?", "solution": "s", "answer": "204", "url": "u", "year": "2024"},
    "aime25": {"problem": "y?", "answer": 70, "id": "0"},
    "amc23": {"id": 0, "question": "z?", "answer": 27.0, "url": "u"},
    "minerva": {"question": "v?", "answer": "4.5e33"},
    "olympiadbench": {"question": "w?", "final_answer": ["$3$", "5"], "context": None, "is_multiple_answer": True},
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmarks_load_from_files_of_their_form(name, tmp_path, verifier):
    path = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_pylist([ROWS[name]]), path)
    (prompt,), errors = EvalConfig().load(benchmark_rows(name, path), TOKENIZER, None, verifier)
    assert not errors
    assert prompt.text == ROWS[name][BENCHMARKS[name].prompt]
    assert prompt.answer == {"aime25": "70", "amc23": "27.0", "olympiadbench": "3, 5"}.get(
        name, ROWS[name].get("answer")
    )
    known = {"math-500": "a/1", "aime24": "60", "aime25": "0", "amc23": "0"}
    assert name not in known or prompt.id == known[name]


def test_a_benchmark_with_other_columns_is_refused(tmp_path):
    path = tmp_path / "data.jsonl"
    write_jsonl(path, [{"problem": "1+1", "solution": "2"}])
    with pytest.raises(InputError, match="no column answer"):
        benchmark_rows("math-500", path)
    with pytest.raises(InputError, match="cannot be loaded"):
        benchmark_rows("math-500", tmp_path / "none.parquet")
    with pytest.raises(ConfigError, match="choose from math-500"):
        benchmark_rows("math-5000")


def test_a_prompt_is_sampled_alike_in_any_company(verifier):
    model, tokenizer = load_model(model_dir("rule"), dtype="float32", device="cpu")
    prompts = [
        Prompt(r["id"], r["prompt"], tuple(tokenizer.encode(r["prompt"])), r["answer"])
        for r in make_prompts(get_family("rule"), 6)
    ]
    config = EvalConfig(samples=4, k=(1, 4), max_new_tokens=64, checker="latentrevise.demo:check", resamples=50)
    scores, rollouts = evaluate(model, tokenizer, prompts, config, verifier=verifier)
    alone, own = evaluate(model, tokenizer, prompts[2:3], config, verifier=verifier)
    assert alone == scores[2:3]
    assert [r.completion_ids for r in own] == [r.completion_ids for r in rollouts[8:12]]
    assert all(s.valid <= s.correct <= s.samples for s in scores)
    found = summary(scores, config)
    assert found["valid@1"][0] <= found["pass@1"][0] <= found["pass@4"][0]


def command(folder, *settings, data="prompts.jsonl"):
    words = ["eval", "--model", str(model_dir("rule")), "--data", str(folder / data), "--out", str(folder / "out")]
    shared = ["samples=2", "k=[1, 2]", "max_new_tokens=64", "chunk=2", *settings]
    return CliRunner().invoke(
        app, [*words, *(w for s in shared for w in ("--set", s)), "--dtype", "float32", "--quiet"]
    )


def test_the_command_takes_up_what_was_stopped(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "prompts.jsonl", make_prompts(get_family("rule"), 4))
    result = command(tmp_path)
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["prompts"] == 4
    assert math.isclose(metrics["pass@2"][0], float(result.output.split("pass@2: ")[1].split()[0]), abs_tol=1e-4)
    rollouts = read_records(out / "rollouts", Rollout)
    assert len(rollouts) == 8

    (out / "scores" / "part-00001.parquet").unlink()
    (out / "metrics.json").unlink()
    asked, generate = [], HFEngine.generate
    monkeypatch.setattr(HFEngine, "generate", lambda *a, **k: asked.append(len(a[1])) or generate(*a, **k))
    assert command(tmp_path).exit_code == 0
    assert asked == [2], "the part that was there is not sampled again"
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert read_records(out / "rollouts", Rollout) == rollouts

    (tmp_path / "prompts.jsonl").rename(tmp_path / "moved.jsonl")
    assert command(tmp_path, data="moved.jsonl").exit_code == 0, "the same rows elsewhere are the same evaluation"
    assert asked == [2]
    (tmp_path / "moved.jsonl").rename(tmp_path / "prompts.jsonl")

    assert "temperature: 1.0 there, 0.5 now" in str(command(tmp_path, "temperature=0.5").exception)
    write_jsonl(tmp_path / "prompts.jsonl", make_prompts(get_family("rule"), 5))
    assert "data.hash" in str(command(tmp_path).exception)
    assert "neither a file" in str(command(tmp_path, data="math-50").exception)


@pytest.mark.parametrize("own", ["", "Box it."])
def test_the_problems_of_a_benchmark_ask_for_a_box(own, tmp_path, caplog):
    write_jsonl(tmp_path / "problems.jsonl", [{"problem": "1+1", "answer": 2}])
    config = EvalRunConfig(max_new_tokens=4, instruction=own)
    source = tmp_path / "problems.jsonl"
    found = evaluate_run(tiny_model(), TOKENIZER, "math-500", config, tmp_path / "out", source=source)
    (prompt,) = read_records(tmp_path / "out" / "prompts.parquet", Prompt)
    assert prompt.text == "1+1\n\n" + (own or INSTRUCTION)
    assert found["config"]["instruction"] == (own or INSTRUCTION)
    assert "1 of 1 rollouts hold no answer by answer_pattern = 'boxed'" in caplog.text
    assert found["unparsed"] == 0.0


def test_what_is_asked_for_fits_the_answer_pattern(tmp_path):
    write_jsonl(tmp_path / "problems.jsonl", [{"problem": "1+1", "answer": 2}])
    source = tmp_path / "problems.jsonl"
    for pattern, asked in (("gsm8k", "`#### `"), ("answer-line", "`Answer: `")):
        config, out = EvalRunConfig(max_new_tokens=4, answer_pattern=pattern), tmp_path / pattern
        evaluate_run(tiny_model(), TOKENIZER, "math-500", config, out, source=source)
        assert asked in read_records(out / "prompts.parquet", Prompt)[0].text
    own = EvalRunConfig(max_new_tokens=4, answer_pattern="=> (.+)")
    with pytest.raises(ConfigError, match="instruction"):
        evaluate_run(tiny_model(), TOKENIZER, "math-500", own, tmp_path / "own", source=source)


def test_rows_are_read_by_the_settings_and_one_too_long_is_left_out(tmp_path):
    rows = [{"task": r["prompt"], "gold": r["answer"]} for r in make_prompts(get_family("rule"), 3)]
    rows[1]["task"] = " ; ".join([rows[1]["task"]] * 40)
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    result = command(tmp_path, "prompt_column=task", "answer_column=gold")
    assert result.exit_code == 0, result.output
    assert "2 prompts, 1 left out" in result.output
    (error,) = map(json.loads, (tmp_path / "out" / "errors.jsonl").read_text().splitlines())
    assert (error["row"], error["reason"]) == (2, "over-long-prompt")
