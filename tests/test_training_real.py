"""The training study on real text: which rows its arms learn. That it trains is for the machine that has the model."""

import pytest

from benchmarks import training_real
from benchmarks.__main__ import main
from benchmarks.training import Cell
from benchmarks.training_plan import Sizes
from latentrevise.data.records import Prompt, Rollout, Sample, Start, Verdict, write_records
from latentrevise.demo.wordproblems import NAME, word_problems
from latentrevise.errors import ConfigError, InputError
from latentrevise.recovery.rundir import RunDirectory
from tests.tiny import EOS, tiny_tokenizer

SIZES, TOKENIZER = Sizes(rows=4), tiny_tokenizer(vocab=110)


@pytest.fixture
def source(tmp_path):
    """Two runs, each of a solved and of a zero-hit prompt. Of the strategies' three samples the first is right, valid
    and admitted, the second right, not valid and turned away, the third wrong; ids say which: run, arm, sample."""
    arms = list(training_real.OWN.values())
    for number in range(2):
        run = RunDirectory(tmp_path / str(number))
        solved, hard = (
            Prompt(f"{number}-{name}", row["prompt"], (5 + number,), row["answer"])
            for name, row in zip(("solved", "hard"), word_problems(2, 2, seed=number), strict=True)
        )
        write_records(run.prompts, [solved, hard])
        rollouts = [
            Rollout(p.id, f"{p.id}/{i}", (20 + i,), "", None, verdict, "stop", (-0.1,))
            for p, verdicts in ((solved, ("correct", "wrong")), (hard, ("wrong", "wrong")))
            for i, verdict in enumerate(verdicts)
        ]
        write_records(run.part("rollouts", 0), rollouts)
        for place, arm in enumerate(arms):
            start = Start(f"s{place}", hard.id, None, "1", (), (30 + place,), False, False, 3, 0, 0, 0, 0.0)
            names = [f"{number}/{arm}/{i}" for i in range(3)]
            samples = [
                Sample(start.start_id, hard.id, name, (40 + i,), "", "length" if i else "stop", (-0.1,), 0.0)
                for i, name in enumerate(names)
            ]
            verdicts = [
                Verdict(name, start.start_id, hard.id, "1", right, False, False, valid, [], guard, None)
                for name, right, valid, guard in zip(
                    names,
                    ("correct", "correct", "wrong"),
                    (True, False, False),
                    (None, "unused-fact", None),
                    strict=True,
                )
            ]
            write_records(run.part("starts", 0, arm), [start])
            write_records(run.part("samples", 0, arm), samples)
            write_records(run.part("verdicts", 0, arm), verdicts)
    return training_real.Pool((tmp_path / "0", tmp_path / "1"))


def rows(source, arm, order=0):
    found, counts = training_real.rows_of(Cell(NAME, "sft", arm, 0, order), source, TOKENIZER, SIZES)
    assert len(found) == 2 * SIZES.rows
    return [row["input_ids"] for row in found], counts


def test_half_of_the_rows_are_ordinary(source):
    ordinary = [[5, 20, EOS], [6, 20, EOS]]
    for arm in training_real.ARMS["sft"]:
        found, _ = rows(source, arm)
        assert sorted(found[: SIZES.rows]) == sorted(2 * ordinary)


@pytest.mark.parametrize("arm", training_real.OWN)
def test_the_other_half_is_what_was_recovered(source, arm):
    found, counts = rows(source, arm)
    start = 30 + list(training_real.OWN).index(arm)
    admitted = [[5, start, 40, EOS], [6, start, 40, EOS]]
    turned_away = [[5, start, 41], [6, start, 41]]
    guarded = arm in training_real.GUARDED
    assert counts == {"different": 2 if guarded else 4, "valid_rows": 2}
    assert sorted(found[SIZES.rows :]) == sorted(2 * admitted if guarded else admitted + turned_away)
    few, seen = source.recovered(training_real.OWN[arm], 2, 1, TOKENIZER, guarded)
    assert {row["input_ids"][0] for row in few} == {5, 6}, "one of each prompt before the second of any"
    assert seen <= 2


def test_the_ceiling_learns_the_solutions_of_zero_hit_prompts(source):
    found, counts = rows(source, "reference")
    assert counts == {"different": 2, "valid_rows": 2}
    solutions = [word_problems(2, 2, seed=number)[1]["solution"] for number in range(2)]
    assert {TOKENIZER.decode(ids[1:-1]) for ids in found[SIZES.rows :]} == set(solutions)


def test_what_judges_is_not_learned(monkeypatch):
    asked = {}
    monkeypatch.setattr(training_real, "evaluate", lambda m, t, prompts, config: (asked.update(p=prompts, c=config), 0))
    sizes = Sizes(judged=8)
    known = [row["prompt"] for row in word_problems(2, 5, split=sizes.split, seed=training_real.JUDGING)]
    training_real.judge(None, TOKENIZER, sizes, known, draw=3)
    texts = [prompt.text for prompt in asked["p"]]
    assert (len(set(texts)), asked["c"].seed) == (8, 3)
    assert not set(texts) & set(known)


def test_the_study_needs_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no finished run: name them with --runs"):
        main(["training_real"])
    drawn = tmp_path / "gsm-study" / "gsm-m0-p4-further"  # rollouts of the hard prompts alone: no run of the study
    drawn.mkdir(parents=True)
    with pytest.raises(ConfigError, match="no finished run: name them with --runs"):
        main(["training_real"])
    for command in ("training_real", "checkers", "guards"):
        with pytest.raises(InputError, match=r"gsm-m0-p4-further: no finished run of the recovery study .*; leave it"):
            main([command, "--runs", str(drawn)])
