"""`doctor --run`: what the failures of a mined run are, and which setting is named for each."""

from dataclasses import replace

import pytest
from typer.testing import CliRunner

from latentrevise.cli import app
from latentrevise.data.records import Prompt, Rollout, write_records
from latentrevise.data.storage import write_json
from latentrevise.demo import get_family, make_prompts, model_dir
from latentrevise.demo.run import demo_config
from latentrevise.errors import InputError
from latentrevise.model.loading import load_model
from latentrevise.recovery.diagnosis import advice, failures_of, kind_of, run_diagnosis
from latentrevise.recovery.pipeline import Recovery
from latentrevise.recovery.rundir import FORMAT, RunDirectory

CONFIG = {"max_new_tokens": 64, "verify_timeout": 5.0, "answer_pattern": "boxed"}
PROMPTS = [Prompt("a", "q", (1,), "12"), Prompt("b", "q", (1,), "7")]


def rollout(prompt="a", text="", extracted=None, verdict="wrong", reason="stop"):
    return Rollout(prompt, f"{prompt}/{text}", (1,), text, extracted, verdict, reason, (0.0,))


CORRECT = rollout(text="12", extracted="12", verdict="correct")
LATE = rollout(text="\\boxed{sin}", extracted="sin", verdict="unknown")
CUT = rollout(text="let us", reason="length")
CUT_WRONG = rollout(text="\\boxed{3}", extracted="3", reason="length")
SILENT = rollout(text="so it is twelve.")
OTHER = rollout(text="The answer is 12.")
HASHES = rollout(text="so\n#### 12")
NOT_NAMED = rollout(text="112 and 12.5 and 3.12")
TURN = rollout(text="well\n<|im_start|>user\nmore")
ROLE = rollout(text="so \\boxed{12}\nuser\nWhat is 1 + 1?\nassistant\n\\boxed{2}", extracted="2", reason="length")
WRONG = rollout("b", text="\\boxed{8}", extracted="8")


def test_a_failure_has_one_kind():
    kinds = [kind_of(r) for r in (CORRECT, LATE, CUT, CUT_WRONG, SILENT, TURN, ROLE, WRONG)]
    turns = ["another turn"] * 2
    assert kinds == [None, "timeout", "truncated", "wrong answer", "no answer", *turns, "wrong answer"]
    assert kind_of(OTHER, ["the-answer-is"]) == "another form"


def test_counts():
    found = failures_of(PROMPTS, [CUT, SILENT, OTHER, HASHES, NOT_NAMED, TURN, WRONG])
    assert {kind: count for kind, count in found.kinds.items() if count} == {
        "truncated": 1,
        "another turn": 1,
        "another form": 2,
        "no answer": 2,
        "wrong answer": 1,
    }
    assert (found.named, found.forms) == (2, {"the-answer-is": 1, "gsm8k": 1})
    assert (found.prompts, found.zero_hit, found.undecided, found.format_only) == (2, 2, 0, 1)
    found = failures_of(PROMPTS, [CORRECT, CUT])
    assert (found.correct, found.failed, found.zero_hit) == (1, 1, 0)
    found = failures_of(PROMPTS, [LATE, CUT, WRONG])  # the first prompt may have been solved
    assert (found.zero_hit, found.undecided) == (1, 1)


def test_answers_are_read_as_the_run_reads_them():
    boxed = rollout(text="\\boxed{12}")
    found = failures_of(PROMPTS, [boxed], "gsm8k")
    assert found.forms == {"boxed": 1}
    (line,) = advice(found, CONFIG | {"answer_pattern": "gsm8k"})
    assert "another form than gsm8k: set answer_pattern=boxed" in line


@pytest.mark.parametrize(
    ("rollouts", "setting"),
    [
        ([CUT], "raise max_new_tokens (64)"),
        ([TURN], "chat=always"),
        ([ROLE], "chat=always"),
        ([HASHES], "answer_pattern=gsm8k"),
        ([SILENT], "`instruction`"),
        ([LATE], "raise verify_timeout (5.0 s)"),
        ([WRONG] * 20 + [CUT], "not the format"),
        ([CORRECT], "too easy"),
    ],
)
def test_the_setting_that_is_named(rollouts, setting):
    (line,) = advice(failures_of(PROMPTS, rollouts), CONFIG)
    assert setting in line


def test_the_most_frequent_cause_comes_first_and_equal_ones_are_all_named():
    lines = advice(failures_of(PROMPTS, [CUT, LATE, SILENT, SILENT]), CONFIG)
    assert "`instruction`" in lines[0]
    assert len(lines) == 3


def test_command(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    write_json(directory.header, {"format": FORMAT, "config": CONFIG})
    write_records(directory.prompts, PROMPTS)
    with pytest.raises(InputError, match="mine first"):
        run_diagnosis(directory.path)
    write_records(directory.part("rollouts", 0), [CUT, CUT, WRONG])
    result = CliRunner().invoke(app, ["doctor", "--run", str(directory.path)])
    assert result.exit_code == 0, result.output
    assert "3 rollouts of 2 prompts: 0 correct, 3 not; 2 prompts are zero-hit" in result.output
    assert "truncated           2   66.7 %" in result.output
    assert "on 1 of the 2 zero-hit prompts" in result.output
    assert "raise max_new_tokens (64)" in result.output


@pytest.mark.parametrize(
    ("changes", "kind", "setting"),
    [
        ({"max_new_tokens": 6}, "truncated", "raise max_new_tokens (6)"),
        ({"answer_pattern": r"#### (\d+)"}, "another form", "set answer_pattern=boxed"),
    ],
)
def test_runs_that_were_mined_with_a_wrong_setting(tmp_path, changes, kind, setting):
    family = get_family("rule")
    model, tokenizer = load_model(model_dir("rule"), dtype="float32", device="cpu")
    config = replace(demo_config(family), rollouts=2, **changes)
    Recovery(model, tokenizer, config, tmp_path, progress=False).mine(make_prompts(family, 4, split="develop", seed=0))
    first, *lines = run_diagnosis(tmp_path).splitlines()
    assert first.startswith("8 rollouts of 4 prompts: 0 correct, 8 not; 4 prompts are zero-hit")
    assert f"  {kind:<14}      8  100.0 %" in lines
    assert setting in lines[-1]
