"""`doctor --run`: what the failures of a mined run are, and which setting is named for each."""

import pytest
from typer.testing import CliRunner

from latentrevise.cli import app
from latentrevise.data.records import Prompt, Rollout, write_json, write_records
from latentrevise.errors import InputError
from latentrevise.recovery.diagnosis import advice, failures_of, kind_of, run_diagnosis
from latentrevise.recovery.rundir import FORMAT, RunDirectory

CONFIG = {"max_new_tokens": 64, "verify_timeout": 5.0}
PROMPTS = [Prompt("a", "q", (1,), "12"), Prompt("b", "q", (1,), "7")]


def rollout(prompt="a", text="", extracted=None, verdict="wrong", reason="stop"):
    return Rollout(prompt, f"{prompt}/{text}", (1,), text, extracted, verdict, reason, (0.0,))


CORRECT = rollout(text="12", extracted="12", verdict="correct")
LATE = rollout(text="\\boxed{sin}", extracted="sin", verdict="unknown")
CUT = rollout(text="let us", reason="length")
CUT_WRONG = rollout(text="\\boxed{3}", extracted="3", reason="length")
SILENT = rollout(text="so it is twelve.")
NAMED = rollout(text="The answer is 12.")
NOT_NAMED = rollout(text="112 and 12.5 and 3.12")
TURN = rollout(text="well\n<|im_start|>user\nmore")
WRONG = rollout("b", text="\\boxed{8}", extracted="8")


def test_a_failure_has_one_kind():
    kinds = [kind_of(r) for r in (CORRECT, LATE, CUT, CUT_WRONG, SILENT, TURN, WRONG)]
    assert kinds == [None, "timeout", "truncated", "wrong answer", "no answer", "no answer", "wrong answer"]


def test_counts():
    found = failures_of(PROMPTS, [LATE, CUT, SILENT, NAMED, NOT_NAMED, TURN, WRONG])
    assert found.kinds == {"timeout": 1, "truncated": 1, "no answer": 4, "wrong answer": 1}
    assert (found.named, found.other_form, found.turns) == (1, 1, 1)
    assert (found.prompts, found.zero_hit, found.format_only) == (2, 2, 1)
    found = failures_of(PROMPTS, [CORRECT, CUT])
    assert (found.correct, found.failed, found.zero_hit) == (1, 1, 0)


@pytest.mark.parametrize(
    ("rollouts", "setting"),
    [
        ([CUT], "raise max_new_tokens (64)"),
        ([TURN], "chat=true"),
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
